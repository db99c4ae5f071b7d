"""Helpers for reading COCO's instances files (cocodataset.org, "Data format"), shared by several benchmarks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.image_header import MAX_PIXELS
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.readers.coco import find_image_folder, split_folders
from llm2clip.evaluate.benchmarks.base import check_files, image_file
from llm2clip.evaluate.benchmarks.karpathy_splits import COCO_FOLDERS
from llm2clip.io_utils import DataFormatError, first_existing

INSTANCES_FOLDERS = (*COCO_FOLDERS, "coco_instances")


def find_instances(folder: Path) -> Path:
    """Return the path of instances_val2017.json.

    Raises:
        MissingFileError: If the folder does not contain the file.
    """
    return first_existing(folder, "annotations/instances_val2017.json", "instances_val2017.json")


def image_refs(file: Path, images: Sequence[Mapping[str, Any]]) -> list[ImageRef]:
    """Return references to the images that are listed in a JSON file.

    Raises:
        MissingFileError: If image files are missing.
        DataFormatError: If an image path points outside the folder.
    """
    names = []
    for image in images:
        # LVIS specifies only a URL, such as http://images.cocodataset.org/val2017/000000397133.jpg.
        names.append(image.get("file_name") or "/".join(image["coco_url"].split("/")[-2:]))
    folder = Path(find_image_folder(str(file), names, split_folders(str(file), images)))
    refs: list[ImageRef] = [image_file(folder, name) for name in names]
    check_files(refs, file)
    return refs


def image_size(file: Path, image: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width and height of an image in pixels, as stated in a JSON file.

    Raises:
        DataFormatError: If they are not positive integers, or the image is too large to be decoded.
    """
    width: Any = image.get("width")
    height: Any = image.get("height")
    is_valid = isinstance(width, int) and isinstance(height, int) and min(width, height) > 0
    if not is_valid or width * height > MAX_PIXELS:
        raise DataFormatError(
            f"{file}: image {image.get('id')} has the width {width!r} and the height {height!r}, but these must be "
            f"positive integers, with at most {MAX_PIXELS:,} pixels in total"
        )
    return width, height


def parse_box(file: Path, annotation: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """Return the box of an annotation, (left, top, width, height) in pixels.

    Raises:
        DataFormatError: If the box does not consist of four finite numbers, or the width or height is negative.
    """
    box: Any = annotation.get("bbox")
    is_valid = isinstance(box, list) and len(box) == 4 and all(isinstance(value, int | float) for value in box)
    if not is_valid or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        raise DataFormatError(
            f"{file}: annotation {annotation.get('id')} has the bbox {box}, but a bbox must be "
            "[left, top, width, height] in pixels"
        )
    left, top, width, height = box
    return left, top, width, height
