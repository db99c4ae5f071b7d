"""Pictures: bytes to pixels, and pixels to the square a vision tower was trained on.

Everything here is uint8 RGB, shape (3, H, W). Normalising is the tower's work, on the device, so a quarter of the
bytes travel from the loading workers to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import numpy as np
import torch
import torchvision
from packaging.version import Version
from PIL import Image, ImageFile, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, encode_jpeg
from torchvision.io import decode_image as torchvision_decode_image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from llm2clip.data.image_header import readable_formats
from llm2clip.data.image_refs import ImageRef

MAX_PIXELS = 100_000_000
"""A picture that claims more than this is refused before anything is decoded: 300 MB of RGB."""

_RESAMPLE = {"bicubic": 3, "bilinear": 2}  # Pillow's numbers, which preprocessor_config.json uses
_ORIENTATION = 0x0112  # the EXIF tag
# torchvision 0.29's PNG decoder ends the process (segmentation fault) where the compressed pixels are damaged.
_FAST = ("JPEG", "MPO", "WEBP", *(("PNG",) if Version(torchvision.__version__) < Version("0.29") else ()))


class ImageError(ValueError):
    """A picture that cannot be read; the message says why and, where it has one, names its file."""


@runtime_checkable
class Readable(Protocol):
    """An open file, or anything like one."""

    def read(self) -> bytes: ...


ImageLike = str | Path | bytes | Image.Image | Tensor | Readable


# ---- what a tower was trained with ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Preprocess:
    """How the pictures of a vision tower were prepared when it was trained.

    `size` is the side of the square the tower sees. The picture is brought to floor(size / crop_pct), its shortest side
    ("shortest") or both sides ("squash"), and the centre is cropped: the rule of timm's evaluation transforms.
    """

    size: int
    resize: Literal["shortest", "squash"]
    crop_pct: float
    interpolation: Literal["bicubic", "bilinear"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def resize_size(self) -> int:
        """The side before the crop. The small term undoes rounding: 224 / (224 / 256) must be 256."""
        return math.floor(self.size / self.crop_pct + 1e-6)

    def to_dict(self) -> dict[str, Any]:
        """The content of preprocessor_config.json: what transformers reads, and the exact crop_pct."""
        scaled = self.resize_size
        edge = {"shortest_edge": scaled} if self.resize == "shortest" else {"height": scaled, "width": scaled}
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": edge,
            "resample": _RESAMPLE[self.interpolation],
            "do_center_crop": True,
            "crop_size": {"height": self.size, "width": self.size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "crop_pct": self.crop_pct,
        }

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> Preprocess:
        """Read what `to_dict` wrote, or the configuration of a transformers image processor.

        Raises ValueError for one that does not end in a square of fixed size.
        """
        size = config.get("size", config.get("crop_size"))
        if isinstance(size, int):  # files from before 2022; a plain number meant the shortest side
            size = {"shortest_edge": size}
        resize: Literal["shortest", "squash"] = "shortest" if "shortest_edge" in (size or {}) else "squash"
        scaled = _square(size)
        crop = _square(config["crop_size"]) if config.get("do_center_crop") else scaled
        crop_pct = config.get("crop_pct")
        return cls(
            size=crop,
            resize=resize,
            # Some processors of transformers have a crop_pct of their own, with another meaning beside other sizes.
            crop_pct=crop_pct if crop_pct and math.floor(crop / crop_pct + 1e-6) == scaled else crop / scaled,
            interpolation=_interpolation(int(config.get("resample", 3))),
            mean=_triple(config, "image_mean"),
            std=_triple(config, "image_std"),
        )


def _square(size: Any) -> int:
    """The side of 224, {"height": 224, "width": 224} or {"shortest_edge": 224}."""
    if isinstance(size, int):
        return size
    sides = (
        {size[key] for key in ("shortest_edge", "height", "width") if key in size} if isinstance(size, dict) else set()
    )
    if len(sides) != 1:
        raise ValueError(f"the image processor asks for {size}; only squares are supported")
    return int(sides.pop())


def _interpolation(resample: int) -> Literal["bilinear", "bicubic"]:
    """Of Pillow's numbers for ways to resample, which processors have."""
    if resample not in (2, 3):
        raise ValueError(f"the image processor resamples by Pillow's way {resample}, not 2 (bilinear) or 3 (bicubic)")
    return "bilinear" if resample == 2 else "bicubic"


def _triple(config: dict[str, Any], name: str) -> tuple[float, float, float]:
    if name not in config:
        raise ValueError(f"the image processor has no {name}")
    red, green, blue = (float(value) for value in config[name])
    return red, green, blue


# ---- bytes to pixels ------------------------------------------------------------------------------------------------


def load_image(image: ImageLike) -> Tensor:
    """A picture from wherever it is, as uint8 (3, H, W) RGB, upright.

    Takes a path, encoded bytes, an open file, a PIL image, or a uint8 (3, H, W) tensor, which is returned as it is.
    Raises ImageError, naming the file where there is one.
    """
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ImageError(f"a tensor must be uint8 (3, height, width), not {image.dtype} {tuple(image.shape)}")
        return image
    if isinstance(image, bytes):
        return decode_image(image)
    if isinstance(image, ImageRef):
        name: object = image
    elif isinstance(image, Image.Image):
        name = getattr(image, "filename", "")
    elif isinstance(image, str | Path):
        name = image
    elif isinstance(image, Readable):
        name = getattr(image, "name", "")
    else:
        raise ImageError(f"{type(image).__name__} is not a path, bytes, an open file, a PIL image or a tensor")
    try:
        if isinstance(image, Image.Image):
            _check_size(image)
            return _from_pil(image)
        return decode_image(Path(image).read_bytes() if isinstance(image, str | Path) else image.read())
    except (ImageError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ImageError(f"{name}: {reason}" if name else str(reason)) from error


def decode_image(data: bytes) -> Tensor:
    """Encoded bytes to uint8 (3, H, W) RGB, upright by EXIF, alpha over white, the first frame of an animation.

    torchvision decodes JPEG, WebP and, where it is safe, PNG (twice as fast as Pillow); Pillow decodes the rest, and
    reads the header of all. Colour profiles are ignored, as they were when the towers were trained. Raises ImageError.
    """
    try:
        header = Image.open(BytesIO(data), formats=readable_formats())
        _check_size(header)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        what = "it is empty" if not data else "none of " + ", ".join(readable_formats())
        raise ImageError(f"not a picture: {what}") from None
    except Exception as error:  # hostile headers make Pillow raise almost anything
        raise ImageError(f"unreadable picture: {error}") from error
    pixels = _decode_fast(data, header)
    return _from_pil(header) if pixels is None else pixels


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width} x {height} is more than {MAX_PIXELS:,} pixels")


def _decode_fast(data: bytes, header: Image.Image) -> Tensor | None:
    """torchvision's pixels, or None where Pillow must decide."""
    if header.format == "PNG" and "PNG" not in _FAST and ImageFile.LOAD_TRUNCATED_IMAGES:
        try:
            Image.open(BytesIO(data), formats=["PNG"]).verify()  # what Pillow would fill with grey is an error here
        except Exception as error:
            raise ImageError(f"unreadable picture: {error}") from error
    if header.format not in _FAST or "transparency" in header.info:
        return None
    alpha = header.mode in ("RGBA", "LA")
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # apply_exif_orientation covers JPEG and PNG; torchvision does not look for it in WebP.
        pixels = torchvision_decode_image(
            encoded, ImageReadMode.RGB_ALPHA if alpha else ImageReadMode.RGB, apply_exif_orientation=True
        )
    except RuntimeError as error:
        if ImageFile.LOAD_TRUNCATED_IMAGES and header.format != "WEBP":
            # Somebody in this process told Pillow to fill what is missing with grey: do not ask it.
            raise ImageError(f"unreadable picture: {str(error).rpartition(', ')[2]}") from error
        return None
    if pixels.dtype == torch.uint16:  # PNG of 16 bits
        pixels = _from_16_bits(pixels)
    if header.format == "WEBP":
        pixels = _upright(pixels, header.getexif().get(_ORIENTATION, 1))
    return _over_white(pixels) if alpha else pixels


def _from_pil(image: Image.Image) -> Tensor:
    """Any mode of Pillow to uint8 (3, H, W). Raises ImageError."""
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F":
            raise ImageError("its pixels are floating-point numbers of unknown range")
        if image.mode.startswith("I"):  # Pillow's own conversion cuts 16 bits off at 255
            grey = torch.from_numpy(np.asarray(image).astype(np.int64)).clamp(0, 65535)
            return _from_16_bits(grey).expand(3, -1, -1).contiguous()
        alpha = image.has_transparency_data
        pixels = torch.from_numpy(np.array(image.convert("RGBA" if alpha else "RGB"))).permute(2, 0, 1)
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"unreadable picture: {error}") from error
    return _over_white(pixels) if alpha else pixels.contiguous()


def _from_16_bits(pixels: Tensor) -> Tensor:
    found = torch.empty(pixels.shape, dtype=torch.uint8)
    for strip, out in zip(_strips(pixels), _strips(found), strict=True):
        out.copy_((strip.to(torch.int32) + 128) // 257)
    return found


def _over_white(pixels: Tensor) -> Tensor:
    """uint8 (4, H, W) RGBA laid over white: (3, H, W)."""
    found = torch.empty(3, *pixels.shape[1:], dtype=torch.uint8)
    for strip, out in zip(_strips(pixels), _strips(found), strict=True):
        colour, alpha = strip[:3].to(torch.int32), strip[3:].to(torch.int32)
        out.copy_((colour * alpha + 255 * (255 - alpha) + 127) // 255)
    return found


def _strips(pixels: Tensor) -> Sequence[Tensor]:
    """A picture in strips of about a million pixels, in which wider numbers take little memory."""
    return pixels.split(max(1, (1 << 20) // max(1, pixels.shape[-1])), dim=-2)


def _upright(pixels: Tensor, orientation: int) -> Tensor:
    """Undo an EXIF orientation (1 to 8; others count as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 2)
    flips = {2: [2], 3: [1, 2], 4: [1], 6: [2], 7: [1, 2], 8: [1]}.get(orientation)
    return pixels.flip(flips) if flips else pixels


# ---- pixels to the tower's square -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvalTransform:
    """uint8 (3, H, W) to uint8 (3, S, S): resize and crop the centre, as the tower's own evaluation does."""

    preprocess: Preprocess

    def __call__(self, image: Tensor) -> Tensor:
        size, scaled = self.preprocess.size, self.preprocess.resize_size
        if self.preprocess.resize == "shortest":
            # The ends of a ribbon are cropped anyway; resized first, a 1 x 1,000,000 picture would fill the memory.
            height, width = image.shape[-2:]
            shortest = min(height, width)
            image = F.center_crop(image, [min(height, 8 * shortest), min(width, 8 * shortest)])
        side = [scaled] if self.preprocess.resize == "shortest" else [scaled, scaled]
        image = F.resize(image, side, interpolation=InterpolationMode(self.preprocess.interpolation), antialias=True)
        return cast(Tensor, F.center_crop(image, [size, size]).contiguous())


@dataclass(frozen=True)
class TrainTransform:
    """Random crop for training: uint8 (3, H, W) to uint8 (3, S, S).

    The crop covers a random share of the area, at least `min_crop_scale`, with an aspect ratio of 3/4 to 4/3, and is
    resized to the square. With a `min_crop_scale` of 1 the transform equals `EvalTransform`. Images are not flipped,
    since captions mention left and right.

    All randomness comes from the generator of the call. Seeded from (seed, epoch, index), it gives a sample the same
    crop in whichever worker process the sample is decoded.
    """

    preprocess: Preprocess
    min_crop_scale: float = 0.9

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        if self.min_crop_scale >= 1:
            return EvalTransform(self.preprocess)(image)
        top, left, height, width = self._crop(image.shape[-2], image.shape[-1], generator)
        size = self.preprocess.size
        image = F.resized_crop(
            image,
            top,
            left,
            height,
            width,
            [size, size],
            interpolation=InterpolationMode(self.preprocess.interpolation),
            antialias=True,
        )
        return image.contiguous()

    def _crop(self, height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
        """Return top, left, height and width of a crop: torchvision's RandomResizedCrop, but with a generator."""
        min_ratio, max_ratio = 3 / 4, 4 / 3
        for _ in range(10):
            share, log_ratio, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
            area = height * width * (self.min_crop_scale + share * (1.0 - self.min_crop_scale))
            ratio = math.exp(math.log(min_ratio) + log_ratio * (math.log(max_ratio) - math.log(min_ratio)))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                top, left = int(down * (height - crop_height + 1)), int(right * (width - crop_width + 1))
                return top, left, crop_height, crop_width
        # No crop fits, as in very elongated images: the largest central crop of an allowed aspect ratio.
        crop_width, crop_height = min(width, round(height * max_ratio)), min(height, round(width / min_ratio))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return top, left, max(crop_height, 1), max(crop_width, 1)


# ---- pixels to bytes ------------------------------------------------------------------------------------------------


def load_thumbnail(image: ImageLike, side: int) -> bytes | None:
    """A picture as `thumbnail` makes it; None of one that cannot be read."""
    try:
        return make_thumbnail(load_image(image), side)
    except (ImageError, OSError):
        return None


def make_thumbnail(image: Tensor, side: int) -> bytes:
    """uint8 (3, H, W) to a JPEG of at most so many pixels a side."""
    height, width = image.shape[-2:]
    shrink = min(1.0, side / max(height, width))
    small = F.resize(image, [max(1, round(height * shrink)), max(1, round(width * shrink))], antialias=True)
    return cast(bytes, encode_jpeg(small.contiguous(), quality=80).numpy().tobytes())
