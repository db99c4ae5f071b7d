"""Access to the image files of hits, and decoding of images in requests."""

import base64
import binascii
import io
import os
from typing import BinaryIO, NamedTuple

from PIL import Image
from torch import Tensor

from llm2clip.data.image_header import ImageFormatError, is_heic, open_image_header
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import ImageError, load_image
from llm2clip.search.backends import IndexBackend
from llm2clip.search.types import IndexedImage, NotFoundError

# ---- files of hits


class ImageTooLargeError(ValueError):
    """Raised when an image has too many bytes or pixels."""


def open_original_image(backend: IndexBackend, hit_id: str) -> tuple[BinaryIO, str]:
    """Open the image file of a hit. Return a stream and the media type.

    If the hit has several files, open the first file that has not changed since it was indexed.

    Raises:
        NotFoundError: The hit id is unknown, or all image files of the hit have been changed or removed.
    """
    for image in backend.read_images(hit_id):
        try:
            stream = _open_unchanged_image(image)
            header = open_image_header(stream)
        except Exception:  # Pillow can raise almost any exception for corrupt headers
            continue
        media_type = Image.MIME.get(header.format or "", "")
        if media_type.startswith("image/"):
            stream.seek(0)
            return stream, media_type
    raise NotFoundError(
        f"the index contains no image with id {hit_id}, or the image file has been changed or removed since it was "
        "indexed"
    )


def read_original_image(backend: IndexBackend, hit_id: str, max_bytes: int) -> bytes:
    """Read the file that `open_original_image` opens. Raise ImageTooLargeError if the file exceeds `max_bytes`."""
    stream, _ = open_original_image(backend, hit_id)
    with stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ImageTooLargeError(f"the image file is too large; the limit is {max_bytes:,} bytes")
    return data


def _open_unchanged_image(image: IndexedImage) -> BinaryIO:
    path = image.ref.container_path or ""
    # Check the version before opening the file, because opening a named pipe would block.
    if format_file_version(os.stat(path)) != image.file_version:
        raise FileNotFoundError(f"{path} has changed since it was indexed")
    stream = image.ref.open()
    if isinstance(image.ref, FileImage) and format_file_version(os.fstat(stream.fileno())) != image.file_version:
        raise FileNotFoundError(f"{path} has changed since it was indexed")
    return stream


def format_file_version(stat: os.stat_result) -> str:
    """Return a string with a file's size and modification time, used to detect changes."""
    return f"{stat.st_size} {stat.st_mtime_ns}"


# ---- images in requests

# Pillow would decode all hidden frames of an AVIF or HEIC file, and even a small file can contain many frames.
FORMAT_NOT_ACCEPTED = "{} images are not accepted in requests. Convert the image to JPEG, PNG or WebP"


class InvalidImageError(ValueError):
    """Raised when an image in a request cannot be decoded. `param` locates the image, such as "images.0"."""

    def __init__(self, cause: Exception, param: str) -> None:
        super().__init__(str(cause))
        self.param, self.code = param, 413 if isinstance(cause, ImageTooLargeError) else 422


class RequestImage(NamedTuple):
    """Data URI of an image in a request. `param` locates the image in the request, such as "images.0"."""

    data_uri: str
    param: str


def load_query_image(image: RequestImage | bytes, max_pixels: int) -> Tensor:
    """Decode an image from a request, or the bytes of an indexed file, to a uint8 tensor of shape (3, H, W).

    Raises:
        InvalidImageError: The image from a request cannot be decoded, or has more than `max_pixels` pixels.
        ImageError: The indexed file cannot be decoded.
        ImageTooLargeError: The image in the indexed file has more than `max_pixels` pixels.
    """
    if not isinstance(image, RequestImage):
        return load_request_image(image, max_pixels, is_indexed=True)
    try:
        return load_request_image(decode_data_uri(image.data_uri), max_pixels)
    except (ImageError, ImageTooLargeError) as error:
        raise InvalidImageError(error, image.param) from error


def decode_data_uri(uri: str) -> bytes:
    header, comma, body = uri.partition(",")
    if not comma or not header.endswith(";base64"):
        raise ImageError("an image must be a data URI of the form data:image/jpeg;base64,DATA")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"invalid base64 in a data URI: {error}") from error


def load_request_image(data: bytes, max_pixels: int, is_indexed: bool = False) -> Tensor:
    """Decode an image file to a uint8 tensor of shape (3, H, W). For the exceptions, see `read_image_size`."""
    read_image_size(data, max_pixels, is_indexed)
    return load_image(data)


def read_image_size(data: bytes, max_pixels: int, is_indexed: bool = False) -> tuple[int, int]:
    """Return the width and height of an image file, without decoding the pixels or applying the EXIF orientation.

    Raises:
        ImageTooLargeError: The image has more than `max_pixels` pixels.
        ImageError: The image cannot be decoded, or `is_indexed` is False for a HEIC or AVIF file.
    """
    if is_heic(data) and not is_indexed:
        raise ImageError(FORMAT_NOT_ACCEPTED.format("HEIC"))
    try:
        with open_image_header(io.BytesIO(data)) as header:
            width, height = header.size
            is_avif = header.format == "AVIF"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLargeError(str(error)) from error
    except ImageFormatError as error:
        raise ImageError(str(error)) from error
    except Exception as error:  # Pillow can raise almost any exception for corrupt headers
        raise ImageError("the image is corrupt") from error
    if is_avif and not is_indexed:
        raise ImageError(FORMAT_NOT_ACCEPTED.format("AVIF"))
    if width * height > max_pixels:
        raise ImageTooLargeError(
            f"the image has too many pixels: {width} x {height}; the limit is {max_pixels:,} pixels"
        )
    return width, height
