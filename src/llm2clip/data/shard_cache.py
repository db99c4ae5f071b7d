"""Local cache of remote files, with a size limit. The least recently used files are removed first.

The environment variable LLM2CLIP_SHARD_CACHE_GB sets the limit. Several processes can use the cache at the same time.
Files that are being read are never removed: readers hold a shared lock on them.
"""

import errno
import hashlib
import io
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from llm2clip.io_utils import FatalDataError, atomic_path, get_cache_dir

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

SIZE_VARIABLE = "LLM2CLIP_SHARD_CACHE_GB"
MAX_DEFAULT_BYTES = 200 * 10**9
FILL_FRACTION = 0.95  # if the cache is full, files are removed until this fraction of the limit is in use
TOUCH_SECONDS = 60  # a file's time of last use is updated at most this often


class CacheFullError(FatalDataError):
    """A remote file does not fit in the cache."""


class _Usage:
    """Estimate of the cache's size, so that not every download lists all files."""

    total = math.inf  # bytes; infinite if the files have not been listed yet
    added = 0.0  # bytes that this process has added since the files were listed


_usage = _Usage()


def get_cache_folder() -> Path:
    """Return the folder in which remote files are cached."""
    return get_cache_dir() / "shards"


def get_cached_path(url: str, version: str) -> Path:
    """Return the path at which a version of a remote file is cached. It ends with the file's suffix."""
    digest = hashlib.sha256(f"{url}\0{version}".encode("utf-8", "surrogatepass")).hexdigest()[:40]
    name = url.partition("?")[0].rpartition("/")[2]
    suffix = re.search(r"(\.[A-Za-z0-9]{1,9}){1,2}$", name)
    return get_cache_folder() / digest[:2] / f"{digest}{suffix[0] if suffix else ''}"


def open_cached(path: Path, size: int) -> io.BufferedReader | None:
    """Open a cached file, which is not removed while open. Return None if it is missing or has a different size."""
    try:
        file = open(path, "rb")  # noqa: SIM115 - the caller closes it
    except FileNotFoundError:
        return None
    _lock(file, exclusive=False)
    status = os.fstat(file.fileno())
    if status.st_size != size:  # damaged, for example by a power failure
        file.close()
        path.unlink(missing_ok=True)
        return None
    if time.time() - status.st_mtime > TOUCH_SECONDS:
        with suppress(OSError):
            os.utime(path)
    return file


def add_file(path: Path, size: int, name: str, write: Callable[[BinaryIO], None]) -> None:
    """Add a file to the cache, unless another process has just added it.

    Args:
        path: Path from `get_cached_path`.
        size: Size of the file in bytes.
        name: Name of the remote file, for error messages.
        write: Function that writes the contents. It may be called again if the disk is full at first.

    Raises:
        CacheFullError: The file is larger than the size limit, or the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    locks = get_cache_folder() / "locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / path.name[:2]):
        if (file := open_cached(path, size)) is not None:
            file.close()
            return
        _make_room(size, name)
        try:
            _write_file(path, write)
        except OSError as error:
            if not _is_disk_full(error):
                raise
            _remove_files(bytes_to_free=size)
            try:
                _write_file(path, write)
            except OSError as second_error:
                if _is_disk_full(second_error):
                    raise _build_disk_full_error(size, name) from second_error
                raise
    _usage.total += size
    _usage.added += size


def get_size_limit() -> float:
    """Return the cache's size limit in bytes. Default: half of the free disk space, but at most 200 GB.

    Raises:
        ValueError: The environment variable is not a positive number.
    """
    text = os.environ.get(SIZE_VARIABLE)
    if not text:
        used = sum(size for _, size, _ in _list_files())
        return min(MAX_DEFAULT_BYTES, (shutil.disk_usage(get_cache_folder()).free + used) / 2)
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise ValueError(f"{SIZE_VARIABLE} must be a number of gigabytes greater than 0 (got {text!r})")
    return limit


def _write_file(path: Path, write: Callable[[BinaryIO], None]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        write(file)


def _make_room(size: int, name: str) -> None:
    """Remove files until a new file fits within the size limit."""
    limit = _read_limit_once()
    if size > limit:
        raise CacheFullError(
            f"{name}: {size / 1e9:.2f} GB, but the cache of remote files is limited to {limit / 1e9:.2f} GB. Raise the "
            f"limit with the environment variable {SIZE_VARIABLE}"
        )
    if _usage.added > 0.02 * limit or _usage.total + size > limit:
        _usage.total, _usage.added = sum(size for _, size, _ in _list_files()), 0
    if _usage.total + size > limit:
        _remove_files(_usage.total + size - FILL_FRACTION * limit)


_limits: dict[tuple[str, str], float] = {}  # (folder, environment variable) -> limit; listing all files takes time


def _read_limit_once() -> float:
    key = (str(get_cache_folder()), os.environ.get(SIZE_VARIABLE, ""))
    if key not in _limits:
        _limits[key] = get_size_limit()
        _usage.total = math.inf
    return _limits[key]


def _list_files() -> list[tuple[float, int, str]]:
    """Return the (time of last use, size, path) of each file in the cache, including unfinished downloads."""
    files = []
    for parent, folders, names in os.walk(get_cache_folder()):
        if "locks" in folders:
            folders.remove("locks")
        for name in names:
            path = os.path.join(parent, name)
            with suppress(OSError):  # removed by another process
                status = os.stat(path)
                files.append((status.st_mtime, status.st_size, path))
    return files


def _remove_files(bytes_to_free: float) -> None:
    """Remove the least recently used files that no process is reading or writing."""
    for _, size, path in sorted(_list_files()):
        if bytes_to_free <= 0:
            return
        with suppress(OSError), open(path, "rb") as file:
            if _lock(file, exclusive=True):
                os.unlink(path)
                bytes_to_free -= size
                _usage.total -= size


def _lock(file: BinaryIO, exclusive: bool) -> bool:
    """Lock an open file until it is closed. Return False if another process prevents an exclusive lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not support locks; on POSIX, an open file outlives its removal
        return True
    return True


def _is_disk_full(error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        cause = cause.__cause__
    return False


def _build_disk_full_error(size: int, name: str) -> CacheFullError:
    folder = get_cache_folder()
    free = shutil.disk_usage(folder).free / 1e9
    return CacheFullError(
        f"{name}: no space for {size / 1e9:.2f} GB in {folder} (free space: {free:.2f} GB). Free some space, or move "
        "the cache to another disk with the environment variable LLM2CLIP_CACHE"
    )
