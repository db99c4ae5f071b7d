"""Data types of an index (images, contents, hits), exceptions of searches, and request deadlines."""

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
from llm2clip.search.metadata import TIME_OFFSET, ContentMetadata, Detail, ImageMetadata, list_details

# These keys are stored in every index, so they must not change when a class is renamed.
REF_TYPES: dict[str, type[ImageRef]] = {
    "FileImage": FileImage,
    "TarImage": TarImage,
    "ParquetImage": ParquetImage,
}
MAX_LOCATIONS = 100  # per hit; web datasets contain some images hundreds of thousands of times


@dataclass(frozen=True, slots=True)
class IndexedImage(ImageMetadata):
    """An indexed image file, tar member or table cell, with its captions and metadata."""

    name: str  # canonical path: `FILE`, `TAR!MEMBER` or `TABLE[ROW].COLUMN`; unique within an index
    ref: ImageRef
    source: str  # in the format of `open_records`, with an absolute path
    file_version: str  # size and modification time of the file, to detect changes
    captions: tuple[str, ...] = ()

    @property
    def container(self) -> str:
        """Path of the image file, or of the tar file or table that contains it."""
        if isinstance(self.ref, FileImage):
            return self.name
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name.removesuffix(f"@{self.ref.offset}")  # distinguishes tar members with the same name
        path_length = len(self.ref.container_path or "")
        return name.removesuffix(to_valid_unicode(str(self.ref)[path_length:]))

    @property
    def file_name(self) -> str:
        """File name without the folders, which may be private. An image in a table has the form `TABLE[ROW].COLUMN`."""
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name[len(self.container) + len("!") :].removesuffix(f"@{self.ref.offset}")
        return os.path.basename(name)

    @property
    def has_exif_time(self) -> bool:
        """True if `taken` is an EXIF time, False if it is or could be the modification time of a file or dataset."""
        _, _, nanoseconds = self.file_version.partition(" ")
        return nanoseconds.isdigit() and abs(self.taken - int(nanoseconds) / 1e9) > TIME_OFFSET / 2


class ImageState(NamedTuple):
    """State of an indexed image, from which changes are detected."""

    file_version: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class IndexedContent(ContentMetadata):
    """Content of an image file, shared by all images with identical bytes, and its metadata."""

    hash: bytes  # SHA-256 hash of the encoded image
    vector: np.ndarray  # L2-normalised embedding of shape (D,), float16
    thumbnail: bytes  # JPEG, at most 256 pixels per side


@dataclass(frozen=True)
class SimilarHit:
    """A hit that was grouped with a similar hit of a better rank. The names are those of its first image."""

    id: str
    name: str
    file_name: str


@dataclass(frozen=True)
class Hit(ContentMetadata):
    """A search result and the metadata of its content."""

    id: str  # identifier of the image content; unique within an index
    score: float | None  # cosine similarity to the query vector, or None without a query
    images: tuple[IndexedImage, ...]  # at most MAX_LOCATIONS, images that match the filter first
    image_count: int  # total number of images with this content
    # Fields that contain words of the query (`caption`, `text`, `name`, `camera`, `date`). Empty unless the image
    # contains all words of the query.
    matched: tuple[str, ...] = ()
    text: str = ""  # recognised in the image
    relevance: float | None = None  # estimated probability of being an answer (see `search.relevance`), or None
    similar: tuple[SimilarHit, ...] = ()  # hits that were grouped with this hit, best first

    @property
    def details(self) -> list[Detail]:
        """Metadata lines about the image and its first location, for the user."""
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
    """Raised when the requested operation is not available for a valid query."""


class IndexUnavailableError(OSError):
    """Raised when an index cannot be read, for example because its server is down. A later attempt may succeed."""


# ---- deadlines


class DeadlineExceeded(TimeoutError):
    """Raised when a request exceeds the server's time limit."""


class Deadline(NamedTuple):
    """Deadline of a request, on the clock of `time.monotonic`, and the time limit in seconds."""

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
    """Semaphore as a context manager, which serves waiting threads in the order of their arrival.

    With `threading.Semaphore`, a request that releases and enters in a loop would keep all other requests waiting.
    Entering raises DeadlineExceeded after the request's deadline.
    """

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: deque[threading.Semaphore] = deque()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        turn = threading.Semaphore(0)
        with self._lock:
            self._waiting.append(turn)
            self._wake_waiting()
        deadline = current_deadline.get()
        if turn.acquire(timeout=deadline.remaining):
            return
        with self._lock:
            if turn in self._waiting:
                self._waiting.remove(turn)
                raise deadline.make_error()
        # The slot was assigned at the moment of the deadline.

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._free += 1
            self._wake_waiting()

    def _wake_waiting(self) -> None:
        while self._free and self._waiting:
            self._free -= 1
            self._waiting.popleft().release()
