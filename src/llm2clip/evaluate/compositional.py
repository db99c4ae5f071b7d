"""Compositional tests: which caption does a model put to which image? Ties count as wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import CompositionalExample


def compositional_accuracy(
    items: Sequence[CompositionalExample], image: Mapping[str, Tensor], text: Mapping[str, Tensor]
) -> dict[str, float]:
    """Scores of items in percent.

    Two images with two captions (Winoground, arXiv 2204.03162): "text", each image scores its own caption higher;
    "image", each caption scores its own image higher; "group", both; by chance 25, 25 and 16.7. One image with a right
    and a wrong caption (SugarCrepe, arXiv 2306.14610): how often the right one scores higher, by kind, and "mean" over
    the kinds; by chance 50.

    Args:
        items: of one benchmark.
        image: vectors of the images by their key, (D,) L2-normalised.
        text: vectors of the captions.
    """
    hits: dict[str, list[bool]] = {}
    for item in items:
        seen = torch.stack([image[ref.key] for ref in item.images])
        scores = seen @ torch.stack([text[caption] for caption in item.captions]).T
        if len(item.images) == 1:
            hits.setdefault(item.kind, []).append(bool(scores[0, 0] > scores[0, 1:].max()))
            continue
        own = scores.diagonal()
        others = ~torch.eye(len(scores), dtype=torch.bool)
        by_text = bool((own[:, None] > scores)[others].all())
        by_image = bool((own[None] > scores)[others].all())
        for name, hit in (("text", by_text), ("image", by_image), ("group", by_text and by_image)):
            hits.setdefault(name, []).append(hit)
    found = {name: 100.0 * sum(some) / len(some) for name, some in hits.items()}
    if "group" not in found:
        found["mean"] = sum(found.values()) / len(found)
    return found
