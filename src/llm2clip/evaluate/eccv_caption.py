"""Recall and precision by what people have judged: COCO's captions, CxC's and ECCV Caption's."""

from __future__ import annotations

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.evaluate.benchmarks.base import JudgedRetrieval
from llm2clip.evaluate.benchmarks.eccv_caption import read_judgements
from llm2clip.evaluate.recall import KS

LONGEST = 64  # a list holds as many as the most that are right for one query, 48


def judged_metrics(data: JudgedRetrieval, images: Tensor, captions: Tensor) -> dict[str, float]:
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


@onednn_matmul()
def top_k_neighbors(queries: Tensor, items: Tensor, k: int, tile: int = 2048) -> tuple[Tensor, Tensor]:
    """The `k` items that score highest for each query, best first; equal ones in any order.

    Args:
        queries: (Q, D), L2-normalised.
        items: (N, D), L2-normalised.
        k: how many, at most N.
        tile: queries and items at a time; no more scores than tile * (tile + k) are kept.

    Returns:
        Their scores, float32 (Q, k), and which they are, int64 (Q, k).
    """
    k = min(k, len(items))
    scores, which = torch.empty(len(queries), k), torch.empty(len(queries), k, dtype=torch.int64)
    for start in range(0, len(queries), tile):
        q = queries[start : start + tile].float()
        best, at = torch.empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64)
        for lo in range(0, len(items), tile):
            some = q @ items[lo : lo + tile].float().T
            here, there = some.topk(min(k, some.shape[1]))
            best, order = torch.cat([best, here], 1).topk(min(k, best.shape[1] + here.shape[1]))
            at = torch.cat([at, there + lo], 1).gather(1, order)
        scores[start : start + tile], which[start : start + tile] = best, at
    return scores, which
