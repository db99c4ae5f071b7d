"""Recall against sorting everything in float64, with ragged captions, ties and tiles; chance."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from llm2clip.evaluate.retrieval import chance, positive_ranks, recall, retrieval


def sorted_rank(scores: torch.Tensor, positives: list[int]) -> int:
    """Sort all; the place of the first positive, wrong answers first among equals."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j in positives))
    return next(n for n, j in enumerate(order) if j in positives)


@pytest.mark.parametrize("tile", [3, 7, 4096])
def test_ranks_with_ragged_positives(tile: int) -> None:
    g = torch.Generator().manual_seed(0)
    queries, items = (F.normalize(torch.randn(n, 6, generator=g), dim=-1) for n in (20, 37))
    positives = [sorted(torch.randperm(37, generator=g)[: 1 + i % 4].tolist()) for i in range(20)]
    ranks = positive_ranks(queries, items, positives, tile)
    exact = queries.double() @ items.double().T
    assert ranks.tolist() == [sorted_rank(exact[i], p) for i, p in enumerate(positives)]


def test_a_model_that_says_the_same_of_everything_is_at_the_bottom() -> None:
    same = torch.ones(10, 4) / 2
    ranks = positive_ranks(same, same, [[i] for i in range(10)])
    assert ranks.tolist() == [9] * 10
    assert recall(ranks) == {"R@1": 0.0, "R@5": 0.0, "R@10": 100.0}


def test_six_captions_of_one_image_shift_nothing() -> None:
    """COCO's images have 5, 6 or 7 captions: reshaping to (N, 5) would misalign all that follow."""
    counts = [5, 6, 7, 5, 2]
    image_of_text = [i for i, n in enumerate(counts) for _ in range(n)]
    images = torch.eye(5)
    texts = images[image_of_text]
    figures = retrieval(images, texts, image_of_text)
    assert figures["I2T"]["R@1"] == figures["T2I"]["R@1"] == 100.0


def test_a_query_without_an_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="query 1"):
        positive_ranks(torch.eye(2), torch.eye(2), [[0], []])


def test_a_broken_model_is_not_perfect() -> None:
    """Nothing is above NaN: counted naively, every rank would be 0 and recall 100%."""
    with pytest.raises(ValueError, match="not finite"):
        positive_ranks(torch.full((3, 2), torch.nan), torch.eye(2), [[0]] * 3)


@pytest.mark.parametrize(("items", "right"), [(6, 1), (6, 2), (7, 3)])
def test_chance_is_the_mean_over_all_orders(items: int, right: int) -> None:
    for k in (1, 2, 5):
        hits = [any(i < right for i in drawn) for drawn in itertools.combinations(range(items), k)]
        assert chance([right], items, (k,))[f"R@{k}"] == pytest.approx(100 * sum(hits) / len(hits))
