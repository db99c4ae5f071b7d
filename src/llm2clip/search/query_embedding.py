"""Embeddings of search queries that consist of positive and negative texts and images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.images import load_image
from llm2clip.data.valid_text import check_not_empty
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import QueryTemplates, average_prompts, query_prompts

NEGATIVE_WEIGHT = 0.5  # with a weight of 1, results would hardly be related to the positives


@dataclass(frozen=True)
class Query:
    """A search query with positive and negative texts and images.

    Results should resemble the positive texts and images, but not the negative ones. Images can have any type that
    `data.images.load_image` accepts. `templates` are prompt templates that form an ensemble with short texts (see
    `models.prompts.query_prompts`). Default: the model's own templates.
    """

    texts: Sequence[str] = ()
    images: Sequence[Any] = ()
    negative_texts: Sequence[str] = ()
    negative_images: Sequence[Any] = ()
    templates: QueryTemplates | None = None


def embed_query(model: DualEncoder, query: Query) -> np.ndarray:
    """Return the embedding of a query, float32 (D,), L2-normalised. See `combine` for the formula.

    Raises:
        ValueError: The query contains no text or image, or a text is empty.
        ImageError: An image cannot be read.
    """
    check_not_empty(query.texts)
    check_not_empty(query.negative_texts)
    templates = model.query_templates if query.templates is None else query.templates
    positive = _embed(model, query.texts, query.images, templates)
    negative = _embed(model, query.negative_texts, query.negative_images, templates)
    return combine(positive, negative)


def embed_images(model: DualEncoder, images: Sequence[Any]) -> Tensor:
    """Return the embeddings of images, float32 (N, D), L2-normalised.

    Raises:
        ImageError: An image cannot be read.
    """
    if not images:
        return torch.empty(0, model.embed_dim)
    return model.encode_images([model.transform(load_image(image)) for image in images])


def combine(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Combine positive and negative embeddings into a query vector, float32 (D,), L2-normalised.

    The means of the positive and of the negative embeddings are L2-normalised first. The query vector is the positive
    mean minus half the negative mean, normalised again. Without positive embeddings, it is the opposite of the negative
    mean, so that the least similar images are found.

    Args:
        positive: Embeddings to which results should be similar, each float32 (D,), L2-normalised.
        negative: Embeddings to which results should be dissimilar, each float32 (D,), L2-normalised.

    Raises:
        ValueError: There is no embedding.
    """
    if not len(positive) and not len(negative):
        raise ValueError("the query is empty: provide at least one text or image to search for")
    if not len(positive):
        return -_normalize(np.mean(negative, axis=0))
    query = _normalize(np.mean(positive, axis=0))
    if len(negative):
        query = _normalize(query - NEGATIVE_WEIGHT * _normalize(np.mean(negative, axis=0)))
    return query


def _embed(
    model: DualEncoder, texts: Sequence[str], images: Sequence[Any], templates: QueryTemplates
) -> list[np.ndarray]:
    vectors = []
    if texts:
        prompts, counts = query_prompts(texts, templates)
        vectors = list(average_prompts(model.encode_texts(prompts), counts).numpy())
    return vectors + list(embed_images(model, images).numpy())


def _normalize(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
