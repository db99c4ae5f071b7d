"""CRA, caption retrieval accuracy: does the caption encoder tell captions apart? (arXiv 2411.04997, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from llm2clip.data.captions import unique
from llm2clip.evaluate.retrieval import positive_ranks, recall
from llm2clip.models.text import CaptionEncoder


def caption_accuracy(
    images: Sequence[Sequence[str]], encoder: CaptionEncoder, batch_tokens: int | None = None, progress: bool = True
) -> dict[str, float]:
    """CRA in percent: the first two captions of each image retrieve each other among those of all images.

    Args:
        images: the captions of each image, in order; those with fewer than two different ones are left out, counted.
        encoder: any caption encoder.
        batch_tokens, progress: as in `CaptionEncoder.encode`.

    Returns:
        top-1 both ways and their mean ("CRA"), the number of images, and how many were left out.

    Raises:
        ValueError: no image has two captions.
    """
    different = [unique(c)[:2] for c in images]
    pairs = [c for c in different if len(c) > 1]
    if not pairs:
        raise ValueError("caption retrieval needs images with two captions; there is none")
    vectors = encoder.encode(
        [p[0] for p in pairs] + [p[1] for p in pairs], batch_tokens=batch_tokens, progress=progress
    )
    first, second = F.normalize(vectors, dim=-1).split(len(pairs))
    own = torch.arange(len(pairs))[:, None].tolist()
    forth = recall(positive_ranks(first, second, own), ks=(1,))["R@1"]
    back = recall(positive_ranks(second, first, own), ks=(1,))["R@1"]
    return {
        "CRA": (forth + back) / 2,
        "first to second": forth,
        "second to first": back,
        "images": len(pairs),
        "left out": len(images) - len(pairs),
        "chance": 100.0 / len(pairs),
    }
