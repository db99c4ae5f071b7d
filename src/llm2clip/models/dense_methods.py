"""`LLM2CLIP` methods for parts of an image: dense features, region embeddings and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.images import load_image, to_image_list
from llm2clip.models.vision.dense import (
    DenseEncoder,
    build_dense_encoder,
    check_boxes,
    check_masks,
    encode_boxes,
    pool_masks,
)
from llm2clip.models.vision.sliding_window import ResizeForWindows, encode_windows, segment

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP


class DenseMethods:
    """Mixin that adds methods for dense features, region embeddings and segmentation to `LLM2CLIP`."""

    def _prepare_dense(self) -> tuple[LLM2CLIP, DenseEncoder]:
        model = cast("LLM2CLIP", self).eval()
        return model, build_dense_encoder(model.tower, model.projection)

    def encode_dense(
        self, images: Any, variant: str = "plain", image_size: int | None = None, batch_size: int = 16
    ) -> list[Tensor]:
        """Encode each image cell (ViT patch or CNN feature map position) in the shared embedding space.

        Images keep their aspect ratio, so the grids of cells may have different shapes. If all images have the same
        size, you can combine the results into one tensor with `torch.stack`.

        Args:
            images: one image or a list of N images, as for `encode_image`.
            variant: `plain` or, for vision transformers only, a variant that improves localisation: `maskclip`,
                `sclip`, `clearclip` or `naclip` (see `models/vision/dense.py`).
            image_size: length of the resized image's shorter side in pixels. Both sides are rounded to multiples of the
                cell size. Default: the tower's training resolution.

        Returns:
            For each image, a CPU tensor of shape (h, w, embed_dim) with L2-normalised float32 embeddings.

        Raises:
            ValueError: the vision tower has no dense features, or does not support the variant or image size.
            ImageError: an image cannot be decoded. The message names the image.
        """
        items = to_image_list(images)
        _, dense = self._prepare_dense()
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
        """Encode N regions of an image. Return L2-normalised float32 embeddings (N, embed_dim) as a CPU tensor.

        The entire image is encoded once. A box's embedding is the average of the embeddings of its cells, computed with
        RoIAlign as in the `coco-boxes` benchmark. A mask's embedding is the average over all cells of the image,
        weighted by the mask's area in each cell.

        Args:
            image: one image, as for `encode_image`.
            boxes: array of shape (N, 4) with (x0, y0, x1, y1) in pixels of the original image, after its EXIF
                orientation has been applied.
            masks: boolean array of shape (N, H, W), used instead of `boxes`. H and W are the original image's height
                and width.
            variant: see `encode_dense`. Default: the tower's `DenseEncoder.localization_variant`.
            image_size: length of the resized image's shorter side in pixels. Default: 1.5 times the tower's training
                resolution.

        Raises:
            ValueError: the vision tower has no dense features, or does not support the variant or image size. Both
                boxes and masks are passed, or neither. A box is empty, contains NaN, or is not inside the image. A mask
                is empty or does not have the same size as the image.
            ImageError: the image cannot be decoded.
        """
        if (boxes is None) == (masks is None):
            raise ValueError("encode_regions needs either boxes or masks, but not both")
        model, dense = self._prepare_dense()
        variant = variant or dense.localization_variant
        pixels = load_image(image)
        height, width = pixels.shape[1:]
        if boxes is None:
            checked = check_masks(masks, height, width)
            resized = dense.resize(pixels, image_size or dense.localization_size)
            return pool_masks(dense.encode(resized[None], variant)[0], checked).cpu()
        checked = check_boxes(boxes, height, width)
        return encode_boxes(dense, [pixels], [checked], variant, model.config.embed_dim, image_size)[0]

    @overload
    def segment(
        self,
        image: Any,
        names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = ...,
        variant: str | None = ...,
        return_scores: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def segment(
        self,
        image: Any,
        names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = ...,
        variant: str | None = ...,
        *,
        return_scores: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    @onednn_matmul()
    def segment(
        self,
        image: Any,
        names: Sequence[str | Sequence[str]],
        templates: str | Sequence[str] = "a photo of a {}",
        variant: str | None = None,
        return_scores: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Assign each pixel of an image to one of the given classes (zero-shot segmentation).

        As in segmentation benchmarks without a background class (SCLIP, arXiv 2312.01597), the image is resized so that
        its shorter side is 1.5 times the tower's training resolution. A square window with the size of the training
        resolution then slides over the image.

        Args:
            image: one image, as for `encode_image`.
            names: one or more names for each class. A class's score is the highest score of its names.
            templates: prompt templates for the names, as for `encode_text`. The benchmarks use OpenAI's 80 templates.
            variant: see `encode_dense`. Default: the tower's `DenseEncoder.localization_variant`.

        Returns:
            The class index of each pixel, as an int64 CPU tensor of shape (H, W). With `return_scores`, also the class
            scores of each pixel (cosine similarities averaged over the windows), as a float32 CPU tensor of shape
            (classes, H, W).

        Raises:
            ValueError: there are no names, a name is empty, or a template has no {} placeholder. The vision tower has
                no dense features, or does not support the variant. For encoder errors, see `encoder`.
            ImageError: the image cannot be decoded.
        """
        classes = [[name] if isinstance(name, str) else list(name) for name in names]
        is_valid = all(class_names and all(name.strip() for name in class_names) for class_names in classes)
        if isinstance(names, str) or not classes or not is_valid:
            raise ValueError(f"names must be a list with one or more non-empty names for each class (got {names!r})")
        model, dense = self._prepare_dense()
        queries = model.encode_text([name for class_names in classes for name in class_names], templates=templates)
        transform = ResizeForWindows.for_encoder(dense)
        resized = {0: transform(load_image(image))}
        variant = variant or dense.localization_variant
        scores = encode_windows(resized, dense, variant, queries.to(dense.device), transform)[0]
        names_per_class = [len(class_names) for class_names in classes]
        tiles = [labels for _, labels in segment(scores, names_per_class, logit_scale=1.0)]
        labels = torch.cat(tiles).cpu()
        return (labels, scores.compute_class_scores(names_per_class).cpu()) if return_scores else labels
