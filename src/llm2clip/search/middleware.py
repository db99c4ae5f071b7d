"""HTTP middleware and connection handling: authentication, size limits, timeouts, security headers and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastapi import HTTPException, Request
from fastapi.responses import FileResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm2clip.search.inference import InferenceService, QueueFullError, ServerLimits
from llm2clip.search.schemas import RETRY_SOON, make_error_response
from llm2clip.search.types import NO_DEADLINE, Deadline, current_deadline

SESSION_SECONDS = 24 * 3600
# HTTP methods that metrics count separately. All other method names that clients send are counted as "other".
COUNTED_METHODS = ("GET", "POST", "HEAD", "OPTIONS")
# A parsed JSON value can use 100 times as much memory as its text. Legitimate large requests consist of long strings.
MAX_JSON_VALUES = 200_000
CHUNK_SIZE = 64 << 10  # size of the chunks in which response bodies are sent, in bytes
ALWAYS_ACCEPTED = 64 << 10  # requests up to this size, in bytes, are accepted even if the budget is exhausted
GRACE_PERIOD = 0.01  # seconds for which a new client can send a request before the connection limit is enforced
# Page for browsers that have not sent the token. Its CSS is inline, because all other files require the token.
TOKEN_PAGE = Path(__file__).parent / "static" / "token.html"
TOKEN_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}


class Authenticator:
    """Authentication of requests by a token, or by the cookie of a session that was started with the token.

    Sessions are not stored on the server. The cookie contains the end time of the session, signed with a key that is
    derived from the token, so all processes with the same token accept the same sessions. The cookie does not contain
    the token, because browsers send cookies to all ports of a host, where other servers can read them.
    """

    def __init__(self, token: str) -> None:
        """Raise ValueError if the token cannot be sent in an HTTP header."""
        if not re.fullmatch("[!-~]+", token):
            raise ValueError(
                "the token must not be empty, and must contain only printable ASCII characters without spaces. "
                "To disable authentication, pass token=None (on the command line: --no_token)."
            )
        self._token = token
        # scrypt is slow, which makes it hard to guess the token from a cookie.
        self._key = hashlib.scrypt(token.encode(), salt=b"llm2clip session", n=2**14, r=8, p=1)
        # Servers with different tokens on the same host must use different cookies.
        self._cookie_name = f"llm2clip_session_{self._sign_text('name')[:8]}"

    def is_authorized(self, request: Request) -> bool:
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.is_valid_token(bearer):
            return True
        end, _, signature = request.cookies.get(self._cookie_name, "").partition(".")
        is_signed = secrets.compare_digest(signature.encode(), self._sign_text(f"end {end}").encode())
        return is_signed and time.time() < int(end)

    def is_valid_token(self, text: str) -> bool:
        """Compare a text with the token in constant time."""
        return secrets.compare_digest(text.encode(), self._token.encode())

    def start_session(self, request: Request, response: Response) -> None:
        end = int(time.time()) + SESSION_SECONDS
        response.set_cookie(
            self._cookie_name,
            f"{end}.{self._sign_text(f'end {end}')}",
            max_age=SESSION_SECONDS,
            httponly=True,
            samesite="strict",
            secure=request.scope["scheme"] == "https",
        )

    def _sign_text(self, text: str) -> str:
        return hmac.new(self._key, text.encode(), "sha256").hexdigest()


class RequestMiddleware:
    """ASGI middleware that checks every HTTP request and records metrics."""

    def __init__(
        self, app: ASGIApp, service: InferenceService, auth: Authenticator | None, public_paths: Sequence[str]
    ) -> None:
        self.app, self.service, self.auth, self.public_paths = app, service, auth, public_paths
        self.budget = ByteBudget(service.limits.max_bytes_in_flight)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        allocation = ByteAllocation(self.budget)
        request = Request(scope)
        body = _BodyReader(request, receive, allocation, self.service.limits)
        sender = _ResponseSender(scope, receive, send, allocation)
        try:
            error = self._check_request(request)
            if error is None:
                error = await self._run_app(scope, body, sender)
            if error is not None:
                await error(scope, receive, sender)
        finally:
            allocation.release()
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in COUNTED_METHODS else "other"
            self.service.request_count.labels(method, route, sender.status).inc()
            self.service.request_duration.labels(route).observe(time.perf_counter() - start)

    def _check_request(self, request: Request) -> Response | None:
        """Return an error response if a request must be rejected before its body is read."""
        max_bytes = self.service.limits.max_body_bytes
        length = request.headers.get("content-length", "")
        if length and "transfer-encoding" in request.headers:
            # If a proxy used one header and the server used the other, request smuggling would be possible.
            message = "the request contains both Transfer-Encoding and Content-Length"
            return make_error_response(400, message, {"Connection": "close"})
        if not self._is_authorized(request):
            if request.scope["path"] == "/" and "text/html" in request.headers.get("accept", ""):
                headers = {"Content-Security-Policy": TOKEN_PAGE_POLICY, "WWW-Authenticate": "Bearer"}
                return FileResponse(TOKEN_PAGE, 401, headers)
            message = "invalid token: send the header Authorization: Bearer TOKEN, or open /?token=TOKEN in a browser"
            return make_error_response(401, message, {"WWW-Authenticate": "Bearer"})
        # "same-site" requests can come from other ports of the host, where different servers may run.
        is_other_site = request.headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if is_other_site and request.scope["path"] != "/":
            return make_error_response(403, "cross-site requests are not allowed")
        content_type = request.headers.get("content-type", "").lower()
        is_form = content_type.startswith("multipart/form-data") and "charset" not in content_type
        # Parsing a URL-encoded form, or a charset such as punycode, can take seconds.
        if request.method == "POST" and request.scope["path"] == "/predict" and not is_form:
            return make_error_response(415, "the request body must be multipart/form-data without a charset")
        if length.isdigit() and int(length) > max_bytes:
            return make_error_response(
                413, f"the request body is too large: {int(length):,} bytes; the limit is {max_bytes:,} bytes"
            )
        return None

    def _is_authorized(self, request: Request) -> bool:
        path = request.scope["path"]  # request.url would depend on the Host header
        if self.auth is None or path in self.public_paths or self.auth.is_authorized(request):
            return True
        return path == "/" and self.auth.is_valid_token(request.query_params.get("token", ""))

    async def _run_app(self, scope: Scope, body: _BodyReader, sender: _ResponseSender) -> Response | None:
        """Run the application. Return an error response if the request times out before the response starts."""
        timeout = self.service.limits.timeout
        deadline = Deadline(time.monotonic() + timeout, timeout)
        current_deadline.set(deadline)
        try:
            async with asyncio.timeout(timeout) as timer:
                sender.timer = timer
                await self.app(scope, body, sender)
        except TimeoutError:
            if sender.started:
                raise
            return make_error_response(504, str(deadline.make_error()))
        finally:
            sender.timer = None
        return None


class _BodyReader:
    """Wrapper around `receive` that enforces size limits even if Content-Length is missing or wrong.

    Errors are HTTPExceptions, because FastAPI replaces all other exceptions that are raised while a body is read.
    """

    def __init__(self, request: Request, receive: Receive, allocation: ByteAllocation, limits: ServerLimits) -> None:
        self._receive, self._allocation, self._limits = receive, allocation, limits
        self._is_json = "json" in request.headers.get("content-type", "").lower()
        self._size = 0  # number of bytes received
        self._json_values = 0  # upper bound on the number of JSON values received

    async def __call__(self) -> Message:
        message = await self._receive()
        body = message.get("body", b"")
        try:
            self._allocation.reserve(len(body))
        except QueueFullError as error:
            raise HTTPException(429, str(error), RETRY_SOON) from None
        self._size += len(body)
        max_bytes = self._limits.max_body_bytes
        if self._size > max_bytes:
            raise HTTPException(413, f"the request body is too large; the limit is {max_bytes:,} bytes")
        if self._is_json:
            self._json_values += body.count(b",") + body.count(b"[") + body.count(b"{")
            if self._json_values > MAX_JSON_VALUES:
                raise HTTPException(413, f"the JSON body contains too many values; the limit is {MAX_JSON_VALUES:,}")
        return message


class _ResponseSender:
    """Wrapper around `send` that adds missing security headers and records the response status.

    Large bodies are sent in small chunks, so that only a few chunks are buffered for a slow client.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, allocation: ByteAllocation) -> None:
        self._scope, self._receive, self._send, self._allocation = scope, receive, send, allocation
        self._start: Message | None = None  # http.response.start message; sent only after the body size is checked
        self._is_rejected = False
        self.status, self.started = 500, False
        # The time limit ends when the response starts, because the sending time depends on the client.
        # If a client does not read the response, `LimitedConnection` aborts the connection.
        self.timer: asyncio.Timeout | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
        elif not self._is_rejected:
            await self._send_response_body(message)

    async def _send_response_body(self, message: Message) -> None:
        body = message.get("body", b"")
        if len(body) > CHUNK_SIZE:
            try:
                self._allocation.reserve(len(body))
            except QueueFullError as error:  # replace the application's response with an error response
                await make_error_response(429, str(error), RETRY_SOON)(self._scope, self._receive, self)
                self._is_rejected = True
                return
        if self._start is not None:
            await self._send_response_start(self._start)
        more_body = message.get("more_body", False)
        for start in range(0, max(1, len(body)), CHUNK_SIZE):
            end = start + CHUNK_SIZE
            chunk = {**message, "body": body[start:end], "more_body": more_body or end < len(body)}
            await self._send(chunk)

    async def _send_response_start(self, message: Message) -> None:
        self._start = None
        self.status, self.started = message["status"], True
        current_deadline.set(NO_DEADLINE)
        if self.timer is not None and not self.timer.expired():
            self.timer.reschedule(None)
        headers = list(message["headers"])
        existing = {name.lower() for name, _ in headers}
        for name, value in SECURITY_HEADERS.items():
            if name.lower().encode() not in existing:
                headers.append((name.lower().encode(), value.encode()))
        await self._send({**message, "headers": headers})


# ---- limits


@dataclass
class ByteBudget:
    """Limit on the total size of all request and response bodies in memory."""

    max_bytes: int
    total: int = 0


class ByteAllocation:
    """Bytes of a `ByteBudget` that are reserved for a request."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget, self.size = budget, 0

    def reserve(self, size: int) -> None:
        """Reserve more bytes. Raise QueueFullError if the budget is exhausted after the first ALWAYS_ACCEPTED bytes."""
        self.size += size
        self._budget.total += size
        if self._budget.total > self._budget.max_bytes and self.size > ALWAYS_ACCEPTED:
            raise QueueFullError("the server is busy: too much data in concurrent requests; try again later")

    def release(self) -> None:
        self._budget.total -= self.size
        self.size = 0


class LimitedConnection(H11Protocol):
    """Uvicorn connection that is aborted if the client is idle for too long or if there are too many connections.

    A timer runs while the server waits for complete request headers or for the client to read a response. The time to
    receive a request body is limited by `RequestMiddleware`. Connections are aborted instead of closed, because a
    transport closes only after the client has read all buffered data.
    """

    limits: ServerLimits
    idle: dict[str, dict[LimitedConnection, None]]  # idle connections by client address, longest idle time first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        self._timer: asyncio.TimerHandle | None = None
        self._update_idle_timer()
        if len(self.connections) > self.limits.max_connections:
            self.loop.call_later(GRACE_PERIOD, self._enforce_connection_limit)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_idle_timer()
        self._set_idle_status(False)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_idle_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_idle_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_idle_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_idle_timer()

    def _update_idle_timer(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        self._set_idle_status(is_idle)
        if not (is_idle or self.flow.write_paused):
            self._stop_idle_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def _stop_idle_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set_idle_status(self, is_idle: bool) -> None:
        connections = self.idle.setdefault(self._address, {})
        if is_idle:
            connections.setdefault(self)
        else:
            connections.pop(self, None)
        if not connections:
            del self.idle[self._address]

    def _enforce_connection_limit(self) -> None:
        """Abort idle connections until the limit is met. If no connection is idle, abort this new connection."""
        while self in self.connections and len(self.connections) > self.limits.max_connections:
            # The client address with the most idle connections is probably an attacker's.
            # A client that sends a request immediately is not idle, so it can share the attacker's address.
            connections = max(self.idle.values(), key=len, default={self: None})
            connection = next(iter(connections))
            self.connections.discard(connection)  # transport.abort() calls connection_lost only after this loop
            connection._set_idle_status(False)
            connection.transport.abort()


def make_connection_class(limits: ServerLimits) -> type[LimitedConnection]:
    """Return a connection class with the given limits, for uvicorn's `http` setting."""
    return type("LimitedConnection", (LimitedConnection,), {"limits": limits, "idle": {}})
