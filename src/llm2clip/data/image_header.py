"""Reading of image headers: the supported formats and the size limit."""

from __future__ import annotations

from functools import cache
from typing import BinaryIO

from PIL import Image

MAX_PIXELS = 100_000_000  # larger images are rejected by their header, before decoding (300 MB as RGB)

# Only formats that Pillow decodes in-process: by default it would also run Ghostscript on EPS files, and decode the
# images inside an ICO file before their size can be checked.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


@cache
def readable_formats() -> list[str]:
    """Return the supported formats that the installed Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_header(stream: BinaryIO) -> Image.Image:
    """Open an image of a supported format without decoding its pixels.

    Pillow raises `Image.UnidentifiedImageError` for other formats and almost any exception for malicious files. The
    caller must check the size against `MAX_PIXELS`.
    """
    return Image.open(stream, formats=readable_formats())
