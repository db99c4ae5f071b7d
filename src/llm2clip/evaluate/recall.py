"""Retrieval ranks, and the recall, chance levels and confidence intervals computed from them.

The score matrix is computed in tiles and never stored in full. Scores are not sorted: a rank is the number of wrong
answers that score at least as high as the best correct answer. Both retrieval directions use the same tiles. Ties count
against the model, so a model that assigns the same score to every pair gets the worst possible ranks.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.evaluate.bootstrap import bootstrap_intervals

KS = (1, 5, 10)
TILE = 512  # images per tile; with four times as many texts, a tile's float32 scores (4 MB) fit in the CPU cache
QUERY_TILE = 32  # number of queries that `compute_positive_ranks` scores at a time


@onednn_matmul()
def compute_positive_ranks(
    queries: Tensor,
    items: Tensor,
    positives: Sequence[Sequence[int]],
    tile_size: int = 2 * TILE,
    self_index: Sequence[int] | None = None,
) -> list[Tensor]:
    """Return the zero-based ranks of each query's positives, from which recall and mAP can be computed.

    An item can be a positive for several queries. For images and captions, `two_way_ranks` computes the rank of each
    query's best positive in both directions in one pass.

    Args:
        queries: Query embeddings of shape (Q, D), L2-normalised.
        items: Item embeddings of shape (N, D), L2-normalised.
        positives: Indices of each query's correct items (at least one). For example, if 3 images have 2, 1 and 2
            captions, the positives for image-to-text retrieval are [[0, 1], [2], [3, 4]].
        tile_size: Number of items per matmul. Scores for `QUERY_TILE` queries and all items are kept in memory.
        self_index: Index of one item per query that is excluded from its ranking: the query itself, if it is an item.

    Returns:
        For each query, the ranks of its P positives in ascending order, int64 of shape (P,).

    Raises:
        ValueError: If a query has no positive, or an embedding contains NaN or infinity.
    """
    for n, indices in enumerate(positives):
        if len(indices) == 0:
            raise ValueError(f"query {n} has no positive item")
    check_finite(queries, items)
    ranks = []
    for start in range(0, len(queries), QUERY_TILE):
        query_tile = _pad_tile(queries[start : start + QUERY_TILE].float(), QUERY_TILE)
        tiles = []
        for offset in range(0, len(items), tile_size):
            tile_scores = query_tile @ _pad_tile(items[offset : offset + tile_size].float(), tile_size).T
            tiles.append(tile_scores[:, : len(items) - offset])
        scores = torch.cat(tiles, 1)  # (QUERY_TILE, N)
        for query in range(start, min(start + QUERY_TILE, len(queries))):
            query_scores = scores[query - start]
            if self_index is not None:
                query_scores[self_index[query]] = -torch.inf
            ranks.append(_rank_positives(query_scores, torch.as_tensor(positives[query])))
    return ranks


def _rank_positives(scores: Tensor, positives: Tensor) -> Tensor:
    """Return the zero-based ranks of the positives in ascending order, given the scores of all N items."""
    positive_scores = scores[positives].sort().values  # ascending
    negative_scores = scores.index_fill(0, positives, -torch.inf)
    # For each negative, count the positives that it beats: those whose score is not higher.
    num_beaten = torch.bucketize(negative_scores, positive_scores, right=True)
    negatives_by_beaten = torch.bincount(num_beaten, minlength=len(positives) + 1)
    # Counting from 0, positive n (of P, best first) is beaten by the negatives that beat at least P - n positives.
    negatives_before = negatives_by_beaten.flip(0).cumsum(0)[:-1]
    return negatives_before + torch.arange(len(positives))


@onednn_matmul()
def two_way_ranks(
    images: Tensor,
    texts: Tensor,
    image_of_text: Sequence[int] | Tensor,
    tile_size: int = TILE,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the zero-based ranks of each image's best caption and of each caption's image.

    Args:
        images: Image embeddings of shape (I, D), L2-normalised, float32 or float16. Scores are computed in float32.
        texts: Text embeddings of shape (T, D), L2-normalised, float32 or float16. Sorting them by image avoids a copy.
        image_of_text: Image index of each text. Every image must have at least one text.
        tile_size: Number of images per tile. Must be a multiple of 16, or identical vectors may get different scores.
        device: Device for the matmuls. Default: the device of `images`.

    Returns:
        Image ranks of shape (I,) and text ranks of shape (T,), both int64 on the CPU.

    Raises:
        ValueError: If an image has no text, or an embedding contains NaN or infinity.
    """
    owner = torch.as_tensor(image_of_text)
    counts = torch.bincount(owner, minlength=len(images))
    if len(counts) > len(images) or not counts.all():
        raise ValueError(
            f"each of the {len(images)} images must have a text, and each text must belong to one of these images"
        )
    check_finite(images, texts)
    tiles = _ScoreTiles(images, texts, owner, tile_size, torch.device(device or images.device))
    best_image, best_text = _compute_best_match_scores(tiles)

    # Counts of wrong answers are stored as float32, which is exact up to 2**24.
    image_counts, text_counts = torch.zeros_like(best_image), torch.zeros_like(best_text)
    for j in range(tiles.num_columns):
        text_tile, text_range = tiles.get_texts(j), tiles.text_range(j)
        for i in range(tiles.num_rows):
            scores, image_range = tiles.get_images(i) @ text_tile.T, tiles.image_range(i)
            scores[tiles.find_positives(i, j)] = -torch.inf
            scores[len(images) - image_range.start :] = -torch.inf  # ignore the padding
            scores[:, len(texts) - text_range.start :] = -torch.inf
            image_counts[image_range] += _is_at_least(scores, best_image[image_range, None]).sum(1)
            text_counts[text_range] += _is_at_least(scores, best_text[text_range]).sum(0)
    image_ranks = image_counts[: len(images)].long().cpu()
    text_ranks = text_counts[: len(texts)].long().cpu()
    if tiles.order is not None:
        text_ranks = torch.empty_like(text_ranks).index_copy_(0, tiles.order, text_ranks)
    return image_ranks, text_ranks


class _ScoreTiles:
    """Image-text score matrix, divided into tiles. Each tile has `tile_size` images and 4 * `tile_size` texts.

    Because texts are sorted by image, only a few tiles contain positives.
    """

    def __init__(self, images: Tensor, texts: Tensor, owner: Tensor, tile_size: int, device: torch.device) -> None:
        self._images, self._texts, self._device = images, texts, device
        self.num_images = len(images)
        self.height, self.width = tile_size, 4 * tile_size
        self.num_rows = -(-len(images) // self.height)
        self.num_columns = -(-len(texts) // self.width)
        is_sorted = bool((owner[1:] >= owner[:-1]).all())
        self.order = None if is_sorted else owner.argsort(stable=True)
        self.owner = (owner if self.order is None else owner[self.order]).to(device)

    def image_range(self, i: int) -> slice:
        return slice(i * self.height, (i + 1) * self.height)

    def text_range(self, j: int) -> slice:
        return slice(j * self.width, (j + 1) * self.width)

    def get_images(self, i: int) -> Tensor:
        """Return the image embeddings for row `i` of the grid, float32 of shape (height, D), zero-padded."""
        return _pad_tile(self._images[self.image_range(i)].to(self._device, torch.float32), self.height)

    def get_texts(self, j: int) -> Tensor:
        """Return the text embeddings for column `j` of the grid, float32 of shape (width, D), zero-padded."""
        text_range = self.text_range(j)
        texts = self._texts[text_range if self.order is None else self.order[text_range]]
        return _pad_tile(texts.to(self._device, torch.float32), self.width)

    def find_positives(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Return the row and column indices of the positives within tile (i, j)."""
        rows = self.owner[self.text_range(j)] - i * self.height
        columns = ((rows >= 0) & (rows < self.height)).nonzero()[:, 0]
        return rows[columns], columns

    def find_rows_with_positives(self, j: int) -> range:
        """Return the grid rows whose tiles in column `j` may contain positives."""
        owners = self.owner[self.text_range(j)]
        return range(int(owners[0]) // self.height, int(owners[-1]) // self.height + 1)


def _compute_best_match_scores(tiles: _ScoreTiles) -> tuple[Tensor, Tensor]:
    """Return the scores of each image's best caption and of each caption's image.

    Negatives are later scored by the same matmuls, so ties are exact. Padding in the last tiles gets infinite scores,
    which no negative can reach.
    """
    device = tiles.owner.device
    best_image = torch.full((tiles.num_rows * tiles.height,), torch.inf, device=device)
    best_text = torch.full((tiles.num_columns * tiles.width,), torch.inf, device=device)
    best_image[: tiles.num_images] = -torch.inf
    for j in range(tiles.num_columns):
        text_tile = tiles.get_texts(j)
        for i in tiles.find_rows_with_positives(j):
            rows, columns = tiles.find_positives(i, j)
            scores = (tiles.get_images(i) @ text_tile.T)[rows, columns]
            best_text[columns + j * tiles.width] = scores
            best_image.scatter_reduce_(0, rows + i * tiles.height, scores, "amax")
    return best_image, best_text


def _pad_tile(vectors: Tensor, size: int) -> Tensor:
    """Append zero vectors until there are `size` vectors.

    Matmuls of the same shape round identically, so equal vectors get equal scores.
    """
    return vectors if len(vectors) == size else F.pad(vectors, (0, 0, 0, size - len(vectors)))


def _is_at_least(scores: Tensor, threshold: Tensor) -> Tensor:
    """Return floats (1.0 if score >= threshold, else 0.0), because summing floats is ten times as fast as booleans."""
    return torch.ge(scores, threshold, out=torch.empty_like(scores))


def check_finite(*embeddings: Tensor) -> None:
    """Raise ValueError if an embedding contains NaN or infinity.

    Without this check, a model that outputs NaN would get perfect ranks, because comparisons with NaN are always false.
    """
    for vectors in embeddings:
        if not all(torch.isfinite(part).all() for part in vectors.split(8192)):
            raise ValueError("an embedding contains NaN or infinity: the model is broken")


# ---- recall ----------------------------------------------------------------------------------------------------------


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
        "I2T interval": {"R@1": (low, high), ...}, "T2I interval": ...}. Recall is in percent. Median ranks start at 1.
    """
    owner = torch.as_tensor(image_of_text)
    metrics: dict[str, dict[str, Any]] = {}
    for direction, ranks, groups in (("I2T", image_ranks, torch.arange(len(image_ranks))), ("T2I", text_ranks, owner)):
        metrics[direction] = recall(ranks) | {"median rank": float(ranks.double().quantile(0.5)) + 1}
        metrics[f"{direction} interval"] = compute_recall_intervals(ranks, groups)
    captions_per_image = torch.bincount(owner, minlength=len(image_ranks)).tolist()
    metrics["I2T chance"] = compute_chance_recall(captions_per_image, len(owner))
    metrics["T2I chance"] = compute_chance_recall([1] * len(owner), len(image_ranks))
    return metrics


def recall(ranks: Tensor, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return R@k, the percentage of queries with a positive among the top k items."""
    return {f"R@{k}": 100.0 * float((ranks < k).double().mean()) for k in ks}


def compute_chance_recall(positives: Sequence[int], num_items: int, ks: Sequence[int] = KS) -> dict[str, float]:
    """Return the expected R@k of a random ranking, in percent.

    By the hypergeometric distribution, the expected R@k of a query with p positives is
    1 - C(num_items - p, k) / C(num_items, k). The result is the mean over all queries.

    Args:
        positives: Number of positives (p) of each query.
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


def compute_recall_intervals(ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS) -> dict[str, tuple[float, float]]:
    """Return 95% bootstrap confidence intervals for R@k, in percent.

    Images are resampled, each with all its queries, because results for captions of the same image are correlated.

    Args:
        ranks: Zero-based rank of each query's best positive, int64 of shape (Q,).
        groups: Image index of each query, int64 of shape (Q,).
    """
    return _bootstrap_by_image([(ranks < k).double() for k in ks], groups, ks, (0.0, 1.0))


def compute_recall_differences(
    ranks: Tensor, baseline_ranks: Tensor, groups: Tensor, ks: Sequence[int] = KS
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return R@k of a model minus R@k of a baseline, in percentage points, and paired 95% bootstrap intervals.

    See `compute_recall_intervals` for the arguments.
    """
    differences = [(ranks < k).double() - (baseline_ranks < k).double() for k in ks]
    means = {f"R@{k}": 100.0 * float(d.mean()) for k, d in zip(ks, differences, strict=True)}
    return means, _bootstrap_by_image(differences, groups, ks, (-1.0, 1.0))


def _bootstrap_by_image(
    values: Sequence[Tensor], groups: Tensor, ks: Sequence[int], bounds: tuple[float, float]
) -> dict[str, tuple[float, float]]:
    """Return 95% bootstrap intervals, in percent, for the means of the tensors in `values`, one per k of shape (Q,)."""
    stacked = torch.stack(list(values), 1)  # (Q, K)
    sums = stacked.new_zeros(int(groups.max()) + 1, len(ks)).index_add_(0, groups, stacked)
    low, high = (100 * bootstrap_intervals(sums, torch.bincount(groups), bounds)).tolist()
    return {f"R@{k}": (low[n], high[n]) for n, k in enumerate(ks)}
