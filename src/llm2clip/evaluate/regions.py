"""Zero-shot classification of image regions, and helpers for all benchmarks that use dense features.

A region is embedded with one of these methods:

- "crop": The region is cropped and encoded as an image. As in CLIPSelf (arXiv 2310.01403), the box is first enlarged
    by a factor of 1.5 around its centre. The crop is padded with black to a square.
- Dense variants: The entire image is encoded. As in CLIPSelf, the patch embeddings within the box are averaged with
    RoIAlign (arXiv 1703.06870) at an adaptive sampling ratio, and the mean is L2-normalised.

The predicted class is the class whose embedding has the highest cosine similarity to the region embedding. By default,
class embeddings are averaged over OpenAI's prompt templates for ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.images import encode_thumbnail, iter_image_batches, load_image
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.benchmarks.base import BenchmarkResult, RegionData
from llm2clip.evaluate.classification import bootstrap_accuracy, compute_class_ranks, count_prompts, encode_class_names
from llm2clip.evaluate.embeddings import BATCH_SIZE, EmbeddingSource, ModelEmbeddings
from llm2clip.evaluate.metrics import BootstrapMetrics
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import encode_boxes as encode_dense_boxes
from llm2clip.progress import ProgressBar
from llm2clip.reports import Block, Heading, Paragraph, ReportImage, ReportImageGroup
from llm2clip.runs.ranks import print_once, process_state, wait_for_everyone

CROP = "crop"
CROP_SCALE = 1.5  # factor by which boxes are enlarged before cropping
SIZE_LIMITS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}
"""Minimum area (inclusive) and maximum area (exclusive) in square pixels for each of COCO's object sizes."""
THUMBNAIL_SIDE = 280  # maximum width and height of a thumbnail in pixels
IMAGES_PER_BATCH = 8  # number of images that are decoded at a time
LEARNED_SCALE = ", learned scale"  # name suffix of methods with the learned logit scale
T = TypeVar("T")


# ---- helpers for dense benchmarks ------------------------------------------------------------------------------------


def require_dual_encoder(embeddings: EmbeddingSource) -> DualEncoder:
    if not isinstance(embeddings, ModelEmbeddings):
        raise ValueError("precomputed embeddings cannot be used, because regions and pixels must be encoded by a model")
    return embeddings.model


def select_dense_variants(model: DualEncoder, variants: Sequence[str], required: bool) -> list[str]:
    """Return the requested dense feature variants that the model supports. Print which variants are skipped.

    Raises:
        ValueError: `required` is True and the model supports none of the variants.
    """
    available = model.dense.variants if model.dense is not None else ()
    supported = [variant for variant in variants if variant in available]
    skipped = ", ".join(variant for variant in variants if variant not in available)
    problem = f"{model.name} does not support --dense_variants {skipped} (supported: {', '.join(available) or 'none'})"
    if required and not supported:
        raise ValueError(problem)
    if skipped:
        print_once(f"Skipped dense variants: {problem}")
    return supported


def get_logit_scales(model: DualEncoder, protocol_scale: float) -> dict[str, float]:
    """Return the protocol's logit scale and, if the model has one, the learned logit scale.

    Published protocols use CLIP's scale, which may not suit models that learned a different scale. The keys of the dict
    are suffixes of method names: "" for the protocol's scale, and `LEARNED_SCALE` for the learned scale.
    """
    learned = model.logit_scale()
    return {"": protocol_scale} if learned is None else {"": protocol_scale, LEARNED_SCALE: learned}


def decode_image_batches(
    refs: Sequence[ImageRef], transform: Callable[[Tensor], T], description: str, failures: dict[int, str]
) -> Iterator[dict[int, T]]:
    """Decode and transform this rank's share of the images. Yield batches, keyed by image index in `refs`.

    `transform` must accept a uint8 tensor of shape (3, H, W) and be picklable. If an image cannot be decoded, the error
    message is added to `failures`, keyed by image index.
    """
    state = process_state()
    indices = range(state.process_index, len(refs), state.num_processes)
    with ProgressBar(total=len(indices), desc=description, unit="image", disable=not state.is_main_process) as bar:
        for decoded, items, errors in iter_image_batches([refs[i] for i in indices], transform, IMAGES_PER_BATCH):
            failures |= {indices[i]: reason for i, reason in errors.items()}
            yield {indices[i]: item for i, item in zip(decoded, items, strict=True)}
            bar.update(len(decoded) + len(errors))


def decode_images(
    refs: Sequence[ImageRef], sizes: Sequence[tuple[int, int]], description: str, failures: dict[int, str]
) -> Iterator[dict[int, Tensor]]:
    """Decode this rank's images in batches, as uint8 tensors of shape (3, H, W). See `decode_image_batches`.

    Images whose size differs from the annotated (width, height) in `sizes` are added to `failures` and not returned,
    because their boxes would be wrong.
    """
    for images in decode_image_batches(refs, nn.Identity(), description, failures):
        for index in list(images):
            width, height = sizes[index]
            actual_height, actual_width = images[index].shape[1:]
            if (actual_width, actual_height) != (width, height):
                failures[index] = (
                    f"the image has {actual_width} x {actual_height} pixels, but its annotations are for an image with "
                    f"{width} x {height} pixels"
                )
                del images[index]
        yield images


def gather_results(
    results: dict[int, T], failures: dict[int, str], refs: Sequence[ImageRef], log: SkipLog
) -> dict[int, T]:
    """Return the results of all ranks, sorted by image index. Log all unusable images.

    `results` and `failures` contain this rank's results and error messages, keyed by image index in `refs`.

    Raises:
        TooManySkippedError: Too many images are unusable.
        ValueError: There are no images, or no image is usable.
    """
    if process_state().num_processes > 1:
        # Without this barrier, gather_object would time out if some ranks finish much later than others.
        wait_for_everyone()
        for rank_results, rank_failures in gather_object([(results, failures)]):
            results |= rank_results
            failures |= rank_failures
    log.count_at_least(len(refs))
    for index, reason in sorted(failures.items()):
        log.skip(str(refs[index]), 0, "unusable image", reason)
    log.check()
    if not refs:
        raise ValueError("the benchmark contains no images")
    if len(failures) == len(refs):
        raise ValueError(f"none of the {len(refs):,} images can be used, e.g. {refs[0]} ({failures[0]})")
    return dict(sorted(results.items()))


# ---- classification --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegionPredictions:
    """Class predictions for R regions, as arrays of shape (R,)."""

    image: np.ndarray  # image index of each region
    region: np.ndarray  # index of each region among the regions of its image
    rank: np.ndarray  # zero-based rank of each region's correct class (see `compute_class_ranks`)
    predicted: np.ndarray  # index of each region's highest-scoring class
    margin: np.ndarray  # score of the predicted class minus score of the correct class, float32

    @classmethod
    def concatenate(cls, parts: Sequence[RegionPredictions]) -> RegionPredictions:
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__}
        order = np.lexsort((columns["region"], columns["image"]))
        return cls(**{name: values[order] for name, values in columns.items()})


def evaluate_regions(data: RegionData, embeddings: EmbeddingSource, variants: Sequence[str]) -> BenchmarkResult:
    predictions = classify_regions(data, embeddings, variants)
    rows, bootstrap = [], {}
    for method, method_predictions in predictions.items():
        bootstrap[method] = compute_region_metrics(data, method_predictions)
        accuracies = dict(zip(data.names, compute_class_accuracy(data, method_predictions), strict=True))
        rows.append(bootstrap[method].to_summary_row(method) | {"class top-1": accuracies})
    first_method, first_predictions = next(iter(predictions.items()))
    summary = {
        "images": len(set(first_predictions.image.tolist())),
        "regions": len(first_predictions.image),
        "excluded regions": dict(data.excluded),
        **count_prompts(embeddings, data.names, data.templates),
        "chance": 100.0 / len(data.names),
        "rows": rows,
    }
    draw_examples = partial(build_misclassified_region_section, data, first_method, first_predictions)
    return BenchmarkResult(summary, data.images, bootstrap=bootstrap, draw_examples=draw_examples)


def classify_regions(
    data: RegionData, embeddings: EmbeddingSource, variants: Sequence[str]
) -> dict[str, RegionPredictions]:
    """Classify all regions with "crop" and each dense variant. Return the predictions, keyed by method.

    Variants that the model does not support are skipped, and unusable images are recorded in `embeddings.log`. In a
    distributed run, each rank processes a share of the images, and every rank returns all predictions.
    """
    model = require_dual_encoder(embeddings)
    methods = [CROP, *select_dense_variants(model, variants, required=False)]
    classes = encode_class_names(embeddings, data.names, data.templates)
    batches: dict[int, dict[str, RegionPredictions]] = {}  # keyed by lowest image index in a batch, then by method
    failures: dict[int, str] = {}
    for images in decode_images(data.images, data.sizes, "regions", failures):
        boxes = [torch.from_numpy(data.boxes[index]) for index in images]
        for method in methods if images else ():
            regions = torch.cat(encode_boxes(model, list(images.values()), boxes, method))
            predictions = batches.setdefault(min(images), {})
            predictions[method] = _predict_classes(regions, list(images), data, classes)
    batches = gather_results(batches, failures, data.images, embeddings.log)
    return {method: RegionPredictions.concatenate([batch[method] for batch in batches.values()]) for method in methods}


def _predict_classes(regions: Tensor, indices: Sequence[int], data: RegionData, classes: Tensor) -> RegionPredictions:
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


def compute_region_metrics(data: RegionData, predictions: RegionPredictions) -> BootstrapMetrics:
    """Return the result of `bootstrap_accuracy`, with a subset for each COCO object size that has regions."""
    indices, image = np.unique(predictions.image, return_inverse=True)
    labels, areas = (np.concatenate([values[i] for i in indices]) for values in (data.labels, data.areas))
    sizes = {name: (areas >= low) & (areas < high) for name, (low, high) in SIZE_LIMITS.items()}
    sizes = {name: in_size_class for name, in_size_class in sizes.items() if in_size_class.any()}
    return bootstrap_accuracy(predictions.rank, labels, image, indices.tolist(), sizes)


def compute_class_accuracy(data: RegionData, predictions: RegionPredictions) -> list[float | None]:
    """Return the top-1 accuracy of each class in percent, or None for classes without regions."""
    labels = np.concatenate([data.labels[i] for i in np.unique(predictions.image)])
    counts = np.bincount(labels, minlength=len(data.names)).tolist()
    hits = np.bincount(labels[predictions.rank < 1], minlength=len(data.names)).tolist()
    return [100.0 * hit / count if count else None for hit, count in zip(hits, counts, strict=True)]


def build_misclassified_region_section(
    data: RegionData, method: str, predictions: RegionPredictions, count: int = 12
) -> list[Block]:
    """Return a report section with the errors that have the largest margins, at most one per image and per class."""
    order = np.argsort(-predictions.margin, kind="stable")
    images: list[ReportImage] = []
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
        images.append(ReportImage(encode_thumbnail(crop, THUMBNAIL_SIDE), caption, is_correct=False))
        if len(images) == count:
            break
    if not images:
        return []
    text = f"The largest-margin errors of the method {method}. Each image and each class is shown at most once."
    examples = ReportImageGroup(images, "Correct class and predicted class:")
    return [Heading("Misclassified regions", 3), Paragraph(text), examples]


# ---- embeddings of boxes ---------------------------------------------------------------------------------------------


def encode_boxes(model: DualEncoder, images: Sequence[Tensor], boxes: Sequence[Tensor], method: str) -> list[Tensor]:
    """Return the L2-normalised embeddings of the boxes in each image, float32 of shape (R, D) on the CPU.

    Args:
        images: uint8 tensors of shape (3, H, W).
        boxes: Boxes (left, top, right, bottom) of each image in pixels, float32 of shape (R, 4).
        method: "crop" or a dense feature variant.
    """
    if method != CROP:
        assert model.dense is not None
        return encode_dense_boxes(model.dense, images, boxes, method, model.embed_dim)
    pairs = zip(images, boxes, strict=True)
    crops = (crop_region(image, box) for image, image_boxes in pairs for box in image_boxes.tolist())
    embeddings = [torch.empty(0, model.embed_dim)]
    while batch := [model.transform(crop) for crop in islice(crops, BATCH_SIZE)]:
        embeddings.append(model.encode_images(batch))
    return list(torch.cat(embeddings).split([len(image_boxes) for image_boxes in boxes]))


def crop_region(image: Tensor, box: Sequence[float]) -> Tensor:
    """Crop a box (left, top, right, bottom) in pixels from an image, uint8 of shape (3, H, W). Return a square crop.

    The box is enlarged by `CROP_SCALE` around its centre and clipped to the image. The shorter dimension of the crop is
    padded with black on both sides.
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
