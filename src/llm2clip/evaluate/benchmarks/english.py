"""Retrieval with English captions: Flickr30k, COCO, Flickr8k, ShareGPT4V-1k, Urban-1k and DOCCI.

All test images and all their captions form one pool and are ranked by cosine similarity. No prompt is added to the
captions. In text-to-image retrieval (T2I), a query counts as correct if the caption's image is in the top k. In
image-to-text retrieval (I2T), a query counts as correct if any of the image's captions is in the top k. VSE++ (arXiv
1707.05612) and CLIP (arXiv 2103.00020) use this protocol.

Flickr30k, COCO and Flickr8k have Karpathy's test splits (arXiv 1412.2306). COCO's 5,000 test images have five to seven
captions each. All 25,010 captions are used, whereas code derived from VSE++ uses only the first five captions of each
image, 25,000 in total. ShareGPT4V-1k, Urban-1k and DOCCI have one long caption per image.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.readers.coco import KarpathyImage
from llm2clip.data.records import Record
from llm2clip.evaluate.benchmarks.base import (
    Benchmark,
    CaptionFields,
    find_image_file,
    image_file,
    make_captioned_records,
)
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_json, read_jsonl, read_lines

COCO_FOLDERS = ("coco", "COCO", "mscoco")
IMAGE_FOLDERS = {
    "flickr30k": ("flickr30k-images", "flickr30k_images", "images", "Images"),
    "flickr8k": ("Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"),  # sic: the archive spells it "Flicker8k"
}
SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
READ_SIZE = 1 << 20  # characters per read


# ---- Flickr30k, COCO and Flickr8k ------------------------------------------------------------------------------------


def read_karpathy_json(file: Path, image_dir: Path, split: str = "test") -> list[Record]:
    """Read one split of Karpathy's `dataset_NAME.json`; see `llm2clip.data.readers.coco`."""
    data = read_json(file)
    if not isinstance(data, dict) or "images" not in data:
        raise DataFormatError(f"{file}: expected a JSON object with an `images` list, as in Karpathy's files")
    pairs = []
    for row in data["images"]:
        image = KarpathyImage.parse(row)
        if image.split == split:
            pairs.append((image_file(image_dir, image.name), image.captions))
    return make_captioned_records(pairs, file)


def read_blip_json(file: Path, image_dir: Path) -> list[Record]:
    """Read BLIP's `NAME_test.json`, whose format is [{"image": "val2014/...jpg", "caption": [...]}]."""
    rows = read_json(file)
    if not isinstance(rows, list):
        raise DataFormatError(f"{file}: expected a JSON list of images with captions")
    pairs = []
    for row in rows:
        captions = row["caption"]
        pairs.append((image_file(image_dir, row["image"]), [captions] if isinstance(captions, str) else captions))
    return make_captioned_records(pairs, file)


def read_caption_lines(file: Path) -> dict[str, list[str]]:
    """Read a caption file and return the captions of each image, keyed by image id (without .jpg).

    Each line has the form "ID#KIND#N caption" or "ID#N<tab>caption". The lines of an image do not have to be adjacent.
    For captions with part-of-speech tags, see `strip_tags`.
    """
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(read_lines(file), 1):
        match = re.fullmatch(r"(.+?)(?:\.jpg)?#(?:\w+#)?\d+[\t ]+(.*)", line)
        if match is None:
            raise DataFormatError(f"{file}, line {number}: expected ID#N followed by a caption")
        captions.setdefault(match[1], []).append(strip_tags(match[2]))
    return captions


def strip_tags(text: str) -> str:
    """Remove part-of-speech tags ("word:n word:v") and join the words. Text without tags is returned unchanged."""
    words = text.split()
    if words and all(re.fullmatch(r".+:[a-z]+\d?", word) for word in words):
        return "".join(word.rpartition(":")[0] for word in words)
    return text


def read_listed_images(names_file: Path, captions_file: Path, image_dirs: Sequence[Path]) -> list[Record]:
    """Read the images listed in `names_file` and their captions in `captions_file`.

    The folders in `image_dirs` are searched for each image, in order.
    """
    captions = read_caption_lines(captions_file)
    pairs = []
    for line in read_lines(names_file):
        name = line.removesuffix(".jpg")
        if name not in captions:
            raise DataFormatError(f"{captions_file} has no captions for {name}, which is listed in {names_file}")
        pairs.append((find_image_file(image_dirs, f"{name}.jpg"), captions[name]))
    return make_captioned_records(pairs, captions_file)


def _read_coco(folder: Path) -> CaptionFields:
    image_dir = first_existing(folder, "val2014", "images/val2014").parent
    for name in ("dataset_coco.json", "annotations/dataset_coco.json"):
        if (folder / name).exists():
            return {"captions": read_karpathy_json(folder / name, image_dir)}
    file = first_existing(folder, "coco_karpathy_test.json", "annotations/coco_karpathy_test.json")
    return {"captions": read_blip_json(file, image_dir)}


def _read_flickr30k(folder: Path) -> CaptionFields:
    file = folder / "dataset_flickr30k.json"
    if file.exists():
        return {"captions": read_karpathy_json(file, first_existing(folder, *IMAGE_FOLDERS["flickr30k"]))}
    file = first_existing(folder, "flickr30k_test.json", "annotations/flickr30k_test.json")
    return {"captions": read_blip_json(file, folder)}


def _read_flickr8k(folder: Path) -> CaptionFields:
    image_dir = first_existing(folder, *IMAGE_FOLDERS["flickr8k"])
    file = folder / "dataset_flickr8k.json"
    if file.exists():
        return {"captions": read_karpathy_json(file, image_dir)}
    try:
        names = first_existing(folder, "Flickr_8k.testImages.txt", "Flickr8k_text/Flickr_8k.testImages.txt")
    except MissingFileError as error:
        raise MissingFileError(f"{error} or dataset_flickr8k.json") from error
    captions = first_existing(names.parent, "Flickr8k.token.txt")
    return {"captions": read_listed_images(names, captions, [image_dir])}


# ---- ShareGPT4V, Urban-1k and DOCCI: one long caption per image ------------------------------------------------------


def read_first_objects(file: Path, count: int) -> list[dict[str, Any]]:
    """Read the first `count` objects in a JSON list without reading the rest of the file.

    ShareGPT4V's file has 1.4 GB, but only its first 1,000 objects are needed.

    Raises:
        DataFormatError: If the file is not a JSON list, or one of its first `count` objects is not valid JSON.
    """
    decoder = json.JSONDecoder()
    objects: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as stream:
        text = stream.read(READ_SIZE).lstrip()
        if not text.startswith("["):
            raise DataFormatError(f"{file}: expected a JSON list")
        text = text[1:]
        while len(objects) < count:
            text = text.lstrip(" \t\r\n,")
            if text.startswith("]"):
                break
            try:
                item, end = decoder.raw_decode(text)
            except json.JSONDecodeError as error:  # the object may continue in the next chunk
                chunk = stream.read(READ_SIZE)
                if not chunk:
                    raise DataFormatError(f"{file}: object {len(objects) + 1} is truncated or is not JSON") from error
                text += chunk
                continue
            objects.append(item)
            text = text[end:]
    return objects


def _read_sharegpt4v(folder: Path) -> CaptionFields:
    """Read the first 1,000 records, whose images are SA-1B images in `sam/images/`.

    As in Long-CLIP (arXiv 2403.15378), the caption is `conversations[1].value` with newlines replaced by spaces.
    """
    file = first_existing(folder, SHAREGPT4V_FILE)
    rows = read_first_objects(file, 1000)
    image_dir = folder if (folder / "sam").exists() else first_existing(folder, "images", "data")
    pairs = []
    for row in rows:
        caption = row["conversations"][1]["value"].replace("\n", " ")
        pairs.append((image_file(image_dir, row["image"]), [caption]))
    return {"captions": make_captioned_records(pairs, file)}


def _read_urban1k(folder: Path) -> CaptionFields:
    """Read `caption/N.txt` and `image/N.jpg`. As in Long-CLIP's script, only the first line of each file is used."""
    caption_dir = first_existing(folder, "caption")
    files = sorted(caption_dir.glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise MissingFileError(f"{folder / 'caption'} has no .txt files")
    pairs = []
    for file in files:
        first_line = file.read_text(encoding="utf-8").split("\n")[0]
        pairs.append((image_file(folder / "image", f"{file.stem}.jpg"), [first_line]))
    return {"captions": make_captioned_records(pairs, folder / "caption")}


def _read_docci(folder: Path) -> CaptionFields:
    """Read `docci_descriptions.jsonlines` and `images/` (arXiv 2404.19753).

    The split name must be exactly "test", because the file also has a "qual_test" split.
    """
    file = first_existing(folder, "docci_descriptions.jsonlines")
    rows = [row for _, row in read_jsonl(file) if row["split"] == "test"]
    image_dir = first_existing(folder, "images", "test_images")
    pairs = [(image_file(image_dir, row["image_file"]), [row["description"]]) for row in rows]
    return {"captions": make_captioned_records(pairs, file)}


KARPATHY_SOURCE = "caption_datasets.zip from cs.stanford.edu/people/karpathy/deepimagesent"
BLIP_SOURCE = "storage.googleapis.com/sfr-vision-language-research/datasets"
BENCHMARKS = (
    Benchmark(
        name="flickr30k",
        kind="retrieval",
        description="1,000 images, 5,000 captions (Karpathy's test split)",
        folders=("flickr30k", "Flickr30k", "flickr30k-images"),
        read=_read_flickr30k,
        source=f"dataset_flickr30k.json ({KARPATHY_SOURCE}) or flickr30k_test.json ({BLIP_SOURCE}), and "
        "flickr30k-images/ (request the images with the form at shannon.cs.illinois.edu/DenotationGraph)",
    ),
    Benchmark(
        name="coco",
        kind="retrieval",
        description="5,000 images, 25,010 captions (Karpathy's test split)",
        folders=COCO_FOLDERS,
        read=_read_coco,
        source=f"dataset_coco.json ({KARPATHY_SOURCE}) or coco_karpathy_test.json ({BLIP_SOURCE}), and val2014/ "
        "(images.cocodataset.org/zips/val2014.zip)",
    ),
    Benchmark(
        name="flickr8k",
        kind="retrieval",
        description="1,000 images, 5,000 captions",
        folders=("flickr8k", "Flickr8k"),
        read=_read_flickr8k,
        source=f"dataset_flickr8k.json ({KARPATHY_SOURCE}), or Flickr8k.token.txt and Flickr_8k.testImages.txt "
        "(Flickr8k_text.zip); and Flicker8k_Dataset/ (Flickr8k_Dataset.zip)",
    ),
    Benchmark(
        name="sharegpt4v",
        kind="retrieval",
        description="1,000 images, one long caption each",
        folders=("sharegpt4v", "ShareGPT4V"),
        read=_read_sharegpt4v,
        source=f"{SHAREGPT4V_FILE} (huggingface.co/datasets/Lin-Chen/ShareGPT4V), and the images for its first 1,000 "
        "records, sam/images/sa_*.jpg (ai.meta.com/datasets/segment-anything, tars 000000 to 000050)",
    ),
    Benchmark(
        name="urban1k",
        kind="retrieval",
        description="1,000 images, one long caption each",
        folders=("urban1k", "Urban1k", "Urban-1k"),
        read=_read_urban1k,
        source="Urban1k.zip (huggingface.co/datasets/BeichenZhang/Urban1k): caption/ and image/",
    ),
    Benchmark(
        name="docci",
        kind="retrieval",
        description="5,000 images, one description of about 136 words each",
        folders=("docci", "DOCCI"),
        read=_read_docci,
        source="docci_descriptions.jsonlines and docci_images.tar.gz (storage.googleapis.com/docci/data), CC BY 4.0",
    ),
)
