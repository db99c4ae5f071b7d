"""Readers for segmentation benchmarks: the datasets used by SCLIP, and the user's images.

The protocol follows SCLIP (arXiv 2312.01597, github.com/wangf3014/SCLIP), which resizes the shorter side of each image
to 336 pixels (COCO-Stuff: 448, Cityscapes: 560) and slides a window of 224 pixels over the image. In llm2clip, the
window size is the vision tower's training resolution, and images are scaled accordingly.

In datasets with a background class, probabilities are computed with a softmax over all class names, and pixels for
which no class is probable enough are assigned to the background.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llm2clip.data.image_refs import FileImage, ImageRef
from llm2clip.evaluate.benchmarks.base import (
    IGNORED,
    ImageId,
    SegmentationData,
    check_image_files_exist,
    resolve_benchmark_image,
)
from llm2clip.evaluate.benchmarks.classification import IMAGE_SUFFIXES, get_imagenet_templates
from llm2clip.evaluate.benchmarks.coco_instances import (
    CocoAnnotations,
    decode_mask,
    find_coco_annotations,
    make_image_refs,
    read_coco_annotations,
)
from llm2clip.io_utils import DataFormatError, MissingFileError, find_first_existing, format_count, read_lines

CLASSES_FILE = "classes.txt"
BACKGROUND = "background"  # name of the first class in datasets with a background
_WITH_BACKGROUND: dict[str, Any] = {"has_background": True, "logit_scale": 50, "min_probability": 0.1}
_INVALID = -1  # lookup table entry for invalid pixel values
# Label ids of the 19 evaluated Cityscapes classes, ordered by train id.
# Source: helpers/labels.py in github.com/mcordts/cityscapesScripts
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# Pixel values (category id - 1) of classes that COCO removed. The values do not occur in COCO-Stuff's PNGs.
# Source: labels.txt in github.com/nightrome/cocostuff
_COCO_REMOVED = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)


def read_class_names(name: str) -> list[list[str]]:
    """Read the names of each class from `class_names/NAME.txt`."""
    with_source = read_lines(Path(str(files("llm2clip.evaluate.benchmarks") / "class_names" / f"{name}.txt")))
    return [line.split(", ") for line in with_source if not line.startswith("#")]


def read_coco_masks(file: Path, templates: Sequence[str]) -> SegmentationData:
    """Read images and segmentation masks from a JSON file in COCO's format."""
    instances = read_coco_annotations(file, with_masks=True)
    names = [[class_name] for class_name in instances.names.values()]
    return _build_data_from_masks(instances, names, templates or get_imagenet_templates())


def read_mask_folder(folder: Path, templates: Sequence[str]) -> SegmentationData:
    """Read a folder that contains images/, masks/ (one PNG with the same name per image) and classes.txt.

    Line n of classes.txt contains comma-separated names of the class whose pixel value is n - 1. Pixels with the value
    255 are ignored. If the first class is "background", the protocol for datasets with a background class is used.
    """
    classes_file = find_first_existing(folder, CLASSES_FILE)
    try:
        # Do not drop empty lines, because each line number determines a class index.
        lines = classes_file.read_text(encoding="utf-8").rstrip().split("\n")
    except UnicodeDecodeError as error:
        raise DataFormatError(f"{classes_file} must be UTF-8 text ({error})") from error
    names = [[name.strip() for name in line.split(",")] for line in lines]
    if len(names) > IGNORED or not all(all(class_names) for class_names in names):
        raise DataFormatError(f"{classes_file} must contain 1 to {IGNORED} lines, one per class, and no empty names")
    image_dir, label_dir = find_first_existing(folder, "images"), find_first_existing(folder, "masks")
    image_of_stem: dict[str, FileImage] = {}
    for file in sorted(image_dir.iterdir()):
        if file.suffix.lower() in IMAGE_SUFFIXES:
            if file.stem in image_of_stem:
                raise DataFormatError(f"{image_dir} contains several images with the name {file.stem!r}")
            image_of_stem[file.stem] = FileImage(str(file))
    label_files = sorted(label_dir.glob("*.png"))
    without_image = [file for file in label_files if file.stem not in image_of_stem]
    if without_image:
        count = format_count(len(without_image), "mask")
        raise MissingFileError(f"{image_dir} has no image for {count}, e.g. {without_image[0]}")
    table = _make_label_lookup_table({value: value for value in range(len(names))})
    has_background = names[0] == [BACKGROUND]
    if has_background:
        names[0] = read_class_names("background")[0]
    images = [image_of_stem[file.stem] for file in label_files]
    protocol = _WITH_BACKGROUND if has_background else {}
    return _build_data_from_label_files(images, label_files, table, label_dir, names, templates, **protocol)


def _make_label_lookup_table(classes: Mapping[int, int], ignored: Sequence[int] = ()) -> np.ndarray:
    """Return a table that maps a pixel value to a class index, `IGNORED` or `_INVALID`, int16 of shape (256,)."""
    table = np.full(256, _INVALID, np.int16)
    table[[*ignored, 255]] = IGNORED
    for value, label in classes.items():
        table[value] = label
    return table


def _read_label_file(file: Path, table: np.ndarray) -> np.ndarray:
    """Read class indices, uint8 of shape (H, W), from a single-channel PNG."""
    try:
        with Image.open(file, formats=["PNG"]) as image:
            mode, values = image.mode, np.asarray(image)
    except Exception as error:  # Pillow can raise almost any exception for a corrupt file
        raise DataFormatError(f"{file}: cannot read the label file ({error!r})") from error
    if mode not in ("L", "P"):
        raise DataFormatError(f"{file}: a label file must have a single 8-bit channel (got Pillow mode {mode})")
    labels = table[values]
    is_invalid = labels == _INVALID
    if is_invalid.any():
        value = values[is_invalid].flat[0]
        raise DataFormatError(f"{file} contains the pixel value {value}, which is not assigned to any class")
    return labels.astype(np.uint8)


def _build_data_from_label_files(
    images: Sequence[FileImage],
    label_files: Sequence[Path],
    table: np.ndarray,
    source: Path,
    names: list[list[str]],
    templates: Sequence[str] = (),
    **protocol: Any,
) -> SegmentationData:
    """Return a dataset with one label file per image. `protocol` sets further fields of `SegmentationData`."""
    if not images:
        raise MissingFileError(f"{source} contains no images")
    refs: list[ImageRef] = [*images]
    check_image_files_exist(refs, source)
    check_image_files_exist([FileImage(str(file)) for file in label_files], source)

    def read_labels(index: int) -> np.ndarray:
        return _read_label_file(label_files[index], table)

    return SegmentationData(refs, read_labels, names, templates or get_imagenet_templates(), **protocol)


def _read_pascal_voc(folder: Path, with_background: bool) -> SegmentationData:
    roots = (folder / "VOCdevkit" / "VOC2012", folder / "VOC2012", folder)
    root = next((root for root in roots if (root / "JPEGImages").is_dir()), None)
    if root is None:
        raise MissingFileError(f"{folder} contains neither VOC2012/JPEGImages nor JPEGImages")
    split_file = find_first_existing(root, "ImageSets/Segmentation/val.txt")
    ids = read_lines(split_file)
    images = [resolve_benchmark_image(root / "JPEGImages", f"{name}.jpg") for name in ids]
    label_files = [root / f"SegmentationClass/{name}.png" for name in ids]
    names = read_class_names("voc20")
    if not with_background:
        table = _make_label_lookup_table({value: value - 1 for value in range(1, 21)}, ignored=[0])
        return _build_data_from_label_files(images, label_files, table, split_file, names)
    table = _make_label_lookup_table({value: value for value in range(21)})
    names = [*read_class_names("background"), *names]
    protocol = {**_WITH_BACKGROUND, "logit_scale": 65, "min_area": 0.1}
    return _build_data_from_label_files(images, label_files, table, split_file, names, **protocol)


def _read_coco_object(folder: Path) -> SegmentationData:
    instances = read_coco_annotations(find_coco_annotations(folder), with_masks=True)
    names = read_class_names("coco_object")
    if len(instances.names) != len(names):
        raise DataFormatError(f"{instances.file} has {len(instances.names)} categories, but COCO has {len(names)}")
    return _build_data_from_masks(instances, names, get_imagenet_templates())


def _build_data_from_masks(
    instances: CocoAnnotations, names: list[list[str]], templates: Sequence[str]
) -> SegmentationData:
    """Return a dataset whose labels are derived from object masks. Pixels outside all masks are background.

    Where masks overlap, pixels get the label of the smallest object. `names` are sorted by category id.
    """
    file = instances.file
    if len(names) >= IGNORED:
        raise DataFormatError(f"{file} has {len(names)} categories, but segmentation supports at most {IGNORED - 1}")
    label_of_category = {category_id: label for label, category_id in enumerate(instances.names, 1)}
    sizes = list(instances.sizes.values())
    objects: dict[ImageId, list[dict[str, Any]]] = {image_id: [] for image_id in instances.images}
    for row in instances.annotations:
        if "area" not in row:
            raise DataFormatError(f"{file}: annotation {row.get('id')} has no 'area' field")
        objects[row["image_id"]].append(row)
    objects_of_image = [sorted(rows, key=lambda row: -row["area"]) for rows in objects.values()]

    def read_labels(index: int) -> np.ndarray:
        width, height = sizes[index]
        labels = np.zeros((height, width), np.uint8)
        for row in objects_of_image[index]:
            try:
                mask = decode_mask(row["segmentation"], height, width)
            except Exception as error:  # pycocotools raises many types of exceptions, including plain Exception
                raise DataFormatError(f"{file}: annotation {row.get('id')} has an invalid mask: {error!r}") from error
            labels[mask] = label_of_category[row["category_id"]]
        return labels

    return SegmentationData(
        images=make_image_refs(file, list(instances.images.values())),
        read_labels=read_labels,
        names=[*read_class_names("background"), *names],
        templates=templates,
        **_WITH_BACKGROUND,
    )


def _read_coco_stuff(folder: Path) -> SegmentationData:
    label_dir = find_first_existing(
        folder, "stuffthingmaps/val2017", "stuffthingmaps_trainval2017/val2017", "annotations/val2017"
    )
    image_dir = find_first_existing(folder, "val2017", "images/val2017")
    label_files = sorted(file for file in label_dir.glob("*.png") if "TrainIds" not in file.name)
    images = [resolve_benchmark_image(image_dir, f"{file.stem}.jpg") for file in label_files]
    values = [value for value in range(182) if value not in _COCO_REMOVED]
    table = _make_label_lookup_table({value: label for label, value in enumerate(values)})
    return _build_data_from_label_files(
        images, label_files, table, label_dir, read_class_names("coco_stuff"), scale=2.0
    )


def _read_ade20k(folder: Path) -> SegmentationData:
    root = find_first_existing(folder, "ADEChallengeData2016") if not (folder / "images").is_dir() else folder
    label_dir = find_first_existing(root, "annotations/validation")
    label_files = sorted(label_dir.glob("*.png"))
    images = [resolve_benchmark_image(root / "images" / "validation", f"{file.stem}.jpg") for file in label_files]
    table = _make_label_lookup_table({value: value - 1 for value in range(1, 151)}, ignored=[0])
    return _build_data_from_label_files(images, label_files, table, label_dir, read_class_names("ade20k"))


def _read_cityscapes(folder: Path) -> SegmentationData:
    label_dir = find_first_existing(folder, "gtFine/val")
    label_files = sorted(label_dir.glob("*/*_gtFine_labelIds.png"))
    images = []
    for file in label_files:
        name = file.name.replace("_gtFine_labelIds", "_leftImg8bit")
        images.append(resolve_benchmark_image(folder / "leftImg8bit" / "val", f"{file.parent.name}/{name}"))
    others = [value for value in range(34) if value not in _CITYSCAPES_IDS]
    table = _make_label_lookup_table({value: label for label, value in enumerate(_CITYSCAPES_IDS)}, ignored=others)
    return _build_data_from_label_files(
        images, label_files, table, label_dir, read_class_names("cityscapes"), scale=2.5
    )


READERS = {
    "voc20": partial(_read_pascal_voc, with_background=False),
    "voc21": partial(_read_pascal_voc, with_background=True),
    "coco-object": _read_coco_object,
    "coco-stuff": _read_coco_stuff,
    "ade20k": _read_ade20k,
    "cityscapes": _read_cityscapes,
}
