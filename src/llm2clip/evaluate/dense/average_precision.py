"""Average precision (AP) of detections, computed with pycocotools for groups of classes, with confidence intervals."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import DetectionData, ImageId
from llm2clip.evaluate.recall import bootstrap_counts, percentile_interval

if TYPE_CHECKING:
    from pycocotools.coco import COCO

MAX_DETECTIONS = 100  # per image, as in COCO's AP
AP50_INDEX = 0  # index of the IoU threshold 0.5 in COCO's thresholds 0.5, 0.55, ..., 0.95


@dataclass
class Detections:
    """Detections in one image, in order of decreasing score.

    Args:
        boxes: Corners (x0, y0, x1, y1) in pixels, float32 (N, 4).
        scores: Scores, float64 (N,).
        labels: Class indices, int64 (N,).
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


def detection_metrics(
    data: DetectionData, detections: Mapping[ImageId, Detections], resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """Return the average precision of each group of classes, in percent, with 95% confidence intervals.

    pycocotools' COCOeval matches the detections to the objects and computes the precision at 101 recall values. AP50 is
    measured at the IoU threshold 0.5, and AP is the mean over the thresholds 0.5, 0.55, ..., 0.95. A group's value is
    the mean over its classes. Classes without objects are excluded.

    The intervals are computed by a bootstrap over images, which reuses COCOeval's matches and recomputes only the
    precision for each resample.

    Args:
        data: Objects, classes and groups of classes.
        detections: Detections, keyed by image id. Images without an entry have no detections.
        resamples: Number of bootstrap resamples.

    Returns:
        {GROUP: {"AP50": ..., "AP50 interval": (low, high), "AP50 resamples": values in all resamples, float64
        (resamples,), "AP": ..., "classes": number of classes with objects, "class AP50": {CLASS: ...}}}, for the groups
        in `data.groups` and for the group "all".

    Raises:
        ValueError: If there are no objects except crowds.
    """
    evaluator = _run_coco_eval(data, detections)
    precision = evaluator.eval["precision"][..., 0, 0]  # (thresholds, recalls, classes), -1 for classes without objects
    class_ap = np.where(precision > -1, 100 * precision, np.nan).mean(1)  # (thresholds, classes)
    matches = [_class_matches(evaluator, k) for k in range(len(data.names))]
    recall_values = evaluator.params.recThrs
    resampled = []
    for weights in bootstrap_counts(len(data.image_ids), resamples):
        resampled.append([100 * weighted_ap(match, weights.numpy(), recall_values) for match in matches])
    resampled_ap50 = np.array(resampled)  # (resamples, classes)

    metrics: dict[str, dict[str, Any]] = {}
    for group, names in {**data.groups, "all": data.names}.items():
        classes = [k for k, name in enumerate(data.names) if name in names and not np.isnan(class_ap[AP50_INDEX, k])]
        if not classes:
            continue
        group_ap50 = resampled_ap50[:, classes]
        num_classes = (~np.isnan(group_ap50)).sum(1)  # a resample may have no objects of a class, or of the group
        means = np.where(num_classes > 0, np.nansum(group_ap50, axis=1) / np.maximum(num_classes, 1), np.nan)
        defined = torch.from_numpy(means[~np.isnan(means)])
        low, high = percentile_interval(defined, len(data.image_ids), (0.0, 100.0)).tolist()
        metrics[group] = {
            "AP50": float(class_ap[AP50_INDEX, classes].mean()),
            "AP50 interval": (low, high),
            "AP50 resamples": means,
            "AP": float(class_ap[:, classes].mean()),
            "classes": len(classes),
            "class AP50": {data.names[k]: float(class_ap[AP50_INDEX, k]) for k in classes},
        }
    if not metrics:
        raise ValueError("the images contain no objects except crowds, so the average precision is undefined")
    return metrics


@dataclass
class ClassMatches:
    """Matches of one class at the IoU threshold 0.5 in all images, in order of decreasing score.

    Args:
        image: Image index of each detection, (N,).
        is_correct: True for each detection that matches an object, bool (N,). Detections that match a crowd are
            omitted.
        objects: Number of objects in each image, excluding crowds, (images,).
    """

    image: np.ndarray
    is_correct: np.ndarray
    objects: np.ndarray


def weighted_ap(matches: ClassMatches, weights: np.ndarray, recall_values: np.ndarray) -> float:
    """Return the interpolated average precision of one class when image i is counted `weights[i]` times.

    This equals COCOeval's value for a data set in which the images are repeated. The result is NaN if there are no
    objects.

    Args:
        matches: Matches of the class.
        weights: Number of occurrences of each image, (images,).
        recall_values: Recall values at which the precision is averaged, (R,).
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
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # highest precision at this recall or at a higher recall
    positions = np.searchsorted(true_positives / num_objects, recall_values)
    reached = positions < len(precision)
    return float(np.where(reached, precision[np.minimum(positions, len(precision) - 1)], 0.0).mean())


def _run_coco_eval(data: DetectionData, detections: Mapping[ImageId, Detections]) -> Any:
    """Run COCOeval on boxes of all sizes. Category ids are class indices plus 1. Image ids are replaced by numbers.

    The numbers are in the order of the ids, because COCOeval sorts detections with equal scores by image id.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    classes = {category_id: k for k, category_id in enumerate(data.category_ids)}
    ordered_ids = sorted(data.image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
    numbers = {image_id: number for number, image_id in enumerate(ordered_ids)}
    objects = []
    for row in data.annotations:
        ids = {"image_id": numbers[row["image_id"]], "category_id": classes[row["category_id"]] + 1}
        objects.append({**row, **ids})
    predictions = []
    for image_id, detected in detections.items():
        corners = detected.boxes.double()
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], 1).tolist()
        for box, score, label in zip(boxes, detected.scores.tolist(), detected.labels.tolist(), strict=True):
            predictions.append({"image_id": numbers[image_id], "category_id": label + 1, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_to_coco(COCO(), data, objects), _to_coco(COCO(), data, predictions), "bbox")
        evaluator.params.areaRng, evaluator.params.areaRngLbl = [[0, float("inf")]], ["all"]
        evaluator.params.maxDets = [MAX_DETECTIONS]
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator


def _to_coco(coco: COCO, data: DetectionData, rows: Sequence[Mapping[str, Any]]) -> COCO:
    """Fill an empty COCO object with rows and return it. See `_run_coco_eval` for the ids."""
    annotations = []
    for number, row in enumerate(rows, 1):  # COCOeval treats a match with the id 0 as a missing match
        _, _, width, height = row["bbox"]
        annotations.append({"iscrowd": 0, "area": width * height, **row, "id": number})
    coco.dataset = {
        "images": [{"id": number} for number in range(len(data.image_ids))],
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(data.names)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _class_matches(evaluator: Any, k: int) -> ClassMatches:
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
