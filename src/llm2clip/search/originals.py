"""Original image files of hits, which are read only if they have not changed since they were indexed."""

import os
from typing import BinaryIO

from PIL import Image

from llm2clip.data.image_header import open_header
from llm2clip.data.image_refs import FileImage, read_image_file
from llm2clip.search.backends import Backend
from llm2clip.search.build import format_file_version, read_container_version
from llm2clip.search.types import IndexedImage


class NotFound(LookupError):
    """Raised when the index, an indexed image, or its original file does not exist."""


class TooLarge(ValueError):
    """Raised when an image file is too large or has too many pixels."""


def open_original(backend: Backend, hit_id: str) -> tuple[BinaryIO, str]:
    """Open the image file of a hit. Return the stream and the media type.

    If the hit has several files, use the first one that has not changed since indexing.

    Raises:
        NotFound: The id is unknown, or all of the hit's files have been changed or removed.
    """
    for image in backend.images(hit_id):
        try:
            stream = _open_unchanged_image(image)
            header = open_header(stream)
        except Exception:  # Pillow can raise almost any exception for corrupt headers
            continue
        media_type = Image.MIME.get(header.format or "", "")
        if media_type.startswith("image/"):
            stream.seek(0)
            return stream, media_type
    raise NotFound(
        f"the index contains no image with id {hit_id}, or the image file has been changed or removed since it was "
        "indexed"
    )


def read_original(backend: Backend, hit_id: str, max_bytes: int | None = None) -> bytes:
    """Return the contents of a hit's image file.

    Args:
        max_bytes: Maximum size of the file. Default: the limit of `read_image_file`.

    Raises:
        NotFound: See `open_original`.
        TooLarge: The file has more than `max_bytes` bytes.
    """
    stream, _ = open_original(backend, hit_id)
    with stream:
        if max_bytes is None:
            return read_image_file(stream)
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TooLarge(f"the image file is too large; the limit is {max_bytes:,} bytes")
    return data


def _open_unchanged_image(image: IndexedImage) -> BinaryIO:
    """Open an image's file. Raise FileNotFoundError if the file has been changed or removed since indexing."""
    path = image.ref.container_path or ""
    if read_container_version(path) != image.file_version:  # check before opening, because a named pipe would block
        raise FileNotFoundError(f"{path} has changed since it was indexed")
    stream = image.ref.open()
    if isinstance(image.ref, FileImage) and format_file_version(os.fstat(stream.fileno())) != image.file_version:
        raise FileNotFoundError(f"{path} has changed since it was indexed")
    return stream
