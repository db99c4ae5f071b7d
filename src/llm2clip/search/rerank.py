"""Re-ranking: a second, usually larger, dual encoder, called the re-ranking model, sorts the first hits of a search.

It embeds the query and the original image files of the hits, and sorts the hits by their cosine similarity. The
embeddings are cached in memory by the hash of the file, so only the first search has to decode it.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm2clip.data.images import ImageError
from llm2clip.search.backends import IndexUnavailableError
from llm2clip.search.originals import NotFound, TooLarge
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.types import Hit

RERANKED = 50  # number of hits that are sorted again
IMAGES_PER_BATCH = 8  # limits the memory for decoded images
MAX_CACHED = 4096  # maximum number of cached embeddings; those of 1,024 dimensions take 16 MB


class Reranking(NamedTuple):
    """Hits after re-ranking, the number of hits that could not be rated, and the duration in seconds."""

    hits: list[Hit]
    missing: int
    seconds: float


class _PreparedImage(NamedTuple):
    """An image file: its key in the cache, and either the cached embedding or the input of the model."""

    key: bytes
    vector: np.ndarray | None
    pixels: Any


class Reranker:
    """A re-ranking model and its cached image embeddings. Thread-safe if the model is."""

    def __init__(self, encoder: QueryEncoder, read: Callable[[str], bytes]) -> None:
        """
        Args:
            read: Function that takes a hit id and returns the contents of the image file.
        """
        self.encoder, self._read = encoder, read
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()  # the last item is the most recently used one
        self._lock = threading.Lock()

    def sort(self, query: SearchQuery, hits: Sequence[Hit]) -> Reranking:
        """Sort the first RERANKED hits by their similarity to a query.

        Args:
            hits: Hits, best first.

        Raises:
            NotFound: The query contains a hit whose image file cannot be decoded.
        """
        start = time.perf_counter()
        query_vector = self._embed_query(query)
        vectors = self._embed_files([hit.id for hit in hits[:RERANKED]])
        scores = {hit_id: float(query_vector @ vector) for hit_id, vector in vectors.items()}
        ranking, missing = sort_hits(hits, scores)
        return Reranking(ranking, missing, time.perf_counter() - start)

    def _embed_query(self, query: SearchQuery) -> np.ndarray:
        """Return the query vector. The model embeds the image files of earlier hits."""
        like = [*query.like, *query.negative_like]
        vectors = self._embed_files(like)
        for hit_id in like:
            if hit_id not in vectors:
                raise NotFound(
                    f"re-ranking needs the image file of hit {hit_id}, which is part of the query, but the file cannot "
                    "be decoded, or has been changed or removed since it was indexed"
                )
        return self.encoder.embed(query, [vectors[hit_id] for hit_id in like]).combined

    def _embed_files(self, hit_ids: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the embeddings of the image files of hits, without those that cannot be decoded or embedded."""
        vectors: dict[str, np.ndarray] = {}
        for start in range(0, len(hit_ids), IMAGES_PER_BATCH):
            images: dict[str, _PreparedImage] = {}
            for hit_id in hit_ids[start : start + IMAGES_PER_BATCH]:
                image = self._prepare(hit_id)
                if image is not None and image.vector is not None:
                    vectors[hit_id] = image.vector
                elif image is not None:
                    images[hit_id] = image
            if not images:
                continue
            embeddings = self.encoder.model.encode_images([image.pixels for image in images.values()]).numpy()
            for (hit_id, image), vector in zip(images.items(), embeddings, strict=True):
                if np.isfinite(vector).all():
                    self._add(image.key, vector)
                    vectors[hit_id] = vector
        return vectors

    def _prepare(self, hit_id: str) -> _PreparedImage | None:
        """Read and decode the image file of a hit, unless its embedding is cached.

        Return None if the file cannot be read or decoded, or has been changed or removed since it was indexed.
        """
        try:
            with self.encoder.decoding:
                data = self._read(hit_id)
                key = hashlib.sha256(data).digest()
                with self._lock:
                    vector = self._cache.get(key)
                    if vector is not None:
                        self._cache.move_to_end(key)
                pixels = self.encoder.model.transform(self.encoder.load(data)) if vector is None else None
        except (IndexUnavailableError, TimeoutError):
            raise
        except (ImageError, NotFound, TooLarge, OSError):
            return None
        return _PreparedImage(key, vector, pixels)

    def _add(self, key: bytes, vector: np.ndarray) -> None:
        """Add an embedding to the cache, and remove the least recently used one if the cache is full."""
        with self._lock:
            self._cache[key] = vector
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)


def sort_hits(hits: Sequence[Hit], scores: Mapping[str, float]) -> tuple[list[Hit], int]:
    """Sort the first RERANKED hits by score, highest first. The other hits stay in their order.

    Args:
        scores: Scores of hits, keyed by hit id. The first RERANKED hits without a score follow the sorted ones.

    Returns:
        The hits, and the number of the first RERANKED hits that have no score.
    """
    first = hits[:RERANKED]
    rated = sorted((hit for hit in first if hit.id in scores), key=lambda hit: -scores[hit.id])
    missing = [hit for hit in first if hit.id not in scores]
    return [*rated, *missing, *hits[RERANKED:]], len(missing)
