"""Re-ranking: the first hits of a search are sorted by the cosine similarity of a second, usually larger, model.

The second model embeds the query and the original image files of the hits. Its image embeddings are cached in memory by
the hash of the file, so only the first search that finds an image has to decode and embed it.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from llm2clip.data.image_refs import read_image_file
from llm2clip.data.images import ImageError, load_image
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.backends import Backend, Hit, IndexUnavailableError
from llm2clip.search.query import SearchQuery, embed_query
from llm2clip.search.request_images import NotFound, TooLarge, open_original

RERANKED = 50  # number of hits that are sorted again
IMAGES_PER_BATCH = 8  # limits the memory for decoded images
MAX_CACHED = 4096  # maximum number of cached embeddings, which take 16 MB with 1,024 dimensions


class PreparedImage(NamedTuple):
    """An image file: its SHA-256 hash, and either its cached embedding or the input of the image encoder."""

    digest: bytes
    vector: np.ndarray | None
    pixels: Any


class Reranking(NamedTuple):
    """Hits after re-ranking, the number of hits that could not be rated, and the duration in seconds."""

    hits: list[Hit]
    missing: int
    seconds: float


class Reranker:
    """A dual encoder with a cache of image embeddings. `prepare` and `add` are thread-safe."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self._cache: OrderedDict[bytes, np.ndarray] = OrderedDict()  # the last item is the most recently used one
        self._lock = threading.Lock()

    def prepare(
        self, hit_id: str, read: Callable[[str], bytes], load: Callable[[bytes], Tensor]
    ) -> PreparedImage | None:
        """Read and decode the image file of a hit, unless the embedding of the file is cached.

        Return None if the file cannot be read or decoded, or has been changed or removed since it was indexed.

        Args:
            read: Function that takes a hit id and returns the contents of the image file.
            load: Function that decodes an image file.

        Raises:
            IndexUnavailableError: The server that stores the index does not respond.
        """
        try:
            data = read(hit_id)
            digest = hashlib.sha256(data).digest()
            with self._lock:
                vector = self._cache.get(digest)
                if vector is not None:
                    self._cache.move_to_end(digest)
            pixels = self.model.transform(load(data)) if vector is None else None
        except IndexUnavailableError:
            raise
        except (ImageError, NotFound, TooLarge, OSError):
            return None
        return PreparedImage(digest, vector, pixels)

    def add(self, digest: bytes, vector: np.ndarray) -> None:
        """Add the embedding of an image file to the cache, and remove the least recently used one if it is full."""
        with self._lock:
            self._cache[digest] = vector
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)


def rerank_hits(model: DualEncoder, query: SearchQuery, hits: Sequence[Hit], backend: Backend) -> Reranking:
    """Sort the first RERANKED hits by their similarity to a query without earlier hits, both embedded by a model.

    Args:
        hits: Hits, best first.
        backend: Index that returned the hits.
    """
    start = time.perf_counter()
    reranker = Reranker(model)
    query_vector = embed_query(model, query)

    def read(hit_id: str) -> bytes:
        stream, _ = open_original(backend, hit_id)
        with stream:
            return read_image_file(stream)

    scores = {}
    for hit in hits[:RERANKED]:
        prepared = reranker.prepare(hit.id, read, load_image)
        if prepared is not None:
            vector = model.encode_images([prepared.pixels])[0].numpy()
            if np.isfinite(vector).all():
                scores[hit.id] = float(vector @ query_vector)
    return sort_hits(hits, scores, start)


def sort_hits(hits: Sequence[Hit], scores: Mapping[str, float], start: float) -> Reranking:
    """Sort the first RERANKED hits by score, highest first. The other hits stay in their order.

    Args:
        scores: Similarities of hits to the query, keyed by hit id. Those of the first RERANKED hits that have no score
            follow the sorted ones, in their order.
        start: Value of `time.perf_counter` at which re-ranking started.
    """
    first = hits[:RERANKED]
    rated = sorted((hit for hit in first if hit.id in scores), key=lambda hit: -scores[hit.id])
    missing = [hit for hit in first if hit.id not in scores]
    return Reranking([*rated, *missing, *hits[RERANKED:]], len(missing), time.perf_counter() - start)
