"""Box proposals for open-vocabulary detection, from a file, a detector or the ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert, clip_boxes_to_image

from llm2clip.evaluate.benchmarks.base import DetectionData, ImageId
from llm2clip.io_utils import DataFormatError, MissingFileError, read_json
from llm2clip.models.loading import load_transformers_config

GROUND_TRUTH = "ground-truth"
MAX_COORDINATE = 1 << 24  # limit for coordinates in pixels; float32 represents smaller integers exactly
MAX_PROPOSALS = 300  # only the highest-scoring proposals in each image are used


@dataclass
class Proposals:
    """Class-agnostic boxes in an image."""

    boxes: Tensor  # corners (x0, y0, x1, y1) in pixels, float32 of shape (N, 4)
    scores: Tensor  # objectness scores between 0 and 1, float32 of shape (N,)

    def select_top_proposals(self, height: int, width: int) -> Proposals:
        """Clip the boxes to the image. Return up to `MAX_PROPOSALS` non-empty boxes, sorted by descending score."""
        boxes = clip_boxes_to_image(self.boxes, (height, width))
        order = self.scores.argsort(descending=True, stable=True)
        is_empty = (boxes[:, 2:] <= boxes[:, :2]).any(1)
        order = order[~is_empty[order]][:MAX_PROPOSALS]
        return Proposals(boxes[order], self.scores[order])


ProposalFinder = Callable[[ImageId, Tensor], Proposals]
"""Function that takes an image id and a uint8 image of shape (3, H, W), and returns box proposals."""


def open_proposal_source(name: str, data: DetectionData, device: torch.device) -> tuple[ProposalFinder, str]:
    """Open a source of box proposals: "ground-truth", a JSON file in COCO's results format, or a detector.

    A detector is specified by the folder or hub id of a transformers object detection model. Its labels are ignored.

    Returns:
        A function that returns the proposals for an image, and a warning about unused boxes and images without boxes
        (may be empty).

    Raises:
        MissingFileError: The JSON file does not exist.
        DataFormatError: The JSON file is invalid or has no boxes for the images.
        ValueError: transformers cannot load the detector.
    """
    if name == GROUND_TRUTH:
        note = ""
        proposals = {key: Proposals(boxes, torch.ones(len(boxes))) for key, boxes in get_object_boxes(data).items()}
    elif name.endswith(".json"):
        proposals, note = _read_proposals_file(Path(name), data)
    else:
        detect_boxes = _load_detector(name, device)
        return lambda image_id, image: detect_boxes(image), ""
    nothing = Proposals(torch.zeros(0, 4), torch.zeros(0))
    return lambda image_id, image: proposals.get(image_id, nothing), note


def get_object_boxes(data: DetectionData) -> dict[ImageId, Tensor]:
    """Return the boxes (x0, y0, x1, y1) of all objects except crowds, float32 of shape (N, 4), keyed by image id."""
    boxes: dict[ImageId, list[list[float]]] = {}
    for row in data.annotations:
        if not row.get("iscrowd"):
            boxes.setdefault(row["image_id"], []).append(row["bbox"])
    return {key: box_convert(torch.tensor(rows, dtype=torch.float32), "xywh", "xyxy") for key, rows in boxes.items()}


def _read_proposals_file(file: Path, data: DetectionData) -> tuple[dict[ImageId, Proposals], str]:
    """Read a JSON file in COCO's results format: a list of {"image_id", "bbox": [x, y, w, h], "score"}."""
    if not file.is_file():
        raise MissingFileError(f"{file} does not exist: --proposals requires a JSON file in COCO's results format")
    rows = read_json(file)
    if not isinstance(rows, list):
        raise DataFormatError(f"{file} must be a list of {{image_id, bbox, score}} objects (got {type(rows).__name__})")
    ids_by_text = {str(image_id): image_id for image_id in data.image_ids}  # some tools write numeric ids as text
    rows_of_image: dict[ImageId, list[list[float]]] = {}
    num_unknown = 0
    for number, row in enumerate(rows, 1):
        id_text, values = _parse_proposal(file, number, row)
        image_id = ids_by_text.get(id_text)
        if image_id is not None:
            rows_of_image.setdefault(image_id, []).append(values)
        else:
            num_unknown += 1
    if not rows_of_image:
        raise DataFormatError(f"{file} contains no boxes for the benchmark's images: check the image_id values")
    notes = []
    if num_unknown:
        notes.append(f"{num_unknown:,} of {len(rows):,} boxes refer to images that are not in the benchmark")
    num_missing = len(data.image_ids) - len(rows_of_image)
    if num_missing:
        notes.append(f"{num_missing:,} of {len(data.image_ids):,} images have no boxes")
    proposals = {}
    for image_id, image_rows in rows_of_image.items():
        boxes_and_scores = torch.tensor(image_rows)  # (N, 5)
        boxes = box_convert(boxes_and_scores[:, :4], "xywh", "xyxy")
        proposals[image_id] = Proposals(boxes, boxes_and_scores[:, 4])
    return proposals, f"{file}: {'; '.join(notes)}" if notes else ""


def _parse_proposal(file: Path, number: int, row: Any) -> tuple[str, list[float]]:
    try:
        image_id = row["image_id"]
        if isinstance(image_id, float) and image_id.is_integer():  # pandas may write the id 139 as 139.0
            image_id = int(image_id)
        if not isinstance(image_id, int | str):
            raise TypeError(f"the image_id {image_id!r} must be an integer or a string")
        values = [*map(float, row["bbox"]), float(row["score"])]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DataFormatError(
            f'{file}, row {number}: expected {{"image_id": 1, "bbox": [x, y, w, h], "score": 0.9}} '
            f"({type(error).__name__}: {error}; got {str(row)[:200]})"
        ) from error
    if len(values) != 5 or not all(abs(value) < MAX_COORDINATE for value in values) or min(values[2:4]) < 0:
        raise DataFormatError(
            f"{file}, row {number}: the box {row['bbox']} is invalid. A box must be [x, y, width, height] in pixels, "
            f"with values less than {MAX_COORDINATE:,}. Width and height must not be negative"
        )
    if not 0 <= values[4] <= 1:
        raise DataFormatError(
            f"{file}, row {number}: scores must be between 0 and 1 (got {values[4]:g}). Apply a sigmoid to logits"
        )
    return str(image_id), values


def _load_detector(name: str, device: torch.device) -> Callable[[Tensor], Proposals]:
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        config = load_transformers_config(name)
        model = AutoModelForObjectDetection.from_pretrained(name, config=config, trust_remote_code=False)
        model = model.eval().to(device)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--proposals {name}: cannot load a transformers object detection model ({error}). Pass ground-truth, a "
            "JSON file in COCO's results format, or the folder or hub id of an object detection model"
        ) from error

    @torch.inference_mode()
    def detect_boxes(image: Tensor) -> Proposals:
        inputs = processor(images=image, return_tensors="pt").to(device)
        size = torch.tensor([image.shape[-2:]])
        [result] = processor.post_process_object_detection(model(**inputs), threshold=0.0, target_sizes=size)
        return Proposals(result["boxes"].float().cpu(), result["scores"].float().cpu())

    return detect_boxes
