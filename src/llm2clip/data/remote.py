"""Reading files from object storage and web servers: `s3://`, `gs://`, `hf://`, `https://` and `http://`.

Files are downloaded as a whole into a local cache (see `shard_cache`), except for Parquet files, which can also be read
by byte range. Requests are repeated after temporary errors (see `storage`). Messages never contain credentials.

The first version of a file that a process sees is pinned: if the file is replaced later, reading it raises an error
instead of mixing both versions.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import os
import posixpath
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from braceexpand import braceexpand

from llm2clip.data import shard_cache
from llm2clip.data.storage import (
    BLOCK_BYTES,
    LOOKUP_ATTEMPTS,
    LOOKUP_THREADS,
    MAX_ATTEMPTS,
    MissingRemoteFileError,
    RemoteError,
    build_replaced_error,
    call_with_retries,
    fetch_block,
    format_version,
    get_filesystem,
    get_scheme,
    parse_size,
    read_info,
    to_path,
    to_url,
)
from llm2clip.io_utils import SizedReader, hide_url_secrets, open_regular_file

T = TypeVar("T")

PREFETCH_THREADS = 4
FAILURE_SECONDS = 600  # a file that failed after all attempts is not requested again for this long
_REMOTE = re.compile(r"(s3|gs|hf|https?)://")

_versions: dict[str, str] = {}  # URL -> pinned version
_failures: dict[str, tuple[float, RemoteError]] = {}  # URL -> time and error of the last failure


# ---- names -----------------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Return True if a path is the URL of a remote file or folder. `hf:NAME`, a data set on the Hub, is not a path."""
    return _REMOTE.match(str(path)) is not None


def get_parent(path: str) -> str:
    """Return the folder of a local or remote file."""
    return os.path.dirname(_strip_query(path) if is_remote(path) else path)


def get_file_name(path: str) -> str:
    """Return the file name of a local or remote file."""
    return os.path.basename(_strip_query(path) if is_remote(path) else path)


def join_path(folder: str, name: str) -> str:
    """Join a folder and a relative file name from a data set.

    A name never leads from a local folder to a remote file, or the other way round. In a remote folder, names are
    resolved like relative URLs: an absolute name or `..` stays within the same bucket, data set or host.
    """
    if not is_remote(folder):
        return os.path.join(folder or ".", name) if is_remote(name) else os.path.join(folder, name)
    scheme, root, key = _split_url(folder)
    if scheme.startswith("http"):
        name = quote(name)
    joined = posixpath.normpath(posixpath.join("/", key, name.replace("\\", "/"))).lstrip("/")
    return f"{scheme}://{root}/{joined}"


def _split_url(url: str) -> tuple[str, str, str]:
    """Split a URL into its scheme, its root (bucket, data set or host), and the path below the root."""
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        parts = rest.split("/")
        num_parts = 3 if parts[0] in ("datasets", "spaces", "models", "buckets") else 2
        return scheme, "/".join(parts[:num_parts]), "/".join(parts[num_parts:])
    root, _, key = rest.partition("/")
    return scheme, root, key


def _strip_query(url: str) -> str:
    """Return a web address without its query string. In object storage, `?` is part of the name."""
    return url.partition("?")[0] if url.startswith("http") else url


# ---- listing ---------------------------------------------------------------------------------------------------------


def find_remote_files(pattern: str) -> list[str]:
    """Resolve a URL, which may contain glob characters and {000..010} ranges, to the URLs of existing files.

    Folders are returned with a final slash. The versions of all files are looked up and pinned.

    Raises:
        MissingRemoteFileError: No file matches the pattern.
        ValueError: The URL contains a user name or password.
    """
    name = hide_url_secrets(pattern)
    if "@" in _split_url(pattern)[1] and not pattern.startswith("hf"):
        raise ValueError(f"{name}: remove the user name and password from the URL. Put them in ~/.netrc instead")
    urls = []
    for url in _expand_braces(pattern):
        matches = _glob(url) if _has_magic(url) else [url]
        if not matches:
            raise MissingRemoteFileError(f"{hide_url_secrets(url)}: no such file or folder")
        urls += matches
    with ThreadPoolExecutor(min(LOOKUP_THREADS, len(urls))) as pool:
        return list(pool.map(_pin_file_or_mark_folder, urls))


def look_up_versions(urls: Sequence[str]) -> None:
    """Pin the current versions of many files, several at a time."""
    if urls:
        with ThreadPoolExecutor(min(LOOKUP_THREADS, len(urls))) as pool:
            list(pool.map(_pin_file_or_mark_folder, urls))


def list_folder(folder: str) -> list[str]:
    """Return the sorted names of the files and folders in a local or remote folder."""
    if not is_remote(folder):
        return sorted(os.listdir(folder))
    return [name.rstrip("/") for name in _list_remote_folder(folder)]


def _list_remote_folder(folder: str) -> list[str]:
    """Return the sorted names of the files and folders in a remote folder. Names of folders end with a slash."""
    folder = folder.rstrip("/") + "/"
    scheme = get_scheme(folder)
    filesystem = get_filesystem(scheme)
    names = set()
    for entry in call_with_retries(lambda: filesystem.ls(to_path(folder), detail=True), folder):
        url = to_url(scheme, entry["name"])
        name = url.rstrip("/").removeprefix(folder)
        if name and "/" not in name and "?" not in name and url.startswith(folder):
            names.add(name + ("/" if entry["type"] == "directory" else ""))
    return sorted(names)


def walk_folder(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the path, folder names and file names of a folder and its subfolders, as `os.walk` does.

    The caller can remove folder names from the list, to skip these subfolders.

    Raises:
        OSError: A folder cannot be listed.
    """
    if not is_remote(folder):
        yield from os.walk(folder, onerror=_raise)
        return
    names = _list_remote_folder(folder)
    folders = [name.rstrip("/") for name in names if name.endswith("/")]
    yield folder.rstrip("/"), folders, [name for name in names if not name.endswith("/")]
    for name in folders:
        yield from walk_folder(f"{folder.rstrip('/')}/{name}")


def file_exists(path: str) -> bool:
    """Return True if a local or remote file exists."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        _get_version(path)
    except MissingRemoteFileError:
        return False
    except RemoteError:  # for example, no permission: opening the file reports the reason
        return True
    return True


def get_file_size(path: str) -> int:
    """Return the size of a local or remote file in bytes.

    Raises:
        OSError: The file does not exist, or its size cannot be determined.
    """
    if not is_remote(path):
        return os.path.getsize(path)
    return parse_size(_get_version(path))


def _raise(error: OSError) -> None:
    raise error


def _expand_braces(pattern: str) -> Iterator[str]:
    address, mark, query = pattern.partition("?") if pattern.startswith("http") else (pattern, "", "")
    if "{" not in address or _exists(pattern):
        yield pattern
        return
    for url in braceexpand(address):
        yield url + mark + query


def _exists(url: str) -> bool:
    """Return True if a file exists. A name without listing permission, which is the usual case, counts as missing."""
    try:
        return get_remote_version(url) != ""
    except RemoteError:
        return False


def _has_magic(url: str) -> bool:
    return glob.has_magic(_strip_query(url)) and not _exists(url)


def _glob(pattern: str) -> list[str]:
    """Return the URLs that match a glob pattern. As in a local folder, hidden files match only a pattern with a dot."""
    scheme = get_scheme(pattern)
    filesystem = get_filesystem(scheme)
    paths = call_with_retries(lambda: filesystem.glob(to_path(pattern)), pattern, LOOKUP_ATTEMPTS)
    urls = sorted(to_url(scheme, path) for path in paths)
    if posixpath.basename(pattern).startswith("."):
        return urls
    return [url for url in urls if not posixpath.basename(url.rstrip("/")).startswith(".")]


def _pin_file_or_mark_folder(url: str) -> str:
    """Pin the current version of a file, or return the URL of a folder with a final slash.

    Web servers do not distinguish files from folders, so a web address without a file suffix is a folder.
    """
    if url.endswith("/") or (url.startswith("http") and "." not in _split_url(_strip_query(url))[2].rpartition("/")[2]):
        return url.rstrip("/") + "/"
    info = read_info(url)
    if info["type"] == "directory":
        return url + "/"
    _versions[url] = format_version(info, url)
    return url


# ---- versions --------------------------------------------------------------------------------------------------------


def get_remote_version(url: str) -> str:
    """Return the pinned version of a remote file. Look it up and pin it on first use.

    A version contains the size and the etag or, if there is none, the modification time.

    Raises:
        MissingRemoteFileError: The file does not exist.
        RemoteError: The server cannot be reached, or does not state the size of the file.
    """
    version = _versions.get(url)
    if version is None:
        info = read_info(url)
        if info["type"] == "directory":
            raise MissingRemoteFileError(f"{hide_url_secrets(url)} is a folder, not a file")
        version = _versions.setdefault(url, format_version(info, url))
    return version


def get_pinned_versions(urls: Iterable[str]) -> dict[str, str]:
    """Return a dict {URL: version} of the files whose version is pinned, to pass it to other processes."""
    return {url: _versions[url] for url in urls if url in _versions}


def pin_versions(versions: Mapping[str, str]) -> None:
    """Pin the versions of files, for example in a worker process. Other versions are then rejected."""
    _versions.update(versions)


def get_version_numbers(url: str) -> tuple[int, int]:
    """Return the size of a remote file, and a hash of its version. Compare with `image_refs.get_file_version`."""
    version = get_remote_version(url)
    return parse_size(version), int(hashlib.sha256(version.encode()).hexdigest()[:15], 16)


def _check_version(url: str, version: str) -> None:
    """Raise `ReplacedFileError` if a file no longer has this version."""
    current = format_version(read_info(url, MAX_ATTEMPTS), url)
    if current != version:
        raise build_replaced_error(url, version, current)


# ---- reading ---------------------------------------------------------------------------------------------------------


def open_file(path: str) -> io.BufferedReader:
    """Open a local or remote file for reading in binary mode. A remote file is first downloaded into the cache.

    While the file is open, it is not removed from the cache.

    Raises:
        OSError: The file does not exist or cannot be read.
        CacheFullError: The file does not fit in the cache.
        ReplacedFileError: The remote file was replaced during the run.
    """
    if not is_remote(path):
        return open_regular_file(path)
    version = _get_version(path)
    cached_path, size = shard_cache.get_cached_path(path, version), parse_size(version)
    while (file := shard_cache.open_cached(cached_path, size)) is None:  # another process may remove it immediately
        write = functools.partial(_write_blocks, path, version)
        add_file = functools.partial(shard_cache.add_file, cached_path, size, hide_url_secrets(path), write)
        _remember_failure(path, add_file)
    return file


def get_local_path(path: str) -> str:
    """Return the path of a local file with the contents of a file. A remote file is first downloaded into the cache.

    Open the path at once: later, the file may have been removed from the cache. For the exceptions, see `open_file`.
    """
    if not is_remote(path):
        return path
    with open_file(path) as file:
        return str(file.name)


def open_remote(path: str) -> BinaryIO:
    """Open a local or remote file for reading single byte ranges, such as row groups of a Parquet file.

    A remote file that is in the cache is read from there. Otherwise, each read is a request. Closing the file checks
    that it was not replaced in the meantime.
    """
    if not is_remote(path):
        return open_regular_file(path)
    version = get_remote_version(path)
    cached = shard_cache.open_cached(shard_cache.get_cached_path(path, version), parse_size(version))
    return cached or _RangeReader(path, version)  # type: ignore[return-value]


class FileSlice(SizedReader):
    """Stream over part of a file or URL."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        super().__init__(size)
        self._file, self._offset = open_file(path), offset

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:size]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _RangeReader(SizedReader):
    """Stream in which each read is one request. It is not buffered, because pyarrow reads exactly what it needs."""

    def __init__(self, url: str, version: str) -> None:
        super().__init__(parse_size(version))
        self._url, self._version, self._num_reads = url, version, 0

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        if end <= self._position:
            return 0
        chunks = io.BytesIO()
        fetch_block(self._url, self._version, self._position, end, chunks)
        data = chunks.getbuffer()
        if len(data) > end - self._position:  # a server without ranges returns the whole file
            data = data[self._position : end]
        view[: len(data)] = data
        self._position += len(data)
        self._num_reads += 1
        return len(data)

    def close(self) -> None:
        if not self.closed and self._num_reads:
            self._num_reads = 0
            super().close()
            _check_version(self._url, self._version)
        super().close()


def _get_version(url: str) -> str:
    return _versions.get(url) or _remember_failure(url, lambda: get_remote_version(url))


def _remember_failure(url: str, function: Callable[[], T]) -> T:
    """Call a function that reads a file. If this failed recently, raise the same error again without a request.

    Otherwise, each image of a tar file that cannot be downloaded would wait for all attempts.
    """
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


def _write_blocks(url: str, version: str, file: BinaryIO) -> None:
    """Download a file in blocks. Check that its version is the same before and after the download."""
    _check_version(url, version)
    size = parse_size(version)
    while file.tell() < size:
        fetch_block(url, version, file.tell(), min(size, file.tell() + BLOCK_BYTES), file)
    _check_version(url, version)


# ---- downloading ahead -----------------------------------------------------------------------------------------------


class _Prefetcher:
    """Background threads that download files into the cache. The threads end when no files are left."""

    def __init__(self) -> None:
        self.process_id = os.getpid()
        self._lock = threading.Lock()
        self._pending: deque[str] = deque()
        self._active: set[str] = set()

    def replace_pending(self, urls: Sequence[str]) -> None:
        """Download these files next. Files that were requested earlier and not started are dropped."""
        with self._lock:
            self._pending = deque(url for url in dict.fromkeys(urls) if url not in self._active)
            num_threads = min(PREFETCH_THREADS - len(self._active), len(self._pending))
            for _ in range(num_threads):
                url = self._pending.popleft()
                self._active.add(url)
                threading.Thread(target=self._run, args=(url,), daemon=True).start()

    def _run(self, url: str) -> None:
        next_url: str | None = url
        while next_url is not None:
            with suppress(Exception):  # opening the file raises the same error
                get_local_path(next_url)
            with self._lock:
                self._active.discard(next_url)
                next_url = self._pending.popleft() if self._pending else None
                if next_url is not None:
                    self._active.add(next_url)


_prefetcher = _Prefetcher()


def prefetch(paths: Sequence[str]) -> None:
    """Download remote files into the cache in background threads, several at a time, in this order.

    Return immediately. Local files and files in the cache are ignored, as are errors: opening the file raises them.
    Each call replaces the files of earlier calls whose download has not started.
    """
    global _prefetcher
    urls = [path for path in paths if is_remote(path)]
    if not urls:
        return
    if _prefetcher.process_id != os.getpid():  # forked: the threads and the state of the lock belong to the parent
        _prefetcher = _Prefetcher()
    _prefetcher.replace_pending(urls)
