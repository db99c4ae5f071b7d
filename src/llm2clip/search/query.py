"""Search queries, made of positive and negative texts, images and earlier hits, and their embeddings."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.images import load_image
from llm2clip.data.texts import check_not_empty
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import QueryTemplates, average_prompts, build_query_prompts

NEGATIVE_WEIGHT = 0.5  # with a weight of 1, results have little to do with the positive parts of the query


class UnsupportedQuery(ValueError):
    """Raised when a query is valid, but asks for something that is not available for it."""


class QueryVectors(NamedTuple):
    """Embeddings of a query, all L2-normalised and of shape (D,), float32.

    Attributes:
        combined: The query vector, by which the images are ranked.
        texts: Normalised mean of the positive texts, or None if the query has no positive texts.
        images: Normalised mean of the positive images and earlier hits, or None if the query has neither.
    """

    combined: np.ndarray
    texts: np.ndarray | None
    images: np.ndarray | None


@dataclass(frozen=True)
class SearchQuery:
    """A search query. Results should resemble its positive parts, but not its negative parts.

    Attributes:
        texts, negative_texts: Texts of any length.
        images, negative_images: Images: paths, encoded images as bytes, or tensors of shape (3, H, W), uint8.
        like, negative_like: Ids of earlier hits.
        templates: Prompt templates for short texts. The embeddings of the resulting prompts are averaged (see
            `models.prompts.build_query_prompts`). Default: the model's own templates.
    """

    texts: Sequence[str] = ()
    images: Sequence[Any] = ()
    negative_texts: Sequence[str] = ()
    negative_images: Sequence[Any] = ()
    like: Sequence[str] = ()
    negative_like: Sequence[str] = ()
    templates: QueryTemplates | None = None

    def __bool__(self) -> bool:
        """Return True if the query has at least one part."""
        return bool(self.texts or self.images or self.like) or self.has_negative_parts

    @property
    def has_negative_parts(self) -> bool:
        """True if there is something that results should not resemble."""
        return bool(self.negative_texts or self.negative_images or self.negative_like)

    def build_prompts(self, default_templates: QueryTemplates) -> tuple[list[str], list[int]]:
        """Return the prompts of all texts, then of all negative texts, and the number of prompts per text.

        Raises:
            ValueError: A text is empty.
        """
        texts = [*self.texts, *self.negative_texts]
        check_not_empty(texts)
        return build_query_prompts(texts, default_templates if self.templates is None else self.templates)

    def combine(
        self,
        prompts: Sequence[np.ndarray],
        counts: Sequence[int],
        images: Sequence[np.ndarray],
        hits: Sequence[np.ndarray] = (),
    ) -> QueryVectors:
        """Return the query vector and its positive parts. See `combine_embeddings` for the formula.

        Args:
            prompts: Embeddings of the prompts returned by `build_prompts`, each of shape (D,).
            counts: Number of prompts for each text.
            images: Embeddings of the images, then of the negative images, each of shape (D,).
            hits: Embeddings of the hits in `like`, then in `negative_like`, each of shape (D,).

        Raises:
            ValueError: The query has no parts.
        """
        texts = list(average_prompts(torch.from_numpy(np.stack(prompts)), counts).numpy()) if len(prompts) else []
        return self.combine_texts(texts, images, hits)

    def combine_texts(
        self, texts: Sequence[np.ndarray], images: Sequence[np.ndarray], hits: Sequence[np.ndarray] = ()
    ) -> QueryVectors:
        """Return the same as `combine`, given the embeddings of the texts, then of the negative texts.

        Raises:
            ValueError: The query has no parts.
        """
        positive_texts = texts[: len(self.texts)]
        positive_images = [*hits[: len(self.like)], *images[: len(self.images)]]
        negative = [*hits[len(self.like) :], *texts[len(self.texts) :], *images[len(self.images) :]]
        return QueryVectors(
            combined=combine_embeddings([*positive_texts, *positive_images], negative),
            texts=combine_embeddings(positive_texts) if positive_texts else None,
            images=combine_embeddings(positive_images) if positive_images else None,
        )


class QueryEncoder:
    """A dual encoder that embeds queries and images. Thread-safe if the model is."""

    def __init__(
        self,
        model: DualEncoder,
        load: Callable[[Any], Tensor] = load_image,
        decoding: AbstractContextManager[Any] | None = None,
        templates: QueryTemplates | None = None,
    ) -> None:
        """
        Args:
            load: Function that decodes an image to a uint8 tensor of shape (3, H, W).
            decoding: Reusable context manager that is held while an image is decoded and preprocessed, for example to
                limit the number of decoded images in memory. Default: no limit.
            templates: Prompt templates for queries without templates of their own. Default: those of the model.
        """
        self.model, self.load = model, load
        self.decoding = nullcontext() if decoding is None else decoding
        self.templates = model.query_templates if templates is None else templates

    def prepare(self, image: Any) -> Any:
        """Decode and preprocess an image for `DualEncoder.encode_images`. Raise ImageError if it cannot be decoded."""
        with self.decoding:
            return self.model.transform(self.load(image))

    def embed_images(self, images: Sequence[Any]) -> np.ndarray:
        """Return L2-normalised image embeddings of shape (N, D), float32.

        Raises:
            ImageError: An image cannot be decoded.
            ValueError: The model returned NaN or infinity.
        """
        if not images:
            return np.empty((0, self.model.embed_dim), np.float32)
        prepared = [self.prepare(image) for image in images]
        return _check_finite(self.model.encode_images(prepared).numpy(), "an image")

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Return L2-normalised text embeddings of shape (N, D), float32. Prompt templates are not applied.

        Raises:
            ValueError: The model returned NaN or infinity.
        """
        if not texts:
            return np.empty((0, self.model.embed_dim), np.float32)
        return _check_finite(self.model.encode_texts(texts).numpy(), "a text")

    def embed(self, query: SearchQuery, hits: Sequence[np.ndarray] = ()) -> QueryVectors:
        """Embed a query.

        Args:
            hits: Embeddings of the hits in `query.like`, then in `query.negative_like`, each of shape (D,).

        Raises:
            ValueError: The query has no parts, a text is empty, or the model returned NaN or infinity.
            ImageError: An image cannot be decoded.
        """
        prompts, counts = query.build_prompts(self.templates)
        prompt_vectors = self.embed_texts(prompts)
        images = self.embed_images([*query.images, *query.negative_images])
        return query.combine(list(prompt_vectors), counts, list(images), hits)


def _check_finite(vectors: np.ndarray, kind: str) -> np.ndarray:
    if not np.isfinite(vectors).all():
        raise ValueError(f"the model returned NaN or infinity for {kind}")
    return vectors


def combine_embeddings(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Combine positive and negative embeddings into an L2-normalised query vector of shape (D,), float32.

    The positive and negative embeddings are averaged separately, and both means are L2-normalised. The query vector is
    the positive mean minus half the negative mean, normalised again. Without positive embeddings, the query vector
    points away from the negative mean, so the images least similar to the negative embeddings are ranked first.

    Args:
        positive: L2-normalised embeddings that results should resemble, each of shape (D,), float32.
        negative: L2-normalised embeddings that results should not resemble, each of shape (D,), float32.

    Raises:
        ValueError: Both lists are empty.
    """
    if not len(positive) and not len(negative):
        raise ValueError("the query is empty: provide at least one text or image to search for")
    if not len(positive):
        return -_normalize(np.mean(negative, axis=0))
    query = _normalize(np.mean(positive, axis=0))
    if len(negative):
        query = _normalize(query - NEGATIVE_WEIGHT * _normalize(np.mean(negative, axis=0)))
    return query


def _normalize(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
