"""What happens to the hits of a search before they are shown: re-ranking, and groups of similar hits.

Re-ranking: a second, usually larger, dual encoder, called the re-ranking model, sorts the first hits of a search.

It embeds the query and the original image files of the hits, and sorts the hits by their cosine similarity. The
embeddings are cached in memory by the hash of the file, so only the first search has to decode it.

Groups of similar hits: bursts and edited copies of a photograph are shown as one hit.

Two images are similar if one of these conditions holds:

    edited copies   the cosine similarity of their embeddings is at least COPY_SIMILARITY
    bursts          it is at least BURST_SIMILARITY, and they were taken within BURST_SECONDS of each other

The mean embedding of the index, which its calibration contains, is subtracted first, because in some models all
embeddings are similar. In an index without a calibration, the cosine similarity must therefore be higher.

Only EXIF times count for bursts, because files that were copied together have nearly equal modification times.
`benchmarks/similar.py` measures how many edited copies and how many different photographs each similarity includes.

Pages: a page is a range of consecutive ungrouped hits, and only the hits of this range are grouped. A later page
therefore starts where the last one ends (`next_offset`), and each hit is in exactly one group of one page. No page has
to read the hits of earlier pages, so a hit may be similar to one on an earlier page. Searches read READ_FACTOR times
as many hits as a page has. If many of them are similar to each other, the page has fewer hits than requested.
"""

import dataclasses
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm2clip.data.images import ImageError
from llm2clip.search.backends import Backend, IndexUnavailableError
from llm2clip.search.exif import has_exif_time
from llm2clip.search.images import NotFound, TooLarge
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.relevance import Calibration
from llm2clip.search.types import Hit, SimilarHit

# ---- re-ranking

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


# ---- similar hits

COPY_SIMILARITY, BURST_SIMILARITY = 0.85, 0.7
UNCENTRED_COPY_SIMILARITY, UNCENTRED_BURST_SIMILARITY = 0.95, 0.85  # without a calibration
BURST_SECONDS = 10.0  # EXIF times are in whole seconds
READ_FACTOR = 2
MAX_COMPARED = 2000  # later hits of a page are not grouped, because memory grows with the square of this number


class HitPage(NamedTuple):
    """Hits of a page, and the number of ungrouped hits that they represent."""

    hits: list[Hit]
    size: int


def group_similar_hits(
    hits: Sequence[Hit], backend: Backend, count: int, calibration: Calibration | None = None
) -> HitPage:
    """Add each hit to the `similar` hits of the first better hit to which it is similar.

    Grouped hits are not compared with later hits, so all hits of a group are similar to its first hit.

    Args:
        hits: Hits, best first.
        backend: Index that returned the hits.
        count: Maximum number of groups. The page ends before the first hit that would need another group.
        calibration: Calibration of the index, if it has one.
    """
    mean = None if calibration is None else calibration.sample_mean
    is_similar = compare_hits(hits[:MAX_COMPARED], backend, mean)
    groups: dict[int, list[Hit]] = {}  # similar hits, keyed by the position of the first hit
    size = 0
    for position, hit in enumerate(hits):
        first = None
        if position < len(is_similar):
            first = next((other for other in groups if is_similar[other, position]), None)
        if first is not None:
            groups[first].append(hit)
        elif len(groups) < count:
            groups[position] = []
        else:
            break
        size += 1
    page = []
    for position, others in groups.items():
        similar = tuple(SimilarHit(other.id, other.images[0].name, other.images[0].file_name) for other in others)
        page.append(dataclasses.replace(hits[position], similar=similar))
    return HitPage(page, size)


def compare_hits(hits: Sequence[Hit], backend: Backend, mean: np.ndarray | None) -> np.ndarray:
    """Return a boolean array of shape (N, N) that is True for pairs of similar hits.

    Hits that another process has just removed from the index are similar to no other hit.

    Args:
        mean: Mean embedding of the index, of shape (D,), or None if it is unknown.
    """
    vectors = backend.vectors([hit.id for hit in hits])
    if not vectors:
        return np.zeros((len(hits), len(hits)), bool)
    centre = np.zeros_like(next(iter(vectors.values()))) if mean is None else mean
    matrix = np.stack([vectors.get(hit.id, centre) - centre for hit in hits])  # removed hits have zero vectors
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-6)
    cosines = matrix @ matrix.T
    times = np.array([find_capture_time(hit) for hit in hits], np.float64)  # None becomes NaN
    is_burst = np.abs(times[:, None] - times) <= BURST_SECONDS  # False for NaN
    if mean is None:
        return (cosines >= UNCENTRED_COPY_SIMILARITY) | ((cosines >= UNCENTRED_BURST_SIMILARITY) & is_burst)
    return (cosines >= COPY_SIMILARITY) | ((cosines >= BURST_SIMILARITY) & is_burst)


def find_capture_time(hit: Hit) -> float | None:
    """Return the EXIF time of a hit's first image that has one, as a Unix timestamp."""
    return next((image.taken for image in hit.images if has_exif_time(image)), None)
