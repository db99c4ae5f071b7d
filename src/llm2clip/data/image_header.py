"""Image headers: reading, supported formats and size limit."""

from __future__ import annotations

from functools import cache
from typing import BinaryIO

from PIL import Image

# Larger images are rejected after reading the header, before decoding. 100 million RGB pixels take 300 MB.
MAX_PIXELS = 100_000_000

# Only formats that Pillow decodes in-process. By default, Pillow would also run Ghostscript on EPS files, and would
# decode the images inside an ICO file before their size can be checked.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


@cache
def readable_formats() -> list[str]:
    """Return the supported formats that the installed version of Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_header(stream: BinaryIO) -> Image.Image:
    """Open an image in a supported format without decoding its pixels.

    Pillow raises `Image.UnidentifiedImageError` for other formats and almost any exception for malicious files. The
    caller must check the size against `MAX_PIXELS`.
    """
    return Image.open(stream, formats=readable_formats())
