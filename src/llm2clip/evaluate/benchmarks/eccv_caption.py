"""ECCV Caption and CxC: COCO test images and captions with additional matches from human judgements.

In COCO, a caption is correct only for the image it was written for. If it also describes another image, plain recall
counts this match as an error. CxC (arXiv 2004.15020) and ECCV Caption (arXiv 2204.03359) add human judgements of such
matches. The package eccv-caption contains these judgements and the list of captions to rank: five captions for each of
5,000 images, 25,000 in total.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.evaluate.benchmarks.base import COCO_FOLDERS, Benchmark, JudgedRetrieval, check_files, resolve_image
from llm2clip.evaluate.recall import KS
from llm2clip.io_utils import DataFormatError, MissingFileError, find_first, read_json

ANNOTATIONS = "captions_val2014.json"
RANKED_ITEMS = 64  # ranked items per query; R-precision and mAP@R need at least 48, the maximum number of correct items
QUERIES_PER_CHUNK = 512  # the float32 scores of 512 images and all captions take up 50 MB


def load_judgements() -> Any:
    """Load the human judgements as an `eccv_caption.Metrics` object.

    Raises:
        MissingFileError: If eccv-caption is not installed.
    """
    if importlib.util.find_spec("eccv_caption") is None:
        raise MissingFileError("the human judgements are part of the package eccv-caption: pip install eccv-caption")
    from eccv_caption import Metrics

    return Metrics()


def _read_judged_retrieval(folder: Path) -> JudgedRetrieval:
    """Read `annotations/captions_val2014.json` and `val2014/`.

    The JSON file has the format {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}.
    """
    file = find_first(folder, f"annotations/{ANNOTATIONS}", ANNOTATIONS)
    image_dir = find_first(folder, "val2014", "images/val2014")
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
    refs = [resolve_image(image_dir, file_names[image_id]) for image_id in image_ids]
    check_files(refs, file)
    return JudgedRetrieval(
        images=refs,
        image_ids=image_ids,
        captions=[captions[caption_id][1] for caption_id in caption_ids],
        caption_ids=caption_ids,
    )


def compute_eccv_metrics(data: JudgedRetrieval, images: Tensor, captions: Tensor) -> dict[str, float]:
    """Return COCO 5k R@k, CxC R@k, and ECCV Caption R@1, R-precision and mAP@R (arXiv 2204.03359), in percent.

    This function ranks the items. The package eccv-caption computes the metrics from the ranked lists.

    Args:
        images: Image embeddings of shape (I, D), L2-normalised, in the order of `data.images`.
        captions: Caption embeddings of shape (T, D), L2-normalised, in the order of `data.captions`.

    Returns:
        Metrics for both directions, with keys such as "I2T COCO R@1".
    """
    image_ids, caption_ids = torch.tensor(data.image_ids), torch.tensor(data.caption_ids)
    captions_of_image, images_of_caption = _rank_top_items(images, captions), _rank_top_items(captions, images)
    metrics = load_judgements().compute_all_metrics(
        dict(zip(data.image_ids, caption_ids[captions_of_image].tolist(), strict=True)),
        dict(zip(data.caption_ids, image_ids[images_of_caption].tolist(), strict=True)),
        target_metrics=["coco_5k_recalls", "cxc_recalls", "eccv_r1", "eccv_map_at_r", "eccv_rprecision"],
        Ks=list(KS),
        verbose=False,
    )
    names = {f"coco_5k_r{k}": f"COCO R@{k}" for k in KS}
    names |= {f"cxc_r{k}": f"CxC R@{k}" for k in KS}
    names |= {"eccv_r1": "ECCV R@1", "eccv_rprecision": "ECCV R-precision", "eccv_map_at_r": "ECCV mAP@R"}
    return {
        f"{direction} {name}": 100 * float(metrics[key][direction.lower()])
        for direction in ("I2T", "T2I")
        for key, name in names.items()
    }


@onednn_matmul()
def _rank_top_items(queries: Tensor, items: Tensor) -> Tensor:
    """Return the indices of the K = `RANKED_ITEMS` best items for each query, best first, int64 of shape (Q, K)."""
    count = min(RANKED_ITEMS, len(items))
    return torch.cat([(chunk @ items.T).topk(count).indices for chunk in queries.split(QUERIES_PER_CHUNK)])


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
