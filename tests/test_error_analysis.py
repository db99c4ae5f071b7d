"""Error analysis: recall curves, length bins and retrieved images, compared with direct counts."""

import pytest
import torch
import torch.nn.functional as F

from format_fixtures import image_bytes
from llm2clip.data.image_refs import MemoryImage
from llm2clip.data.records import Record
from llm2clip.evaluate.metrics import recall, two_way_ranks
from llm2clip.evaluate.retrieval import (
    RetrievalRanks,
    analyze_errors,
    compute_recall_by_length,
    find_worst_captions,
    make_length_bins,
    measure_caption_lengths,
)


def test_length_bins_have_about_as_many_captions_each() -> None:
    assert make_length_bins(list(range(1, 101))) == [(1, 20), (21, 40), (41, 60), (61, 80), (81, 100)]
    assert make_length_bins(list(range(1, 241)))[-1] == (201, 240) and len(make_length_bins(list(range(1, 241)))) == 6
    assert make_length_bins([7] * 100) == [(7, 7)]
    assert make_length_bins([3, 9, 5]) == [(3, 9)]
    assert make_length_bins([5] * 50 + [8] * 50) == [(5, 7), (8, 8)]
    assert make_length_bins([1] + [2] * 59 + [3] * 60) == [(1, 2), (3, 3)], "no bin of a single caption"
    assert make_length_bins([2] * 60 + [3] * 59 + [9]) == [(2, 2), (3, 9)]


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
        Record(str(n), MemoryImage(image_bytes(n), f"{n}.jpg"), tuple(captions[5 * n : 5 * n + 5])) for n in range(12)
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


def test_analyze_errors_shows_top_images_and_the_correct_one(ranks: RetrievalRanks) -> None:
    analysis = analyze_errors(ranks, num_queries=3, matrix_size=4)
    rows = [0, 3, 7, 11]
    assert torch.equal(analysis.similarity, ranks.texts[[5 * i for i in rows]] @ ranks.images[rows].T)
    assert [example.title for example in analysis.examples] == [ranks.captions[t] for t in (0, 29, 59)]
    scores = ranks.images @ ranks.texts[29]
    best = scores.argsort(descending=True)[:5].tolist()
    images = analysis.examples[1].images
    assert [image.is_correct for image in images[:5]] == [i == 5 for i in best]
    assert sum(image.is_correct for image in images) == 1, "the caption's own image is among them, or appended"
    assert images[0].caption == f"1. cosine {float(scores.max()):.2f}" and all(image.jpeg for image in images)
    expected_curve = [recall(ranks.text_ranks, (k,))[f"R@{k}"] for k in range(1, 51)]
    assert analysis.curves["T2I"] == expected_curve and len(analysis.curves["I2T"]) == 50
    unit, lengths = measure_caption_lengths(ranks.captions)
    assert (analysis.length_unit, analysis.length_bins) == (unit, make_length_bins(lengths))
    assert analysis.recall_by_length == compute_recall_by_length(ranks, lengths, analysis.length_bins)
    last = analysis.failures[0].images[-1]  # the correct image, after the top five
    assert len(analysis.failures) == 3 and len(analysis.failures[0].images) == 6 and last.is_correct
    assert last.caption.startswith(f"{int(ranks.text_ranks.max()) + 1}. cosine ")
    assert analyze_errors(ranks, num_queries=0).examples == []
