"""Contrastive losses on L2-normalised vectors. Logits are float32 whatever the precision of training."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from llm2clip.processes import joined


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
    if gather and joined():
        all_image, all_text = _gathered(image), _gathered(text)
        first = dist.get_rank() * len(image)
        if ids is not None:
            all_ids = _gathered_ids(ids)
    target = torch.arange(first, first + len(image), device=image.device)
    with torch.autocast(image.device.type, enabled=False):
        same = ids[:, None] == all_ids[None, :] if ids is not None and all_ids is not None else None
        to_text = _find(image, all_text, scale, target, same)
        return (to_text + _find(text, all_image, scale, target, same)) / 2


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


def pair_loss(
    first: Tensor,
    second: Tensor,
    scale: float,
    ids: Tensor,
    negatives: Tensor | None = None,
    symmetric: bool = True,
    gather: bool = True,
) -> Tensor:
    """InfoNCE over pairs of texts: each first text finds its second among all second texts and all known negatives.

    No text counts against itself: a candidate with the text of the query or of its answer is left out. Distributed as
    `info_nce`.

    Args:
        first, second: (N, D) of this process, L2-normalised; row i of both is a pair.
        scale: factor on the cosines, 1 / temperature.
        ids: (2 N + M,) int64 naming the texts of `first`, `second` and `negatives`.
        negatives: (M, D) known wrong answers, of any of the queries; M may differ among processes.
        symmetric: each second text must find its first, too; the negatives have no part in that.
        gather: take the candidates of all processes, which then must all call this.

    Returns:
        float32 scalar: mean over this process's pairs, and over both directions if symmetric.
    """
    n = len(first)
    if negatives is None:
        negatives = first[:0]
    firsts, seconds, wrong = (x.float() for x in (first, second, negatives))
    first_ids, second_ids, wrong_ids = ids[:n], ids[n : 2 * n], ids[2 * n :]
    own = (firsts, seconds, first_ids, second_ids)
    at = 0
    if gather and joined():
        at = dist.get_rank() * n
        firsts, seconds = (_gathered(x) for x in (firsts, seconds))
        first_ids, second_ids = (_gathered_ids(x) for x in (first_ids, second_ids))
        wrong, wrong_ids = _gathered_ragged(wrong, wrong_ids)
    target = torch.arange(at, at + n, device=first.device)

    def direction(queries: Tensor, asked: Tensor, answers: Tensor, items: Tensor, items_ids: Tensor) -> Tensor:
        same = (items_ids[None, :] == asked[:, None]) | (items_ids[None, :] == answers[:, None])
        return _find(queries, items, scale, target, same)

    with torch.autocast(first.device.type, enabled=False):
        candidates, candidate_ids = torch.cat([seconds, wrong]), torch.cat([second_ids, wrong_ids])
        loss = direction(own[0], own[2], own[3], candidates, candidate_ids)
        if symmetric:
            loss = (loss + direction(own[1], own[3], own[2], firsts, first_ids)) / 2
    return loss


def _find(queries: Tensor, items: Tensor, scale: Tensor | float, target: Tensor, same: Tensor | None) -> Tensor:
    """Cross-entropy of each query's item, `target`, among all but those that are the `same`: (queries, items) bool."""
    logits = scale * queries @ items.T
    if same is not None:
        logits = logits.masked_fill(same.scatter(1, target[:, None], False), -torch.inf)
    return F.cross_entropy(logits, target)


def _gathered(x: Tensor) -> Tensor:
    """The rows of all processes, with gradients."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def _gathered_ids(ids: Tensor) -> Tensor:
    parts = [torch.empty_like(ids) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, ids.contiguous())
    return torch.cat(parts)


def _gathered_ragged(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """As above, of a number of rows that differs among processes: filled up for the way, and cut again."""
    counts = _gathered_ids(torch.tensor([len(x)], device=x.device))
    most = int(counts.max())
    if not most:
        return x, ids
    filled = _gathered(torch.cat([x, x.new_zeros(most - len(x), x.shape[1])]))
    filled_ids = _gathered_ids(torch.cat([ids, ids.new_zeros(most - len(ids))]))
    kept = (torch.arange(most, device=x.device)[None, :] < counts[:, None]).flatten()
    return filled[kept], filled_ids[kept]
