"""What an index holds and answers with: pictures, what is in their files, and hits. Every engine speaks of these."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from llm2clip.data.image_refs import DatasetImage, FileImage, ImageRef, ParquetImage, TarImage, printable

PLACES: dict[str, type[ImageRef]] = {kind.__name__: kind for kind in (FileImage, TarImage, ParquetImage, DatasetImage)}


@dataclass(frozen=True)
class IndexedImage:
    """One picture where it lies.

    Args:
        name: its path, `tar!member` or `file[row].column`; unique in an index.
        place: how its bytes are found.
        source: the source that it was read from, an absolute path.
        stamp: changes with the file.
        captions: its texts, if it has any.
        taken: when, in seconds since 1970: by its EXIF, else the file's change.
    """

    name: str
    place: ImageRef
    source: str
    stamp: str
    captions: tuple[str, ...] = ()
    taken: float = 0.0


def container_path(name: str, place: ImageRef) -> str:
    """What in a picture's name is the file that holds it; all of it where it is a file of its own."""
    if isinstance(place, FileImage):
        return name
    if isinstance(place, TarImage):
        name = name.removesuffix(f"@{place.offset}")  # of the second of one name
    return name.removesuffix(printable(str(place)[len(place.container_path or "") :]))


@dataclass(frozen=True)
class IndexedContent:
    """What is in a file; pictures with the same bytes share it.

    Args:
        hash: SHA-256 of the bytes.
        vector: float16 (D,), L2-normalised.
        thumbnail: JPEG, at most 256 pixels a side.
        width, height: of the picture, upright, in pixels.
    """

    hash: bytes
    vector: np.ndarray
    thumbnail: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Hit:
    """One answer: where the same picture lies, in all its copies, and the cosine."""

    id: str
    score: float
    pictures: tuple[IndexedImage, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Filter:
    """Which pictures may be found; a field that is None asks for nothing.

    Args:
        under: folder, tar or file that they lie in.
        caption: words that one of their captions must contain, in this order, whatever their case.
        after: taken then or later, seconds since 1970.
        before: taken then or earlier.
        larger: pixels of the shorter side, at least.
    """

    under: str | None = None
    caption: str | None = None
    after: float | None = None
    before: float | None = None
    larger: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())


class Backend(Protocol):
    """Where pictures are kept and found: a folder here, or a vector engine elsewhere."""

    def about(self) -> dict[str, Any]:
        """What made the index: `model`, `fingerprint`, `width`; empty before `begin`."""
        ...

    def begin(self, about: Mapping[str, Any]) -> None:
        """Say what makes the index."""
        ...

    def known(self, sources: Sequence[str]) -> dict[str, tuple[str, tuple[str, ...]]]:
        """Stamp and captions by name, of the pictures that came from some sources or lie under them."""
        ...

    def have(self, hashes: Iterable[bytes]) -> set[bytes]:
        """Those contents that are in the index already."""
        ...

    def put(self, contents: Sequence[IndexedContent], pictures: Sequence[tuple[IndexedImage, bytes]]) -> None:
        """Add contents, and pictures with the hash of theirs, all or none (in Qdrant, one by one); one of the same name
        is replaced."""
        ...

    def forget(self, names: Sequence[str]) -> None:
        """Drop pictures, and contents that no picture has any more."""
        ...

    def finish(self) -> None:
        """All pictures of a run are in."""
        ...

    def count(self) -> tuple[int, int]:
        """Pictures, and different contents."""
        ...

    def copies(self, limit: int = 10) -> list[list[str]]:
        """Names of pictures whose bytes are the same, the largest groups first."""
        ...

    def search(self, vector: np.ndarray, count: int, only: Filter) -> list[Hit]:
        """The contents closest to a vector, float32 (D,), L2-normalised; the best first."""
        ...

    def vector(self, hit: str) -> np.ndarray | None:
        """The vector of a hit by its id, float32 (D,); None where there is none."""
        ...

    def thumbnail(self, hit: str) -> bytes | None:
        """The JPEG of a hit; None where there is none."""
        ...

    def pictures(self, hit: str) -> tuple[IndexedImage, ...]:
        """The pictures of a hit."""
        ...


def ref_to_json(place: ImageRef) -> str:
    """A reference as text."""
    return json.dumps([type(place).__name__, asdict(place)])  # type: ignore[call-overload]


def ref_from_json(text: str) -> ImageRef:
    """The reference that `place_to_json` wrote.

    Raises:
        ValueError: it is none.
    """
    kind, fields = json.loads(text)
    if kind not in PLACES:
        raise ValueError(f"{kind} is no place of pictures")
    return PLACES[kind](**fields)
