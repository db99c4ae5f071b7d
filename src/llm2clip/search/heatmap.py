"""Heat maps that locate a query in an image, using the cosine similarity between the query and each image cell.

A cell is a patch of a vision transformer, or a position in the last feature map of a convolutional network.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.data.images import make_thumbnail, shrink_image
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import DenseEncoder
from llm2clip.search.query import QueryEncoder

DARKEST = 0.2  # brightness of the least similar cell, as a fraction of its original brightness
MAX_CELLS = 4096  # maximum for calls that set image_size; memory can grow quadratically with the cell count
IMAGE_SIDE = 384  # maximum length of a heat map's longer side, in pixels


def require_dense_encoder(model: DualEncoder) -> DenseEncoder:
    """Return a model's dense encoder. Raise ValueError if the model does not have one."""
    if model.dense is None:
        raise ValueError("heat maps are not available for this model: its image encoder cannot embed image regions")
    return model.dense


def compute_heatmap(dense: DenseEncoder, pixels: Tensor, query: np.ndarray, variant: str | None = None) -> np.ndarray:
    """Return the cosine similarity between a query and each image cell, as a float32 array of shape (h, w).

    Args:
        dense: Dense encoder of the model that embedded the query.
        pixels: Image of shape (3, H, W), uint8, resized by `dense.resize`, usually to `dense.localization_size`.
        query: L2-normalised query vector of shape (D,), float32.
        variant: Variant of the dense features. Default: `dense.localization_variant`.

    Raises:
        ValueError: The model returned NaN or infinity.
    """
    cells = dense.encode(pixels[None], variant or dense.localization_variant)[0]  # (h, w, D)
    heatmap = (cells @ torch.from_numpy(query).to(cells)).cpu().numpy()
    if not np.isfinite(heatmap).all():
        raise ValueError("the model returned NaN or infinity for an image")
    return heatmap


def locate_query(
    encoder: QueryEncoder,
    query: np.ndarray,
    load: Callable[[], Tensor],
    variant: str | None = None,
    image_size: int | None = None,
) -> np.ndarray:
    """Return the cosine similarity between a query and each cell of an image, as a float32 array of shape (h, w).

    Args:
        encoder: Encoder of the query.
        query: L2-normalised query vector of shape (D,), float32.
        load: Function that returns the image as a uint8 tensor of shape (3, H, W).
        variant: Variant of the dense features. Default: `dense.localization_variant`.
        image_size: Length to which the shorter side is resized, in pixels. Default: `dense.localization_size`.

    Raises:
        ValueError: The model cannot embed image regions or does not support the variant, or the image would have more
            than MAX_CELLS cells.
    """
    dense = require_dense_encoder(encoder.model)
    if variant is not None and variant not in dense.variants:
        raise ValueError(f"this model does not support the variant {variant}: use {' or '.join(dense.variants)}")
    with encoder.decoding:
        image = load()
        if image_size is not None:
            rows, columns = dense.compute_grid_shape(image.shape[-2], image.shape[-1], image_size)
            if rows * columns > MAX_CELLS:
                raise ValueError(
                    f"image_size {image_size} results in {rows:,} x {columns:,} cells; the limit is {MAX_CELLS:,} "
                    "cells. Use a smaller image_size"
                )
        pixels = dense.resize(image, image_size or dense.localization_size)
    return compute_heatmap(dense, pixels, query, variant)


def draw_heatmap(image: Tensor, heatmap: np.ndarray) -> bytes:
    """Darken the parts of an image that are least similar to the query. Return a small JPEG.

    Args:
        image: Image of shape (3, H, W), uint8.
        heatmap: Cosine similarity of each cell, of shape (h, w), mapped linearly to a brightness of DARKEST to 1.
    """
    small = shrink_image(image, IMAGE_SIDE)
    cells = torch.from_numpy(heatmap).float()
    spread = cells.max() - cells.min()
    relative = (cells - cells.min()) / spread if spread > 0 else torch.ones_like(cells)
    brightness = DARKEST + (1 - DARKEST) * F.interpolate(relative[None, None], small.shape[-2:], mode="bilinear")[0]
    return make_thumbnail((small * brightness).round().to(torch.uint8), IMAGE_SIDE)
