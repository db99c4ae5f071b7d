"""Zero-shot segmentation with a sliding window, and the `LLM2CLIP` methods for regions and patches.

SCLIP (arXiv 2312.01597) upsamples each window's cell scores to the window's size, averages overlapping windows, and
resizes the result to the size of the labels. All three steps are linear and separable into rows and columns. Therefore,
the pixel scores of a class are `R @ S @ C.T`, where S contains the cell scores of all windows, arranged in a grid. The
matrices R (for rows) and C (for columns) combine the interpolation and averaging steps.

Pixel scores are computed for a tile of a few image rows at a time, so memory does not grow with the image size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.data.images import load_image, to_image_list
from llm2clip.models.vision.dense import (
    DenseEncoder,
    build_dense_encoder,
    encode_boxes,
    pool_features_by_mask,
    validate_boxes,
    validate_masks,
)

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP

# Maximum ratio of the resized image's longer side to the window's side.
# For 224-pixel windows, SCLIP limits the longer side to 2,048 pixels.
MAX_SCALE = 2048 / 224
TILE_ELEMENTS = 1 << 24  # maximum number of scores in a tile (64 MB)
WINDOWS_PER_BATCH = 32
IMAGE_SCALE = 1.5  # default ratio of the resized image's shorter side to the window's side


@dataclass(frozen=True)
class WindowAxis:
    """Positions of the sliding windows along one axis of the resized image, in pixels."""

    length: int  # length of the image along this axis
    window: int  # window length
    starts: tuple[int, ...]  # first pixel of each window

    @classmethod
    def from_length(cls, length: int, window: int, cell_size: int) -> WindowAxis:
        """Place windows with a stride of half a window. The last window ends at the edge of the image.

        An image shorter than a window gets one window of the image's length, rounded to a multiple of `cell_size`.
        """
        if length < window:
            length = window = max(1, round(length / cell_size)) * cell_size
        stride = window // 2
        count = -(-(length - window) // stride) + 1
        return cls(length, window, tuple(min(n * stride, length - window) for n in range(count)))

    def build_pixel_matrix(self, cells: int, size: int) -> Tensor:
        """Return a matrix that interpolates the cells of each window to pixels, and averages overlapping windows.

        Args:
            cells: Number of cells per window.
            size: Length of the output along this axis, in pixels.

        Returns:
            A float32 matrix of shape (size, windows * cells).
        """
        upsample = _build_interpolation_matrix(cells, self.window)
        average = torch.zeros(self.length, len(self.starts) * cells, dtype=torch.float64)
        count = torch.zeros(self.length, 1, dtype=torch.float64)
        for n, start in enumerate(self.starts):
            average[start : start + self.window, n * cells : (n + 1) * cells] = upsample
            count[start : start + self.window] += 1
        return (_build_interpolation_matrix(self.length, size) @ (average / count)).float()


@dataclass(frozen=True)
class WindowResizer:
    """Transform that resizes an image of shape (3, H, W), uint8, before the image is split into windows.

    The aspect ratio is kept. `scale` is the ratio of the resized image's shorter side to the window's side, and is
    reduced if the longer side would exceed `MAX_SCALE` times the window's side.
    """

    window: int  # side length in pixels, a multiple of `cell_size`
    cell_size: int
    scale: float

    @classmethod
    def from_dense_encoder(cls, dense: DenseEncoder, scale: float = IMAGE_SCALE) -> WindowResizer:
        """Create a transform for windows with the training resolution, rounded to a multiple of the cell size."""
        window = max(1, round(dense.image_size / dense.cell_size)) * dense.cell_size
        return cls(window, dense.cell_size, scale)

    def place_windows(self, height: int, width: int) -> tuple[WindowAxis, WindowAxis]:
        scale = self.window * min(self.scale / min(height, width), MAX_SCALE / max(height, width))
        rows, columns = (
            WindowAxis.from_length(max(1, int(side * scale + 0.5)), self.window, self.cell_size)
            for side in (height, width)
        )
        return rows, columns

    def __call__(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return (resized image, (original height, original width))."""
        height, width = image.shape[1:]
        rows, columns = self.place_windows(height, width)
        size = [rows.length, columns.length]
        resized = transforms.resize(image, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
        return resized, (height, width)


def extract_windows(image: Tensor, rows: WindowAxis, columns: WindowAxis) -> Tensor:
    """Return all windows of a resized image in row-major order, as a uint8 tensor of shape (windows, 3, H, W)."""
    windows = []
    for top in rows.starts:
        for left in columns.starts:
            windows.append(image[:, top : top + rows.window, left : left + columns.window])
    return torch.stack(windows)


def arrange_window_scores(scores: Tensor, rows: WindowAxis, columns: WindowAxis) -> Tensor:
    """Arrange cell scores of shape (windows, h, w, K) in a grid of shape (K, window rows * h, window columns * w)."""
    _, h, w, num_scores = scores.shape
    grid = scores.reshape(len(rows.starts), len(columns.starts), h, w, num_scores)
    grid = grid.permute(4, 0, 2, 1, 3)  # (K, window rows, h, window columns, w)
    return grid.reshape(num_scores, len(rows.starts) * h, len(columns.starts) * w)


@dataclass(frozen=True)
class PixelScores:
    """Pixel scores of an image, which are computed tile by tile."""

    grid: Tensor  # cell scores of all windows, of shape (K, A, B); see `arrange_window_scores`
    rows: Tensor  # matrix of shape (H, A) that maps window cells to pixel rows; see `WindowAxis.build_pixel_matrix`
    columns: Tensor  # matrix of shape (W, B) that maps window cells to pixel columns

    def iterate_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice of pixel rows, pixel scores of shape (K, rows, W)) for each tile."""
        num_scores, width = len(self.grid), len(self.columns)
        step = max(1, TILE_ELEMENTS // (num_scores * width))
        for start in range(0, len(self.rows), step):
            rows = slice(start, min(start + step, len(self.rows)))
            tile = (self.rows[rows] @ self.grid) @ self.columns.T  # (K, rows, B) @ (B, W)
            yield rows, tile

    def compute_class_scores(self, names_per_class: Sequence[int]) -> Tensor:
        """Return class scores of shape (classes, H, W). The score of a class is the maximum score of its names."""
        return torch.cat([_compute_max_over_class_names(tile, names_per_class) for _, tile in self.iterate_tiles()], 1)


def encode_windows(
    images: dict[int, tuple[Tensor, tuple[int, int]]],
    dense: DenseEncoder,
    variant: str,
    queries: Tensor,
    transform: WindowResizer,
) -> dict[int, PixelScores]:
    """Encode the windows of all images in batches. Return each image's pixel scores at its original size.

    The values of `images` are outputs of `transform`. `queries` are the embeddings of all class names, of shape (K, D).
    """
    axes = {index: transform.place_windows(*size) for index, (_, size) in images.items()}
    indices_by_window: dict[tuple[int, int], list[int]] = {}  # windows of the same size are encoded together
    for index, (rows, columns) in axes.items():
        indices_by_window.setdefault((rows.window, columns.window), []).append(index)
    results = {}
    for indices in indices_by_window.values():
        windows = [extract_windows(images[i][0], *axes[i]) for i in indices]
        batches = torch.cat(windows).split(WINDOWS_PER_BATCH)
        with use_onednn_matmul():
            scores = torch.cat([dense.encode(batch, variant) @ queries.T for batch in batches])  # (windows, h, w, K)
        for i, part in zip(indices, scores.split([len(group) for group in windows]), strict=True):
            rows, columns = axes[i]
            height, width = images[i][1]
            results[i] = PixelScores(
                grid=arrange_window_scores(part, rows, columns),
                rows=rows.build_pixel_matrix(part.shape[1], height).to(part.device),
                columns=columns.build_pixel_matrix(part.shape[2], width).to(part.device),
            )
    return results


def segment(
    scores: PixelScores,
    names_per_class: Sequence[int],
    logit_scale: float,
    min_probability: float = 0.0,
    min_area: float = 0.0,
) -> Iterator[tuple[slice, Tensor]]:
    """Assign each pixel to the class with the highest score, as in SCLIP.

    Args:
        names_per_class: Number of names for each class. The names of a class are adjacent in `scores`. The score of a
            class is the highest score among its names.
        logit_scale: Factor applied to the scores before the softmax over all names.
        min_probability: If the highest probability of a pixel is less than `min_probability`, assign the pixel to class
            0 (background).
        min_area: Fraction of the foreground, from 0 to 1, that a class must exceed to be predicted.

    Yields:
        (slice of pixel rows, int64 class indices of shape (rows, W)) for each tile.
    """
    is_allowed = torch.ones(len(names_per_class), dtype=torch.bool, device=scores.grid.device)
    if min_area > 0:
        areas = torch.zeros(len(names_per_class), dtype=torch.int64, device=scores.grid.device)
        for _, tile in scores.iterate_tiles():
            labels = _compute_max_over_class_names(tile, names_per_class).argmax(0)
            areas += labels.flatten().bincount(minlength=len(names_per_class))
        is_allowed[1:] = areas[1:] > min_area * areas[1:].sum()
    for rows, tile in scores.iterate_tiles():
        class_scores = _compute_max_over_class_names(tile, names_per_class)
        if min_area > 0:
            class_scores = class_scores.masked_fill(~is_allowed[:, None, None], float("-inf"))
        best, labels = class_scores.max(0)
        if min_probability > 0:
            probability = (logit_scale * best - (logit_scale * tile).logsumexp(0)).exp()
            labels[probability < min_probability] = 0
        yield rows, labels


def _compute_max_over_class_names(tile: Tensor, names_per_class: Sequence[int]) -> Tensor:
    if len(names_per_class) == len(tile):
        return tile
    return torch.stack([scores.amax(0) for scores in tile.split(list(names_per_class))])


def _build_interpolation_matrix(size_in: int, size_out: int) -> Tensor:
    """Return the matrix for linear interpolation along an axis, of shape (size_out, size_in), float64."""
    identity = torch.eye(size_in, dtype=torch.float64)[None]  # (1, channels, positions)
    return F.interpolate(identity, size=size_out, mode="linear", align_corners=False)[0].T


class DenseFeaturesMixin:
    """Mixin that adds methods for dense features, region embeddings and segmentation to `LLM2CLIP`."""

    def _get_model_and_dense_encoder(self) -> tuple[LLM2CLIP, DenseEncoder]:
        model = cast("LLM2CLIP", self).eval()
        return model, build_dense_encoder(model.tower, model.projection)

    def encode_dense(
        self, images: Any, variant: str = "plain", image_size: int | None = None, batch_size: int = 16
    ) -> list[Tensor]:
        """Encode each image cell (ViT patch or CNN feature map position) in the shared embedding space.

        Images keep their aspect ratio, so their grids of cells can have different shapes.

        Args:
            images: One image or a list of N images, as in `encode_image`.
            variant: `plain` or, for vision transformers only, a variant that improves localisation: `maskclip`,
                `sclip`, `clearclip` or `naclip` (see `models/vision/dense.py`).
            image_size: Length of the resized image's shorter side in pixels, rounded to a multiple of the cell size.
                Default: the tower's training resolution.

        Returns:
            For each image, a CPU tensor of shape (h, w, embed_dim) with L2-normalised float32 embeddings.
        """
        items = to_image_list(images)
        _, dense = self._get_model_and_dense_encoder()
        embeddings: list[Tensor] = []
        for start in range(0, len(items), batch_size):
            pixels = [dense.resize(load_image(item), image_size) for item in items[start : start + batch_size]]
            for _, group in groupby(pixels, key=lambda image: image.shape):
                embeddings += dense.encode(torch.stack(list(group)), variant).cpu()
        return embeddings

    def encode_regions(
        self,
        image: Any,
        boxes: Any = None,
        masks: Any = None,
        variant: str | None = None,
        image_size: int | None = None,
    ) -> Tensor:
        """Encode N regions of an image. Return L2-normalised float32 embeddings of shape (N, embed_dim) on the CPU.

        The embedding of a box is the average over the cells in the box, computed with RoIAlign as in the `coco-boxes`
        benchmark. The embedding of a mask is the average over all cells of the image, weighted by the mask's area in
        each cell.

        Args:
            boxes: Array of shape (N, 4) with rows (x0, y0, x1, y1), in pixels of the original image after the EXIF
                orientation has been applied.
            masks: Boolean array of shape (N, H, W), used instead of `boxes`, where H and W are the height and the width
                of the original image.
            variant: See `encode_dense`. Default: the tower's `DenseEncoder.localization_variant`.
            image_size: Length of the resized image's shorter side in pixels. Default: 1.5 times the tower's training
                resolution.
        """
        if (boxes is None) == (masks is None):
            raise ValueError("encode_regions requires either boxes or masks (got both or neither)")
        model, dense = self._get_model_and_dense_encoder()
        variant = variant or dense.localization_variant
        pixels = load_image(image)
        height, width = pixels.shape[1:]
        if boxes is None:
            checked = validate_masks(masks, height, width)
            resized = dense.resize(pixels, image_size or dense.localization_image_size)
            return pool_features_by_mask(dense.encode(resized[None], variant)[0], checked).cpu()
        checked = validate_boxes(boxes, height, width)
        return encode_boxes(dense, [pixels], [checked], variant, model.config.embed_dim, image_size)[0]

    @torch.no_grad()
    @use_onednn_matmul()
    def segment(
        self,
        image: Any,
        names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = "a photo of a {}",
        variant: str | None = None,
        return_scores: bool = False,
    ) -> Any:
        """Assign each pixel of an image to one of the given classes (zero-shot segmentation).

        As in SCLIP (arXiv 2312.01597), the image is resized so that its shorter side is 1.5 times the tower's training
        resolution. A square window with the size of the training resolution then slides over the image.

        Args:
            names: One or more names for each class. The score of a class is the maximum score of its names.
            templates: Prompt templates for the names, as in `encode_text`. The benchmarks use OpenAI's 80 templates.
            variant: See `encode_dense`. Default: the tower's `DenseEncoder.localization_variant`.

        Returns:
            The class index of each pixel, as a CPU tensor of shape (H, W), int64. If `return_scores` is True, also the
            class scores of each pixel, as a CPU tensor of shape (classes, H, W), float32. The scores are cosine
            similarities, averaged over the windows.
        """
        classes = [[name] if isinstance(name, str) else list(name) for name in names]
        is_valid = all(class_names and all(name.strip() for name in class_names) for class_names in classes)
        if isinstance(names, str) or not classes or not is_valid:
            raise ValueError(f"names must be a list with one or more non-empty names for each class (got {names!r})")
        model, dense = self._get_model_and_dense_encoder()
        queries = model.encode_text([name for class_names in classes for name in class_names], templates=templates)
        transform = WindowResizer.from_dense_encoder(dense)
        resized = {0: transform(load_image(image))}
        variant = variant or dense.localization_variant
        scores = encode_windows(resized, dense, variant, queries.to(dense.device), transform)[0]
        names_per_class = [len(class_names) for class_names in classes]
        tiles = [labels for _, labels in segment(scores, names_per_class, logit_scale=1.0)]
        labels = torch.cat(tiles).cpu()
        return (labels, scores.compute_class_scores(names_per_class).cpu()) if return_scores else labels
