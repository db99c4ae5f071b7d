"""Data types of an image index, exceptions of searches, and request deadlines."""

import json
import math
import os
import threading
import time
from collections import deque
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from llm2clip.data.image_refs import FileImage, ImageRef, ParquetImage, TarImage
from llm2clip.io_utils import to_valid_unicode
from llm2clip.search.metadata import TIME_OFFSET, ContentMetadata, ImageMetadata, MetadataLine, describe_metadata

# These keys are stored in every index, so a key must not change when its class is renamed.
REF_TYPES: dict[str, type[ImageRef]] = {"FileImage": FileImage, "TarImage": TarImage, "ParquetImage": ParquetImage}
MAX_LOCATIONS = 100  # maximum number of locations per hit; web datasets contain some images over 100,000 times


@dataclass(frozen=True, slots=True)
class IndexedImage(ImageMetadata):
    """An indexed image file, tar member or table cell."""

    name: str  # canonical path: `FILE`, `TAR!MEMBER` or `TABLE[ROW].COLUMN`; unique within an index
    ref: ImageRef
    source: str  # source in the format of `open_records`, with an absolute path
    file_version: str  # size and modification time of the file, used to detect changes
    captions: tuple[str, ...] = ()

    @property
    def container(self) -> str:
        """Path of the image file, or of the tar file or table that contains the image."""
        if isinstance(self.ref, FileImage):
            return self.name
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name.removesuffix(f"@{self.ref.offset}")  # the offset distinguishes tar members with the same name
        path_length = len(self.ref.container_path or "")
        return name.removesuffix(to_valid_unicode(str(self.ref)[path_length:]))

    @property
    def file_name(self) -> str:
        """File name without folder names, which may be private, or `TABLE[ROW].COLUMN` for an image in a table."""
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name[len(self.container) + len("!") :].removesuffix(f"@{self.ref.offset}")
        return os.path.basename(name)

    @property
    def has_exif_time(self) -> bool:
        """True if `taken` is an EXIF time, False if `taken` may be the modification time of a file."""
        _, _, nanoseconds = self.file_version.partition(" ")
        return nanoseconds.isdigit() and abs(self.taken - int(nanoseconds) / 1e9) > TIME_OFFSET / 2


class ImageState(NamedTuple):
    """File version and captions of an indexed image, used to detect changes."""

    file_version: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class IndexedContent(ContentMetadata):
    """Embedding, thumbnail and metadata that all images with identical bytes share."""

    hash: bytes  # SHA-256 hash of the encoded image
    vector: np.ndarray  # L2-normalised embedding of shape (D,), float16
    thumbnail: bytes  # JPEG, at most 256 pixels per side


@dataclass(frozen=True)
class SimilarHit:
    """Hit that was grouped with a similar, better-ranked hit."""

    id: str
    name: str  # `name` of the first location
    file_name: str  # `file_name` of the first location


@dataclass(frozen=True)
class Hit(ContentMetadata):
    """Search result: an image, its metadata and its locations."""

    id: str  # identifier of the image content; unique within an index
    score: float | None  # cosine similarity to the query vector, or None without a query
    images: tuple[IndexedImage, ...]  # at most MAX_LOCATIONS locations; locations that match the filter come first
    image_count: int  # total number of locations
    # Fields (`caption`, `text`, `name`, `camera`, `date`) with query words. Empty unless the image has all query words.
    matched: tuple[str, ...] = ()
    text: str = ""  # text recognised in the image
    relevance: float | None = None  # probability that the image is an answer (see `search.relevance`), or None
    similar: tuple[SimilarHit, ...] = ()  # hits that were grouped with this hit, best first

    @property
    def details(self) -> list[MetadataLine]:
        """Lines of metadata about the image and its first location, for display."""
        return describe_metadata(self, self.images[0])


def serialize_image_ref(ref: ImageRef) -> str:
    return json.dumps([type(ref).__name__, asdict(ref)])  # type: ignore[call-overload]


def parse_image_ref(text: str) -> ImageRef:
    name, values = json.loads(text)
    if name not in REF_TYPES:
        raise ValueError(f"unknown image reference type: {name}")
    return REF_TYPES[name](**values)


# ---- errors


class NotFoundError(LookupError):
    """Raised when an index, an indexed image or an original image file does not exist."""


class UnsupportedQueryError(ValueError):
    """Raised when a query is valid, but not supported by the operation."""


class IndexUnavailableError(OSError):
    """Raised when an index cannot be read at the moment, for example because the PostgreSQL server is down."""


# ---- deadlines


class DeadlineExceededError(TimeoutError):
    """Raised when a request exceeds the server's time limit."""


class Deadline(NamedTuple):
    """Time at which a request is cancelled."""

    end: float = math.inf  # value of `time.monotonic` at the deadline
    limit: float = math.inf  # time limit of the request, in seconds

    @property
    def remaining_seconds(self) -> float | None:
        return None if self.end == math.inf else max(0.0, self.end - time.monotonic())

    def make_error(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"the request took longer than {self.limit:g} seconds")


NO_DEADLINE = Deadline()
current_deadline: ContextVar[Deadline] = ContextVar("current_deadline", default=NO_DEADLINE)


class FairSemaphore:
    """Semaphore that threads acquire in first-in, first-out order.

    With `threading.Semaphore`, a request that acquires and releases the semaphore in a loop could block other requests.
    Acquiring the semaphore raises DeadlineExceededError after the deadline of the request.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[threading.Semaphore] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        turn = threading.Semaphore(0)
        with self._lock:
            self._waiting.append(turn)
            self._wake_waiting_threads()
        deadline = current_deadline.get()
        if turn.acquire(timeout=deadline.remaining_seconds):
            return
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
                raise deadline.make_error()
        # If another thread has woken this thread just after the timeout, this thread has acquired the semaphore.

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._free += 1
            self._wake_waiting_threads()

    def _wake_waiting_threads(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().release()
