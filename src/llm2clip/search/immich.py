"""Routes of Immich's machine-learning service, so that Immich can search with an llm2clip model.

Immich accepts only model names from its own list, and the name determines the vector dimension in Immich's database. An
llm2clip model therefore borrows a name from the list. Its embeddings are padded with zeros, which does not change
cosine similarities.
"""

import json
from typing import Annotated, Any

import httpx
import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, Json
from starlette.formparsers import MultiPartParser

from llm2clip.search.images import read_image_size
from llm2clip.search.inference import InferenceService, check_queue_capacity
from llm2clip.search.middleware import CHUNK_SIZE
from llm2clip.search.query import SearchQuery
from llm2clip.search.schemas import Text

# Model names from `CLIP_MODEL_INFO` in Immich's server/src/constants.ts, sorted by dimension.
# Immich's default name is excluded: if a user set only the URL, Immich would keep the stored OpenAI embeddings.
BORROWED_NAMES = {
    "ViT-B-16__openai": 512,
    "ViT-L-14__openai": 768,
    "ViT-H-14__laion2b-s32b-b79k": 1024,
    "nllb-clip-large-siglip__v1": 1152,
    "ViT-gopt-16-SigLIP2-256__webli": 1536,
}
MAX_ANSWER_BYTES = 16 << 20  # limit on an upstream response; the embeddings of 1,000 faces take about 10 MB
MAX_FORWARDED = 8  # maximum number of concurrent upstream requests; further requests wait


class ModelSelection(BaseModel):
    modelName: str = Field(max_length=200)


class ClipTask(BaseModel):
    visual: ModelSelection | None = None
    textual: ModelSelection | None = None


class ImmichTasks(BaseModel):
    """Tasks of a request. Immich sends one task per request. Tasks other than `clip` are forwarded unchanged."""

    model_config = ConfigDict(extra="allow")

    clip: ClipTask | None = None


class UpstreamService:
    """Immich's own machine-learning service, which detects faces and recognises text."""

    def __init__(self, address: str) -> None:
        """Create a client, ignoring the path of the address, as Immich does. Raise ValueError for invalid addresses."""
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise ValueError("--immich_upstream must be of the form http://HOST:PORT or https://HOST")
        self.address = f"{url.scheme}://{url.netloc.decode()}"
        self._pending = 0  # number of requests that are waiting for a response
        self._client = httpx.AsyncClient(
            headers={"Via": "1.1 llm2clip", "Accept-Encoding": "identity"},
            timeout=None,
            # No keep-alive: the service could close a reused connection just when the next request is sent.
            limits=httpx.Limits(max_connections=MAX_FORWARDED, max_keepalive_connections=0),
            trust_env=False,
            verify=httpx.create_ssl_context(),
        )

    async def predict(self, entries: str, text: str | None, image: bytes | None, max_queue: int) -> Response:
        """Forward a request and return the response. The middleware enforces the time limit.

        Raises:
            QueueFullError: `max_queue` requests are waiting.
            HTTPException: The service cannot be reached, or returned an error or a response that is too large.
        """
        check_queue_capacity(1, self._pending, max_queue, "forwarded requests")
        files: dict[str, Any] = {"entries": (None, entries)}
        if text is not None:
            files["text"] = (None, text)
        if image is not None:
            files["image"] = ("blob", image)
        self._pending += 1
        answer = bytearray()
        try:
            async with self._client.stream("POST", f"{self.address}/predict", files=files) as response:
                if response.status_code != 200:
                    raise HTTPException(502, f"the --immich_upstream service returned status {response.status_code}")
                async for chunk in response.aiter_raw(CHUNK_SIZE):
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise HTTPException(502, "the response from the --immich_upstream service is too large")
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise HTTPException(502, f"the --immich_upstream service cannot be reached: {reason}") from error
        finally:
            self._pending -= 1
        return Response(bytes(answer), media_type="application/json")


def add_immich_routes(app: FastAPI, service: InferenceService, upstream: UpstreamService | None = None) -> None:
    """Add Immich's routes to an application. Raise ValueError if the model has too many dimensions for Immich."""
    choose_immich_model_name(service.encoder.model.embed_dim)
    # Images are kept in memory, where the middleware limits their size, instead of being written to temporary files.
    MultiPartParser.spool_max_size = service.limits.max_body_bytes

    @app.get("/")
    async def describe_service() -> dict[str, str]:
        return {"message": "Immich ML"}

    @app.get("/ping", response_class=PlainTextResponse)
    async def ping() -> str:
        return "pong"

    @app.post("/predict")
    async def predict(
        request: Request,
        entries: Annotated[str, Form()],
        tasks: Annotated[Json[ImmichTasks], Form(alias="entries")],
        text: Annotated[Text | None, Form()] = None,
        image: Annotated[bytes | None, File()] = None,
    ) -> Any:
        """Return the embedding of an image or a text, or the result of another task."""
        if text is None and image is None:
            raise HTTPException(400, "either image or text must be provided")
        if tasks.clip is not None:
            if len(tasks.model_fields_set) > 1:
                raise ValueError("entries: a request with the task `clip` must not contain other tasks")
            return await service.embedders.run(_embed_immich_input, service, tasks.clip, text, image)
        if upstream is None:
            # After an empty response, Immich would delete the detected faces and never repeat the detection.
            raise HTTPException(501, "pass --immich_upstream, or turn off facial recognition and OCR in Immich")
        if "llm2clip" in request.headers.get("via", ""):
            message = "an llm2clip server forwarded this request; --immich_upstream must be Immich's own service"
            raise HTTPException(502, message)
        return await upstream.predict(entries, text, image, service.limits.max_queue)


def _embed_immich_input(
    service: InferenceService, clip: ClipTask, text: str | None, image: bytes | None
) -> dict[str, Any]:
    entry = clip.textual if image is None else clip.visual
    if entry is None:
        raise ValueError("entries: the type must be `visual` for an image and `textual` for a text")
    answer: dict[str, Any] = {}
    dim = get_immich_dimension(entry.modelName, service.encoder.model.embed_dim)
    if image is not None:
        answer["imageWidth"], answer["imageHeight"] = read_image_size(image, service.limits.max_pixels)
        vector = service.encoder.embed_images([image])[0]
    else:
        assert text is not None
        vector = service.encoder.embed(SearchQuery([text])).combined
    return {"clip": json.dumps(np.pad(vector, (0, dim - len(vector))).tolist()), **answer}


def choose_immich_model_name(embed_dim: int) -> str:
    """Return the model name to set in Immich. Raise ValueError if the model has too many dimensions."""
    for name, dim in BORROWED_NAMES.items():
        if dim >= embed_dim:
            return name
    raise ValueError(f"Immich stores at most {dim:,} dimensions, but the model has {embed_dim:,}")


def get_immich_dimension(name: str, embed_dim: int) -> int:
    """Return the dimension that Immich expects for a model name. Raise ValueError if the model cannot use the name."""
    dim = BORROWED_NAMES.get(name, 0)
    if dim < embed_dim:
        reason = f"has {dim} dimensions, but this model has {embed_dim}" if dim else "is not served here"
        raise ValueError(
            f"the model name {name} {reason}. In Immich, set the CLIP model to {choose_immich_model_name(embed_dim)}"
        )
    return dim


def format_immich_instructions(address: str, embed_dim: int, upstream: UpstreamService | None) -> str:
    tasks = "not available. Turn off these tasks in Immich, or pass --immich_upstream"
    if upstream is not None:
        tasks = f"forwarded to {upstream.address}, including the images"
    return f"""Serving at {address} for Immich, without a token: everyone who can connect can use the model.
Listen only on a private network. In Immich, open Administration > Settings > Machine Learning Settings:
1. URL: this server's address for Immich's container, such as http://192.168.1.20:3003. Remove all other URLs.
2. Smart Search > CLIP model: {choose_immich_model_name(embed_dim)} (only the name is used)
3. Save, then run Administration > Job Queues > Smart Search for all images.
Facial recognition and OCR: {tasks}.
Press Ctrl-C to stop."""
