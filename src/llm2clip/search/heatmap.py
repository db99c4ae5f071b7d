"""Heat maps that locate a query in an image, using the cosine similarity between the query and each image cell.

A cell is a patch of a vision transformer, or a position in the last feature map of a convolutional network.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.data.image_refs import read_image_file
from llm2clip.data.images import ImageError, load_image, make_thumbnail, shrink_image
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import DenseEncoder
from llm2clip.search.backends import Backend, Hit
from llm2clip.search.request_images import NotFound, open_original

DARKEST = 0.2  # brightness of the least similar cell, as a fraction of its original brightness
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
    """
    cells = dense.encode(pixels[None], variant or dense.localization_variant)[0]  # (h, w, D)
    return (cells @ torch.from_numpy(query).to(cells)).cpu().numpy()


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


def draw_heatmaps(model: DualEncoder, query: np.ndarray, hits: Sequence[Hit], backend: Backend) -> dict[str, bytes]:
    """Return a JPEG heat map of each hit, keyed by hit id.

    Hits are skipped if their image files cannot be decoded, or were changed or removed since indexing.

    Args:
        model: Model that embedded the query.
        query: L2-normalised query vector of shape (D,), float32.
        backend: Index that returned the hits.

    Raises:
        ValueError: The model has no dense encoder.
    """
    dense = require_dense_encoder(model)
    heatmaps = {}
    for hit in hits:
        try:
            stream, _ = open_original(backend, hit.id)
            with stream:
                image = load_image(read_image_file(stream))
        except (ImageError, NotFound, OSError):
            continue
        heatmap = compute_heatmap(dense, dense.resize(image, dense.localization_size), query)
        heatmaps[hit.id] = draw_heatmap(image, heatmap)
    return heatmaps
