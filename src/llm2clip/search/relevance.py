"""Relevance of search results: the estimated probability that an image is an answer to the query.

Cosine similarities alone do not show whether an index contains an answer, because their level depends on the model, the
query and the image. The cosine similarity s of a hit is therefore compared with the hubness of its image: the largest
cosine similarity between the image and about 300 short texts (`background_queries.txt`).

    t = s - 0.25 * hubness
    x = (t - m) / d + 8 * overlap       m, d: mean and standard deviation of t for queries without an answer
    relevance = 1 / (1 + exp(-a * x - b))

The overlap is the weighted fraction of the query's words, truncated to five letters, that occur in the first five
captions of the image. The weight of a word is its truncated length minus 2, at least 0. In scripts without spaces
between words, each character is a word of weight 1. A filter does not change the relevance of a hit.

`calibrate` measures m and d with searches in the entire index, so they grow with the number of images, as the largest
similarity of a query does. Text queries and image queries have separate parameters:

    texts     m and d are measured with the background queries. a = 1.2 and b = -0.6, chosen on photographs.
    captions  for hits with captions, m and d as for texts. a and b are fitted with captions as queries (Platt scaling).
              The query's own caption is excluded from the overlap. Queries without an answer are captions whose image
              is excluded, and the background queries. If fewer than 30 images have two captions, a = 0.6, b = -1.3.
    images    m and d are measured with sampled images of the index as queries, excluding each image and its near
              duplicates. a = 1.2 and b = 1.1, so images that are as similar as a typical nearest neighbour are close.

The value of a query is the largest t of its top 10 hits. A query has an answer if at least one of these hits has a
relevance of at least 0.2.
"""

from __future__ import annotations

import dataclasses
import io
import json
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from llm2clip.io_utils import UNSPACED
from llm2clip.models.prompts import average_prompts
from llm2clip.search.backends import Backend
from llm2clip.search.metadata import Filter, normalize
from llm2clip.search.query import QueryVectors, SearchQuery, combine_embeddings
from llm2clip.search.types import Hit, IndexedImage

if TYPE_CHECKING:
    from llm2clip.models.dual_encoder import DualEncoder

BACKGROUND_QUERIES = Path(__file__).with_name("background_queries.txt").read_text(encoding="utf-8").splitlines()
SCALES = ("texts", "images", "captions")
VERSION = 3  # of the calibration format; `llm2clip index` replaces data of other versions
SAMPLE_SIZE = 2048  # number of images for estimating the mean embedding
HUBNESS_WEIGHT = 0.25
OVERLAP_WEIGHT = 8.0
MAX_CAPTIONS, MAX_CAPTION_LENGTH = 5, 500  # number of captions per hit, and their length in characters
STEM_LENGTH = 5  # number of letters to which words are truncated, so that most inflected forms match
VOICING_MARKS = "\u3099\u309a"
CLOSEST = 10  # number of top hits that determine whether a query has an answer
MIN_RELEVANCE = 0.2  # low, because hiding an answer is worse than showing irrelevant images
TEXT_SLOPE, TEXT_INTERCEPT = 1.2, -0.6
CAPTION_SLOPE, CAPTION_INTERCEPT = 0.6, -1.3
IMAGE_SLOPE, IMAGE_INTERCEPT = 1.2, 1.1
MIN_IMAGES = 50  # smaller indexes are not calibrated, because all their images fit on a page
MIN_QUERIES = 30  # minimum number of queries for estimating a distribution
MAX_QUERIES = 256  # maximum number of captions, and of images, that calibration uses as queries
NEIGHBOURS = 32  # number of hits to read if the query's own image and its near duplicates will be excluded
NEAR_DUPLICATE = 0.9  # minimum cosine similarity of near duplicates, after subtracting the mean embedding
MAX_CHANGED_FRACTION = 0.1  # recalibrate if a larger fraction of the index has changed


@dataclass(frozen=True)
class Scale:
    """Parameters that convert t to a relevance, for one kind of query or hit. Symbols as in the module docstring."""

    mean: float  # m
    deviation: float  # d
    slope: float  # a
    intercept: float  # b

    def standardize(self, values: np.ndarray, overlaps: np.ndarray | float = 0.0) -> np.ndarray:
        """Convert values of t, and overlaps between the query and the captions, to values of x."""
        standardized: np.ndarray = (values - self.mean) / self.deviation + OVERLAP_WEIGHT * overlaps
        return standardized

    def to_relevance(self, values: np.ndarray, overlaps: np.ndarray | float = 0.0) -> np.ndarray:
        return apply_logistic(self.slope * self.standardize(values, overlaps) + self.intercept)


@dataclass(frozen=True)
class Calibration:
    """Parameters for computing the relevance of an index's hits."""

    sample_mean: np.ndarray  # mean embedding of randomly chosen images, of shape (D,), float32
    background: np.ndarray  # embeddings of the background queries, of shape (B, D), float32
    sample_ids: list[str]  # hit ids of these images, to count later how many are still in the index
    image_count: int
    captioned_count: int  # number of images with several captions among the first MAX_QUERIES of `sample_ids`
    fingerprint: str  # of the model
    texts: Scale  # for text queries
    images: Scale  # for image queries
    captions: Scale  # for text queries and hits with captions

    def rate(self, query: QueryVectors, vectors: np.ndarray, overlaps: np.ndarray | None = None) -> np.ndarray:
        """Return the relevance of hits with the given embeddings of shape (K, D), as a float array of shape (K,).

        The relevance is the maximum of the relevance to the query's texts and to its images. Negative parts are
        ignored. `overlaps` contains the overlap of the texts with the captions of each hit, NaN without captions.
        """
        ratings = []
        for part, scale in ((query.texts, self.texts), (query.images, self.images)):
            if part is not None:
                evidence = compute_evidence(part, vectors, self.background)
                rating = scale.to_relevance(evidence)
                if part is query.texts and overlaps is not None:
                    rating = np.where(np.isnan(overlaps), rating, self.captions.to_relevance(evidence, overlaps))
                ratings.append(rating)
        return np.max(ratings, axis=0)

    def to_bytes(self) -> bytes:
        values = {name: getattr(self, name) for name in ("sample_ids", "image_count", "captioned_count", "fingerprint")}
        values["version"] = VERSION
        scales = {name: dataclasses.asdict(getattr(self, name)) for name in SCALES}
        stream = io.BytesIO()
        np.savez(
            stream,
            sample_mean=self.sample_mean,
            background=self.background.astype(np.float16),
            values=np.array(json.dumps({**values, **scales})),
        )
        return stream.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Calibration | None:
        """Restore a calibration from `to_bytes`. Return None if it is corrupt or has another format version."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                values = json.loads(str(arrays["values"]))
                if values.pop("version", None) != VERSION:
                    return None
                values.update({name: Scale(**values[name]) for name in SCALES})
                sample_mean, background = (arrays[name].astype(np.float32) for name in ("sample_mean", "background"))
            return cls(sample_mean, background, **values)
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error):
            return None


# ---- formulas


def compute_evidence(query: np.ndarray, vectors: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return t = s - 0.25 * hubness for K images with embeddings of shape (K, D).

    Background queries with the same meaning as the query do not count towards the hubness.
    """
    similarities = vectors @ background.T  # (K, B)
    similarities[:, find_near_duplicates(background, query, background.mean(axis=0))] = -1
    evidence: np.ndarray = vectors @ query - HUBNESS_WEIGHT * similarities.max(axis=1, initial=-1.0)
    return evidence


def split_stems(texts: Sequence[str]) -> set[str]:
    """Return the distinct words of texts without diacritics, truncated to STEM_LENGTH, and unspaced characters."""
    decomposed = unicodedata.normalize("NFD", normalize("\n".join(texts)))
    # Without voicing marks, different Japanese words would be equal, such as the words for bus and pass.
    letters = "".join(c for c in decomposed if c in VOICING_MARKS or unicodedata.category(c)[0] != "M")
    spaced = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", letters))
    return {word[:STEM_LENGTH] for word in re.findall(r"[^\W_]+", spaced)}


def compute_overlap(stems: set[str], captions: Sequence[str]) -> float:
    """Return the weighted fraction of the query's stems that occur in captions, or NaN without captions or stems."""

    def sum_weights(stems: set[str]) -> int:
        return sum(1 if UNSPACED.match(stem) else max(0, len(stem) - 2) for stem in stems)

    total = sum_weights(stems)
    return sum_weights(stems & split_stems(captions)) / total if captions and total else float("nan")


def find_near_duplicates(vectors: np.ndarray, item: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return a boolean mask of the vectors that are near duplicates of an image or text, which includes itself.

    The mean embedding is subtracted, because in some models all embeddings are similar.
    """
    centred, reference = vectors - mean, item - mean
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(reference)
    return np.asarray(centred @ reference >= NEAR_DUPLICATE * norms)


def apply_logistic(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -50, 50)))


def fit_logistic(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """Fit slope a >= 0 and intercept b of 1 / (1 + exp(-a * x - b)) to the values of two classes (Platt scaling).

    Minimise the cross-entropy, with a total weight of 100 per class, plus 0.5 * (a - 1.2)^2. The penalty keeps a finite
    if the classes do not overlap.
    """
    values = np.concatenate([positive, negative])
    inputs = np.column_stack([values, np.ones(len(values))])
    targets = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    weights = np.repeat([100 / len(positive), 100 / len(negative)], [len(positive), len(negative)])
    start, penalty = np.array([TEXT_SLOPE, 0.0]), np.array([1.0, 1e-6])
    coefficients = start
    for _ in range(100):
        probabilities = apply_logistic(inputs @ coefficients)
        gradient = inputs.T @ (weights * (probabilities - targets)) + penalty * (coefficients - start)
        curvature = weights * probabilities * (1 - probabilities)
        hessian = (inputs * curvature[:, None]).T @ inputs + np.diag(penalty)
        step = np.clip(np.linalg.solve(hessian, gradient), -1, 1)
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-8:
            break
    slope, intercept = coefficients.tolist()
    # If positives have lower values than negatives, the values are uninformative, and both classes equally likely.
    return (slope, intercept) if slope > 0 else (0.0, 0.0)


# ---- calibration


class Reference(NamedTuple):
    """Mean embedding of sampled images, of shape (D,), and embeddings of the background queries, of shape (B, D)."""

    sample_mean: np.ndarray
    background: np.ndarray


def update_calibration(backend: Backend, model: DualEncoder, changed: bool = True) -> None:
    """Calibrate an index if it is not calibrated for this model, or if more than a tenth of it has changed since then.

    Args:
        model: Model of the index, truncated to the dimension of the index.
        changed: False if no image has been added, changed or removed since the last call.
    """
    calibration = load_calibration(backend, model)
    if calibration is not None and (not changed or not _is_outdated(calibration, backend)):
        return
    if not changed and backend.load_calibration() == b"":
        return  # the index cannot be calibrated
    calibration = calibrate(backend, model)
    backend.save_calibration(b"" if calibration is None else calibration.to_bytes())


def load_calibration(backend: Backend, model: DualEncoder) -> Calibration | None:
    """Return the calibration of an index, or None if there is no readable calibration for this model."""
    calibration = Calibration.from_bytes(backend.load_calibration() or b"")
    return calibration if calibration is not None and calibration.fingerprint == model.fingerprint else None


def _is_outdated(calibration: Calibration, backend: Backend) -> bool:
    """Return True if the number of images has changed much, or many sampled images or captions are gone."""
    _, image_count = backend.count()
    limit = MAX_CHANGED_FRACTION * calibration.image_count
    ids = calibration.sample_ids[:MAX_QUERIES]
    missing = len(ids) - len(backend.vectors(ids))
    captioned = abs(_count_captioned(backend, ids) - calibration.captioned_count)
    return abs(image_count - calibration.image_count) > limit or missing + captioned > MAX_CHANGED_FRACTION * len(ids)


def _count_captioned(backend: Backend, ids: Sequence[str]) -> int:
    return sum(len({text for image in backend.images(hit_id) for text in image.captions}) > 1 for hit_id in ids)


def calibrate(backend: Backend, model: DualEncoder) -> Calibration | None:
    """Calibrate an index as described in the module docstring. Return None if its images are too few or too similar."""
    from llm2clip.runs.ranks import print_once

    _, image_count = backend.count()
    if image_count < MIN_IMAGES:
        print_once(
            f"Relevance is not calibrated, because the index has fewer than {MIN_IMAGES} images: searches show the "
            "closest images, even if none of them is close to the query."
        )
        return None
    vectors = backend.vectors(backend.sample_ids(SAMPLE_SIZE))
    sample_mean, ids = np.stack(list(vectors.values())).mean(axis=0), list(vectors)
    print_once("Calibrating relevance, so that searches can report when nothing is close...")
    reference = Reference(sample_mean, embed_texts(model, BACKGROUND_QUERIES))
    if not np.isfinite(reference.background).all():
        print_once("Relevance is not available: the model returns NaN or infinity for texts.")
        return None
    background = [_find_neighbours(backend, query, reference) for query in reference.background]
    query_ids = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))[:MAX_QUERIES]]
    image_values = []
    for hit_id in query_ids:
        neighbours = _find_neighbours(backend, vectors[hit_id], reference, vectors[hit_id])
        if neighbours.is_other.any():
            image_values.append(max_over_top_hits(neighbours.values[neighbours.is_other]))
    texts = _make_scale([max_over_top_hits(item.values) for item in background], TEXT_SLOPE, TEXT_INTERCEPT)
    images = _make_scale(image_values, IMAGE_SLOPE, IMAGE_INTERCEPT)
    if texts is None or images is None:
        print_once("Relevance is not available: too many images of this index are similar.")
        return None
    captions = dataclasses.replace(texts, slope=CAPTION_SLOPE, intercept=CAPTION_INTERCEPT)
    captions = _fit_to_captions(captions, background, backend, model, query_ids, reference)
    captioned_count = _count_captioned(backend, ids[:MAX_QUERIES])
    return Calibration(*reference, ids, image_count, captioned_count, model.fingerprint, texts, images, captions)


def embed_texts(model: DualEncoder, texts: Sequence[str]) -> np.ndarray:
    """Embed texts as separate queries, with the model's prompt templates. Return a float32 array of shape (N, D)."""
    prompts, counts = SearchQuery(texts).build_prompts(model.query_templates)
    means = average_prompts(model.encode_texts(prompts).numpy(), counts)
    return np.stack([combine_embeddings([mean]) for mean in means])


def _make_scale(values: Sequence[float], slope: float, intercept: float) -> Scale | None:
    """Return a scale with the mean and standard deviation of the values, or None if they are too few or equal."""
    if len(values) < MIN_QUERIES or not np.std(values) > 1e-4 or not np.isfinite(values).all():
        return None
    return Scale(float(np.mean(values)), float(np.std(values)), slope, intercept)


class Neighbours(NamedTuple):
    """Captions and t of the top hits of a query. `is_other` is False for near duplicates of the excluded image."""

    captions: list[list[str]]
    values: np.ndarray
    is_other: np.ndarray


def _find_neighbours(
    backend: Backend, query: np.ndarray, reference: Reference, image: np.ndarray | None = None
) -> Neighbours:
    """Find the top hits of a query. `image` is the embedding of an image to exclude."""
    hits = backend.search(query, CLOSEST if image is None else NEIGHBOURS, Filter())
    vectors = backend.vectors([hit.id for hit in hits])
    stacked = np.stack(list(vectors.values()))
    is_other = np.ones(len(stacked), bool)
    if image is not None:
        is_other = ~find_near_duplicates(stacked, image, reference.sample_mean)
    captions = [get_captions(hit.images) for hit in hits if hit.id in vectors]
    return Neighbours(captions, compute_evidence(query, stacked, reference.background), is_other)


def get_captions(images: Sequence[IndexedImage]) -> list[str]:
    """Return the first MAX_CAPTIONS distinct captions of an image at several locations, truncated.

    The locations are sorted by name, because a filter changes their order in a hit. The number of captions is limited,
    because an image from a hundred websites would be slow to rate.
    """
    ordered = sorted(images, key=lambda image: image.name)
    captions = dict.fromkeys(caption for image in ordered for caption in image.captions)
    return [caption[:MAX_CAPTION_LENGTH] for caption in islice(captions, MAX_CAPTIONS)]


def max_over_top_hits(values: np.ndarray) -> float:
    """Return the value of a query: the maximum over its top hits."""
    return float(values[:CLOSEST].max())


def _fit_to_captions(
    scale: Scale,
    background: Sequence[Neighbours],
    backend: Backend,
    model: DualEncoder,
    hit_ids: Sequence[str],
    reference: Reference,
) -> Scale:
    """Fit a scale with captions of the given images as queries, if at least MIN_QUERIES images have another caption."""
    queries = {}
    for hit_id in hit_ids:
        texts = [text for image in backend.images(hit_id) for text in image.captions if text.strip()]
        if len(set(texts)) > 1:
            queries[hit_id] = texts[0]
    if len(queries) < MIN_QUERIES:
        return scale
    images = backend.vectors(list(queries))
    embeddings = dict(zip(queries, embed_texts(model, list(queries.values())), strict=True))
    positive, negative = [], []
    for query, neighbours in zip(BACKGROUND_QUERIES, background, strict=True):
        negative.append(max_over_top_hits(_standardize(scale, query, neighbours)))
    for hit_id, image in images.items():
        neighbours = _find_neighbours(backend, embeddings[hit_id], reference, image)
        values = _standardize(scale, queries[hit_id], neighbours)
        if neighbours.is_other.any():
            positive.append(max_over_top_hits(values))
            negative.append(max_over_top_hits(values[neighbours.is_other]))
    if len(positive) < MIN_QUERIES:
        return scale
    slope, intercept = fit_logistic(np.array(positive), np.array(negative))
    return dataclasses.replace(scale, slope=slope, intercept=intercept)


def _standardize(scale: Scale, query: str, neighbours: Neighbours) -> np.ndarray:
    """Return the value x, as defined in the module docstring, of each hit. Ignore captions equal to the query."""
    stems = split_stems([query])
    overlaps = [compute_overlap(stems, [text for text in texts if text != query]) for texts in neighbours.captions]
    return scale.standardize(neighbours.values, np.nan_to_num(overlaps))


# ---- search


class SearchResult(NamedTuple):
    """Hits of a search, and whether none of the images that match the filter is close to the query."""

    hits: list[Hit]
    nothing_close: bool


def search_relevant(
    backend: Backend,
    calibration: Calibration | None,
    query: QueryVectors | None,
    count: int,
    image_filter: Filter,
    offset: int = 0,
    words: Sequence[str] = (),
    show_weak: bool = False,
) -> SearchResult:
    """Search an index and rate the hits. For the arguments, see `Backend.search`.

    If nothing is close, return no hits, unless `show_weak` is set or there is a filter. Images that contain all words
    of the query count as close. Without a calibration, and for queries without positive parts, hits have no relevance
    and are always returned.
    """
    vector = None if query is None else query.combined
    if calibration is None or query is None or (query.texts is None and query.images is None):
        return SearchResult(backend.search(vector, count, image_filter, offset, words), False)

    def find_rated_hits(count: int, offset: int) -> list[Hit]:
        hits = backend.search(vector, count, image_filter, offset, words)
        return rate_hits(backend, calibration, query, hits, words)

    hits = find_rated_hits(count if offset else max(count, CLOSEST), offset)
    leading = find_rated_hits(CLOSEST, 0) if offset else hits[:CLOSEST]
    relevances = [hit.relevance for hit in leading if hit.relevance is not None]
    is_matched = any(hit.matched for hit in leading)
    nothing_close = bool(relevances) and max(relevances) < MIN_RELEVANCE and not is_matched
    # Usually, few images match a filter, and the right image is often weak compared with the entire index.
    is_hidden = nothing_close and not show_weak and not image_filter
    return SearchResult([] if is_hidden else hits[:count], nothing_close)


def rate_hits(
    backend: Backend, calibration: Calibration, query: QueryVectors, hits: Sequence[Hit], words: Sequence[str] = ()
) -> list[Hit]:
    """Add the relevance to hits. Hits that another process has just removed are returned unchanged."""
    vectors = backend.vectors([hit.id for hit in hits])
    if not vectors:
        return list(hits)
    stems, overlaps = split_stems(words), []
    for hit in hits:
        if hit.id in vectors:
            # If a hit has more locations than it lists, a filter also changes which locations are listed.
            images = hit.images if len(hit.images) == hit.image_count else backend.images(hit.id)
            overlaps.append(compute_overlap(stems, get_captions(images)))
    relevances = calibration.rate(query, np.stack(list(vectors.values())), np.array(overlaps))
    ratings = dict(zip(vectors, relevances.tolist(), strict=True))
    return [dataclasses.replace(hit, relevance=ratings.get(hit.id)) for hit in hits]
