"""A stand-in for image-text models that knows colours, and generated COCO folders with coloured rectangles."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llm2clip.data.image_refs import FileImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.benchmarks.base import SegmentationData
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import DenseEncoder

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
CELL = 4
LABEL_SIZE = (8, 6)  # width and height of the images of `Layout`


def colour_model(image_size: int = 16) -> DualEncoder:
    """Return a model whose embeddings are mean colours, for images, cells and colour words in texts.

    The variant "sclip" swaps red and blue.
    """

    def encode_texts(texts: Sequence[str], progress: bool) -> Tensor:
        rows = [[float(f" {name}" in text) + 0.01 for name in COLOURS] for text in texts]
        return torch.tensor(rows)

    def features(pixels: Tensor, variant: str) -> Tensor:
        cells = F.avg_pool2d(pixels.float(), CELL).permute(0, 2, 3, 1)
        return cells.flip(-1) if variant == "sclip" else cells

    return DualEncoder(
        name="colours",
        embed_dim=3,
        identity=lambda: {"name": "colours"},
        transform=lambda image: image.float().mean((1, 2)),
        encode_images_raw=torch.stack,
        encode_texts_raw=encode_texts,
        dense=DenseEncoder(
            cell_size=CELL,
            image_size=image_size,
            variants=("plain", "sclip"),
            device=torch.device("cpu"),
            interpolation="bilinear",
            localization_variant="plain",
            features=features,
        ),
    )


def colour_embeddings(max_skipped: float = 0.05) -> ModelEmbeddings:
    return ModelEmbeddings(colour_model(), SkipLog(None, max_skipped), progress=False)


def draw_rectangles(file: Path, size: tuple[int, int], rectangles: Sequence[tuple[str, list[float]]]) -> None:
    """Draw coloured boxes, (left, top, width, height), on a grey image with (width, height) `size`."""
    image = Image.new("RGB", size, (90, 90, 90))
    for colour, (left, top, width, height) in rectangles:
        image.paste(COLOURS[colour], (round(left), round(top), round(left + width), round(top + height)))
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def coco_json(
    images: Sequence[tuple[str, tuple[int, int]]], annotations: Sequence[dict[str, Any]], names: Sequence[str]
) -> dict[str, Any]:
    """Return annotations in COCO's format. Image ids start at 10. Category ids are 1, 3, 5, ...: COCO has gaps."""
    return {
        "images": [
            {"id": 10 + n, "file_name": name, "width": size[0], "height": size[1]}
            for n, (name, size) in enumerate(images)
        ],
        "annotations": [{"id": 100 + n, "iscrowd": 0, **row} for n, row in enumerate(annotations)],
        "categories": [{"id": 2 * n + 1, "name": name} for n, name in enumerate(names)],
    }


def make_coco(folder: Path) -> Path:
    """Write a folder of COCO val2017 with three images and the categories red, green and blue. Return the JSON file."""
    boxes = [
        [("red", [4, 4, 24, 16]), ("blue", [36, 20, 20, 24])],
        [("green", [0, 0, 40, 10.0]), ("red", [10, 30, 16, 12])],
        [("blue", [8, 8, 40, 30])],
    ]
    sizes = [(64, 48), (48, 64), (64, 48)]
    annotations = []
    for n, (rectangles, size) in enumerate(zip(boxes, sizes, strict=True)):
        draw_rectangles(folder / f"val2017/{n}.png", size, rectangles)
        for colour, box in rectangles:
            category = 2 * list(COLOURS).index(colour) + 1
            area = box[2] * box[3]
            x, y, w, h = box
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append(
                {"image_id": 10 + n, "category_id": category, "bbox": box, "area": area, "segmentation": [polygon]}
            )
    file = folder / "annotations/instances_val2017.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [(f"{n}.png", size) for n, size in enumerate(sizes)]
    file.write_text(json.dumps(coco_json(images, annotations, list(COLOURS))))
    return file


def make_segmentation(folder: Path) -> SegmentationData:
    """Return three images of coloured halves, whose correct labels have errors, and the classes red, green and blue."""
    rng = np.random.default_rng(0)
    refs, labels = [], []
    for n, (size, first, second) in enumerate([((64, 48), 0, 1), ((48, 64), 1, 2), ((64, 48), 2, 0)]):
        width, height = size
        values = np.full((height, width), first, np.uint8)
        values[:, width // 2 :] = second
        pixels = np.array(list(COLOURS.values()), np.uint8)[values]
        file = folder / f"{n}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        noise = rng.random(values.shape)
        values[noise < 0.2] = rng.integers(0, 3)
        values[noise > 0.9] = 255
        refs.append(FileImage(str(file)))
        labels.append(values)
    return SegmentationData(refs, labels.__getitem__, [["red"], ["green", "nothing"], ["blue"]], ["a {}"])


class Layout(NamedTuple):
    """Files of a data set with one image, relative to the root folder. `split` is the file that lists the image."""

    image: str
    labels: str
    split: str = ""

    def save(self, root: Path, values: list[int]) -> None:
        """Save an image and a label file of size `LABEL_SIZE`. The values are repeated, row by row."""
        for name in self:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", LABEL_SIZE, (10, 20, 30)).save(root / self.image)
        image = Image.fromarray(np.resize(np.array(values, np.uint8), LABEL_SIZE[::-1]))
        if "SegmentationClass" in self.labels:  # as in VOC, colours for viewers
            image.putpalette(list(range(256)) * 3)
        image.save(root / self.labels)
        if self.split:
            (root / self.split).write_text(Path(self.image).stem + "\n")


VOC = Layout("JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png", "ImageSets/Segmentation/val.txt")
