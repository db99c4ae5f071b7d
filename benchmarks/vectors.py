"""Random unit vectors, and indexes that contain given vectors."""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import repeat

import numpy as np

from llm2clip.data.image_refs import FileImage
from llm2clip.search.backends import IndexBackend
from llm2clip.search.types import IndexedContent, IndexedImage

CHUNK = 10_000  # number of vectors per chunk


def vector_chunks(count: int, dim: int) -> Iterator[np.ndarray]:
    """Yield chunks of float32 unit vectors of shape (N, D) in a thousand clusters, similar to image embeddings."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((1000, dim), dtype=np.float32)
    for start in range(0, count, CHUNK):
        vectors = centres[rng.integers(1000, size=min(CHUNK, count - start))]
        vectors = vectors + 0.7 * rng.standard_normal(vectors.shape, dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield vectors.astype(np.float16).astype(np.float32)


def add_noise(vectors: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return float32 unit vectors that are near the given unit vectors of shape (N, D)."""
    noise = rng.standard_normal(vectors.shape, dtype=np.float32) / np.sqrt(vectors.shape[1])
    vectors = vectors + 0.5 * noise
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def initialize_index(backend: IndexBackend, dim: int) -> None:
    backend.initialize({"model": "none", "fingerprint": "none", "embed_dim": dim})


def add_images(
    backend: IndexBackend,
    names: Iterable[str],
    vectors: np.ndarray,
    captions: Iterable[tuple[str, ...]] | None = None,
    thumbnails: Iterable[bytes] | None = None,
) -> None:
    """Add images with the given paths, unit vectors of shape (N, D), captions and thumbnails to an index."""
    contents, images = [], []
    captions, thumbnails = captions or repeat(()), thumbnails or repeat(b"")
    for name, vector, texts, thumbnail in zip(names, vectors, captions, thumbnails, strict=False):
        digest = hashlib.sha256(name.encode()).digest()
        contents.append(IndexedContent(digest, vector.astype(np.float16), thumbnail, width=640, height=480))
        images.append((IndexedImage(name, FileImage(name), "/photos", "0 0", texts), digest))
    backend.add_images(contents, images)
