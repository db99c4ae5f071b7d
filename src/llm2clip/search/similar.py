"""Groups of similar hits: bursts and edited copies of a photograph are shown as one hit.

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
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from llm2clip.search.backends import Backend
from llm2clip.search.exif import has_exif_time
from llm2clip.search.relevance import Calibration
from llm2clip.search.types import Hit, SimilarHit

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
