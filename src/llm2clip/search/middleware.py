"""ASGI middleware for authentication, size limits, timeouts, security headers and metrics."""

from __future__ import annotations

import asyncio
import secrets
import time

from fastapi import HTTPException, Request
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2clip.search.errors import RETRY_SOON, error_response
from llm2clip.search.inference import InferenceService

COOKIE = "llm2clip_token"
# All other methods are counted as "other", because clients can send arbitrary method names.
COUNTED_METHODS = ("GET", "POST", "HEAD", "OPTIONS")
SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}


class RequestMiddleware:
    """ASGI middleware that checks every HTTP request and records metrics."""

    def __init__(self, app: ASGIApp, service: InferenceService, token: str | None) -> None:
        self.app, self.service, self.token = app, service, token
        self.bytes_in_flight = 0  # total number of body bytes received for all requests in progress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        body, sender = _BodyReader(self, receive), _ResponseSender(send)
        try:
            error = self._check(Request(scope))
            if error is None:
                error = await self._run_app(scope, body, sender)
            if error is not None:
                await error(scope, receive, sender)
        finally:
            self.bytes_in_flight -= body.size
            self._record(scope, sender.status, time.perf_counter() - start)

    def _check(self, request: Request) -> Response | None:
        """Check a request before its body is read.

        Returns:
            Error response if the request must be rejected, otherwise None.
        """
        max_bytes = self.service.limits.max_body_bytes
        length = request.headers.get("content-length", "")
        if not self._is_authorized(request):
            message = "invalid token: send the header Authorization: Bearer TOKEN, or open /?token=TOKEN in a browser"
            return error_response(401, message, {"WWW-Authenticate": "Bearer"})
        if request.headers.get("sec-fetch-site") == "cross-site" and request.scope["path"] != "/":
            return error_response(403, "cross-site requests are not allowed")
        if length.isdigit() and int(length) > max_bytes:
            return error_response(
                413, f"the request body is too large: {int(length):,} bytes; the limit is {max_bytes:,}"
            )
        return None

    def _is_authorized(self, request: Request) -> bool:
        path = request.scope["path"]  # do not use request.url, because it depends on the Host header
        if self.token is None or path == "/health":
            return True
        scheme, _, bearer = request.headers.get("authorization", "").partition(" ")
        candidates = [bearer if scheme.lower() == "bearer" else "", request.cookies.get(COOKIE, "")]
        if path == "/":
            candidates.append(request.query_params.get("token", ""))
        return any(secrets.compare_digest(candidate.encode(), self.token.encode()) for candidate in candidates)

    async def _run_app(self, scope: Scope, body: _BodyReader, sender: _ResponseSender) -> Response | None:
        """Run the application for one request.

        Returns:
            Error response if the request times out or if its body is rejected, otherwise None.
        """
        timeout = self.service.limits.timeout
        try:
            async with asyncio.timeout(timeout):
                await self.app(scope, body, sender)
        except TimeoutError:
            if sender.started:
                raise
            return error_response(504, f"the request took longer than {timeout:g} seconds")
        except _BodyRejected as error:
            if sender.started:
                raise
            return error_response(error.status_code, str(error.detail), dict(error.headers or {}))
        return None

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Add a request to the metrics."""
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in COUNTED_METHODS else "other"
        self.service.request_count.labels(method, route, status).inc()
        self.service.request_duration.labels(route).observe(seconds)


class _BodyRejected(HTTPException):
    """Raised when a request body exceeds a size limit.

    This class must be an HTTPException, because FastAPI replaces all other exceptions raised while it reads a body.
    """


class _BodyReader:
    """Wraps `receive` and enforces size limits while a body arrives, because Content-Length may be missing or wrong."""

    def __init__(self, middleware: RequestMiddleware, receive: Receive) -> None:
        self._middleware, self._receive = middleware, receive
        self.size = 0  # number of bytes received

    async def __call__(self) -> Message:
        message = await self._receive()
        size = len(message.get("body", b""))
        self.size += size
        self._middleware.bytes_in_flight += size
        limits = self._middleware.service.limits
        if self.size > limits.max_body_bytes:
            raise _BodyRejected(413, f"the request body is too large; the limit is {limits.max_body_bytes:,} bytes")
        if self._middleware.bytes_in_flight > limits.max_bytes_in_flight:
            raise _BodyRejected(
                429, "the server is busy: the requests in progress are too large; try again later", RETRY_SOON
            )
        return message


class _ResponseSender:
    """Wraps `send`, adds missing security headers to the response, and records the status of the response."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status, self.started = 500, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self.started = message["status"], True
            headers = list(message["headers"])
            existing = {name.lower() for name, _ in headers}
            for name, value in SECURITY_HEADERS.items():
                if name.lower().encode() not in existing:
                    headers.append((name.lower().encode(), value.encode()))
            message["headers"] = headers
        await self._send(message)
