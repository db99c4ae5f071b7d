"""The nearest items of each query, and what is made of whole lists of them: precision where many answers are right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.cpu import quick_products


@quick_products()
def nearest(queries: Tensor, items: Tensor, k: int, tile: int = 2048, progress: bool = False) -> tuple[Tensor, Tensor]:
    """The `k` items that score highest for each query, best first; equal ones in any order.

    Args:
        queries: (Q, D), L2-normalised.
        items: (N, D), L2-normalised.
        k: how many, at most N.
        tile: queries and items at a time; no more scores than tile * (tile + k) are kept.
        progress: show a bar.

    Returns:
        Their scores, float32 (Q, k), and which they are, int64 (Q, k).
    """
    k = min(k, len(items))
    scores, which = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    for start in tqdm(range(0, len(queries), tile), desc="nearest", unit="tile", disable=not progress):
        q = queries[start : start + tile].float()
        best, at = torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
        for lo in range(0, len(items), tile):
            some = q @ items[lo : lo + tile].float().T
            here, there = some.topk(min(k, some.shape[1]))
            best, order = torch.cat([best, here], 1).topk(min(k, best.shape[1] + here.shape[1]))
            at = torch.cat([at, there + lo], 1).gather(1, order)
        scores[start : start + tile], which[start : start + tile] = best, at
    return scores, which


def precision_at_r(found: Tensor, positives: Sequence[Sequence[int]]) -> dict[str, float]:
    """mAP@R and R-precision in percent, where R is the number of right answers of a query (arXiv 2003.08505, section
    3.2; for captions arXiv 2204.03359).

    Args:
        found: int64 (Q, K), the items of each query, best first; K is at least the largest R.
        positives: the items that are right for each query, at least one.

    Raises:
        ValueError: a query has no right answer, or more than K.
    """
    precise, average = 0.0, 0.0
    for row, answers in zip(found.tolist(), positives, strict=True):
        right = set(answers)
        r = len(right)
        if not 0 < r <= len(row):
            raise ValueError(f"a query has {r} right answers; it needs one, and at most the {len(row)} that were found")
        hits = [item in right for item in row[:r]]
        precise += sum(hits) / r
        average += sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / r
    return {"mAP@R": 100 * average / len(positives), "R-precision": 100 * precise / len(positives)}
