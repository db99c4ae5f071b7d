"""Reading of image headers, with the supported formats and the size limit."""

from __future__ import annotations

from functools import cache
from typing import BinaryIO

from PIL import Image

# Images with more pixels are rejected after their header is read and before they are decoded. 100 million RGB pixels
# take 300 MB.
MAX_PIXELS = 100_000_000

# Pillow decodes all of these formats in-process. EPS is excluded because Pillow runs Ghostscript on EPS files. ICO is
# excluded because Pillow decodes the images in an ICO file before their size can be checked.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


@cache
def readable_formats() -> list[str]:
    """Return the supported formats that the installed version of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_header(stream: BinaryIO) -> Image.Image:
    """Open an image in a supported format without decoding its pixels.

    If the format is not supported, Pillow raises `Image.UnidentifiedImageError`. For malicious files, Pillow may raise
    almost any type of exception. The caller must check that the image has at most `MAX_PIXELS` pixels.
    """
    return Image.open(stream, formats=readable_formats())
