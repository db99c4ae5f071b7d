"""Retrieval ranks and metrics, and bootstrap confidence intervals.

The score matrix is computed in tiles and never stored in full. A rank is the number of wrong answers that score at
least as high as the best correct answer, so scores need not be sorted. Ties count against the model: if all scores are
equal, each rank is the worst possible rank.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import use_onednn_matmul

KS = (1, 5, 10)
TILE = 512  # number of images per tile; the float32 scores of 512 images and 2,048 texts fit in the CPU cache
QUERY_TILE = 32  # number of queries per matmul in `compute_positive_ranks`
LEVEL = 0.95  # confidence level


# ---- ranks -----------------------------------------------------------------------------------------------------------


@use_onednn_matmul()
def compute_positive_ranks(
    queries: Tensor,
    items: Tensor,
    positives: Sequence[Sequence[int]],
    tile_size: int = 2 * TILE,
) -> list[Tensor]:
    """Return the zero-based ranks of each query's positive items, in ascending order, as int64 tensors of shape (P,).

    Args:
        queries, items: L2-normalised embeddings of shape (Q, D) and (N, D).
        positives: Indices of the correct items for each query, e.g. [[0, 1], [2]] if the first image has two captions
            and the second image has one. Several queries can have the same positive item.
        tile_size: Number of items per matmul.

    Raises:
        ValueError: A query has no positive item, or an embedding contains NaN or infinity.
    """
    for n, indices in enumerate(positives):
        if len(indices) == 0:
            raise ValueError(f"query {n} has no positive item")
    check_embeddings_are_finite(queries, items)
    ranks = []
    for start in range(0, len(queries), QUERY_TILE):
        query_tile = _pad_tile(queries[start : start + QUERY_TILE].float(), QUERY_TILE)
        tiles = []
        for offset in range(0, len(items), tile_size):
            tile_scores = query_tile @ _pad_tile(items[offset : offset + tile_size].float(), tile_size).T
            tiles.append(tile_scores[:, : len(items) - offset])
        scores = torch.cat(tiles, 1)  # (QUERY_TILE, N)
        for query in range(start, min(start + QUERY_TILE, len(queries))):
            ranks.append(_rank_positives(scores[query - start], torch.as_tensor(positives[query])))
    return ranks


def _rank_positives(scores: Tensor, positives: Tensor) -> Tensor:
    positive_scores = scores[positives].sort().values  # ascending
    negative_scores = scores.index_fill(0, positives, -torch.inf)
    # A negative beats a positive if its score is at least as high as the positive's score.
    num_beaten = torch.bucketize(negative_scores, positive_scores, right=True)
    negatives_by_beaten = torch.bincount(num_beaten, minlength=len(positives) + 1)
    # The n-th best of P positives (n = 0 is the best) is beaten by all negatives that beat at least P - n positives.
    negatives_before = negatives_by_beaten.flip(0).cumsum(0)[:-1]
    return negatives_before + torch.arange(len(positives))


@use_onednn_matmul()
def two_way_ranks(
    images: Tensor,
    texts: Tensor,
    image_of_text: Sequence[int] | Tensor,
    tile_size: int = TILE,
) -> tuple[Tensor, Tensor]:
    """Return the zero-based ranks of each image's best text (I,) and of each text's image (T,), int64 on the CPU.

    Args:
        images, texts: L2-normalised embeddings of shape (I, D) and (T, D), float32 or float16. Scores are float32.
        image_of_text: Image index of each text. Every image must have at least one text.
        tile_size: Number of images per matmul. Must be a multiple of 16 so that equal vectors get equal scores.

    Raises:
        ValueError: An image has no text, a text has no image, or an embedding contains NaN or infinity.
    """
    owner = torch.as_tensor(image_of_text)
    counts = torch.bincount(owner, minlength=len(images))
    if len(counts) > len(images) or not counts.all():
        raise ValueError(
            f"each of the {len(images)} images must have a text, and each text must refer to one of the images"
        )
    check_embeddings_are_finite(images, texts)
    order = owner.argsort(stable=True)
    owner = owner[order].to(images.device)
    best_image, best_text = (torch.full((len(x),), -torch.inf, device=images.device) for x in (images, texts))
    tiles = _iterate_tiles(images, texts, order, owner, tile_size, with_all=False)
    for image_range, text_range, scores, positives in tiles:
        tile_images, tile_texts = positives
        best_text[text_range.start + tile_texts] = scores[positives]
        best_image[image_range].scatter_reduce_(0, tile_images, scores[positives], "amax")

    # Repeat the same matmuls, so that ties are exact. Counts are float32, which is exact up to 2**24.
    image_counts, text_counts = torch.zeros_like(best_image), torch.zeros_like(best_text)
    for image_range, text_range, scores, positives in _iterate_tiles(images, texts, order, owner, tile_size):
        scores[positives] = -torch.inf
        image_counts[image_range] += _is_at_least(scores, best_image[image_range, None]).sum(1)
        text_counts[text_range] += _is_at_least(scores, best_text[text_range]).sum(0)
    text_ranks = text_counts.long().cpu()
    return image_counts.long().cpu(), torch.empty_like(text_ranks).index_copy_(0, order, text_ranks)


def _iterate_tiles(
    images: Tensor, texts: Tensor, order: Tensor, owner: Tensor, tile_size: int, with_all: bool = True
) -> Iterator[tuple[slice, slice, Tensor, tuple[Tensor, Tensor]]]:
    """Yield tiles of the score matrix: image range, text range, scores, and (row, column) indices of the positives.

    A tile has up to `tile_size` images and 4 * `tile_size` texts. `order` sorts the texts by image index, so only a few
    tiles contain positives, and `owner` is the image index of each sorted text. If `with_all` is False, only tiles that
    can contain positives are computed.
    """
    for text_start in range(0, len(texts), 4 * tile_size):
        text_range = slice(text_start, min(text_start + 4 * tile_size, len(texts)))
        text_tile = _pad_tile(texts[order[text_range]].to(images.device, torch.float32), 4 * tile_size)
        owners = owner[text_range]
        first, last = (0, len(images) - 1) if with_all else (int(owners[0]), int(owners[-1]))
        for image_start in range(first // tile_size * tile_size, last + 1, tile_size):
            image_range = slice(image_start, min(image_start + tile_size, len(images)))
            scores = _pad_tile(images[image_range].float(), tile_size) @ text_tile.T
            tile_texts = ((owners >= image_start) & (owners < image_range.stop)).nonzero()[:, 0]
            positives = owners[tile_texts] - image_start, tile_texts
            yield image_range, text_range, scores[: image_range.stop - image_start, : len(owners)], positives


def _pad_tile(vectors: Tensor, size: int) -> Tensor:
    """Pad with zero vectors to `size`, because equal vectors get equal scores only in matmuls of the same shape."""
    return vectors if len(vectors) == size else F.pad(vectors, (0, 0, 0, size - len(vectors)))


def _is_at_least(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return `scores >= threshold` as floats, because floats can be summed ten times as fast as booleans."""
    return torch.ge(scores, threshold, out=torch.empty_like(scores))


def check_embeddings_are_finite(*embeddings: Tensor) -> None:
    """Raise ValueError if an embedding contains NaN or infinity.

    A model that returns NaN would get perfect ranks, because comparisons with NaN are always false.
    """
    for vectors in embeddings:
        if not all(torch.isfinite(part).all() for part in vectors.split(8192)):
            raise ValueError("the model is broken: an embedding contains NaN or infinity")


# ---- recall ----------------------------------------------------------------------------------------------------------


def retrieval_metrics(
    image_ranks: Tensor, text_ranks: Tensor, image_of_text: Sequence[int] | Tensor
) -> dict[str, dict[str, Any]]:
    """Compute recall in both directions from the ranks of `two_way_ranks`, with chance levels and 95% intervals.

    Returns:
        {"I2T": {"R@1": ..., "median rank": ...}, "T2I": ..., "I2T chance": {"R@1": ...}, "T2I chance": ...,
        "I2T interval": {"R@1": (low, high), ...}, "T2I interval": ...}. Recall is in percent. Median ranks start at 1.
    """
    owner = torch.as_tensor(image_of_text)
    metrics: dict[str, dict[str, Any]] = {}
    for direction, ranks, groups in (("I2T", image_ranks, torch.arange(len(image_ranks))), ("T2I", text_ranks, owner)):
        metrics[direction] = compute_recall(ranks) | {"median rank": float(ranks.double().quantile(0.5)) + 1}
        metrics[f"{direction} interval"] = compute_recall_intervals(ranks, groups)
    captions_per_image = torch.bincount(owner, minlength=len(image_ranks)).tolist()
    metrics["I2T chance"] = compute_chance_recall(captions_per_image, len(owner))
    metrics["T2I chance"] = compute_chance_recall([1] * len(owner), len(image_ranks))
    return metrics


def compute_recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return R@k: the percentage of queries for which a correct item is among the top k items."""
    return {f"R@{k}": 100.0 * float((ranks < k).double().mean()) for k in ks}


def compute_chance_recall(positives: Sequence[int], num_items: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the expected R@k, in percent, if `num_items` items are ranked at random.

    For a query with p correct items, the expected R@k is 1 - C(num_items - p, k) / C(num_items, k). `positives`
    contains p for each query.
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


def compute_recall_intervals(ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS) -> dict[str, tuple[float, float]]:
    """Return 95% bootstrap confidence intervals for R@k, in percent.

    `groups` contains the image index of each query. Images are resampled together with all their queries, because
    captions of the same image are correlated.
    """
    return _bootstrap_recall_by_image([(ranks < k).double() for k in ks], groups, ks, (0.0, 1.0))


def compute_recall_differences(
    ranks: Tensor, baseline_ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return a model's R@k minus a baseline's R@k, in percentage points, and paired 95% bootstrap intervals."""
    differences = [(ranks < k).double() - (baseline_ranks < k).double() for k in ks]
    means = {f"R@{k}": 100.0 * float(d.mean()) for k, d in zip(ks, differences, strict=True)}
    return means, _bootstrap_recall_by_image(differences, groups, ks, (-1.0, 1.0))


def _bootstrap_recall_by_image(
    values: Sequence[Tensor], groups: Tensor, ks: Sequence[int], bounds: tuple[float, float]
) -> dict[str, tuple[float, float]]:
    stacked = torch.stack(list(values), 1)  # (Q, K)
    sums = stacked.new_zeros(int(groups.max()) + 1, len(ks)).index_add_(0, groups, stacked)
    low, high = (100 * bootstrap_intervals(sums, torch.bincount(groups), bounds)).tolist()
    return {f"R@{k}": (low[n], high[n]) for n, k in enumerate(ks)}


# ---- average precision -----------------------------------------------------------------------------------------------


def compute_average_precision(ranks: Tensor) -> float:
    """Return the average precision of a ranking, between 0 and 1.

    The average precision is the mean of n / r_n, where r_n is the one-based rank of the n-th relevant image. `ranks`
    contains the zero-based ranks of all relevant images in ascending order, int64 of shape (P,).
    """
    positions = torch.arange(1, len(ranks) + 1, dtype=torch.float64)
    return float((positions / (ranks + 1)).mean())


def compute_chance_average_precision(num_relevant: int, num_images: int) -> float:
    """Return the expected average precision of a random ranking.

    Let P of N images be relevant. If the image at rank r is relevant, then each of the r - 1 images before it is
    relevant with probability (P - 1) / (N - 1), so the expected precision at rank r is
    (1 + (r - 1) (P - 1) / (N - 1)) / r. Averaging over all ranks r yields the expected average precision.
    """
    positions = torch.arange(1, num_images + 1, dtype=torch.float64)
    precisions = (1 + (positions - 1) * (num_relevant - 1) / max(1, num_images - 1)) / positions
    return float(precisions.mean())


def compute_mean_interval(scores: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> tuple[float, float]:
    """Return a 95% bootstrap confidence interval, in percent, for the mean of the scores of Q queries.

    Queries are resampled, but images are not. To compare two models, pass the differences between their scores, and
    `bounds=(-1, 1)`.
    """
    low, high = (100 * bootstrap_intervals(scores[:, None], torch.ones(len(scores)), bounds)).flatten().tolist()
    return low, high


# ---- bootstrap -------------------------------------------------------------------------------------------------------


def bootstrap_intervals(sums: Tensor, counts: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Return 95% bootstrap confidence intervals for the means of K quantities over all elements.

    Groups of elements, such as all captions of an image, are resampled as a whole.

    Args:
        sums: Sum of each quantity within each group, of shape (groups, K).
        counts: Number of elements in each group, of shape (groups,). Groups without elements are ignored.
        bounds: Smallest and largest possible value of a quantity for one element.

    Returns:
        Lower and upper bounds of the intervals, float64 of shape (2, K).
    """
    # One matmul per resample is 1.5 to 5 times as fast as scipy.stats.bootstrap, which copies the resampled rows.
    sums, counts = sums.double()[counts > 0], counts.double()[counts > 0]
    means = [weights @ sums / (weights @ counts) for weights in draw_bootstrap_counts(len(sums))]
    return compute_percentile_interval(torch.stack(means), len(sums), bounds)


def draw_bootstrap_counts(num_groups: int, num_resamples: int = 1000) -> Iterator[Tensor]:
    """Yield, for each resample, how often each group was drawn, float64 of shape (num_groups,).

    The draws depend only on the arguments, so models that are evaluated on the same data get paired resamples.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_resamples):
        drawn = torch.randint(num_groups, (num_groups,), generator=generator)
        yield torch.bincount(drawn, minlength=num_groups).double()


def compute_percentile_interval(means: Tensor, num_groups: int, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Return central 95% bootstrap confidence intervals of the mean, using Efron's percentile method.

    If all groups have the same mean, such as 0% or 100%, the percentile interval would be a single point. In that case,
    the limits are the means that would result if a fraction p of the groups had the minimum or the maximum value in
    `bounds`. p = 1 - 0.025 ** (1 / n) is the Clopper-Pearson upper bound for 0 successes in n = `num_groups` trials.

    `means` has shape (resamples, ...) and contains the mean of each resample. The result has shape (2, ...) and
    contains the lower and upper bounds.
    """
    quantiles = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=means.dtype)
    interval = means.quantile(quantiles, 0)
    largest_share = 1 - ((1 - LEVEL) / 2) ** (1 / num_groups)
    limits = torch.stack([torch.full_like(means[0], bound) for bound in bounds])  # (2, ...)
    widened = means[:1] + largest_share * (limits - means[:1])
    is_constant = means.amax(0) - means.amin(0) < 1e-9 * (bounds[1] - bounds[0])
    return torch.where(is_constant, widened, interval)


@dataclass(frozen=True)
class BootstrapMetrics:
    """Metrics in percent, with their values in bootstrap resamples of the images."""

    images: tuple[int | str, ...]
    """Index or id of each evaluated image. Used to check that two models were evaluated on the same images."""
    values: Mapping[str, float]
    resamples: Mapping[str, np.ndarray]
    """Value of each metric in each resample, float64 of shape (resamples,). Undefined values are NaN.
    Metrics that are not in `resamples` have no confidence interval."""

    @classmethod
    def from_function(
        cls, images: Sequence[int | str], names: Sequence[str], compute: Callable[[np.ndarray], Sequence[float]]
    ) -> BootstrapMetrics:
        """Call `compute(weights)`, which must count image i `weights[i]` times and return metrics in `names` order."""
        samples = np.array([compute(weights.numpy()) for weights in draw_bootstrap_counts(len(images))], np.float64)
        values = [float(value) for value in compute(np.ones(len(images)))]
        return cls(tuple(images), dict(zip(names, values, strict=True)), dict(zip(names, samples.T, strict=True)))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        return {name: self._compute_interval(samples, (0.0, 100.0)) for name, samples in self.resamples.items()}

    def to_summary_row(self, method: str) -> dict[str, Any]:
        return {"method": method, "metrics": dict(self.values), "intervals": self.intervals}

    def subtract(self, baseline: BootstrapMetrics) -> dict[str, Any]:
        """Return the metrics minus the baseline's metrics, in percentage points, with paired 95% intervals.

        Returns:
            {"metrics": {NAME: difference}, "intervals": {NAME: (low, high)}}. "intervals" is empty if the models were
            evaluated on different images.
        """
        names = [name for name in self.values if name in baseline.values]
        intervals = {}
        for name in names:
            if self.images == baseline.images and name in self.resamples:
                differences = self.resamples[name] - baseline.resamples[name]
                intervals[name] = self._compute_interval(differences, (-100.0, 100.0))
        metrics = {name: self.values[name] - baseline.values[name] for name in names}
        return {"metrics": metrics, "intervals": intervals}

    def _compute_interval(self, samples: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float]:
        defined = torch.from_numpy(samples[~np.isnan(samples)])
        low, high = compute_percentile_interval(defined, len(self.images), bounds).tolist()
        return low, high
