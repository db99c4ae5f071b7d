"""Hard negatives for `tune`: items with similar captions are placed next to each other in the training order.

In a random batch, nearly all negatives are about a different subject, so they soon become too easy. To avoid this, each
pass over the data divides the items into small groups with similar captions, using a random projection tree, which
splits the items recursively along random hyperplanes. A batch made of a few groups then contrasts dogs with dogs and
street scenes with street scenes. Similarity is computed from the words (TF-IDF) rather than by the model being trained,
so it takes only seconds, and a resumed run forms the same groups.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

DIMENSION = 64


def caption_vectors(captions: Sequence[Sequence[str]]) -> np.ndarray:
    """Compute one vector per item from its captions; return float32 (N, at most 64), centred and L2-normalised.

    The method is latent semantic analysis: TF-IDF followed by truncated SVD. The captions of an item are concatenated
    into one document.

    Args:
        captions: Captions of each item. They can be in any language.
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
        vectors: Vectors from `caption_vectors`, (N, D).
        group_size: Number of items per group. If N is not a multiple of `group_size`, one group is smaller. If
            `group_size` is 1, the result is an ordinary random permutation.
        rng: Generator for the random directions and the random order. Each call forms new groups.
    """
    if group_size <= 1:
        return rng.permutation(len(vectors))
    groups = _split(vectors, rng.permutation(len(vectors)), group_size, rng)
    if not groups:
        return np.empty(0, np.int64)
    return np.concatenate([groups[i] for i in rng.permutation(len(groups))])


def _split(vectors: np.ndarray, items: np.ndarray, group_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Recursively halve the items along random directions until each group has at most `group_size` items."""
    if len(items) <= group_size:
        return [items] if len(items) else []
    direction = rng.standard_normal(vectors.shape[1], dtype=np.float32)
    ordered = items[np.argsort(vectors[items] @ direction, kind="stable")]
    half = max(1, len(items) // group_size // 2) * group_size
    return _split(vectors, ordered[:half], group_size, rng) + _split(vectors, ordered[half:], group_size, rng)


def _words(text: str) -> list[str]:
    """Split a text into words. Scripts without spaces (such as Thai or Chinese) are split into characters."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+", text.lower()) or [text]
