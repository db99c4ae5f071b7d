"""Accuracy on compositional benchmarks: does a model match images with captions of nearly the same words?

Ties count as wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import CompositionalExample


def compositional_accuracy(
    examples: Sequence[CompositionalExample],
    image_embeddings: Mapping[str, Tensor],
    text_embeddings: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return accuracies in percent.

    Examples of two images with two captions (Winoground, arXiv 2204.03162) give "text" (each image scores its own
    caption higher), "image" (each caption scores its own image higher) and "group" (both); the chance levels are 25, 25
    and 16.7. Examples of one image with a correct and a wrong caption (SugarCrepe, arXiv 2306.14610) give the accuracy
    of each kind and "mean" over the kinds; the chance level is 50.

    Args:
        examples: Examples of one benchmark.
        image_embeddings: Image key to embedding, (D,) L2-normalised.
        text_embeddings: Caption to embedding, (D,) L2-normalised.
    """
    hits: dict[str, list[bool]] = {}
    for example in examples:
        images = torch.stack([image_embeddings[ref.key] for ref in example.images])
        captions = torch.stack([text_embeddings[caption] for caption in example.captions])
        scores = images @ captions.T  # (images, captions)
        if len(images) == 1:
            hits.setdefault(example.kind, []).append(bool(scores[0, 0] > scores[0, 1:].max()))
        else:
            for name, is_hit in _pair_scores(scores).items():
                hits.setdefault(name, []).append(is_hit)
    accuracies = {name: 100.0 * sum(values) / len(values) for name, values in hits.items()}
    if "group" not in accuracies:
        accuracies["mean"] = sum(accuracies.values()) / len(accuracies)
    return accuracies


def _pair_scores(scores: Tensor) -> dict[str, bool]:
    """Return Winoground's three scores of an example, from its similarity matrix (images, captions)."""
    correct = scores.diagonal()
    off_diagonal = ~torch.eye(len(scores), dtype=torch.bool)
    text = bool((correct[:, None] > scores)[off_diagonal].all())
    image = bool((correct[None] > scores)[off_diagonal].all())
    return {"text": text, "image": image, "group": text and image}
