"""Accuracy on compositional benchmarks, which test a model's understanding of word order and small changes in wording.

If a wrong answer is as similar as the correct one, the model's answer counts as wrong.
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

    In Winoground (arXiv 2204.03162), each example has two images and two captions. The result contains three
    accuracies. In "text", an example is correct if both images are more similar to their own captions. In "image", an
    example is correct if both captions are more similar to their own images. In "group", both conditions must hold. The
    chance levels are 25, 25 and 16.7.

    In SugarCrepe (arXiv 2306.14610), each example has one image, a correct caption and a wrong caption. The result
    contains one accuracy for each category of examples, and "mean", the average over the categories. The chance level
    is 50.

    Args:
        examples: All examples of a single benchmark.
        image_embeddings: Image embeddings, (D,), L2-normalised, keyed by `ImageRef.key`.
        text_embeddings: Caption embeddings, (D,), L2-normalised, keyed by caption.
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
    """Return Winoground's three scores for one example, computed from its similarity matrix, (images, captions)."""
    correct = scores.diagonal()
    off_diagonal = ~torch.eye(len(scores), dtype=torch.bool)
    text = bool((correct[:, None] > scores)[off_diagonal].all())
    image = bool((correct[None] > scores)[off_diagonal].all())
    return {"text": text, "image": image, "group": text and image}
