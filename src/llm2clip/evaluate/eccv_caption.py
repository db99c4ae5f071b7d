"""Metrics of ECCV Caption and CxC: recall and precision with people's judgements of what else is correct in COCO."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import JudgedRetrieval
from llm2clip.evaluate.benchmarks.eccv_caption import load_judgements
from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.top_k import top_k_neighbors

RANKED_ITEMS = 64  # R-precision and mAP@R need as many items as the most that are correct for one query, which is 48


def eccv_metrics(data: JudgedRetrieval, images: Tensor, captions: Tensor) -> dict[str, float]:
    """Return COCO 5k R@k, CxC R@k, and ECCV Caption R@1, R-precision and mAP@R (arXiv 2204.03359), in percent.

    The metrics are computed by the eccv-caption package, from our top-k lists.

    Args:
        data: The images and captions that are compared.
        images: (I, D), L2-normalised, in the order of `data`.
        captions: (T, D), L2-normalised, in the order of `data`.

    Returns:
        Metrics in both directions, e.g. "I2T COCO R@1".
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
