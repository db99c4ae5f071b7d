"""Evaluation of zero-shot semantic segmentation with dense features.

The cosine similarities between patch embeddings and class name embeddings are upsampled to pixels. The protocol follows
SCLIP (see `models/vision/segmentation.py` and `SegmentationData`). As in mmsegmentation, intersections and unions are
summed over all images before they are divided.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.data.images import encode_thumbnail, load_image
from llm2clip.evaluate.benchmarks.base import IGNORED, BenchmarkResult, SegmentationData
from llm2clip.evaluate.classification import count_prompts, encode_class_names
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.metrics import BootstrapMetrics
from llm2clip.evaluate.regions import (
    decode_image_batches,
    gather_results,
    get_logit_scales,
    require_dual_encoder,
    select_dense_variants,
)
from llm2clip.models.vision.segmentation import PixelScores, WindowResizer, encode_windows, segment
from llm2clip.reports import Block, Heading, Paragraph, ReportImage, ReportImageGroup

NUM_EXAMPLES = 4  # number of example images in the report
EXAMPLE_SIDE = 480  # maximum height and width in pixels of images and label maps in the report
OVERLAY_OPACITY = 0.6  # opacity of the class colours drawn over example images


@dataclass
class SegmentationResult:
    """Result of a model on a segmentation benchmark, for each method.

    A method is a dense feature variant, combined with a logit scale (see `get_logit_scales`). The model's learned scale
    is only used if the logit scale affects the predictions.
    """

    images: list[int]  # indices of the evaluated images
    counts: dict[str, np.ndarray]  # int64 of shape (images, 3, classes), keyed by method (see `_segment_image`)
    logit_scales: dict[str, float]
    examples: dict[int, dict[str, np.ndarray]]
    """Downsampled label maps of a few images, uint8 of shape (h, w), keyed by image index, and then by method
    (predictions) or "labels" (annotations)."""


def evaluate_segmentation(
    data: SegmentationData, embeddings: EmbeddingSource, variants: Sequence[str]
) -> BenchmarkResult:
    result = segment_images(data, embeddings, variants)
    rows, bootstrap = [], {}
    class_names = [data.get_class_name(label) for label in range(len(data.names))]
    for method, counts in result.counts.items():
        bootstrap[method] = compute_segmentation_metrics(counts, result.images)
        row = bootstrap[method].to_summary_row(method)
        row["IoU"] = dict(zip(class_names, compute_class_iou(counts), strict=True))
        if data.min_probability > 0:
            row["logit scale"] = result.logit_scales[method]
        rows.append(row)
    all_names = [name for names in data.names for name in names]
    summary = {"images": len(result.images), **count_prompts(embeddings, all_names, data.templates), "rows": rows}
    draw_examples = partial(build_segmentation_section, data, result)
    return BenchmarkResult(summary, data.images, bootstrap=bootstrap, draw_examples=draw_examples)


def segment_images(data: SegmentationData, embeddings: EmbeddingSource, variants: Sequence[str]) -> SegmentationResult:
    """Segment all images with each dense feature variant.

    In a distributed run, each rank processes a share of the images, and every rank returns the complete result.

    Raises:
        ValueError: The embeddings are precomputed, or the model supports none of the variants.
        TooManySkippedError: Too many images are unusable.
    """
    model = require_dual_encoder(embeddings)
    variants = select_dense_variants(model, variants, required=True)
    dense = model.dense
    assert dense is not None
    names = [name for class_names in data.names for name in class_names]
    queries = encode_class_names(embeddings, names, data.templates).to(dense.device)
    transform = WindowResizer.from_dense_encoder(dense, data.scale)
    example_indices = set(np.linspace(0, len(data.images) - 1, NUM_EXAMPLES).astype(int).tolist())
    # The logit scale affects the predictions only if there is a minimum probability.
    scales = get_logit_scales(model, data.logit_scale) if data.min_probability > 0 else {"": data.logit_scale}
    scale_of_method = {variant + suffix: scale for variant in variants for suffix, scale in scales.items()}
    results: dict[int, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}  # (counts, label maps) by image index
    failures: dict[int, str] = {}
    for resized in decode_image_batches(data.images, transform, "segmentation", failures):
        scores = {name: encode_windows(resized, dense, name, queries, transform) for name in variants}
        for index, (_, size) in resized.items():
            try:
                labels = _read_labels(data, index, size)
            except (ValueError, OSError) as error:
                failures[index] = str(error)
                continue
            counts, maps = {}, {"labels": labels}
            for variant in variants:
                for suffix, scale in scales.items():
                    method, pixel_scores = variant + suffix, scores[variant][index]
                    counts[method], maps[method] = _segment_image(pixel_scores, labels, data, scale)
            if index not in example_indices:
                maps = {}
            step = -(-max(labels.shape) // EXAMPLE_SIDE)
            results[index] = counts, {name: label_map[::step, ::step].copy() for name, label_map in maps.items()}
    results = gather_results(results, failures, data.images, embeddings.log)
    return SegmentationResult(
        images=list(results),
        counts={method: np.stack([counts[method] for counts, _ in results.values()]) for method in scale_of_method},
        logit_scales=scale_of_method,
        examples={index: maps for index, (_, maps) in results.items() if maps},
    )


def _read_labels(data: SegmentationData, index: int, size: tuple[int, int]) -> np.ndarray:
    labels = data.read_labels(index)
    if labels.shape != size:
        raise ValueError(
            f"the label map has {labels.shape[1]} x {labels.shape[0]} pixels, but the image has {size[1]} x "
            f"{size[0]} pixels"
        )
    return labels


def compute_segmentation_metrics(counts: np.ndarray, images: Sequence[int]) -> BootstrapMetrics:
    """Compute mmsegmentation's mIoU, aAcc and mAcc in percent, bootstrapped over images.

    mIoU excludes classes that are neither labelled nor predicted in any image. mAcc excludes classes that are not
    labelled in any image.
    """
    counts = counts.astype(np.float64)

    def compute_metrics(weights: np.ndarray) -> list[float]:
        intersection, labelled, predicted = np.tensordot(weights, counts, 1)  # (3, classes)
        with np.errstate(invalid="ignore"):  # 0 / 0 for classes that do not occur in a resample
            iou = intersection / (labelled + predicted - intersection)
            accuracy = intersection / labelled
        values = np.nanmean(iou), intersection.sum() / labelled.sum(), np.nanmean(accuracy)
        return [100.0 * float(value) for value in values]

    return BootstrapMetrics.from_function(images, ("mIoU", "pixel accuracy", "mean class accuracy"), compute_metrics)


def compute_class_iou(counts: np.ndarray) -> list[float | None]:
    """Return the IoU of each class in percent, or None for classes that are neither labelled nor predicted."""
    intersection, labelled, predicted = counts.sum(0)  # (3, classes)
    union = labelled + predicted - intersection
    return [100.0 * float(i) / float(u) if u else None for i, u in zip(intersection, union, strict=True)]


def build_segmentation_section(data: SegmentationData, result: SegmentationResult) -> list[Block]:
    colours = _make_class_palette(len(data.names))
    hidden = {IGNORED, 0} if data.has_background else {IGNORED}
    text = "Images at regular intervals in the dataset. Background and unlabelled pixels are not coloured."
    blocks: list[Block] = [Heading("Examples", 3), Paragraph(text)]
    for index, maps in result.examples.items():
        image = load_image(data.images[index])
        images = [ReportImage(encode_thumbnail(image, EXAMPLE_SIDE), "image")]
        shown: set[int] = set()
        for name, labels in maps.items():
            shown |= set(np.unique(labels).tolist()) - hidden
            visible = np.where(np.isin(labels, list(hidden)), IGNORED, labels)
            images.append(ReportImage(_render_label_overlay(image, visible, colours), name))
        legend = [(data.get_class_name(label), f"#{bytes(colours[label]).hex()}") for label in sorted(shown)]
        blocks.append(ReportImageGroup(images, str(data.images[index]), legend=legend))
    return blocks


@use_onednn_matmul()
def _segment_image(
    scores: PixelScores, labels: np.ndarray, data: SegmentationData, logit_scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Segment an image. Return pixel counts, int64 of shape (3, classes), and predictions, uint8 of shape (H, W).

    For each class, the counts are the number of correctly predicted pixels, the number of labelled pixels, and the
    number of predicted pixels. Ignored pixels are excluded.
    """
    num_classes = len(data.names)
    prediction = np.empty(labels.shape, np.uint8)
    counts = np.zeros((3, num_classes), np.int64)
    tiles = segment(
        scores,
        names_per_class=[len(class_names) for class_names in data.names],
        logit_scale=logit_scale,
        min_probability=data.min_probability,
        min_area=data.min_area,
    )
    for rows, tile in tiles:
        predicted = tile.to(torch.uint8).cpu().numpy()
        prediction[rows] = predicted
        is_labelled = labels[rows] != IGNORED
        predicted, correct = predicted[is_labelled], labels[rows][is_labelled]
        for n, values in enumerate((correct[predicted == correct], correct, predicted)):
            counts[n] += np.bincount(values, minlength=num_classes)
    return counts, prediction


def _make_class_palette(num_classes: int) -> np.ndarray:
    """Return an RGB colour for each class, uint8 of shape (classes, 3). Golden-ratio steps keep the hues distinct."""
    hsv = [(n * 0.618034 % 1, 1 - 0.25 * (n % 3), 1 - 0.2 * (n % 4)) for n in range(num_classes)]
    return (255 * np.array([colorsys.hsv_to_rgb(*colour) for colour in hsv])).astype(np.uint8)


def _render_label_overlay(image: Tensor, labels: np.ndarray, colours: np.ndarray) -> bytes:
    """Return a JPEG of an image, overlaid with the class colours of a label map except at `IGNORED` pixels."""
    rows, columns = (torch.arange(n) * size // n for n, size in zip(labels.shape, image.shape[1:], strict=True))
    pixels = image[:, rows][:, :, columns].permute(1, 2, 0).numpy()  # (h, w, 3)
    table = np.zeros((IGNORED + 1, 3), np.uint8)
    table[: len(colours)] = colours
    blended = ((1 - OVERLAY_OPACITY) * pixels + OVERLAY_OPACITY * table[labels]).astype(np.uint8)
    blended[labels == IGNORED] = pixels[labels == IGNORED]
    return encode_thumbnail(torch.from_numpy(blended).permute(2, 0, 1), EXAMPLE_SIDE)
