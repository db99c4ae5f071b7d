"""Relevance of search results: the estimated probability that an image is an answer to the query.

Cosine similarities alone do not show whether an index contains an answer, because typical similarities differ between
models, queries and images. The cosine similarity s of a hit is therefore compared with the hubness of the image, which
is the largest cosine similarity between the image and about 300 short texts (`background_queries.txt`).

    t = s - 0.25 * hubness
    x = (t - m) / d + 8 * overlap       m, d: mean and standard deviation of t for queries without an answer
    relevance = 1 / (1 + exp(-a * x - b))

The overlap is the weighted fraction of the query's words, truncated to five letters, that occur in the first five
captions of the image. The weight of a word is its truncated length minus 2, at least 0. In scripts without spaces
between words, each character is a word of weight 1. A filter does not change the relevance of a hit.

`calibrate_index` measures m and d with searches in the entire index, because the largest similarity of a query grows
with the number of images. The parameters form three scales:

    texts: Scale for text queries. m and d are measured with the background queries. The values a = 1.2 and b = -0.6
        were tuned on photographs.
    captions: Scale for text queries and hits with captions. m and d are copied from `texts`. a and b are fitted with
        captions as queries (Platt scaling). Captions that equal the query are excluded from the overlap. The
        negative examples are the background queries, and captions whose own image is excluded from the hits. If fewer
        than 30 of at most 256 sampled images have several captions, a = 0.6 and b = -1.3.
    images: Scale for image queries. m and d are measured with sampled images as queries, excluding each query image and
        its near duplicates. With a = 1.2 and b = 1.1, images as similar as a typical nearest neighbour are close.

The value of a query is the largest t of its top 10 hits. A query has an answer if at least one of these hits has a
relevance of at least 0.2 or has texts that contain all words of the query.
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
from llm2clip.models.prompts import average_prompt_embeddings
from llm2clip.search.backends import IndexBackend
from llm2clip.search.metadata import Filter, normalize_text
from llm2clip.search.query import QueryVectors, SearchQuery, combine_embeddings
from llm2clip.search.types import Hit, IndexedImage

if TYPE_CHECKING:
    from llm2clip.models.dual_encoder import DualEncoder

BACKGROUND_QUERIES = Path(__file__).with_name("background_queries.txt").read_text(encoding="utf-8").splitlines()
SCALES = ("texts", "images", "captions")
VERSION = 3  # format version of calibrations; `llm2clip index` replaces calibrations with a different version
SAMPLE_SIZE = 2048  # number of images from which the mean embedding is estimated
HUBNESS_WEIGHT = 0.25
OVERLAP_WEIGHT = 8.0
MAX_CAPTIONS, MAX_CAPTION_LENGTH = 5, 500  # maximum numbers of captions per hit and of characters per caption
STEM_LENGTH = 5  # truncate words to this many letters, so that most inflected forms match
VOICING_MARKS = "\u3099\u309a"
CLOSEST = 10  # number of top hits that determine whether a query has an answer
MIN_RELEVANCE = 0.2  # low, because hiding a relevant image is worse than showing irrelevant images
TEXT_SLOPE, TEXT_INTERCEPT = 1.2, -0.6
CAPTION_SLOPE, CAPTION_INTERCEPT = 0.6, -1.3
IMAGE_SLOPE, IMAGE_INTERCEPT = 1.2, 1.1
MIN_IMAGES = 50  # smaller indexes are not calibrated, because one page of results shows all their images
MIN_QUERIES = 30  # minimum number of calibration queries
MAX_QUERIES = 256  # maximum number of calibration queries of each kind (captions or images)
CALIBRATION_HITS = 32  # number of hits per calibration query, before an image and its near duplicates are excluded
NEAR_DUPLICATE = 0.9  # minimum cosine similarity of near duplicates after the mean embedding has been subtracted
MAX_CHANGED_FRACTION = 0.1  # if more than this fraction of an index has changed, the index is calibrated again


@dataclass(frozen=True)
class RelevanceScale:
    """Parameters for converting t to a relevance score. The module docstring defines the symbols t, m, d, a and b."""

    mean: float  # m
    deviation: float  # d
    slope: float  # a
    intercept: float  # b

    def standardize_similarities(self, similarities: np.ndarray, overlaps: np.ndarray | float = 0.0) -> np.ndarray:
        """Return x = (t - m) / d + 8 * overlap for the adjusted similarities t of hits."""
        return np.asarray((similarities - self.mean) / self.deviation + OVERLAP_WEIGHT * overlaps)

    def compute_relevance(self, similarities: np.ndarray, overlaps: np.ndarray | float = 0.0) -> np.ndarray:
        return apply_logistic_function(
            self.slope * self.standardize_similarities(similarities, overlaps) + self.intercept
        )


@dataclass(frozen=True)
class Calibration:
    """Parameters for computing the relevance of an index's hits."""

    sample_mean: np.ndarray  # mean embedding of randomly chosen images, of shape (D,), float32
    background: np.ndarray  # embeddings of the background queries, of shape (B, D), float32
    sample_ids: list[str]  # hit ids of the sampled images, used to detect changes to the index
    image_count: int
    captioned_count: int  # number of images with several captions among the first MAX_QUERIES sampled images
    fingerprint: str  # model fingerprint
    texts: RelevanceScale  # for text queries
    images: RelevanceScale  # for image queries
    captions: RelevanceScale  # for text queries and hits with captions

    def compute_relevance(
        self, query: QueryVectors, vectors: np.ndarray, overlaps: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the relevance of K hits as a float array of shape (K,).

        If a query has texts and images, the relevance of a hit is the maximum of its relevance to the texts and its
        relevance to the images. Negative parts of the query are ignored.

        Args:
            vectors: Embeddings of the hits, of shape (K, D).
            overlaps: Overlap between the query and the captions of each hit, of shape (K,); NaN without captions.
        """
        ratings = []
        for part, scale in ((query.texts, self.texts), (query.images, self.images)):
            if part is not None:
                adjusted = compute_adjusted_similarities(part, vectors, self.background)
                rating = scale.compute_relevance(adjusted)
                if part is query.texts and overlaps is not None:
                    rating = np.where(np.isnan(overlaps), rating, self.captions.compute_relevance(adjusted, overlaps))
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
        """Restore a calibration from `to_bytes`. Return None if the data is corrupt or has another format version."""
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                values = json.loads(str(arrays["values"]))
                if values.pop("version", None) != VERSION:
                    return None
                values.update({name: RelevanceScale(**values[name]) for name in SCALES})
                sample_mean, background = (arrays[name].astype(np.float32) for name in ("sample_mean", "background"))
            return cls(sample_mean, background, **values)
        except (ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, zipfile.BadZipFile, zlib.error):
            return None


# ---- formulas


def compute_adjusted_similarities(query: np.ndarray, vectors: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Return t = s - 0.25 * hubness for K images with embeddings of shape (K, D).

    Background queries that are near duplicates of the query are excluded from the hubness.
    """
    similarities = vectors @ background.T  # (K, B)
    similarities[:, find_near_duplicates(background, query, background.mean(axis=0))] = -1
    return np.asarray(vectors @ query - HUBNESS_WEIGHT * similarities.max(axis=1, initial=-1.0))


def extract_stems(texts: Sequence[str]) -> set[str]:
    """Return the distinct words of texts, without diacritics and truncated to STEM_LENGTH characters.

    In scripts without spaces between words, each character is a word.
    """
    decomposed = unicodedata.normalize("NFD", normalize_text("\n".join(texts)))
    # Voicing marks are not removed, because they distinguish Japanese words such as the words for bus and pass.
    letters = "".join(c for c in decomposed if c in VOICING_MARKS or unicodedata.category(c)[0] != "M")
    spaced = UNSPACED.sub(r" \g<0> ", unicodedata.normalize("NFC", letters))
    return {word[:STEM_LENGTH] for word in re.findall(r"[^\W_]+", spaced)}


def compute_stem_overlap(stems: set[str], captions: Sequence[str]) -> float:
    """Return the weighted fraction of query stems that occur in captions. Without captions or stems, return NaN."""

    def sum_stem_weights(stems: set[str]) -> int:
        return sum(1 if UNSPACED.match(stem) else max(0, len(stem) - 2) for stem in stems)

    total = sum_stem_weights(stems)
    return sum_stem_weights(stems & extract_stems(captions)) / total if captions and total else float("nan")


def find_near_duplicates(vectors: np.ndarray, item: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return a boolean mask of the vectors that are near duplicates of `item`, the embedding of an image or text.

    The mean embedding is subtracted first, because some models map all inputs to similar embeddings.
    """
    centred, reference = vectors - mean, item - mean
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(reference)
    return np.asarray(centred @ reference >= NEAR_DUPLICATE * norms)


def apply_logistic_function(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(values, -50, 50)))


def fit_logistic_regression(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """Fit a slope a >= 0 and an intercept b of 1 / (1 + exp(-a * x - b)) to values x of two classes (Platt scaling).

    The loss is the cross-entropy, with a total weight of 100 per class, plus 0.5 * (a - 1.2)^2. The penalty keeps the
    slope finite if the classes do not overlap.
    """
    values = np.concatenate([positive, negative])
    inputs = np.column_stack([values, np.ones(len(values))])
    targets = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    weights = np.repeat([100 / len(positive), 100 / len(negative)], [len(positive), len(negative)])
    start, penalty = np.array([TEXT_SLOPE, 0.0]), np.array([1.0, 1e-6])
    coefficients = start
    for _ in range(100):
        probabilities = apply_logistic_function(inputs @ coefficients)
        gradient = inputs.T @ (weights * (probabilities - targets)) + penalty * (coefficients - start)
        curvature = weights * probabilities * (1 - probabilities)
        hessian = (inputs * curvature[:, None]).T @ inputs + np.diag(penalty)
        step = np.clip(np.linalg.solve(hessian, gradient), -1, 1)
        coefficients = coefficients - step
        if np.abs(step).max() < 1e-8:
            break
    slope, intercept = coefficients.tolist()
    # If positive examples have lower values than negative examples, x is uninformative, and the probability is 0.5.
    return (slope, intercept) if slope > 0 else (0.0, 0.0)


# ---- calibration


class ReferenceEmbeddings(NamedTuple):
    """Mean embedding of sampled images, of shape (D,), and embeddings of the background queries, of shape (B, D)."""

    sample_mean: np.ndarray
    background: np.ndarray


def update_calibration(backend: IndexBackend, model: DualEncoder, changed: bool = True) -> None:
    """Calibrate an index if it is not calibrated for the model, or if more than a tenth of the images have changed.

    Args:
        model: Model truncated to the dimension of the index.
        changed: False if no image has been added, changed or removed since the last call.
    """
    calibration = load_calibration(backend, model)
    if calibration is not None and (not changed or not _is_calibration_outdated(calibration, backend)):
        return
    if not changed and backend.load_calibration() == b"":
        return  # an earlier run has found that the index cannot be calibrated
    calibration = calibrate_index(backend, model)
    backend.save_calibration(b"" if calibration is None else calibration.to_bytes())


def load_calibration(backend: IndexBackend, model: DualEncoder) -> Calibration | None:
    """Return the calibration of an index, or None if the index is not calibrated for the model."""
    calibration = Calibration.from_bytes(backend.load_calibration() or b"")
    return calibration if calibration is not None and calibration.fingerprint == model.fingerprint else None


def _is_calibration_outdated(calibration: Calibration, backend: IndexBackend) -> bool:
    _, image_count = backend.count_images()
    limit = MAX_CHANGED_FRACTION * calibration.image_count
    ids = calibration.sample_ids[:MAX_QUERIES]
    missing = len(ids) - len(backend.read_vectors(ids))
    captioned = abs(_count_images_with_several_captions(backend, ids) - calibration.captioned_count)
    return abs(image_count - calibration.image_count) > limit or missing + captioned > MAX_CHANGED_FRACTION * len(ids)


def _count_images_with_several_captions(backend: IndexBackend, ids: Sequence[str]) -> int:
    return sum(len({text for image in backend.read_images(hit_id) for text in image.captions}) > 1 for hit_id in ids)


def calibrate_index(backend: IndexBackend, model: DualEncoder) -> Calibration | None:
    """Calibrate an index. If the index cannot be calibrated, print the reason and return None."""
    from llm2clip.runs.ranks import print_once

    _, image_count = backend.count_images()
    if image_count < MIN_IMAGES:
        print_once(
            f"Relevance is not calibrated, because the index has fewer than {MIN_IMAGES} images. Searches show the "
            "closest images, even if no image is close to the query."
        )
        return None
    vectors = backend.read_vectors(backend.sample_ids(SAMPLE_SIZE))
    sample_mean, ids = np.stack(list(vectors.values())).mean(axis=0), list(vectors)
    print_once("Calibrating relevance, so that searches can report when no image is close to a query...")
    reference = ReferenceEmbeddings(sample_mean, embed_texts_as_queries(model, BACKGROUND_QUERIES))
    if not np.isfinite(reference.background).all():
        print_once("Relevance is not calibrated, because the model returns NaN or infinity for texts.")
        return None
    background = [_find_calibration_hits(backend, query, reference) for query in reference.background]
    query_ids = [ids[i] for i in np.random.default_rng(0).permutation(len(ids))[:MAX_QUERIES]]
    image_values = []
    for hit_id in query_ids:
        hits = _find_calibration_hits(backend, vectors[hit_id], reference, vectors[hit_id])
        if hits.is_included.any():
            image_values.append(find_maximum_of_top_hits(hits.similarities[hits.is_included]))
    text_values = [find_maximum_of_top_hits(hits.similarities) for hits in background]
    texts = _estimate_relevance_scale(text_values, TEXT_SLOPE, TEXT_INTERCEPT)
    images = _estimate_relevance_scale(image_values, IMAGE_SLOPE, IMAGE_INTERCEPT)
    if texts is None or images is None:
        print_once("Relevance is not calibrated, because too many images in the index are similar.")
        return None
    captions = dataclasses.replace(texts, slope=CAPTION_SLOPE, intercept=CAPTION_INTERCEPT)
    captions = _fit_caption_scale(captions, background, backend, model, query_ids, reference)
    captioned_count = _count_images_with_several_captions(backend, ids[:MAX_QUERIES])
    return Calibration(*reference, ids, image_count, captioned_count, model.fingerprint, texts, images, captions)


def embed_texts_as_queries(model: DualEncoder, texts: Sequence[str]) -> np.ndarray:
    """Embed N texts with the model's prompt templates. Return a float32 array of shape (N, D)."""
    prompts, counts = SearchQuery(texts).build_prompts(model.query_templates)
    means = average_prompt_embeddings(model.encode_texts(prompts).numpy(), counts)
    return np.stack([combine_embeddings([mean]) for mean in means])


def _estimate_relevance_scale(values: Sequence[float], slope: float, intercept: float) -> RelevanceScale | None:
    """Return a scale with the mean and standard deviation of the values, or None if they are too few or constant."""
    if len(values) < MIN_QUERIES or not np.std(values) > 1e-4 or not np.isfinite(values).all():
        return None
    return RelevanceScale(float(np.mean(values)), float(np.std(values)), slope, intercept)


class CalibrationHits(NamedTuple):
    """Top hits for a calibration query."""

    captions: list[list[str]]  # captions of each hit
    similarities: np.ndarray  # adjusted similarity t of each hit
    is_included: np.ndarray  # False for near duplicates of the excluded image


def _find_calibration_hits(
    backend: IndexBackend, query: np.ndarray, reference: ReferenceEmbeddings, excluded_image: np.ndarray | None = None
) -> CalibrationHits:
    """Find the top hits of a query. Mark near duplicates of the image with the embedding `excluded_image`."""
    hits = backend.search(query, CLOSEST if excluded_image is None else CALIBRATION_HITS, Filter())
    vectors = backend.read_vectors([hit.id for hit in hits])
    stacked = np.stack(list(vectors.values()))
    is_included = np.ones(len(stacked), bool)
    if excluded_image is not None:
        is_included = ~find_near_duplicates(stacked, excluded_image, reference.sample_mean)
    captions = [get_captions(hit.images) for hit in hits if hit.id in vectors]
    similarities = compute_adjusted_similarities(query, stacked, reference.background)
    return CalibrationHits(captions, similarities, is_included)


def get_captions(images: Sequence[IndexedImage]) -> list[str]:
    """Return the first MAX_CAPTIONS distinct captions of an image, each truncated to MAX_CAPTION_LENGTH characters.

    The locations of the image are sorted by name, because their order in a hit depends on the filter. The number of
    captions is limited, because web datasets contain images with hundreds of captions, which would be slow to compare.
    """
    ordered = sorted(images, key=lambda image: image.name)
    captions = dict.fromkeys(caption for image in ordered for caption in image.captions)
    return [caption[:MAX_CAPTION_LENGTH] for caption in islice(captions, MAX_CAPTIONS)]


def find_maximum_of_top_hits(values: np.ndarray) -> float:
    return float(values[:CLOSEST].max())


def _fit_caption_scale(
    scale: RelevanceScale,
    background: Sequence[CalibrationHits],
    backend: IndexBackend,
    model: DualEncoder,
    hit_ids: Sequence[str],
    reference: ReferenceEmbeddings,
) -> RelevanceScale:
    """Fit a scale with image captions as queries. With fewer than MIN_QUERIES queries, return the original scale."""
    queries = {}
    for hit_id in hit_ids:
        texts = [text for image in backend.read_images(hit_id) for text in image.captions if text.strip()]
        if len(set(texts)) > 1:
            queries[hit_id] = texts[0]
    if len(queries) < MIN_QUERIES:
        return scale
    images = backend.read_vectors(list(queries))
    embeddings = dict(zip(queries, embed_texts_as_queries(model, list(queries.values())), strict=True))
    positive, negative = [], []
    for query, hits in zip(BACKGROUND_QUERIES, background, strict=True):
        negative.append(find_maximum_of_top_hits(_standardize_calibration_hits(scale, query, hits)))
    for hit_id, image in images.items():
        hits = _find_calibration_hits(backend, embeddings[hit_id], reference, image)
        values = _standardize_calibration_hits(scale, queries[hit_id], hits)
        if hits.is_included.any():
            positive.append(find_maximum_of_top_hits(values))
            negative.append(find_maximum_of_top_hits(values[hits.is_included]))
    if len(positive) < MIN_QUERIES:
        return scale
    slope, intercept = fit_logistic_regression(np.array(positive), np.array(negative))
    return dataclasses.replace(scale, slope=slope, intercept=intercept)


def _standardize_calibration_hits(scale: RelevanceScale, query: str, hits: CalibrationHits) -> np.ndarray:
    """Return x for each hit (see the module docstring). Captions that equal the query are ignored."""
    stems = extract_stems([query])
    overlaps = [compute_stem_overlap(stems, [text for text in texts if text != query]) for texts in hits.captions]
    return scale.standardize_similarities(hits.similarities, np.nan_to_num(overlaps))


# ---- search


class SearchResults(NamedTuple):
    """Hits of a search. `nothing_close` is True if no image that matches the filter is close to the query."""

    hits: list[Hit]
    nothing_close: bool


def search_and_rate_hits(
    backend: IndexBackend,
    calibration: Calibration | None,
    query: QueryVectors | None,
    count: int,
    image_filter: Filter,
    offset: int = 0,
    words: Sequence[str] = (),
    show_weak: bool = False,
) -> SearchResults:
    """Search an index and compute the relevance of the hits. For the arguments, see `IndexBackend.search`.

    If no image is close to the query, return no hits, unless `show_weak` is True or the search has a filter. Images
    whose texts contain all words of the query are considered close. If the index is not calibrated or the query has no
    positive parts, hits have no relevance and are always returned.
    """
    vector = None if query is None else query.combined
    if calibration is None or query is None or (query.texts is None and query.images is None):
        return SearchResults(backend.search(vector, count, image_filter, offset, words), False)

    def find_rated_hits(count: int, offset: int) -> list[Hit]:
        hits = backend.search(vector, count, image_filter, offset, words)
        return rate_hits(backend, calibration, query, hits, words)

    hits = find_rated_hits(count if offset else max(count, CLOSEST), offset)
    leading = find_rated_hits(CLOSEST, 0) if offset else hits[:CLOSEST]
    relevances = [hit.relevance for hit in leading if hit.relevance is not None]
    is_matched = any(hit.matched for hit in leading)
    nothing_close = bool(relevances) and max(relevances) < MIN_RELEVANCE and not is_matched
    # With a filter, weak hits are shown, because few images match, and the right image may have a low relevance.
    is_hidden = nothing_close and not show_weak and not image_filter
    return SearchResults([] if is_hidden else hits[:count], nothing_close)


def rate_hits(
    backend: IndexBackend, calibration: Calibration, query: QueryVectors, hits: Sequence[Hit], words: Sequence[str] = ()
) -> list[Hit]:
    """Return copies of hits with their relevance. Hits that another process has just removed are returned unchanged."""
    vectors = backend.read_vectors([hit.id for hit in hits])
    if not vectors:
        return list(hits)
    stems, overlaps = extract_stems(words), []
    for hit in hits:
        if hit.id in vectors:
            # If an image has more than MAX_LOCATIONS locations, the locations in a hit depend on the filter.
            images = hit.images if len(hit.images) == hit.image_count else backend.read_images(hit.id)
            overlaps.append(compute_stem_overlap(stems, get_captions(images)))
    relevances = calibration.compute_relevance(query, np.stack(list(vectors.values())), np.array(overlaps))
    ratings = dict(zip(vectors, relevances.tolist(), strict=True))
    return [dataclasses.replace(hit, relevance=ratings.get(hit.id)) for hit in hits]
