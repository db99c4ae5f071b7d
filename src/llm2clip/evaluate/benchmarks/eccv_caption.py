"""ECCV Caption and CxC: COCO test images and captions with additional matches from human judgements.

In COCO, a caption is correct only for the image it was written for. If it also describes another image, plain recall
counts that match as an error. CxC (arXiv 2004.15020) and ECCV Caption (arXiv 2204.03359) add human judgements of such
matches. The package eccv-caption contains these judgements and the list of captions to rank: five captions for each of
5,000 images, 25,000 in total.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from llm2clip.evaluate.benchmarks.base import Benchmark, JudgedRetrieval, check_files, image_file
from llm2clip.evaluate.benchmarks.karpathy_splits import COCO_FOLDERS
from llm2clip.io_utils import DataFormatError, MissingFileError, first_existing, read_json

ANNOTATIONS = "captions_val2014.json"


def load_judgements() -> Any:
    """Load the human judgements as an `eccv_caption.Metrics` object.

    Raises:
        MissingFileError: If the package is not installed.
    """
    if importlib.util.find_spec("eccv_caption") is None:
        raise MissingFileError("the human judgements come with the package eccv-caption: pip install eccv-caption")
    from eccv_caption import Metrics

    return Metrics()


def _read_judged_retrieval(folder: Path) -> JudgedRetrieval:
    """Read `annotations/captions_val2014.json` and `val2014/`.

    The JSON file has the format {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}.
    """
    file = first_existing(folder, f"annotations/{ANNOTATIONS}", ANNOTATIONS)
    image_dir = first_existing(folder, "val2014", "images/val2014")
    caption_ids = load_judgements().coco_ids.tolist()
    rows = read_json(file)
    file_names = {row["id"]: row["file_name"] for row in rows["images"]}
    captions = {row["id"]: (row["image_id"], row["caption"].strip()) for row in rows["annotations"]}
    missing = [caption_id for caption_id in caption_ids if caption_id not in captions]
    if missing:
        raise DataFormatError(
            f"{file} does not contain {len(missing):,} of the {len(caption_ids):,} captions, e.g. id {missing[0]}"
        )
    image_ids = list(dict.fromkeys(captions[caption_id][0] for caption_id in caption_ids))
    for image_id in image_ids:
        if image_id not in file_names:
            raise DataFormatError(f"{file} has no file name for image {image_id}")
    refs = [image_file(image_dir, file_names[image_id]) for image_id in image_ids]
    check_files(refs, file)
    return JudgedRetrieval(
        images=refs,
        image_ids=image_ids,
        captions=[captions[caption_id][1] for caption_id in caption_ids],
        caption_ids=caption_ids,
    )


BENCHMARKS = (
    Benchmark(
        name="eccv-caption",
        kind="judged retrieval",
        description="COCO's 5,000 test images, 25,000 captions, with additional human judgements (ECCV Caption, CxC)",
        folders=COCO_FOLDERS,
        read=_read_judged_retrieval,
        source="annotations/captions_val2014.json "
        "(images.cocodataset.org/annotations/annotations_trainval2014.zip), val2014/, and the package "
        "eccv-caption (pip install eccv-caption)",
    ),
)
