"""Zero-shot classification, linear probes and compositional benchmarks.

In compositional benchmarks, a tie between the correct answer and a wrong answer counts as an error.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from llm2clip.data.texts import deduplicate_captions
from llm2clip.evaluate.benchmarks.base import BenchmarkResult, ClassificationData, CompositionalExample
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.metrics import BootstrapMetrics
from llm2clip.io_utils import DataFormatError
from llm2clip.models.prompts import average_prompts, fill_templates


def evaluate_classification(
    data: ClassificationData, embeddings: EmbeddingSource, train: ClassificationData | None = None
) -> BenchmarkResult:
    """Classify images by the nearest class embedding. If `train` is given, also fit a linear probe to its images."""
    images, indices = embeddings.encode_images(data.images)
    labels = [data.labels[i] for i in indices]
    classes = encode_classes(embeddings, data.names, data.templates)
    accuracy = classification_accuracy(images, labels, classes, indices)
    metrics = dict(accuracy.values)
    metrics["chance"] = 100.0 / len(set(labels))
    if train is not None:
        if list(train.names) != list(data.names):
            raise DataFormatError("the linear probe requires training and test images with the same classes")
        train_images, train_indices = embeddings.encode_images(train.images)
        probe = fit_linear_probe(train_images, [train.labels[i] for i in train_indices], images, labels)
        metrics |= {"linear probe": probe["top-1"], "linear probe C": probe["C"]}
    counts = {"images": len(images), **count_texts(embeddings, data.names, data.templates)}
    summary = {"intervals": accuracy.intervals, **counts, "metrics": metrics}
    return BenchmarkResult(summary, data.images, bootstrap={"": accuracy})


def encode_classes(embeddings: EmbeddingSource, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return the mean prompt embedding of each class, float32 of shape (classes, D). See `average_prompts`."""
    prompts = fill_templates(names, templates)
    return average_prompts(embeddings.encode_texts(prompts), [len(templates)] * len(names))


def count_texts(
    embeddings: EmbeddingSource, names: Sequence[str], templates: Sequence[str] = ("{}",)
) -> dict[str, int | None]:
    """Return the number of prompts ("texts") and of prompts that exceed the model's maximum length ("truncated")."""
    texts = fill_templates(names, templates)
    return {"texts": len(texts), "truncated": embeddings.count_truncated(texts)}


def classification_accuracy(
    images: Tensor, labels: Sequence[int], classes: Tensor, indices: Sequence[int], chunk_size: int = 4096
) -> BootstrapMetrics:
    """Return accuracies in percent: "top-1", "top-5" and "mean per class" (top-1 accuracy averaged over classes).

    Args:
        images, classes: L2-normalised embeddings of shape (N, D) and (classes, D).
        indices: Index of each image in the benchmark, which identifies the image when models are compared.
        chunk_size: Number of images per matmul.
    """
    targets = torch.tensor(labels)
    rank_chunks = []
    for start in range(0, len(images), chunk_size):
        scores = images[start : start + chunk_size].float() @ classes.T  # (images, classes)
        rank_chunks.append(compute_class_ranks(scores, targets[start : start + chunk_size]))
    ranks = torch.cat(rank_chunks)
    top1, top5 = (ranks < 1).double().numpy(), (ranks < 5).double().numpy()

    def metrics(weights: np.ndarray) -> list[float]:
        counts = np.bincount(targets, weights)
        class_accuracy = np.bincount(targets, weights * top1)[counts > 0] / counts[counts > 0]
        total = weights.sum()
        return [100 * float(value) for value in (weights @ top1 / total, weights @ top5 / total, class_accuracy.mean())]

    return BootstrapMetrics.from_function(indices, ("top-1", "top-5", "mean per class"), metrics)


def compute_class_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the zero-based rank of the correct class of each item, int64 of shape (N,).

    If several classes have the same score, the one with the lowest index is ranked first, as in argmax. Such ties occur
    because some ImageNet classes share a name. `scores` has shape (N, classes).
    """
    correct_score = scores.gather(1, labels[:, None])
    is_earlier_class = torch.arange(scores.shape[1]) < labels[:, None]
    return ((scores > correct_score) | ((scores == correct_score) & is_earlier_class)).sum(1)


def fit_linear_probe(
    train: Tensor, train_labels: Sequence[int], test: Tensor, test_labels: Sequence[int], seed: int = 0
) -> dict[str, float]:
    """Fit a logistic regression to frozen embeddings and return its test accuracy.

    As in CLIP (arXiv 2103.00020, appendix A.3), the regularisation strength is selected on a validation split. Here,
    the candidates are powers of ten, and the split contains a fifth of the training images.

    Returns:
        A dict with "top-1", the accuracy in percent, and "C", the selected inverse regularisation strength.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import train_test_split

    def fit(c: float, images: np.ndarray, labels: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=c, max_iter=1000).fit(images, labels)

    x, y = train.numpy(), np.asarray(train_labels)
    class_counts = np.unique(y, return_counts=True)[1]
    # A stratified split requires at least two images per class and at least as many validation images as classes.
    can_stratify = class_counts.min() > 1 and math.ceil(0.2 * len(y)) >= len(class_counts)
    fit_x, validation_x, fit_y, validation_y = train_test_split(
        x, y, test_size=0.2, random_state=seed, stratify=y if can_stratify else None
    )
    candidates = [10.0**exponent for exponent in range(-3, 5)]
    best_c = max(candidates, key=lambda c: fit(c, fit_x, fit_y).score(validation_x, validation_y))
    accuracy = fit(best_c, x, y).score(test.numpy(), np.asarray(test_labels))
    return {"top-1": 100 * float(accuracy), "C": best_c}


# ---- compositional benchmarks ----------------------------------------------------------------------------------------


def evaluate_compositional(examples: Sequence[CompositionalExample], embeddings: EmbeddingSource) -> BenchmarkResult:
    """Evaluate a model on all examples whose images can be decoded. See `compute_compositional_accuracy`."""
    all_images = [image for example in examples for image in example.images]
    refs = list({ref.key: ref for ref in all_images}.values())
    texts = deduplicate_captions(caption for example in examples for caption in example.captions)
    images, indices = embeddings.encode_images(refs)
    image_embeddings = {refs[i].key: image for i, image in zip(indices, images, strict=True)}
    text_embeddings = dict(zip(texts, embeddings.encode_texts(texts), strict=True))
    complete = [example for example in examples if all(ref.key in image_embeddings for ref in example.images)]
    counts = {"examples": len(complete), "images": len(images), **count_texts(embeddings, texts)}
    metrics = compute_compositional_accuracy(complete, image_embeddings, text_embeddings)
    return BenchmarkResult(counts | {"metrics": metrics}, all_images)


def compute_compositional_accuracy(
    examples: Sequence[CompositionalExample],
    image_embeddings: Mapping[str, Tensor],
    text_embeddings: Mapping[str, Tensor],
) -> dict[str, float]:
    """Return the accuracies on Winoground or SugarCrepe, in percent.

    In Winoground (arXiv 2204.03162), each example has two images and two captions. For "text", each image must be more
    similar to its own caption than to the other caption. For "image", each caption must be more similar to its own
    image than to the other image. For "group", both conditions must hold. The chance levels are 25, 25 and 16.7.

    In SugarCrepe (arXiv 2306.14610), each example has one image, a correct caption and a wrong caption. The result
    contains the accuracy for each category, and "mean", the average over the categories. The chance level is 50.

    Args:
        image_embeddings, text_embeddings: L2-normalised embeddings of shape (D,), keyed by `ImageRef.key` and caption.
    """
    hits: dict[str, list[bool]] = {}
    for example in examples:
        images = torch.stack([image_embeddings[ref.key] for ref in example.images])
        captions = torch.stack([text_embeddings[caption] for caption in example.captions])
        scores = images @ captions.T  # (images, captions)
        if len(images) == 1:
            hits.setdefault(example.kind, []).append(bool(scores[0, 0] > scores[0, 1:].max()))
        else:
            for name, is_hit in _compute_pair_scores(scores).items():
                hits.setdefault(name, []).append(is_hit)
    accuracies = {name: 100.0 * sum(values) / len(values) for name, values in hits.items()}
    if "group" not in accuracies:
        accuracies["mean"] = sum(accuracies.values()) / len(accuracies)
    return accuracies


def _compute_pair_scores(scores: Tensor) -> dict[str, bool]:
    """Return Winoground's three scores for an example, given its similarities of shape (images, captions)."""
    correct = scores.diagonal()
    off_diagonal = ~torch.eye(len(scores), dtype=torch.bool)
    text = bool((correct[:, None] > scores)[off_diagonal].all())
    image = bool((correct[None] > scores)[off_diagonal].all())
    return {"text": text, "image": image, "group": text and image}
