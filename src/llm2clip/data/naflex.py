"""Images as sequences of patches, for SigLIP 2 NaFlex towers, which keep the aspect ratio of each image.

As in transformers' `Siglip2ImageProcessor`, an image is resized so that it has as many patches as possible, up to a
maximum number. The patches are then packed into a uint8 tensor whose shape is the same for all images, so that images
with different aspect ratios can be stacked and sent to the device like the inputs of other towers:

rows 0 to P - 1    the pixels of one patch per row; the patches are in row-major order, followed by empty patches
row P              the number of patch rows and the number of patch columns, two bytes each, followed by zeros
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F


def pack_patches(image: Tensor, patch_size: int, max_num_patches: int, interpolation: str) -> Tensor:
    """Resize an image, uint8 (3, H, W); return packed patches, uint8 (max_num_patches + 1, 3 * patch_size ** 2)."""
    height, width = _resized_size(image.shape[-2], image.shape[-1], patch_size, max_num_patches)
    image = F.resize(image, [height, width], interpolation=InterpolationMode(interpolation), antialias=True)
    patches = split_into_patches(image[None], patch_size)[0]
    packed = torch.zeros(max_num_patches + 1, patches.shape[1], dtype=torch.uint8)
    packed[: len(patches)] = patches
    rows, columns = height // patch_size, width // patch_size
    packed[-1, :4] = torch.tensor([rows // 256, rows % 256, columns // 256, columns % 256], dtype=torch.uint8)
    return packed


def unpack_patches(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Split N packed images, uint8 (N, P + 1, D), into patches (N, P, D) and grid shapes, int64 (N, 2).

    A grid shape consists of the number of patch rows and the number of patch columns.
    """
    digits = packed[:, -1, :4].long().view(-1, 2, 2)
    return packed[:, :-1], digits[:, :, 0] * 256 + digits[:, :, 1]


def split_into_patches(images: Tensor, patch_size: int) -> Tensor:
    """Split images (N, 3, H, W) into patches (N, P, patch_size ** 2 * 3), in row-major order.

    Each patch contains its pixels in row-major order, and the three channels of a pixel are adjacent. H and W must be
    multiples of the patch size.
    """
    count, channels, height, width = images.shape
    grid = images.reshape(count, channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(count, -1, patch_size * patch_size * channels)


@lru_cache(maxsize=4096)
def _resized_size(height: int, width: int, patch_size: int, max_num_patches: int) -> tuple[int, int]:
    # Use transformers' function, so that the size is the same. It is imported here because importing transformers takes
    # seconds.
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    return get_image_size_for_max_num_patches(height, width, patch_size, max_num_patches)
