"""Winoground and SugarCrepe: does a model tell captions apart that have nearly the same words?"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from llm2clip.data.image_refs import MemoryImage
from llm2clip.evaluate.benchmarks.base import Benchmark, CompositionalExample, check_files, image_file
from llm2clip.evaluate.benchmarks.karpathy_splits import COCO
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_json, read_jsonl

SUGARCREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


def _winoground(folder: Path) -> list[CompositionalExample]:
    """400 pairs of images and captions of the same words (arXiv 2204.03162). With s(c, i), and > strict: text,
    s(c0, i0) > s(c1, i0) and s(c1, i1) > s(c0, i1); image, s(c0, i0) > s(c0, i1) and s(c1, i1) > s(c1, i0); group,
    both."""
    try:
        file = first_existing(folder, "examples.jsonl", "data/examples.jsonl")
    except MissingFileError:
        return _winoground_parquet(first_existing(folder, "data/test-*.parquet", "test-*.parquet"))
    images = first_existing(file.parent, "images")
    chosen = []
    for _, row in read_jsonl(file):
        names = [row[key] if Path(row[key]).suffix else f"{row[key]}.png" for key in ("image_0", "image_1")]
        refs = tuple(image_file(images, name) for name in names)
        chosen.append(CompositionalExample(str(row["id"]), "winoground", refs, (row["caption_0"], row["caption_1"])))
    return _with_files(chosen, file)


def _winoground_parquet(file: Path) -> list[CompositionalExample]:
    chosen = []
    columns = ["id", "image_0", "image_1", "caption_0", "caption_1"]
    for row in pq.read_table(file, columns=columns).to_pylist():
        refs = tuple(MemoryImage(row[key]["bytes"], f"{file}, {row['id']}, {key}") for key in ("image_0", "image_1"))
        chosen.append(CompositionalExample(str(row["id"]), "winoground", refs, (row["caption_0"], row["caption_1"])))
    return chosen


def _sugarcrepe(folder: Path) -> list[CompositionalExample]:
    """7,511 images of COCO's val2017, a caption and one with a thing added, replaced or swapped (arXiv 2306.14610).
    Right where the caption's cosine is above the other's; accuracies are by file, and their mean over the files."""
    data = folder / "data" if (folder / "data").is_dir() else folder
    places = [folder, *(folder.parent / name for name in COCO)]
    images = next((p / "val2017" for p in places if (p / "val2017").is_dir()), None)
    if images is None:
        raise MissingFileError(f"{folder} has no val2017, nor has a folder coco beside it")
    chosen = []
    for kind in SUGARCREPE:
        file = first_existing(data, f"{kind}.json")
        rows = read_json(file)
        if not isinstance(rows, dict):
            raise DataFormatError(f"{file}: not an object of numbered rows")
        for key, row in rows.items():
            texts = (row["caption"].strip(), row["negative_caption"].strip())
            chosen.append(CompositionalExample(f"{kind} {key}", kind, (image_file(images, row["filename"]),), texts))
    return _with_files(chosen, data)


def _with_files(chosen: list[CompositionalExample], source: Path) -> list[CompositionalExample]:
    check_files([image for choice in chosen for image in choice.images], source)
    return chosen


BENCHMARKS = (
    Benchmark(
        "winoground",
        "choice",
        "400 pairs of two images and two captions of the same words",
        ("winoground", "Winoground"),
        _winoground,
        "examples.jsonl and images/ (huggingface.co/datasets/facebook/winoground, behind its licence)",
    ),
    Benchmark(
        "sugarcrepe",
        "choice",
        "7,511 images, a right and a wrong caption each",
        ("sugarcrepe", "sugar-crepe", "SugarCrepe"),
        _sugarcrepe,
        "data/*.json of github.com/RAIVNLab/sugar-crepe, and COCO's val2017/",
    ),
)
