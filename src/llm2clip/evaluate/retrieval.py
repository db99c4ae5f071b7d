"""Retrieval by recall: image-to-text and text-to-image R@k with any number of captions an image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

KS = (1, 5, 10)


def positive_ranks(
    queries: Tensor,
    items: Tensor,
    positives: Sequence[Sequence[int]],
    tile: int = 4096,
    itself: Sequence[int] | None = None,
) -> Tensor:
    """Rank of each query's best-placed positive among all items: int64 (Q,), 0 is the top.

    Counts, tile by tile, the items that score above the best positive; no score matrix is kept and nothing is sorted.
    An item that ties with it counts as above unless it is itself a positive, so that a model which gives every pair the
    same score is at the bottom and not at the top.

    Args:
        queries: (Q, D) float32, L2-normalised.
        items: (N, D) float32, L2-normalised.
        positives: the items that are right for each query, at least one. For 3 images with 2, 1 and 2 captions,
            image-to-text is [[0, 1], [2], [3, 4]] and text-to-image is [[0], [0], [1], [2], [2]].
        tile: queries and items in a tile.
        itself: for each query an item that is no answer, right or wrong: the query where queries are items too.

    Raises:
        ValueError: a query has no positive, or a vector is not finite.
    """
    if any(len(p) == 0 for p in positives):
        raise ValueError(f"query {next(i for i, p in enumerate(positives) if len(p) == 0)} has no right answer")
    if not (torch.isfinite(queries).all() and torch.isfinite(items).all()):
        raise ValueError("a vector is not finite: the model is broken, and its recall would mean nothing")
    ranks = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), tile):
        block = positives[start : start + tile]
        q = queries[start : start + tile]
        row = torch.tensor([r for r, p in enumerate(block) for _ in p])
        col = torch.tensor([c for p in block for c in p])
        # First pass: the best positive's score, from the same matrix products as the second, so that ties are exact.
        best = torch.full((len(q),), -torch.inf)
        for lo in range(0, len(items), tile):
            scores = q @ items[lo : lo + tile].T
            here = (col >= lo) & (col < lo + tile)
            best.scatter_reduce_(0, row[here], scores[row[here], col[here] - lo], "amax")
        for lo in range(0, len(items), tile):
            scores = q @ items[lo : lo + tile].T
            here = (col >= lo) & (col < lo + tile)
            scores[row[here], col[here] - lo] = -torch.inf
            if itself is not None:
                own = torch.tensor(itself[start : start + tile]) - lo
                here = (own >= 0) & (own < scores.shape[1])
                scores[here.nonzero()[:, 0], own[here]] = -torch.inf
            ranks[start : start + tile] += (scores >= best[:, None]).sum(1)
    return ranks


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """R@k in percent: the share of queries with a positive among their first k."""
    return {f"R@{k}": 100.0 * float((ranks < k).double().mean()) for k in ks}


def chance(positives: Sequence[int], items: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """R@k in percent of an order drawn at random, given how many of the `items` are right for each query.

    1 - C(items - p, k) / C(items, k), averaged over queries (hypergeometric).
    """
    out = {}
    for k in ks:
        total = 0.0
        for p in positives:
            miss = 1.0
            for i in range(min(k, items)):
                miss *= max(0, items - p - i) / (items - i)
            total += 1 - miss
        out[f"R@{k}"] = 100.0 * total / max(1, len(positives))
    return out


def retrieval(images: Tensor, texts: Tensor, image_of_text: Sequence[int]) -> dict[str, dict[str, float]]:
    """Both directions and their chance levels.

    Args:
        images: (I, D) float32, L2-normalised.
        texts: (T, D) float32, L2-normalised.
        image_of_text: for each text the index of its image; captions may be ragged, and every image has at least one.

    Returns:
        {"I2T": {"R@1": ...}, "T2I": ..., "I2T chance": ..., "T2I chance": ...} in percent.
    """
    texts_of_image: list[list[int]] = [[] for _ in range(len(images))]
    for t, i in enumerate(image_of_text):
        texts_of_image[i].append(t)
    return {
        "I2T": recall(positive_ranks(images, texts, texts_of_image)),
        "T2I": recall(positive_ranks(texts, images, [[i] for i in image_of_text])),
        "I2T chance": chance([len(t) for t in texts_of_image], len(texts)),
        "T2I chance": chance([1] * len(texts), len(images)),
    }
