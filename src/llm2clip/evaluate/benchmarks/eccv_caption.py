"""ECCV Caption and CxC: COCO's test images, with the other captions and images that people found to be right, too.

A model that finds a right answer which COCO does not know of is punished by plain recall. CxC (arXiv 2004.15020) and
ECCV Caption (arXiv 2204.03359) add those; their judgements come with the package eccv-caption, and so does the pool: of
each of the 5,000 images five captions, 25,000.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llm2clip.evaluate.benchmarks.base import Benchmark, JudgedRetrieval, check_files, image_file
from llm2clip.evaluate.benchmarks.karpathy_splits import COCO
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_json

ANNOTATIONS = "captions_val2014.json"


def load_judgements() -> Any:
    """The package's `Metrics`.

    Raises:
        Absent: it is not installed.
    """
    if importlib.util.find_spec("eccv_caption") is None:
        raise MissingFileError("the judgements come with a package: pip install eccv-caption")
    from eccv_caption import Metrics

    return Metrics()


def _judged(folder: Path) -> JudgedRetrieval:
    """`annotations/captions_val2014.json`: {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id",
    "caption"}]}, and `val2014/`."""
    file = first_existing(folder, f"annotations/{ANNOTATIONS}", ANNOTATIONS)
    root = first_existing(folder, "val2014", "images/val2014")
    pool = load_judgements().coco_ids.tolist()
    rows = read_json(file)
    names = {row["id"]: row["file_name"] for row in rows["images"]}
    captions = {row["id"]: (row["image_id"], row["caption"].strip()) for row in rows["annotations"]}
    if lacking := [n for n in pool if n not in captions]:
        raise DataFormatError(
            f"{file} lacks {len(lacking):,} of the {len(pool):,} captions, number {lacking[0]} for one"
        )
    images = list(dict.fromkeys(captions[n][0] for n in pool))
    if nameless := [n for n in images if n not in names]:
        raise DataFormatError(f"{file} has no file name of image {nameless[0]}")
    refs = [image_file(root, names[n]) for n in images]
    check_files(refs, file)
    return JudgedRetrieval(refs, images, [captions[n][1] for n in pool], pool)


BENCHMARKS = (
    Benchmark(
        "eccv-caption",
        "judged",
        "COCO's 5,000 test images, 25,000 captions, and what else is right of them (ECCV Caption, CxC)",
        COCO,
        _judged,
        "annotations/captions_val2014.json (images.cocodataset.org/annotations/annotations_trainval2014.zip), "
        "val2014/, and pip install eccv-caption",
    ),
)
