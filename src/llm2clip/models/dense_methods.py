"""Methods of `LLM2CLIP` for parts of an image: dense features, region embeddings and segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.images import list_images, load_image
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
    """Mixin of `LLM2CLIP` for dense features, region embeddings and segmentation."""

    def _eval_with_dense(self) -> tuple[LLM2CLIP, DenseEncoder]:
        """Switch this model to eval mode. Return it and its dense encoder."""
        model = cast("LLM2CLIP", self).eval()
        return model, build_dense_encoder(model.tower, model.projection)

    def encode_dense(
        self, images: Any, variant: str = "plain", image_size: int | None = None, batch_size: int = 16
    ) -> list[Tensor]:
        """Encode the cells of images (ViT patches or CNN feature map positions) in the shared embedding space.

        Images keep their aspect ratio, so their grids may have different shapes. For images of the same size, you can
        combine the result into one tensor with `torch.stack`.

        Args:
            images: one image or a list of N images, as for `encode_image`.
            variant: `plain` or, for vision transformers, `maskclip`, `sclip`, `clearclip` or `naclip`. The latter four
                localise objects better (see `models/vision/dense.py`).
            image_size: length in pixels to which the shorter side of an image is resized. Both sides are rounded to
                multiples of the cell size. Default: the tower's training resolution.
            batch_size: number of images per forward pass.

        Returns:
            For each image, L2-normalised float32 embeddings of shape (h, w, embed_dim), on the CPU.

        Raises:
            ValueError: the vision tower has no dense features, or does not support the variant or image size.
            ImageError: an image cannot be decoded. The message contains the image's name.
        """
        items = list_images(images)
        _, dense = self._eval_with_dense()
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
        """Encode N regions of an image as L2-normalised float32 embeddings of shape (N, embed_dim), on the CPU.

        The entire image is encoded once. The embedding of a box is the average over its cells, computed with RoIAlign
        as in the benchmark `coco-boxes`. The embedding of a mask is the average over the cells, weighted by the area of
        the mask in each cell.

        Args:
            image: one image, as for `encode_image`.
            boxes: array of shape (N, 4) with (x0, y0, x1, y1) in pixels of the original image, after applying its EXIF
                orientation.
            masks: boolean array of shape (N, H, W), to pass instead of boxes. H and W are the original image size.
            variant: see `encode_dense`. Default: `DenseEncoder.localization_variant` of the tower.
            image_size: length in pixels to which the shorter side of the image is resized. Default: 1.5 times the
                tower's training resolution.

        Raises:
            ValueError: the vision tower has no dense features, or does not support the variant or image size. Both
                boxes and masks are passed, or neither. A box is empty, contains NaN, or is not inside the image. A mask
                is empty or does not have the size of the image.
            ImageError: the image cannot be decoded.
        """
        if (boxes is None) == (masks is None):
            raise ValueError("encode_regions needs either boxes or masks")
        model, dense = self._eval_with_dense()
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
        """Assign each pixel of an image to one of the given classes, without training.

        As in the segmentation benchmarks without a background class (SCLIP, arXiv 2312.01597), a square window with the
        tower's training resolution slides over the resized image, whose shorter side is 1.5 times the window's side.

        Args:
            image: one image, as for `encode_image`.
            names: one or several names for each class. The score of a class is the highest score of its names.
            templates: prompt templates for the names, as for `encode_text`. The benchmarks use OpenAI's 80 templates.
            variant: see `encode_dense`. Default: `DenseEncoder.localization_variant` of the tower.
            return_scores: if True, also return the scores.

        Returns:
            The class index of each pixel, of shape (H, W), int64, on the CPU. With `return_scores`, also the class
            scores of shape (classes, H, W), float32: cosine similarities, averaged over the windows.

        Raises:
            ValueError: there are no names, a name is empty, or a template has no {}. The vision tower has no dense
                features, or does not support the variant. See also `encoder`.
            ImageError: the image cannot be decoded.
        """
        classes = [[name] if isinstance(name, str) else list(name) for name in names]
        is_valid = all(class_names and all(name.strip() for name in class_names) for class_names in classes)
        if isinstance(names, str) or not classes or not is_valid:
            raise ValueError(f"names must be a list with one or several non-empty names for each class (got {names!r})")
        model, dense = self._eval_with_dense()
        queries = model.encode_text([name for class_names in classes for name in class_names], templates=templates)
        transform = ResizeForWindows.for_encoder(dense)
        resized = {0: transform(load_image(image))}
        variant = variant or dense.localization_variant
        scores = encode_windows(resized, dense, variant, queries.to(dense.device), transform)[0]
        names_per_class = [len(class_names) for class_names in classes]
        tiles = [labels for _, labels in segment(scores, names_per_class, logit_scale=1.0)]
        labels = torch.cat(tiles).cpu()
        return (labels, scores.class_scores(names_per_class).cpu()) if return_scores else labels
