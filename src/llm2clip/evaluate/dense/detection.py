"""Open-vocabulary detection: classification of class-agnostic boxes with an image-text model.

The model embeds each box, and the cosine similarities to the class embeddings determine the class probabilities. As in
RegionCLIP (arXiv 2112.09106), the score of a box for a class is the geometric mean of the box's objectness and the
class probability, followed by non-maximum suppression per class.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, nms
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from llm2clip.data.images import load_image, make_thumbnail
from llm2clip.evaluate.benchmarks.base import DetectionData, ImageId
from llm2clip.evaluate.dense import (
    decode_images,
    gather_from_ranks,
    get_dense_encoder,
    get_model,
    logit_scales,
    record_failures,
    supported_variants,
)
from llm2clip.evaluate.dense.average_precision import MAX_DETECTIONS, Detections, to_result_rows
from llm2clip.evaluate.dense.proposals import GROUND_TRUTH, Proposals, object_boxes, open_proposals
from llm2clip.evaluate.dense.regions import CROP, encode_boxes
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.zero_shot import encode_classes
from llm2clip.html_report import Block, Heading, Paragraph, ResultImage, ResultImages
from llm2clip.io_utils import atomic_write_text, safe_name
from llm2clip.runs.ranks import process_state

LOGIT_SCALE = 100.0  # as in CLIP; RegionCLIP uses a temperature of 0.01
NMS_IOU = 0.5  # as in RegionCLIP
MAX_CANDIDATES = 1000  # (box, class) pairs per image, before non-maximum suppression
RECALL_IOU = 0.5  # minimum IoU with a proposal for an object to count as covered
EXAMPLE_SIDE = 480  # pixels
EXAMPLE_BOXES = 8  # boxes per example image


@dataclass
class DetectionResults:
    """A model's detections in all images.

    Args:
        by_method: Detections, keyed by method and image id. Each method is evaluated with the protocol's logit scale
            and, if the model has a learned logit scale, also with the learned scale. See `logit_scales`.
        logit_scales: Logit scale of each method.
        num_boxes: Number of proposals.
        num_covered: Number of objects covered by a proposal, excluding crowds.
        num_objects: Number of objects, excluding crowds.
        note: See `ProposalSource.note`.
        failures: Reason why each unusable image was skipped, keyed by the image's index.
    """

    by_method: dict[str, dict[ImageId, Detections]]
    logit_scales: dict[str, float]
    num_boxes: int = 0
    num_covered: int = 0
    num_objects: int = 0
    note: str = ""
    failures: dict[int, str] = field(default_factory=dict)

    def describe_proposals(self, source: str) -> dict[str, Any]:
        """Return the number of proposals, their recall in percent, and sentences that describe them."""
        recall = 100.0 * self.num_covered / max(1, self.num_objects)
        description = (
            f"Proposals from {source}: {self.num_boxes:,} boxes, which cover {recall:.1f}% of the objects at an IoU of "
            f"{RECALL_IOU}."
        )
        if self.note:
            description += f" {self.note}."
        is_upper_bound = source == GROUND_TRUTH
        if is_upper_bound:
            description += " These are the boxes of the annotated objects, so the AP is an upper bound."
        return {
            "source": source,
            "boxes": self.num_boxes,
            "recall": recall,
            "is_upper_bound": is_upper_bound,
            "description": description,
        }


def detect_objects(
    data: DetectionData, embeddings: EmbeddingSource, proposals: str, variants: Sequence[str], with_crops: bool = False
) -> DetectionResults:
    """Classify the proposals in all images with each method. Each image is decoded once.

    In a distributed run, the images are split across the ranks, and every rank returns all detections.

    Args:
        embeddings: Embedding source that runs a model. Images that cannot be used are recorded in `embeddings.log`.
        variants: Variants of the dense features. See `DENSE_VARIANTS`. Variants that the model does not support are
            skipped.
        with_crops: If True, also classify the boxes with the method "crop", which encodes each box as a separate image.
            See `regions.py`.

    Raises:
        ValueError: If the embeddings are precomputed, the model supports none of the variants, or the proposals are
            invalid.
        TooManySkipped: If too many images cannot be used.
    """
    model = get_model(embeddings)
    methods = supported_variants(model, variants) + ([CROP] if with_crops else [])
    if not methods:
        get_dense_encoder(model, variants)  # raises an error with the reason
    source = open_proposals(proposals, data, process_state().device)
    classes = encode_classes(embeddings, data.names, data.templates)
    objects = object_boxes(data)
    scales = logit_scales(model, LOGIT_SCALE)
    scale_of_method = {method + suffix: scale for method in methods for suffix, scale in scales.items()}
    local = DetectionResults({method: {} for method in scale_of_method}, scale_of_method)
    for images in decode_images(data.images, data.sizes, "detection", local.failures):
        boxes_of_image = {}
        for index, image in images.items():
            image_id = data.image_ids[index]
            boxes_of_image[image_id] = source.find(image_id, image).top(*image.shape[1:])
        corners = [boxes.boxes for boxes in boxes_of_image.values()]
        for method in methods:
            box_embeddings = encode_boxes(model, list(images.values()), corners, method)
            for (image_id, boxes), embedded in zip(boxes_of_image.items(), box_embeddings, strict=True):
                for suffix, scale in scales.items():
                    detections = classify_boxes(boxes, embedded, classes, scale)
                    local.by_method[method + suffix][image_id] = detections
        for image_id, boxes in boxes_of_image.items():
            true_boxes = objects.get(image_id, torch.zeros(0, 4))
            is_covered = (box_iou(true_boxes, boxes.boxes) >= RECALL_IOU).any(1)
            local.num_boxes += len(boxes.boxes)
            local.num_covered += int(is_covered.sum())
            local.num_objects += len(true_boxes)
    parts = gather_from_ranks(local)
    failures = {index: reason for part in parts for index, reason in part.failures.items()}
    record_failures(embeddings.log, data.images, failures)
    return DetectionResults(
        by_method={m: {key: d for part in parts for key, d in part.by_method[m].items()} for m in scale_of_method},
        logit_scales=scale_of_method,
        num_boxes=sum(part.num_boxes for part in parts),
        num_covered=sum(part.num_covered for part in parts),
        num_objects=sum(part.num_objects for part in parts),
        note=source.note,
        failures=failures,
    )


def drop_images(data: DetectionData, excluded: Collection[int]) -> DetectionData:
    """Return the data without the images at the given indices and without the objects in these images."""
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
    """Return the detections in one image, at most `MAX_DETECTIONS`.

    score(box, class) = sqrt(objectness * p) in float64, where p is the softmax of logit_scale * cosine over classes.
    Detections with equal scores are in the order of their boxes and classes.

    Args:
        proposals: P class-agnostic boxes.
        box_embeddings: Box embeddings of shape (P, D), L2-normalised.
        classes: Class embeddings of shape (C, D), L2-normalised.
        logit_scale: Factor for the cosine similarities before the softmax.
    """
    # float32 would round many probabilities to 1, and the order of equal scores would be arbitrary.
    probabilities = (logit_scale * box_embeddings.double() @ classes.double().T).softmax(1)  # (boxes, classes)
    scores = (proposals.scores.double()[:, None] * probabilities).sqrt().flatten()
    positions = scores.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    scores = scores[positions]
    boxes = proposals.boxes[positions // len(classes)]
    labels = positions % len(classes)
    remaining = batched_nms(boxes.double(), scores, labels, NMS_IOU)[:MAX_DETECTIONS]
    return Detections(boxes[remaining], scores[remaining], labels[remaining])


def write_detections(folder: Path, method: str, data: DetectionData, detections: Mapping[ImageId, Detections]) -> None:
    """Write METHOD.json: the detections of a method in COCO's results format, which `COCO.loadRes` reads."""
    rows = to_result_rows(data, detections)
    atomic_write_text(folder / f"{safe_name(method)}.json", json.dumps(rows))


def detection_blocks(
    data: DetectionData, method: str, detections: Mapping[ImageId, Detections], count: int = 6
) -> list[Block]:
    """Return a report section with a few regularly sampled images and their highest-scoring detections."""
    images = []
    for n in torch.linspace(0, len(data.images) - 1, min(count, len(data.images))).long().tolist():
        detected = detections.get(data.image_ids[n])
        if detected is not None:
            images.append(_draw_detections(load_image(data.images[n]), detected, data.names))
    if not images:
        return []
    text = (
        f"The {EXAMPLE_BOXES} highest-scoring detections per image, with the method {method}. Of overlapping "
        "detections, only the highest-scoring one is shown."
    )
    return [Heading("Detections", 3), Paragraph(text), ResultImages("Images sampled at regular intervals:", images)]


def _draw_detections(image: Tensor, detected: Detections, names: Sequence[str]) -> ResultImage:
    """Draw the highest-scoring detections on an image. Of overlapping boxes, only the best one is drawn."""
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
    return ResultImage(make_thumbnail(drawn, EXAMPLE_SIDE), None, caption or "no detections")
