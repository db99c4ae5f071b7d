"""Routes of Immich's machine-learning service, with which Immich searches photographs with a model of ours.

Immich only accepts model names from its own list, which also sets the number of dimensions in its database. A model
therefore borrows a name, and its embeddings are padded with zeros, which changes no cosine similarity.
"""

import json
from typing import Annotated, Any

import httpx
import numpy as np
from fastapi import FastAPI, File, Form, HTTPException, Request
from fastapi.responses import PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, Json
from starlette.formparsers import MultiPartParser

from llm2clip.search.images import read_request_size
from llm2clip.search.inference import InferenceService
from llm2clip.search.middleware import CHUNK_SIZE
from llm2clip.search.query import SearchQuery
from llm2clip.search.schemas import Text

# Names from `CLIP_MODEL_INFO` in Immich's server/src/constants.ts, and their numbers of dimensions in ascending order.
# Immich's default, ViT-B-32__openai, is not recommended: only if the name changes, Immich deletes earlier embeddings.
BORROWED_NAMES = {
    "ViT-B-16__openai": 512,
    "ViT-B-32__openai": 512,
    "ViT-L-14__openai": 768,
    "ViT-H-14__laion2b-s32b-b79k": 1024,
    "nllb-clip-large-siglip__v1": 1152,
    "ViT-gopt-16-SigLIP2-256__webli": 1536,
}
MAX_ANSWER_BYTES = 16 << 20  # of the real service; the embeddings of 1,000 faces take about 10 MB


class ModelEntry(BaseModel):
    modelName: str = Field(max_length=200)


class ClipEntry(BaseModel):
    visual: ModelEntry | None = None
    textual: ModelEntry | None = None


class Entries(BaseModel):
    """The tasks of a request. Immich sends one at a time. Unknown tasks are forwarded."""

    model_config = ConfigDict(extra="allow")

    clip: ClipEntry | None = None
    faces: Any = Field(None, alias="facial-recognition")
    ocr: Any = None


class Upstream:
    """A real machine-learning service of Immich, which detects faces and recognises text."""

    def __init__(self, address: str) -> None:
        """Raise ValueError if the address is invalid. Its path is ignored, as by Immich."""
        try:
            url = httpx.URL(address)
        except httpx.InvalidURL:
            url = httpx.URL("")
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise ValueError("--immich_upstream must be of the form http://HOST:PORT or https://HOST")
        self.address = f"{url.scheme}://{url.netloc.decode()}"
        self._ssl_context = httpx.create_ssl_context()

    async def predict(self, form: dict[str, str], image: bytes | None) -> Response:
        """Forward a request and return the answer, or raise HTTPException. The middleware limits the time."""
        headers = {"Via": "1.1 llm2clip", "Accept-Encoding": "identity"}
        files = None if image is None else {"image": ("blob", image)}
        answer = bytearray()
        try:
            async with (
                httpx.AsyncClient(headers=headers, timeout=None, trust_env=False, verify=self._ssl_context) as client,
                client.stream("POST", f"{self.address}/predict", data=form, files=files) as response,
            ):
                if response.status_code != 200:
                    raise HTTPException(502, f"the service of --immich_upstream returned status {response.status_code}")
                async for chunk in response.aiter_raw(CHUNK_SIZE):
                    answer += chunk
                    if len(answer) > MAX_ANSWER_BYTES:
                        raise HTTPException(502, "the answer of the service of --immich_upstream is too large")
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise HTTPException(502, f"the service of --immich_upstream cannot be reached: {reason}") from error
        return Response(bytes(answer), media_type="application/json")


def add_immich_routes(app: FastAPI, service: InferenceService, upstream: Upstream | None = None) -> None:
    """Add the routes to an application. Raise ValueError if Immich cannot store as many dimensions as the model has."""
    choose_name(service.encoder.model.embed_dim)
    # Images stay in memory, where the middleware counts them, instead of being written to temporary files.
    MultiPartParser.spool_max_size = service.limits.max_body_bytes

    @app.get("/")
    async def root() -> dict[str, str]:
        return {"message": "Immich ML"}

    @app.get("/ping", response_class=PlainTextResponse)
    async def ping() -> str:
        return "pong"

    @app.post("/predict")
    async def predict(
        request: Request,
        entries: Annotated[Json[Entries], Form()],
        text: Annotated[Text | None, Form()] = None,
        image: Annotated[bytes | None, File()] = None,
    ) -> Any:
        """Return the embedding of an image or a text, or the result of another task."""
        if text is None and image is None:
            raise HTTPException(400, "either image or text must be provided")
        if entries.clip is not None:
            if len(entries.model_fields_set) > 1:
                raise ValueError("entries: `clip` must be the only task of a request, as it is in Immich's requests")
            return await service.embedders.run(_embed, service, entries.clip, text, image)
        if upstream is None:
            return await service.embedders.run(_find_nothing, service, entries, image)
        if "llm2clip" in request.headers.get("via", ""):
            raise HTTPException(502, "--immich_upstream is the address of this server; pass that of Immich's service")
        form = {"entries": entries.model_dump_json(by_alias=True, exclude_unset=True)}
        return await upstream.predict(form if text is None else {**form, "text": text}, image)


def _embed(service: InferenceService, clip: ClipEntry, text: str | None, image: bytes | None) -> dict[str, Any]:
    entry = clip.textual if image is None else clip.visual
    if entry is None:
        raise ValueError("entries: an image needs the type `visual`, and a text the type `textual`")
    answer: dict[str, Any] = {}
    dim = get_dim(entry.modelName, service.encoder.model.embed_dim)
    if image is not None:
        answer["imageWidth"], answer["imageHeight"] = read_request_size(image, service.limits.max_pixels)
        vector = service.encoder.embed_images([image])[0]
    else:
        assert text is not None
        vector = service.encoder.embed(SearchQuery([text])).combined
    return {"clip": json.dumps(np.pad(vector, (0, dim - len(vector))).tolist()), **answer}


def _find_nothing(service: InferenceService, entries: Entries, image: bytes | None) -> dict[str, Any]:
    """Return that an image shows no face and no text. After an error, Immich would avoid the server for a while."""
    answer: dict[str, Any] = {}
    if entries.faces is not None:
        answer["facial-recognition"] = []
    if entries.ocr is not None:
        answer["ocr"] = {"text": [], "box": [], "boxScore": [], "textScore": []}
    if not answer or image is None:
        raise ValueError("entries: must contain `clip`, or an image must be sent for `facial-recognition` or `ocr`")
    answer["imageWidth"], answer["imageHeight"] = read_request_size(image, service.limits.max_pixels)
    return answer


def choose_name(embed_dim: int) -> str:
    """Return the name to set in Immich. Raise ValueError if the model has too many dimensions."""
    for name, dim in BORROWED_NAMES.items():
        if dim >= embed_dim:
            return name
    raise ValueError(f"Immich stores at most {dim:,} dimensions, but the model has {embed_dim:,}")


def get_dim(name: str, embed_dim: int) -> int:
    """Return the dimensions that Immich expects for a name. Raise ValueError if a model cannot borrow the name."""
    dim = BORROWED_NAMES.get(name, 0)
    if dim < embed_dim:
        reason = f"has {dim} dimensions, but this model has {embed_dim}" if dim else "is not served here"
        raise ValueError(f"the model name {name} {reason}. In Immich, set the CLIP model to {choose_name(embed_dim)}")
    return dim


def describe_setup(address: str, embed_dim: int, upstream: Upstream | None) -> str:
    """Return the message that `serve` prints."""
    tasks = "not available: switch both off in Immich, or pass --immich_upstream"
    if upstream is not None:
        tasks = f"forwarded to {upstream.address}, with the images"
    return f"""Serving at {address} for Immich, without a token: everyone who can connect can use the model.
Listen only on a private network. In Immich, open Administration > Settings > Machine Learning Settings:
1. URL: this address, as Immich's container reaches it. Remove all other URLs.
2. Smart Search > CLIP model: {choose_name(embed_dim)} (only the name is used)
3. Save, then run Administration > Job Queues > Smart Search for all images.
Facial recognition and OCR: {tasks}.
Press Ctrl-C to stop."""
