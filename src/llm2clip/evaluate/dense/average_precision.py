"""Average precision (AP) of detections, computed with pycocotools for groups of classes, with confidence intervals."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torchvision.ops import box_convert

from llm2clip.evaluate.benchmarks.base import DetectionData, ImageId
from llm2clip.evaluate.bootstrap import BootstrapMetrics, bootstrap_counts

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MAX_DETECTIONS = 100  # per image, as in COCO's AP
AP50_INDEX = 0  # index of the IoU threshold 0.5 in COCO's thresholds 0.5, 0.55, ..., 0.95


@dataclass
class Detections:
    """Detections in one image, in order of decreasing score.

    Args:
        boxes: Corners (x0, y0, x1, y1) in pixels, float32 of shape (N, 4).
        scores: Between 0 and 1, float64 of shape (N,).
        labels: Class indices, int64 of shape (N,).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detection_metrics(
    data: DetectionData, detections: Mapping[ImageId, Detections], resamples: int = 1000
) -> tuple[BootstrapMetrics, dict[str, float]]:
    """Return the average precision of each group of classes and of each class, in percent.

    pycocotools' COCOeval matches the detections to the objects and computes the precision at 101 recall values. AP50 is
    measured at the IoU threshold 0.5, and AP is the mean over the thresholds 0.5, 0.55, ..., 0.95. A group's value is
    the mean over its classes. Classes without objects are excluded.

    The bootstrap is over images. It reuses COCOeval's matches and recomputes only the precision for each resample.

    Args:
        detections: Detections, keyed by image id. Images without an entry have no detections.

    Returns:
        Metrics "AP50 GROUP" and "AP GROUP" for each group in `data.groups` and for the group "all", and the AP50 of
        each class that has objects. Only "AP50 GROUP" has resamples.

    Raises:
        ValueError: If there are no objects except crowds.
    """
    evaluator = _run_coco_eval(data, detections)
    precision = evaluator.eval["precision"][..., 0, 0]  # (thresholds, recalls, classes), -1 for classes without objects
    class_ap = np.where(precision > -1, 100 * precision, np.nan).mean(1)  # (thresholds, classes)
    class_ap50 = class_ap[AP50_INDEX]
    matches = [_extract_class_matches(evaluator, k) for k in range(len(data.names))]
    recall_values = evaluator.params.recThrs
    resampled = []
    for weights in bootstrap_counts(len(data.image_ids), resamples):
        resampled.append([100 * weighted_ap(match, weights.numpy(), recall_values) for match in matches])
    resampled_ap50 = np.array(resampled)  # (resamples, classes)

    ap50: dict[str, float] = {}
    ap: dict[str, float] = {}
    group_resamples: dict[str, np.ndarray] = {}
    for group, names in {**data.groups, "all": data.names}.items():
        classes = [k for k, name in enumerate(data.names) if name in names and not np.isnan(class_ap50[k])]
        if not classes:
            continue
        group_ap50 = resampled_ap50[:, classes]
        num_classes = (~np.isnan(group_ap50)).sum(1)  # a resample may have no objects of a class or of any class
        means = np.where(num_classes > 0, np.nansum(group_ap50, axis=1) / np.maximum(num_classes, 1), np.nan)
        group_resamples[f"AP50 {group}"] = means
        ap50[f"AP50 {group}"] = float(class_ap50[classes].mean())
        ap[f"AP {group}"] = float(class_ap[:, classes].mean())
    if not ap50:
        raise ValueError("the images contain no objects except crowds, so the average precision is undefined")
    metrics = BootstrapMetrics(tuple(data.image_ids), ap50 | ap, group_resamples)
    return metrics, {name: float(class_ap50[k]) for k, name in enumerate(data.names) if not np.isnan(class_ap50[k])}


def to_result_rows(data: DetectionData, detections: Mapping[ImageId, Detections]) -> list[dict[str, Any]]:
    """Return the detections in COCO's results format: "image_id", "category_id", "bbox" as [x, y, w, h] and "score"."""
    rows = []
    for image_id, detected in detections.items():
        boxes = box_convert(detected.boxes.double(), "xyxy", "xywh").tolist()
        for box, score, label in zip(boxes, detected.scores.tolist(), detected.labels.tolist(), strict=True):
            category_id = data.category_ids[label]
            rows.append({"image_id": image_id, "category_id": category_id, "bbox": box, "score": score})
    return rows


@dataclass
class ClassMatches:
    """Matches of one class at the IoU threshold 0.5 in all images, in order of decreasing score.

    Args:
        image: Image index of each detection, of shape (N,).
        is_correct: Boolean mask of the detections that match an object, of shape (N,). Detections that match a crowd
            are omitted.
        objects: Number of objects in each image, excluding crowds, of shape (images,).
    """

    image: np.ndarray
    is_correct: np.ndarray
    objects: np.ndarray


def weighted_ap(matches: ClassMatches, weights: np.ndarray, recall_values: np.ndarray) -> float:
    """Return the interpolated average precision of one class when image i is counted `weights[i]` times.

    This equals COCOeval's value for a data set in which the images are repeated. The result is NaN if there are no
    objects.

    Args:
        weights: Number of occurrences of each image, of shape (images,).
        recall_values: Recall values at which the precision is averaged, of shape (R,).
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
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # maximum precision at this or any higher recall
    positions = np.searchsorted(true_positives / num_objects, recall_values)
    reached = positions < len(precision)
    return float(np.where(reached, precision[np.minimum(positions, len(precision) - 1)], 0.0).mean())


def _run_coco_eval(data: DetectionData, detections: Mapping[ImageId, Detections]) -> Any:
    """Run COCOeval on boxes of all sizes.

    Category ids are replaced by class indices plus 1, and image ids by integers. The integers preserve the order of the
    image ids, because COCOeval sorts detections with equal scores by image id.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    category_ids = {category_id: k + 1 for k, category_id in enumerate(data.category_ids)}
    ordered_ids = sorted(data.image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    image_ids = {image_id: number for number, image_id in enumerate(ordered_ids)}

    def to_coco(rows: Sequence[Mapping[str, Any]]) -> COCO:
        annotations = []
        for number, row in enumerate(rows, 1):  # COCOeval treats a match with the id 0 as a missing match
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
        evaluator = COCOeval(to_coco(data.annotations), to_coco(to_result_rows(data, detections)), "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _extract_class_matches(evaluator: Any, k: int) -> ClassMatches:
    """Extract COCOeval's matches of class k at the IoU threshold 0.5."""
    num_images = len(evaluator.params.imgIds)
    scores, images, is_correct = [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, bool)]
    objects = np.zeros(num_images)
    for i, result in enumerate(evaluator.evalImgs[k * num_images : (k + 1) * num_images]):
        if result is None:  # neither objects nor detections
            continue
        counted = ~result["dtIgnore"][AP50_INDEX].astype(bool)
        scores.append(np.asarray(result["dtScores"], float)[counted])
        is_correct.append(result["dtMatches"][AP50_INDEX][counted] > 0)
        images.append(np.full(int(counted.sum()), i))
        objects[i] = np.count_nonzero(np.asarray(result["gtIgnore"]) == 0)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")  # the same order as in COCOeval
    return ClassMatches(np.concatenate(images)[order], np.concatenate(is_correct)[order], objects)
