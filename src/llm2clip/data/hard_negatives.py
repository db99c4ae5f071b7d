"""Hard negatives for `tune`: an order of the items in which those with similar captions are adjacent.

In a random batch nearly all negatives show another subject and soon become too easy. Here every pass divides the items
into small groups of similar captions by random hyperplanes (a random projection tree). A batch of a few groups then
contrasts dogs with dogs and street scenes with street scenes. Similarity is measured on words (TF-IDF) and not with
the model in training: this takes seconds, and a resumed run forms the same groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

DIMENSION = 64


def caption_vectors(captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Return a vector for the captions of each item: float32 (N, 64 or less), centred and L2-normalised.

    Latent semantic analysis: TF-IDF and truncated SVD, with all captions of an item as one document.

    Args:
        captions: The captions of each item, in any language.
    """
    documents = [" ".join(texts) for texts in captions]
    tfidf = TfidfVectorizer(analyzer=_words, sublinear_tf=True).fit_transform(documents)
    dimension = min(DIMENSION, min(tfidf.shape) - 1)
    if dimension < 1:
        return np.zeros((len(captions), 1), np.float32)
    vectors = TruncatedSVD(dimension, random_state=0).fit_transform(tfidf)
    vectors = vectors - vectors.mean(0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def grouped_permutation(vectors: np.ndarray, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random permutation of N items, int64 (N,), in which groups of similar items are adjacent.

    Args:
        vectors: (N, D), from `caption_vectors`.
        group_size: Items per group. One group is smaller if N is not a multiple. 1: an ordinary random permutation.
        rng: Source of the random directions and orders; each call forms new groups.
    """
    if group_size <= 1:
        return rng.permutation(len(vectors))
    groups = _split(vectors, rng.permutation(len(vectors)), group_size, rng)
    if not groups:
        return np.empty(0, np.int64)
    return np.concatenate([groups[i] for i in rng.permutation(len(groups))])


def _split(vectors: np.ndarray, items: np.ndarray, group_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Halve the items along random directions until groups of `group_size` are left."""
    if len(items) <= group_size:
        return [items] if len(items) else []
    direction = rng.standard_normal(vectors.shape[1], dtype=np.float32)
    ordered = items[np.argsort(vectors[items] @ direction, kind="stable")]
    half = max(1, len(items) // group_size // 2) * group_size
    return _split(vectors, ordered[:half], group_size, rng) + _split(vectors, ordered[half:], group_size, rng)


def _words(text: str) -> list[str]:
    """Split a text into words, and scripts without spaces (Thai, Lao, Japanese, Chinese) into characters."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+", text.lower()) or [text]
