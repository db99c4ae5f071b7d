"""Decode images sent to the server, after checking their size limits."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image

from llm2clip.data.image_header import readable_formats
from llm2clip.data.images import ImageError, load_image
from llm2clip.search.errors import TooLarge


def decode_data_uri(uri: str) -> bytes:
    """Return the bytes of a base64 data URI.

    Raises:
        ImageError: The text is not a data URI, or its base64 is invalid.
    """
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError("an image must be a data URI of the form data:image/jpeg;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"invalid base64 in a data URI: {error}") from error


def load_request_image(data: bytes, max_pixels: int) -> Any:
    """Decode an image to uint8 (3, H, W).

    Raises:
        TooLarge: The image has more than `max_pixels` pixels. This is checked before decoding.
        ImageError: The image cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=readable_formats()) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from error
    except Exception as error:  # Pillow can raise almost any exception for a damaged header
        raise ImageError("the data is not an image, or its format is not supported") from error
    if width * height > max_pixels:
        raise TooLarge(f"the image has too many pixels: {width} x {height}; the limit is {max_pixels:,}")
    return load_image(data)
