"""OV-COCO: open-vocabulary detection on COCO val2017, with 48 base classes and 17 novel classes.

The class split is from Bansal et al. (arXiv 1804.04340). As in OVR-CNN (arXiv 2011.10678), detectors choose from all 65
classes, the objects of COCO's other 15 classes are removed, and images without any remaining object are excluded.
"""

from __future__ import annotations

import importlib.util
from importlib.resources import files
from pathlib import Path

from llm2clip.evaluate.benchmarks.base import Benchmark, DetectionData
from llm2clip.evaluate.benchmarks.classification import imagenet_templates
from llm2clip.evaluate.benchmarks.coco_instances import (
    INSTANCES_FOLDERS,
    find_instances,
    image_refs,
    image_size,
    parse_box,
)
from llm2clip.io_utils import DataFormatError, MissingFileError, read_json


def class_split() -> dict[str, list[str]]:
    """Return the names of the base classes and of the novel classes, with the keys "base" and "novel"."""
    content = read_json(Path(str(files("llm2clip.evaluate.benchmarks") / "class_names" / "ov_coco.json")))
    return {group: content[group] for group in ("novel", "base")}


def _read_ov_coco(folder: Path) -> DetectionData:
    if importlib.util.find_spec("pycocotools") is None:
        raise MissingFileError("the average precision is computed by pycocotools: pip install 'llm2clip[dense]'")
    file = find_instances(folder)
    content = read_json(file)
    groups = class_split()
    names = [name for group in groups.values() for name in group]
    category_ids = {category["name"]: int(category["id"]) for category in content["categories"]}
    missing = [name for name in names if name not in category_ids]
    if missing:
        raise DataFormatError(f"{file} has no category {missing[0]!r}; {len(missing)} of {len(names)} are missing")
    used_ids = [category_ids[name] for name in names]
    annotations = [row for row in content["annotations"] if row["category_id"] in set(used_ids)]
    for row in annotations:
        parse_box(file, row)  # raises an error if it is invalid
    annotated = {row["image_id"] for row in annotations}
    images = [image for image in content["images"] if image["id"] in annotated]
    return DetectionData(
        images=image_refs(file, images),
        image_ids=[int(image["id"]) for image in images],
        sizes=[image_size(file, image) for image in images],
        annotations=annotations,
        names=names,
        category_ids=used_ids,
        groups=groups,
        templates=imagenet_templates(),
    )


BENCHMARKS = (
    Benchmark(
        name="ov-coco",
        kind="detection",
        description="4,836 images, 48 base classes and 17 novel classes (arXiv 1804.04340)",
        folders=INSTANCES_FOLDERS,
        read=_read_ov_coco,
        source="annotations/instances_val2017.json and val2017/ (cocodataset.org); --proposals selects the boxes",
    ),
)
