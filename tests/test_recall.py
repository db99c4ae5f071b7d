"""Recall against sorting everything in float64, with ragged captions, ties and tiles; chance."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llm2clip.evaluate.ranks import positive_ranks, two_way_ranks
from llm2clip.evaluate.recall import chance_recall, evaluate_retrieval, percentile_interval, recall, recall_intervals


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


@pytest.mark.parametrize("tile", [8, 16, 512])
@pytest.mark.parametrize("in_order", [True, False])
def test_both_ways_at_once(tile: int, in_order: bool) -> None:
    """Ragged captions, in the order of their images or not, and vectors of which some are equal."""
    g = torch.Generator().manual_seed(tile)
    owner = torch.cat([torch.arange(13), torch.randint(13, (28,), generator=g)])
    owner = owner.sort().values if in_order else owner[torch.randperm(41, generator=g)]
    images = F.normalize(torch.randn(13, 6, generator=g), dim=-1)
    texts = F.normalize(images[owner] + torch.randn(41, 6, generator=g), dim=-1)
    texts[7], images[4] = texts[30], images[9]
    of_image, of_text = two_way_ranks(images, texts, owner.tolist(), tile)
    exact = images @ texts.T
    for i in range(13):
        assert of_image[i] == sorted_rank(exact[i], (owner == i).nonzero()[:, 0].tolist())
    for t in range(41):
        assert of_text[t] == sorted_rank(exact[:, t], [int(owner[t])])
    assert torch.equal(of_text, positive_ranks(texts, images, [[int(i)] for i in owner], tile))
    half = two_way_ranks(images.half(), texts.half(), owner, tile)
    full = two_way_ranks(images.half().float(), texts.half().float(), owner, tile)
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


def test_each_image_needs_a_text() -> None:
    for owner in ([0, 0], [0, 2]):
        with pytest.raises(ValueError, match="each needs a text"):
            two_way_ranks(torch.eye(2), torch.eye(2), owner)
    with pytest.raises(ValueError, match="not finite"):
        two_way_ranks(torch.eye(2), torch.full((2, 2), torch.inf), [0, 1])


def test_intervals_draw_images_and_not_captions() -> None:
    """Images whose captions all hit or all miss: as wide as of the images alone, by the binomial's own spread."""
    g = torch.Generator().manual_seed(0)
    hit = torch.rand(400, generator=g) < 0.3
    ranks, groups = (1 - hit.long()).repeat_interleave(5), torch.arange(400).repeat_interleave(5)
    low, high = recall_intervals(ranks, groups, (1,), resamples=4000)["R@1"]
    share = float(hit.double().mean())
    spread = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert (low, high) == pytest.approx((100 * (share - spread), 100 * (share + spread)), abs=0.5)
    single = recall_intervals(1 - hit.long(), torch.arange(400), (1,), resamples=4000)["R@1"]
    assert single == pytest.approx((low, high), abs=1e-9)  # the same draws of the same images
    narrow = recall_intervals(ranks, torch.arange(2000), (1,))["R@1"]
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


def test_figures_of_a_small_case() -> None:
    """Three images, the second with two captions; the last caption is nearer to the first image."""
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.1, 1, 0], [1, 0, 0.5]]), dim=-1)
    figures = evaluate_retrieval(images, texts, [0, 1, 1, 2])
    assert figures["T2I"] == {"R@1": 75.0, "R@5": 100.0, "R@10": 100.0, "median rank": 1.0}
    assert figures["I2T"]["R@1"] == 100.0 and figures["I2T interval"]["R@1"] == (100.0, 100.0)
    low, high = figures["T2I interval"]["R@1"]
    assert 0 <= low < 75 < high <= 100
    assert figures["T2I chance"]["R@1"] == pytest.approx(100 / 3)
    assert figures["I2T chance"]["R@1"] == pytest.approx(100 * (1 + 2 + 1) / 4 / 3)
    assert figures["I2T chance"]["R@10"] == 100


def test_the_ends_are_the_percentiles() -> None:
    means = torch.rand(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = np.percentile(means.numpy(), [2.5, 97.5], axis=0)
    assert torch.allclose(percentile_interval(means), torch.from_numpy(expected))


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
    figures = evaluate_retrieval(images, texts, image_of_text)
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
        assert chance_recall([right], items, (k,))[f"R@{k}"] == pytest.approx(100 * sum(hits) / len(hits))


def test_chance_of_ragged_captions_is_the_mean_of_each() -> None:
    assert chance_recall([1, 2, 2], 6, (1,))["R@1"] == pytest.approx(100 * 5 / 18)


def test_images_without_a_caption_change_no_interval() -> None:
    """Image numbers with gaps, as of captions of one length alone."""
    ranks, groups = torch.tensor([0, 3, 0, 1, 0, 2]), torch.tensor([0, 0, 1, 2, 2, 3])
    assert recall_intervals(ranks, groups, (1,)) == recall_intervals(ranks, 3 * groups, (1,))
