"""Retrieval ranks, recall, chance levels, intervals and error analysis, compared with full sorts and direct counts."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from format_fixtures import image_bytes
from llm2clip.data.image_refs import InMemoryImage
from llm2clip.data.records import Record
from llm2clip.evaluate.metrics import (
    BootstrapMetrics,
    compute_positive_ranks,
    compute_recall,
    compute_recall_differences,
    compute_recall_intervals,
    retrieval_metrics,
    two_way_ranks,
)
from llm2clip.evaluate.retrieval import (
    RetrievalRanks,
    analyse_retrieval_errors,
    compute_recall_by_length,
    find_worst_captions,
    make_caption_length_bins,
    measure_caption_lengths,
)


def rank_by_sorting(scores: torch.Tensor, positives: list[int]) -> int:
    """Return the rank of the best positive in a full sort, with wrong answers first among equal scores."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j in positives))
    return next(rank for rank, j in enumerate(order) if j in positives)


@pytest.mark.parametrize("tile_size", [8, 16, 512])
@pytest.mark.parametrize("in_order", [True, False])
def test_two_way_ranks_match_sorting(tile_size: int, in_order: bool) -> None:
    """Different numbers of captions, in the order of their images or not, and some equal embeddings."""
    g = torch.Generator().manual_seed(tile_size)
    owner = torch.cat([torch.arange(13), torch.randint(13, (28,), generator=g)])
    owner = owner.sort().values if in_order else owner[torch.randperm(41, generator=g)]
    images = F.normalize(torch.randn(13, 6, generator=g), dim=-1)
    texts = F.normalize(images[owner] + torch.randn(41, 6, generator=g), dim=-1)
    texts[7], images[4] = texts[30], images[9]
    image_ranks, text_ranks = two_way_ranks(images, texts, owner.tolist(), tile_size)
    exact = images @ texts.T
    for i in range(13):
        assert image_ranks[i] == rank_by_sorting(exact[i], (owner == i).nonzero()[:, 0].tolist())
    for t in range(41):
        assert text_ranks[t] == rank_by_sorting(exact[:, t], [int(owner[t])])
    half = two_way_ranks(images.half(), texts.half(), owner, tile_size)
    full = two_way_ranks(images.half().float(), texts.half().float(), owner, tile_size)
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1])


def test_two_way_ranks_reject_images_without_text_and_infinite_values() -> None:
    for owner in ([0, 0], [0, 2], [0, 1, 2]):
        with pytest.raises(ValueError, match="must have a text"):
            two_way_ranks(torch.eye(2), torch.eye(2), owner)
    with pytest.raises(ValueError, match="NaN or infinity"):
        two_way_ranks(torch.eye(2), torch.full((2, 2), torch.inf), [0, 1])


def test_recall_intervals_resample_images_not_captions() -> None:
    """If all captions of an image succeed or fail together, intervals are as wide as the binomial ones of images."""
    g = torch.Generator().manual_seed(0)
    hit = torch.rand(400, generator=g) < 0.3
    ranks, groups = (1 - hit.long()).repeat_interleave(5), torch.arange(400).repeat_interleave(5)
    low, high = compute_recall_intervals(ranks, groups, (1,))["R@1"]
    mean = float(hit.double().mean())
    half_width = 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert (low, high) == pytest.approx((100 * (mean - half_width), 100 * (mean + half_width)), abs=0.7)
    single = compute_recall_intervals(1 - hit.long(), torch.arange(400), (1,))["R@1"]
    assert single == pytest.approx((low, high), abs=1e-9)  # the same resamples of the same images
    narrow = compute_recall_intervals(ranks, torch.arange(2000), (1,))["R@1"]
    assert narrow[1] - narrow[0] < 0.6 * (high - low)


def test_retrieval_metrics_on_a_small_example() -> None:
    """Three images, of which the second has two captions; the last caption is nearer to the first image."""
    images = torch.eye(3)
    texts = F.normalize(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0.1, 1, 0], [1, 0, 0.5]]), dim=-1)
    owner = [0, 1, 1, 2]
    metrics = retrieval_metrics(*two_way_ranks(images, texts, owner), owner)
    assert metrics["T2I"] == {"R@1": 75.0, "R@5": 100.0, "R@10": 100.0, "median rank": 1.0}
    assert metrics["I2T"]["R@1"] == metrics["I2T interval"]["R@1"][1] == 100.0
    low, high = metrics["T2I interval"]["R@1"]
    assert 0 <= low < 75 < high <= 100
    assert metrics["T2I chance"]["R@1"] == pytest.approx(100 / 3)
    assert metrics["I2T chance"]["R@1"] == pytest.approx(100 * (1 + 2 + 1) / 4 / 3)
    assert metrics["I2T chance"]["R@10"] == 100


@pytest.mark.parametrize("num_images", [1, 3, 40, 1000])
def test_recall_intervals_at_0_and_100_percent_match_scipy(num_images: int) -> None:
    """The captions of an image are correlated, so the number of images counts, not the number of captions."""
    groups = torch.arange(num_images).repeat_interleave(5)
    for hits in (0, num_images):
        ranks = torch.full((5 * num_images,), 0 if hits else 7)
        expected = binomtest(hits, num_images).proportion_ci(method="exact")
        assert compute_recall_intervals(ranks, groups, (1,))["R@1"] == pytest.approx(
            [100 * limit for limit in expected]
        )


def test_bootstrap_metrics_at_0_and_100_percent_match_scipy() -> None:
    metrics = BootstrapMetrics.from_function(range(40), ["none", "all"], lambda weights: (0.0, 100.0))
    for name, hits in (("none", 0), ("all", 40)):
        expected = binomtest(hits, 40).proportion_ci(method="exact")
        assert metrics.intervals[name] == pytest.approx([100 * limit for limit in expected])
    limit = 100 * binomtest(0, 40).proportion_ci(method="exact").high
    difference = metrics.subtract(metrics)
    assert difference["metrics"] == {"none": 0.0, "all": 0.0}
    assert difference["intervals"]["all"] == pytest.approx((-limit, limit))


def test_recall_differences_are_paired_by_image() -> None:
    g = torch.Generator().manual_seed(0)
    groups = torch.arange(300).repeat_interleave(2)
    ranks = torch.randint(0, 3, (600,), generator=g)
    other = torch.where(torch.rand(600, generator=g) < 0.1, 2, ranks)
    differences, intervals = compute_recall_differences(ranks, other, groups, (1, 5))
    assert differences["R@1"] == pytest.approx(compute_recall(ranks, (1,))["R@1"] - compute_recall(other, (1,))["R@1"])
    per_image = ((ranks < 1).double() - (other < 1).double()).view(300, 2).mean(1)
    half_width = 196 * float(per_image.std()) / 300**0.5
    low, high = intervals["R@1"]
    assert (low, high) == pytest.approx((differences["R@1"] - half_width, differences["R@1"] + half_width), abs=0.3)
    widths = [h - low for low, h in (compute_recall_intervals(r, groups, (1,))["R@1"] for r in (ranks, other))]
    assert high - low < 0.6 * min(widths), "narrower than the interval of either model"
    limit = 100 * binomtest(0, 300).proportion_ci(method="exact").high
    assert differences["R@5"] == 0 and intervals["R@5"] == pytest.approx((-limit, limit)), "all hits are equal"


def test_two_way_ranks_are_worst_if_all_scores_are_equal() -> None:
    embeddings = torch.ones(10, 4) / 2
    ranks, text_ranks = two_way_ranks(embeddings, embeddings, range(10))
    assert ranks.tolist() == text_ranks.tolist() == [9] * 10
    assert compute_recall(ranks) == {"R@1": 0.0, "R@5": 0.0, "R@10": 100.0}


def test_positive_ranks_reject_queries_without_positive_and_nan() -> None:
    """No score is greater than NaN, so without the check every rank would be 0 and recall 100%."""
    with pytest.raises(ValueError, match="query 1 has no positive item"):
        compute_positive_ranks(torch.eye(2), torch.eye(2), [[0], []])
    with pytest.raises(ValueError, match="NaN or infinity"):
        compute_positive_ranks(torch.full((3, 2), torch.nan), torch.eye(2), [[0]] * 3)


def test_recall_intervals_ignore_images_without_captions() -> None:
    """Image indices with gaps, as they occur for captions of one length."""
    ranks, groups = torch.tensor([0, 3, 0, 1, 0, 2]), torch.tensor([0, 0, 1, 2, 2, 3])
    assert compute_recall_intervals(ranks, groups, (1,)) == compute_recall_intervals(ranks, 3 * groups, (1,))


# ---- error analysis --------------------------------------------------------------------------------------------------


def test_length_bins_have_about_as_many_captions_each() -> None:
    assert make_caption_length_bins(list(range(1, 101))) == [(1, 20), (21, 40), (41, 60), (61, 80), (81, 100)]
    assert (
        make_caption_length_bins(list(range(1, 241)))[-1] == (201, 240)
        and len(make_caption_length_bins(list(range(1, 241)))) == 6
    )
    assert make_caption_length_bins([7] * 100) == [(7, 7)]
    assert make_caption_length_bins([3, 9, 5]) == [(3, 9)]
    assert make_caption_length_bins([5] * 50 + [8] * 50) == [(5, 7), (8, 8)]
    assert make_caption_length_bins([1] + [2] * 59 + [3] * 60) == [(1, 2), (3, 3)], "no bin of a single caption"
    assert make_caption_length_bins([2] * 60 + [3] * 59 + [9]) == [(2, 2), (3, 9)]


def test_caption_lengths_are_in_words_or_characters() -> None:
    assert measure_caption_lengths(["a dog runs", "two words"]) == ("words", [3, 2])
    assert measure_caption_lengths(["一只狗在草地上奔跑", "两只猫"]) == ("characters", [9, 3])
    assert measure_caption_lengths(["dog", "cat", "a bird"]) == ("words", [1, 1, 2])


@pytest.fixture
def ranks() -> RetrievalRanks:
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(12).repeat_interleave(5)
    images = F.normalize(torch.randn(12, 6, generator=g), dim=-1)
    texts = F.normalize(images[owner] + 1.2 * torch.randn(60, 6, generator=g), dim=-1)
    captions = [" ".join(["word"] * (1 + 2 * (n % 6))) for n in range(60)]
    records = [
        Record(str(n), InMemoryImage(image_bytes(n), f"{n}.jpg"), tuple(captions[5 * n : 5 * n + 5])) for n in range(12)
    ]
    return RetrievalRanks(records, images, texts, owner, *two_way_ranks(images, texts, owner))


def test_recall_by_length_counts_captions_of_each_bin(ranks: RetrievalRanks) -> None:
    _, lengths = measure_caption_lengths(ranks.captions)
    bins = [(1, 4), (5, 11)]
    for (first, last), (value, low, high) in zip(bins, compute_recall_by_length(ranks, lengths, bins), strict=True):
        hits = [int(r) == 0 for r, length in zip(ranks.text_ranks, lengths, strict=True) if first <= length <= last]
        assert value == pytest.approx(100 * sum(hits) / len(hits)) and low <= value <= high


def test_worst_captions_are_of_different_images(ranks: RetrievalRanks) -> None:
    captions = find_worst_captions(ranks, 4)
    worst_rank = {i: int(ranks.text_ranks[ranks.image_of_text == i].max()) for i in range(12)}
    assert len({int(ranks.image_of_text[t]) for t in captions}) == 4
    assert [int(ranks.text_ranks[t]) for t in captions] == sorted(worst_rank.values(), reverse=True)[:4]
    failures = find_worst_captions(ranks, 99)  # all failures, and no hits
    assert len(failures) == sum(rank > 0 for rank in worst_rank.values())
    assert all(ranks.text_ranks[t] > 0 for t in failures)


def test_analyse_errors_shows_top_images_and_the_correct_one(ranks: RetrievalRanks) -> None:
    analysis = analyse_retrieval_errors(ranks, num_queries=3)
    assert [example.title for example in analysis.examples] == [ranks.captions[t] for t in (0, 29, 59)]
    scores = ranks.images @ ranks.texts[29]
    best = scores.argsort(descending=True)[:5].tolist()
    images = analysis.examples[1].images
    assert [image.is_correct for image in images[:5]] == [i == 5 or None for i in best]
    assert sum(image.is_correct is True for image in images) == 1, "the caption's own image is among them, or appended"
    assert images[0].caption == f"1. cosine {float(scores.max()):.2f}" and all(image.jpeg for image in images)
    unit, lengths = measure_caption_lengths(ranks.captions)
    assert (analysis.length_unit, analysis.length_bins) == (unit, make_caption_length_bins(lengths))
    assert analysis.recall_by_length == compute_recall_by_length(ranks, lengths, analysis.length_bins)
    last = analysis.failures[0].images[-1]  # the correct image, after the top five
    assert len(analysis.failures) == 3 and len(analysis.failures[0].images) == 6 and last.is_correct
    assert last.caption.startswith(f"{int(ranks.text_ranks.max()) + 1}. cosine ")
    assert analyse_retrieval_errors(ranks, num_queries=0).examples == []
