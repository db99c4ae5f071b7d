"""Re-ranking: a second, usually larger, model, called the re-ranking model, sorts the first hits of a search.

A dual encoder embeds the query and the original image files of the hits, and sorts the hits by their cosine similarity.
A vision-language model sorts them by the probability that they match the texts of the query (see `search.vlm`). The
embeddings, or probabilities, are cached in memory by the hash of the file, so only the first search has to decode it.
"""

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from llm2clip.data.image_refs import read_image_file
from llm2clip.data.images import ImageError, load_image
from llm2clip.search.backends import Backend, Hit, IndexUnavailableError
from llm2clip.search.query import SearchQuery, embed_query
from llm2clip.search.request_images import NotFound, TooLarge, open_original
from llm2clip.search.vlm import RerankModel, VisionLanguageModel, make_question

RERANKED = 50  # number of hits that are sorted again
IMAGES_PER_BATCH = 8  # limits the memory for decoded images
MAX_CACHED = 4096  # maximum number of cached results; embeddings of 1,024 dimensions take 16 MB


class PreparedImage(NamedTuple):
    """An image file: its key in the cache, and either the cached result or the input of the model."""

    key: bytes
    result: Any
    pixels: Any


class Reranking(NamedTuple):
    """Hits after re-ranking, the number of hits that could not be rated, and the duration in seconds."""

    hits: list[Hit]
    missing: int
    seconds: float


class RerankCache:
    """Cached results of a re-ranking model: image embeddings, or the probabilities of a vision-language model.

    `prepare` and `add` are thread-safe.
    """

    def __init__(self, model: RerankModel) -> None:
        self.model = model
        self._cache: OrderedDict[bytes, Any] = OrderedDict()  # the last item is the most recently used one
        self._lock = threading.Lock()

    def prepare(
        self, hit_id: str, question: str, read: Callable[[str], bytes], load: Callable[[bytes], Tensor]
    ) -> PreparedImage | None:
        """Read and decode the image file of a hit, unless the result for the file is cached.

        Return None if the file cannot be read or decoded, or has been changed or removed since it was indexed.

        Args:
            question: Question to a vision-language model. Empty for a dual encoder.
            read: Function that takes a hit id and returns the contents of the image file.
            load: Function that decodes an image file.

        Raises:
            IndexUnavailableError: The server that stores the index does not respond.
        """
        try:
            data = read(hit_id)
            key = hashlib.sha256(data).digest() + hashlib.sha256(question.encode()).digest()
            with self._lock:
                result = self._cache.get(key)
                if result is not None:
                    self._cache.move_to_end(key)
            pixels = self.model.transform(load(data)) if result is None else None
        except IndexUnavailableError:
            raise
        except (ImageError, NotFound, TooLarge, OSError):
            return None
        return PreparedImage(key, result, pixels)

    def add(self, key: bytes, result: Any) -> None:
        """Add a result to the cache, and remove the least recently used one if the cache is full."""
        with self._lock:
            self._cache[key] = result
            if len(self._cache) > MAX_CACHED:
                self._cache.popitem(last=False)


def rerank_hits(model: RerankModel, query: SearchQuery, hits: Sequence[Hit], backend: Backend) -> Reranking:
    """Sort the first RERANKED hits with a model, for a query without earlier hits.

    Args:
        hits: Hits, best first.
        backend: Index that returned the hits.
    """
    start = time.perf_counter()
    cache = RerankCache(model)
    question = make_question(query) if isinstance(model, VisionLanguageModel) else ""
    query_vector = None if isinstance(model, VisionLanguageModel) else embed_query(model, query)

    def read(hit_id: str) -> bytes:
        stream, _ = open_original(backend, hit_id)
        with stream:
            return read_image_file(stream)

    scores = {}
    for hit in hits[:RERANKED]:
        prepared = cache.prepare(hit.id, question, read, load_image)
        if prepared is None:
            continue
        if isinstance(model, VisionLanguageModel):
            score = float(model.rate([(prepared.pixels, question)])[0])
        else:
            score = float(model.encode_images([prepared.pixels])[0].numpy() @ query_vector)
        if math.isfinite(score):
            scores[hit.id] = score
    return sort_hits(hits, scores, start)


def sort_hits(hits: Sequence[Hit], scores: Mapping[str, float], start: float) -> Reranking:
    """Sort the first RERANKED hits by score, highest first. The other hits stay in their order.

    Args:
        scores: Scores of hits, keyed by hit id. Those of the first RERANKED hits that have no score
            follow the sorted ones, in their order.
        start: Value of `time.perf_counter` at which re-ranking started.
    """
    first = hits[:RERANKED]
    rated = sorted((hit for hit in first if hit.id in scores), key=lambda hit: -scores[hit.id])
    missing = [hit for hit in first if hit.id not in scores]
    return Reranking([*rated, *missing, *hits[RERANKED:]], len(missing), time.perf_counter() - start)
