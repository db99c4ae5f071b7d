"""Around every request: its token, the size of its body, its time, its count; and one form for all errors, OpenAI's."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2clip.data.image_refs import printable
from llm2clip.data.images import ImageError
from llm2clip.search.batching import QueueFull
from llm2clip.search.inference import InferenceService
from llm2clip.search.schemas import ErrorResponse, NotFound, TooLarge

COOKIE = "llm2clip_token"
METHODS = ("GET", "POST", "HEAD", "OPTIONS")  # that are counted by their names; anybody can make up others
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}
TROUBLES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": what}
    for code, what in {
        400: "not a request",
        401: "no token, or a wrong one",
        403: "from a page of another site",
        404: "there is none",
        413: "too large",
        422: "not as it must be; the message says what",
        429: "too much is waiting; come again",
        504: "it took too long",
    }.items()
}


def error_response(code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error as OpenAI's API writes it."""
    kind = str(TROUBLES.get(code, {}).get("description", "error"))
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, code, headers)


class _Refused(HTTPException):
    """FastAPI lets its own exceptions pass where it reads a body."""


class RequestMiddleware:
    """The middleware."""

    def __init__(self, app: ASGIApp, service: InferenceService, token: str | None) -> None:
        self.app, self.service, self.token = app, service, token
        self.held = 0  # bytes of the bodies of all requests that are under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status, began = time.perf_counter(), 500, False

        async def sending(message: Message) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                status, began = message["status"], True
                named = {key.lower() for key, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((k.lower().encode(), v.encode()) for k, v in HEADERS.items() if k.lower().encode() not in named),
                ]
            await send(message)

        async def refuse(code: int, message: str, headers: dict[str, str] | None = None) -> None:
            await error_response(code, message, headers)(scope, receive, sending)

        got = 0
        try:
            request, limit = Request(scope), self.service.limits.max_body_bytes
            length = request.headers.get("content-length", "")

            async def receiving() -> Message:
                nonlocal got
                message = await receive()
                size = len(message.get("body", b""))
                got += size
                self.held += size
                if got > limit:
                    raise _Refused(413, f"more than {limit:,} bytes")
                if self.held > self.service.limits.max_bytes_in_flight:
                    raise _Refused(429, "too many bytes are waiting", {"Retry-After": "1"})
                return message

            if not self._may(request):
                await refuse(
                    401, "send Authorization: Bearer TOKEN, or open /?token=TOKEN", {"WWW-Authenticate": "Bearer"}
                )
            elif request.headers.get("sec-fetch-site") == "cross-site" and scope["path"] != "/":
                await refuse(403, "this is not for pages of other sites")
            elif length.isdigit() and int(length) > limit:
                await refuse(413, f"{int(length):,} bytes are more than {limit:,}")
            else:
                async with asyncio.timeout(self.service.limits.timeout):
                    await self.app(scope, receiving, sending)
        except TimeoutError:
            if began:
                raise
            await refuse(504, f"it took longer than {self.service.limits.timeout:g} seconds")
        except _Refused as error:
            if began:
                raise
            await refuse(error.status_code, str(error.detail), dict(error.headers or {}))
        finally:
            self.held -= got
            route = scope.get("route")
            path = getattr(route, "path", "other")
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.service.requests.labels(method, path, status).inc()
            self.service.seconds.labels(path).observe(time.perf_counter() - start)

    def _may(self, request: Request) -> bool:
        path = request.scope["path"]  # and not request.url, into which the Host header goes
        if self.token is None or path == "/health":
            return True
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = [bearer if kind.lower() == "bearer" else "", request.cookies.get(COOKIE, "")]
        if path == "/":
            given.append(request.query_params.get("token", ""))
        return any(secrets.compare_digest(some.encode(), self.token.encode()) for some in given)


def add_error_handlers(app: FastAPI) -> None:
    """Every error in one form, OpenAI's."""

    def of(code: int, headers: dict[str, str] | None = None) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(_: Request, error: Exception) -> Response:
            return error_response(code, str(error), headers)

        return handle

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return error_response(error.status_code, str(error.detail), dict(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]]
        return error_response(422, printable("; ".join(first)))

    async def broken(_: Request, error: Exception) -> JSONResponse:
        return error_response(500, "the server failed at this; its own output says more")

    app.add_exception_handler(Exception, broken)
    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(QueueFull, of(429, {"Retry-After": "1"}))
    app.add_exception_handler(TooLarge, of(413))
    app.add_exception_handler(NotFound, of(404))
    app.add_exception_handler(ImageError, of(422))
    app.add_exception_handler(ValueError, of(422))
