"""Evaluation of open-vocabulary detection, in which an image-text model classifies class-agnostic boxes.

The model embeds each box, and class probabilities are computed from cosine similarities to the class embeddings. As in
RegionCLIP (arXiv 2112.09106), a detection's score is the geometric mean of the objectness and the class probability,
and non-maximum suppression is applied to each class separately. Average precision (AP) is computed with pycocotools and
averaged over groups of classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_convert, box_iou, nms
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from llm2clip.config import EvaluateOptions
from llm2clip.data.images import encode_thumbnail, load_image
from llm2clip.evaluate.benchmarks.base import BenchmarkResult, DetectionData, ImageId
from llm2clip.evaluate.classification import count_prompts, encode_class_names
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.metrics import BootstrapMetrics, draw_bootstrap_counts
from llm2clip.evaluate.proposals import GROUND_TRUTH, Proposals, get_object_boxes, open_proposal_source
from llm2clip.evaluate.regions import (
    CROP,
    decode_images,
    encode_boxes,
    gather_results,
    get_logit_scales,
    require_dual_encoder,
    select_dense_variants,
)
from llm2clip.reports import Block, Heading, Paragraph, ReportImage, ReportImageGroup
from llm2clip.runs.ranks import process_state

if TYPE_CHECKING:
    from pycocotools.coco import COCO

LOGIT_SCALE = 100.0  # as in CLIP; equivalent to RegionCLIP's temperature of 0.01
NMS_IOU = 0.5  # IoU threshold of non-maximum suppression, as in RegionCLIP
MAX_CANDIDATES = 1000  # maximum number of box-class pairs per image before non-maximum suppression
RECALL_IOU = 0.5  # an object is covered by a proposal if their IoU is at least `RECALL_IOU`
EXAMPLE_SIDE = 480  # length of the longer side of example images in pixels
EXAMPLE_BOXES = 8  # maximum number of boxes drawn on an example image
MAX_DETECTIONS = 100  # maximum number of detections per image, as in COCO
AP50_INDEX = 0  # index of 0.5 in COCO's IoU thresholds (0.5, 0.55, ..., 0.95)


@dataclass
class Detections:
    """Detections in one image, sorted by descending score."""

    boxes: Tensor  # corners (x0, y0, x1, y1) in pixels, float32 of shape (N, 4)
    scores: Tensor  # scores between 0 and 1, float64 of shape (N,)
    labels: Tensor  # class indices, int64 of shape (N,)


@dataclass
class DetectionResults:
    """A model's detections in all images, for each method.

    A method is a dense feature variant or "crop", combined with a logit scale (see `get_logit_scales`).
    """

    by_method: dict[str, dict[ImageId, Detections]]
    logit_scales: dict[str, float]
    num_proposals: int
    num_covered: int  # number of objects covered by a proposal (see `RECALL_IOU`)
    num_objects: int  # number of objects, excluding crowds
    note: str  # see `open_proposal_source`
    failures: dict[int, str]  # error messages for unusable images, keyed by image index

    def describe_proposals(self, source: str) -> dict[str, Any]:
        recall = 100.0 * self.num_covered / max(1, self.num_objects)
        description = (
            f"Proposals from {source}: {self.num_proposals:,} boxes, which cover {recall:.1f}% of the objects at an "
            f"IoU threshold of {RECALL_IOU}."
        )
        if self.note:
            description += f" {self.note}."
        is_upper_bound = source == GROUND_TRUTH
        if is_upper_bound:
            description += " The AP is an upper bound, because the proposals are the annotated boxes."
        values = {"source": source, "boxes": self.num_proposals, "recall": recall, "is_upper_bound": is_upper_bound}
        return values | {"description": description}


def evaluate_detection(data: DetectionData, embeddings: EmbeddingSource, options: EvaluateOptions) -> BenchmarkResult:
    if options.proposals is None:
        raise ValueError(
            "a detection benchmark requires box proposals: pass --proposals FILE.json (COCO's results format), "
            "--proposals DETECTOR or --proposals ground-truth"
        )
    results = detect_objects(data, embeddings, options.proposals, options.dense_variants, options.crop_proposals)
    description = results.describe_proposals(options.proposals)
    usable = exclude_images(data, results.failures)
    rows, bootstrap = [], {}
    for method, detections in results.by_method.items():
        metrics, class_ap50 = compute_detection_metrics(usable, detections)
        values = {**metrics.values, "proposal recall": description["recall"]}
        bootstrap[method] = dataclasses.replace(metrics, values=values)
        row = bootstrap[method].to_summary_row(method)
        rows.append(row | {"class AP50": class_ap50, "logit scale": results.logit_scales[method]})
    first_method, first_detections = next(iter(results.by_method.items()))
    summary = {
        "images": len(first_detections),
        **count_prompts(embeddings, data.names, data.templates),
        "proposals": description,
        "rows": rows,
    }
    draw_examples = partial(build_detection_section, usable, first_method, first_detections)
    return BenchmarkResult(summary, data.images, bootstrap=bootstrap, draw_examples=draw_examples)


def detect_objects(
    data: DetectionData, embeddings: EmbeddingSource, proposals: str, variants: Sequence[str], with_crops: bool = False
) -> DetectionResults:
    """Classify the box proposals (see `open_proposal_source`) in all images with each method.

    If `with_crops` is True, the methods include "crop", which encodes each box as a separate image. In a distributed
    run, each rank processes a share of the images, and every rank returns all detections.

    Raises:
        ValueError: The embeddings are precomputed, or the model supports none of the variants.
        TooManySkippedError: Too many images are unusable.
    """
    model = require_dual_encoder(embeddings)
    methods = select_dense_variants(model, variants, required=not with_crops) + ([CROP] if with_crops else [])
    find_proposals, note = open_proposal_source(proposals, data, process_state().device)
    classes = encode_class_names(embeddings, data.names, data.templates)
    objects = get_object_boxes(data)
    scales = get_logit_scales(model, LOGIT_SCALE)
    # (detections of each method, numbers of proposals, covered objects and all objects), keyed by image index
    results: dict[int, tuple[dict[str, Detections], tuple[int, int, int]]] = {}
    failures: dict[int, str] = {}
    for images in decode_images(data.images, data.sizes, "detection", failures):
        boxes: dict[int, Proposals] = {}
        detections: dict[int, dict[str, Detections]] = {index: {} for index in images}
        for index, image in images.items():
            boxes[index] = find_proposals(data.image_ids[index], image).select_top_proposals(*image.shape[1:])
        for method in methods:
            corners = [image_boxes.boxes for image_boxes in boxes.values()]
            box_embeddings = encode_boxes(model, list(images.values()), corners, method)
            for index, embedded in zip(images, box_embeddings, strict=True):
                for suffix, scale in scales.items():
                    detections[index][method + suffix] = classify_boxes(boxes[index], embedded, classes, scale)
        for index in images:
            true_boxes = objects.get(data.image_ids[index], torch.zeros(0, 4))
            is_covered = (box_iou(true_boxes, boxes[index].boxes) >= RECALL_IOU).any(1)
            results[index] = detections[index], (len(boxes[index].boxes), int(is_covered.sum()), len(true_boxes))
    results = gather_results(results, failures, data.images, embeddings.log)
    num_proposals, num_covered, num_objects = np.array([counts for _, counts in results.values()]).sum(0).tolist()
    scale_of_method = {method + suffix: scale for method in methods for suffix, scale in scales.items()}
    by_method: dict[str, dict[ImageId, Detections]] = {method: {} for method in scale_of_method}
    for index, (image_detections, _) in results.items():
        for method, detected in image_detections.items():
            by_method[method][data.image_ids[index]] = detected
    return DetectionResults(by_method, scale_of_method, num_proposals, num_covered, num_objects, note, failures)


def exclude_images(data: DetectionData, excluded: Collection[int]) -> DetectionData:
    """Return a copy of the data without the images whose indices are in `excluded`, and without their annotations."""
    indices = [index for index in range(len(data.images)) if index not in excluded]
    image_ids = [data.image_ids[index] for index in indices]
    remaining = set(image_ids)
    return dataclasses.replace(
        data,
        images=[data.images[index] for index in indices],
        image_ids=image_ids,
        sizes=[data.sizes[index] for index in indices],
        annotations=[row for row in data.annotations if row["image_id"] in remaining],
    )


def classify_boxes(
    proposals: Proposals, box_embeddings: Tensor, classes: Tensor, logit_scale: float = LOGIT_SCALE
) -> Detections:
    """Classify the boxes in an image and return up to `MAX_DETECTIONS` detections.

    score(box, class) = sqrt(objectness * p), where p is the softmax of logit_scale * cosine over all classes.
    Detections with equal scores are sorted by box index and then by class index. Embeddings must be L2-normalised.
    """
    # In float32, many probabilities would be rounded to 1, so the order of the boxes would be arbitrary.
    probabilities = (logit_scale * box_embeddings.double() @ classes.double().T).softmax(1)  # (boxes, classes)
    scores = (proposals.scores.double()[:, None] * probabilities).sqrt().flatten()
    positions = scores.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    scores = scores[positions]
    boxes = proposals.boxes[positions // len(classes)]
    labels = positions % len(classes)
    remaining = batched_nms(boxes.double(), scores, labels, NMS_IOU)[:MAX_DETECTIONS]
    return Detections(boxes[remaining], scores[remaining], labels[remaining])


def build_detection_section(
    data: DetectionData, method: str, detections: Mapping[ImageId, Detections], count: int = 6
) -> list[Block]:
    images = []
    for n in torch.linspace(0, len(data.images) - 1, min(count, len(data.images))).long().tolist():
        detected = detections.get(data.image_ids[n])
        if detected is not None:
            images.append(_draw_detections(load_image(data.images[n]), detected, data.names))
    if not images:
        return []
    text = (
        f"The {EXAMPLE_BOXES} highest-scoring detections in each image with the method {method}. If detections "
        "overlap, only the detection with the highest score is shown."
    )
    examples = ReportImageGroup(images, "Example images at regular intervals in the dataset:")
    return [Heading("Detections", 3), Paragraph(text), examples]


def _draw_detections(image: Tensor, detected: Detections, names: Sequence[str]) -> ReportImage:
    height, width = image.shape[1:]
    scale = EXAMPLE_SIDE / max(height, width)
    drawn = F.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)
    shown = nms(detected.boxes.double(), detected.scores, NMS_IOU)[:EXAMPLE_BOXES]
    labels = [names[k] for k in detected.labels[shown].tolist()]
    if labels:
        boxes = detected.boxes[shown] * scale
        drawn = draw_bounding_boxes(drawn, boxes, labels, "yellow", width=2, label_colors="black", fill_labels=True)
    scores = detected.scores[shown].tolist()
    caption = ", ".join(f"{label} {score:.2f}" for label, score in zip(labels, scores, strict=True))
    return ReportImage(encode_thumbnail(drawn, EXAMPLE_SIDE), caption or "no detections")


def compute_detection_metrics(
    data: DetectionData, detections: Mapping[ImageId, Detections], resamples: int = 1000
) -> tuple[BootstrapMetrics, dict[str, float]]:
    """Compute the average precision (AP) of each class and each group of classes, in percent.

    COCOeval from pycocotools matches detections to objects and computes the precision at 101 recall values. AP50 uses
    an IoU threshold of 0.5, and AP is the mean over the IoU thresholds 0.5, 0.55, ..., 0.95. The AP of a group is the
    mean over all classes in the group that have objects. Images without detections may be missing in `detections`.

    Returns:
        Metrics "AP50 GROUP" and "AP GROUP" for each group in `data.groups` and for the group "all", and the AP50 of
        each class with objects. Only the AP50 of groups has bootstrap resamples.

    Raises:
        ValueError: There are no objects except crowds.
    """
    evaluator = _run_coco_eval(data, detections)
    precision = evaluator.eval["precision"][..., 0, 0]  # (IoU thresholds, recalls, classes), -1 if undefined
    class_ap = np.where(precision > -1, 100 * precision, np.nan).mean(1)  # (thresholds, classes)
    class_ap50 = class_ap[AP50_INDEX]
    matches = [_extract_class_matches(evaluator, k) for k in range(len(data.names))]
    recall_values = evaluator.params.recThrs
    resampled = []
    for weights in draw_bootstrap_counts(len(data.image_ids), resamples):
        resampled.append([100 * _compute_weighted_ap(match, weights.numpy(), recall_values) for match in matches])
    resampled_ap50 = np.array(resampled)  # (resamples, classes)

    ap50: dict[str, float] = {}
    ap: dict[str, float] = {}
    group_resamples: dict[str, np.ndarray] = {}
    for group, names in {**data.groups, "all": data.names}.items():
        classes = [k for k, name in enumerate(data.names) if name in names and not np.isnan(class_ap50[k])]
        if not classes:
            continue
        group_ap50 = resampled_ap50[:, classes]
        num_classes = (~np.isnan(group_ap50)).sum(1)  # some resamples do not contain all classes
        means = np.where(num_classes > 0, np.nansum(group_ap50, axis=1) / np.maximum(num_classes, 1), np.nan)
        group_resamples[f"AP50 {group}"] = means
        ap50[f"AP50 {group}"] = float(class_ap50[classes].mean())
        ap[f"AP {group}"] = float(class_ap[:, classes].mean())
    if not ap50:
        raise ValueError("the average precision is undefined, because the images contain no objects except crowds")
    metrics = BootstrapMetrics(tuple(data.image_ids), ap50 | ap, group_resamples)
    return metrics, {name: float(class_ap50[k]) for k, name in enumerate(data.names) if not np.isnan(class_ap50[k])}


def convert_to_coco_results(data: DetectionData, detections: Mapping[ImageId, Detections]) -> list[dict[str, Any]]:
    rows = []
    for image_id, detected in detections.items():
        boxes = box_convert(detected.boxes.double(), "xyxy", "xywh").tolist()
        for box, score, label in zip(boxes, detected.scores.tolist(), detected.labels.tolist(), strict=True):
            category_id = data.category_ids[label]
            rows.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return rows


@dataclass
class _ClassMatches:
    """Detections of a class in all images, matched to objects at an IoU of 0.5 and sorted by descending score.

    Crowds and detections that match crowds are excluded.
    """

    image: np.ndarray  # image index of each detection, int64 of shape (N,)
    is_correct: np.ndarray  # mask of detections that match an object, bool of shape (N,)
    objects: np.ndarray  # number of objects in each image, float64 of shape (images,)


def _compute_weighted_ap(matches: _ClassMatches, weights: np.ndarray, recall_values: np.ndarray) -> float:
    """Return the interpolated average precision of a class, counting image i `weights[i]` times.

    The precision is averaged over `recall_values`. Except for ties, the result is the same as that of COCOeval for a
    dataset with repeated images. Return NaN if there are no objects.
    """
    num_objects = float(weights @ matches.objects)
    if num_objects == 0:
        return float("nan")
    if len(matches.image) == 0:
        return 0.0
    weight = weights[matches.image]
    true_positives = np.cumsum(weight * matches.is_correct)
    num_detections = np.cumsum(weight)
    precision = true_positives / np.maximum(num_detections, 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # maximum precision at any higher or equal recall
    positions = np.searchsorted(true_positives / num_objects, recall_values)
    reached = positions < len(precision)
    return float(np.where(reached, precision[np.minimum(positions, len(precision) - 1)], 0.0).mean())


def _run_coco_eval(data: DetectionData, detections: Mapping[ImageId, Detections]) -> Any:
    """Run COCOeval without a breakdown by box size.

    Category ids are replaced by class indices plus 1. Image ids are replaced by integers in the same order, because
    COCOeval sorts detections with equal scores by image id.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    category_ids = {category_id: k + 1 for k, category_id in enumerate(data.category_ids)}
    ordered_ids = sorted(data.image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    image_ids = {image_id: number for number, image_id in enumerate(ordered_ids)}

    def build_coco_dataset(rows: Sequence[Mapping[str, Any]]) -> COCO:
        annotations = []
        for number, row in enumerate(rows, 1):  # COCOeval treats a match with id 0 as no match
            _, _, width, height = row["bbox"]
            ids = {"image_id": image_ids[row["image_id"]], "category_id": category_ids[row["category_id"]]}
            annotations.append({"iscrowd": 0, "area": width * height, **row, **ids, "id": number})
        coco = COCO()
        coco.dataset = {
            "images": [{"id": number} for number in image_ids.values()],
            "categories": [
                {"id": category_ids[i], "name": name} for i, name in zip(data.category_ids, data.names, strict=True)
            ],
            "annotations": annotations,
        }
        coco.createIndex()
        return coco

    with contextlib.redirect_stdout(io.StringIO()):
        results = build_coco_dataset(convert_to_coco_results(data, detections))
        evaluator = COCOeval(build_coco_dataset(data.annotations), results, "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _extract_class_matches(evaluator: Any, k: int) -> _ClassMatches:
    num_images = len(evaluator.params.imgIds)
    scores, images, is_correct = [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, bool)]
    objects = np.zeros(num_images)
    for i, result in enumerate(evaluator.evalImgs[k * num_images : (k + 1) * num_images]):
        if result is None:  # the image has no objects and no detections of the class
            continue
        counted = ~result["dtIgnore"][AP50_INDEX].astype(bool)
        scores.append(np.asarray(result["dtScores"], float)[counted])
        is_correct.append(result["dtMatches"][AP50_INDEX][counted] > 0)
        images.append(np.full(int(counted.sum()), i))
        objects[i] = np.count_nonzero(np.asarray(result["gtIgnore"]) == 0)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")  # stable sort, as in COCOeval
    return _ClassMatches(np.concatenate(images)[order], np.concatenate(is_correct)[order], objects)
