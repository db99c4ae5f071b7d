"""Embeddings of image regions (boxes and masks), computed as weighted averages of dense features.

Images are resized without cropping. In an image with H x W pixels and h x w cells, cell (i, j) therefore covers the
rows i * H / h to (i + 1) * H / h and the columns j * W / w to (j + 1) * W / w.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from llm2clip.models.vision.dense import DenseEncoder


def encode_boxes(
    dense: DenseEncoder,
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    variant: str,
    embed_dim: int,
    image_size: int | None = None,
) -> list[Tensor]:
    """Encode the boxes in each image.

    As in CLIPSelf (arXiv 2310.01403), the entire image is encoded, and the cells in a box are averaged with RoIAlign.

    Args:
        dense: Dense encoder.
        images: Images of shape (3, H, W), uint8.
        boxes: For each image, R boxes of shape (R, 4), float32, as (left, top, right, bottom) in pixels.
        variant: Variant of the dense features; see `dense.py`.
        embed_dim: Dimension of the embeddings.
        image_size: Length of the resized image's shorter side in pixels. Default: `dense.localization_size`.

    Returns:
        For each image, L2-normalised embeddings of shape (R, embed_dim), float32, on the CPU.
    """
    resized_by_shape: dict[torch.Size, dict[int, Tensor]] = {}  # images of the same shape are encoded together
    for n, image in enumerate(images):
        if len(boxes[n]):
            resized = dense.resize(image, image_size or dense.localization_size)
            resized_by_shape.setdefault(resized.shape, {})[n] = resized
    results = [torch.empty(0, embed_dim) for _ in images]
    for group in resized_by_shape.values():
        features = dense.encode(torch.stack(list(group.values())), variant)  # (N, h, w, D)
        boxes_in_cells = []
        for n in group:
            height, width = images[n].shape[1:]
            cells_per_pixel = torch.tensor([features.shape[2] / width, features.shape[1] / height] * 2)
            boxes_in_cells.append((boxes[n] * cells_per_pixel).to(features.device))
        pooled = pool_boxes(features, boxes_in_cells).cpu()
        for n, part in zip(group, pooled.split([len(boxes[n]) for n in group]), strict=True):
            results[n] = part
    return results


def encode_masks(
    dense: DenseEncoder, image: Tensor, masks: Tensor, variant: str, image_size: int | None = None
) -> Tensor:
    """Encode masks in an image as L2-normalised float32 embeddings of shape (N, D), on the CPU.

    Args:
        dense: Dense encoder.
        image: Image of shape (3, H, W), uint8.
        masks: Masks of shape (N, H, W), bool.
        variant: Variant of the dense features; see `dense.py`.
        image_size: Length of the resized image's shorter side in pixels. Default: `dense.localization_size`.
    """
    resized = dense.resize(image, image_size or dense.localization_size)
    return pool_masks(dense.encode(resized[None], variant)[0], masks).cpu()


def pool_boxes(features: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Average the cell embeddings within each box with RoIAlign (arXiv 1703.06870).

    Args:
        features: Cell embeddings of shape (N, h, w, D).
        boxes: For each image, R boxes of shape (R, 4), as (left, top, right, bottom) in units of cells.

    Returns:
        L2-normalised embeddings of all boxes, of shape (total number of boxes, D), in the order of the images.
    """
    pooled = roi_align(features.permute(0, 3, 1, 2).contiguous(), list(boxes), output_size=1, aligned=True)
    return F.normalize(pooled[:, :, 0, 0], dim=-1)


def pool_masks(features: Tensor, masks: Tensor) -> Tensor:
    """Average the cell embeddings, weighted by the area of the mask in each cell.

    Args:
        features: Cell embeddings of shape (h, w, D), float32.
        masks: Non-empty masks of shape (N, H, W), bool. They can have any resolution.

    Returns:
        L2-normalised embeddings of shape (N, D), float32.
    """
    h, w, dim = features.shape
    rows, columns = (
        _compute_overlaps(cells, pixels).to(features) for cells, pixels in zip((h, w), masks.shape[1:], strict=True)
    )
    pooled = [features.new_empty(0, dim)]
    for mask in masks:  # one at a time, because a float mask takes four times the memory of a boolean mask
        areas = rows @ mask.to(features) @ columns.T  # (h, w), in pixels
        pooled.append((areas / areas.sum()).flatten()[None] @ features.flatten(0, 1))
    return F.normalize(torch.cat(pooled), dim=-1)


def _compute_overlaps(cells: int, pixels: int) -> Tensor:
    """Compute the overlap of each cell with each pixel along an axis, in pixels, of shape (cells, pixels), float64."""
    cell_edges = torch.arange(cells + 1, dtype=torch.float64) * pixels / cells
    pixel_edges = torch.arange(pixels + 1, dtype=torch.float64)
    ends = torch.minimum(cell_edges[1:, None], pixel_edges[1:])
    starts = torch.maximum(cell_edges[:-1, None], pixel_edges[:-1])
    return (ends - starts).clamp(min=0)


def check_boxes(boxes: Any, height: int, width: int) -> Tensor:
    """Check boxes and convert them to a tensor of shape (N, 4), float32, on the CPU.

    Args:
        boxes: Array-like of N boxes, as (left, top, right, bottom) in pixels.
        height, width: Size of the image in pixels.

    Raises:
        ValueError: The shape is wrong, or a box contains NaN or infinity, is empty, or is not inside the image.
    """
    tensor = torch.as_tensor(boxes, dtype=torch.float32).cpu()
    if tensor.numel() == 0:
        return tensor.new_empty(0, 4)
    if tensor.ndim != 2 or tensor.shape[1] != 4:
        raise ValueError(f"boxes must have the shape (N, 4), as (x0, y0, x1, y1) (got {tuple(tensor.shape)})")
    for n, (x0, y0, x1, y1) in enumerate(tensor.tolist()):
        if not tensor[n].isfinite().all():
            problem = "contains NaN or infinity"
        elif x1 <= x0 or y1 <= y0:
            problem = "is empty: x1 must be greater than x0, and y1 greater than y0"
        elif min(x0, y0) < 0 or x1 > width or y1 > height:
            problem = f"is not inside the image of {width} x {height} pixels: clip the boxes to the image"
        else:
            continue
        raise ValueError(f"box {n}, {(x0, y0, x1, y1)}, {problem}")
    return tensor


def check_masks(masks: Any, height: int, width: int) -> Tensor:
    """Check masks and convert them to a tensor of shape (N, H, W), bool, on the CPU.

    Args:
        masks: Array-like of N boolean masks.
        height, width: Size of the image in pixels.

    Raises:
        ValueError: The masks are not boolean or do not have the size of the image, or a mask is empty.
    """
    tensor = torch.as_tensor(masks).cpu()
    if tensor.ndim != 3 or tensor.shape[1:] != (height, width):
        raise ValueError(
            f"masks must have the shape (N, {height}, {width}), which is the size of the image (got "
            f"{tuple(tensor.shape)})"
        )
    if tensor.dtype != torch.bool:
        raise ValueError(f"masks must be boolean (got {tensor.dtype})")
    empty = (~tensor.flatten(1).any(1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask {empty[0]} is empty: it contains no pixel")
    return tensor
