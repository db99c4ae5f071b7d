"""Ranks of right answers, the one thing that recall is made of.

No matrix of scores is kept and nothing is sorted: tile by tile, the answers that score above the best right one are
counted, both ways from the same products. A wrong answer that ties with it counts as above, so that a model which gives
every pair the same score is at the bottom and not at the top.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.cpu_tuning import onednn_matmul

TILE = 512  # images in a tile, with four times as many texts: 4 MB of float32 scores, which a CPU's cache holds


@onednn_matmul()
def positive_ranks(
    queries: Tensor,
    items: Tensor,
    positives: Sequence[Sequence[int]],
    tile: int = 2 * TILE,
    itself: Sequence[int] | None = None,
) -> Tensor:
    """Rank of each query's best-placed positive among all items: int64 (Q,), 0 is the top.

    For one direction and for any relation; `two_way_ranks` does both of an image's own captions at once.

    Args:
        queries: (Q, D), L2-normalised.
        items: (N, D), L2-normalised.
        positives: the items that are right for each query, at least one. For 3 images with 2, 1 and 2 captions,
            image-to-text is [[0, 1], [2], [3, 4]] and text-to-image is [[0], [0], [1], [2], [2]].
        tile: queries and items in a tile.
        itself: for each query an item that is no answer, right or wrong: the query where queries are items too.

    Raises:
        ValueError: a query has no positive, or a vector is not finite.
    """
    if any(len(p) == 0 for p in positives):
        raise ValueError(f"query {next(i for i, p in enumerate(positives) if len(p) == 0)} has no right answer")
    check_finite(queries, items)
    wide = min(tile, len(items))

    def against(q: Tensor, lo: int) -> Tensor:
        return (q @ _tile(items[lo : lo + wide].float(), wide).T)[:, : len(items) - lo]

    ranks = torch.zeros(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), tile):
        block = positives[start : start + tile]
        q = queries[start : start + tile].float()
        row = torch.tensor([r for r, p in enumerate(block) for _ in p])
        col = torch.tensor([c for p in block for c in p])
        # The best positive's score is from the same products as those it is compared with, so that ties are exact.
        best = torch.full((len(q),), -torch.inf)
        for lo in (col // wide).unique().mul(wide).tolist():
            scores = against(q, lo)
            here = (col >= lo) & (col < lo + wide)
            best.scatter_reduce_(0, row[here], scores[row[here], col[here] - lo], "amax")
        for lo in range(0, len(items), wide):
            scores = against(q, lo)
            here = (col >= lo) & (col < lo + wide)
            scores[row[here], col[here] - lo] = -torch.inf
            if itself is not None:
                own = torch.tensor(itself[start : start + tile]) - lo
                here = (own >= 0) & (own < scores.shape[1])
                scores[here.nonzero()[:, 0], own[here]] = -torch.inf
            ranks[start : start + tile] += _reach(scores, best[:, None]).sum(1).long()
    return ranks


@onednn_matmul()
def two_way_ranks(
    images: Tensor,
    texts: Tensor,
    image_of_text: Sequence[int] | Tensor,
    tile: int = TILE,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Ranks of the best-placed caption for each image and of the image for each caption, from 0, the top.

    Args:
        images: (I, D), L2-normalised; float32, or float16 to save memory: products are float32.
        texts: (T, D), the same; in the order of their images they need not be copied.
        image_of_text: for each text the index of its image; every image has at least one.
        tile: images in a tile; a multiple of 16, lest equal vectors round differently.
        device: where the products are made; None is where the vectors are.
        progress: show a bar.

    Returns:
        int64 (I,) and (T,).

    Raises:
        ValueError: an image has no text, or a vector is not finite.
    """
    owner = torch.as_tensor(image_of_text)
    counts = torch.bincount(owner, minlength=len(images))
    if len(counts) > len(images) or not counts.all():
        raise ValueError(f"{len(images)} images: each needs a text, and each text one of them")
    check_finite(images, texts)
    device = torch.device(device or images.device)
    order = None if (owner[1:] >= owner[:-1]).all() else owner.argsort(stable=True)
    owner = (owner if order is None else owner[order]).to(device)

    def image_tile(i: int) -> Tensor:
        return _tile(images[i * tile : (i + 1) * tile].to(device, torch.float32), tile)

    def text_tile(j: int) -> Tensor:
        part = slice(j * wide, (j + 1) * wide)
        return _tile((texts[part] if order is None else texts[order[part]]).to(device, torch.float32), wide)

    def own(i: int, j: int) -> tuple[Tensor, Tensor]:
        """Where a tile has right answers."""
        rows = owner[j * wide : (j + 1) * wide] - i * tile
        columns = ((rows >= 0) & (rows < tile)).nonzero()[:, 0]
        return rows[columns], columns

    wide = 4 * tile
    tall, long = -(-len(images) // tile), -(-len(owner) // wide)
    best_image = torch.full((tall * tile,), torch.inf, device=device)  # of what fills the last tile: out of reach
    best_text = torch.full((long * wide,), torch.inf, device=device)
    best_image[: len(images)] = -torch.inf
    for j in range(long):  # the right answers, from the very products that hold the wrong ones
        some, first, last = text_tile(j), int(owner[j * wide]), int(owner[min((j + 1) * wide, len(owner)) - 1])
        for i in range(first // tile, last // tile + 1):
            rows, columns = own(i, j)
            right = (image_tile(i) @ some.T)[rows, columns]
            best_text[columns + j * wide] = right
            best_image.scatter_reduce_(0, rows + i * tile, right, "amax")
    of_image, of_text = torch.zeros_like(best_image), torch.zeros_like(best_text)
    with tqdm(total=tall * long, desc="ranks", unit="tile", disable=not progress) as bar:
        for j in range(long):
            some, here = text_tile(j), slice(j * wide, (j + 1) * wide)
            for i in range(tall):
                scores, there = image_tile(i) @ some.T, slice(i * tile, (i + 1) * tile)
                scores[own(i, j)] = -torch.inf
                scores[len(images) - i * tile :] = -torch.inf
                scores[:, len(owner) - j * wide :] = -torch.inf
                of_image[there] += _reach(scores, best_image[there, None]).sum(1)
                of_text[here] += _reach(scores, best_text[here]).sum(0)
                bar.update()
    image_ranks, text_ranks = of_image[: len(images)].long().cpu(), of_text[: len(owner)].long().cpu()
    if order is not None:
        text_ranks = torch.empty_like(text_ranks).index_copy_(0, order, text_ranks)
    return image_ranks, text_ranks


def _tile(vectors: Tensor, size: int) -> Tensor:
    """Filled up with zeros: products of one shape round alike, so that equal vectors have equal scores anywhere."""
    return vectors if len(vectors) == size else F.pad(vectors, (0, 0, 0, size - len(vectors)))


def _reach(scores: Tensor, best: Tensor) -> Tensor:
    """1.0 where a score reaches the best: floats, whose sums are ten times as fast as those of truth values."""
    return torch.ge(scores, best, out=torch.empty_like(scores))


def check_finite(*vectors: Tensor) -> None:
    """Raises ValueError if a number is not finite: nothing is above NaN, and so a broken model would be the best."""
    for some in vectors:
        if not all(torch.isfinite(part).all() for part in some.split(8192)):
            raise ValueError("a vector is not finite: the model is broken, and its recall would mean nothing")
