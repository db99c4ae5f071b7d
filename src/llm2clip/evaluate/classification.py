"""Evaluation of zero-shot image classification and of compositional benchmarks.

In compositional benchmarks, a tie between the correct caption and the wrong caption counts as an error.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import BenchmarkResult, ClassificationData, CompositionalExample
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.metrics import BootstrapMetrics
from llm2clip.models.prompts import average_prompt_embeddings, fill_prompt_templates


def evaluate_classification(data: ClassificationData, embeddings: EmbeddingSource) -> BenchmarkResult:
    """Compute how often the class embedding that is most similar to an image embedding belongs to the correct class."""
    images, indices = embeddings.encode_images(data.images)
    labels = [data.labels[i] for i in indices]
    classes = encode_class_names(embeddings, data.names, data.templates)
    accuracy = compute_classification_accuracy(images, labels, classes, indices)
    summary = {
        "intervals": accuracy.intervals,
        "images": len(images),
        **count_prompts(embeddings, data.names, data.templates),
        "metrics": {**accuracy.values, "chance": 100.0 / len(set(labels))},
    }
    return BenchmarkResult(summary, data.images, bootstrap={"": accuracy})


def encode_class_names(embeddings: EmbeddingSource, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the mean prompt embedding of each class, float32 of shape (classes, D)."""
    prompts = fill_prompt_templates(names, templates)
    averages = average_prompt_embeddings(embeddings.encode_texts(prompts).numpy(), [len(templates)] * len(names))
    return torch.from_numpy(averages)


def count_prompts(
    embeddings: EmbeddingSource, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> dict[str, int | None]:
    """Return the number of prompts ("texts") and the number of truncated prompts ("truncated", None if unknown)."""
    texts = fill_prompt_templates(names, templates)
    return {"texts": len(texts), "truncated": embeddings.count_truncated_texts(texts)}


def compute_classification_accuracy(
    images: Tensor, labels: Sequence[int], classes: Tensor, indices: Sequence[int], chunk_size: int = 4096
) -> BootstrapMetrics:
    """Compute accuracies in percent: "top-1", "top-5" and "mean per class" (top-1 accuracy averaged over classes).

    Args:
        images, classes: L2-normalised embeddings of shapes (N, D) and (C, D).
        indices: Index of each image in the benchmark. Paired intervals require equal indices for both models.
        chunk_size: Number of images per matmul.
    """
    targets = torch.tensor(labels)
    rank_chunks = []
    for start in range(0, len(images), chunk_size):
        scores = images[start : start + chunk_size].float() @ classes.T  # (images, classes)
        rank_chunks.append(compute_class_ranks(scores, targets[start : start + chunk_size]))
    return bootstrap_accuracy(torch.cat(rank_chunks).numpy(), targets.numpy(), np.arange(len(images)), indices)


def bootstrap_accuracy(
    ranks: np.ndarray,
    labels: np.ndarray,
    image_of_item: np.ndarray,
    image_indices: Sequence[int],
    subsets: Mapping[str, np.ndarray] | None = None,
) -> BootstrapMetrics:
    """Compute accuracies in percent. Intervals are bootstrapped over images, because items from the same image are
    correlated.

    The metrics are "top-1", "top-5", the top-1 accuracy in each subset, and "mean per class" (top-1 accuracy averaged
    over all classes with at least one item).

    Args:
        ranks: Zero-based rank of the correct class for each item, int64 of shape (N,).
        labels: Class index of each item, int64 of shape (N,).
        image_of_item: Position of each item's image in `image_indices`, int64 of shape (N,).
        image_indices: Index of each image in the benchmark. Paired intervals require equal indices for both models.
        subsets: Boolean masks of shape (N,), keyed by subset name.
    """
    top1, top5 = (ranks < 1).astype(np.float64), (ranks < 5).astype(np.float64)
    subsets = subsets or {}

    def compute_metrics(image_weights: np.ndarray) -> list[float]:
        weights = image_weights[image_of_item]
        values = [weights @ top1 / weights.sum(), weights @ top5 / weights.sum()]
        with np.errstate(invalid="ignore"):  # 0 / 0 if a resample has no items in a subset or class
            values += [(weights * mask) @ top1 / (weights @ mask) for mask in subsets.values()]
            class_accuracy = np.bincount(labels, weights * top1) / np.bincount(labels, weights)
        return [100.0 * float(value) for value in (*values, np.nanmean(class_accuracy))]

    names = ("top-1", "top-5", *subsets, "mean per class")
    return BootstrapMetrics.from_function(image_indices, names, compute_metrics)


def compute_class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the zero-based rank of each item's correct class, int64 of shape (N,). `scores` has shape (N, classes).

    Some ImageNet classes share a name and therefore a score. As in argmax, equal scores are ranked by class index.
    """
    correct_score = scores.gather(1, labels[:, None])
    is_earlier_class = torch.arange(scores.shape[1]) < labels[:, None]
    return ((scores > correct_score) | ((scores == correct_score) & is_earlier_class)).sum(1)


# ---- compositional benchmarks ----------------------------------------------------------------------------------------


def evaluate_compositionality(examples: Sequence[CompositionalExample], embeddings: EmbeddingSource) -> BenchmarkResult:
    """Compute the accuracy on all examples whose images can be decoded. See `compute_compositional_accuracy`."""
    refs = list({example.image.key: example.image for example in examples}.values())
    texts = list(dict.fromkeys(caption for example in examples for caption in (example.caption, example.wrong)))
    images, indices = embeddings.encode_images(refs)
    image_embeddings = {refs[i].key: image for i, image in zip(indices, images, strict=True)}
    text_embeddings = dict(zip(texts, embeddings.encode_texts(texts), strict=True))
    complete = [example for example in examples if example.image.key in image_embeddings]
    counts = {"examples": len(complete), "images": len(images), **count_prompts(embeddings, texts)}
    metrics = compute_compositional_accuracy(complete, image_embeddings, text_embeddings)
    return BenchmarkResult(counts | {"metrics": metrics}, [example.image for example in examples])


def compute_compositional_accuracy(
    examples: Sequence[CompositionalExample],
    image_embeddings: Mapping[str, Tensor],
    text_embeddings: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the accuracy on each kind of example, and the average over all kinds ("mean"), in percent.

    The chance level is 50%. All embeddings are L2-normalised vectors of shape (D,). Image embeddings are keyed by
    `ImageRef.key`, and text embeddings by caption.
    """
    hits: dict[str, list[bool]] = {}
    for example in examples:
        captions = torch.stack([text_embeddings[example.caption], text_embeddings[example.wrong]])
        scores = image_embeddings[example.image.key][None] @ captions.T  # (1, 2)
        hits.setdefault(example.kind, []).append(bool(scores[0, 0] > scores[0, 1]))
    accuracies = {kind: 100.0 * sum(values) / len(values) for kind, values in hits.items()}
    return {**accuracies, "mean": sum(accuracies.values()) / len(accuracies)}
