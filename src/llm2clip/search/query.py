"""Search queries and their embeddings, the check that a model fits an index, and groups of similar hits.

Bursts and edited copies of a photograph are grouped into one hit. Two images are similar if the cosine similarity of
their embeddings is at least COPY_SIMILARITY. Images taken within BURST_SECONDS of each other are similar if the cosine
similarity is at least BURST_SIMILARITY. The mean embedding of the index, which is part of the calibration, is
subtracted first, because some models map all images to similar embeddings.

A page is a range of consecutive ungrouped hits, and only hits within this range are grouped. The next page starts where
the current page ends (`next_offset`), so a hit may be similar to a hit on an earlier page. A search reads READ_FACTOR
times as many hits as requested. If many hits are similar, the page can still have fewer hits than requested.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from llm2clip.io_utils import check_texts_not_empty, escape_control_characters
from llm2clip.models.loading import fingerprint
from llm2clip.models.prompts import QueryTemplates, average_prompt_embeddings, build_query_prompts
from llm2clip.search.backends import IndexBackend
from llm2clip.search.types import Hit, SimilarHit

if TYPE_CHECKING:
    from torch import Tensor

    from llm2clip.models.dual_encoder import DualEncoder

NEGATIVE_WEIGHT = 0.5  # a weight of 1 would make results almost independent of the positive parts of the query


class QueryVectors(NamedTuple):
    """L2-normalised float32 embeddings of a query, each of shape (D,)."""

    combined: np.ndarray  # query vector that determines the ranking of the images
    texts: np.ndarray | None  # mean embedding of the positive texts
    images: np.ndarray | None  # mean embedding of the positive images and earlier hits


@dataclass(frozen=True)
class SearchQuery:
    """A search query. Results should resemble its positive parts and not its negative parts."""

    texts: Sequence[str] = ()
    images: Sequence[Any] = ()  # paths, encoded images as bytes, or uint8 tensors of shape (3, H, W)
    negative_texts: Sequence[str] = ()
    negative_images: Sequence[Any] = ()
    like: Sequence[str] = ()  # ids of earlier hits
    negative_like: Sequence[str] = ()
    # Prompt templates for short texts (see `build_query_prompts`). Default: the templates of the model.
    templates: QueryTemplates | None = None

    def __bool__(self) -> bool:
        return bool(self.texts or self.images or self.like) or self.has_negative_parts

    @property
    def has_negative_parts(self) -> bool:
        return bool(self.negative_texts or self.negative_images or self.negative_like)

    def build_prompts(self, default_templates: QueryTemplates) -> tuple[list[str], list[int]]:
        """Return the prompts of all texts followed by all negative texts, and the number of prompts per text."""
        texts = [*self.texts, *self.negative_texts]
        check_texts_not_empty(texts)
        return build_query_prompts(texts, default_templates if self.templates is None else self.templates)

    def combine(
        self, texts: Sequence[np.ndarray], images: Sequence[np.ndarray], hits: Sequence[np.ndarray] = ()
    ) -> QueryVectors:
        """Return the query vector, and the mean embeddings of its positive parts. See `combine_embeddings`.

        Args:
            texts: Embeddings of the texts, then of the negative texts, each of shape (D,).
            images: Embeddings of the images, then of the negative images, each of shape (D,).
            hits: Embeddings of the hits in `like`, then in `negative_like`, each of shape (D,).
        """
        positive_texts = texts[: len(self.texts)]
        positive_images = [*hits[: len(self.like)], *images[: len(self.images)]]
        negative = [*hits[len(self.like) :], *texts[len(self.texts) :], *images[len(self.images) :]]
        return QueryVectors(
            combined=combine_embeddings([*positive_texts, *positive_images], negative),
            texts=combine_embeddings(positive_texts) if positive_texts else None,
            images=combine_embeddings(positive_images) if positive_images else None,
        )


def combine_embeddings(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Combine positive and negative L2-normalised embeddings into an L2-normalised query vector of shape (D,), float32.

    The positive and negative embeddings are averaged separately, and both means are L2-normalised. The query vector is
    the positive mean minus half the negative mean, normalised again. Without positive embeddings, the query vector
    points away from the negative mean, so the images least similar to the negative embeddings are ranked first.

    Raises:
        ValueError: Both lists are empty.
    """
    if not len(positive) and not len(negative):
        raise ValueError("the query is empty: provide at least one text or image to search for")
    if not len(positive):
        return -_normalize_vector(np.mean(negative, axis=0))
    query = _normalize_vector(np.mean(positive, axis=0))
    if len(negative):
        query = _normalize_vector(query - NEGATIVE_WEIGHT * _normalize_vector(np.mean(negative, axis=0)))
    return query


def _normalize_vector(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)


class QueryEncoder:
    """A dual encoder that embeds queries and images. Thread-safe if the model is."""

    def __init__(
        self,
        model: DualEncoder,
        load: Callable[[Any], Tensor] | None = None,
        decoding: AbstractContextManager[Any] | None = None,
    ) -> None:
        """Create an encoder. `load` decodes an image to a uint8 tensor of shape (3, H, W) in the context `decoding`."""
        self.model, self.load = model, load or _load_query_image
        self.decoding = nullcontext() if decoding is None else decoding

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        """Return L2-normalised image embeddings of shape (N, D), float32. Raise ImageError for corrupt images."""
        if not images:
            return np.empty((0, self.model.embed_dim), np.float32)
        prepared = []
        for image in images:
            with self.decoding:
                prepared.append(self.model.transform(self.load(image)))
        return _check_vectors_are_finite(self.model.encode_images(prepared).numpy(), "an image")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return L2-normalised text embeddings of shape (N, D), float32. Prompt templates are not applied."""
        if not texts:
            return np.empty((0, self.model.embed_dim), np.float32)
        return _check_vectors_are_finite(np.asarray(self.model.encode_texts(texts)), "a text")

    def embed(self, query: SearchQuery, hits: Sequence[np.ndarray] = ()) -> QueryVectors:
        """Return the embeddings of a query. For `hits`, see `SearchQuery.combine`.

        Raises:
            ValueError: The query or a text is empty, or the model returned NaN or infinity.
            ImageError: An image cannot be decoded.
        """
        prompts, counts = query.build_prompts(self.model.query_templates)
        prompt_vectors = self.embed_texts(prompts)
        images = self.embed_images([*query.images, *query.negative_images])
        return query.combine(list(average_prompt_embeddings(prompt_vectors, counts)), list(images), hits)


def _load_query_image(image: Any) -> Tensor:
    from llm2clip.data.images import load_image

    return load_image(image)


def _check_vectors_are_finite(vectors: np.ndarray, kind: str) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise ValueError(f"the model returned NaN or infinity for {kind}")
    return vectors


# ---- checking the model of an index


def truncate_model_to_index(metadata: Mapping[str, Any], model: DualEncoder) -> DualEncoder:
    """Truncate a model to the dimension of an index. Raise ValueError if a different model built the index."""
    if metadata["embed_dim"] < model.embed_dim:
        model = model.truncate(metadata["embed_dim"])
    check_model_matches_index(metadata, model)
    return model


def check_model_matches_index(metadata: Mapping[str, Any], model: DualEncoder) -> None:
    """Raise ValueError if an index was built with a different model.

    The text encoder may differ, so a student trained by `llm2clip distill` can search the index of its teacher. If a
    model has no separate image encoder and text encoder, the fingerprints of the entire model are compared.
    """
    parts = model.part_fingerprints if "image_fingerprint" in metadata else None
    if parts is not None:
        is_valid = metadata["image_fingerprint"] == parts[0]
        has_same_texts = metadata.get("text_fingerprint") == parts[1]
    else:
        is_valid = has_same_texts = metadata.get("fingerprint") == fingerprint(model.identity())
    if not is_valid:
        raise ValueError(
            f"the index was built with a different model: {metadata['model']} (or an earlier version of it), "
            f"not {model.name}. Pass the original model with --model, or build a new index in another folder."
        )
    if not has_same_texts:
        message = (
            f"The index was built with {metadata['model']}. {model.name} has the same image encoder but a different "
            "text encoder, so the index remains valid"
        )
        print(escape_control_characters(message), flush=True)


# ---- similar hits

COPY_SIMILARITY, BURST_SIMILARITY = 0.85, 0.7
UNCENTRED_COPY_SIMILARITY, UNCENTRED_BURST_SIMILARITY = 0.95, 0.85  # for indexes without a calibration
BURST_SECONDS = 10.0
READ_FACTOR = 2
MAX_COMPARED = 2000  # hits beyond this number are not grouped, because memory use grows quadratically


class HitGroups(NamedTuple):
    """Grouped hits of a page. `size` is the number of ungrouped hits in these groups."""

    hits: list[Hit]
    size: int


def group_similar_hits(
    hits: Sequence[Hit], backend: IndexBackend, count: int, mean: np.ndarray | None = None
) -> HitGroups:
    """Group each hit with the best-ranked hit to which it is similar.

    All hits of a group are similar to the first hit of the group, but not necessarily to each other.

    Args:
        count: Maximum number of groups. The page ends before the first hit that would start another group.
        mean: Mean embedding of the index, of shape (D,), or None if the index is not calibrated.
    """
    is_similar = find_similar_pairs(hits[:MAX_COMPARED], backend, mean)
    groups: dict[int, list[Hit]] = {}  # other hits of each group, keyed by the position of its first hit
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
    return HitGroups(page, size)


def find_similar_pairs(hits: Sequence[Hit], backend: IndexBackend, mean: np.ndarray | None) -> np.ndarray:
    """Return a boolean mask of similar pairs of hits, of shape (N, N). Removed hits are not similar to any hit."""
    vectors = backend.read_vectors([hit.id for hit in hits])
    if not vectors:
        return np.zeros((len(hits), len(hits)), bool)
    centre = np.zeros_like(next(iter(vectors.values()))) if mean is None else mean
    matrix = np.stack([vectors.get(hit.id, centre) - centre for hit in hits])  # a removed hit has a zero vector
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-6)
    cosines = matrix @ matrix.T
    times = np.full(len(hits), np.nan)
    for position, hit in enumerate(hits):
        times[position] = next((image.taken for image in hit.images if image.has_exif_time), np.nan)
    is_burst = np.abs(times[:, None] - times) <= BURST_SECONDS  # False for NaN
    if mean is None:
        return (cosines >= UNCENTRED_COPY_SIMILARITY) | ((cosines >= UNCENTRED_BURST_SIMILARITY) & is_burst)
    return (cosines >= COPY_SIMILARITY) | ((cosines >= BURST_SIMILARITY) & is_burst)
