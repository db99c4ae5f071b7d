"""What is behind a recall: how it grows with k and with the length of a caption, and pictures that were found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llm2clip.data.images import load_thumbnail
from llm2clip.evaluate.recall import recall_intervals
from llm2clip.evaluate.retrieval_eval import RetrievalRanks
from llm2clip.html_report import ResultImage, ResultImages

FIRST = 50  # ranks of the curve
SIDE = 280  # pixels of a thumbnail
BEST = 5  # pictures shown of a query


@dataclass
class ErrorAnalysis:
    """Of one model on one kind of caption.

    Args:
        curves: R@1 to R@50 in percent, of I2T and T2I.
        unit: in what captions are measured: words, or characters where they are not parted.
        bins: ranges of lengths, from and to.
        by_length: T2I R@1 of captions of those lengths, with the ends of its interval.
        matrix: cosines of some images (columns) and the first caption of each (rows).
        found: queries evenly spread over the captions, with what they found.
        failures: those whose image came last, likewise.
    """

    curves: dict[str, list[float]]
    unit: str
    bins: list[tuple[int, int]]
    by_length: list[tuple[float, float, float]]
    matrix: Tensor
    found: list[ResultImages] = field(default_factory=list)
    failures: list[ResultImages] = field(default_factory=list)


def analyze_errors(ranked: RetrievalRanks, queries: int = 6, most: int = 20) -> ErrorAnalysis:
    """
    Args:
        ranked: what was ranked.
        queries: of each kind that are shown with pictures; 0 shows none.
        most: images of the matrix.
    """
    captions = ranked.captions
    unit, lengths = length_of(captions)
    bins = length_bins(lengths)
    spread = torch.linspace(0, len(ranked.records) - 1, min(most, len(ranked.records))).long()
    first = torch.tensor([int((ranked.image_of_text == i).nonzero()[0]) for i in spread])
    return ErrorAnalysis(
        {"I2T": recall_curve(ranked.image_ranks), "T2I": recall_curve(ranked.text_ranks)},
        unit,
        bins,
        recall_by_length(ranked, lengths, bins),
        ranked.texts[first] @ ranked.images[spread].T,
        [failure_images(ranked, t) for t in torch.linspace(0, len(captions) - 1, queries).long().tolist()],
        [failure_images(ranked, t) for t in worst_failures(ranked, queries)],
    )


def recall_curve(ranks: Tensor) -> list[float]:
    """R@1 to R@50 in percent."""
    counts = torch.bincount(ranks.clamp(max=FIRST), minlength=FIRST + 1)[:FIRST]
    shares: list[float] = (100 * counts.cumsum(0).double() / len(ranks)).tolist()
    return shares


def length_of(captions: Sequence[str]) -> tuple[str, list[int]]:
    """How long captions are: in words, or in characters where most are one word (Chinese, Japanese)."""
    words = [len(caption.split()) for caption in captions]
    if sorted(words)[len(words) // 2] <= 2 < sorted(map(len, captions))[len(captions) // 2] / 3:
        return "characters", [len(caption) for caption in captions]
    return "words", words


def length_bins(words: Sequence[int], most: int = 6, least: int = 20) -> list[tuple[int, int]]:
    """Ranges of words, from and to (inclusive), that hold about as many captions each: at most `most`, each of at least
    `least` captions where there are as many."""
    counts = torch.tensor(sorted(words))
    parts = max(1, min(most, len(counts) // least))
    edges = sorted({int(counts[min(len(counts) - 1, len(counts) * n // parts)]) for n in range(1, parts)})
    lows = [int(counts[0])]
    for edge in edges:
        if int(((counts >= lows[-1]) & (counts < edge)).sum()) >= least and int((counts >= edge).sum()) >= least:
            lows.append(edge)
    highs = [*(low - 1 for low in lows[1:]), int(counts[-1])]
    return list(zip(lows, highs, strict=True))


def recall_by_length(
    ranked: RetrievalRanks, lengths: Sequence[int], bins: Sequence[tuple[int, int]]
) -> list[tuple[float, float, float]]:
    """T2I R@1 of the captions in each bin, with the ends of its interval."""
    length, found = torch.tensor(lengths), []
    for low, high in bins:
        chosen = (length >= low) & (length <= high)
        ranks = ranked.text_ranks[chosen]
        ends = recall_intervals(ranks, ranked.image_of_text[chosen], (1,))["R@1"]
        found.append((100 * float((ranks < 1).double().mean()), *ends))
    return found


def worst_failures(ranked: RetrievalRanks, count: int) -> list[int]:
    """Captions of different images whose own image has the highest rank."""
    chosen: dict[int, int] = {}
    for t in ranked.text_ranks.argsort(descending=True, stable=True).tolist():
        if len(chosen) == count or ranked.text_ranks[t] == 0:
            break
        chosen.setdefault(int(ranked.image_of_text[t]), t)
    return list(chosen.values())


def failure_images(ranked: RetrievalRanks, text: int) -> ResultImages:
    """The pictures that a caption found, and its own where it is not among them."""
    own, rank = int(ranked.image_of_text[text]), int(ranked.text_ranks[text])
    scores = ranked.images @ ranked.texts[text]
    best = scores.topk(min(BEST, len(scores))).indices.tolist()
    shown = [_shot(ranked, i, i == own, f"{n}. cosine {float(scores[i]):.2f}") for n, i in enumerate(best, 1)]
    if own not in best:
        shown.append(_shot(ranked, own, True, f"{rank + 1}. cosine {float(scores[own]):.2f}"))
    return ResultImages(ranked.captions[text], shown)


def _shot(ranked: RetrievalRanks, image: int, right: bool, line: str) -> ResultImage:
    ref = ranked.records[image].image
    assert ref is not None  # who has none is not ranked
    return ResultImage(load_thumbnail(ref, SIDE), right, line)
