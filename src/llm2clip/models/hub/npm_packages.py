"""JavaScript libraries for exported web pages, downloaded from the npm registry into the user's cache folder.

Packages are downloaded with `npm pack`, so the registry, proxy and credentials in the user's npm configuration apply.
Each package must match its pinned SHA-512 hash. Packages are used only as archives: they are never installed, and their
code is never run here. The selected files are moved into the cache atomically.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from llm2clip.io_utils import atomic_dir, get_cache_dir
from llm2clip.models.hub.pretrained import AssetError, AssetUnavailableError

NPM_TIMEOUT = 600  # of a download, in seconds


@dataclass(frozen=True)
class NpmPackage:
    """Package on the npm registry with a pinned hash.

    Attributes:
        sha512: base64-encoded SHA-512 hash of the archive, as in the `integrity` field of the registry.
        license: SPDX identifier.
        homepage: address of the source code.
        files: dict from a file's path in the package to its name in the cache and in exported pages.
        size_mb: download size in MB.
    """

    name: str
    version: str
    sha512: str
    license: str
    homepage: str
    size_mb: float
    files: dict[str, str] = field(default_factory=dict)


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
)
TOKENIZERS = NpmPackage(
    "@huggingface/tokenizers",
    "0.2.0",
    "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
    "Apache-2.0",
    "https://github.com/huggingface/tokenizers.js",
    0.1,
    {"dist/tokenizers.min.mjs": "tokenizers.js", "LICENSE": "tokenizers-LICENSE.txt"},
)


def resolve_npm_package(package: NpmPackage) -> Path:
    """Return the folder with a package's files, downloading the package if it is not in the cache.

    Raises:
        AssetUnavailableError: the package is not in the cache and could not be downloaded.
        AssetError: the downloaded archive does not match its hash or has different files.
    """
    target = get_cache_dir() / "npm" / f"{package.name.removeprefix('@').replace('/', '-')}-{package.version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as downloads:
        with console.status(f"{package.name}: downloading ({package.size_mb:.1f} MB)"):
            archive = _download(package, Path(downloads), target)
        _check_sha512(package, archive)
        try:
            with atomic_dir(target) as folder:
                _extract(package, archive, folder)
        except OSError:
            if not target.is_dir():  # otherwise, another process has extracted the package in the meantime
                raise
    console.print(
        f"{package.name} {package.version}: downloaded to {target}. License: {package.license}",
        soft_wrap=True,
        highlight=False,
    )
    return target


def _download(package: NpmPackage, folder: Path, target: Path) -> Path:
    requirement = f"{package.name}@{package.version}"
    advice = (
        f"The files are needed only once: they are kept in {target}. You can also copy this folder from another machine"
    )
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
        output = f"no answer within {NPM_TIMEOUT} seconds"
    archives = list(folder.glob("*.tgz"))
    if len(archives) != 1:
        last_lines = "\n".join(output.strip().splitlines()[-6:])
        raise AssetUnavailableError(
            f"{package.name}: npm could not download {requirement}:\n{last_lines}\n"
            f"Check the network and npm's registry with `npm view {requirement}`. {advice}"
        )
    return archives[0]


def _check_sha512(package: NpmPackage, archive: Path) -> None:
    with archive.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha512").digest()
    actual = base64.b64encode(digest).decode()
    if actual != package.sha512:
        raise AssetError(
            f"{package.name}: {archive.name} has SHA-512 {actual}, expected {package.sha512}. The file was changed in "
            "the registry or in transit, so it is not used"
        )


def _extract(package: NpmPackage, archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for path, name in package.files.items():
            stream = tar.extractfile(f"package/{path}")
            if stream is None:
                raise AssetError(f"{package.name} {package.version}: {path} is not a file")
            with stream, (folder / name).open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
