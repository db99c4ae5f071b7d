"""The interface of an index, and the function that opens one: a local folder (SQLite) or a Qdrant collection."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm2clip.search.types import Filter, Hit, ImageState, IndexedContent, IndexedImage

QDRANT_PREFIX = "qdrant+"


class Backend(Protocol):
    """Storage and nearest-neighbour search of indexed images."""

    def metadata(self) -> dict[str, Any]:
        """Return the `model` of the index, its `fingerprint`, and the dimension of its vectors, `width`.

        Empty before `initialize`.
        """
        ...

    def initialize(self, metadata: Mapping[str, Any]) -> None:
        """Store the metadata, and create whatever the backend needs before images are added."""
        ...

    def indexed(self, sources: Sequence[str]) -> dict[str, ImageState]:
        """Return the state, by name, of each image that was read from one of these sources or is inside one."""
        ...

    def existing(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Return the hashes whose content is already in the index."""
        ...

    def add(self, contents: Sequence[IndexedContent], images: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add contents, and images with the hash of their content. An image of the same name is replaced.

        SQLite adds all of them or none; Qdrant has no transactions.
        """
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove images by name, and contents that no longer have an image."""
        ...

    def finish(self) -> None:
        """Complete an indexing run, after all images were added and removed."""
        ...

    def count(self) -> tuple[int, int]:
        """Return the number of images and the number of distinct contents."""
        ...

    def duplicates(self, limit: int = 10) -> list[list[str]]:
        """Return groups of names of images with identical bytes, largest group first."""
        ...

    def search(self, vector: np.ndarray, count: int, image_filter: Filter) -> list[Hit]:
        """Return the contents nearest to a vector, best first. vector: float32 (D,), L2-normalised."""
        ...

    def vector(self, hit_id: str) -> np.ndarray | None:
        """Return the vector of a hit, float32 (D,), or None if the id is unknown."""
        ...

    def thumbnail(self, hit_id: str) -> bytes | None:
        """Return the JPEG thumbnail of a hit, or None if the id is unknown."""
        ...

    def images(self, hit_id: str) -> tuple[IndexedImage, ...]:
        """Return all images of a hit; empty if the id is unknown."""
        ...


def open_backend(location: str, write: bool = False, **options: int) -> Backend:
    """Open the index at a local folder or at `qdrant+http://HOST:6333/COLLECTION`.

    Args:
        location: Folder or URL.
        write: Create the index if it does not exist.
        options: Further arguments of `SqliteBackend`.

    Raises:
        FileNotFoundError: There is no index at the location.
        ImportError: A required package is not installed.
        ValueError: The URL has another form.
    """
    is_qdrant = location.startswith(QDRANT_PREFIX)
    if "://" in location and not is_qdrant:
        raise ValueError(f"{location}: a remote index must be given as {QDRANT_PREFIX}http://HOST:6333/COLLECTION")
    try:
        if is_qdrant:
            from llm2clip.search.qdrant_backend import QdrantBackend

            return QdrantBackend.from_url(location.removeprefix(QDRANT_PREFIX), write)
        from llm2clip.search.sqlite_backend import SqliteBackend

        return SqliteBackend(Path(location), write, **options)
    except ModuleNotFoundError as error:
        extra = "qdrant" if is_qdrant else "search"
        raise ImportError(f"{location}: this index needs `pip install 'llm2clip[{extra}]'` ({error})") from error
