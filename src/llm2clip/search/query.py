"""Search queries, made of positive and negative texts, images and earlier hits, and their embeddings."""

from collections.abc import Sequence
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

    The `search` command encodes texts and images directly, and the server batches them with those of other requests.
    Both call `build_prompts` to get the texts to encode and `combine` to get the query vector.

    Attributes:
        texts, negative_texts: Texts of any length.
        images, negative_images: Images (data URIs in server requests).
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
        positive = len(self.texts) + len(self.images) + len(self.like)
        return positive + len(self.negative_texts) + len(self.negative_images) + len(self.negative_like) > 0

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


def embed_query(model: DualEncoder, query: SearchQuery) -> np.ndarray:
    """Return the L2-normalised vector of a query without hits, of shape (D,), float32. See `embed_query_parts`."""
    return embed_query_parts(model, query).combined


def embed_query_parts(model: DualEncoder, query: SearchQuery) -> QueryVectors:
    """Embed a query that does not contain hits.

    Raises:
        ValueError: The query has no parts, or a text is empty.
        ImageError: An image cannot be read.
    """
    prompts, counts = query.build_prompts(model.query_templates)
    prompt_vectors = model.encode_texts(prompts).numpy() if prompts else np.empty((0, model.embed_dim), np.float32)
    image_vectors = embed_images(model, [*query.images, *query.negative_images]).numpy()
    return query.combine(list(prompt_vectors), counts, list(image_vectors))


def embed_images(model: DualEncoder, images: Sequence[Any]) -> Tensor:
    """Return L2-normalised image embeddings of shape (N, D), float32. Raise ImageError if an image cannot be read."""
    if not images:
        return torch.empty(0, model.embed_dim)
    return model.encode_images([model.transform(load_image(image)) for image in images])


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
