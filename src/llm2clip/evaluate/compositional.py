"""Accuracy on compositional benchmarks: can a model match images to captions that differ in only a few words?

A tie counts as a wrong answer.
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

    Examples with two images and two captions (Winoground, arXiv 2204.03162) yield three accuracies. For "text", each
    image must score its own caption higher; for "image", each caption must score its own image higher; "group" requires
    both. The chance levels are 25, 25 and 16.7.

    Examples with one image, a correct caption and a wrong caption (SugarCrepe, arXiv 2306.14610) yield one accuracy per
    category of examples, and "mean", the average over the categories. The chance level is 50.

    Args:
        examples: All examples of a single benchmark.
        image_embeddings: Embedding for each image key, (D,), L2-normalised.
        text_embeddings: Embedding for each caption, (D,), L2-normalised.
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
    """Compute Winoground's three scores for an example from its similarity matrix, (images, captions)."""
    correct = scores.diagonal()
    off_diagonal = ~torch.eye(len(scores), dtype=torch.bool)
    text = bool((correct[:, None] > scores)[off_diagonal].all())
    image = bool((correct[None] > scores)[off_diagonal].all())
    return {"text": text, "image": image, "group": text and image}
