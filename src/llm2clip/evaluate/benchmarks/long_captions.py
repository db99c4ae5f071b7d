"""Retrieval benchmarks with one long caption per image: ShareGPT4V-1k, Urban-1k and DOCCI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2clip.evaluate.benchmarks.base import Benchmark, CaptionFields, captioned_records, image_file
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_jsonl

SHAREGPT4V_FILE = "share-captioner_coco_lcs_sam_1246k_1107.json"
CHUNK = 1 << 20  # characters per read


def read_first_objects(file: Path, count: int) -> list[dict[str, Any]]:
    """Read the first `count` objects in a JSON list without reading the rest of the file.

    ShareGPT4V's file has 1.4 GB, of which only a small part is needed.

    Raises:
        DataFormatError: If the file is not a JSON list, or one of its first `count` objects is not valid JSON.
    """
    decoder = json.JSONDecoder()
    objects: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as stream:
        text = stream.read(CHUNK).lstrip()
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
                chunk = stream.read(CHUNK)
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
    return {"captions": captioned_records(pairs, file)}


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
    return {"captions": captioned_records(pairs, folder / "caption")}


def _read_docci(folder: Path) -> CaptionFields:
    """Read `docci_descriptions.jsonlines` and `images/` (arXiv 2404.19753).

    The split name must be exactly "test", because the file also has a "qual_test" split.
    """
    file = first_existing(folder, "docci_descriptions.jsonlines")
    rows = [row for _, row in read_jsonl(file) if row["split"] == "test"]
    image_dir = first_existing(folder, "images", "test_images")
    pairs = [(image_file(image_dir, row["image_file"]), [row["description"]]) for row in rows]
    return {"captions": captioned_records(pairs, file)}


BENCHMARKS = (
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
