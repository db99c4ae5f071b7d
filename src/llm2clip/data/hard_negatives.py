"""Images whose captions are alike, as hard negatives for each other: an order in which neighbours come together.

In a batch drawn at random nearly every negative is of another subject, and after a few minutes of tuning they teach
nothing. Here each pass cuts the images by random hyperplanes into groups of similar captions (a random projection
tree), so that a batch of a few groups holds dogs beside dogs and street scenes beside street scenes. Similarity is
that of words, not of the model that is being tuned: it costs seconds, and is the same before and after a kill.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

WIDTH = 64


def caption_vectors(images: Sequence[Sequence[str]]) -> np.ndarray:
    """Where the captions of each image lie: (N, 64 or less) float32, centred and L2-normalised.

    Latent semantic analysis (TF-IDF, truncated SVD) of all captions of an image taken as one document.

    Args:
        images: the captions of each image, in any language.
    """
    counts = TfidfVectorizer(analyzer=_words, sublinear_tf=True).fit_transform([" ".join(c) for c in images])
    width = min(WIDTH, min(counts.shape) - 1)
    if width < 1:
        return np.zeros((len(images), 1), np.float32)
    found = TruncatedSVD(width, random_state=0).fit_transform(counts)
    found = found - found.mean(0)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.maximum(norms, 1e-12)).astype(np.float32)


def grouped_permutation(at: np.ndarray, group: int, rng: np.random.Generator) -> np.ndarray:
    """A random order of N images, int64 (N,), in which runs of `group` are neighbours.

    Args:
        at: (N, D), from `points`.
        group: images in a run; 1 is a plain random order. One run is shorter where `group` does not divide N.
        rng: makes other groups in every pass.
    """
    if group <= 1:
        return rng.permutation(len(at))
    runs = _cut(at, rng.permutation(len(at)), group, rng)
    return np.concatenate([runs[i] for i in rng.permutation(len(runs))]) if runs else np.empty(0, np.int64)


def _cut(at: np.ndarray, members: np.ndarray, group: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Halve `members` across a random direction until `group` are left."""
    if len(members) <= group:
        return [members] if len(members) else []
    order = members[np.argsort(at[members] @ rng.standard_normal(at.shape[1], dtype=np.float32), kind="stable")]
    half = max(1, len(members) // group // 2) * group
    return _cut(at, order[:half], group, rng) + _cut(at, order[half:], group, rng)


def _words(text: str) -> list[str]:
    """Words, and single characters of scripts that are written without spaces."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+", text.lower()) or [text]
