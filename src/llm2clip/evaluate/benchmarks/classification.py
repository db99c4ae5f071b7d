"""Zero-shot classification: ImageNet and its variants, CIFAR, and any folder of classes.

A class is the mean of its name's vectors in all templates (CLIP, arXiv 2103.00020). ImageNet's names and its 80
templates are OpenAI's, which the package open_clip carries; the order of the classes is that of their sorted WordNet
ids, which timm carries.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from llm2clip.data.image_refs import FileImage, MemoryImage
from llm2clip.evaluate.benchmarks.base import Benchmark, ClassificationData
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_json, read_lines

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a close-up photo of a {}.", "a photo of the {}.")
NAMES_FILE, TEMPLATES_FILE = "classnames.txt", "templates.txt"
FOLDER = "folder:"


def folder_of_classes(folder: Path, part: str = "") -> ClassificationData:
    """Folders of images, one a class, in `folder` or in its folder `part`. `classnames.txt` in `folder`,
    "FOLDER<tab>NAME" a line, gives names; else they are the folders', with blanks for underscores. `templates.txt` has
    a sentence with {} a line.

    Raises:
        Absent: there is no folder with images.
        Malformed: a name or a template is missing.
    """
    place = folder / part
    parts = sorted(p for p in place.iterdir() if p.is_dir() and any(_images(p))) if place.is_dir() else []
    if not parts:
        raise MissingFileError(f"{place} has no folders with images, one a class")
    names = {p.name: p.name.replace("_", " ") for p in parts}
    if (folder / NAMES_FILE).exists():
        pairs = [line.split("\t") for line in read_lines(folder / NAMES_FILE)]
        if any(len(pair) != 2 for pair in pairs):
            raise DataFormatError(f"{folder / NAMES_FILE}: a line is not FOLDER<tab>NAME")
        given = {key: name.strip() for key, name in pairs}
        if lacking := [p.name for p in parts if p.name not in given]:
            raise DataFormatError(f"{folder / NAMES_FILE} has no name for {lacking[0]}")
        names = {p.name: given[p.name] for p in parts}
    templates: Sequence[str] = TEMPLATES
    if (folder / TEMPLATES_FILE).exists():
        templates = read_lines(folder / TEMPLATES_FILE)
        if wrong := [t for t in templates if "{}" not in t]:
            raise DataFormatError(f"{folder / TEMPLATES_FILE}: no {{}} for the name in {wrong[0]!r}")
    return _of_folders(parts, [names[p.name] for p in parts], templates)


def folder_benchmark(name: str) -> Benchmark:
    """A benchmark of one's own: a folder of classes, or one with such folders test/ (or val/) and train/ in it.

    Args:
        name: path of the folder.
    """

    def read(folder: Path) -> ClassificationData:
        return folder_of_classes(folder, next((p for p in ("test", "val") if any(folder.glob(f"{p}/*/"))), ""))

    return Benchmark(
        FOLDER + name,
        "classification",
        "a folder of images a class",
        (str(Path(name).expanduser().absolute()),),
        read,
        "folders of images, one a class",
        lambda folder: folder_of_classes(folder, "train"),
    )


def _images(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES)


def _of_folders(parts: Sequence[Path], names: Sequence[str], templates: Sequence[str]) -> ClassificationData:
    found = [(FileImage(str(file)), n) for n, part in enumerate(parts) for file in _images(part)]
    return ClassificationData([image for image, _ in found], [n for _, n in found], names, templates)


def _imagenet_names() -> tuple[list[str], list[str], list[str]]:
    """WordNet ids in order, OpenAI's names of them, and templates."""
    if importlib.util.find_spec("open_clip") is None:
        raise MissingFileError("ImageNet's class names and templates come with open_clip: pip install open-clip-torch")
    from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    from timm.data import ImageNetInfo

    templates = [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]
    return list(ImageNetInfo("imagenet-1k").label_names()), list(IMAGENET_CLASSNAMES), templates


def _imagenet(folder: Path) -> ClassificationData:
    """`val/WNID/*.JPEG`; variants (Sketch, A, R) have those of their classes among which they are told apart."""
    return _by_id(folder / "val" if (folder / "val").is_dir() else folder)


def _by_id(root: Path) -> ClassificationData:
    ids, names, templates = _imagenet_names()
    parts = [root / name for name in ids if (root / name).is_dir()]
    if not parts:
        raise MissingFileError(f"{root} has no folders named by WordNet ids, such as n01440764")
    return _of_folders(parts, [names[ids.index(p.name)] for p in parts], templates)


def _imagenet_v2(folder: Path) -> ClassificationData:
    """`.../0` to `.../999`: the folder's name is the class's number, which sorting as text would shuffle."""
    _, names, templates = _imagenet_names()
    root = folder if (folder / "0").is_dir() else first_existing(folder, "imagenetv2-matched-frequency-format-val")
    return _of_folders([first_existing(root, str(n)) for n in range(len(names))], names, templates)


def _objectnet(folder: Path) -> ClassificationData:
    """The 113 classes that ImageNet has, too, by ObjectNet's names; the two pixels of red border are cut off (the
    protocol of its authors' README; NeurIPS 2019)."""
    labels = read_json(first_existing(folder, "mappings/folder_to_objectnet_label.json"))
    shared = read_json(first_existing(folder, "mappings/objectnet_to_imagenet_1k.json"))
    root = first_existing(folder, "images")
    parts = sorted(p for p in root.iterdir() if p.is_dir() and labels.get(p.name) in shared)
    names = [labels[p.name].lower() for p in parts]
    _, _, templates = _imagenet_names()
    found = _of_folders(parts, names, templates)
    return ClassificationData([_Bordered(str(image)) for image in found.images], found.labels, names, templates)


class _Bordered(FileImage):
    """A picture with a border of two pixels that is not a part of it."""

    __slots__ = ()

    @property
    def key(self) -> str:
        """Not the whole picture's: it has other vectors."""
        return f"{super().key} without its border"

    def open(self) -> io.BytesIO:
        with Image.open(self.path) as image:
            inner = image.convert("RGB").crop((2, 2, image.width - 2, image.height - 2))
        stream = io.BytesIO()
        inner.save(stream, "PNG", compress_level=1)
        stream.seek(0)
        return stream


def _cifar(folder: Path, files: Sequence[str], names: str, skipped: int) -> ClassificationData:
    """Rows of labels, then 1,024 red, green and blue bytes; of CIFAR-100 the first label is the coarse one."""
    parts = {file: np.fromfile(first_existing(folder, file), np.uint8) for file in files}
    for file, data in parts.items():
        if len(data) % (skipped + 1 + 3072):
            raise DataFormatError(f"{folder / file}: {len(data):,} bytes are no whole number of images")
    places = [(file, n) for file, data in parts.items() for n in range(len(data) // (skipped + 1 + 3072))]
    rows = np.concatenate(list(parts.values())).reshape(-1, skipped + 1 + 3072)
    classes = [name.replace("_", " ") for name in read_lines(first_existing(folder, names))]
    labels = rows[:, skipped].astype(int).tolist()
    if labels and max(labels) >= len(classes):
        raise DataFormatError(
            f"{folder / places[int(np.argmax(labels))][0]}: label {max(labels)} of {len(classes)} classes"
        )
    images = []
    for (file, n), row in zip(places, rows, strict=True):
        stream = io.BytesIO()
        pixels = np.ascontiguousarray(row[skipped + 1 :].reshape(3, 32, 32).transpose(1, 2, 0))
        Image.fromarray(pixels).save(stream, "PNG", compress_level=1)
        images.append(MemoryImage(stream.getvalue(), f"{folder / file}, image {n}"))
    return ClassificationData(images, labels, classes, TEMPLATES)


def _cifar10(folder: Path) -> ClassificationData:
    return _cifar(folder, ["test_batch.bin"], "batches.meta.txt", 0)


def _cifar10_train(folder: Path) -> ClassificationData:
    return _cifar(folder, [f"data_batch_{n}.bin" for n in range(1, 6)], "batches.meta.txt", 0)


def _cifar100(folder: Path) -> ClassificationData:
    return _cifar(folder, ["test.bin"], "fine_label_names.txt", 1)


def _cifar100_train(folder: Path) -> ClassificationData:
    return _cifar(folder, ["train.bin"], "fine_label_names.txt", 1)


BENCHMARKS = (
    Benchmark(
        "imagenet",
        "classification",
        "50,000 images, 1,000 classes",
        ("imagenet", "ImageNet", "imagenet-1k"),
        _imagenet,
        "val/WNID/*.JPEG: ILSVRC2012_img_val.tar (image-net.org) sorted into folders by class; for a linear probe "
        "train/ too",
        lambda folder: _by_id(first_existing(folder, "train")),
    ),
    Benchmark(
        "imagenet-v2",
        "classification",
        "10,000 images, 1,000 classes (arXiv 1902.10811)",
        ("imagenet-v2", "imagenetv2", "imagenetv2-matched-frequency-format-val"),
        _imagenet_v2,
        "imagenetv2-matched-frequency.tar.gz (huggingface.co/datasets/vaishaal/ImageNetV2)",
    ),
    Benchmark(
        "imagenet-sketch",
        "classification",
        "50,889 images, 1,000 classes (arXiv 1905.13549)",
        ("imagenet-sketch", "sketch"),
        _imagenet,
        "github.com/HaohanWang/ImageNet-Sketch",
    ),
    Benchmark(
        "imagenet-a",
        "classification",
        "7,500 images, 200 classes (arXiv 1907.07174)",
        ("imagenet-a",),
        _imagenet,
        "imagenet-a.tar (github.com/hendrycks/natural-adv-examples)",
    ),
    Benchmark(
        "imagenet-r",
        "classification",
        "30,000 images, 200 classes (arXiv 2006.16241)",
        ("imagenet-r",),
        _imagenet,
        "imagenet-r.tar (github.com/hendrycks/imagenet-r)",
    ),
    Benchmark(
        "objectnet",
        "classification",
        "18,574 images, the 113 classes shared with ImageNet",
        ("objectnet", "objectnet-1.0"),
        _objectnet,
        "objectnet-1.0.zip (objectnet.dev)",
    ),
    Benchmark(
        "cifar10",
        "classification",
        "10,000 images, 10 classes",
        ("cifar10", "cifar-10-batches-bin"),
        _cifar10,
        "cifar-10-binary.tar.gz (cs.toronto.edu/~kriz/cifar.html)",
        _cifar10_train,
    ),
    Benchmark(
        "cifar100",
        "classification",
        "10,000 images, 100 classes",
        ("cifar100", "cifar-100-binary"),
        _cifar100,
        "cifar-100-binary.tar.gz (cs.toronto.edu/~kriz/cifar.html)",
        _cifar100_train,
    ),
)
