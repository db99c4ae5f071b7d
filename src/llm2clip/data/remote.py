"""Reading files from object storage and web servers: `s3://`, `gs://`, `hf://`, `https://` and `http://`.

Files are downloaded as a whole into a local cache (see `shard_cache`), except for Parquet files, which can also be read
by byte range. All requests are repeated after temporary errors (see `retries`). Credentials come from the environment
that each storage's own tools use, such as AWS_PROFILE, and never appear in messages.

The first version of a file that a process sees is pinned: if the file is replaced later, reading it raises an error
instead of mixing both versions.
"""

from __future__ import annotations

import asyncio
import functools
import glob
import hashlib
import io
import math
import os
import posixpath
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from braceexpand import braceexpand

from llm2clip.data import shard_cache
from llm2clip.data.retries import MissingRemoteFileError, RemoteError, ReplacedFileError, call_with_retries
from llm2clip.io_utils import hide_url_secrets, install_command, open_regular_file

T = TypeVar("T")

BLOCK_BYTES = 32 << 20  # bytes per request of a download; after an error, only this block is requested again
BLOCK_TIMEOUT = 300.0  # seconds per block
READ_TIMEOUT = 60.0  # seconds without any data
CONNECT_TIMEOUT = 20.0  # seconds
LOOKUP_ATTEMPTS = 4  # fewer than for downloads, so that a mistyped host is reported within seconds
LOOKUP_THREADS = 16
PREFETCH_THREADS = 4
FAILURE_SECONDS = 600  # a file that failed after all attempts is not requested again for this long
_REMOTE = re.compile(r"(s3|gs|hf|https?)://")

_filesystems: dict[tuple[int, str], Any] = {}  # (process id, scheme) -> file system; forked processes need their own
_versions: dict[str, str] = {}  # URL -> pinned version
_failures: dict[str, tuple[float, RemoteError]] = {}  # URL -> time and error of the last failure


# ---- names -----------------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Return True if a path is the URL of a remote file or folder. `hf:NAME`, a data set on the Hub, is not a path."""
    return _REMOTE.match(path) is not None


def get_parent(path: str) -> str:
    """Return the folder of a local or remote file."""
    return os.path.dirname(_strip_query(path) if is_remote(path) else path)


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


def list_folder(folder: str) -> list[str]:
    """Return the sorted names of the files and folders in a remote folder. Names of folders end with a slash."""
    folder = folder.rstrip("/") + "/"
    scheme = _get_scheme(folder)
    filesystem = _get_filesystem(scheme)
    names = set()
    for entry in call_with_retries(lambda: filesystem.ls(_to_path(folder), detail=True), folder):
        url = _to_url(scheme, entry["name"])
        name = url.rstrip("/").removeprefix(folder)
        if name and "/" not in name and "?" not in name and url.startswith(folder):
            names.add(name + ("/" if entry["type"] == "directory" else ""))
    return sorted(names)


def walk_folder(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Yield the URL, folder names and file names of a remote folder and each of its subfolders, as `os.walk` does."""
    names = list_folder(folder)
    folders = [name.rstrip("/") for name in names if name.endswith("/")]
    yield folder.rstrip("/"), folders, [name for name in names if not name.endswith("/")]
    for name in folders:
        yield from walk_folder(f"{folder.rstrip('/')}/{name}")


def file_exists(path: str) -> bool:
    """Return True if a local or remote file exists."""
    if not is_remote(path):
        return os.path.isfile(path)
    try:
        get_remote_version(path)
    except MissingRemoteFileError:
        return False
    return True


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
    scheme = _get_scheme(pattern)
    filesystem = _get_filesystem(scheme)
    paths = call_with_retries(lambda: filesystem.glob(_to_path(pattern)), pattern, LOOKUP_ATTEMPTS)
    urls = sorted(_to_url(scheme, path) for path in paths)
    if posixpath.basename(pattern).startswith("."):
        return urls
    return [url for url in urls if not posixpath.basename(url.rstrip("/")).startswith(".")]


def _pin_file_or_mark_folder(url: str) -> str:
    """Pin the current version of a file, or return the URL of a folder with a final slash."""
    if url.endswith("/"):
        return url
    info = _read_info(url)
    if info["type"] == "directory":
        return url + "/"
    _versions[url] = _format_version(info, url)
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
        info = _read_info(url)
        if info["type"] == "directory":
            raise MissingRemoteFileError(f"{hide_url_secrets(url)} is a folder, not a file")
        version = _versions.setdefault(url, _format_version(info, url))
    return version


def get_pinned_versions(urls: Sequence[str]) -> dict[str, str]:
    """Return a dict {URL: version} of the files whose version is pinned, to pass it to other processes."""
    return {url: _versions[url] for url in urls if url in _versions}


def pin_versions(versions: Mapping[str, str]) -> None:
    """Pin the versions of files, for example in a worker process. Other versions are then rejected."""
    _versions.update(versions)


def get_version_numbers(url: str) -> tuple[int, int]:
    """Return the size of a remote file, and a hash of its version. Compare with `image_refs.get_file_version`."""
    version = get_remote_version(url)
    return _parse_size(version), int(hashlib.sha256(version.encode()).hexdigest()[:15], 16)


def _read_info(url: str) -> dict[str, Any]:
    filesystem = _get_filesystem(_get_scheme(url))
    options = {"refresh": True} if _get_scheme(url) in ("s3", "hf") else {}
    info: dict[str, Any] = call_with_retries(
        lambda: filesystem.info(_to_path(url), **options), url, max_attempts=LOOKUP_ATTEMPTS
    )
    return info


def _format_version(info: Mapping[str, Any], url: str) -> str:
    size = info.get("size")
    if size is None:
        raise RemoteError(f"{hide_url_secrets(url)}: the server does not state the size of the file")
    for key in ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "updated", "mtime"):
        if info.get(key):
            return f"{size}-{key.lower()}-{info[key]}"
    return f"{size}-"


def _parse_size(version: str) -> int:
    return int(version.partition("-")[0])


def _check_version(url: str, version: str) -> None:
    """Raise `ReplacedFileError` if a file no longer has this version."""
    current = _format_version(_read_info(url), url)
    if current != version:
        raise _build_replaced_error(url, version, current)


def _build_replaced_error(url: str, version: str, current: str) -> ReplacedFileError:
    return ReplacedFileError(
        f"{hide_url_secrets(url)} was replaced during the run (size and version were {version}, and are now "
        f"{current}). Start the command again to use the new file"
    )


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
    version = _versions.get(path) or _remember_failure(path, lambda: get_remote_version(path))
    cached_path, size = shard_cache.get_cached_path(path, version), _parse_size(version)
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
    cached = shard_cache.open_cached(shard_cache.get_cached_path(path, version), _parse_size(version))
    return cached or _RangeReader(path, version)  # type: ignore[return-value]


class _RangeReader(io.RawIOBase):
    """Stream in which each read is one request. It is not buffered, because pyarrow reads exactly what it needs."""

    def __init__(self, url: str, version: str) -> None:
        self._url, self._version, self._size = url, version, _parse_size(version)
        self._position = self._num_reads = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, self._size)[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        if end <= self._position:
            return 0
        chunks = io.BytesIO()
        _fetch_block(self._url, self._version, self._position, end, chunks)
        data = chunks.getbuffer()[: end - self._position]  # a server without range support returns the whole file
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
    size = _parse_size(version)
    while file.tell() < size:
        _fetch_block(url, version, file.tell(), min(size, file.tell() + BLOCK_BYTES), file)
    _check_version(url, version)


def _fetch_block(url: str, version: str, start: int, end: int, file: BinaryIO) -> None:
    """Write the bytes from `start` to `end` to the end of `file`. Write the whole file if the server has no ranges.

    Raises:
        RemoteError: The bytes cannot be read after several attempts.
    """
    position = file.tell()

    def fetch() -> None:
        file.seek(position)
        file.truncate()
        if _get_scheme(url).startswith("http"):
            _fetch_from_web(url, version, start, end, file)
        else:
            data = _fetch_from_storage(url, start, end)
            if len(data) != end - start:
                raise ConnectionError(f"truncated response: {len(data):,} of {end - start:,} bytes")
            file.write(data)

    call_with_retries(fetch, url)


def _fetch_from_storage(url: str, start: int, end: int) -> bytes:
    filesystem = _get_filesystem(_get_scheme(url))
    options = {"timeout": BLOCK_TIMEOUT} if filesystem.async_impl else {}
    data: bytes = filesystem.cat_file(_to_path(url), start=start, end=end, **options)
    return data


def _fetch_from_web(url: str, version: str, start: int, end: int, file: BinaryIO) -> None:
    from fsspec.asyn import sync

    filesystem = _get_filesystem(_get_scheme(url))
    sync(filesystem.loop, _stream_response, filesystem, url, version, start, end, file)


async def _stream_response(filesystem: Any, url: str, version: str, start: int, end: int, file: BinaryIO) -> None:
    """Write a byte range of a web address to a file. Check the size and etag in the response."""
    session = await filesystem.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(filesystem.encode_url(url), headers=headers) as response:
        response.raise_for_status()
        expected = end - start
        if response.status != 206:  # the server has no ranges
            start, expected = 0, _parse_size(version)
            file.seek(0)
        _check_response(response.headers, url, version)
        num_bytes = 0
        async with asyncio.timeout(BLOCK_TIMEOUT * math.ceil(expected / BLOCK_BYTES)):
            async for chunk in response.content.iter_chunked(1 << 20):
                num_bytes += len(chunk)
                if num_bytes > expected:
                    break
                file.write(chunk)
        if num_bytes != expected:
            raise ConnectionError(f"truncated response: {num_bytes:,} of {expected:,} bytes")


def _check_response(headers: Mapping[str, str], url: str, version: str) -> None:
    """Raise `ReplacedFileError` if the headers of a response state a different version of the file."""
    total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    if total.isdecimal():
        info = {"size": int(total), "ETag": headers.get("ETag"), "Last-Modified": headers.get("Last-Modified")}
        current = _format_version(info, url)
        if current != version:
            raise _build_replaced_error(url, version, current)


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
            try:
                get_local_path(next_url)
            except Exception:  # raised again when the file is opened
                pass
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


# ---- file systems ----------------------------------------------------------------------------------------------------


def _get_scheme(url: str) -> str:
    return url.partition("://")[0]


def _to_path(url: str) -> str:
    """Return the path that fsspec uses for a URL."""
    return url if _get_scheme(url).startswith("http") else url.partition("://")[2]


def _to_url(scheme: str, path: str) -> str:
    return path if "://" in path else f"{scheme}://{path}"


def _get_filesystem(scheme: str) -> Any:
    """Return this process's file system for a URL scheme. All threads share it, and thus its connections."""
    key = (os.getpid(), scheme)
    if key not in _filesystems:
        try:
            _filesystems[key] = _OPENERS[scheme]()
        except ImportError as error:
            raise ImportError(f"{scheme}:// requires additional packages ({error}): {install_command('remote')}") from error
    return _filesystems[key]


def _open_s3() -> Any:
    import botocore.session
    import fsspec

    # Without credentials, only public buckets can be read, and requests must not be signed.
    anonymous = botocore.session.get_session().get_credentials() is None
    config = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "retries": {"total_max_attempts": 1},  # `retries` repeats requests instead
        "max_pool_connections": 2 * LOOKUP_THREADS,
    }
    filesystem = fsspec.filesystem("s3", anon=anonymous, config_kwargs=config, use_listings_cache=False)
    filesystem.retries = 1
    return filesystem


def _open_gs() -> Any:
    import fsspec

    return fsspec.filesystem("gs", use_listings_cache=False)


def _open_hf() -> Any:
    import fsspec

    return fsspec.filesystem("hf")


def _open_web() -> Any:
    import fsspec
    from aiohttp import ClientTimeout

    # trust_env: proxies from HTTPS_PROXY, and credentials from ~/.netrc, which are sent only to the host they are for.
    timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    options = {"timeout": timeout, "trust_env": True}
    return fsspec.filesystem("https", client_kwargs=options, get_client=_open_session, use_listings_cache=False)


async def _open_session(loop: asyncio.AbstractEventLoop, **options: Any) -> Any:
    from aiohttp import ClientSession, TraceConfig

    trace = TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    return ClientSession(trace_configs=[trace], **options)


async def _check_redirect(session: Any, context: Any, redirect: Any) -> None:
    """Reject a redirect from https to http, over which anyone could read or change the data."""
    target = redirect.response.headers.get("Location", "")
    if redirect.url.scheme == "https" and target.lower().startswith("http:"):
        raise ValueError("redirect from https to http")


_OPENERS: dict[str, Callable[[], Any]] = {
    "s3": _open_s3, "gs": _open_gs, "hf": _open_hf, "https": _open_web, "http": _open_web,
}  # fmt: skip
