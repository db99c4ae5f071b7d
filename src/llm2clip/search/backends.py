"""Index interface, and a function that opens an index in a local folder (SQLite) or a Qdrant collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm2clip.search.types import Filter, Hit, ImageState, IndexedContent, IndexedImage

QDRANT_PREFIX = "qdrant+"


class Backend(Protocol):
    """Interface for storing images and searching them by embedding."""

    def metadata(self) -> dict[str, Any]:
        """Return the metadata: `model` (name), `fingerprint` (of the model), and `width` (embedding dimension).

        The dict is empty before `initialize` is called.
        """
        ...

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        """Store the metadata, and set up the backend so that images can be added."""
        ...

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        """Return the states of all images that were read from one of the sources or are inside one, keyed by name."""
        ...

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return the hashes of images whose content is already in the index."""
        ...

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add new contents and images, each image paired with its content hash. Replace images with the same name.

        SQLite adds everything in one transaction; Qdrant has no transactions.
        """
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove images by name, and then any content that no longer belongs to an image."""
        ...

    def finish(self) -> None:
        """Finish an indexing run after all images have been added and removed."""
        ...

    def count(self) -> tuple[int, int]:
        """Return the total number of images and the number of distinct images."""
        ...

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        """Return groups of image names, one group per set of identical files, with the largest group first."""
        ...

    def search(self, vector: np.ndarray, count: int, image_filter: Filter) -> list[Hit]:
        """Return the hits nearest to a vector (float32 (D,), L2-normalised), best first."""
        ...

    def vector(self, hit_id: str) -> np.ndarray | None:
        """Return the embedding of a hit, float32 (D,), or None if the id is unknown."""
        ...

    def thumbnail(self, hit_id: str) -> bytes | None:
        """Return the JPEG thumbnail of a hit, or None if the id is unknown."""
        ...

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        """Return all images of a hit, or an empty tuple if the id is unknown."""
        ...


def open_backend(location: str, write: bool = False, **options: int) -> Backend:
    """Open the index in a local folder or at `qdrant+http://HOST:6333/COLLECTION`.

    Args:
        location: Path of a local folder, or URL of a Qdrant collection.
        write: Open the index for writing, and create it if it does not exist.
        options: Additional arguments for `SqliteBackend`.

    Raises:
        FileNotFoundError: There is no index at the location, and `write` is False.
        ImportError: A required package is not installed.
        ValueError: The URL is not a valid Qdrant location.
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
        raise ImportError(
            f"{location}: a package is missing; run `pip install 'llm2clip[{extra}]'` ({error})"
        ) from error
