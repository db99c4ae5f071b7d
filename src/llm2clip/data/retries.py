"""Retries of requests, with exponential back-off. `call_with_retries` is for object storage.

Each storage library raises its own exceptions. They are distinguished by the HTTP status in the chain of causes, or
otherwise by their type.
"""

import errno
import random
import time
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from llm2clip.io_utils import FatalDataError, describe_error, hide_url_secrets

T = TypeVar("T")

MAX_ATTEMPTS = 8
FIRST_DELAY = 0.5  # seconds; doubles with each attempt, so that the default attempts span about a minute
MAX_DELAY = 30.0  # seconds
MAX_RETRY_AFTER = 120.0  # upper limit for the delay that a server requests, in seconds
RETRIED_STATUSES = (408, 425, 429)  # and all from 500
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NETWORK_PACKAGES = ("aiohttp", "botocore", "aiobotocore", "gcsfs", "httpx", "httpx2", "httpcore", "requests", "urllib3")
# Exceptions of these packages that another attempt cannot avoid, such as missing credentials.
PERMANENT_ERRORS = ("NoCredentialsError", "PartialCredentialsError", "InvalidURL", "OfflineModeIsEnabled")
_random = random.Random()  # the global generator must not depend on the network


class RemoteError(OSError):
    """A remote file cannot be read. The message contains its URL without credentials."""


class MissingRemoteFileError(RemoteError, FileNotFoundError):
    """A remote file or folder does not exist."""


class ReplacedFileError(FatalDataError):
    """A remote file changed during a run."""


def call_with_retries(function: Callable[[], T], url: str, max_attempts: int | None = None) -> T:
    """Return the result of a function that sends requests. Call it again after temporary errors.

    Temporary errors are connection errors, timeouts, truncated responses and the HTTP statuses 408, 425, 429 and 5xx.
    The delay between attempts doubles each time and is at least as long as the server's `Retry-After` header requests.

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
            if not _is_temporary(error):
                raise _convert_error(error, url) from None
            if attempt >= max_attempts:
                message = f"{_describe(error, url)} (after {attempt} attempts)"
                raise RemoteError(message) from None
            delay = _compute_delay(attempt, error)
        time.sleep(delay)


def compute_backoff(attempt: int, first: float, longest: float) -> float:
    """Return the delay before another attempt, in seconds. It doubles with each attempt, and is random.

    Args:
        attempt: Number of the failed attempt, from 0.
        first: Longest delay after the first attempt, in seconds.
        longest: Longest delay after any attempt, in seconds.
    """
    return min(longest, first * 2**attempt) * _random.uniform(0.5, 1.0)


def parse_retry_after(value: str) -> float:
    """Return the delay in seconds in a `Retry-After` header, which contains seconds or a date. 0 if it is invalid."""
    try:
        return float(value)
    except ValueError:
        pass  # not a number of seconds
    try:
        return parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return 0.0


def is_temporary_status(status: int) -> bool:
    """Return True if another attempt may succeed after a response with this HTTP status."""
    return status >= 500 or status in RETRIED_STATUSES


def _compute_delay(attempt: int, error: BaseException) -> float:
    delay = compute_backoff(attempt - 1, FIRST_DELAY, MAX_DELAY)
    return max(delay, min(_read_retry_after(error), MAX_RETRY_AFTER))


def _is_temporary(error: BaseException) -> bool:
    """Return True if another attempt may succeed."""
    status = _get_status(error)
    if status is not None:
        return is_temporary_status(status)
    chain = list(_iterate_causes(error))
    if any(type(cause).__name__ in PERMANENT_ERRORS for cause in chain):
        return False
    if any(isinstance(cause, ConnectionError | TimeoutError) or _is_network_error(cause) for cause in chain):
        return True
    return isinstance(error, OSError) and not isinstance(
        error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError | FileExistsError
    )


def _is_network_error(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in NETWORK_PACKAGES


def _convert_error(error: BaseException, url: str) -> RemoteError:
    status = _get_status(error)
    if status == 404 or (status is None and isinstance(_get_root_cause(error), FileNotFoundError)):
        return MissingRemoteFileError(f"{hide_url_secrets(url)}: no such file or folder")
    if isinstance(error, PermissionError) or status in (401, 403):
        return RemoteError(f"{_describe(error, url)}. Check your credentials for this storage")
    return RemoteError(_describe(error, url))


def _describe(error: BaseException, url: str) -> str:
    status = _get_status(error)
    reason = f"HTTP status {status}" if status is not None else describe_error(_get_root_cause(error))
    return hide_url_secrets(f"{url}: {reason}")


def _get_root_cause(error: BaseException) -> BaseException:
    return list(_iterate_causes(error))[-1]


def _get_status(error: BaseException) -> int | None:
    """Return the HTTP status that caused an exception, or None if there was no response."""
    for cause in _iterate_causes(error):
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


def _read_retry_after(error: BaseException) -> float:
    """Return the delay in seconds that the server requested, or 0."""
    for cause in _iterate_causes(error):
        response = getattr(cause, "response", None)
        headers: Any = getattr(cause, "headers", None) or getattr(response, "headers", None)
        if isinstance(response, dict):  # botocore, with names in lower case
            headers = response.get("ResponseMetadata", {}).get("HTTPHeaders")
        value = (headers or {}).get("Retry-After") or (headers or {}).get("retry-after")
        if value is not None:
            return parse_retry_after(str(value))
    return 0.0


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__
