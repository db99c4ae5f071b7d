"""Captions from a server with OpenAI's chat API, such as vLLM, llama.cpp, Ollama, LM Studio or a hosted one."""

import base64
import ipaddress
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import httpx
from torch import Tensor
from torchvision.io import encode_jpeg

from llm2clip.caption.answers import Answer, CaptionRequest, StoppedError, clean_answer
from llm2clip.data.storage import compute_backoff, is_temporary_status, parse_retry_after
from llm2clip.io_utils import escape_control_characters

KEY_VARIABLE = "LLM2CLIP_API_KEY"
CONNECT_TIMEOUT = 10.0  # seconds
MAX_RESPONSE_BYTES = 1_000_000
MAX_MESSAGE_CHARACTERS = 300  # of a server's error message
MAX_FAILURES_IN_A_ROW = 20  # after as many failed requests without a success, the server is assumed to be down
MAX_RETRY_AFTER = 300.0  # seconds
FIRST_DELAY, MAX_DELAY = 1.0, 60.0  # seconds before the second attempt and before later ones
SETTINGS_STATUSES = frozenset({401, 402, 403, 404})  # the key, credit, URL or name of the model is wrong
JPEG_QUALITY = 90
NEW_MAX_TOKENS_FIELD = "max_completion_tokens"  # newer name of the field max_tokens, which some servers require


class EndpointError(ValueError):
    """No request to the server can succeed, for example because the key is wrong."""


class _RequestError(Exception):
    """A request failed."""

    def __init__(
        self, message: str, status: int | None = None, retry: bool = True, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status  # HTTP status, or None if there was no valid response
        self.retry = retry  # True if another attempt could succeed
        self.retry_after = retry_after  # delay in seconds that the server asks for, or None


class EndpointCaptioner:
    """Captioner that sends images to a server with OpenAI's chat API.

    Redirects are not followed, so images are sent only to this server. The API key is read from the environment
    variable LLM2CLIP_API_KEY.

    Args:
        endpoint: Base URL such as http://localhost:8000/v1. Requests are sent to URL/chat/completions.
        model: Name of the model on the server.
        concurrency: Number of requests at the same time.
        max_requests_per_minute: Limit on the number of requests per minute, including retries.
        retries: Number of further attempts after a failed request.
        timeout: Maximum time for a response, in seconds.

    Raises:
        ValueError: The URL is not valid, or the key contains characters that are not allowed in a header.
    """

    batch_size = 1

    def __init__(
        self,
        endpoint: str,
        model: str,
        concurrency: int = 8,
        max_requests_per_minute: float | None = None,
        retries: int = 6,
        timeout: float = 300.0,
    ) -> None:
        self.name, self.workers = model, concurrency
        self.url = _parse_endpoint(endpoint)
        self.retries, self.timeout = retries, timeout
        self.is_loopback = _is_loopback(self.url.host)
        self._stopped = threading.Event()
        self._schedule = _Schedule(max_requests_per_minute)
        self._lock = threading.Lock()
        self._failures_in_a_row = 0
        self._has_succeeded = self.worked_before = False
        self._max_tokens_field = "max_tokens"
        self._connections = threading.local()  # one connection per thread
        self._client_options: dict[str, Any] = {
            "follow_redirects": False,
            "timeout": httpx.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout)),
            "headers": _build_headers(),
            "verify": httpx.create_ssl_context(),
            # A proxy could see unencrypted images, and it could not reach a server on this machine.
            "trust_env": self.url.scheme == "https" and not self.is_loopback,
        }

    def describe(self) -> list[str]:
        """Return lines that say where images are sent, and a warning if the connection is not encrypted."""
        lines = [f"Images are sent to {self.url.scheme}://{self.url.netloc.decode()} (model {self.name})."]
        if self.url.scheme == "http" and not self.is_loopback:
            lines.append(
                "Warning: the connection is not encrypted, so others on the network can see the images and the key. "
                "Use https:// if the server supports it."
            )
        return lines

    def prepare(self, image: Tensor) -> str:
        """Return a uint8 image of shape (3, H, W) as a JPEG in a data URI."""
        data = encode_jpeg(image.contiguous(), quality=JPEG_QUALITY).numpy().tobytes()
        return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"

    def stop(self) -> None:
        self._stopped.set()

    def ask(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        return [self._ask_with_retries(request) for request in requests]

    def _ask_with_retries(self, request: CaptionRequest) -> Answer:
        attempt = 0
        while True:
            self._schedule.wait(self._stopped)
            max_tokens_field = self._max_tokens_field
            try:
                answer = self._send(request, max_tokens_field)
            except _RequestError as error:
                if error.status == 400 and max_tokens_field == "max_tokens" and NEW_MAX_TOKENS_FIELD in str(error):
                    self._max_tokens_field = NEW_MAX_TOKENS_FIELD  # for all further requests
                    continue
                if not error.retry or attempt == self.retries:
                    return self._fail(error)
                self._wait_before_retry(attempt, error)
                attempt += 1
                continue
            with self._lock:
                self._failures_in_a_row, self._has_succeeded = 0, True
            return answer

    def _fail(self, error: _RequestError) -> Answer:
        """Return a failed request's answer. Raise EndpointError if the requests of all images fail."""
        status = error.status
        with self._lock:
            if status is None or error.retry:  # the server does not work
                counts = True
            elif status < 400 or status in SETTINGS_STATUSES:
                if not self._has_succeeded:
                    raise EndpointError(f"{self.url}: {error}{_advise(status)}")
                counts = True
            else:  # the image is rejected. But if all images are, the model may not take images at all
                counts = not (self._has_succeeded or self.worked_before)
            self._failures_in_a_row += counts
            if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
                raise EndpointError(f"{self.url}: the last {self._failures_in_a_row} requests failed. {error}")
        return Answer(None, str(error))

    def _wait_before_retry(self, attempt: int, error: _RequestError) -> None:
        delay = compute_backoff(attempt, FIRST_DELAY, MAX_DELAY)
        if error.retry_after is not None:
            delay = max(delay, error.retry_after)
            self._schedule.pause(error.retry_after)  # for all requests
        if self._stopped.wait(delay):
            raise StoppedError

    def _get_connection(self) -> "_Connection":
        if not hasattr(self._connections, "connection"):
            self._connections.connection = _Connection(httpx.Client(**self._client_options))
        connection: _Connection = self._connections.connection
        return connection

    def _send(self, request: CaptionRequest, max_tokens_field: str) -> Answer:
        # The image comes first, so that servers can reuse it for the next prompt.
        content = [
            {"type": "image_url", "image_url": {"url": request.image}},
            {"type": "text", "text": request.text},
        ]
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "temperature": request.prompt.temperature,
            max_tokens_field: request.prompt.max_tokens,
        }
        connection = self._get_connection()
        try:
            with connection.post(self.url, body, self.timeout) as response:
                data = _read_limited(response)
        except (httpx.HTTPError, httpx.StreamError) as error:
            if isinstance(error, httpx.TimeoutException) or connection.is_late:
                raise _RequestError(f"no response within {self.timeout:g} seconds") from error
            raise _RequestError(f"the connection failed: {_shorten(str(error)) or type(error).__name__}") from error
        if connection.is_late:  # the body can seem complete
            raise _RequestError(f"no response within {self.timeout:g} seconds")
        status = response.status_code
        if status != 200:
            message = _describe_status(response, data)
            raise _RequestError(message, status, is_temporary_status(status), _parse_retry_after(response))
        return _parse_response(data)


class _Connection:
    """HTTP client for one request at a time, with a limit on the total time of a request.

    The timeouts of httpx limit only the time of each read, so a server could send a byte every few seconds for ever.

    Attributes:
        is_late: True if the last request reached the limit.
    """

    def __init__(self, client: httpx.Client) -> None:
        self.is_late = False
        self._client = client
        self._socket: socket.socket | None = None

    @contextmanager
    def post(self, url: httpx.URL, body: dict[str, Any], timeout: float) -> Iterator[httpx.Response]:
        """Send a request. After `timeout` seconds, shut down the connection, so that reads and writes end or fail."""
        self.is_late = False
        timer = threading.Timer(timeout, self._stop)
        timer.daemon = True
        timer.start()
        try:
            with self._client.stream("POST", url, json=body, extensions={"trace": self._handle_event}) as response:
                yield response
        finally:
            timer.cancel()

    def _handle_event(self, event: str, info: dict[str, Any]) -> None:
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._socket = info["return_value"].get_extra_info("socket")
            if self.is_late:
                self._stop()

    def _stop(self) -> None:
        self.is_late = True
        if self._socket is not None:
            with suppress(OSError):  # it is closed already
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # not TLS's own shutdown, which can wait


class _Schedule:
    """Start times of requests: at most N per minute, and none during a pause that the server has asked for."""

    def __init__(self, max_per_minute: float | None) -> None:
        self._interval = 60 / max_per_minute if max_per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self, stopped: threading.Event) -> None:
        """Wait until the next request may start. Raise StoppedError if the run is stopped."""
        while True:
            with self._lock:
                delay = self._next - time.monotonic()
                if delay <= 0:
                    self._next = time.monotonic() + self._interval
                    return
            if stopped.wait(delay):
                raise StoppedError

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def _parse_endpoint(endpoint: str) -> httpx.URL:
    try:
        url = httpx.URL(endpoint.strip())
    except httpx.InvalidURL as error:
        raise ValueError(f"--endpoint is not a valid URL ({error})") from error
    if url.userinfo or url.query or url.fragment:  # the URL is printed, so it must not contain a key
        raise ValueError(
            f"--endpoint must not contain a user name, a password or a query. Put the key in the environment variable "
            f"{KEY_VARIABLE}"
        )
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError(f"--endpoint must be of the form http://HOST:PORT/v1 or https://HOST/v1 (got {endpoint})")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=f"{path}/chat/completions")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _build_headers() -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        return headers
    if not key.isascii() or not key.isprintable():
        raise ValueError(f"the environment variable {KEY_VARIABLE} contains characters that are not allowed in a key")
    return headers | {"Authorization": f"Bearer {key}"}


def _read_limited(response: httpx.Response) -> bytes:
    data = bytearray()
    if response.headers.get("content-encoding", "identity") != "identity":  # could expand to gigabytes
        raise _RequestError("the response is compressed, although the request does not allow it")
    for chunk in response.iter_raw(65536):
        data += chunk
        if len(data) > MAX_RESPONSE_BYTES:
            raise _RequestError(f"the response is larger than {MAX_RESPONSE_BYTES:,} bytes")
    return bytes(data)


def _parse_response(data: bytes) -> Answer:
    """Raise _RequestError if the response is not a chat completion."""
    try:
        response = json.loads(data)
        choice = response["choices"][0]
        message = choice["message"]
        content = message.get("content")
        if isinstance(content, list):  # parts of a message
            content = "".join(part.get("text") or "" for part in content)
        text, refusal = content or "", message.get("refusal") or ""
        if not isinstance(text, str):
            raise TypeError(f"the content is of type {type(text).__name__}")
        usage = response.get("usage") or {}
        tokens = [_to_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        excerpt = _shorten(data.decode(errors="replace"))
        raise _RequestError(f"the response is not a chat completion ({type(error).__name__}): {excerpt}") from error
    if refusal and not text:
        return Answer(None, f"refusal: {_shorten(str(refusal))}", *tokens)
    if choice.get("finish_reason") == "content_filter":
        return Answer(None, "the server's content filter stopped the answer", *tokens)
    return clean_answer(text, choice.get("finish_reason") == "length", *tokens)


def _to_count(value: Any) -> int:
    return min(value, 1 << 40) if type(value) is int and value > 0 else 0


def _describe_status(response: httpx.Response, data: bytes) -> str:
    status = f"HTTP {response.status_code}"
    if 300 <= response.status_code < 400:
        location = _shorten(response.headers.get("location", ""))
        return f"{status}: the server redirects to {location}. Redirects are not followed"
    text = data.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        text = str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # not in OpenAI's format
    return f"{status}: {_shorten(text or response.reason_phrase)}"


def _shorten(text: str) -> str:
    """Remove control characters and the key from a server's message, and truncate it."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if key:
        text = text.replace(key, "[key]")
    text = escape_control_characters(" ".join(text.split())).encode(errors="replace").decode()
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else f"{text[:MAX_MESSAGE_CHARACTERS]}..."


def _parse_retry_after(response: httpx.Response) -> float | None:
    """Return the delay in seconds in a Retry-After header, at most MAX_RETRY_AFTER, or None if there is none."""
    seconds = parse_retry_after(response.headers.get("retry-after", ""))
    return min(MAX_RETRY_AFTER, seconds) if seconds > 0 else None


def _advise(status: int | None) -> str:
    if status in (401, 403):
        return f". Put the server's key in the environment variable {KEY_VARIABLE}"
    if status == 404:
        return ". Check --model, and that --endpoint ends with /v1 if the server needs it"
    if status is not None and status < 400:
        return ". If you trust this address, pass it as --endpoint"
    return ""
