"""Image preprocessing for vision towers: settings, evaluation transform and training transform.

The transforms take and return uint8 RGB images. The vision tower normalises the pixel values on its device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from llm2clip.io_utils import describe_error

_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's filter constants, as stored in preprocessor_config.json


@dataclass(frozen=True)
class PreprocessConfig:
    """Preprocessing settings of a vision tower.

    The image is resized to floor(size / crop_pct) and then centre-cropped, as in timm's evaluation transforms.

    Attributes:
        size: Side length of the square model input, in pixels.
        resize: "shortest" resizes the shorter side and keeps the aspect ratio. "squash" resizes to a square.
        crop_pct: Side length of the centre crop, divided by the shorter side length of the resized image.
        mean, std: Per-channel normalisation of pixel values in [0, 1].
        crop_rounding: Rounding of the crop's top left corner. "half_even" is used by torchvision, timm, open_clip and
            the LLM2CLIP authors' code, "down" by transformers.
    """

    size: int
    resize: Literal["shortest", "squash"]
    crop_pct: float
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_rounding: Literal["half_even", "down"] = "half_even"

    @property
    def resize_size(self) -> int:
        """Side length in pixels after resizing, before the centre crop. For `resize="shortest"`, the shorter side."""
        return _compute_resize_size(self.size, self.crop_pct)

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a transformers preprocessor_config.json, with crop_pct and crop_rounding added."""
        side = self.resize_size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side} if self.resize == "shortest" else {"height": side, "width": side},
            "resample": _RESAMPLE[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "crop_pct": self.crop_pct,
            "crop_rounding": self.crop_rounding,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> PreprocessConfig:
        """Create the settings from the output of `to_dict` or from a transformers image processor's config."""
        try:
            resize_config = config.get("size", config.get("crop_size"))
            if isinstance(resize_config, int):  # in configs from before 2022, an integer is the shorter side
                resize_config = {"shortest_edge": resize_config}
            resize: Literal["shortest", "squash"] = "shortest" if "shortest_edge" in (resize_config or {}) else "squash"
            resize_size = _parse_square_side(resize_config)
            size = _parse_square_side(config["crop_size"]) if config.get("do_center_crop") else resize_size
            crop_pct = config.get("crop_pct")
            # Some transformers image processors use crop_pct with another meaning that contradicts the sizes.
            if not crop_pct or _compute_resize_size(size, crop_pct) != resize_size:
                crop_pct = size / resize_size
            return cls(
                size=size,
                resize=resize,
                crop_pct=crop_pct,
                interpolation=_parse_interpolation(int(config.get("resample", 3))),
                mean=_parse_channels(config["image_mean"]),
                std=_parse_channels(config["image_std"]),
                crop_rounding=config.get("crop_rounding", "down"),  # transformers image processors round down
            )
        except (TypeError, KeyError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"malformed preprocessing config ({describe_error(error)}): {config}") from error


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation transform that resizes and centre-crops a uint8 image of shape (3, H, W) to shape (3, S, S)."""

    preprocess: PreprocessConfig

    def __call__(self, image: Tensor) -> Tensor:
        size, resize_size = self.preprocess.size, self.preprocess.resize_size
        side = [resize_size, resize_size]
        if self.preprocess.resize == "shortest":
            # Resizing an image of 1 x 1,000,000 pixels would exhaust memory, so elongated images are cropped first.
            height, width = image.shape[-2:]
            shortest = min(height, width)
            image = F.center_crop(image, [min(height, 8 * shortest), min(width, 8 * shortest)])
            side = [resize_size]
        image = F.resize(image, side, interpolation=InterpolationMode(self.preprocess.interpolation), antialias=True)
        if self.preprocess.crop_rounding == "down":
            # If an odd number of rows or columns must be cropped, drop the last row or column first to avoid rounding.
            height, width = image.shape[-2:]
            image = image[..., : height - max(0, height - size) % 2, : width - max(0, width - size) % 2]
        return cast(Tensor, F.center_crop(image, [size, size]).contiguous())


MIN_CROP_SCALE = 0.9  # minimum fraction of the image area in a random crop, as in the LLM2CLIP authors' code


@dataclass(frozen=True)
class TrainTransform:
    """Training transform that resizes a random crop of a uint8 image of shape (3, H, W) to shape (3, S, S).

    The crop covers at least `MIN_CROP_SCALE` of the image area and has an aspect ratio between 3/4 and 4/3. Images are
    not flipped, because captions can mention left and right. All random numbers are drawn from `generator`.
    """

    preprocess: PreprocessConfig

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        box = _sample_crop_box(image.shape[-2], image.shape[-1], generator)
        side = [self.preprocess.size, self.preprocess.size]
        interpolation = InterpolationMode(self.preprocess.interpolation)
        return F.resized_crop(image, *box, side, interpolation=interpolation, antialias=True).contiguous()


def _sample_crop_box(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Sample a crop box as in torchvision's RandomResizedCrop. Return (top, left, height, width)."""
    min_ratio, max_ratio = 3 / 4, 4 / 3
    for _ in range(10):
        share, log_ratio, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = height * width * (MIN_CROP_SCALE + share * (1.0 - MIN_CROP_SCALE))
        ratio = math.exp(math.log(min_ratio) + log_ratio * (math.log(max_ratio) - math.log(min_ratio)))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    # If no crop fits (very elongated images), use the largest central crop with a valid aspect ratio.
    crop_width, crop_height = min(width, round(height * max_ratio)), min(height, round(width / min_ratio))
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return top, left, max(crop_height, 1), max(crop_width, 1)


def _compute_resize_size(size: int, crop_pct: float) -> int:
    # The constant compensates for rounding errors, so that 224 / (224 / 256) yields 256.
    return math.floor(size / crop_pct + 1e-6)


def _parse_square_side(size: Any) -> int:
    """Return the side length of a square, given as 224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, int):
        return size
    sides = {size[key] for key in ("shortest_edge", "height", "width") if key in size} if size else set()
    if len(sides) != 1:
        raise ValueError(f"the image processor's size must be square (got {size})")
    return int(sides.pop())


def _parse_interpolation(resample: int) -> Literal["bilinear", "bicubic"]:
    if resample not in (2, 3):
        raise ValueError(f"the image processor's resample must be 2 (bilinear) or 3 (bicubic) (got {resample})")
    return "bilinear" if resample == 2 else "bicubic"


def _parse_channels(values: Any) -> tuple[float, float, float]:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
