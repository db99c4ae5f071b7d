"""Access to object storage and web servers: URLs, file versions, and requests with retries after temporary errors.

Requests are sent through fsspec. Credentials are read from each service's usual settings, such as AWS_PROFILE or
~/.netrc.
"""

import asyncio
import errno
import math
import os
import posixpath
import random
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote

from llm2clip.io_utils import FatalDataError, describe_error, format_install_command, hide_url_secrets

T = TypeVar("T")

BLOCK_BYTES = 32 << 20  # bytes per download request; after an error, only the current block is requested again
BLOCK_TIMEOUT = 300.0  # seconds per block
READ_TIMEOUT = 60.0  # maximum number of seconds to wait for data
MAX_LISTING_BYTES = 16 << 20  # maximum size of a web server's folder listing
CONNECT_TIMEOUT = 20.0  # seconds
LOOKUP_ATTEMPTS = 4  # fewer attempts than for downloads, to report a mistyped host within seconds
LOOKUP_THREADS = 16
UNCACHED = {"use_listings_cache": False, "skip_instance_cache": True}  # file systems are cached only in `_filesystems`
MAX_ATTEMPTS = 8
FIRST_DELAY = 0.5  # seconds; the delay doubles with each attempt, so `MAX_ATTEMPTS` attempts take about a minute
MAX_DELAY = 30.0  # seconds
RETRIED_STATUSES = (408, 425, 429)  # HTTP status codes that are retried, in addition to all 5xx codes
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NETWORK_PACKAGES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "httpx", "httpx2", "httpcore", "requests", "urllib3")
# Exceptions of storage packages that are not retried, for example because credentials are missing.
PERMANENT_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "InvalidURL", "OfflineModeIsEnabled")
_REMOTE = re.compile(r"(s3|gs|hf|https?)://")
_random = random.Random()  # separate generator, so that retries do not change the global random state

_filesystems: dict[tuple[int, str], Any] = {}  # (process id, scheme) -> file system; not shared after a fork


class RemoteError(OSError):
    """Raised when a remote file cannot be read. The message contains the file's URL without credentials."""


class MissingRemoteFileError(RemoteError, FileNotFoundError):
    """Raised when a remote file or folder does not exist."""


class ReplacedFileError(FatalDataError):
    """Raised when a remote file changes during a run."""


# ---- URLs -----------------------------------------------------------------------------------------------------------


def is_remote(path: str) -> bool:
    """Return True if a path is the URL of a remote file or folder. Hub datasets (`hf:NAME`) are not remote paths."""
    path = str(path)
    return "://" in path and _REMOTE.match(path) is not None


@lru_cache(maxsize=1024)
def get_parent_folder(path: str) -> str:
    return os.path.dirname(strip_query_string(path) if is_remote(path) else path)


def get_file_name(path: str) -> str:
    return os.path.basename(strip_query_string(path) if is_remote(path) else path)


def join_path(folder: str, name: str) -> str:
    """Join a folder and a relative file name from a dataset.

    The result is remote if and only if the folder is remote. Names in a remote folder are resolved like relative URLs,
    so that absolute names and `..` stay within the same bucket, dataset or host.
    """
    if not is_remote(folder):
        return os.path.join(folder or ".", name) if is_remote(name) else os.path.join(folder, name)
    scheme, root, key = split_url(folder)
    if scheme.startswith("http"):
        name = quote(name)
    joined = posixpath.normpath(posixpath.join("/", key, name.replace("\\", "/"))).lstrip("/")
    return f"{scheme}://{root}/{joined}"


def split_url(url: str) -> tuple[str, str, str]:
    """Split a URL into the scheme, the root (bucket, dataset or host) and the path below the root."""
    scheme, _, rest = url.partition("://")
    if scheme == "hf":
        parts = rest.split("/")
        num_parts = 3 if parts[0] in ("datasets", "spaces", "models", "buckets") else 2
        return scheme, "/".join(parts[:num_parts]), "/".join(parts[num_parts:])
    root, _, key = rest.partition("/")
    return scheme, root, key


def strip_query_string(url: str) -> str:
    """Remove the query string from a web address. In object storage, `?` is part of the file name."""
    return url.partition("?")[0] if url.startswith("http") else url


def get_url_scheme(url: str) -> str:
    return url.partition("://")[0]


def to_fsspec_path(url: str) -> str:
    return url if get_url_scheme(url).startswith("http") else url.partition("://")[2]


def to_url(scheme: str, path: str) -> str:
    return path if "://" in path else f"{scheme}://{path}"


# ---- versions --------------------------------------------------------------------------------------------------------


def fetch_file_info(url: str, max_attempts: int = LOOKUP_ATTEMPTS) -> dict[str, Any]:
    """Return the size, the etag or modification time, and the type ("file" or "directory") of a remote file."""
    filesystem = get_filesystem(get_url_scheme(url))
    options = {"refresh": True} if get_url_scheme(url) in ("s3", "hf") else {}
    info: dict[str, Any] = call_with_retries(
        lambda: filesystem.info(to_fsspec_path(url), **options), url, max_attempts=max_attempts
    )
    return info


def build_file_version(info: Mapping[str, Any], url: str) -> str:
    size = info.get("size")
    if size is None:
        raise RemoteError(f"{hide_url_secrets(url)}: the server does not report the size of the file")
    for key in ("ETag", "etag", "blob_id", "LastModified", "Last-Modified", "updated", "mtime"):
        if info.get(key):
            return f"{size}-{key.lower()}-{info[key]}"
    return f"{size}-"


def parse_file_size(version: str) -> int:
    return int(version.partition("-")[0])


def build_replaced_file_error(url: str, version: str, current: str) -> ReplacedFileError:
    return ReplacedFileError(
        f"{hide_url_secrets(url)} was replaced during the run (size and version were {version}, and are now "
        f"{current}). Start the command again to use the new file"
    )


# ---- bytes -----------------------------------------------------------------------------------------------------------


def fetch_byte_range(url: str, version: str, start: int, end: int, file: BinaryIO) -> None:
    """Append a byte range of a remote file to `file`. If the server does not support ranges, write the entire remote
    file."""
    from fsspec.asyn import sync

    filesystem = get_filesystem(get_url_scheme(url))
    position = file.tell()

    def fetch_bytes() -> None:
        file.seek(position)
        file.truncate()
        if get_url_scheme(url).startswith("http"):
            sync(filesystem.loop, _stream_response, filesystem, url, version, start, end, file)
            return
        options = {"timeout": BLOCK_TIMEOUT} if filesystem.async_impl else {}
        data = filesystem.cat_file(to_fsspec_path(url), start=start, end=end, **options)
        if len(data) != end - start:
            raise ConnectionError(f"truncated response: {len(data):,} of {end - start:,} bytes")
        file.write(data)

    call_with_retries(fetch_bytes, url)


async def _stream_response(filesystem: Any, url: str, version: str, start: int, end: int, file: BinaryIO) -> None:
    """Write a byte range from a web server to a file. Check the size and etag in the response."""
    session = await filesystem.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(filesystem.encode_url(url), headers=headers) as response:
        response.raise_for_status()
        expected = end - start
        stated = response.headers.get("Content-Range", "").partition("/")[0]
        if response.status == 206 and stated != f"bytes {start}-{end - 1}":
            raise ConnectionError(f"the response contains {stated or 'no range'} instead of bytes {start}-{end - 1}")
        if response.status != 206:  # the server does not support ranges
            start, expected = 0, parse_file_size(version)
            file.seek(0)
        _check_response_version(response.headers, url, version)
        num_bytes = 0
        async with asyncio.timeout(BLOCK_TIMEOUT * math.ceil(expected / BLOCK_BYTES)):
            async for chunk in response.content.iter_chunked(1 << 20):
                num_bytes += len(chunk)
                if num_bytes > expected:
                    break
                file.write(chunk)
        if num_bytes != expected:
            raise ConnectionError(f"truncated response: {num_bytes:,} of {expected:,} bytes")


def _check_response_version(headers: Mapping[str, str], url: str, version: str) -> None:
    total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    if total.isdecimal():
        info = {"size": int(total), "ETag": headers.get("ETag"), "Last-Modified": headers.get("Last-Modified")}
        current = build_file_version(info, url)
        if current != version:
            raise build_replaced_file_error(url, version, current)


# ---- file systems ----------------------------------------------------------------------------------------------------


def get_filesystem(scheme: str) -> Any:
    """Return this process's file system for a URL scheme. All threads share the file system and its connections."""
    key = (os.getpid(), scheme)
    if key not in _filesystems:
        try:
            _filesystems[key] = _open_filesystem(scheme)
        except ImportError as error:
            raise ImportError(
                f"{scheme}:// requires additional packages ({error}). Run {format_install_command('remote')}"
            ) from error
    return _filesystems[key]


def _open_filesystem(scheme: str) -> Any:
    import fsspec

    if scheme == "s3":
        return _open_s3_filesystem()
    if scheme == "hf":
        return fsspec.filesystem("hf")
    if scheme == "gs":
        return fsspec.filesystem("gs", **UNCACHED)
    from aiohttp import ClientTimeout

    # trust_env uses the proxy in HTTPS_PROXY, and sends each host only its own credentials in ~/.netrc.
    timeout = ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    options = {"timeout": timeout, "trust_env": True}
    return fsspec.filesystem("https", client_kwargs=options, get_client=_open_http_session, **UNCACHED)


def _open_s3_filesystem() -> Any:
    import botocore.session
    import fsspec

    # Without credentials, only public buckets can be read, and requests must not be signed.
    anonymous = botocore.session.get_session().get_credentials() is None
    config = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "retries": {"total_max_attempts": 1},  # no retries in botocore, because `call_with_retries` retries
        "max_pool_connections": 2 * LOOKUP_THREADS,
    }
    filesystem = fsspec.filesystem("s3", anon=anonymous, config_kwargs=config, **UNCACHED)
    filesystem.retries = 1
    return filesystem


async def _open_http_session(loop: asyncio.AbstractEventLoop, **options: Any) -> Any:
    from aiohttp import ClientResponse, ClientSession, TraceConfig

    class HttpResponse(ClientResponse):
        async def text(self, encoding: str | None = None, errors: str = "replace") -> str:
            """Return the text of a folder listing. fsspec does not read other responses as text."""
            data = bytearray()
            async for block in self.content.iter_any():
                data += block
                if len(data) > MAX_LISTING_BYTES:
                    raise ValueError(f"the folder listing exceeds {MAX_LISTING_BYTES:,} bytes")
            return data.decode(encoding or self.charset or "utf-8", errors)

    trace = TraceConfig()
    trace.on_request_redirect.append(_check_redirect)
    return ClientSession(trace_configs=[trace], response_class=HttpResponse, **options)


async def _check_redirect(session: Any, context: Any, redirect: Any) -> None:
    """Raise ValueError for a redirect from https to http, which would allow others to read or change the data."""
    from yarl import URL

    headers = redirect.response.headers
    target = URL(headers.get("Location") or headers.get("URI") or "")  # aiohttp parses the target in the same way
    if redirect.url.scheme == "https" and target.scheme not in ("", "https"):
        raise ValueError("redirects from https to http are not allowed")


# ---- retries ---------------------------------------------------------------------------------------------------------


def call_with_retries(function: Callable[[], T], url: str, max_attempts: int | None = None) -> T:
    """Call a function that sends requests, and return its result. Retry after temporary errors.

    Raises:
        MissingRemoteFileError: The file does not exist.
        RemoteError: Access is denied, or all attempts failed.
    """
    max_attempts = max_attempts or MAX_ATTEMPTS
    attempt = 0
    while True:
        attempt += 1
        try:
            return function()
        except (FatalDataError, RemoteError, ImportError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            # The original exception is not chained, because its message can contain credentials.
            if not _is_temporary_error(error):
                raise _convert_to_remote_error(error, url) from None
            if attempt >= max_attempts:
                raise RemoteError(f"{_describe_remote_error(error, url)} (after {attempt} attempts)") from None
        time.sleep(compute_backoff(attempt - 1, FIRST_DELAY, MAX_DELAY))


def compute_backoff(attempt: int, first: float, longest: float) -> float:
    """Return a random delay in seconds after a failed attempt.

    The maximum delay doubles with each attempt, from `first` (if `attempt` is 0) up to `longest`.
    """
    return min(longest, first * 2**attempt) * _random.uniform(0.5, 1.0)


def parse_retry_after(value: str) -> float:
    """Return the delay in seconds from a `Retry-After` header (seconds or a date). Return 0 for invalid values."""
    with suppress(ValueError):
        return float(value)
    with suppress(ValueError, TypeError, OverflowError):
        return parsedate_to_datetime(value).timestamp() - time.time()
    return 0.0


def is_temporary_http_status(status: int) -> bool:
    return status >= 500 or status in RETRIED_STATUSES


def _is_temporary_error(error: BaseException) -> bool:
    status = _get_http_status(error)
    if status is not None:
        return is_temporary_http_status(status)
    chain = _list_exception_causes(error)
    if any(type(cause).__name__ in PERMANENT_ERRORS for cause in chain):
        return False
    for cause in chain:
        package = type(cause).__module__.partition(".")[0]
        if isinstance(cause, ConnectionError | TimeoutError) or package in NETWORK_PACKAGES:
            return True
    return isinstance(error, OSError) and not isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError
    )


def _convert_to_remote_error(error: BaseException, url: str) -> RemoteError:
    status = _get_http_status(error)
    if status == 404 or (status is None and isinstance(_list_exception_causes(error)[-1], FileNotFoundError)):
        return MissingRemoteFileError(f"{hide_url_secrets(url)}: no such file or folder")
    if isinstance(error, PermissionError) or status in (401, 403):
        return RemoteError(f"{_describe_remote_error(error, url)}. Check your credentials for this storage")
    return RemoteError(_describe_remote_error(error, url))


def _describe_remote_error(error: BaseException, url: str) -> str:
    status = _get_http_status(error)
    reason = f"HTTP status {status}" if status is not None else describe_error(_list_exception_causes(error)[-1])
    return hide_url_secrets(f"{url}: {reason}")


def _get_http_status(error: BaseException) -> int | None:
    for cause in _list_exception_causes(error):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(cause, "status", None) or getattr(response, "status_code", None)
        if status is None and type(cause).__module__.startswith("gcsfs"):
            status = getattr(cause, "code", None)
        if str(status).isdecimal():
            return int(str(status))
    return None


def _list_exception_causes(error: BaseException) -> list[BaseException]:
    causes = [error]
    while len(causes) < 10 and (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return causes
