"""`llm2clip serve`: search and embeddings over HTTP, and the page. /openapi.json of a server describes its API."""

from __future__ import annotations

import asyncio
import base64
import io
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llm2clip import __version__
from llm2clip.data.images import ImageError
from llm2clip.models.dual import DualEncoder
from llm2clip.search.batching import Batcher, Busy
from llm2clip.search.entries import Engine
from llm2clip.search.messages import (
    DATA_URI,
    IMAGES,
    EmbedAnswer,
    Embedding,
    EmbedRequest,
    Found,
    Health,
    Limits,
    SearchAnswer,
    SearchRequest,
    TooLarge,
    TroubleAnswer,
    bytes_of_uri,
    picture_of,
)
from llm2clip.search.query import mixed

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
COOKIE = "llm2clip_token"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}
TROUBLES: dict[int | str, dict[str, Any]] = {
    code: {"model": TroubleAnswer, "description": what}
    for code, what in {
        400: "not a request",
        401: "no token, or a wrong one",
        404: "there is none",
        413: "too large",
        422: "not as it must be; the message says what",
        429: "too much is waiting; come again",
        504: "it took too long",
    }.items()
}


class Service:
    """The model and the index behind the requests of many clients."""

    def __init__(self, model: DualEncoder, engine: Engine | None, limits: Limits) -> None:
        self.model, self.engine, self.limits = model, engine, limits
        self.registry = CollectorRegistry()
        self.requests = Counter("llm2clip_requests", "Requests.", ["method", "path", "status"], registry=self.registry)
        self.seconds = Histogram("llm2clip_request_seconds", "How long they took.", ["path"], registry=self.registry)
        self.batches = Histogram(
            "llm2clip_batch_size",
            "Items in a batch.",
            ["kind"],
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self._one = ThreadPoolExecutor(1, "model")  # at a time: two batches beside each other take longer than in turn
        self._decoders = ThreadPoolExecutor(2, "decode")
        self._decoding = 0
        self.texts: Batcher[str, np.ndarray] = self._batcher("text", lambda some: model.encode_text(some).numpy())
        self.images: Batcher[Any, np.ndarray] = self._batcher("image", lambda some: model.encode_pictures(some).numpy())
        waiting = Gauge("llm2clip_waiting", "Items that wait for the model.", ["kind"], registry=self.registry)
        waiting.labels("text").set_function(lambda: len(self.texts))
        waiting.labels("image").set_function(lambda: len(self.images))
        pictures = Gauge("llm2clip_pictures", "Pictures in the index.", registry=self.registry)
        pictures.set_function(lambda: self.engine.count()[0] if self.engine else 0)

    def _batcher(self, kind: str, work: Callable[[list[Any]], Any]) -> Batcher[Any, np.ndarray]:
        seen = self.batches.labels(kind).observe
        return Batcher(work, self._one, self.limits.batch, self.limits.waiting, seen)

    async def close(self) -> None:
        await self.texts.close()
        await self.images.close()
        for pool in (self._one, self._decoders):
            pool.shutdown(cancel_futures=True)

    async def read(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Vectors of texts.

        Raises:
            ValueError: one of them is nothing to the model.
        """
        vectors = await self.texts.ask(texts)
        if not all(np.isfinite(vector).all() for vector in vectors):
            raise ValueError("a text is nothing to the model: it has no token, or none that it can read")
        return vectors

    async def see(self, encoded: Sequence[bytes]) -> list[np.ndarray]:
        """Vectors of pictures.

        Raises:
            ImageError, TooLarge: one cannot be read.
            Busy: too many wait.
        """
        loop = asyncio.get_running_loop()
        if self._decoding + len(encoded) > self.limits.waiting:
            raise Busy(f"{self._decoding:,} pictures are waiting")
        self._decoding += len(encoded)
        try:
            prepared = [await loop.run_in_executor(self._decoders, self._prepare, data) for data in encoded]
        finally:
            self._decoding -= len(encoded)
        return await self.images.ask(prepared)

    def _prepare(self, data: bytes) -> Any:
        return self.model.transform(picture_of(data, self.limits.pixels))

    async def search(self, request: SearchRequest) -> list[Found]:
        """The answer to a search.

        Raises:
            KeyError: what it is to be like is not in the index.
            ValueError: nothing is wanted.
        """
        engine = self.indexed()

        async def vectors(texts: Sequence[str], uris: Sequence[str]) -> list[np.ndarray]:
            return [*await self.read(texts), *await self.see([bytes_of_uri(uri) for uri in uris])]

        liked = []
        for hit in request.like:
            if (vector := await run_in_threadpool(engine.vector, hit)) is None:
                raise HTTPException(404, f"there is no picture {hit}")
            liked.append(vector)
        wanted = [*liked, *await vectors(request.texts, request.images)]
        query = mixed(wanted, await vectors(request.without_texts, request.without_images))
        hits = await run_in_threadpool(engine.search, query, request.top, request.only.filter())
        return [Found.of(hit) for hit in hits]

    def indexed(self) -> Engine:
        if self.engine is None:
            raise HTTPException(404, "this server has no index: llm2clip serve --index INDEX")
        return self.engine


def create_app(
    model: DualEncoder,
    engine: Engine | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
) -> FastAPI:
    """The application.

    Args:
        model: whose vectors are given, and the index is of.
        engine: the index; None serves embeddings alone.
        limits: what it puts up with.
        token: that every request must bear, as `Authorization: Bearer TOKEN` or, in a browser, the cookie that
            `/?token=TOKEN` sets; None asks for none.
        hosts: names that the server goes by; None allows any. A page elsewhere that points a name of its own at this
            machine gets nothing (DNS rebinding).
    """
    limits = limits or Limits()
    service = Service(model, engine, limits)

    @asynccontextmanager
    async def alive(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(
        title="llm2clip",
        version=__version__,
        description="Search pictures with whole sentences, and embed texts and pictures.",
        lifespan=alive,
        docs_url=None,  # FastAPI's pages fetch their scripts from elsewhere
        redoc_url=None,
        responses={code: TROUBLES[code] for code in ((401, 413) if token else (413,))},
    )
    app.state.service = service
    slow: dict[int | str, dict[str, Any]] = {code: TROUBLES[code] for code in (400, 404, 422, 429, 504)}

    @app.get("/health")
    async def health() -> Health:
        """Whether it answers, with what model, over how many pictures."""
        count = (await run_in_threadpool(engine.count))[0] if engine else 0
        return Health(model=Path(model.name).name, width=model.width, pictures=count)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await run_in_threadpool(generate_latest, service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/search", responses=slow)
    async def search(request: SearchRequest) -> SearchAnswer:
        """The pictures closest to texts, pictures and pictures of the index, and away from others."""
        return SearchAnswer(hits=await service.search(request))

    async def embedded(vectors: Sequence[np.ndarray], form: str) -> EmbedAnswer:
        data = [
            Embedding(
                index=n,
                embedding=v.tolist() if form == "float" else base64.b64encode(v.astype("<f4").tobytes()).decode(),
            )
            for n, v in enumerate(vectors)
        ]
        return EmbedAnswer(data=data, model=Path(model.name).name, usage={"prompt_tokens": 0, "total_tokens": 0})

    @app.post("/v1/embeddings", responses=slow, include_in_schema=False)
    @app.post("/embed", responses=slow)
    async def embed(request: EmbedRequest) -> EmbedAnswer:
        """Vectors of texts and of pictures (data URIs), in the form of OpenAI's embeddings; /v1/embeddings is the
        same."""
        if request.dimensions not in (None, model.width):
            raise ValueError(f"dimensions: the model's vectors have {model.width}")
        inputs = request.inputs
        seen = [n for n, text in enumerate(inputs) if text.startswith(DATA_URI)]
        if len(seen) > IMAGES:
            raise ValueError(f"{len(seen)} pictures; {IMAGES} at most")
        pictures = await service.see([bytes_of_uri(inputs[n]) for n in seen])
        texts = await service.read([text for n, text in enumerate(inputs) if n not in set(seen)])
        found = dict(zip(seen, pictures, strict=True))
        rest = iter(texts)
        return await embedded(
            [found[n] if n in found else next(rest) for n in range(len(inputs))], request.encoding_format
        )

    @app.post("/embed/upload", responses=slow)
    async def upload(files: list[UploadFile]) -> EmbedAnswer:
        """Vectors of uploaded pictures."""
        if len(files) > IMAGES:
            raise ValueError(f"{len(files)} pictures; {IMAGES} at most")
        return await embedded(await service.see([await file.read() for file in files]), "float")

    @app.get("/thumbnail/{hit}", response_class=Response, responses=slow)
    async def thumbnail(hit: str) -> Response:
        """A hit's picture, JPEG, 256 pixels at most a side."""
        jpeg = await run_in_threadpool(service.indexed().thumbnail, hit)
        if jpeg is None:
            raise HTTPException(404, f"there is no picture {hit}")
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    @app.get("/picture/{hit}", response_class=Response, responses=slow)
    async def picture(hit: str) -> Response:
        """A hit's picture as its file has it."""
        data, kind = await run_in_threadpool(_original, service.indexed(), hit)
        return Response(data, media_type=kind, headers={"Content-Security-Policy": "default-src 'none'; sandbox"})

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        given = request.query_params.get("token")
        if token is not None and given is not None and secrets.compare_digest(given.encode(), token.encode()):
            response = RedirectResponse("/", 303)
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict", max_age=30 * 86400)
            return response
        return FileResponse(STATIC / "index.html")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in ("page.css", "page.js"):
            raise HTTPException(404, f"there is no {name}")
        return FileResponse(STATIC / name)

    _answer_troubles(app)
    app.add_middleware(Guard, service=service, token=token)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return app


def _original(engine: Engine, hit: str) -> tuple[bytes, str]:
    """The bytes of the first copy that is still a picture, and their media type."""
    for picture in engine.pictures(hit):
        try:
            data = picture.place.read()
            with Image.open(io.BytesIO(data)) as header:  # a file may have become anything since it was indexed
                kind = Image.MIME.get(header.format or "", "application/octet-stream")
        except Exception:
            continue
        if kind.startswith("image/") and "svg" not in kind:
            return data, kind
    raise HTTPException(404, f"there is no picture {hit}, or its file is gone")


def _answer_troubles(app: FastAPI) -> None:
    """Every error in one form, OpenAI's."""

    def answer(code: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
        trouble = {"message": message, "type": str(TROUBLES.get(code, {}).get("description", "error")), "code": code}
        return JSONResponse({"error": trouble}, code, headers)

    def of(code: int, headers: dict[str, str] | None = None) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handle(_: Request, error: Exception) -> Response:
            return answer(code, str(error), headers)

        return handle

    async def http(_: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        return answer(error.status_code, str(error.detail), dict(error.headers or {}))

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3]]
        return answer(422, "; ".join(first).encode("utf-8", "backslashreplace").decode())

    app.add_exception_handler(StarletteHTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Busy, of(429, {"Retry-After": "1"}))
    app.add_exception_handler(TooLarge, of(413))
    app.add_exception_handler(ImageError, of(422))
    app.add_exception_handler(ValueError, of(422))


class _BodyTooLarge(HTTPException):
    """FastAPI lets its own exceptions pass where it reads a body."""


class Guard:
    """Around every request: its token, the size of its body, its time, its count."""

    def __init__(self, app: ASGIApp, service: Service, token: str | None) -> None:
        self.app, self.service, self.token = app, service, token

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
            trouble = {"message": message, "type": TROUBLES[code]["description"], "code": code}
            await JSONResponse({"error": trouble}, code, headers)(scope, receive, sending)

        try:
            request, limit, got = Request(scope), self.service.limits.body, 0
            length = request.headers.get("content-length", "")

            async def receiving() -> Message:
                nonlocal got
                message = await receive()
                got += len(message.get("body", b""))
                if got > limit:
                    raise _BodyTooLarge(413, f"more than {limit:,} bytes")
                return message

            if not self._may(request):
                await refuse(
                    401, "send Authorization: Bearer TOKEN, or open /?token=TOKEN", {"WWW-Authenticate": "Bearer"}
                )
            elif length.isdigit() and int(length) > limit:
                await refuse(413, f"{int(length):,} bytes are more than {limit:,}")
            else:
                async with asyncio.timeout(self.service.limits.seconds):
                    await self.app(scope, receiving, sending)
        except TimeoutError:
            if began:
                raise
            await refuse(504, f"it took longer than {self.service.limits.seconds:g} seconds")
        except _BodyTooLarge as error:
            if began:
                raise
            await refuse(413, str(error.detail))
        finally:
            route = scope.get("route")
            path = getattr(route, "path", "other")
            self.service.requests.labels(scope["method"], path, status).inc()
            self.service.seconds.labels(path).observe(time.perf_counter() - start)

    def _may(self, request: Request) -> bool:
        if self.token is None or request.url.path == "/health":
            return True
        kind, _, bearer = request.headers.get("authorization", "").partition(" ")
        given = [bearer if kind.lower() == "bearer" else "", request.cookies.get(COOKIE, "")]
        if request.url.path == "/":
            given.append(request.query_params.get("token", ""))
        return any(secrets.compare_digest(some.encode(), self.token.encode()) for some in given)


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until it is told to stop; what is under way is answered first."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30, server_header=False)
