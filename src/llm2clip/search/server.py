"""`llm2clip serve`: search and embeddings over HTTP, and the page. /openapi.json of a server describes its API."""

from __future__ import annotations

import base64
import hashlib
import io
import secrets
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, UploadFile
from fastapi.responses import FileResponse, RedirectResponse, Response
from PIL import Image
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware

from llm2clip import __version__
from llm2clip.data.image_header import readable_formats
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.build import check_model
from llm2clip.search.inference import InferenceService
from llm2clip.search.middleware import COOKIE, TROUBLES, RequestMiddleware, add_error_handlers
from llm2clip.search.schemas import (
    DATA_URI,
    IMAGES,
    EmbeddingItem,
    EmbedRequest,
    EmbedResponse,
    HealthResponse,
    Limits,
    NotFound,
    SearchRequest,
    SearchResponse,
    decode_data_uri,
)
from llm2clip.search.types import Backend

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")


def create_app(
    model: DualEncoder,
    engine: Backend | None = None,
    limits: Limits | None = None,
    token: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK,
    thread: ThreadPoolExecutor | None = None,
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
        thread: in which the model was opened: see `Service`.

    Raises:
        ValueError: the index is of another model.
    """
    if engine is not None:
        check_model(engine.about(), model)
    limits = limits or Limits()
    service = InferenceService(model, engine, limits, thread)

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
    async def health() -> HealthResponse:
        """Whether it answers, with what model, over how many pictures."""
        count = (await run_in_threadpool(engine.count))[0] if engine else 0
        return HealthResponse(model=Path(model.name).name, width=model.embed_dim, pictures=count)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(await run_in_threadpool(generate_latest, service.registry), media_type=CONTENT_TYPE_LATEST)

    @app.post("/search", responses=slow)
    async def search(request: SearchRequest) -> SearchResponse:
        """The pictures closest to texts, pictures and pictures of the index, and away from others."""
        return SearchResponse(hits=await service.search(request))

    async def embedded(vectors: Sequence[np.ndarray], form: str) -> EmbedResponse:
        data = [
            EmbeddingItem(
                index=n,
                embedding=v.tolist() if form == "float" else base64.b64encode(v.astype("<f4").tobytes()).decode(),
            )
            for n, v in enumerate(vectors)
        ]
        return EmbedResponse(data=data, model=Path(model.name).name, usage={"prompt_tokens": 0, "total_tokens": 0})

    @app.post("/v1/embeddings", responses=slow, include_in_schema=False)
    @app.post("/embed", responses=slow)
    async def embed(request: EmbedRequest) -> EmbedResponse:
        """Vectors of texts and of pictures (data URIs), in the form of OpenAI's embeddings; /v1/embeddings is the
        same."""
        if request.dimensions not in (None, model.embed_dim):
            raise ValueError(f"dimensions: the model's vectors have {model.embed_dim}")
        inputs = request.inputs
        seen = [n for n, text in enumerate(inputs) if text.startswith(DATA_URI)]
        if len(seen) > IMAGES:
            raise ValueError(f"{len(seen)} pictures; {IMAGES} at most")
        pictures = await service.see([decode_data_uri(inputs[n]) for n in seen])
        texts = await service.read([text for n, text in enumerate(inputs) if n not in set(seen)])
        found = dict(zip(seen, pictures, strict=True))
        rest = iter(texts)
        return await embedded(
            [found[n] if n in found else next(rest) for n in range(len(inputs))], request.encoding_format
        )

    @app.post("/embed/upload", responses=slow)
    async def upload(files: list[UploadFile]) -> EmbedResponse:
        """Vectors of uploaded pictures."""
        if len(files) > IMAGES:
            raise ValueError(f"{len(files)} pictures; {IMAGES} at most")
        return await embedded(await service.see([await file.read() for file in files]), "float")

    @app.get("/thumbnail/{hit}", response_class=Response, responses=slow)
    async def thumbnail(hit: str, request: Request) -> Response:
        """A hit's picture, JPEG, 256 pixels at most a side."""
        jpeg = await run_in_threadpool(service.indexed().thumbnail, hit)
        if jpeg is None:
            raise NotFound(f"there is no picture {hit}")
        tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'  # ids are of this index, and begin anew in another
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(jpeg, media_type="image/jpeg", headers=headers)

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
            raise NotFound(f"there is no {name}")
        return FileResponse(STATIC / name)

    add_error_handlers(app)
    app.add_middleware(RequestMiddleware, service=service, token=token)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    return app


def _original(engine: Backend, hit: str) -> tuple[bytes, str]:
    """The bytes of the first copy that is still a picture, and their media type."""
    for picture in engine.pictures(hit):
        try:
            data = picture.place.read()
            with Image.open(
                io.BytesIO(data), formats=readable_formats()
            ) as header:  # a file may have become anything since it was indexed
                kind = Image.MIME.get(header.format or "", "application/octet-stream")
        except Exception:
            continue
        if kind.startswith("image/"):
            return data, kind
    raise NotFound(f"there is no picture {hit}, or its file is gone")


def serve(app: FastAPI, host: str, port: int) -> None:
    """Serve until it is told to stop; what is under way is answered first."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_graceful_shutdown=30, server_header=False)
