"""Decoder for the images in HTTP requests, with a limit on their size."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

from PIL import Image

from llm2clip.data.image_header import ImageFormatError, is_heic, open_header
from llm2clip.data.images import ImageError, load_image
from llm2clip.search.errors import TooLarge

# A small AVIF or HEIC file can contain any number of hidden frames, which are decoded first.
NOT_ACCEPTED = "{} images are not accepted in requests. Convert the image to JPEG, PNG or WebP"


def decode_data_uri(uri: str) -> bytes:
    """Decode a base64 data URI to bytes.

    Raises:
        ImageError: The text is not a base64 data URI, or its base64 data is invalid.
    """
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError("an image must be a data URI of the form data:image/jpeg;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"invalid base64 in a data URI: {error}") from error


def load_request_image(data: bytes, max_pixels: int) -> Any:
    """Decode an image file to a tensor, uint8 (3, H, W).

    Raises:
        TooLarge: The image has more than `max_pixels` pixels. The size is checked before the pixels are decoded.
        ImageError: The image cannot be decoded.
    """
    if is_heic(data):
        raise ImageError(NOT_ACCEPTED.format("HEIC"))
    try:
        with open_header(io.BytesIO(data)) as header:
            width, height = header.size
            is_avif = header.format == "AVIF"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooLarge(str(error)) from error
    except ImageFormatError as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # Pillow can raise almost any exception for a damaged header
        raise ImageError("the image is damaged") from error
    if is_avif:
        raise ImageError(NOT_ACCEPTED.format("AVIF"))
    if width * height > max_pixels:
        raise TooLarge(f"the image has too many pixels: {width} x {height}; the limit is {max_pixels:,}")
    return load_image(data)
