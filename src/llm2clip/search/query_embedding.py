"""What somebody looks for, as one vector: texts and pictures, wanted and unwanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder

NEGATIVE_WEIGHT = 0.5  # of the way from what is unwanted; all of it would lead to what has nothing to do with either


@dataclass(frozen=True)
class Query:
    """Texts and pictures (as `data.images.load` takes them) that the answer is like, and unlike."""

    texts: Sequence[str] = ()
    images: Sequence[Any] = ()
    without_texts: Sequence[str] = ()
    without_images: Sequence[Any] = ()


def embed_texts(model: DualEncoder, images: Sequence[Any]) -> Tensor:
    """Vectors (N, D) float32 of pictures, L2-normalised.

    Raises:
        ImageError: one cannot be read.
    """
    if not images:
        return torch.empty(0, model.embed_dim)
    return model.encode_images([model.transform(load_image(image)) for image in images])


def combine(wanted: Sequence[np.ndarray], unwanted: Sequence[np.ndarray] = ()) -> np.ndarray:
    """The vector of a query, float32 (D,), L2-normalised: the mean of what is wanted, less half of the mean of what is
    not, each mean normalised.

    Args:
        wanted: vectors float32 (D,), L2-normalised.
        unwanted: likewise.

    Raises:
        ValueError: nothing is wanted.
    """
    if not len(wanted):
        raise ValueError("nothing to look for: give a text or a picture")
    found = _unit(np.mean(wanted, axis=0))
    if len(unwanted):
        found = _unit(found - NEGATIVE_WEIGHT * _unit(np.mean(unwanted, axis=0)))
    return found


def embed_query(model: DualEncoder, query: Query) -> np.ndarray:
    """The vector of a query by a model, as `mixed` makes it.

    Raises:
        ValueError: nothing is wanted.
        ImageError: a picture cannot be read.
    """

    def vectors(texts: Sequence[str], images: Sequence[Any]) -> list[np.ndarray]:
        return [*(model.encode_texts(list(texts)).numpy() if texts else ()), *embed_texts(model, images).numpy()]

    return combine(vectors(query.texts, query.images), vectors(query.without_texts, query.without_images))


def _unit(vector: np.ndarray) -> np.ndarray:
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)
