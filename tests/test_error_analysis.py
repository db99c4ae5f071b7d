"""What stands behind a recall: its curve, its bins by length and its worst failures, against counting."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from format_fixtures import image_bytes
from llm2clip.data.image_refs import MemoryImage
from llm2clip.data.records import Record
from llm2clip.evaluate.ranks import two_way_ranks
from llm2clip.evaluate.recall import recall
from llm2clip.evaluate.reporting.error_analysis import (
    analyze_errors,
    length_bins,
    length_of,
    recall_by_length,
    recall_curve,
    worst_failures,
)
from llm2clip.evaluate.retrieval_eval import RetrievalRanks


def test_the_curve_is_recall_at_each_k() -> None:
    ranks = torch.tensor([0, 0, 3, 49, 50, 700, 1, 9])
    assert recall_curve(ranks) == pytest.approx([recall(ranks, (k,))[f"R@{k}"] for k in range(1, 51)])


def test_bins_hold_about_as_many_captions_each() -> None:
    assert length_bins(list(range(1, 101))) == [(1, 20), (21, 40), (41, 60), (61, 80), (81, 100)]
    assert length_bins(list(range(1, 241)))[-1] == (201, 240) and len(length_bins(list(range(1, 241)))) == 6
    assert length_bins([7] * 100) == [(7, 7)]
    assert length_bins([3, 9, 5]) == [(3, 9)]
    assert length_bins([5] * 50 + [8] * 50) == [(5, 7), (8, 8)]
    assert length_bins([1] + [2] * 59 + [3] * 60) == [(1, 2), (3, 3)], "no bin of one caption"
    assert length_bins([2] * 60 + [3] * 59 + [9]) == [(2, 2), (3, 9)]


def test_lengths_are_in_words_or_where_there_are_none_in_characters() -> None:
    assert length_of(["a dog runs", "two words"]) == ("words", [3, 2])
    assert length_of(["一只狗在草地上奔跑", "两只猫"]) == ("characters", [9, 3])
    assert length_of(["dog", "cat", "a bird"]) == ("words", [1, 1, 2])


@pytest.fixture
def ranked() -> RetrievalRanks:
    g = torch.Generator().manual_seed(0)
    owner = torch.arange(12).repeat_interleave(5)
    images = F.normalize(torch.randn(12, 6, generator=g), dim=-1)
    texts = F.normalize(images[owner] + 1.2 * torch.randn(60, 6, generator=g), dim=-1)
    captions = [" ".join(["word"] * (1 + 2 * (n % 6))) for n in range(60)]
    records = [
        Record(str(n), MemoryImage(image_bytes(n), f"{n}.jpg"), tuple(captions[5 * n : 5 * n + 5])) for n in range(12)
    ]
    return RetrievalRanks(records, images, texts, owner, *two_way_ranks(images, texts, owner))


def test_recall_by_length(ranked: RetrievalRanks) -> None:
    _, lengths = length_of(ranked.captions)
    bins = [(1, 4), (5, 11)]
    for (low, high), (share, *ends) in zip(bins, recall_by_length(ranked, lengths, bins), strict=True):
        hits = [int(r) == 0 for r, length in zip(ranked.text_ranks, lengths, strict=True) if low <= length <= high]
        assert share == pytest.approx(100 * sum(hits) / len(hits)) and ends[0] <= share <= ends[1]


def test_the_worst_are_of_different_images_and_come_last(ranked: RetrievalRanks) -> None:
    found = worst_failures(ranked, 4)
    of_image = {i: int(ranked.text_ranks[ranked.image_of_text == i].max()) for i in range(12)}
    assert len({int(ranked.image_of_text[t]) for t in found}) == 4
    assert [int(ranked.text_ranks[t]) for t in found] == sorted(of_image.values(), reverse=True)[:4]
    every = worst_failures(ranked, 99)  # all that failed, and none that did not
    assert len(every) == sum(rank > 0 for rank in of_image.values()) and all(ranked.text_ranks[t] > 0 for t in every)


def test_details_show_what_was_found(ranked: RetrievalRanks) -> None:
    found = analyze_errors(ranked, queries=3, most=4)
    chosen = [0, 3, 7, 11]
    assert torch.equal(found.matrix, ranked.texts[[5 * i for i in chosen]] @ ranked.images[chosen].T)
    assert [shots.query for shots in found.found] == [ranked.captions[t] for t in (0, 29, 59)]
    scores = ranked.images @ ranked.texts[29]
    best = scores.argsort(descending=True)[:5].tolist()
    shown = found.found[1].shots
    assert [shot.right for shot in shown[:5]] == [i == 5 for i in best]
    assert sum(shot.right for shot in shown) == 1, "its own picture is among them, or after them"
    assert shown[0].line == f"1. cosine {float(scores.max()):.2f}" and all(shot.jpeg for shot in shown)
    assert found.curves == {"I2T": recall_curve(ranked.image_ranks), "T2I": recall_curve(ranked.text_ranks)}
    unit, lengths = length_of(ranked.captions)
    assert (found.unit, found.bins) == (unit, length_bins(lengths))
    assert found.by_length == recall_by_length(ranked, lengths, found.bins)
    last = found.failures[0].shots[-1]  # of the one that came last, after the five that came before
    assert len(found.failures) == 3 and len(found.failures[0].shots) == 6 and last.right
    assert last.line.startswith(f"{int(ranked.text_ranks.max()) + 1}. cosine ")
    assert analyze_errors(ranked, queries=0).found == []
