"""Caption retrieval accuracy (CRA) of a text encoder (arXiv 2411.04997, section 3.1).

There are two protocols. In the paper's protocol, the first two captions of each image retrieve each other. In "all
pairs", each caption searches all other captions, and any other caption of the same image is correct. In both protocols,
a tie with a wrong caption counts as a miss.
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
    """Anything that embeds texts: a `CaptionEncoder` or the text tower of another model."""

    def encode(self, captions: Sequence[str], *, progress: bool = ...) -> Tensor:
        """Return embeddings, (N, D) float32 on the CPU."""
        ...

    def count_truncated(self, captions: Sequence[str]) -> int | None:
        """Return the number of texts truncated to the maximum length, or None if unknown."""
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
    """Measure how well a text encoder matches captions of the same image, in percent.

    Args:
        images: Captions of each image, in order. Images with fewer than two distinct captions are excluded.
        encoder: Any text encoder.
        all_pairs: Also measure the "all pairs" protocol.
        num_mistakes: Number of mistakes under the paper's protocol to return, worst first.
        return_hits: Also return the accuracy for each image.
        progress: Show a progress bar.

    Returns:
        Metrics for the paper's protocol: "CRA" is the top-1 accuracy, averaged over both directions, with a 95%
        bootstrap confidence interval over images ("CRA interval") and a chance level ("chance"). "first to second" and
        "second to first" are R@1/5/10 for each direction. "positive cosine" and "negative cosine" are the mean cosine
        similarities between captions of the same image and between captions of different images.

        Counts: "images" used, "excluded" images, and "truncated" captions.

        Optional: `all_pairs` adds "all pairs" and "all pairs chance" (R@1/5/10), and "captions", the number of
        captions. `return_hits` adds "hits", which is 0, 0.5 or 1 for each image. `num_mistakes` adds "mistakes", see
        `worst_mistakes`.

    Raises:
        ValueError: If no image has two distinct captions.
    """
    caption_lists = [captions for captions in map(unique_captions, images) if len(captions) > 1]
    if not caption_lists:
        raise ValueError("caption retrieval needs images with two distinct captions, but there are none")
    used = caption_lists if all_pairs else [captions[:2] for captions in caption_lists]
    texts = unique_captions(caption for captions in used for caption in captions)
    row_of_text = {text: row for row, text in enumerate(texts)}
    embeddings = F.normalize(encoder.encode(texts, progress=progress), dim=-1)
    first = embeddings[[row_of_text[captions[0]] for captions in caption_lists]]
    second = embeddings[[row_of_text[captions[1]] for captions in caption_lists]]

    first_ranks, second_ranks = two_way_ranks(first, second, range(len(first)))
    first_recall, second_recall = recall(first_ranks), recall(second_ranks)
    hits = ((first_ranks < 1).double() + (second_ranks < 1)) / 2  # per image
    low, high = (100 * bootstrap(hits[:, None], torch.ones(len(hits)))).flatten().tolist()
    positive_cosine, negative_cosine = mean_cosines(first, second)
    metrics: dict[str, Any] = {
        "CRA": (first_recall["R@1"] + second_recall["R@1"]) / 2,
        "CRA interval": (low, high),
        "first to second": first_recall,
        "second to first": second_recall,
        "positive cosine": positive_cosine,
        "negative cosine": negative_cosine,
        "images": len(caption_lists),
        "excluded": len(images) - len(caption_lists),
        "truncated": encoder.count_truncated(texts),
        "chance": 100.0 / len(caption_lists),
    }
    if all_pairs:
        rows = [row_of_text[caption] for captions in caption_lists for caption in captions]
        metrics |= _all_pairs_metrics(embeddings[rows], [len(captions) for captions in caption_lists])
    if return_hits:
        metrics["hits"] = hits.tolist()
    if num_mistakes:
        metrics["mistakes"] = worst_mistakes(first, second, caption_lists, num_mistakes)
    return metrics


def _all_pairs_metrics(embeddings: Tensor, captions_per_image: Sequence[int]) -> dict[str, Any]:
    """Compute recall for the "all pairs" protocol, in which each caption retrieves other captions of the same image.

    Args:
        embeddings: Caption embeddings, (captions, D), L2-normalised. Captions of the same image are adjacent.
        captions_per_image: Number of captions for each image.
    """
    positives: list[list[int]] = []
    for count in captions_per_image:
        start = len(positives)
        group = range(start, start + count)
        positives += [[other for other in group if other != caption] for caption in group]
    total = len(positives)
    ranks = positive_ranks(embeddings, embeddings, positives, self_index=range(total))
    return {
        "captions": total,
        "all pairs": recall(ranks),
        "all pairs chance": chance_recall([len(others) for others in positives], total - 1, KS),
    }


def mean_cosines(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return the mean of first[i] · second[i], and the mean of first[i] · second[j] over all i != j.

    Args:
        first, second: Embeddings, (N, D), L2-normalised.
    """
    a, b = first.double(), second.double()
    diagonal_sum = float((a * b).sum())
    total_sum = float(a.sum(0) @ b.sum(0))
    n = len(a)
    return diagonal_sum / n, (total_sum - diagonal_sum) / max(1, n * (n - 1))


def worst_mistakes(
    first: Tensor, second: Tensor, captions: Sequence[Sequence[str]], count: int, chunk_size: int = 4096
) -> list[dict[str, Any]]:
    """Return the queries whose best wrong answer beats the correct answer by the largest margin.

    Args:
        first, second: Embeddings of the first and second captions of N images, (N, D), L2-normalised.
        captions: Captions of each image.
        count: Maximum number of mistakes to return.
        chunk_size: Number of queries per matmul.

    Returns:
        Mistakes, worst first. Each has "caption" (the query), "correct" and "retrieved" (captions), and the cosine
        similarities "correct cosine" and "retrieved cosine".
    """
    correct_scores = (first * second).sum(1)
    wrong_scores, wrong_indices = torch.empty(len(first)), torch.empty(len(first), dtype=torch.int64)
    for start in range(0, len(first), chunk_size):
        scores = first[start : start + chunk_size] @ second.T  # (queries, captions)
        rows = torch.arange(len(scores))
        scores[rows, rows + start] = -torch.inf
        wrong_scores[start : start + chunk_size], wrong_indices[start : start + chunk_size] = scores.max(1)
    order = (wrong_scores - correct_scores).argsort(descending=True, stable=True)
    mistakes = []
    for i in order[:count].tolist():
        if wrong_scores[i] < correct_scores[i]:
            break
        mistakes.append(
            {
                "caption": captions[i][0],
                "correct": captions[i][1],
                "correct cosine": float(correct_scores[i]),
                "retrieved": captions[int(wrong_indices[i])][1],
                "retrieved cosine": float(wrong_scores[i]),
            }
        )
    return mistakes
