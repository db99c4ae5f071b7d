"""CRA, caption retrieval accuracy: does a text encoder tell captions apart? (arXiv 2411.04997, section 3.1).

Two protocols. The paper's: the first two captions of each image retrieve each other. All pairs: each caption looks for
any other caption of its image among all captions but itself. A tie with a wrong caption counts as a miss in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.data.hashing import unique_captions
from llm2clip.evaluate.ranks import positive_ranks, two_way_ranks
from llm2clip.evaluate.recall import KS, bootstrap, chance_recall, recall


class TextEncoder(Protocol):
    """Whatever gives texts vectors: a `CaptionEncoder`, or another's text tower."""

    def encode(self, captions: Sequence[str], *, progress: bool = ...) -> Tensor:
        """Texts to vectors, (N, width) float32 on the CPU."""
        ...

    def count_truncated(self, captions: Sequence[str]) -> int | None:
        """How many of some texts are longer than its window, and lose their end; None where nobody can say."""
        ...


def caption_retrieval_accuracy(
    images: Sequence[Sequence[str]],
    encoder: TextEncoder,
    *,
    all_pairs: bool = False,
    num_mistakes: int = 0,
    return_hits: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """How well an encoder tells the captions of images apart, in percent.

    Args:
        images: the captions of each image, in order; those with fewer than two different ones are left out, counted.
        encoder: any text encoder.
        all_pairs: measure the other protocol too.
        mistakes: how many of the first protocol's worst mistakes to list.
        hits: list what the CRA is the mean of.
        progress: show a bar.

    Returns:
        "CRA": top-1 of the paper's protocol, mean of both directions; "CRA interval": by a bootstrap of images, 95%;
        "first to second" and "second to first": R@1/5/10; "positives" and "negatives": mean cosine of captions of one
        image and of different images; "images", "excluded", "truncated" (captions longer than the encoder's window),
        "chance" (of CRA). With `all_pairs`: "all pairs" and "all
        pairs chance", R@1/5/10, and "captions", their number. With `mistakes`: "mistakes", see `worst_mistakes`. With
        `hits`: "hits", 0, 0.5 or 1 by image.

    Raises:
        ValueError: no image has two captions.
    """
    different = [captions for captions in map(unique_captions, images) if len(captions) > 1]
    if not different:
        raise ValueError("caption retrieval needs images with two captions; there is none")
    used = different if all_pairs else [captions[:2] for captions in different]
    texts = unique_captions(caption for captions in used for caption in captions)
    number = {text: n for n, text in enumerate(texts)}
    vectors = F.normalize(encoder.encode(texts, progress=progress), dim=-1)
    first, second = (vectors[[number[captions[side]] for captions in different]] for side in (0, 1))
    there, again = two_way_ranks(first, second, range(len(first)))
    forth, back = recall(there), recall(again)
    by_image = ((there < 1).double() + (again < 1)) / 2
    low, high = (100 * bootstrap(by_image[:, None], torch.ones(len(by_image)))).flatten().tolist()
    positives, negatives = mean_cosines(first, second)
    found: dict[str, Any] = {
        "CRA": (forth["R@1"] + back["R@1"]) / 2,
        "CRA interval": (low, high),
        "first to second": forth,
        "second to first": back,
        "positive cosine": positives,
        "negative cosine": negatives,
        "images": len(different),
        "excluded": len(images) - len(different),
        "truncated": encoder.count_truncated(texts),
        "chance": 100.0 / len(different),
    }
    if all_pairs:
        at, count = [], 0
        for captions in different:
            at.append(range(count, count + len(captions)))
            count += len(captions)
        everything = vectors[[number[caption] for captions in different for caption in captions]]
        others = [[j for j in group if j != i] for group in at for i in group]
        found["captions"] = count
        found["all pairs"] = recall(positive_ranks(everything, everything, others, itself=range(count)))
        found["all pairs chance"] = chance_recall([len(o) for o in others], count - 1, KS)
    if return_hits:
        found["hits"] = by_image.tolist()
    if num_mistakes:
        found["mistakes"] = worst_mistakes(first, second, different, num_mistakes)
    return found


def mean_cosines(first: Tensor, second: Tensor) -> tuple[float, float]:
    """The mean of first[i] . second[i], and that of first[i] . second[j] over all i other than j.

    Args:
        first, second: (N, D), L2-normalised.
    """
    a, b = first.double(), second.double()
    same = float((a * b).sum())
    everything = float(a.sum(0) @ b.sum(0))
    n = len(a)
    return same / n, (everything - same) / max(1, n * (n - 1))


def worst_mistakes(
    first: Tensor, second: Tensor, captions: Sequence[Sequence[str]], count: int, tile: int = 4096
) -> list[dict[str, Any]]:
    """The queries whose best wrong answer is furthest above the right one.

    Args:
        first, second: (N, D), L2-normalised: the first and second captions of N images.
        captions: the captions of each image.
        count: of mistakes, at most.
        tile: queries at a time.

    Returns:
        The worst first: "caption", what it should have found ("right") and what it found ("found"), with their cosines
        ("right cosine", "found cosine").
    """
    right = (first * second).sum(1)
    best, which = torch.empty(len(first)), torch.empty(len(first), dtype=torch.int64)
    for lo in range(0, len(first), tile):
        scores = first[lo : lo + tile] @ second.T
        here = torch.arange(len(scores))
        scores[here, here + lo] = -torch.inf
        best[lo : lo + tile], which[lo : lo + tile] = scores.max(1)
    order = (best - right).argsort(descending=True, stable=True)
    return [
        {
            "caption": captions[i][0],
            "right": captions[i][1],
            "right cosine": float(right[i]),
            "found": captions[int(which[i])][1],
            "found cosine": float(best[i]),
        }
        for i in order[:count].tolist()
        if best[i] >= right[i]
    ]
