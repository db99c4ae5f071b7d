"""Retrieval metrics computed from ranks: recall in both directions, chance levels and confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.evaluate.bootstrap import bootstrap

KS = (1, 5, 10)


def retrieval_metrics(
    image_ranks: Tensor, text_ranks: Tensor, image_of_text: Sequence[int] | Tensor
) -> dict[str, dict[str, Any]]:
    """Return recall in both directions, with chance levels and 95% confidence intervals.

    Args:
        image_ranks: Zero-based rank of each image's best caption, int64 of shape (I,).
        text_ranks: Zero-based rank of each caption's image, int64 of shape (T,).
        image_of_text: Image index of each caption.

    Returns:
        {"I2T": {"R@1": ..., "median rank": ...}, "T2I": ..., "I2T chance": {"R@1": ...}, "T2I chance": ...,
        "I2T interval": {"R@1": (low, high), ...}, "T2I interval": ...}. Recall is in percent. The best possible median
        rank is 1.
    """
    owner = torch.as_tensor(image_of_text)
    metrics: dict[str, dict[str, Any]] = {}
    for direction, ranks, groups in (("I2T", image_ranks, torch.arange(len(image_ranks))), ("T2I", text_ranks, owner)):
        metrics[direction] = recall(ranks) | {"median rank": float(ranks.double().quantile(0.5)) + 1}
        metrics[f"{direction} interval"] = recall_intervals(ranks, groups)
    captions_per_image = torch.bincount(owner, minlength=len(image_ranks)).tolist()
    metrics["I2T chance"] = chance_recall(captions_per_image, len(owner))
    metrics["T2I chance"] = chance_recall([1] * len(owner), len(image_ranks))
    return metrics


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return R@k, the percentage of queries with a positive among the top k items."""
    return {f"R@{k}": 100.0 * float((ranks < k).double().mean()) for k in ks}


def chance_recall(positives: Sequence[int], num_items: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the expected R@k of a random ranking, in percent.

    By the hypergeometric distribution, the expected R@k of a query with p positives is
    1 - C(num_items - p, k) / C(num_items, k). The result is the average over the queries.

    Args:
        positives: Number of positives (p) for each query.
        num_items: Number of ranked items.
    """
    chance = {}
    for k in ks:
        total = 0.0
        for p, num_queries in Counter(positives).items():
            miss = 1.0
            for i in range(min(k, num_items)):
                miss *= max(0, num_items - p - i) / (num_items - i)
            total += num_queries * (1 - miss)
        chance[f"R@{k}"] = 100.0 * total / max(1, len(positives))
    return chance


def recall_intervals(
    ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS, *, level: float = 0.95, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """Return bootstrap confidence intervals for R@k, in percent.

    Images are resampled together with all their queries, because the results for captions of an image are correlated.

    Args:
        ranks: Zero-based rank of each query's best positive, int64 of shape (Q,).
        groups: Image index of each query, int64 of shape (Q,).
    """
    sums, counts = _sum_per_image([(ranks < k).double() for k in ks], groups)
    return _percent_by_k(bootstrap(sums, counts, level, resamples), ks)


def recall_differences(
    ranks: Tensor, baseline_ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return R@k of a model minus R@k of a baseline, in percentage points, and paired 95% bootstrap intervals.

    Args:
        ranks, baseline_ranks: Zero-based rank of each query's best positive, int64 of shape (Q,).
        groups: Image index of each query, int64 of shape (Q,).
    """
    differences = [(ranks < k).double() - (baseline_ranks < k).double() for k in ks]
    intervals = bootstrap(*_sum_per_image(differences, groups), bounds=(-1.0, 1.0))
    means = {f"R@{k}": 100.0 * float(d.mean()) for k, d in zip(ks, differences, strict=True)}
    return means, _percent_by_k(intervals, ks)


def _sum_per_image(values: Sequence[Tensor], groups: Tensor) -> tuple[Tensor, Tensor]:
    """Sum K values over the queries of each image. Return sums of shape (I, K) and counts of queries of shape (I,)."""
    stacked = torch.stack(list(values), 1)  # (Q, K)
    sums = stacked.new_zeros(int(groups.max()) + 1, len(values)).index_add_(0, groups, stacked)
    return sums, torch.bincount(groups)


def _percent_by_k(intervals: Tensor, ks: Sequence[int]) -> dict[str, tuple[float, float]]:
    low, high = (100 * intervals).tolist()
    return {f"R@{k}": (low[n], high[n]) for n, k in enumerate(ks)}
