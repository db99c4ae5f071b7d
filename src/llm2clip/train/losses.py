"""Contrastive losses on L2-normalised vectors. Logits are float32 whatever the precision of training."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    image: Tensor, text: Tensor, scale: Tensor | float, ids: Tensor | None = None, gather: bool = True
) -> Tensor:
    """Symmetric InfoNCE (CLIP, arXiv 2103.00020): each image finds its text and each text its image.

    In a distributed run the negatives of all processes are gathered with gradients; averaged over processes, as DDP
    does, the gradients are those of one process with the whole batch.

    Args:
        image: (N, D) of this process.
        text: (N, D), row i belongs to image i.
        scale: factor on the cosines, 1 / temperature.
        ids: (N,) integers naming the texts; equal texts are never each other's negatives.
        gather: take the negatives of all processes, which then must all call this.

    Returns:
        float32 scalar: mean over this process's rows and both directions.
    """
    image, text = image.float(), text.float()
    all_image, all_text, all_ids = image, text, ids
    first = 0
    if gather and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        from torch.distributed.nn.functional import all_gather

        all_image, all_text = torch.cat(all_gather(image)), torch.cat(all_gather(text))
        first = dist.get_rank() * len(image)
        if ids is not None:
            parts = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, ids)
            all_ids = torch.cat(parts)
    target = torch.arange(first, first + len(image), device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        to_text = scale * image @ all_text.T
        to_image = scale * text @ all_image.T
        if ids is not None and all_ids is not None:
            same = ids[:, None] == all_ids[None, :]
            same[torch.arange(len(image), device=image.device), target] = False
            to_text, to_image = to_text.masked_fill(same, -torch.inf), to_image.masked_fill(same, -torch.inf)
        return (F.cross_entropy(to_text, target) + F.cross_entropy(to_image, target)) / 2


def info_nce_over_captions(
    image: Tensor, text: Tensor, scale: Tensor | float, ids: Tensor, gather: bool = True
) -> Tensor:
    """The mean of `info_nce` over several captions of each image, each against the same image vectors.

    Args:
        image: (N, D).
        text: (K * N, D), the K-th captions of all images together.
        scale, gather: as in `info_nce`.
        ids: (K, N) integers naming the texts.
    """
    parts = zip(text.split(len(image)), ids, strict=True)
    return torch.stack([info_nce(image, part, scale, names, gather) for part, names in parts]).mean()
