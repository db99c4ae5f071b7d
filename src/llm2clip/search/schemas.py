"""What the server is asked and what it answers, with the limits that every request must keep."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from llm2clip.data.image_header import readable_formats
from llm2clip.data.images import ImageError, load_image
from llm2clip.search.types import Filter, Hit

DATA_URI = "data:image/"
TEXT = 20_000  # characters of a text
TEXTS, IMAGES, TOP = 256, 16, 200  # of a request


@dataclass(frozen=True)
class Limits:
    """What a server puts up with.

    Args:
        max_body_bytes: bytes of a request.
        max_bytes_in_flight: bytes of all requests that are under way; beyond it others are refused (429).
        max_pixels: of a picture, decoded.
        max_queue: texts, or pictures, that may wait for the model; more are refused (429).
        timeout: that a request may take; then it is given up (504).
        batch_size: texts, or pictures, that go through the model together.
    """

    max_body_bytes: int = 32 << 20
    max_bytes_in_flight: int = 512 << 20
    max_pixels: int = 50_000_000
    max_queue: int = 512
    timeout: float = 30.0
    batch_size: int = 32


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("an empty text")
    return text


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("not valid Unicode: half of a surrogate pair") from None
    return text


def _is_data_uri(text: str) -> str:
    if not text.startswith(DATA_URI):
        raise ValueError(f"a picture is a data URI, {DATA_URI}jpeg;base64,...; nothing is fetched from elsewhere")
    return text


def _text_or_uri(text: str) -> str:
    if not text.startswith(DATA_URI) and len(text) > TEXT:
        raise ValueError(f"a text of {len(text):,} characters; {TEXT:,} at most")
    return _said(_encodable(text))


Words = Annotated[str, Field(max_length=TEXT), AfterValidator(_encodable)]
Text = Annotated[Words, AfterValidator(_said)]
Uri = Annotated[str, AfterValidator(_is_data_uri), Field(json_schema_extra={"format": "data-uri"})]
Input = Annotated[str, AfterValidator(_text_or_uri)]
Id = Annotated[str, Field(max_length=64), AfterValidator(_encodable)]
Time = Annotated[float, Field(ge=-1e11, le=1e12, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FilterRequest(_Strict):
    """Which pictures may be found."""

    under: Words | None = Field(default=None, description="folder, tar or file that they lie in")
    caption: Words | None = Field(default=None, description="words that one of their captions contains")
    after: Time | None = Field(default=None, description="taken then or later, seconds since 1970")
    before: Time | None = Field(default=None, description="taken then or earlier")
    larger: int | None = Field(default=None, ge=0, le=1_000_000, description="pixels of the shorter side, at least")

    def filter(self) -> Filter:
        return Filter(**self.model_dump())


class SearchRequest(_Strict):
    """What the pictures are like, and unlike."""

    texts: list[Text] = Field(
        default=[], max_length=IMAGES, description="of any length, in any language the model knows"
    )
    images: list[Uri] = Field(default=[], max_length=IMAGES, description="pictures as data URIs")
    like: list[Id] = Field(default=[], max_length=IMAGES, description="ids of hits")
    without_texts: list[Text] = Field(default=[], max_length=IMAGES)
    without_images: list[Uri] = Field(default=[], max_length=IMAGES)
    top: int = Field(default=50, ge=1, le=TOP, description="how many at most")
    only: FilterRequest = FilterRequest()  # pydantic copies it


class ImageLocation(BaseModel):
    name: str
    captions: list[str]
    taken: float


class HitResponse(BaseModel):
    """A picture that was found, in all its copies."""

    id: str
    score: float = Field(description="cosine")
    width: int
    height: int
    pictures: list[ImageLocation]

    @classmethod
    def of(cls, hit: Hit) -> HitResponse:
        places = [ImageLocation(name=p.name, captions=list(p.captions), taken=p.taken) for p in hit.pictures]
        return cls(id=hit.id, score=hit.score, width=hit.width, height=hit.height, pictures=places)


class SearchResponse(BaseModel):
    hits: list[HitResponse]


class EmbedRequest(BaseModel):
    """As the OpenAI API has it; a text that is an image's data URI is embedded as that image."""

    input: Input | Annotated[list[Input], Field(min_length=1, max_length=TEXTS)]
    model: Words | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    user: Words | None = None

    @property
    def inputs(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class EmbeddingItem(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbedResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: dict[str, int] = Field(description="tokens are not counted: both are 0")


class HealthResponse(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    width: int
    pictures: int


class ErrorBody(BaseModel):
    message: str
    type: str
    code: int


class ErrorResponse(BaseModel):
    error: ErrorBody


class TooLarge(ValueError):
    """A picture of more pixels than is put up with."""


class NotFound(LookupError):
    """What was asked for is not there."""


def load_request_image(data: bytes, pixels: int) -> Any:
    """Encoded bytes to uint8 (3, H, W).

    Raises:
        TooLarge: before it is decoded.
        ImageError: it cannot be read.
    """
    try:
        with Image.open(io.BytesIO(data), formats=readable_formats()) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from error
    except Exception as error:  # hostile headers make Pillow raise almost anything
        raise ImageError("not a picture, or of a kind that cannot be read") from error
    if width * height > pixels:
        raise TooLarge(f"{width} x {height} is more than {pixels:,} pixels")
    return load_image(data)


def decode_data_uri(uri: str) -> bytes:
    """What a data URI holds.

    Raises:
        ImageError: it is none, or not in base64.
    """
    head, comma, body = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ImageError(f"a picture is {DATA_URI}jpeg;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"not base64: {error}") from error
