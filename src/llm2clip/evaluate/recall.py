"""Retrieval in figures: recall both ways from ranks, what chance gives, and how far another sample would differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from llm2clip.evaluate.ranks import two_way_ranks

KS = (1, 5, 10)


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """R@k in percent: the share of queries with a positive among their first k."""
    return {f"R@{k}": 100.0 * float((ranks < k).double().mean()) for k in ks}


def chance_recall(positives: Sequence[int], items: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """R@k in percent of an order drawn at random, given how many of the `items` are right for each query.

    1 - C(items - p, k) / C(items, k), averaged over queries (hypergeometric).
    """
    out = {}
    for k in ks:
        total = 0.0
        for p, times in Counter(positives).items():
            miss = 1.0
            for i in range(min(k, items)):
                miss *= max(0, items - p - i) / (items - i)
            total += times * (1 - miss)
        out[f"R@{k}"] = 100.0 * total / max(1, len(positives))
    return out


def bootstrap_counts(groups: int, resamples: int = 1000) -> Iterator[Tensor]:
    """How often each group is drawn, float64 (groups,), resample by resample; always the same for as many groups, so
    that two models' draws pair."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(resamples):
        yield torch.bincount(torch.randint(groups, (groups,), generator=generator), minlength=groups).double()


def percentile_interval(means: Tensor, level: float = 0.95) -> Tensor:
    """Where that share of the resampled means lies (Efron's percentile method): (resamples, ...) to (2, ...)."""
    return means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64), 0)


def bootstrap(sums: Tensor, counts: Tensor, level: float = 0.95, resamples: int = 1000) -> Tensor:
    """Intervals of a mean over groups that are drawn anew, whole.

    Args:
        sums: (groups, K), of what is averaged, for each of K quantities.
        counts: (groups,), of how many each sum is.
        level: share of the resamples between the ends.
        resamples: how often groups are drawn.

    Returns:
        The ends, float64 (2, K).
    """
    sums, counts = sums.double()[counts > 0], counts.double()[counts > 0]
    return percentile_interval(
        torch.stack([times @ sums / (times @ counts) for times in bootstrap_counts(len(sums), resamples)]), level
    )


def recall_intervals(
    ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS, *, level: float = 0.95, resamples: int = 1000
) -> dict[str, tuple[float, float]]:
    """Bootstrap intervals of R@k in percent: images are drawn anew, each with all its queries, since captions of one
    image hit and miss together.

    Args:
        ranks: int64 (Q,), of the queries.
        groups: int64 (Q,), the image of each, from 0.
        ks: which recalls.
        level, resamples: as of `bootstrap`.
    """
    hits = torch.stack([(ranks < k).double() for k in ks], 1)
    sums = hits.new_zeros(int(groups.max()) + 1, len(ks)).index_add_(0, groups, hits)
    reach = 100 * bootstrap(sums, torch.bincount(groups), level, resamples)
    return {f"R@{k}": (float(low), float(high)) for k, low, high in zip(ks, *reach.tolist(), strict=True)}


def retrieval_metrics(
    of_image: Tensor, of_text: Tensor, image_of_text: Sequence[int] | Tensor
) -> dict[str, dict[str, Any]]:
    """Both directions, their chance levels and their intervals, from the ranks.

    Args:
        of_image: int64 (I,), of the best-placed caption of each image, from 0.
        of_text: int64 (T,), of the image of each caption.
        image_of_text: for each caption the index of its image.

    Returns:
        {"I2T": {"R@1": ..., "median rank": ...}, "T2I": ..., "I2T chance": {"R@1": ...}, "T2I chance": ...} in
        percent, ranks from 1; and {"I2T interval": {"R@1": (low, high), ...}, "T2I interval": ...}, 95%.
    """
    owner = torch.as_tensor(image_of_text)
    found: dict[str, dict[str, Any]] = {}
    for way, ranks, groups in (("I2T", of_image, torch.arange(len(of_image))), ("T2I", of_text, owner)):
        found[way] = recall(ranks) | {"median rank": float(ranks.double().quantile(0.5)) + 1}
        found[f"{way} interval"] = recall_intervals(ranks, groups)
    found["I2T chance"] = chance_recall(torch.bincount(owner, minlength=len(of_image)).tolist(), len(owner))
    found["T2I chance"] = chance_recall([1] * len(owner), len(of_image))
    return found


def evaluate_retrieval(
    images: Tensor, texts: Tensor, image_of_text: Sequence[int] | Tensor, *, progress: bool = False
) -> dict[str, dict[str, Any]]:
    """The same from vectors, (I, D) and (T, D), L2-normalised; captions may be ragged, and every image has one."""
    return retrieval_metrics(*two_way_ranks(images, texts, image_of_text, progress=progress), image_of_text)
