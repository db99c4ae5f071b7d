"""Access to files in object storage and on web servers: `s3://`, `gs://`, `hf://`, `https://` and `http://`.

Entire files are downloaded into a local cache. The least recently used files are removed when the cache is full.
Readers hold a shared lock, so files that are being read are not removed. Error messages never contain credentials.

Each process pins the version of a file when it first accesses the file. If the file is replaced later, reading it
raises an error, so a run never mixes two versions of a file.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import math
import os
import posixpath
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from braceexpand import braceexpand

from llm2clip.data import storage
from llm2clip.data.storage import MissingRemoteFileError, RemoteError, is_remote
from llm2clip.io_utils import FatalDataError, atomic_path, get_cache_dir, hide_url_secrets, open_regular_file
from llm2clip.runs.output_folder import hold_folder_lock

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

T = TypeVar("T")

PREFETCH_THREADS = 4
FAILURE_SECONDS = 600  # seconds after a failure before the file is requested again
MAX_FOLDERS = 30_000  # maximum number of subfolders in a remote folder
MAX_FOLDER_DEPTH = 16  # maximum depth of nested subfolders in a remote folder
SIZE_VARIABLE = "LLM2CLIP_SHARD_CACHE_GB"
MAX_DEFAULT_BYTES = 200 * 10**9
FILL_FRACTION = 0.95  # files are removed from a full cache until its size is this fraction of the size limit
UNLISTED_FRACTION = 0.02  # the cache is listed again after downloads of this fraction of the size limit
TOUCH_SECONDS = 60  # minimum number of seconds between updates of a file's access time
# Modification time of every complete file in the cache, in seconds since the epoch. Other files are invalid.
DOWNLOADED_TIME = 1_000_000_000

_versions: dict[str, str] = {}  # URL -> pinned version
_failures: dict[str, tuple[float, RemoteError]] = {}  # URL -> time and error of the last failure
# (cache folder, size limit) -> number of bytes that can be downloaded before the cache must be listed again
_unlisted_allowances: dict[tuple[str, str], float] = {}
_pending: deque[str] = deque()  # URLs of files to download in advance
_free_threads = threading.Semaphore(PREFETCH_THREADS)


class CacheFullError(FatalDataError):
    """Raised when a remote file does not fit in the cache."""


# ---- listing ---------------------------------------------------------------------------------------------------------


def find_remote_files(pattern: str) -> list[str]:
    """Expand glob characters and {000..010} ranges in a URL. Return the URLs, and pin the versions of the files.

    In the returned list, the URLs of folders end with a slash. Raise `MissingRemoteFileError` if no file matches.
    """
    name = hide_url_secrets(pattern)
    if "@" in storage.split_url(pattern)[1] and not pattern.startswith("hf"):
        raise ValueError(f"{name}: a URL must not contain a user name or password. Use ~/.netrc instead")
    address = storage.strip_query_string(pattern)
    is_pattern = (glob.has_magic(address) or "{" in address) and not _remote_file_exists(pattern)
    urls = []
    for url in [expanded + pattern[len(address) :] for expanded in braceexpand(address)] if is_pattern else [pattern]:
        matches = _glob_remote_files(url) if is_pattern and glob.has_magic(storage.strip_query_string(url)) else [url]
        if not matches:
            raise MissingRemoteFileError(f"{hide_url_secrets(url)}: no such file or folder")
        urls += matches
    return pin_current_versions(urls)


def pin_current_versions(urls: Sequence[str]) -> list[str]:
    """Pin the current versions of files in parallel. Return the URLs, with a slash at the end of each folder's URL."""
    with ThreadPoolExecutor(storage.LOOKUP_THREADS) as pool:
        return list(pool.map(_pin_current_version, urls))


def list_folder(folder: str) -> list[str]:
    """Return the sorted names of the files and folders in a local or remote folder."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    return [name.rstrip("/") for name in _list_remote_folder(folder)]


def _list_remote_folder(folder: str) -> list[str]:
    folder = folder.rstrip("/") + "/"
    scheme = storage.get_url_scheme(folder)
    filesystem = storage.get_filesystem(scheme)
    names = set()
    for entry in storage.call_with_retries(lambda: filesystem.ls(storage.to_fsspec_path(folder), detail=True), folder):
        url = storage.to_url(scheme, entry["name"])
        name = url.rstrip("/").removeprefix(folder)
        if name and "/" not in name and "?" not in name and url.startswith(folder):
            names.add(name + ("/" if entry["type"] == "directory" else ""))
    return sorted(names)


def walk_folder(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the path, folder names and file names of a folder and its subfolders, as `os.walk` does.

    To skip subfolders, remove their names from the list of folder names during the iteration.

    Raises:
        OSError: A folder is unreadable, or a remote folder has too many subfolders.
    """
    if not is_remote(folder):
        yield from os.walk(folder, onerror=_raise_listing_error)
        return
    pending = [(folder.rstrip("/"), 0)]  # (folder, depth). Web servers can list a folder in itself, so limit the depth
    num_folders = 0
    while pending:
        path, depth = pending.pop()
        num_folders += 1
        if depth > MAX_FOLDER_DEPTH or num_folders > MAX_FOLDERS:
            raise RemoteError(
                f"{hide_url_secrets(path)}: more than {MAX_FOLDERS:,} folders, or more than {MAX_FOLDER_DEPTH} nested "
                "folders. Pass a folder with fewer subfolders"
            )
        names = _list_remote_folder(path)
        folders = [name.rstrip("/") for name in names if name.endswith("/")]
        yield path, folders, [name for name in names if not name.endswith("/")]
        pending += [(f"{path}/{name}", depth + 1) for name in reversed(folders)]


def file_exists(path: str) -> bool:
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        _look_up_version(path)
    except RemoteError as error:  # errors such as a missing permission are raised again when the file is opened
        return not isinstance(error, MissingRemoteFileError)
    return True


def get_file_size(path: str) -> int:
    """Return the size of a local or remote file in bytes. Raise OSError if the size cannot be determined."""
    if not is_remote(path):
        return os.path.getsize(path)
    return storage.parse_file_size(_look_up_version(path))


def _raise_listing_error(error: OSError) -> None:
    raise error


def _remote_file_exists(url: str) -> bool:
    with suppress(RemoteError):  # files without read permission are treated as missing
        return get_remote_version(url) != ""
    return False


def _glob_remote_files(pattern: str) -> list[str]:
    """Return the URLs that match a glob pattern. Hidden files match only a name pattern that starts with a dot."""
    scheme = storage.get_url_scheme(pattern)
    filesystem = storage.get_filesystem(scheme)
    paths = storage.call_with_retries(
        lambda: filesystem.glob(storage.to_fsspec_path(pattern)), pattern, storage.LOOKUP_ATTEMPTS
    )
    urls = sorted(storage.to_url(scheme, path) for path in paths)
    if posixpath.basename(pattern).startswith("."):
        return urls
    return [url for url in urls if not posixpath.basename(url.rstrip("/")).startswith(".")]


def _pin_current_version(url: str) -> str:
    """Pin the current version of a file. Return the URL, with a slash appended if it is the URL of a folder.

    Web servers do not distinguish files from folders, so a URL without a file extension is treated as a folder.
    """
    if url.endswith("/") or (
        url.startswith("http") and "." not in storage.split_url(storage.strip_query_string(url))[2].rpartition("/")[2]
    ):
        return url.rstrip("/") + "/"
    info = storage.fetch_file_info(url)
    if info["type"] == "directory":
        return url + "/"
    _versions[url] = storage.build_file_version(info, url)
    return url


# ---- versions --------------------------------------------------------------------------------------------------------


def get_remote_version(url: str) -> str:
    """Return the pinned version of a remote file (size and etag or time). If there is none, pin the current version."""
    version = _versions.get(url)
    if version is None:
        info = storage.fetch_file_info(url)
        if info["type"] == "directory":
            raise MissingRemoteFileError(f"{hide_url_secrets(url)} is a folder, not a file")
        version = _versions.setdefault(url, storage.build_file_version(info, url))
    return version


def get_pinned_versions(urls: Iterable[str]) -> dict[str, str]:
    """Return the pinned versions of files. Other processes can pass the result to `pin_versions`."""
    return {url: _versions[url] for url in urls if url in _versions}


def pin_versions(versions: Mapping[str, str]) -> None:
    """Pin the versions of files, for example in a worker process. Reading another version raises an error."""
    _versions.update(versions)


def _check_remote_file_is_unchanged(url: str, version: str) -> None:
    current = storage.build_file_version(storage.fetch_file_info(url, storage.MAX_ATTEMPTS), url)
    if current != version:
        raise storage.build_replaced_file_error(url, version, current)


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_file(path: str) -> io.BufferedReader:
    """Open a file in binary mode. A remote file is downloaded into the cache and not removed while it is open.

    Raises:
        OSError: The file cannot be read.
        FatalDataError: The remote file was replaced during the run or does not fit in the cache.
    """
    if not is_remote(path):
        return open_regular_file(path)
    version = _look_up_version(path)
    cached_path = get_cached_path(path, version)
    while (file := _open_cached_file(cached_path, storage.parse_file_size(version))) is None:
        # Another process can remove the downloaded file before this process opens it.
        _call_unless_recently_failed(path, functools.partial(_download_unless_cached, path, version, cached_path))
    return file


def get_local_path(path: str) -> str:
    """Return the path of a local file, or of the cached copy of a remote file, which may be removed later."""
    if not is_remote(path):
        return path
    with open_file(path) as file:
        return str(file.name)


class FileSlice(io.RawIOBase):
    """Seekable stream over a byte range of a local or remote file."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = open_file(path), offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, self._size)[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:size]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _look_up_version(url: str) -> str:
    return _versions.get(url) or _call_unless_recently_failed(url, lambda: get_remote_version(url))


def _call_unless_recently_failed(url: str, function: Callable[[], T]) -> T:
    """Call a function that accesses a URL. If access to the URL has recently failed, raise the earlier error."""
    failed_at, failure = _failures.get(url, (0.0, None))
    if failure is not None and time.monotonic() - failed_at < FAILURE_SECONDS:
        raise failure
    try:
        result = function()
    except RemoteError as error:
        _failures[url] = (time.monotonic(), error)
        raise
    _failures.pop(url, None)
    return result


# ---- cache -----------------------------------------------------------------------------------------------------------


def get_cache_folder() -> Path:
    return get_cache_dir() / "shards"


def get_cached_path(url: str, version: str) -> Path:
    """Return the cache path for a version of a remote file. The path has the same suffix as the file."""
    digest = hashlib.sha256(f"{url}\0{version}".encode("utf-8", "surrogatepass")).hexdigest()[:40]
    name = url.partition("?")[0].rpartition("/")[2]
    suffix = re.search(r"(\.[A-Za-z0-9]{1,9}){1,2}$", name)
    return get_cache_folder() / digest[:2] / f"{digest}{suffix[0] if suffix else ''}"


def _open_cached_file(path: Path, size: int) -> io.BufferedReader | None:
    """Open a cached file and lock it against removal. Return None if the file is missing or invalid."""
    try:
        file = open_regular_file(path)
    except FileNotFoundError:
        return None
    _lock_file(file, exclusive=False)
    status = os.fstat(file.fileno())
    if status.st_size != size or status.st_mtime != DOWNLOADED_TIME:
        file.close()
        path.unlink(missing_ok=True)
        return None
    if time.time() - status.st_atime > TOUCH_SECONDS:
        with suppress(OSError):
            os.utime(path, (time.time(), DOWNLOADED_TIME))
    return file


def _download_unless_cached(url: str, version: str, path: Path) -> None:
    """Download a file into the cache, unless another process has just downloaded it."""
    size = storage.parse_file_size(version)
    with hold_folder_lock(get_cache_folder() / "locks", path.name[:2], timeout=-1):
        if (file := _open_cached_file(path, size)) is not None:
            file.close()
            return
        _free_cache_space(size, url)
        for is_last_attempt in (False, True):
            try:
                _download_to_cache(url, version, path)
                return
            except OSError as error:
                if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in storage.DISK_ERRORS):
                    raise
                if is_last_attempt:
                    raise CacheFullError(
                        f"{hide_url_secrets(url)}: {error}. Free some space, or move the cache to another disk with "
                        "the environment variable LLM2CLIP_CACHE"
                    ) from error
                _remove_cached_files(sorted(_list_cached_files()), size)
                _unlisted_allowances.clear()


def _download_to_cache(url: str, version: str, path: Path) -> None:
    size = storage.parse_file_size(version)
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as stream:
            _check_remote_file_is_unchanged(url, version)
            while stream.tell() < size:
                storage.fetch_byte_range(
                    url, version, stream.tell(), min(size, stream.tell() + storage.BLOCK_BYTES), stream
                )
            _check_remote_file_is_unchanged(url, version)
        os.utime(temporary, (time.time(), DOWNLOADED_TIME))
        if temporary.stat().st_mtime != DOWNLOADED_TIME:  # cached files with any other time are invalid
            raise FatalDataError(
                f"{path.parent}: this disk does not store modification times. Move the cache to another disk with the "
                "environment variable LLM2CLIP_CACHE"
            )


def _free_cache_space(size: int, url: str) -> None:
    key = (str(get_cache_folder()), os.environ.get(SIZE_VARIABLE, ""))
    if size > _unlisted_allowances.get(key, -1):
        files = sorted(_list_cached_files())
        used = sum(file_size for _, file_size, _ in files)
        limit = _get_cache_size_limit(used)
        if size > limit:
            raise CacheFullError(
                f"{hide_url_secrets(url)}: the file size is {size / 1e9:.2f} GB, but the cache of remote files is "
                f"limited to {limit / 1e9:.2f} GB. Raise the limit with the environment variable {SIZE_VARIABLE}"
            )
        if used + size > limit:
            used -= _remove_cached_files(files, used + size - FILL_FRACTION * limit)
        _unlisted_allowances[key] = min(limit - used, max(size, UNLISTED_FRACTION * limit))
    _unlisted_allowances[key] = _unlisted_allowances.get(key, 0.0) - size  # another thread may have removed the entry


def _get_cache_size_limit(used: int) -> float:
    """Return the cache's size limit in bytes. Default: half of (free space + cache size), at most 200 GB."""
    text = os.environ.get(SIZE_VARIABLE)
    if not text:
        return min(MAX_DEFAULT_BYTES, (shutil.disk_usage(get_cache_folder()).free + used) / 2)
    try:
        limit = float(text) * 1e9
    except ValueError:
        limit = math.nan
    if not limit > 0:
        raise ValueError(f"{SIZE_VARIABLE} must be a number of gigabytes greater than 0 (got {text!r})")
    return limit


def _list_cached_files() -> Iterator[tuple[float, int, str]]:
    """Yield (time of last use, size, path) for each file in the cache, including incomplete downloads."""
    for parent, folders, names in os.walk(get_cache_folder()):
        if "locks" in folders:
            folders.remove("locks")
        for name in names:
            path = os.path.join(parent, name)
            with suppress(OSError):  # the file was removed by another process
                status = os.stat(path)
                yield status.st_atime, status.st_size, path


def _remove_cached_files(files: Iterable[tuple[float, int, str]], num_bytes: float) -> int:
    """Remove unused files, in order, until `num_bytes` bytes are freed. Return the number of freed bytes."""
    num_freed = 0
    for _, size, path in files:
        if num_freed >= num_bytes:
            break
        with suppress(OSError), open_regular_file(path) as file:
            if _lock_file(file, exclusive=True):
                os.unlink(path)
                num_freed += size
    return num_freed


def _lock_file(file: BinaryIO, exclusive: bool) -> bool:
    """Lock an open file until it is closed. Return False if another process holds the lock."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except BlockingIOError:
        return False
    except OSError:  # The disk does not support locks. On POSIX, open files can be read after their removal.
        return True
    return True


# ---- prefetching -----------------------------------------------------------------------------------------------------


def prefetch_remote_files(paths: Sequence[str]) -> None:
    """Download remote files into the cache in background threads, several at a time. Ignore errors and local files.

    Each call with remote files replaces the pending downloads of earlier calls.
    """
    global _pending
    urls = [path for path in dict.fromkeys(paths) if is_remote(path)]
    if not urls:
        return
    _pending = deque(urls)
    for _ in range(min(PREFETCH_THREADS, len(urls))):
        if _free_threads.acquire(blocking=False):
            threading.Thread(target=_download_pending_files, daemon=True).start()


def _download_pending_files() -> None:
    while True:
        try:
            url = _pending.popleft()
        except IndexError:
            _free_threads.release()
            return
        with suppress(Exception):  # the error is raised again when the file is opened
            get_local_path(url)


def _reset_prefetch_threads() -> None:
    global _free_threads
    _pending.clear()
    _free_threads = threading.Semaphore(PREFETCH_THREADS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_prefetch_threads)
