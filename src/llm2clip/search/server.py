"""HTTP server for image search and embeddings, with a search page."""

import base64
import hashlib
import html
import io
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from llm2clip import __version__
from llm2clip.cpu_tuning import limit_malloc_arenas
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.llm2clip import check_truncate_dim, truncate_and_normalize
from llm2clip.search.backends import IndexBackend
from llm2clip.search.explain import Explanation
from llm2clip.search.images import RequestImage
from llm2clip.search.index import Index, SearchOptions
from llm2clip.search.inference import InferenceService, ServerLimits
from llm2clip.search.metadata import CONDITIONS, FilterCondition
from llm2clip.search.middleware import CHUNK_SIZE, Authenticator, RequestMiddleware, make_connection_class
from llm2clip.search.schemas import (
    ERROR_RESPONSES,
    MAX_EMBEDDED_IMAGES,
    MAX_OFFSET,
    MAX_TEMPLATES,
    MAX_TEXTS,
    EmbeddingItem,
    EmbedRequest,
    EmbedResponse,
    HealthResponse,
    HeatmapResponse,
    HitRequest,
    SearchRequest,
    SearchResponse,
    add_error_handlers,
)
from llm2clip.search.types import NotFoundError

STATIC_FOLDER = Path(__file__).parent / "static"
STATIC_FILES = ("common.js", "page.css", "page.js", "selection.js", "start.js")
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
SHUTDOWN_TIMEOUT = 5  # in seconds; `docker stop` kills the process after 10 seconds
API_ERRORS: dict[int | str, dict[str, Any]] = {code: ERROR_RESPONSES[code] for code in (400, 404, 422, 429, 503, 504)}


@dataclass(frozen=True)
class AccessPolicy:
    """Access control of a server.

    Attributes:
        token: Token that requests must contain. API clients send the header `Authorization: Bearer TOKEN`. In a
            browser, `/?token=TOKEN` starts a 24-hour session. Default: no authentication.
        hosts: Allowed values of the Host header, or None to allow all values. The check prevents DNS rebinding attacks,
            in which a website makes its own host name resolve to the address of the server.
        public_paths: Paths that do not require the token. Without the token, `/health` returns only the status.
    """

    token: str | None = field(default=None, repr=False)
    hosts: Sequence[str] | None = LOOPBACK
    public_paths: Sequence[str] = ("/health",)


def create_app(
    model: DualEncoder,
    backend: IndexBackend | None = None,
    limits: ServerLimits | None = None,
    access: AccessPolicy | None = None,
    model_thread: ThreadPoolExecutor | None = None,
    add_routes: Callable[[FastAPI, InferenceService], None] | None = None,
) -> FastAPI:
    """Create the web application.

    Args:
        model: Model that encodes texts and images, and that built the index.
        backend: Index to search. Default: the server only computes embeddings.
        limits: Resource limits for requests. Default: `ServerLimits()`.
        access: Access control. Default: all users of the machine have access, without a token.
        model_thread: Single-threaded executor in which the model was loaded. See `InferenceService`.
        add_routes: Function that adds all routes of the application. Default: add the routes of this module.

    Raises:
        ValueError: The index was built with a different model, the token is not printable ASCII without spaces, or the
            model has too many prompt templates.
    """
    access = access or AccessPolicy()
    auth = Authenticator(access.token) if access.token is not None else None
    count = len(model.query_templates.templates)
    if count > MAX_TEMPLATES:
        raise ValueError(
            f"the model has {count} prompt templates, but the limit is {MAX_TEMPLATES}. Remove templates from "
            f"`query_templates` in {Path(model.name) / 'config.json'}"
        )
    service = InferenceService(model, backend, limits or ServerLimits(), model_thread)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with app.state.background:
            yield
        service.close()

    app = FastAPI(
        title="llm2clip",
        version=__version__,
        description="Search images with full sentences, and embed texts and images.",
        lifespan=lifespan,
        docs_url=None,  # FastAPI's documentation pages load scripts from external sites
        redoc_url=None,
        openapi_url="/openapi.json" if add_routes is None else None,
        responses={code: ERROR_RESPONSES[code] for code in ((401, 413) if auth else (413,))},
    )
    app.state.service = service
    app.state.background = nullcontext()  # context manager that is active while the application runs
    if add_routes is not None:
        add_routes(app, service)
    else:
        _add_status_routes(app, service, auth)
        _add_search_routes(app, service)
        _add_embedding_routes(app, service)
        _add_image_routes(app, service)
        _add_page_routes(app, auth)
    add_error_handlers(app)
    app.add_middleware(RequestMiddleware, service=service, auth=auth, public_paths=access.public_paths)
    if access.hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(access.hosts))
    return app


def serve(
    app: FastAPI, host: str, port: int, on_start: Callable[[int], None] = lambda port: None, behind_proxy: bool = False
) -> None:
    """Serve an application until the process receives SIGINT or SIGTERM, then wait up to 5 seconds for active requests.

    `on_start` is called with the port once the server accepts connections. Port 0 selects any free port.
    """

    class NotifyingServer(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_start(self.servers[0].sockets[0].getsockname()[1])

    limit_malloc_arenas()
    with suppress(KeyboardInterrupt):  # uvicorn re-raises KeyboardInterrupt after handling SIGINT
        NotifyingServer(make_server_config(app, host, port, behind_proxy)).run()


def make_server_config(app: FastAPI, host: str, port: int, behind_proxy: bool) -> uvicorn.Config:
    """Return the HTTP server config.

    Args:
        behind_proxy: If True, read the client address and scheme from the headers `X-Forwarded-For` and
            `X-Forwarded-Proto` of requests from a proxy. The addresses of proxies are set in the environment variable
            FORWARDED_ALLOW_IPS. Default: 127.0.0.1.
    """
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=make_connection_class(app.state.service.limits),
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT,
        server_header=False,
        proxy_headers=behind_proxy,
    )


def _add_status_routes(app: FastAPI, service: InferenceService, auth: Authenticator | None) -> None:
    @app.get("/health", response_model_exclude_none=True, responses={503: ERROR_RESPONSES[503]})
    async def health(request: Request) -> HealthResponse:
        """Return the server status. Authorised requests also receive the model name, dimension and image count.

        While the index is unavailable, authorised requests receive status 503.
        """
        if auth is not None and not auth.is_authorized(request):
            return HealthResponse()
        images = await run_in_threadpool(service.count_images)
        return HealthResponse(model=service.model_name, dimensions=service.encoder.model.embed_dim, images=images)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return metrics in Prometheus format."""
        return Response(await run_in_threadpool(generate_latest, service.registry), media_type=CONTENT_TYPE_LATEST)


def _add_search_routes(app: FastAPI, service: InferenceService) -> None:
    @app.post("/search", response_model=SearchResponse, responses=API_ERRORS)
    async def search(request: SearchRequest) -> Response:
        """Return the images in the index that are most similar to the given texts, images and earlier hits.

        Images whose texts contain all words of the query are ranked higher, unless `words` is false.
        Without a query, return the images that match the filter, newest first.
        """
        # A large response would block the event loop, so the worker thread also serialises the response.
        body = await service.searchers.run(
            lambda: run_search_request(service.require_index(), request).model_dump_json()
        )
        return Response(body, media_type="application/json")

    @app.post("/explain", responses=API_ERRORS)
    async def explain(request: HitRequest) -> Explanation:
        """Return the effect of each word of the query's texts on the score of a hit."""
        return await service.searchers.run(service.require_index().explain, request.to_query(), request.id)

    @app.post("/heatmap", responses=API_ERRORS)
    async def heatmap(request: HitRequest) -> HeatmapResponse:
        """Return a heat map of the similarity between a hit's image and the given texts, images and earlier hits."""
        heatmap = await service.searchers.run(service.require_index().compute_heatmap, request.to_query(), request.id)
        return HeatmapResponse(rows=heatmap.tolist())


def run_search_request(index: Index, request: SearchRequest) -> SearchResponse:
    options = SearchOptions(request.words, request.group_similar, request.show_weak)
    page = index.search(request.to_query(), request.top, request.offset, request.filter.to_filter(), options)
    response = SearchResponse.model_validate(page, from_attributes=True)
    if response.next_offset is not None and response.next_offset > MAX_OFFSET:
        response.next_offset = None
    return response


def _add_embedding_routes(app: FastAPI, service: InferenceService) -> None:
    encoder = service.encoder

    @app.get("/v1/models", include_in_schema=False)
    async def list_models() -> dict[str, Any]:
        model = {"id": service.model_name, "object": "model", "created": 0, "owned_by": "llm2clip"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/embeddings", responses=API_ERRORS, include_in_schema=False)
    @app.post("/embed", responses=API_ERRORS)
    async def embed(request: EmbedRequest) -> EmbedResponse:
        """Return the embeddings of texts and images in OpenAI's format. Images must be data URIs.

        The paths /embed and /v1/embeddings are equivalent. With `dimensions`, embeddings are truncated and normalised.
        """
        return await service.embedders.run(embed_inputs, request)

    def embed_inputs(request: EmbedRequest) -> EmbedResponse:
        dim = encoder.model.embed_dim if request.dimensions is None else request.dimensions
        check_truncate_dim(dim, encoder.model.embed_dim, "the model")
        inputs = request.to_inputs()
        starts = np.cumsum([0, *(len(parts) for parts in inputs[:-1])])
        parts = list(chain.from_iterable(inputs))
        images = {position: part for position, part in enumerate(parts) if isinstance(part, RequestImage)}
        texts = {position: part for position, part in enumerate(parts) if isinstance(part, str)}
        for kind, count, limit in (("images", len(images), MAX_EMBEDDED_IMAGES), ("texts", len(texts), MAX_TEXTS)):
            if count > limit:
                raise ValueError(f"the request contains {count} {kind}, but the limit is {limit}")
        vectors = np.empty((len(parts), encoder.model.embed_dim), np.float32)
        vectors[list(images)] = encoder.embed_images(list(images.values()))
        vectors[list(texts)] = encoder.embed_texts(list(texts.values()))
        sums = torch.from_numpy(np.add.reduceat(vectors, starts))  # (inputs, embed_dim)
        items = []
        for index, vector in enumerate(truncate_and_normalize(sums, dim).numpy()):
            embedding: list[float] | str = vector.tolist()
            if request.encoding_format == "base64":
                embedding = base64.b64encode(vector.astype("<f4").tobytes()).decode()
            items.append(EmbeddingItem(index=index, embedding=embedding))
        usage = {"prompt_tokens": 0, "total_tokens": 0}
        return EmbedResponse(data=items, model=service.model_name, usage=usage)


def _add_image_routes(app: FastAPI, service: InferenceService) -> None:
    @app.get("/thumbnail/{hit_id}", response_class=Response, responses=API_ERRORS)
    async def thumbnail(hit_id: str, request: Request) -> Response:
        """Return a hit's thumbnail, a JPEG with at most 256 pixels per side."""
        jpeg = await run_in_threadpool(service.require_index().backend.read_thumbnail, hit_id)
        if jpeg is None:
            raise NotFoundError(f"the index contains no image with id {hit_id}")
        # The ETag is a hash of the thumbnail, because the same id can refer to different images in two indexes.
        tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
        headers = {"Cache-Control": "private, no-cache", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(jpeg, media_type="image/jpeg", headers=headers)

    @app.get("/image/{hit_id}", response_class=Response, responses=API_ERRORS)
    async def image(hit_id: str) -> Response:
        """Return a hit's original image file."""
        stream, media_type = await service.open_original_image(hit_id)
        headers = {"Content-Security-Policy": "default-src 'none'; sandbox"}
        if isinstance(stream, io.BytesIO):  # the image is stored in a table
            return Response(stream.getvalue(), media_type=media_type, headers=headers)
        size = stream.seek(0, os.SEEK_END)
        headers["Content-Length"] = str(size)
        return FileStreamResponse(read_file_in_chunks(stream, size), media_type, headers)

    async def read_file_in_chunks(stream: BinaryIO, size: int) -> AsyncGenerator[bytes, None]:
        with stream:
            stream.seek(0)
            for start in range(0, size, CHUNK_SIZE):
                yield await run_in_threadpool(stream.read, min(CHUNK_SIZE, size - start))


class FileStreamResponse(StreamingResponse):
    """Response that closes its generator, and thereby the open file, as soon as the client disconnects."""

    def __init__(self, chunks: AsyncGenerator[bytes, None], media_type: str, headers: Mapping[str, str]) -> None:
        super().__init__(chunks, media_type=media_type, headers=headers)
        self._chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._chunks):
            await super().__call__(scope, receive, send)


def _add_page_routes(app: FastAPI, auth: Authenticator | None) -> None:
    page = (STATIC_FOLDER / "index.html").read_text(encoding="utf-8")
    page = page.replace("<!-- filters -->", "\n      ".join(map(_make_filter_input, CONDITIONS.values())))

    @app.get("/", include_in_schema=False)
    async def serve_page(request: Request) -> Response:
        """Return the search page. If the URL contains the token, start a session and redirect to `/` instead."""
        if auth is not None and auth.is_valid_token(request.query_params.get("token", "")):
            response = RedirectResponse("/", 303)
            auth.start_session(request, response)
            return response
        return HTMLResponse(page)

    @app.get("/static/{name}", include_in_schema=False)
    async def serve_static_file(name: str) -> Response:
        if name not in STATIC_FILES:
            raise NotFoundError(f"no such file: {name}")
        # After an update, a browser must not combine cached scripts with new scripts.
        return FileResponse(STATIC_FOLDER / name, headers={"Cache-Control": "no-cache"})


def _make_filter_input(condition: FilterCondition) -> str:
    attributes = {"id": condition.name, "data-filter": condition.kind, "data-label": condition.label}
    if condition.kind == "number":
        attributes |= {"type": "number", "min": "1", "max": "1000000", "step": "1"}
    elif condition.kind == "text":
        attributes["maxlength"] = str(condition.max_length)
    else:
        attributes["type"] = "date"
    if condition.placeholder:
        attributes["placeholder"] = condition.placeholder
    listed = " ".join(f'{name}="{html.escape(value)}"' for name, value in attributes.items())
    return f"<label>{html.escape(condition.label.capitalize())} <input {listed}></label>"
