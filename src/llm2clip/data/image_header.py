"""Which kinds of pictures are looked at."""

from __future__ import annotations

from functools import cache

from PIL import Image

# Only formats that Pillow reads in-process: left to itself it would also hand EPS files to Ghostscript, and decode what
# is inside an ICO before anybody knows how large it is.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")


@cache
def readable_formats() -> list[str]:
    """Those that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
