"""Access to the original image file of a search result, if it has not changed since it was indexed."""

from __future__ import annotations

import os
from typing import BinaryIO

from PIL import Image

from llm2clip.data.image_header import open_header
from llm2clip.data.image_refs import FileImage
from llm2clip.search.backends import Backend
from llm2clip.search.scan import container_version, format_file_version
from llm2clip.search.types import IndexedImage


def open_original(backend: Backend, hit_id: str) -> tuple[BinaryIO, str]:
    """Open the image file of a hit; return the stream and the media type.

    If the hit has several files, use the first one that has not changed since it was indexed.

    Raises:
        FileNotFoundError: The id is unknown, or all files of the hit have been changed or removed.
    """
    for image in backend.images(hit_id):
        try:
            stream = _open_unchanged(image)
            header = open_header(stream)
        except Exception:  # Pillow can raise almost any exception for a damaged header
            continue
        media_type = Image.MIME.get(header.format or "", "")
        if media_type.startswith("image/"):
            stream.seek(0)
            return stream, media_type
    raise FileNotFoundError(
        f"the index contains no image with id {hit_id}, or the image file has been changed or removed since it was "
        "indexed"
    )


def _open_unchanged(image: IndexedImage) -> BinaryIO:
    """Open an image.

    Raises:
        FileNotFoundError: The file no longer exists or has been replaced by another file.
    """
    path = image.ref.container_path or ""
    if container_version(path) != image.file_version:  # checked first, because opening a named pipe would block
        raise FileNotFoundError(f"{path} has changed since it was indexed")
    stream = image.ref.open()
    if isinstance(image.ref, FileImage) and format_file_version(os.fstat(stream.fileno())) != image.file_version:
        raise FileNotFoundError(f"{path} has changed since it was indexed")
    return stream
