"""Interface of index backends, and a function that opens an index.

An index is stored either in a local folder (SQLite) or in a Qdrant collection.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm2clip.extras import install_command
from llm2clip.search.types import Filter, Hit, ImageState, IndexedContent, IndexedImage

QDRANT_PREFIX = "qdrant+"
FORMAT_VERSION = 1  # of indexes
NEW_INDEX_ADVICE = "Build a new index with `llm2clip index`, with another --out"


class Backend(Protocol):
    """Interface of an index, which stores images and searches them by embedding."""

    def lock(self) -> AbstractContextManager[None]:
        """Return a context manager that prevents other runs from writing to the index. With Qdrant, it does nothing.

        On entry, the context manager raises a FolderInUseError if another run holds the lock.
        """
        ...

    def metadata(self) -> dict[str, Any]:
        """Return the metadata of the index, or an empty dict if `initialize` has not been called.

        The keys are `model` (name of the model), `fingerprint` (of the model) and `embed_dim`.
        """
        ...

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        """Store the metadata, and prepare the backend for adding images."""
        ...

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        """Return the state of each indexed image of the given sources, keyed by image name.

        This includes images that were read from another source if their path is inside one of the given sources.
        """
        ...

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return the given content hashes that are already in the index."""
        ...

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add image contents and images, replacing existing images with the same names.

        Each image is paired with its content hash. With SQLite, everything is added in one transaction. Qdrant does not
        support transactions.
        """
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove images by name, and then all contents that no longer belong to an image."""
        ...

    def finish(self) -> None:
        """Complete an indexing run. Call this after all images have been added and removed."""
        ...

    def count(self) -> tuple[int, int]:
        """Return the total number of images and the number of distinct images."""
        ...

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        """Return groups of names of images with identical content.

        At most `limit` groups are returned, largest first.
        """
        ...

    def search(self, vector: np.ndarray | None, count: int, image_filter: Filter, offset: int = 0) -> list[Hit]:
        """Return the images that meet a filter, nearest to a vector first.

        Without a vector, the newest images are returned first, by the latest time at which one of the image's files
        that meet the filter was taken. With SQLite, images of the same time are ordered by id.

        Args:
            vector: L2-normalised query vector of shape (D,), float32, or None.
            count: Maximum number of hits.
            image_filter: Conditions that every hit must meet.
            offset: Number of hits to skip.
        """
        ...

    def count_matches(self, image_filter: Filter) -> int:
        """Return the number of distinct images that meet a filter."""
        ...

    def vector(self, hit_id: str) -> np.ndarray | None:
        """Return the embedding of a hit, of shape (D,), float32, or None if the id is unknown."""
        ...

    def thumbnail(self, hit_id: str) -> bytes | None:
        """Return the JPEG thumbnail of a hit, or None if the id is unknown."""
        ...

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        """Return at most MAX_LOCATIONS images with a hit's content, or an empty tuple if the id is unknown."""
        ...


def missing_index_message(folder: str | Path) -> str:
    """Return the error message for a folder without an index."""
    out = shlex.quote(str(folder))
    return f"{folder} is not an index; create one with: llm2clip index PHOTOS --model MODEL --out {out}"


def open_backend(location: str, write: bool = False, **options: int) -> Backend:
    """Open the index in a local folder or at `qdrant+http://HOST:6333/COLLECTION`.

    Args:
        location: Path of a local folder, or URL of a Qdrant collection.
        write: If True, open the index for writing, and create it if it does not exist.
        options: Additional arguments for `SqliteBackend`. Ignored for Qdrant.

    Raises:
        FileNotFoundError: `write` is False, and there is no index at the location.
        ImportError: A required package is not installed.
        ValueError: The URL is not a valid Qdrant location, or the API key would be sent without encryption.
    """
    is_qdrant = location.startswith(QDRANT_PREFIX)
    if "://" in location and not is_qdrant:
        raise ValueError(
            f"{location}: the URL of a remote index must have the form {QDRANT_PREFIX}http://HOST:6333/COLLECTION"
        )
    try:
        if is_qdrant:
            from llm2clip.search.qdrant_backend import QdrantBackend

            return QdrantBackend.from_url(location.removeprefix(QDRANT_PREFIX), write)
        from llm2clip.search.sqlite_backend import SqliteBackend

        return SqliteBackend(Path(location), write, **options)
    except ModuleNotFoundError as error:
        extra = "qdrant" if is_qdrant else "search"
        raise ImportError(f"{location}: a package is missing; run `{install_command(extra)}` ({error})") from error
