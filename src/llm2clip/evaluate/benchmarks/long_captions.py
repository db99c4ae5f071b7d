"""Sets with one long caption an image: ShareGPT4V-1k, Urban-1k, DOCCI. One-to-one, both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2clip.evaluate.benchmarks.base import Benchmark, Fields, captioned_records, image_file
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_jsonl

SHARE = "share-captioner_coco_lcs_sam_1246k_1107.json"


def first_rows(file: Path, count: int) -> list[dict[str, Any]]:
    """The first objects of a JSON list, without reading the 1.4 GB that follow.

    Raises:
        Malformed: it does not begin like a list of objects.
    """
    decoder = json.JSONDecoder()
    rows: list[dict[str, Any]] = []
    with file.open(encoding="utf-8") as stream:
        text = stream.read(1 << 20).lstrip()
        if not text.startswith("["):
            raise DataFormatError(f"{file}: not a JSON list")
        text = text[1:]
        while len(rows) < count:
            text = text.lstrip(" \t\r\n,")
            if text.startswith("]"):
                break
            try:
                row, end = decoder.raw_decode(text)
            except json.JSONDecodeError as error:
                more = stream.read(1 << 20)
                if not more:
                    raise DataFormatError(f"{file}: object {len(rows) + 1} is cut off or is not JSON") from error
                text += more
                continue
            rows.append(row)
            text = text[end:]
    return rows


def _sharegpt4v(folder: Path) -> Fields:
    """The first 1,000 records, captions being `conversations[1].value` with newlines as blanks (Long-CLIP, arXiv
    2403.15378). They are images of SA-1B, in `sam/images/`."""
    file = first_existing(folder, SHARE)
    rows = first_rows(file, 1000)
    root = folder if (folder / "sam").exists() else first_existing(folder, "images", "data")
    pairs = [(image_file(root, r["image"]), [" ".join(r["conversations"][1]["value"].split("\n"))]) for r in rows]
    return {"captions": captioned_records(pairs, file)}


def _urban1k(folder: Path) -> Fields:
    """`caption/N.txt` and `image/N.jpg`; of each text the first line, as Long-CLIP's script reads it."""
    texts = sorted(first_existing(folder, "caption").glob("*.txt"), key=lambda f: (len(f.stem), f.stem))
    if not texts:
        raise MissingFileError(f"{folder / 'caption'} has no .txt")
    pairs = [
        (image_file(folder / "image", f"{f.stem}.jpg"), f.read_text(encoding="utf-8").split("\n")[:1]) for f in texts
    ]
    return {"captions": captioned_records(pairs, folder / "caption")}


def _docci(folder: Path) -> Fields:
    """`docci_descriptions.jsonlines`, rows whose split is exactly "test", since there is a "qual_test" (arXiv
    2404.19753); images in `images/`."""
    file = first_existing(folder, "docci_descriptions.jsonlines")
    rows = [row for _, row in read_jsonl(file) if row["split"] == "test"]
    images = first_existing(folder, "images", "test_images")
    return {
        "captions": captioned_records(((image_file(images, r["image_file"]), [r["description"]]) for r in rows), file)
    }


BENCHMARKS = (
    Benchmark(
        "sharegpt4v",
        "retrieval",
        "1,000 images, a long caption each",
        ("sharegpt4v", "ShareGPT4V"),
        _sharegpt4v,
        f"{SHARE} (huggingface.co/datasets/Lin-Chen/ShareGPT4V), and the images of its first 1,000 records, "
        "sam/images/sa_*.jpg (ai.meta.com/datasets/segment-anything, tars 000000 to 000050)",
    ),
    Benchmark(
        "urban1k",
        "retrieval",
        "1,000 images, a long caption each",
        ("urban1k", "Urban1k", "Urban-1k"),
        _urban1k,
        "Urban1k.zip (huggingface.co/datasets/BeichenZhang/Urban1k): caption/ and image/",
    ),
    Benchmark(
        "docci",
        "retrieval",
        "5,000 images, a description of about 136 words each",
        ("docci", "DOCCI"),
        _docci,
        "docci_descriptions.jsonlines and docci_images.tar.gz (storage.googleapis.com/docci/data), CC BY 4.0",
    ),
)
