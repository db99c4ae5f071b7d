"""ECCV Caption and CxC metrics: recall and precision on COCO, based on human judgements of additional matches."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import JudgedRetrieval
from llm2clip.evaluate.benchmarks.eccv_caption import load_judgements
from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.top_k import top_k_neighbors

RANKED_ITEMS = 64  # R-precision and mAP@R need at least 48, because a query has up to 48 correct items


def eccv_metrics(data: JudgedRetrieval, images: Tensor, captions: Tensor) -> dict[str, float]:
    """Return COCO 5k R@k, CxC R@k, and ECCV Caption R@1, R-precision and mAP@R (arXiv 2204.03359), in percent.

    The items are ranked here; the package eccv-caption computes the metrics from the ranked lists.

    Args:
        data: Images and captions with their COCO ids.
        images: Image embeddings, (I, D), L2-normalised, in the order of `data.images`.
        captions: Caption embeddings, (T, D), L2-normalised, in the order of `data.captions`.

    Returns:
        Metrics for both directions, with keys such as "I2T COCO R@1".
    """
    image_ids, caption_ids = torch.tensor(data.image_ids), torch.tensor(data.caption_ids)
    _, captions_of_image = top_k_neighbors(images, captions, RANKED_ITEMS)
    _, images_of_caption = top_k_neighbors(captions, images, RANKED_ITEMS)
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
