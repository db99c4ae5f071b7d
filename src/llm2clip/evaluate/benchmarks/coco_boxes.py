"""Region classification and open-vocabulary detection on COCO, LVIS, or the user's own file in COCO's format.

OV-COCO consists of COCO val2017 with 48 base classes and 17 novel classes. The class split is from Bansal et al. (arXiv
1804.04340). As in OVR-CNN (arXiv 2011.10678), detectors choose from all 65 classes, the objects of COCO's other 15
classes are removed, and images without any remaining object are excluded.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.evaluate.benchmarks.base import Benchmark, DetectionData, RegionData
from llm2clip.evaluate.benchmarks.classification import imagenet_templates
from llm2clip.evaluate.benchmarks.coco_instances import (
    INSTANCES_FOLDERS,
    Instances,
    clip_box,
    coco_file_benchmark,
    find_instances,
    image_refs,
    read_instances,
    require_pycocotools,
)
from llm2clip.io_utils import DataFormatError, first_existing, read_json

BOXES_PREFIX = "boxes:"
DETECTION_PREFIX = "detection:"
MIN_SIDE = 1.0  # pixels; smaller boxes are excluded from region classification
CROWD, DEGENERATE = "crowd", "smaller than a pixel"  # reasons for excluding a box


# ---- region classification -------------------------------------------------------------------------------------------


def boxes_benchmark(name: str, templates: Sequence[str] = ()) -> Benchmark:
    """Create a region classification benchmark from the user's JSON file in COCO's format.

    Args:
        name: Path of the file.
        templates: Prompt templates. Default: OpenAI's templates for ImageNet.
    """
    return coco_file_benchmark(
        BOXES_PREFIX,
        name,
        kind="regions",
        description="boxes with class names",
        source="a JSON file in COCO's format, with the images in the same folder or in images/",
        read=partial(read_boxes, templates=templates),
    )


def read_boxes(file: Path, templates: Sequence[str] = ()) -> RegionData:
    """Read boxes from a JSON file in COCO's format. Images without boxes are not included.

    Boxes are clipped to the image. Crowd boxes and boxes smaller than a pixel are excluded. In class names, underscores
    are replaced by spaces. By default, OpenAI's prompt templates for ImageNet are used.

    Raises:
        MissingFileError: If image files are missing, or open_clip, which provides the templates, is not installed.
        DataFormatError: If an annotation has an invalid box, or if there are no boxes. See also `read_instances`.
    """
    instances = read_instances(file)
    label_of_category = {category_id: label for label, category_id in enumerate(instances.names)}
    rows: dict[Any, list[tuple[list[float], int, float]]] = defaultdict(list)
    excluded: Counter[str] = Counter()
    for annotation in instances.annotations:
        image_id = annotation["image_id"]
        box = clip_box(file, annotation, instances.sizes[image_id])
        if annotation.get("iscrowd"):
            excluded[CROWD] += 1
        elif min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            excluded[DEGENERATE] += 1
        else:
            area = annotation.get("area", (box[2] - box[0]) * (box[3] - box[1]))
            rows[image_id].append((box, label_of_category[annotation["category_id"]], area))
    if not rows:
        raise DataFormatError(f"{file} contains no boxes that can be classified")
    used_ids = [image_id for image_id in instances.images if image_id in rows]
    return RegionData(
        images=image_refs(file, [instances.images[image_id] for image_id in used_ids]),
        sizes=[instances.sizes[image_id] for image_id in used_ids],
        boxes=[np.array([box for box, _, _ in rows[image_id]], np.float32) for image_id in used_ids],
        labels=[np.array([label for _, label, _ in rows[image_id]], np.int64) for image_id in used_ids],
        areas=[np.array([area for _, _, area in rows[image_id]], np.float32) for image_id in used_ids],
        names=list(instances.names.values()),
        templates=templates or imagenet_templates(),
        excluded=excluded,
    )


# ---- detection -------------------------------------------------------------------------------------------------------


def load_class_split() -> dict[str, list[str]]:
    """Return OV-COCO's class names, keyed by group: "novel" and "base"."""
    content = read_json(Path(str(files("llm2clip.evaluate.benchmarks") / "class_names" / "ov_coco.json")))
    return {group: content[group] for group in ("novel", "base")}


def detection_benchmark(name: str, templates: Sequence[str] = ()) -> Benchmark:
    """Create a detection benchmark from the user's JSON file in COCO's format.

    Args:
        name: Path of the file.
        templates: Prompt templates. Default: OpenAI's templates for ImageNet.
    """

    def read(file: Path) -> DetectionData:
        require_pycocotools()
        instances = read_instances(file)
        return read_detection(instances, list(instances.names), {}, templates or imagenet_templates(), with_empty=True)

    return coco_file_benchmark(
        DETECTION_PREFIX,
        name,
        kind="detection",
        description="objects with boxes",
        source="a JSON file in COCO's format, with the images in the same folder or in images/; --proposals selects "
        "the boxes",
        read=read,
    )


def read_detection(
    instances: Instances,
    category_ids: Sequence[Any],
    groups: Mapping[str, Sequence[str]],
    templates: Sequence[str],
    with_empty: bool = False,
) -> DetectionData:
    """Return the objects of the given categories, and the images that contain them.

    Boxes are clipped to the image, like the boxes of detections. Objects whose clipped boxes are empty are excluded.

    Args:
        groups: Groups of class names for which metrics are reported.
        with_empty: If True, also return images without objects of these categories.

    Raises:
        MissingFileError: If image files are missing.
        DataFormatError: If an annotation has an invalid box, or there are no objects apart from crowds.
    """
    used_categories = set(category_ids)
    annotations = []
    for row in instances.annotations:
        left, top, right, bottom = clip_box(instances.file, row, instances.sizes[row["image_id"]])
        if row["category_id"] in used_categories and right > left and bottom > top:
            annotations.append({**row, "bbox": [left, top, right - left, bottom - top]})
    if all(row.get("iscrowd") for row in annotations):
        problem = "only crowds" if annotations else "no objects of these classes"
        raise DataFormatError(f"{instances.file} contains {problem}, so the average precision is undefined")
    annotated = {row["image_id"] for row in annotations}
    image_ids = [image_id for image_id in instances.images if with_empty or image_id in annotated]
    return DetectionData(
        images=image_refs(instances.file, [instances.images[image_id] for image_id in image_ids]),
        image_ids=image_ids,
        sizes=[instances.sizes[image_id] for image_id in image_ids],
        annotations=annotations,
        names=[instances.names[category_id] for category_id in category_ids],
        category_ids=list(category_ids),
        groups=groups,
        templates=templates,
    )


def _read_ov_coco(folder: Path) -> DetectionData:
    require_pycocotools()
    instances = read_instances(find_instances(folder))
    groups = load_class_split()
    names = [name for group in groups.values() for name in group]
    category_ids = {name: category_id for category_id, name in instances.names.items()}
    missing = [name for name in names if name not in category_ids]
    if missing:
        raise DataFormatError(
            f"{instances.file} has no category {missing[0]!r}; {len(missing)} of {len(names)} are missing"
        )
    return read_detection(instances, [category_ids[name] for name in names], groups, imagenet_templates())


BENCHMARKS = (
    Benchmark(
        name="coco-boxes",
        kind="regions",
        description="36,335 boxes of 80 classes in COCO val2017",
        folders=INSTANCES_FOLDERS,
        read=lambda folder: read_boxes(find_instances(folder)),
        source="annotations/instances_val2017.json and val2017/ (cocodataset.org)",
    ),
    Benchmark(
        name="lvis-boxes",
        kind="regions",
        description="244,707 boxes of 1,203 classes in LVIS v1's validation split",
        folders=INSTANCES_FOLDERS,
        read=lambda folder: read_boxes(first_existing(folder, "annotations/lvis_v1_val.json", "lvis_v1_val.json")),
        source="annotations/lvis_v1_val.json (lvisdataset.org), and COCO's train2017/ and val2017/ (cocodataset.org)",
    ),
    Benchmark(
        name="ov-coco",
        kind="detection",
        description="4,836 images, 48 base classes and 17 novel classes (arXiv 1804.04340)",
        folders=INSTANCES_FOLDERS,
        read=_read_ov_coco,
        source="annotations/instances_val2017.json and val2017/ (cocodataset.org); --proposals selects the boxes",
    ),
)
