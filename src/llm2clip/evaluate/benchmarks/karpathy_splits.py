"""Flickr30k 1K, COCO 5K and Flickr8k, by Karpathy's splits (arXiv 1412.2306).

Protocol: one pool of all test images and all their captions, cosines of normalised vectors, no prompt. T2I: a caption's
image is among the first k; I2T: any of an image's captions is (arXiv 1707.05612, and CLIP, arXiv 2103.00020). COCO's
5,000 images have 25,010 captions, five to seven an image, and all of them count here; code that comes from VSE++ takes
the first five, 25,000.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llm2clip.data.records import Record
from llm2clip.evaluate.benchmarks.base import Benchmark, Fields, captioned_records, find_image, image_file
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_json, read_lines

COCO = ("coco", "COCO", "mscoco")
IMAGES = {
    "flickr30k": ("flickr30k-images", "flickr30k_images", "images", "Images"),
    "flickr8k": ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"),  # the archive spells it the first way
}


def split_file(file: Path, images: Path, split: str = "test") -> list[Record]:
    """`dataset_NAME.json`: {"images": [{"filename", "filepath" (COCO alone), "split", "sentences": [{"raw"}]}]}."""
    rows = read_json(file)
    if not isinstance(rows, dict) or "images" not in rows:
        raise DataFormatError(f"{file}: no list `images`, as Karpathy's files have")
    chosen = [row for row in rows["images"] if row["split"] == split]
    return captioned_records(
        (
            (
                image_file(images, str(Path(row.get("filepath", "")) / row["filename"])),
                [s["raw"] for s in row["sentences"]],
            )
            for row in chosen
        ),
        file,
    )


def caption_list(file: Path, root: Path) -> list[Record]:
    """`NAME_test.json` as BLIP hands it out: [{"image": "val2014/...jpg", "caption": [...]}]."""
    rows = read_json(file)
    if not isinstance(rows, list):
        raise DataFormatError(f"{file}: not a list of images and captions")
    texts = ((row["caption"], row["image"]) for row in rows)
    return captioned_records(((image_file(root, image), [t] if isinstance(t, str) else t) for t, image in texts), file)


def keyed_captions(file: Path) -> dict[str, list[str]]:
    """Lines of "ID#KIND#N caption" or "ID#N<tab>caption", gathered by ID without .jpg: they may stand anywhere.

    Words that were parted and tagged ("word:n word:v") are put together again.
    """
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(file), 1):
        parts = re.fullmatch(r"(.+?)(?:\.jpg)?#(?:\w+#)?\d+[\t ]+(.*)", line)
        if parts is None:
            raise DataFormatError(f"{file}, line {number}: not ID#N and a caption")
        found.setdefault(parts[1], []).append(strip_tags(parts[2]))
    return found


def strip_tags(text: str) -> str:
    """A sentence whose words were parted by blanks, with their part of speech behind a colon, as it was written."""
    words = text.split()
    if words and all(re.fullmatch(r".+:[a-z]+\d?", word) for word in words):
        return "".join(word.rpartition(":")[0] for word in words)
    return text


def numbered_captions(names: Path, captions: Path, images: Sequence[Path]) -> list[Record]:
    """Of the images that a file lists, the captions of another, each image in the first of some folders that has it."""
    known, chosen = keyed_captions(captions), [name.removesuffix(".jpg") for name in read_lines(names)]
    if absent := [name for name in chosen if name not in known]:
        raise DataFormatError(f"{captions} has no captions of {absent[0]}, which {names} lists")
    return captioned_records(((find_image(images, f"{name}.jpg"), known[name]) for name in chosen), captions)


def _coco(folder: Path) -> Fields:
    root = first_existing(folder, "val2014", "images/val2014").parent
    for name in ("dataset_coco.json", "annotations/dataset_coco.json"):
        if (folder / name).exists():
            return {"captions": split_file(folder / name, root)}
    return {
        "captions": caption_list(
            first_existing(folder, "coco_karpathy_test.json", "annotations/coco_karpathy_test.json"), root
        )
    }


def _flickr30k(folder: Path) -> Fields:
    if (folder / "dataset_flickr30k.json").exists():
        return {"captions": split_file(folder / "dataset_flickr30k.json", first_existing(folder, *IMAGES["flickr30k"]))}
    return {
        "captions": caption_list(
            first_existing(folder, "flickr30k_test.json", "annotations/flickr30k_test.json"), folder
        )
    }


def _flickr8k(folder: Path) -> Fields:
    images = first_existing(folder, *IMAGES["flickr8k"])
    if (folder / "dataset_flickr8k.json").exists():
        return {"captions": split_file(folder / "dataset_flickr8k.json", images)}
    try:
        names = first_existing(folder, "Flickr_8k.testImages.txt", "Flickr8k_text/Flickr_8k.testImages.txt")
    except MissingFileError as error:
        raise MissingFileError(f"{error}, nor dataset_flickr8k.json") from error
    return {"captions": numbered_captions(names, first_existing(names.parent, "Flickr8k.token.txt"), [images])}


SPLITS = "caption_datasets.zip of cs.stanford.edu/people/karpathy/deepimagesent"
BLIP = "storage.googleapis.com/sfr-vision-language-research/datasets"
BENCHMARKS = (
    Benchmark(
        "flickr30k",
        "retrieval",
        "1,000 images, 5,000 captions (Karpathy's test split)",
        ("flickr30k", "Flickr30k", "flickr30k-images"),
        _flickr30k,
        f"dataset_flickr30k.json ({SPLITS}) or flickr30k_test.json ({BLIP}), and the images, flickr30k-images/, by the "
        "form at shannon.cs.illinois.edu/DenotationGraph",
    ),
    Benchmark(
        "coco",
        "retrieval",
        "5,000 images, 25,010 captions (Karpathy's test split)",
        COCO,
        _coco,
        f"dataset_coco.json ({SPLITS}) or coco_karpathy_test.json ({BLIP}), and val2014/ from "
        "images.cocodataset.org/zips/val2014.zip",
    ),
    Benchmark(
        "flickr8k",
        "retrieval",
        "1,000 images, 5,000 captions",
        ("flickr8k", "Flickr8k"),
        _flickr8k,
        f"dataset_flickr8k.json ({SPLITS}), or Flickr8k.token.txt and Flickr_8k.testImages.txt (Flickr8k_text.zip); "
        "images in Flicker8k_Dataset/ (Flickr8k_Dataset.zip)",
    ),
)
