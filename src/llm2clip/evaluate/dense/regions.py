"""Zero-shot classification of image regions, using crops or dense features.

- "crop": the region is cropped and encoded like any other image. As in CLIPSelf (arXiv 2310.01403), the box is enlarged
    by a factor of 1.5 around its centre, clipped to the image, and padded with black to a square. Because of the
    padding, preprocessing does not crop the longer side, but a `crop_pct` below 1 still cuts off the edges.
- Each dense variant: the entire image is encoded. As in CLIPSelf, the patch embeddings within the box are averaged
    using RoIAlign (arXiv 1703.06870) with an adaptive sampling ratio, and the mean is L2-normalised.

The predicted class is the one whose embedding has the highest cosine similarity to the region embedding. By default,
class embeddings are averaged over OpenAI's prompt templates for ImageNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from torch import Tensor

from llm2clip.data.images import load_image, make_thumbnail
from llm2clip.evaluate.benchmarks.base import RegionData
from llm2clip.evaluate.bootstrap import BootstrapMetrics
from llm2clip.evaluate.classification import compute_class_ranks, encode_classes
from llm2clip.evaluate.dense import decode_images, gather_results, get_model, select_variants
from llm2clip.evaluate.embeddings import BATCH_SIZE, EmbeddingSource
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import encode_boxes as encode_dense_boxes
from llm2clip.reports import Block, Example, Examples, Heading, Paragraph

CROP = "crop"
CROP_SCALE = 1.5  # factor by which a box is enlarged before it is cropped
SIZE_LIMITS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}
"""Lower (inclusive) and upper (exclusive) limit of the object's area in square pixels for each COCO size class."""
THUMBNAIL_SIDE = 280  # maximum width and height of thumbnails, in pixels


@dataclass(frozen=True)
class RegionPredictions:
    """Class predictions of one method for all regions.

    Args:
        image: Index of each region's image, int64 of shape (R,).
        region: Index of each region within its image, int64 of shape (R,).
        rank: Zero-based rank of the correct class, int64 of shape (R,). See `compute_class_ranks`.
        predicted: Index of the class with the highest score, int64 of shape (R,).
        margin: Score of the predicted class minus the score of the correct class, float32 of shape (R,).
    """

    image: np.ndarray
    region: np.ndarray
    rank: np.ndarray
    predicted: np.ndarray
    margin: np.ndarray

    @classmethod
    def concatenate(cls, parts: Sequence[RegionPredictions]) -> RegionPredictions:
        """Concatenate predictions and sort them by image and region."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__}
        order = np.lexsort((columns["region"], columns["image"]))
        return cls(**{name: values[order] for name, values in columns.items()})


def classify_regions(
    data: RegionData, embeddings: EmbeddingSource, variants: Sequence[str]
) -> dict[str, RegionPredictions]:
    """Classify all regions with each method. Each image is decoded once.

    In a distributed run, the images are split across the ranks, and every rank returns all predictions.

    Args:
        embeddings: Embedding source that runs a model. Unusable images are recorded in `embeddings.log`.
        variants: Dense feature variants (see `DENSE_VARIANTS`). Variants not supported by the model are skipped.

    Returns:
        Predictions for "crop" and for each variant, keyed by method.

    Raises:
        ValueError: If the embeddings are precomputed.
        TooManySkipped: If too many images are unusable.
    """
    model = get_model(embeddings)
    methods = [CROP, *select_variants(model, variants, required=False)]
    classes = encode_classes(embeddings, data.names, data.templates)
    batches: dict[int, dict[str, RegionPredictions]] = {}  # each batch's predictions, keyed by its lowest image index
    failures: dict[int, str] = {}
    for images in decode_images(data.images, data.sizes, "regions", failures):
        boxes = [torch.from_numpy(data.boxes[index]) for index in images]
        for method in methods if images else ():
            regions = torch.cat(encode_boxes(model, list(images.values()), boxes, method))
            predictions = batches.setdefault(min(images), {})
            predictions[method] = _predict_classes(regions, list(images), data, classes)
    batches = gather_results(batches, failures, data.images, embeddings.log)
    return {method: RegionPredictions.concatenate([batch[method] for batch in batches.values()]) for method in methods}


def compute_region_metrics(data: RegionData, predictions: RegionPredictions) -> BootstrapMetrics:
    """Return accuracies in percent, bootstrapped over images because regions of the same image are correlated.

    The metrics are "top-1", "top-5", "mean per class" (top-1 accuracy averaged over the classes that have regions), and
    "small", "medium" and "large" (top-1 accuracy for each COCO size class that has regions).
    """
    labels = np.concatenate([data.labels[i] for i in np.unique(predictions.image)])
    areas = np.concatenate([data.areas[i] for i in np.unique(predictions.image)])
    hits = (predictions.rank < 1).astype(np.float64)
    selections = {"top-1": (hits, np.ones(len(hits), bool))}
    selections["top-5"] = ((predictions.rank < 5).astype(np.float64), np.ones(len(hits), bool))
    for name, (low, high) in SIZE_LIMITS.items():
        selections[name] = (hits, (areas >= low) & (areas < high))
    selections = {name: (values, mask) for name, (values, mask) in selections.items() if mask.any()}
    indices, image = np.unique(predictions.image, return_inverse=True)
    num_images = len(indices)
    # `sums` and `counts` have shape (images, metrics).
    sums = np.stack([np.bincount(image, values * mask, num_images) for values, mask in selections.values()], 1)
    counts = np.stack([np.bincount(image, mask, num_images) for _, mask in selections.values()], 1)
    shape = (num_images, len(data.names))
    class_hits = csr_matrix((hits, (image, labels)), shape)  # csr_matrix sums duplicate entries
    class_counts = csr_matrix((np.ones(len(hits)), (image, labels)), shape)

    def metrics(weights: np.ndarray) -> list[float]:
        """Return all metrics, counting image i `weights[i]` times."""
        with np.errstate(invalid="ignore"):  # a resample may lack regions of a size or class (0 / 0)
            values = (weights @ sums) / (weights @ counts)
            accuracies = (weights @ class_hits) / (weights @ class_counts)
        return [100.0 * float(value) for value in (*values, np.nanmean(accuracies))]

    return BootstrapMetrics.from_function(indices.tolist(), [*selections, "mean per class"], metrics)


def compute_class_accuracy(data: RegionData, predictions: RegionPredictions) -> list[float | None]:
    """Return the top-1 accuracy of each class in percent, or None for a class without regions."""
    labels = np.concatenate([data.labels[i] for i in np.unique(predictions.image)])
    counts = np.bincount(labels, minlength=len(data.names)).tolist()
    hits = np.bincount(labels[predictions.rank < 1], minlength=len(data.names)).tolist()
    return [100.0 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def build_wrong_region_blocks(
    data: RegionData, method: str, predictions: RegionPredictions, count: int = 12
) -> list[Block]:
    """Return a report section on the errors with the largest margins. It shows each image and class at most once."""
    order = np.argsort(-predictions.margin, kind="stable")
    images: list[Example] = []
    shown_images, shown_classes = set(), set()
    for n in order[predictions.rank[order] > 0].tolist():
        index, region = int(predictions.image[n]), int(predictions.region[n])
        label = int(data.labels[index][region])
        if index in shown_images or label in shown_classes:
            continue
        shown_images.add(index)
        shown_classes.add(label)
        crop = crop_region(load_image(data.images[index]), data.boxes[index][region].tolist())
        caption = f"{data.names[label]}, classified as {data.names[int(predictions.predicted[n])]}"
        images.append(Example(make_thumbnail(crop, THUMBNAIL_SIDE), caption, is_correct=False))
        if len(images) == count:
            break
    if not images:
        return []
    text = f"Largest-margin errors of the method {method}. Each image and each class is shown at most once."
    examples = Examples(images, "Correct class and predicted class:")
    return [Heading("Misclassified regions", 3), Paragraph(text), examples]


def encode_boxes(model: DualEncoder, images: Sequence[Tensor], boxes: Sequence[Tensor], method: str) -> list[Tensor]:
    """Return one float32 CPU tensor of shape (R, D) per image: the L2-normalised embeddings of its R boxes.

    Args:
        images: Images, uint8 of shape (3, H, W).
        boxes: Boxes in each image as (left, top, right, bottom) in pixels, float32 of shape (R, 4).
        method: "crop" or a dense feature variant.
    """
    if method == CROP:
        crops = torch.cat([torch.empty(0, model.embed_dim), *_encode_crops(model, images, boxes)])
        return list(crops.split([len(image_boxes) for image_boxes in boxes]))
    assert model.dense is not None
    return encode_dense_boxes(model.dense, images, boxes, method, model.embed_dim)


def _encode_crops(model: DualEncoder, images: Sequence[Tensor], boxes: Sequence[Tensor]) -> Iterator[Tensor]:
    """Crop all boxes of all images, and yield the crops' embeddings in batches."""
    pairs = zip(images, boxes, strict=True)
    crops = (crop_region(image, box) for image, image_boxes in pairs for box in image_boxes.tolist())
    while batch := [model.transform(crop) for crop in islice(crops, BATCH_SIZE)]:
        yield model.encode_images(batch)


def crop_region(image: Tensor, box: Sequence[float]) -> Tensor:
    """Crop a box and its surroundings from an image.

    Args:
        image: Image, uint8 of shape (3, H, W).
        box: Edges (left, top, right, bottom) in pixels.

    Returns:
        Square image, uint8 of shape (3, S, S). The box is enlarged by `CROP_SCALE` around its centre, clipped to the
        image, and padded with black along its shorter dimension, equally on both sides.
    """
    height, width = image.shape[1:]
    left, top, right, bottom = box
    margin_x, margin_y = (CROP_SCALE - 1) / 2 * (right - left), (CROP_SCALE - 1) / 2 * (bottom - top)
    left, top = round(max(0.0, left - margin_x)), round(max(0.0, top - margin_y))
    right, bottom = round(min(float(width), right + margin_x)), round(min(float(height), bottom + margin_y))
    left, top = min(left, width - 1), min(top, height - 1)
    crop = image[:, top : max(bottom, top + 1), left : max(right, left + 1)]
    side = max(crop.shape[1:])
    pad_y, pad_x = side - crop.shape[1], side - crop.shape[2]
    return F.pad(crop, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))


def _predict_classes(regions: Tensor, indices: Sequence[int], data: RegionData, classes: Tensor) -> RegionPredictions:
    """Classify all regions in the images at `indices`, given region embeddings `regions` of shape (R, D)."""
    labels = torch.from_numpy(np.concatenate([data.labels[i] for i in indices]))
    counts = [len(data.labels[i]) for i in indices]
    scores = regions @ classes.T  # (regions, classes)
    best, predicted = scores.max(1)
    return RegionPredictions(
        image=np.repeat(np.array(indices, np.int64), counts),
        region=np.concatenate([np.arange(count) for count in counts]),
        rank=compute_class_ranks(scores, labels).numpy(),
        predicted=predicted.numpy(),
        margin=(best - scores.gather(1, labels[:, None])[:, 0]).numpy(),
    )
