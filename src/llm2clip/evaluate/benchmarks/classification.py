"""Readers for SugarCrepe and classification benchmarks: ImageNet and its variants, CIFAR, and the user's folders.

As in CLIP (arXiv 2103.00020), each class name is inserted into all prompt templates, and the class embedding is the
mean embedding of the prompts. For ImageNet, OpenAI's class names and 80 prompt templates are taken from open_clip, and
the WordNet ids from timm.
"""

import io
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from llm2clip.data.image_refs import FileImage, ImageRef, InMemoryImage
from llm2clip.evaluate.benchmarks.base import (
    ClassificationData,
    CompositionalExample,
    check_image_files_exist,
    find_coco_folders,
    resolve_benchmark_image,
)
from llm2clip.io_utils import (
    DataFormatError,
    MissingFileError,
    find_first_existing,
    read_json,
    read_lines,
    require_extra,
)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a photo of the {}.")
NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "templates.txt"
CIFAR_PIXELS = 3 * 32 * 32
SUGARCREPE_KINDS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def read_class_folders(folder: Path, templates: Sequence[str] = ()) -> ClassificationData:
    """Read images from `folder`, `folder/test` or `folder/val`, which must contain one folder per class.

    Class names are read from `folder/classnames.txt`, whose lines have the form "FOLDER<tab>NAME". If the file
    does not exist, folder names are used, with underscores replaced by spaces. If `folder/templates.txt` exists, its
    lines are the default prompt templates.
    """
    root = folder / next((split for split in ("test", "val") if any(folder.glob(f"{split}/*/"))), "")
    class_dirs = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    class_dirs = [path for path in class_dirs if _list_image_files(path)]
    if not class_dirs:
        raise MissingFileError(f"{root} must contain one folder per class, but none of its folders contains images")
    names = [path.name.replace("_", " ") for path in class_dirs]
    if (folder / NAMES_FILE).exists():
        names = _read_class_names(folder / NAMES_FILE, class_dirs)
    folder_templates: Sequence[str] = TEMPLATES
    if (folder / TEMPLATES_FILE).exists():
        folder_templates = read_lines(folder / TEMPLATES_FILE)
        for template in folder_templates:
            if "{}" not in template:
                raise DataFormatError(
                    f"{folder / TEMPLATES_FILE}: the template {template!r} must contain {{}} for the class name"
                )
    return _read_images(class_dirs, names, templates or folder_templates)


def _read_class_names(file: Path, class_dirs: Sequence[Path]) -> list[str]:
    name_of_folder = {}
    for line in read_lines(file):
        fields = line.split("\t")
        if len(fields) != 2:
            raise DataFormatError(f"{file}: each line must have the form FOLDER<tab>NAME")
        name_of_folder[fields[0]] = fields[1].strip()
    for path in class_dirs:
        if path.name not in name_of_folder:
            raise DataFormatError(f"{file} has no class name for the folder {path.name}")
    return [name_of_folder[path.name] for path in class_dirs]


def _list_image_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)


def _read_images(class_dirs: Sequence[Path], names: Sequence[str], templates: Sequence[str]) -> ClassificationData:
    images: list[ImageRef] = []
    labels: list[int] = []
    for label, class_dir in enumerate(class_dirs):
        files = _list_image_files(class_dir)
        images += [FileImage(str(file)) for file in files]
        labels += [label] * len(files)
    return ClassificationData(images, labels, names, templates)


def get_imagenet_templates() -> list[str]:
    """Return OpenAI's 80 prompt templates for ImageNet. Raise MissingFileError if open_clip is not installed."""
    require_extra("open-clip", "reading ImageNet's class names and templates", MissingFileError)
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


def _load_imagenet_classes() -> tuple[list[str], list[str]]:
    """Return ImageNet's WordNet ids in ascending order, and OpenAI's class names in the order of the ids."""
    require_extra("open-clip", "reading ImageNet's class names", MissingFileError)
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names()), list(IMAGENET_CLASSNAMES)


def _read_imagenet(folder: Path) -> ClassificationData:
    """Read `val/WNID/*.JPEG`. Classes without a folder are omitted (800 of 1,000 in ImageNet-A and ImageNet-R)."""
    root = folder / "val" if (folder / "val").is_dir() else folder
    names = dict(zip(*_load_imagenet_classes(), strict=True))
    class_dirs = [root / wordnet_id for wordnet_id in names if (root / wordnet_id).is_dir()]
    if not class_dirs:
        raise MissingFileError(f"{root} has no folders named after WordNet ids, such as n01440764")
    return _read_images(class_dirs, [names[path.name] for path in class_dirs], get_imagenet_templates())


def _read_imagenet_v2(folder: Path) -> ClassificationData:
    """Read images from the folders `0` to `999`, whose names are class indices."""
    _, names = _load_imagenet_classes()
    root = folder if (folder / "0").is_dir() else find_first_existing(folder, "imagenetv2-matched-frequency-format-val")
    class_dirs = [find_first_existing(root, str(n)) for n in range(len(names))]
    return _read_images(class_dirs, names, get_imagenet_templates())


def _read_cifar(folder: Path, file: str, names_file: str, skipped_labels: int = 0) -> ClassificationData:
    """Read CIFAR's binary format. Each image is a coarse label (CIFAR-100 only), a label, and planar RGB values."""
    row_size = skipped_labels + 1 + CIFAR_PIXELS
    names = [name.replace("_", " ") for name in read_lines(find_first_existing(folder, names_file))]
    data = np.fromfile(find_first_existing(folder, file), np.uint8)
    if len(data) % row_size:
        raise DataFormatError(
            f"{folder / file}: the file size ({len(data):,} bytes) must be a multiple of {row_size:,} bytes per image"
        )
    images: list[ImageRef] = []
    labels: list[int] = []
    for n, row in enumerate(data.reshape(-1, row_size)):
        label = int(row[skipped_labels])
        if label >= len(names):
            raise DataFormatError(f"{folder / file}: image {n} has label {label}, but there are {len(names)} classes")
        pixels = row[skipped_labels + 1 :].reshape(3, 32, 32).transpose(1, 2, 0)
        png = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(png, "PNG", compress_level=1)
        images.append(InMemoryImage(png.getvalue(), f"{folder / file}, image {n}"))
        labels.append(label)
    return ClassificationData(images, labels, names, TEMPLATES)


def _read_sugarcrepe(folder: Path) -> list[CompositionalExample]:
    """Read 7,511 examples, each with a COCO val2017 image, a correct caption and a wrong caption (arXiv 2306.14610)."""
    data_dir = folder / "data" if (folder / "data").is_dir() else folder
    image_dir = next((root / "val2017" for root in find_coco_folders(folder) if (root / "val2017").is_dir()), None)
    if image_dir is None:
        raise MissingFileError(f"there is no val2017 folder in {folder} or in a coco folder next to {folder}")
    examples = []
    for kind in SUGARCREPE_KINDS:
        for row in read_json(find_first_existing(data_dir, f"{kind}.json")).values():
            image = resolve_benchmark_image(image_dir, row["filename"])
            captions = row["caption"].strip(), row["negative_caption"].strip()
            examples.append(CompositionalExample(kind, image, *captions))
    check_image_files_exist([example.image for example in examples], data_dir)
    return examples


READERS = {
    "imagenet": _read_imagenet,
    "imagenet-v2": _read_imagenet_v2,
    "imagenet-sketch": _read_imagenet,
    "imagenet-a": _read_imagenet,
    "imagenet-r": _read_imagenet,
    "cifar10": partial(_read_cifar, file="test_batch.bin", names_file="batches.meta.txt"),
    "cifar100": partial(_read_cifar, file="test.bin", names_file="fine_label_names.txt", skipped_labels=1),
    "sugarcrepe": _read_sugarcrepe,
}
