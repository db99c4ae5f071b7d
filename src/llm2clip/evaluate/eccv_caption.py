"""Recall and precision by what people have judged: COCO's captions, CxC's and ECCV Caption's."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.evaluate.benchmarks.base import JudgedRetrieval
from llm2clip.evaluate.benchmarks.eccv_caption import read_judgements
from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.top_k import top_k_neighbors

LONGEST = 64  # a list holds as many as the most that are right for one query, 48


def eccv_metrics(data: JudgedRetrieval, images: Tensor, captions: Tensor) -> dict[str, float]:
    """COCO 5k R@k, CxC R@k, and of ECCV Caption R@1, R-precision and mAP@R (arXiv 2204.03359), both ways, in percent.

    The lists are ours, the figures the package's own.

    Args:
        data: what is compared.
        images: (I, D), L2-normalised, in its order.
        captions: (T, D), the same.
    """
    metrics = read_judgements()
    image_ids, caption_ids = torch.tensor(data.image_ids), torch.tensor(data.caption_ids)
    _, to_captions = top_k_neighbors(images, captions, LONGEST)
    _, to_images = top_k_neighbors(captions, images, LONGEST)
    found = metrics.compute_all_metrics(
        dict(zip(data.image_ids, caption_ids[to_captions].tolist(), strict=True)),
        dict(zip(data.caption_ids, image_ids[to_images].tolist(), strict=True)),
        target_metrics=["coco_5k_recalls", "cxc_recalls", "eccv_r1", "eccv_map_at_r", "eccv_rprecision"],
        Ks=list(KS),
        verbose=False,
    )
    names = {f"{part}_r{k}": f"{name} R@{k}" for part, name in (("coco_5k", "COCO"), ("cxc", "CxC")) for k in KS}
    names |= {
        "eccv_r1": "ECCV R@1",
        "eccv_rprecision": "ECCV R-precision",
        "eccv_map_at_r": "ECCV mAP@R",
    }
    return {
        f"{way} {shown}": 100 * float(found[name][way.lower()])
        for way in ("I2T", "T2I")
        for name, shown in names.items()
    }
