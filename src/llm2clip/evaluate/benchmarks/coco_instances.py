"""Readers for region classification and detection benchmarks: COCO, LVIS, OV-COCO and files in COCO's format.

The format is {"images": [{"id", "file_name", "width", "height"}], "annotations": [{"id", "image_id", "category_id",
"bbox", "segmentation", "area", "iscrowd"}], "categories": [{"id", "name"}]}, where "bbox" is [left, top, width, height]
in pixels (cocodataset.org, "Data format"). LVIS has "coco_url" instead of "file_name", and does not annotate crowds.

OV-COCO is COCO val2017 with the 48 base classes and 17 novel classes of Bansal et al. (arXiv 1804.04340). As in OVR-CNN
(arXiv 2011.10678), objects are classified among all 65 classes. Objects of COCO's other 15 classes are removed, and
images without remaining objects are excluded.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.data.formats.text_files import drop_unused_json_keys, find_image_folder, guess_image_folders
from llm2clip.data.image_header import MAX_PIXELS
from llm2clip.data.image_refs import ImageRef
from llm2clip.evaluate.benchmarks.base import (
    DetectionData,
    ImageId,
    RegionData,
    check_image_files_exist,
    resolve_benchmark_image,
)
from llm2clip.evaluate.benchmarks.classification import get_imagenet_templates
from llm2clip.io_utils import DataFormatError, MissingFileError, find_first_existing, read_json, require_extra

MIN_SIDE = 1.0  # minimum box width and height in pixels for region classification
CROWD, DEGENERATE = "crowd", "smaller than a pixel"  # reasons for excluding a box


@dataclass(frozen=True)
class CocoAnnotations:
    """Contents of an annotation file in COCO's format."""

    file: Path
    images: dict[ImageId, dict[str, Any]]
    sizes: dict[ImageId, tuple[int, int]]  # width and height of each image in pixels
    annotations: list[dict[str, Any]]  # "image_id" and "category_id" are keys of `images` and `names`
    names: dict[Any, str]  # keyed by category id, in ascending order


def read_coco_annotations(file: Path, with_masks: bool = False, needs_pycocotools: bool = False) -> CocoAnnotations:
    """Read a JSON file in COCO's format. Print a warning if several categories have the same name.

    Raises:
        MissingFileError: pycocotools, which is required for masks and average precision, is not installed.
        DataFormatError: Ids are not unique, a name or size is invalid, or an annotation refers to an unknown id.
    """
    if with_masks or needs_pycocotools:
        require_extra("dense", f"{file}: reading masks and computing the average precision", MissingFileError)
    data = read_json(file, None if with_masks else drop_unused_json_keys)  # masks take up much memory
    images: dict[ImageId, dict[str, Any]] = {}
    for image in data["images"]:
        if image["id"] in images:
            raise DataFormatError(f"{file}: several images have the id {image['id']!r}. Ids must be unique")
        images[image["id"]] = image
    names = _parse_category_names(file, data["categories"])
    if not images:
        raise DataFormatError(f"{file} lists no images")
    for annotation in data["annotations"]:
        for field, known_ids in (("image", images), ("category", names)):
            if annotation[f"{field}_id"] not in known_ids:
                raise DataFormatError(
                    f"{file}: annotation {annotation.get('id')} refers to {field} {annotation[f'{field}_id']!r}, "
                    "which does not exist"
                )
    sizes = {image_id: _parse_image_size(file, image) for image_id, image in images.items()}
    return CocoAnnotations(file, images, sizes, data["annotations"], names)


def _parse_category_names(file: Path, categories: Sequence[Mapping[str, Any]]) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for category in sorted(categories, key=lambda category: category["id"]):
        name = category["name"].replace("_", " ").strip()
        if not name:
            raise DataFormatError(f"{file}: category {category['id']} has no name")
        if category["id"] in names:
            raise DataFormatError(f"{file}: several categories have the id {category['id']}. Ids must be unique")
        names[category["id"]] = name
    for name, count in Counter(names.values()).items():
        if count > 1:
            from llm2clip.runs.ranks import print_once  # imports PyTorch, which is slow

            print_once(
                f"{file}: {count} categories have the name {name!r}, so the model cannot distinguish them and "
                "the metrics are too low. Rename or merge the categories"
            )
    return names


def find_coco_annotations(folder: Path) -> Path:
    return find_first_existing(folder, "annotations/instances_val2017.json", "instances_val2017.json")


def make_image_refs(file: Path, images: Sequence[Mapping[str, Any]]) -> list[ImageRef]:
    names = []
    for image in images:
        # LVIS specifies only a URL, e.g. http://images.cocodataset.org/val2017/000000397133.jpg.
        names.append(image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))
    folder = Path(find_image_folder(str(file), names, guess_image_folders(str(file), images)))
    refs: list[ImageRef] = [resolve_benchmark_image(folder, name) for name in names]
    check_image_files_exist(refs, file)
    return refs


def _parse_image_size(file: Path, image: Mapping[str, Any]) -> tuple[int, int]:
    width: Any = image.get("width")
    height: Any = image.get("height")
    is_valid = isinstance(width, int) and isinstance(height, int) and min(width, height) > 0
    if not is_valid or width * height > MAX_PIXELS:
        raise DataFormatError(
            f"{file}: image {image.get('id')} has width {width!r} and height {height!r}. Both must be positive "
            f"integers, and an image must have at most {MAX_PIXELS:,} pixels"
        )
    return width, height


def get_clipped_box(file: Path, annotation: Mapping[str, Any], image_size: tuple[int, int]) -> list[float]:
    """Return the box of an annotation as [left, top, right, bottom] in pixels, clipped to the image."""
    box: Any = annotation.get("bbox")
    is_valid = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not is_valid or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise DataFormatError(
            f"{file}: annotation {annotation.get('id')} has the bbox {box}. A bbox must have the form "
            "[left, top, width, height], in pixels"
        )
    left, top, width, height = box
    corners = np.array([left, top, left + width, top + height], np.float64)
    clipped: list[float] = corners.clip(0, [*image_size, *image_size]).tolist()
    return clipped


# ---- masks ---------------------------------------------------------------------------------------------------------


def decode_mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decode polygons or COCO's run-length encoding (RLE) into a mask, bool of shape (height, width).

    Raise ValueError if the mask is invalid. pycocotools does not validate masks: polygons far outside the image can
    exhaust the memory, and incomplete run lengths yield uninitialised memory. Polygon coordinates are therefore checked
    here, and RLE is decoded without pycocotools.
    """
    if isinstance(segmentation, list):
        from pycocotools import mask

        coordinates = np.concatenate([np.asarray(polygon, np.float64) for polygon in segmentation])
        if not (np.abs(coordinates) <= 2 * max(height, width)).all():  # also raise an error for NaN
            raise ValueError(f"a polygon is far outside the image ({width} x {height} pixels)")
        decoded: np.ndarray = mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width))) > 0
        return decoded
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(f"the mask size is {segmentation['size']}, but the image size is {[height, width]}")
    runs = segmentation["counts"]
    if not isinstance(runs, list):
        runs = _decompress_run_lengths(runs.encode() if isinstance(runs, str) else runs)
    if not all(type(run) is int and run >= 0 for run in runs):
        raise ValueError("run lengths must be non-negative integers")
    if sum(runs) != height * width:
        raise ValueError(f"the run lengths cover {sum(runs)} pixels, but the image has {height * width} pixels")
    values = np.arange(len(runs)) % 2 == 1  # runs of zeros and ones alternate, starting with zeros
    return np.repeat(values, runs).reshape(width, height).T  # COCO stores masks in column-major order


def _decompress_run_lengths(data: bytes) -> list[int]:
    """Decode COCO's compressed run lengths (`rleFrString` in pycocotools' maskApi.c).

    Starting with the fourth run length, each run length is stored as the difference from the run length two positions
    earlier. A number is a two's complement integer, split into groups of five bits, least significant group first. A
    sixth bit is set if more groups of the number follow. Adding 48 to the six bits yields an ASCII character.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for byte in data:
        group = byte - 48
        if not 0 <= group < 64:
            raise ValueError(f"the compressed run lengths contain the invalid character {chr(byte)!r}")
        value |= (group & 31) << shift
        shift += 5
        if shift > 60:
            raise ValueError("the compressed run lengths contain a number that is too large")
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value, shift = 0, 0
    if shift:
        raise ValueError("the compressed run lengths are truncated")
    return runs


def read_region_data(file: Path, templates: Sequence[str] = ()) -> RegionData:
    """Read boxes from a JSON file in COCO's format. Images without boxes are omitted.

    Boxes are clipped to the image. Crowds are excluded, and so are boxes whose width or height is less than a pixel. By
    default, OpenAI's prompt templates for ImageNet are used.
    """
    instances = read_coco_annotations(file)
    label_of_category = {category_id: label for label, category_id in enumerate(instances.names)}
    rows: dict[Any, list[tuple[list[float], int, float]]] = defaultdict(list)
    excluded: Counter[str] = Counter()
    for annotation in instances.annotations:
        image_id = annotation["image_id"]
        box = get_clipped_box(file, annotation, instances.sizes[image_id])
        if annotation.get("iscrowd"):
            excluded[CROWD] += 1
        elif min(box[2] - box[0], box[3] - box[1]) < MIN_SIDE:
            excluded[DEGENERATE] += 1
        else:
            area = annotation.get("area", (box[2] - box[0]) * (box[3] - box[1]))
            rows[image_id].append((box, label_of_category[annotation["category_id"]], area))
    if not rows:
        raise DataFormatError(f"{file} contains no boxes except crowds and boxes smaller than a pixel")
    used_ids = [image_id for image_id in instances.images if image_id in rows]
    return RegionData(
        images=make_image_refs(file, [instances.images[image_id] for image_id in used_ids]),
        sizes=[instances.sizes[image_id] for image_id in used_ids],
        boxes=[np.array([box for box, _, _ in rows[image_id]], np.float32) for image_id in used_ids],
        labels=[np.array([label for _, label, _ in rows[image_id]], np.int64) for image_id in used_ids],
        areas=[np.array([area for _, _, area in rows[image_id]], np.float32) for image_id in used_ids],
        names=list(instances.names.values()),
        templates=templates or get_imagenet_templates(),
        excluded=excluded,
    )


def load_ov_coco_classes() -> dict[str, list[str]]:
    """Return the "novel" and the "base" class names of OV-COCO, keyed by group."""
    content = read_json(Path(str(files("llm2clip.evaluate.benchmarks") / "class_names" / "ov_coco.json")))
    return {group: content[group] for group in ("novel", "base")}


def read_detection_data(file: Path, templates: Sequence[str] = ()) -> DetectionData:
    """Read all images and objects from a JSON file in COCO's format."""
    instances = read_coco_annotations(file, needs_pycocotools=True)
    return _select_objects_by_category(instances, list(instances.names), {}, templates, with_empty=True)


def _select_objects_by_category(
    instances: CocoAnnotations,
    category_ids: Sequence[Any],
    groups: Mapping[str, Sequence[str]],
    templates: Sequence[str] = (),
    with_empty: bool = False,
) -> DetectionData:
    """Return the objects in the given categories, and the images that contain these objects.

    If `with_empty` is True, images without objects are also returned. Boxes are clipped to the image, and objects whose
    clipped boxes are empty are excluded. Raise DataFormatError if there are no objects except crowds.
    """
    used_categories = set(category_ids)
    annotations = []
    for row in instances.annotations:
        left, top, right, bottom = get_clipped_box(instances.file, row, instances.sizes[row["image_id"]])
        if row["category_id"] in used_categories and right > left and bottom > top:
            annotations.append({**row, "bbox": [left, top, right - left, bottom - top]})
    if all(row.get("iscrowd") for row in annotations):
        problem = "only crowds" if annotations else "no objects of the selected classes"
        raise DataFormatError(f"{instances.file} contains {problem}, so average precision is undefined")
    annotated = {row["image_id"] for row in annotations}
    image_ids = [image_id for image_id in instances.images if with_empty or image_id in annotated]
    return DetectionData(
        images=make_image_refs(instances.file, [instances.images[image_id] for image_id in image_ids]),
        image_ids=image_ids,
        sizes=[instances.sizes[image_id] for image_id in image_ids],
        annotations=annotations,
        names=[instances.names[category_id] for category_id in category_ids],
        category_ids=list(category_ids),
        groups=groups,
        templates=templates or get_imagenet_templates(),
    )


def _read_open_vocabulary_coco(folder: Path) -> DetectionData:
    instances = read_coco_annotations(find_coco_annotations(folder), needs_pycocotools=True)
    groups = load_ov_coco_classes()
    names = [name for group in groups.values() for name in group]
    category_ids = {name: category_id for category_id, name in instances.names.items()}
    missing = [name for name in names if name not in category_ids]
    if missing:
        raise DataFormatError(
            f"{instances.file}: {len(missing)} of the {len(names)} OV-COCO categories are missing, e.g. {missing[0]!r}"
        )
    return _select_objects_by_category(instances, [category_ids[name] for name in names], groups)


LVIS_FILES = ("annotations/lvis_v1_val.json", "lvis_v1_val.json")
READERS = {
    "coco-boxes": lambda folder: read_region_data(find_coco_annotations(folder)),
    "lvis-boxes": lambda folder: read_region_data(find_first_existing(folder, *LVIS_FILES)),
    "ov-coco": _read_open_vocabulary_coco,
}
