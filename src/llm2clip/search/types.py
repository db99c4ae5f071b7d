"""Data types shared by all index backends: images, image contents, search hits and filters."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from llm2clip.data.image_refs import DatasetImage, FileImage, ImageRef, ParquetImage, TarImage, printable

# The keys are stored in every index: when a class is renamed, its key must not change.
REF_TYPES: dict[str, type[ImageRef]] = {
    "FileImage": FileImage,
    "TarImage": TarImage,
    "ParquetImage": ParquetImage,
    "DatasetImage": DatasetImage,
}


@dataclass(frozen=True)
class IndexedImage:
    """An image at a specific location.

    Args:
        name: Canonical path: `FILE`, `TAR!MEMBER` or `TABLE[ROW].COLUMN`. Unique within an index.
        ref: Reference to the image's bytes.
        source: Absolute path of the source that the image was read from.
        stamp: Size and modification time of the file, used to detect changes.
        captions: Captions, if the source has any.
        taken: Time at which the photo was taken (from EXIF) or, without EXIF, the file's modification time. In seconds
            since 1970.
    """

    name: str
    ref: ImageRef
    source: str
    stamp: str
    captions: tuple[str, ...] = ()
    taken: float = 0.0

    @property
    def container(self) -> str:
        """Path of the file that contains the image: the image file itself, a tar or a table."""
        if isinstance(self.ref, FileImage):
            return self.name
        name = self.name
        if isinstance(self.ref, TarImage):
            name = name.removesuffix(f"@{self.ref.offset}")  # appended when a tar has two members with the same name
        path_length = len(self.ref.container_path or "")
        return name.removesuffix(printable(str(self.ref)[path_length:]))


class ImageState(NamedTuple):
    """State of an indexed image, compared to decide whether the image has changed."""

    stamp: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class IndexedContent:
    """Content of an image file, stored once for all images with identical bytes.

    Args:
        hash: SHA-256 of the encoded bytes.
        vector: Embedding, float16 (D,), L2-normalised.
        thumbnail: JPEG of at most 256 pixels per side.
        width: Width of the upright image in pixels.
        height: Height of the upright image in pixels.
    """

    hash: bytes
    vector: np.ndarray
    thumbnail: bytes
    width: int
    height: int


@dataclass(frozen=True)
class Hit:
    """A search result.

    Args:
        id: Identifier of the image content within its index.
        score: Cosine similarity to the query.
        images: All images with this content.
        width: Width of the upright image in pixels.
        height: Height of the upright image in pixels.
    """

    id: str
    score: float
    images: tuple[IndexedImage, ...]
    width: int
    height: int


@dataclass(frozen=True)
class Filter:
    """Conditions that search results must meet. None means no condition.

    Args:
        path: Folder, tar or file that contains the image.
        caption: Text that at least one caption must contain, ignoring case.
        after: Earliest time taken, in seconds since 1970.
        before: Latest time taken, in seconds since 1970.
        min_side: Minimum length of the shorter side, in pixels.
    """

    path: str | None = None
    caption: str | None = None
    after: float | None = None
    before: float | None = None
    min_side: int | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in asdict(self).values())


def ref_to_json(ref: ImageRef) -> str:
    """Serialize an image reference."""
    return json.dumps([type(ref).__name__, asdict(ref)])  # type: ignore[call-overload]


def ref_from_json(text: str) -> ImageRef:
    """Deserialize an image reference written by `ref_to_json`.

    Raises:
        ValueError: The type of the reference is unknown.
    """
    name, fields = json.loads(text)
    if name not in REF_TYPES:
        raise ValueError(f"unknown image reference type: {name}")
    return REF_TYPES[name](**fields)
