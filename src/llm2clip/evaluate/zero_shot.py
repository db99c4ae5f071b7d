"""Zero-shot classification by the names of classes, and a linear probe."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import ClassificationData


def class_prompts(classes: ClassificationData) -> list[str]:
    """Every name in every template, name by name."""
    return [template.replace("{}", name) for name in classes.names for template in classes.templates]


def class_embeddings(texts: Tensor, classes: int) -> Tensor:
    """A vector a class: the mean of those of its prompts, L2-normalised before and after (CLIP, arXiv 2103.00020).

    Args:
        texts: (classes * templates, D), of `prompts`.
        classes: their number.

    Returns:
        (classes, D) float32.
    """
    return F.normalize(F.normalize(texts.float(), dim=-1).reshape(classes, -1, texts.shape[1]).mean(1), dim=-1)


def classification_accuracy(
    images: Tensor, labels: Sequence[int], vectors: Tensor, tile: int = 4096
) -> dict[str, float]:
    """Of images against classes, in percent: "top-1", "top-5", and "mean per class", of top-1.

    Of classes that tie the first is above, as argmax has it: two of ImageNet's have the same name.

    Args:
        images: (N, D), L2-normalised.
        labels: the class of each.
        vectors: (classes, D), L2-normalised.
        tile: images at a time.
    """
    right, ranks = torch.tensor(labels), []
    for lo in range(0, len(images), tile):
        scores = images[lo : lo + tile].float() @ vectors.T
        own = scores.gather(1, right[lo : lo + tile, None])
        before = torch.arange(len(vectors)) < right[lo : lo + tile, None]
        ranks.append(((scores > own) | ((scores == own) & before)).sum(1))
    rank = torch.cat(ranks)
    first = (rank < 1).double()
    counts = torch.bincount(right)
    by_class = (
        torch.zeros(len(counts), dtype=torch.float64).index_add_(0, right, first)[counts > 0] / counts[counts > 0]
    )
    return {
        "top-1": 100 * float(first.mean()),
        "top-5": 100 * float((rank < 5).double().mean()),
        "mean per class": 100 * float(by_class.mean()),
    }


def linear_probe(
    train: Tensor, train_labels: Sequence[int], test: Tensor, test_labels: Sequence[int], seed: int = 0
) -> dict[str, float]:
    """Logistic regression on frozen vectors, its penalty chosen on a fifth of the training images (CLIP, arXiv
    2103.00020, appendix A.3, on a grid of powers of ten).

    Args:
        train, test: (N, D).
        train_labels, test_labels: the class of each.
        seed: of the split.

    Returns:
        "top-1" in percent, and "C", the inverse of the penalty that was chosen.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    x, y = train.numpy(), np.asarray(train_labels)
    counts = np.unique(y, return_counts=True)[1]
    every = counts.min() > 1 and math.ceil(0.2 * len(y)) >= len(counts)  # a fifth holds an image of each class
    part = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y if every else None)
    inner, held, inner_labels, held_labels = part

    def fitted(c: float, images: np.ndarray, labels: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=1000).fit(images, labels)

    grid = [10.0**e for e in range(-3, 5)]
    best = max(grid, key=lambda c: fitted(c, inner, inner_labels).score(held, held_labels))
    top = fitted(best, x, y).score(test.numpy(), np.asarray(test_labels))
    return {"top-1": 100 * float(top), "C": best}
