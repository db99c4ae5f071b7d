"""Readers for retrieval benchmarks with English captions (Flickr30k, COCO, Flickr8k, ShareGPT4V-1k, Urban-1k and
DOCCI) and with captions in other languages (Flickr30k-CN, COCO-CN, Crossmodal-3600 and XTD10).

For each language, all test images or captions are ranked by cosine similarity to each query, without prompt
templates. In image-to-text retrieval (I2T), a query is correct if any of the image's captions is in the top k. VSE++
(arXiv 1707.05612) and CLIP (arXiv 2103.00020) use the same protocol.

Flickr30k, COCO and Flickr8k use Karpathy's test splits (arXiv 1412.2306). All 25,010 captions of COCO's 5,000 test
images are used. Code derived from VSE++ uses only the first five captions of each image (25,000 captions).
"""

import base64
import binascii
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.formats.text_files import KarpathyImage
from llm2clip.data.image_refs import ImageRef, InMemoryImage
from llm2clip.data.records import Record
from llm2clip.evaluate.benchmarks.base import (
    CaptionFields,
    find_coco_folders,
    make_captioned_records,
    resolve_benchmark_image,
)
from llm2clip.io_utils import DataFormatError, MissingFileError, find_first_existing, read_json, read_jsonl, read_lines

SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
READ_SIZE = 1 << 25  # in characters; the first 1,000 records of ShareGPT4V have about 2 million characters
XTD10_FILES = {
    **{f"XTD10/test_1kcaptions_{name}.txt": name for name in ("es", "it", "ko", "pl", "ru", "tr", "zh")},
    **{f"MIC/test_1kcaptions_{name}.txt": name for name in ("en", "de", "fr")},
    "STAIR/test_1kcaptions_jp.txt": "ja",
}


def _read_karpathy(folder: Path, name: str, image_dir: Path) -> CaptionFields:
    """Read the test split of Karpathy's `dataset_NAME.json` (see `KarpathyImage`)."""
    file = find_first_existing(folder, f"dataset_{name}.json", f"annotations/dataset_{name}.json")
    images = [KarpathyImage.parse(row) for row in read_json(file)["images"]]
    pairs = [
        (resolve_benchmark_image(image_dir, image.name), image.captions) for image in images if image.split == "test"
    ]
    return {"captions": make_captioned_records(pairs, file)}


def read_first_json_objects(file: Path, count: int) -> list[dict[str, Any]]:
    """Read the first `count` objects of a JSON list without reading the entire file."""
    with file.open(encoding="utf-8") as stream:
        text = stream.read(READ_SIZE)
    decoder = json.JSONDecoder()
    objects: list[dict[str, Any]] = []
    position = text.find("[") + 1
    if text[:position].strip() != "[":
        raise DataFormatError(f"{file}: the file must contain a JSON list")
    while len(objects) < count:
        while text[position : position + 1] in tuple(" \t\r\n,"):
            position += 1
        if text.startswith("]", position):
            break
        try:
            item, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataFormatError(f"{file}: object {len(objects) + 1} is truncated or is not valid JSON") from error
        objects.append(item)
    return objects


def _read_sharegpt4v(folder: Path) -> CaptionFields:
    """Read the first 1,000 records of ShareGPT4V. Their images are from SA-1B and must be in `sam/images/`.

    As in Long-CLIP (arXiv 2403.15378), newlines in captions are replaced by spaces.
    """
    file = find_first_existing(folder, SHAREGPT4V_FILE)
    image_dir = folder if (folder / "sam").exists() else find_first_existing(folder, "images", "data")
    pairs = []
    for row in read_first_json_objects(file, 1000):
        caption = row["conversations"][1]["value"].replace("\n", " ")
        pairs.append((resolve_benchmark_image(image_dir, row["image"]), [caption]))
    return {"captions": make_captioned_records(pairs, file)}


def _read_urban1k(folder: Path) -> CaptionFields:
    """Read `caption/N.txt` and `image/N.jpg`. As in Long-CLIP, only the first line of each caption file is used."""
    caption_dir = find_first_existing(folder, "caption")
    files = sorted(caption_dir.glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    if not files:
        raise MissingFileError(f"{folder / 'caption'} contains no .txt files")
    pairs = []
    for file in files:
        first_line = file.read_text(encoding="utf-8").split("\n")[0]
        pairs.append((resolve_benchmark_image(folder / "image", f"{file.stem}.jpg"), [first_line]))
    return {"captions": make_captioned_records(pairs, folder / "caption")}


def _read_docci(folder: Path) -> CaptionFields:
    """Read the split "test" (not "qual_test") from `docci_descriptions.jsonlines` and `images/` (arXiv 2404.19753)."""
    file = find_first_existing(folder, "docci_descriptions.jsonlines")
    rows = [row for _, row in read_jsonl(file) if row["split"] == "test"]
    image_dir = find_first_existing(folder, "images", "test_images")
    pairs = [(resolve_benchmark_image(image_dir, row["image_file"]), [row["description"]]) for row in rows]
    return {"captions": make_captioned_records(pairs, file)}


def _read_chinese_clip(folder: Path) -> CaptionFields:
    """Read Chinese-CLIP's format (arXiv 2211.01335): a JSONL file of captions, and a TSV file of base64 images."""
    texts, images = folder / "test_texts.jsonl", folder / "test_imgs.tsv"
    captions: dict[str, list[str]] = {}
    for number, row in read_jsonl(texts):
        if len(row["image_ids"]) != 1:
            raise DataFormatError(f"{texts}, line {number}: expected one image id (got {len(row['image_ids'])})")
        captions.setdefault(str(row["image_ids"][0]), []).append(row["text"])
    refs = _read_base64_images(images, set(captions))
    for key in captions:
        if key not in refs:
            raise DataFormatError(f"{images} does not contain image {key}, to which {texts} refers")
    return {"captions_zh": make_captioned_records(((refs[key], captions[key]) for key in captions), texts)}


def _read_base64_images(file: Path, ids: set[str]) -> dict[str, ImageRef]:
    refs: dict[str, ImageRef] = {}
    with file.open(encoding="ascii") as stream:
        for number, line in enumerate(stream, 1):
            key, tab, data = line.rstrip("\n").partition("\t")
            try:
                # Some files use the URL-safe base64 alphabet.
                image = base64.b64decode(data.translate(str.maketrans("-_", "+/")), validate=True)
            except binascii.Error as error:
                raise DataFormatError(f"{file}, line {number}: expected ID<tab>BASE64 ({error})") from error
            if tab and key in ids:
                refs[key] = InMemoryImage(image, f"{file}, line {number}")
    return refs


def _read_xm3600(folder: Path) -> CaptionFields:
    """Read Crossmodal-3600 (arXiv 2205.12522): 3,600 images with captions in 36 languages."""
    file = find_first_existing(folder, "captions.jsonl", "annotations/captions.jsonl")
    image_dir = find_first_existing(folder, "images")
    pairs: dict[str, list[tuple[ImageRef, list[str]]]] = {}
    for _, row in read_jsonl(file):
        image = resolve_benchmark_image(image_dir, f"{row['image/key']}.jpg")
        for language, value in row.items():
            if isinstance(value, dict) and value.get("caption"):
                pairs.setdefault(f"captions_{language}", []).append((image, value["caption"]))
    return {field: make_captioned_records(field_pairs, file) for field, field_pairs in sorted(pairs.items())}


def _read_xtd10(folder: Path) -> CaptionFields:
    """Read XTD10 (arXiv 2012.05107): 1,000 COCO images with one caption in each of 11 languages."""
    names = read_lines(find_first_existing(folder, "XTD10/test_image_names.txt", "test_image_names.txt"))
    refs = []
    for name in names:
        split = "train2014" if "train2014" in name else "val2014"
        root = next((root for root in find_coco_folders(folder) if (root / split / name).is_file()), folder)
        refs.append(resolve_benchmark_image(root, f"{split}/{name}"))
    fields: dict[str, list[Record]] = {}
    for name, language in XTD10_FILES.items():
        file = next((path for path in (folder / name, folder / Path(name).name) if path.exists()), None)
        if file is not None:
            fields[f"captions_{language}"] = _read_parallel_captions(file, refs)
    if not fields:
        raise MissingFileError(f"{folder} contains no caption files, such as XTD10/test_1kcaptions_es.txt")
    return fields


def _read_parallel_captions(file: Path, refs: Sequence[ImageRef]) -> list[Record]:
    """Read captions from a file in which line i is the caption of image i. Blank lines are not skipped."""
    captions = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if len(captions) != len(refs):
        raise DataFormatError(f"{file} has {len(captions)} captions for {len(refs)} images")
    return make_captioned_records(((ref, [caption]) for ref, caption in zip(refs, captions, strict=True)), file)


READERS = {
    "flickr30k": lambda folder: _read_karpathy(
        folder, "flickr30k", find_first_existing(folder, "flickr30k-images", "flickr30k_images", "images", "Images")
    ),
    "coco": lambda folder: _read_karpathy(
        folder, "coco", find_first_existing(folder, "val2014", "images/val2014").parent
    ),
    "flickr8k": lambda folder: _read_karpathy(
        folder,
        "flickr8k",
        find_first_existing(folder, "Flicker8k_Dataset", "Flickr8k_Dataset", "Images", "images"),  # sic
    ),
    "sharegpt4v": _read_sharegpt4v,
    "urban1k": _read_urban1k,
    "docci": _read_docci,
    "flickr30k-cn": _read_chinese_clip,
    "coco-cn": _read_chinese_clip,
    "xm3600": _read_xm3600,
    "xtd10": _read_xtd10,
}
