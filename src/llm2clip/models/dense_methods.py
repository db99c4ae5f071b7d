"""Methods of a model that encode parts of an image: cells, boxes, masks, and the pixels of each class."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, cast, overload

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.images import list_images, load_image
from llm2clip.models.vision.dense import build_dense_encoder
from llm2clip.models.vision.regions import check_boxes, check_masks, encode_boxes, encode_masks
from llm2clip.models.vision.sliding_window import ResizeForWindows, encode_windows, segment

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP


class DenseMethods:
    """Base class of `LLM2CLIP` with its methods for dense features, regions and segmentation."""

    def _eval_model(self) -> LLM2CLIP:
        """Return this model in eval mode."""
        return cast("LLM2CLIP", self).eval()

    def encode_dense(
        self, images: Any, variant: str = "plain", image_size: int | None = None, batch_size: int = 16
    ) -> list[Tensor]:
        """Encode the cells (ViT patches or CNN positions) of images in the shared space.

        Images keep their aspect ratio, so their grids may have different shapes. For images of the same size,
        `torch.stack` combines the result into one tensor.

        Args:
            images: one image or a list of N images, as for `encode_image`.
            variant: `plain` or, for vision transformers, `maskclip`, `sclip`, `clearclip` or `naclip`, which localise
                objects better (see `models/vision/dense.py`).
            image_size: length to which the shorter side of an image is resized, in pixels. Both sides are rounded to
                multiples of the cell size. Default: the size on which the tower was trained.
            batch_size: number of images per forward pass.

        Returns:
            One tensor of L2-normalised embeddings (h, w, embed_dim) per image, float32, on the CPU.

        Raises:
            ValueError: the vision tower has no dense features, or does not support the variant or the size.
            ImageError: an image cannot be decoded. The message contains the image's name.
        """
        items = list_images(images)
        model = self._eval_model()
        dense = build_dense_encoder(model.tower, model.projection)
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
        """Encode regions of an image as L2-normalised (N, embed_dim) float32 embeddings on the CPU.

        The entire image is encoded once. Boxes are averaged over the cells with RoIAlign, as in the benchmark
        `coco-boxes`, and masks are averaged with the area of the mask in each cell as weight.

        Args:
            image: one image, as for `encode_image`.
            boxes: N boxes (N, 4), as (x0, y0, x1, y1) in pixels of the original image, with its EXIF orientation.
            masks: N boolean masks (N, H, W), instead of boxes. H and W are the size of the original image.
            variant: see `encode_dense`. Default: `DenseEncoder.localization_variant` of the tower.
            image_size: length to which the shorter side of the image is resized, in pixels. Default: 1.5 times the size
                on which the tower was trained.

        Raises:
            ValueError: the vision tower has no dense features, or does not support the variant or the size; there are
                both boxes and masks, or neither; a box is empty, contains NaN, or is not inside the image; a mask is
                empty or does not have the size of the image.
            ImageError: the image cannot be decoded.
        """
        if (boxes is None) == (masks is None):
            raise ValueError("encode_regions needs either boxes or masks")
        model = self._eval_model()
        dense = build_dense_encoder(model.tower, model.projection)
        variant = variant or dense.localization_variant
        pixels = load_image(image)
        height, width = pixels.shape[1:]
        if boxes is None:
            return encode_masks(dense, pixels, check_masks(masks, height, width), variant, image_size)
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

        The protocol is that of the segmentation benchmarks without a background class (SCLIP, arXiv 2312.01597): a
        window of the tower's training size slides over the image, whose shorter side is 1.5 times as long.

        Args:
            image: one image, as for `encode_image`.
            names: name of each class, or several names. The score of a class is the highest score of its names.
            templates: prompt templates for the names, see `encode_text`. The benchmarks use OpenAI's 80 templates.
            variant: see `encode_dense`. Default: `DenseEncoder.localization_variant` of the tower.
            return_scores: if True, also return the scores.

        Returns:
            The index of the class of each pixel, int64 (H, W), on the CPU. With `return_scores`, also the highest
            cosine similarity of each class, float32 (classes, H, W), averaged over the windows.

        Raises:
            ValueError: there are no names, a name is empty, or a template has no {}. The vision tower has no dense
                features, or does not support the variant. See also `encoder`.
            ImageError: the image cannot be decoded.
        """
        classes = [[name] if isinstance(name, str) else list(name) for name in names]
        is_valid = all(class_names and all(name.strip() for name in class_names) for class_names in classes)
        if isinstance(names, str) or not classes or not is_valid:
            raise ValueError(f"names must be a list with one or several non-empty names for each class (got {names!r})")
        model = self._eval_model()
        dense = build_dense_encoder(model.tower, model.projection)
        queries = model.encode_text([name for class_names in classes for name in class_names], templates=templates)
        transform = ResizeForWindows.for_encoder(dense)
        resized = {0: transform(load_image(image))}
        variant = variant or dense.localization_variant
        scores = encode_windows(resized, dense, variant, queries.to(dense.device), transform)[0]
        names_per_class = [len(class_names) for class_names in classes]
        tiles = [labels for _, labels in segment(scores, names_per_class, logit_scale=1.0)]
        labels = torch.cat(tiles).cpu()
        return (labels, scores.class_scores(names_per_class).cpu()) if return_scores else labels
