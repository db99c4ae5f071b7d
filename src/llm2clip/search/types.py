"""Images, contents and hits of an index, errors that searches raise, and deadlines of requests."""

import json
import math
import os
import threading
import time
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from llm2clip.data.image_refs import FileImage, ImageRef, ParquetImage, TarImage
from llm2clip.data.texts import to_valid_unicode
from llm2clip.search.metadata import TIME_OFFSET, ContentMetadata, Detail, ImageMetadata, list_details

# These keys are stored in every index, so they must not change when a class is renamed.
REF_TYPES: dict[str, type[ImageRef]] = {
    "FileImage": FileImage,
    "TarImage": TarImage,
    "ParquetImage": ParquetImage,
}
MAX_LOCATIONS = 100  # maximum per hit; web data sets contain some images hundreds of thousands of times


@dataclass(frozen=True, slots=True)
class IndexedImage(ImageMetadata):
    """An image at a specific location, with its metadata.

    Args:
        name: Canonical path in the form `FILE`, `TAR!MEMBER` or `TABLE[ROW].COLUMN`. Unique within an index.
        ref: Reference to the image's bytes.
        source: Image source in the format of `open_records`, with an absolute path.
        file_version: Size and modification time of the file, used to detect changes.
        captions: Captions of the image. Empty if the source has no captions.
    """

    name: str
    ref: ImageRef
    source: str
    file_version: str
    captions: tuple[str, ...] = ()

    @property
    def container(self) -> str:
        """Path of the image file, or of the tar file or table that contains the image."""
        if isinstance(self.ref, FileImage):
            return self.name
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name.removesuffix(f"@{self.ref.offset}")  # distinguishes tar members with the same name
        path_length = len(self.ref.container_path or "")
        return name.removesuffix(to_valid_unicode(str(self.ref)[path_length:]))

    @property
    def file_name(self) -> str:
        """File name without folders, which may be private. For an image in a table, the form is `TABLE[ROW].COLUMN`."""
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name[len(self.container) + len("!") :].removesuffix(f"@{self.ref.offset}")
        return os.path.basename(name)

    @property
    def has_exif_time(self) -> bool:
        """True if `taken` is an EXIF time. False if it is, or could be, the modification time of a file or data set."""
        _, _, nanoseconds = self.file_version.partition(" ")
        return nanoseconds.isdigit() and abs(self.taken - int(nanoseconds) / 1e9) > TIME_OFFSET / 2


class ImageState(NamedTuple):
    """State of an image, used to detect changes since indexing."""

    file_version: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class IndexedContent(ContentMetadata):
    """Content of an image file, shared by all images with identical bytes, with its metadata.

    Args:
        hash: SHA-256 hash of the encoded image.
        vector: L2-normalised embedding of shape (D,), float16.
        thumbnail: JPEG thumbnail, at most 256 pixels per side.
    """

    hash: bytes
    vector: np.ndarray
    thumbnail: bytes


@dataclass(frozen=True)
class SimilarHit:
    """A hit that was added to a similar hit with a better rank. Names are those of its first image."""

    id: str
    name: str
    file_name: str


@dataclass(frozen=True)
class Hit(ContentMetadata):
    """A search result, with the metadata of its content.

    Args:
        id: Identifier of the image content. Unique within an index.
        score: Cosine similarity to the query vector. None if the search had no query.
        images: At most MAX_LOCATIONS images with this content. Images that match the filter's path and time conditions
            come first.
        image_count: Total number of images with this content.
        matched: Fields that contain words of the query (`caption`, `text`, `name`, `camera`, `date`) if the image
            contains all words of the query, otherwise empty.
        text: Text recognised in the image. Empty if there is none.
        relevance: Number from 0 to 1 that estimates whether the index has an answer to the query, judging from this
            image (see `search.ranking`). None if unknown.
        similar: Hits that were added to this hit because they are similar to it, best first.
    """

    id: str
    score: float | None
    images: tuple[IndexedImage, ...]
    image_count: int
    matched: tuple[str, ...] = ()
    text: str = ""
    relevance: float | None = None
    similar: tuple[SimilarHit, ...] = ()

    @property
    def details(self) -> list[Detail]:
        """Lines about the image and its first location, for the user."""
        return list_details(self, self.images[0])


def ref_to_json(ref: ImageRef) -> str:
    return json.dumps([type(ref).__name__, asdict(ref)])  # type: ignore[call-overload]


def ref_from_json(text: str) -> ImageRef:
    name, values = json.loads(text)
    if name not in REF_TYPES:
        raise ValueError(f"unknown image reference type: {name}")
    return REF_TYPES[name](**values)


# ---- errors


class NotFound(LookupError):
    """Raised when the index, an indexed image, or its original file does not exist."""


class UnsupportedQuery(ValueError):
    """Raised when a query is valid, but asks for something that is not available for it."""


class IndexUnavailableError(OSError):
    """An index cannot be read, for example because its server is down. Trying again later may help."""


# ---- deadlines


class DeadlineExceeded(TimeoutError):
    """Raised when a request to the server has taken longer than the time limit."""


class Deadline(NamedTuple):
    """End of a request, as `time.monotonic`, and the time limit of requests in seconds."""

    end: float = math.inf
    limit: float = math.inf

    @property
    def remaining(self) -> float | None:
        return None if self.end == math.inf else max(0.0, self.end - time.monotonic())

    def make_error(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"the request took longer than {self.limit:g} seconds")


NO_DEADLINE = Deadline()
current_deadline: ContextVar[Deadline] = ContextVar("current_deadline", default=NO_DEADLINE)


class Slots:
    """Context manager that a limited number of threads can hold. Waiting for it ends at the request's deadline."""

    def __init__(self, count: int) -> None:
        self._semaphore = threading.BoundedSemaphore(count)

    def __enter__(self) -> None:
        deadline = current_deadline.get()
        if not self._semaphore.acquire(timeout=deadline.remaining):
            raise deadline.make_error()

    def __exit__(self, *_: object) -> None:
        self._semaphore.release()
