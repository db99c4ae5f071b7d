"""Pydantic models of HTTP API requests and responses, and error responses in the format of OpenAI's API."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.functional_validators import WrapValidator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException

from llm2clip.io_utils import is_valid_unicode, to_valid_unicode
from llm2clip.search.images import ImageTooLargeError, InvalidImageError, RequestImage
from llm2clip.search.inference import QueueFullError
from llm2clip.search.metadata import (
    CONDITIONS,
    CONTENT_FIELDS,
    IMAGE_FIELDS,
    Filter,
    FilterCondition,
    MetadataField,
    MetadataLine,
)
from llm2clip.search.query import SearchQuery
from llm2clip.search.types import (
    MAX_LOCATIONS,
    DeadlineExceededError,
    IndexUnavailableError,
    NotFoundError,
    SimilarHit,
    UnsupportedQueryError,
)

logger = logging.getLogger(__name__)

DATA_URI_PREFIX = "data:image/"
MAX_TEXT_LENGTH = 20_000  # maximum length of a text, in characters
MAX_TEXTS, MAX_IMAGES, MAX_TOP = 256, 16, 200  # maximum numbers of texts, images and hits per request
MAX_EMBEDDED_IMAGES = 32  # maximum number of images per embedding request; mteb sends batches of 32 images
MAX_OFFSET = 10_000  # maximum number of hits to skip, because skipped hits must also be found and scored
# A query has at most 2 * MAX_IMAGES texts. A short text is encoded once without a template and once per template.
# With at most MAX_TEMPLATES templates, a search request therefore encodes at most MAX_TEXTS texts.
MAX_TEMPLATES = MAX_TEXTS // (2 * MAX_IMAGES) - 1


def _make_text_validator(is_valid: Callable[[str], bool], message: str) -> AfterValidator:
    def check_text(text: str) -> str:
        if not is_valid(text):
            raise ValueError(message)
        return text

    return AfterValidator(check_text)


def _check_text_length(text: str) -> str:
    if not text.startswith(DATA_URI_PREFIX) and len(text) > MAX_TEXT_LENGTH:
        raise ValueError(f"the text is too long: {len(text):,} characters; the limit is {MAX_TEXT_LENGTH:,}")
    return text


NON_BLANK = _make_text_validator(lambda text: bool(text.strip()), "the text is empty")
VALID_UNICODE = _make_text_validator(
    is_valid_unicode, "the text is not valid Unicode: it contains an unpaired surrogate"
)
IMAGE_FORM = f"an image must be a data URI of the form {DATA_URI_PREFIX}jpeg;base64,DATA. URLs are not downloaded"
IS_DATA_URI = _make_text_validator(lambda text: text.startswith(DATA_URI_PREFIX), IMAGE_FORM)
AnyText = Annotated[str, Field(max_length=MAX_TEXT_LENGTH), VALID_UNICODE]
Text = Annotated[AnyText, NON_BLANK]
parse_text = TypeAdapter(Text).validate_python
DataUri = Annotated[str, IS_DATA_URI, Field(json_schema_extra={"format": "data-uri"})]
TextOrDataUri = Annotated[str, AfterValidator(_check_text_length), VALID_UNICODE, NON_BLANK]
HitId = Annotated[str, Field(max_length=64), VALID_UNICODE]
Time = Annotated[float, Field(ge=-1e11, le=1e12, allow_inf_nan=False)]

Item = TypeVar("Item")
# Without `fail_fast`, pydantic would create an error object for every invalid item of a long list.
Items = Annotated[list[Item], Field(fail_fast=True)]
QueryItems = Annotated[Items[Item], Field(max_length=MAX_IMAGES)]
Inputs = Annotated[Items[TextOrDataUri], Field(min_length=1, max_length=MAX_TEXTS)]
parse_input, parse_inputs = TypeAdapter(TextOrDataUri | None).validate_python, TypeAdapter(Inputs).validate_python


class StrictModel(BaseModel):
    """Pydantic base model that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_fields(cls, data: Any) -> Any:
        # Only the first unknown field is reported. Pydantic would create an error object for every unknown field.
        if isinstance(data, dict):
            for name in data:
                if name not in cls.model_fields:
                    names = {"name": repr(name[:50]), "fields": ", ".join(cls.model_fields)}
                    raise PydanticCustomError("unknown_field", "unknown field {name}; valid fields are {fields}", names)
        return data


FILTER_TYPES: dict[str, Any] = {
    "text": AnyText,
    "number": Annotated[int, Field(ge=0, le=1_000_000)],
    "first time": Time,
    "last time": Time,
}


def _make_filter_field(condition: FilterCondition) -> tuple[Any, Any]:
    unit = ", as a Unix timestamp" if condition.kind.endswith("time") else ""
    max_length = condition.max_length if condition.kind == "text" else None
    description = f"only images {condition.description}{unit}"
    return FILTER_TYPES[condition.kind] | None, Field(None, description=description, max_length=max_length)


FilterFields = create_model(
    "FilterFields",
    __base__=StrictModel,
    **{name: _make_filter_field(condition) for name, condition in CONDITIONS.items()},  # type: ignore[call-overload]
)


class FilterRequest(FilterFields):  # type: ignore[valid-type, misc]
    """Conditions that every search result must meet."""

    def to_filter(self) -> Filter:
        return Filter(**self.model_dump())


class QueryRequest(StrictModel):
    """A query. Results should resemble its positive parts and should not resemble its negative parts."""

    texts: QueryItems[Text] = Field([], description="texts to search for, in any language that the model supports")
    images: QueryItems[DataUri] = Field([], description="images as data URIs")
    like: QueryItems[HitId] = Field([], description="ids of earlier hits that results should resemble")
    negative_texts: QueryItems[Text] = Field([], description="texts that results should not match")
    negative_images: QueryItems[DataUri] = Field(
        [], description="images that results should not resemble, as data URIs"
    )
    negative_like: QueryItems[HitId] = Field([], description="ids of earlier hits that results should not resemble")

    def to_query(self) -> SearchQuery:
        values: dict[str, Any] = {name: getattr(self, name) for name in QueryRequest.model_fields}
        for name in ("images", "negative_images"):
            values[name] = [RequestImage(uri, f"{name}.{index}") for index, uri in enumerate(values[name])]
        return SearchQuery(**values)


class SearchRequest(QueryRequest):
    """Search with an optional query and an optional filter. Without a query, return matching images, newest first."""

    top: int = Field(default=50, ge=1, le=MAX_TOP, description="maximum number of hits, not counting similar images")
    offset: int = Field(
        default=0,
        ge=0,
        le=MAX_OFFSET,
        description="number of hits to skip, including similar images; pass `next_offset` of the previous page",
    )
    show_weak: bool = Field(default=False, description="also return hits if no image is close to the query")
    filter: FilterRequest = Field(default=FilterRequest(), description="conditions that every hit must meet")
    words: bool = Field(
        default=True,
        description="rank an image higher if each word of `texts` occurs in its captions, recognised text, file name, "
        "camera or date",
    )
    group_similar: bool = Field(
        default=True,
        description="return bursts and edited copies of an image as one hit, whose `similar` lists the other images; "
        "ignored without a query",
    )


def _make_metadata_model(name: str, metadata_fields: tuple[MetadataField, ...]) -> type[BaseModel]:
    types = {}
    for item in metadata_fields:
        value_type = item.type | None if item.is_nullable else item.type
        types[item.name] = (value_type, Field(description=item.description))
    return create_model(name, **types)  # type: ignore[call-overload]


class ImageLocation(_make_metadata_model("ImageFields", IMAGE_FIELDS)):  # type: ignore[misc]
    """Location of an image, with its captions and metadata."""

    name: str = Field(description="path of the image: `FILE`, `TAR!MEMBER` or `TABLE[ROW].COLUMN`")
    file_name: str = Field(description="file name without folders")
    captions: list[str] = Field(description="captions of the image")


# Built from the attributes of `search.types.Hit`. For the other places that read the fields, see CONTRIBUTING.md.
class HitResponse(_make_metadata_model("ContentFields", CONTENT_FIELDS)):  # type: ignore[misc]
    """A search result: an image, its metadata and its locations."""

    id: str = Field(description="id of the image, for `like`, `/image/ID` and `/thumbnail/ID`")
    score: float | None = Field(description="cosine similarity to the query; null if there is no query")
    relevance: float | None = Field(
        description="estimated probability that the image is an answer to the query, from 0 to 1; null if the query "
        "has no positive parts, or if the index is not calibrated"
    )
    images: list[ImageLocation] = Field(description=f"the first {MAX_LOCATIONS} locations")
    image_count: int = Field(description="number of locations")
    matched: list[Literal["caption", "text", "name", "camera", "date"]] = Field(
        description="fields that contain at least one query word; empty unless each query word is in some field"
    )
    text: str = Field(description="text recognised in the image")
    details: list[MetadataLine] = Field(description="lines of metadata about the image and its first location")
    similar: list[SimilarHit] = Field(
        description="bursts and edited copies of the image, grouped with the hit, best first"
    )


class SearchResponse(BaseModel):
    """Search results, best first, or newest first if there is no query."""

    hits: list[HitResponse] = Field(description="one page of results")
    nothing_close: bool = Field(
        description="true if no image that matches the filter is close to the query; the response then has no hits, "
        "unless `show_weak` is true or the request has a filter"
    )
    total: int = Field(description="number of distinct images in the index that match the filter")
    next_offset: int | None = Field(
        description="`offset` of the next page; null if there are no further hits or the offset would be too large. "
        "Offsets count ungrouped hits, so a page can end before or after `offset` + `top`"
    )


class HitRequest(QueryRequest):
    """Request with a non-empty query and a hit to explain."""

    id: HitId = Field(description="id of a hit")


class HeatmapResponse(BaseModel):
    """Heat map of the similarity between a query and an image."""

    rows: list[list[float]] = Field(
        description="cosine similarity between the query and each cell of a regular grid over the image, row by row"
    )


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    url: DataUri


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl


class Message(BaseModel):
    """Message with texts and images, whose embeddings are summed and normalised to a single embedding."""

    role: Literal["user"]
    content: Annotated[
        QueryItems[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
        Field(min_length=1),
        WrapValidator(lambda v, parse: [TextPart(type="text", text=parse_text(v))] if isinstance(v, str) else parse(v)),
    ]


Conversation = Annotated[Items[Message], Field(min_length=1, max_length=1)]
parse_conversation = TypeAdapter(Conversation).validate_python


def _parse_messages(value: Any, parse: Callable[[Any], Any]) -> Any:
    # A single conversation is not wrapped in a list, so that error messages contain the correct path.
    is_single = isinstance(value, list) and value and isinstance(value[0], dict)
    return parse_conversation(value) if is_single else parse(value)


class EmbedRequest(BaseModel):
    """A request in the format of OpenAI's embeddings API, with `messages` as in vLLM and `modality` as in Infinity."""

    input: Annotated[
        TextOrDataUri | Inputs | None,  # without a validator, pydantic would report errors for each type
        WrapValidator(lambda value, _: parse_inputs(value) if isinstance(value, list) else parse_input(value)),
    ] = Field(None, description="a text, an image as a data URI, or a list of texts and images")
    messages: (
        Annotated[Items[Conversation], Field(min_length=1, max_length=MAX_TEXTS), WrapValidator(_parse_messages)] | None
    ) = Field(None, description="conversations to embed instead of `input`, each with a single message")
    modality: Literal["text", "image"] | None = Field(
        None,
        description="modality of every item in `input`; by default, data URIs are images and other items are texts",
    )
    model: AnyText | None = Field(None, description="ignored, because the server has only one model")
    encoding_format: Literal["float", "base64"] = Field("float", description="`float` (list) or `base64` (float32)")
    dimensions: int | None = Field(
        default=None, description="embeddings are truncated to this dimension and normalised; default: no truncation"
    )
    user: AnyText | None = Field(None, description="ignored")

    def to_inputs(self) -> list[list[str | RequestImage]]:
        """Return the texts and images of each input. Raise ValueError if an input is not of the requested modality."""
        if (self.input is None) == (self.messages is None):
            raise ValueError("a request must contain either `input` or `messages`")
        inputs: list[list[str | RequestImage]] = []
        for number, item in enumerate([self.input] if isinstance(self.input, str) else self.input or []):
            is_image = item.startswith(DATA_URI_PREFIX)
            if self.modality is not None and is_image != (self.modality == "image"):
                reason = "it is a data URI of an image" if is_image else IMAGE_FORM
                raise ValueError(f"input.{number} does not support the modality {self.modality!r}: {reason}")
            inputs.append([RequestImage(item, f"input.{number}") if is_image else item])
        for number, conversation in enumerate(self.messages or []):
            message, index = (conversation, "") if isinstance(conversation, Message) else (conversation[0], ".0")
            inputs.append([])
            for position, part in enumerate(message.content):
                param = f"messages.{number}{index}.content.{position}"
                inputs[-1].append(part.text if isinstance(part, TextPart) else RequestImage(part.image_url.url, param))
        return inputs


class EmbeddingItem(BaseModel):
    """The embedding of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbedResponse(BaseModel):
    """A response in the format of OpenAI's embeddings API."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: dict[str, int] = Field(description="token counts; always 0, because tokens are not counted")


class HealthResponse(BaseModel):
    """Health check response. If a server requires a token, requests without the token receive only the status."""

    status: Literal["ok"] = "ok"
    model: str | None = None
    dimensions: int | None = None
    images: int | None = None


# ---- errors

ERROR_TYPES = {
    400: "bad request",
    401: "missing or invalid token",
    403: "cross-site request",
    404: "not found",
    413: "request too large",
    422: "invalid request",
    429: "too many requests",
    503: "index unavailable",
    504: "timeout",
}
# Exceptions that are not listed are reported as internal errors.
STATUS_CODES: dict[type[Exception], int] = {
    QueueFullError: 429,
    ImageTooLargeError: 413,
    UnsupportedQueryError: 400,
    NotFoundError: 404,
    IndexUnavailableError: 503,
    DeadlineExceededError: 504,
    ValueError: 422,
    RequestValidationError: 422,
}
MAX_MESSAGE_LENGTH = 1000  # maximum length of messages about invalid requests, in characters
LOG_SECONDS = 60  # an identical warning about the index is logged at most once in this time
RETRY_SOON = {"Retry-After": "1"}  # asks the client to wait for one second


class ErrorBody(BaseModel):
    """Error description in the format of OpenAI's API."""

    message: str
    type: str
    code: int
    param: str | None = Field(
        default=None, description='field and index of the image that cannot be decoded, such as "images.0"'
    )


class ErrorResponse(BaseModel):
    """JSON body of all error responses."""

    error: ErrorBody


# Passed to FastAPI as `responses` to document these errors in the OpenAPI schema.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    code: {"model": ErrorResponse, "description": description} for code, description in ERROR_TYPES.items()
}


def make_error_response(
    code: int, message: str, headers: dict[str, str] | None = None, param: str | None = None
) -> JSONResponse:
    """Return a JSON error response in the format of OpenAI's API."""
    error = {"message": message, "type": ERROR_TYPES.get(code, "error"), "code": code, "param": param}
    return JSONResponse({"error": error}, code, headers)


def add_error_handlers(app: FastAPI) -> None:
    """Register handlers that convert all exceptions in an application to error responses."""
    app.add_exception_handler(Exception, _handle_unexpected_error)
    app.add_exception_handler(HTTPException, _handle_http_exception)
    for exception in STATUS_CODES:
        app.add_exception_handler(exception, _handle_known_exception)


async def _handle_known_exception(request: Request, error: Exception) -> Response:
    if isinstance(error, InvalidImageError):
        return make_error_response(error.code, str(error), param=error.param)
    code = next(code for exception, code in STATUS_CODES.items() if isinstance(error, exception))
    headers = RETRY_SOON if code in (429, 503) else None
    return make_error_response(code, make_client_error_message(error, request.app), headers)


def make_client_error_message(error: Exception, app: FastAPI) -> str:
    """Return an error message that can be sent to clients. Log exceptions whose details clients must not see."""
    if isinstance(error, RequestValidationError | ValidationError):
        problems = []
        for problem in error.errors()[:3]:
            field = ".".join(str(part) for part in problem["loc"])
            is_object = field != "body" or problem["type"] not in ("missing", "model_attributes_type")
            if problem["msg"] == "JSON decode error" or not is_object:
                problems.append("the body must be a JSON object, sent with the header Content-Type: application/json")
            else:
                problems.append(f"{field}: {problem['msg']}" if field else problem["msg"])
        return to_valid_unicode("; ".join(dict.fromkeys(problems)))[:MAX_MESSAGE_LENGTH]
    if not isinstance(error, tuple(STATUS_CODES)):
        logger.error("internal error", exc_info=error)
        return "internal error; see the server's log"
    if not isinstance(error, IndexUnavailableError):
        return str(error)
    # The message is not sent to clients, because it can contain network addresses.
    warning = str(error), time.monotonic() // LOG_SECONDS
    if getattr(app.state, "last_warning", None) != warning:
        logger.warning("%s", error)
        app.state.last_warning = warning
    return "the index is temporarily unavailable; try again later"


async def _handle_unexpected_error(_: Request, error: Exception) -> JSONResponse:
    return make_error_response(500, "internal server error; see the server's log")


async def _handle_http_exception(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return make_error_response(error.status_code, str(error.detail), dict(error.headers or {}))
