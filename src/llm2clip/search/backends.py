"""Index backend interface, shared data types, and a function that opens an index.

An index is stored in a local folder (SQLite) or in a schema of a PostgreSQL database.
"""

import importlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llm2clip.data.image_refs import DatasetImage, FileImage, ImageRef, ParquetImage, TarImage, to_valid_unicode
from llm2clip.io_utils import install_command

# Backend of each URL scheme, and the form of the URLs. The module `search.NAME_backend` defines `open_index`, and the
# extra with this name installs its packages. Locations without a scheme are folders.
BACKENDS = {"postgresql": "postgres", "postgres": "postgres"}
URL_FORM = "postgresql://USER@HOST/DATABASE?schema=NAME"
FORMAT_VERSION = 2  # version of the index format
NEW_INDEX_ADVICE = "Build a new index in another folder with `llm2clip index`"
# These keys are stored in every index, so they must not change when a class is renamed.
REF_TYPES: dict[str, type[ImageRef]] = {
    "FileImage": FileImage,
    "TarImage": TarImage,
    "ParquetImage": ParquetImage,
    "DatasetImage": DatasetImage,
}


@dataclass(frozen=True, slots=True)
class IndexedImage:
    """An image at a specific location.

    Args:
        name: Canonical path in the form `FILE`, `TAR!MEMBER` or `TABLE[ROW].COLUMN`. Unique within an index.
        ref: Reference to the image's bytes.
        source: Image source in the format of `open_records`, with an absolute path.
        file_version: Size and modification time of the file, used to detect changes.
        captions: Captions of the image. Empty if the source has no captions.
        taken: EXIF capture time as a Unix timestamp. For images without an EXIF date, the file's modification time.
            `build.has_exif_time` distinguishes them.
        camera: Camera make and model in the EXIF data, for word search. Search results do not contain it.
    """

    name: str
    ref: ImageRef
    source: str
    file_version: str
    captions: tuple[str, ...] = ()
    taken: float = 0.0
    camera: str = ""

    @property
    def container(self) -> str:
        """Path of the image file, or of the tar file or table that contains the image."""
        if isinstance(self.ref, FileImage):
            return self.name
        name = self.name
        if isinstance(self.ref, TarImage):
            # This suffix distinguishes tar members with the same name.
            name = name.removesuffix(f"@{self.ref.offset}")
        path_length = len(self.ref.container_path or "")
        return name.removesuffix(to_valid_unicode(str(self.ref)[path_length:]))

    @property
    def file_name(self) -> str:
        """File name without folders, which may be private. For an image in a table, the form is `TABLE[ROW].COLUMN`."""
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name[len(self.container) + len("!") :].removesuffix(f"@{self.ref.offset}")
        return os.path.basename(name)


class ImageState(NamedTuple):
    """State of an image, used to detect changes since indexing."""

    file_version: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class IndexedContent:
    """Content of an image file, shared by all images with identical bytes.

    Args:
        hash: SHA-256 hash of the encoded image.
        vector: L2-normalised embedding of shape (D,), float16.
        thumbnail: JPEG thumbnail, at most 256 pixels per side.
        width: Width of the image in pixels, after EXIF rotation.
        height: Height of the image in pixels, after EXIF rotation.
    """

    hash: bytes
    vector: np.ndarray
    thumbnail: bytes
    width: int
    height: int


class SimilarHit(NamedTuple):
    """A hit that was added to a similar hit with a better rank (see `search.similar`).

    Args:
        id: Id of the hit.
        name, file_name: Name and file name of its first image.
    """

    id: str
    name: str
    file_name: str


MAX_LOCATIONS = 100  # maximum per hit; web data sets contain some images hundreds of thousands of times
FILES_PER_NEWEST = 10  # number of files that `newest_ids` reads per image, because some may have the same content


@dataclass(frozen=True)
class Hit:
    """A search result.

    Args:
        id: Identifier of the image content. Unique within an index.
        score: Cosine similarity to the query vector. None if the search had no query.
        images: At most MAX_LOCATIONS images with this content. Images that match the filter's path and time conditions
            come first.
        image_count: Total number of images with this content.
        width: Width of the image in pixels, after EXIF rotation.
        height: Height of the image in pixels, after EXIF rotation.
        matched: Fields that contain words of the query (`caption`, `text`, `name`, `camera`, `date`) if the image
            contains all words of the query, otherwise empty.
        text: Text recognised in the image. Empty if there is none.
        relevance: Number from 0 to 1 that estimates whether the index has an answer to the query, judging from this
            image (see `search.relevance`). None if unknown.
        similar: Hits that were added to this hit because they are similar to it, best first.
    """

    id: str
    score: float | None
    images: tuple[IndexedImage, ...]
    image_count: int
    width: int
    height: int
    matched: tuple[str, ...] = ()
    text: str = ""
    relevance: float | None = None
    similar: tuple[SimilarHit, ...] = ()


MAX_CAPTION_FILTER_LENGTH = 500  # in characters


@dataclass(frozen=True)
class Filter:
    """Conditions that every search result must meet. None means no condition.

    Args:
        path: Folder, tar or file that contains the image. An absolute path matches only at that location. A relative
            path, such as `2024/trip`, matches in every folder. `*` matches any characters, including slashes, and `?`
            matches one character.
        caption: Text that at least one caption must contain, ignoring case. At most MAX_CAPTION_FILTER_LENGTH
            characters.
        after: Earliest capture time, as a Unix timestamp.
        before: Latest capture time, as a Unix timestamp.
        min_side: Minimum length of the image's shorter side, in pixels.

    Raises:
        ValueError: `caption` is too long.
    """

    path: str | None = None
    caption: str | None = None
    after: float | None = None
    before: float | None = None
    min_side: int | None = None

    def __post_init__(self) -> None:
        if self.caption is not None and len(self.caption) > MAX_CAPTION_FILTER_LENGTH:
            raise ValueError(
                f"the caption filter is too long: {len(self.caption):,} characters; "
                f"the limit is {MAX_CAPTION_FILTER_LENGTH}"
            )

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())


def ref_to_json(ref: ImageRef) -> str:
    """Serialize an image reference to JSON."""
    return json.dumps([type(ref).__name__, asdict(ref)])  # type: ignore[call-overload]


def ref_from_json(text: str) -> ImageRef:
    """Deserialize an image reference from `ref_to_json`. Raise ValueError if the reference has an unknown type."""
    name, fields = json.loads(text)
    if name not in REF_TYPES:
        raise ValueError(f"unknown image reference type: {name}")
    return REF_TYPES[name](**fields)


class WordIndexError(OSError):
    """Raised if a search needs the tables for word search and they are corrupt."""


class Backend(Protocol):
    """Interface for indexes, which store images and search them by embedding.

    The methods of backends on a server raise IndexUnavailableError if the server does not respond.
    """

    def lock(self) -> AbstractContextManager[None]:
        """Return a context manager that prevents other runs from writing to the index.

        Entering the context raises FolderInUseError if another run holds the lock.
        """
        ...

    def metadata(self) -> dict[str, Any]:
        """Return the index metadata, or an empty dict if `initialize` has not been called.

        The keys are `model` (the model's name), `embed_dim` (the number of dimensions of the vectors, which may be
        truncated), and either `fingerprint` (the model's fingerprint) or `image_fingerprint` and `text_fingerprint`
        (those of its image encoder and text encoder).
        """
        ...

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        """Store the metadata and prepare the backend for adding images."""
        ...

    def repair_words(self) -> None:
        """Rebuild the tables for word search if they are corrupt."""
        ...

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        """Return the states of the images that were indexed from the given sources, keyed by image name.

        Images from other sources are also included if their path is inside one of the given sources.
        """
        ...

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return the subset of the given content hashes that are already in the index."""
        ...

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add images and their contents. An image replaces any existing image of the same name.

        Each image is paired with its content hash. Everything is added in one transaction.
        """
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove images by name, then remove all contents that no longer belong to any image."""
        ...

    def finish(self) -> None:
        """Complete an indexing run. Call this after all images have been added and removed."""
        ...

    def count(self) -> tuple[int, int]:
        """Return the number of images and the number of distinct image contents."""
        ...

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        """Return the names of duplicate images, grouped by content: at most `limit` groups, largest first."""
        ...

    def contents_without_text(self, sources: Sequence[str]) -> list[tuple[bytes, IndexedImage]]:
        """Return the contents in which no text has been recognised yet, as pairs of content hash and image.

        Only images that `indexed` returns for the sources are included.
        """
        ...

    def set_texts(self, texts: Mapping[bytes, str]) -> None:
        """Store the texts recognised in images, keyed by content hash."""
        ...

    def search(
        self,
        vector: np.ndarray | None,
        count: int,
        image_filter: Filter,
        offset: int = 0,
        words: Sequence[str] = (),
    ) -> list[Hit]:
        """Return the images that match a filter, most similar to the query vector first.

        Images whose texts contain all words of the query are ranked higher (see `search.words`). Their scores are
        cosine similarities, so the scores of the hits are then not sorted.

        Without a query vector, return the newest images first. If several files of an image match the filter, the
        latest of their capture times is used. Images with equal times are ordered by id.

        Args:
            vector: L2-normalised query vector of shape (D,), float32, or None.
            count: Maximum number of hits.
            offset: Number of hits to skip.
            words: Texts of the query, for word search. Used only with a query vector.

        Raises:
            WordIndexError: The tables for word search are corrupt.
        """
        ...

    def count_matches(self, image_filter: Filter) -> int:
        """Return the number of distinct images that match a filter."""
        ...

    def vector(self, hit_id: str) -> np.ndarray | None:
        """Return a hit's embedding as a float32 array of shape (D,), or None if the id is unknown."""
        ...

    def vectors(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the embeddings of several hits in the given order, as float32 arrays of shape (D,).

        Unknown ids are skipped.
        """
        ...

    def sample_ids(self, count: int) -> list[str]:
        """Return the hit ids of at most `count` distinct images, chosen at random. Equal indexes give equal samples."""
        ...

    def newest_ids(self, count: int) -> list[str]:
        """Return the hit ids of at most `count` distinct images with the latest capture times, newest first."""
        ...

    def save_calibration(self, data: bytes) -> None:
        """Store a serialized `search.relevance.Calibration`, or empty bytes if the index is to have none."""
        ...

    def load_calibration(self) -> bytes | None:
        """Return the data from `save_calibration`, or None if it has never been called."""
        ...

    def thumbnail(self, hit_id: str) -> bytes | None:
        """Return a hit's JPEG thumbnail, or None if the id is unknown."""
        ...

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        """Return at most MAX_LOCATIONS images with a hit's content, or an empty tuple if the id is unknown."""
        ...


def format_missing_index_message(folder: str | Path) -> str:
    """Return the error message for a folder that contains no index."""
    out = shlex.quote(str(folder))
    return f"{folder} is not an index. Create an index with: llm2clip index PHOTOS --model MODEL --out {out}"


class IndexUnavailableError(OSError):
    """An index cannot be read, because its server is down, or because its tables are corrupt or being replaced.

    Trying again later may help.
    """


def open_backend(location: str, write: bool = False, approximate_above: int | None = None) -> Backend:
    """Open the index in a local folder or at a URL of the form URL_FORM.

    Args:
        location: Local folder or URL.
        write: If True, open the index for writing, and create it if it does not exist.
        approximate_above: Minimum number of distinct images for approximate search. Default: 1,000,000 for a folder,
            100,000 for PostgreSQL.

    Raises:
        FileNotFoundError: `write` is False, and there is no index at the location.
        ImportError: A required package is not installed.
        ValueError: The URL is invalid, or a password or data would be sent unencrypted.
        IndexUnavailableError: The server does not respond.
    """
    name = get_backend_name(location)
    try:
        module = importlib.import_module(f"llm2clip.search.{name}_backend")
        backend: Backend = module.open_index(location, write, approximate_above)
        return backend
    except ModuleNotFoundError as error:
        command = install_command("search" if name == "sqlite" else name)
        raise ImportError(f"{hide_password(location)}: a package is missing; run `{command}` ({error})") from error


def get_backend_name(location: str) -> str:
    """Return the name of the backend for an index location. Raise ValueError if the URL scheme is unknown."""
    scheme, separator, _ = location.partition("://")
    if not separator:
        return "sqlite"
    if scheme not in BACKENDS:
        raise ValueError(
            f"{hide_password(location)}: unknown index backend {scheme!r}. An index is a local folder or a PostgreSQL "
            f"database. To build the index in PostgreSQL, run `llm2clip index` again with --out {URL_FORM}"
        )
    return BACKENDS[scheme]


def hide_password(location: str) -> str:
    """Return the location of an index without the password that a URL can contain, for messages."""
    location = re.sub(r"^([\w+]+://[^/?#:@]*):.*@", r"\1@", location)  # a password may contain @
    return re.sub(r"([?&](?:ssl)?password=)[^&#]*", r"\1***", location)


def parse_content_id(hit_id: str) -> int:
    """Convert a hit id to an integer content id. For invalid ids, return -1, which is never a content id."""
    return int(hit_id) if hit_id.isascii() and hit_id.isdigit() and len(hit_id) < 19 else -1
