"""Region classification: boxes with class names from COCO, LVIS, or the user's own file in COCO's format.

COCO's format is {"images": [{"id", "file_name", "width", "height"}], "annotations": [{"id", "image_id", "category_id",
"bbox", "area", "iscrowd"}], "categories": [{"id", "name"}]}, where "bbox" is [left, top, width, height] in pixels
(cocodataset.org, "Data format"). LVIS has "coco_url" instead of "file_name", and no crowd boxes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.readers.coco import drop_unused_keys
from llm2clip.evaluate.benchmarks.base import Benchmark, RegionData
from llm2clip.evaluate.benchmarks.classification import imagenet_templates
from llm2clip.evaluate.benchmarks.coco_instances import (
    INSTANCES_FOLDERS,
    find_instances,
    image_refs,
    image_size,
    parse_box,
)
from llm2clip.io_utils import DataFormatError, first_existing, read_json

BOXES_PREFIX = "boxes:"
MIN_SIDE = 1.0  # pixels; smaller boxes are excluded
CROWD, DEGENERATE = "crowd", "smaller than a pixel"  # reasons for excluding a box


def boxes_benchmark(name: str) -> Benchmark:
    """Create a region classification benchmark from the user's JSON file in COCO's format.

    As for COCO captions, the images can be next to the file or in a folder such as `images`.
    """
    file = Path(name).expanduser().absolute()

    def read(folder: Path) -> RegionData:
        return read_boxes(first_existing(folder, file.name))

    return Benchmark(
        name=BOXES_PREFIX + name,
        kind="regions",
        description="boxes with class names",
        folders=(str(file.parent),),
        read=read,
        source="a JSON file in COCO's format, with the images in the same folder or in images/",
    )


def read_boxes(file: Path) -> RegionData:
    """Read boxes from a JSON file in COCO's format. Images without boxes are not included.

    Boxes are clipped to the image. Crowd boxes and boxes smaller than a pixel are excluded. The class names are those
    in the file, with underscores replaced by spaces, and the prompt templates are OpenAI's for ImageNet.

    Raises:
        MissingFileError: If image files are missing, or open_clip, which provides the templates, is not installed.
        DataFormatError: If an annotation refers to an unknown image or category or has an invalid box, or if there are
            no boxes.
    """
    data = read_json(file, drop_unused_keys)  # polygons take up a lot of memory
    categories = sorted(data["categories"], key=lambda category: category["id"])
    label_of_category = {category["id"]: label for label, category in enumerate(categories)}
    images = {image["id"]: image for image in data["images"]}
    sizes = {image_id: image_size(file, image) for image_id, image in images.items()}
    rows: dict[Any, list[tuple[list[float], int, float]]] = defaultdict(list)
    excluded: Counter[str] = Counter()
    for annotation in data["annotations"]:
        image = images.get(annotation["image_id"])
        label = label_of_category.get(annotation["category_id"])
        if image is None or label is None:
            part = f"image {annotation['image_id']}" if image is None else f"category {annotation['category_id']}"
            raise DataFormatError(f"{file}: annotation {annotation.get('id')} refers to {part}, which does not exist")
        box = _clipped_box(file, annotation, sizes[annotation["image_id"]])
        if annotation.get("iscrowd"):
            excluded[CROWD] += 1
        elif min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            excluded[DEGENERATE] += 1
        else:
            area = annotation.get("area", (box[2] - box[0]) * (box[3] - box[1]))
            rows[annotation["image_id"]].append((box, label, area))
    if not rows:
        raise DataFormatError(f"{file} contains no boxes that can be classified")
    used_images = [image for image_id, image in images.items() if image_id in rows]
    return RegionData(
        images=image_refs(file, used_images),
        sizes=[sizes[image["id"]] for image in used_images],
        boxes=[np.array([box for box, _, _ in rows[image["id"]]], np.float32) for image in used_images],
        labels=[np.array([label for _, label, _ in rows[image["id"]]], np.int64) for image in used_images],
        areas=[np.array([area for _, _, area in rows[image["id"]]], np.float32) for image in used_images],
        names=[category["name"].replace("_", " ") for category in categories],
        templates=imagenet_templates(),
        excluded=excluded,
    )


def _clipped_box(file: Path, annotation: Mapping[str, Any], image_size: tuple[int, int]) -> list[float]:
    """Return a box as (left, top, right, bottom), clipped to an image with the given width and height."""
    left, top, width, height = parse_box(file, annotation)
    corners = np.array([left, top, left + width, top + height])
    clipped: list[float] = corners.clip(0, np.array([*image_size, *image_size])).tolist()
    return clipped


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
