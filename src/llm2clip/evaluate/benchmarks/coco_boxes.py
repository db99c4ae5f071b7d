"""Region classification: boxes with class names from COCO, LVIS, or the user's own file in COCO's format.

COCO's format is {"images": [{"id", "file_name", "width", "height"}], "annotations": [{"id", "image_id", "category_id",
"bbox", "area", "iscrowd"}], "categories": [{"id", "name"}]}, where "bbox" is [left, top, width, height] in pixels
(cocodataset.org, "Data format"). LVIS has "coco_url" instead of "file_name", and no crowd boxes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.readers.coco import drop_unused_keys
from llm2clip.evaluate.benchmarks.base import Benchmark, RegionData
from llm2clip.evaluate.benchmarks.classification import imagenet_templates
from llm2clip.evaluate.benchmarks.coco_instances import (
    INSTANCES_FOLDERS,
    clip_box,
    find_instances,
    image_refs,
    read_instances,
)
from llm2clip.io_utils import DataFormatError, first_existing

BOXES_PREFIX = "boxes:"
MIN_SIDE = 1.0  # pixels; smaller boxes are excluded
CROWD, DEGENERATE = "crowd", "smaller than a pixel"  # reasons for excluding a box


def boxes_benchmark(name: str, templates: Sequence[str] = ()) -> Benchmark:
    """Create a region classification benchmark from the user's JSON file in COCO's format.

    As for COCO captions, the images can be next to the file or in a folder such as `images`.

    Args:
        name: Path of the file.
        templates: Prompt templates. Default: OpenAI's for ImageNet.
    """
    file = Path(name).expanduser().absolute()

    def read(folder: Path) -> RegionData:
        return read_boxes(first_existing(folder, file.name), templates)

    return Benchmark(
        name=BOXES_PREFIX + name,
        kind="regions",
        description="boxes with class names",
        folders=(str(file.parent),),
        read=read,
        source="a JSON file in COCO's format, with the images in the same folder or in images/",
    )


def read_boxes(file: Path, templates: Sequence[str] = ()) -> RegionData:
    """Read boxes from a JSON file in COCO's format. Images without boxes are not included.

    Boxes are clipped to the image. Crowd boxes and boxes smaller than a pixel are excluded. The class names are those
    in the file, with underscores replaced by spaces, and the prompt templates are OpenAI's for ImageNet by default.

    Raises:
        MissingFileError: If image files are missing, or open_clip, which provides the templates, is not installed.
        DataFormatError: If an annotation has an invalid box, or if there are no boxes. See also `read_instances`.
    """
    instances = read_instances(file, drop_unused_keys)  # polygons take up a lot of memory
    label_of_category = {category_id: label for label, category_id in enumerate(instances.names)}
    rows: dict[Any, list[tuple[list[float], int, float]]] = defaultdict(list)
    excluded: Counter[str] = Counter()
    for annotation in instances.annotations:
        image_id = annotation["image_id"]
        box = clip_box(file, annotation, instances.sizes[image_id]).tolist()
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


def _read_coco(folder: Path) -> RegionData:
    return read_boxes(find_instances(folder))


def _read_lvis(folder: Path) -> RegionData:
    return read_boxes(first_existing(folder, "annotations/lvis_v1_val.json", "lvis_v1_val.json"))


BENCHMARKS = (
    Benchmark(
        name="coco-boxes",
        kind="regions",
        description="36,335 boxes of 80 classes in COCO val2017",
        folders=INSTANCES_FOLDERS,
        read=_read_coco,
        source="annotations/instances_val2017.json and val2017/ (cocodataset.org)",
    ),
    Benchmark(
        name="lvis-boxes",
        kind="regions",
        description="244,707 boxes of 1,203 classes in LVIS v1's validation split",
        folders=INSTANCES_FOLDERS,
        read=_read_lvis,
        source="annotations/lvis_v1_val.json (lvisdataset.org), and COCO's train2017/ and val2017/ (cocodataset.org)",
    ),
)
