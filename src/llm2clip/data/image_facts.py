"""Checks of images without decoding them: size in pixels and hash, from a few kilobytes of each file."""

import hashlib
import io
import os
import stat
from typing import NamedTuple

from PIL import Image

from llm2clip.data.columns import UnusableRow
from llm2clip.data.image_hashes import SAMPLE_BYTES, compute_image_hash, hash_content, hash_image_sample
from llm2clip.data.image_header import (
    MAX_PIXELS,
    START_BYTES,
    DecodingLimitError,
    ImageFormatError,
    open_header,
    parse_image_size,
)
from llm2clip.data.image_refs import FileImage, LoadedImage, TarImage
from llm2clip.data.remote import file_exists, get_local_path, is_remote
from llm2clip.io_utils import FatalDataError, describe_error

_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)  # does not wait for a named pipe
MISSING_IMAGE, UNREADABLE_IMAGE, TOO_LARGE_IMAGE = "missing image", "unreadable image", "image too large"


class ImageFacts(NamedTuple):
    """What reading an image without decoding it shows.

    Attributes:
        width, height: Size in pixels, or 0 if it is not known.
        hash: See `image_hashes.hash_images`; 0 if it is not known.
        digest: SHA-256 of all bytes, only for images in object storage. To compare such images later, they would have
            to be downloaded again.
    """

    width: int = 0
    height: int = 0
    hash: int = 0
    digest: bytes | None = None


def read_image_facts(
    image: LoadedImage, check_exists: bool = True, check_header: bool = True, compute_hash: bool = True
) -> ImageFacts:
    """Check an image and return its size and hash.

    Args:
        check_exists: Whether an image file must exist.
        check_header: Whether the image must be readable, judging from its header, and not too large. If False, the size
            in the result is 0.
        compute_hash: Whether to compute the hash.

    Raises:
        UnusableRow: The image cannot be used.
    """
    samples = _read_samples(image) if check_header or compute_hash else None
    if samples is None and check_exists and type(image.ref) is FileImage and not file_exists(image.ref.path):
        is_url = is_remote(image.ref.path)
        raise UnusableRow(MISSING_IMAGE, str(image.ref) if is_url else os.path.abspath(image.ref.path))
    width = height = image_hash = 0
    digest = None
    if check_header:
        size = parse_image_size(samples.start, samples.size) if samples is not None else None
        width, height = size or _read_size_with_pillow(image)
        if width * height > MAX_PIXELS:
            raise UnusableRow(TOO_LARGE_IMAGE, f"{image.ref}: {width} x {height}")
    if compute_hash and samples is not None and isinstance(image.ref, FileImage | TarImage):
        image_hash = hash_image_sample(samples.size, samples.middle) if samples.size else 0
        if is_remote(image.ref.path):
            digest = hashlib.sha256(image.data).digest() if image.data else hash_content(image.ref) or None
    elif compute_hash:
        image_hash = compute_image_hash(image.ref)
    return ImageFacts(width, height, image_hash, digest)


class _Samples(NamedTuple):
    """Parts of an image's bytes."""

    size: int  # size of the image in bytes
    start: bytes  # at least the first bytes
    middle: bytes


def _read_samples(image: LoadedImage) -> _Samples | None:
    """Return parts of an image's bytes. Return None for other references, and for files that cannot be read."""
    if image.data is not None:
        size = len(image.data)
        start, length = _locate_middle(size)
        return _Samples(size, image.data, image.data[start : start + length])
    ref = image.ref
    if not isinstance(ref, FileImage | TarImage):
        return None
    try:
        file = os.open(get_local_path(ref.path), _OPEN_FLAGS)
    except FatalDataError:
        raise
    except (OSError, ValueError):
        return None
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            return None
        offset, size = (ref.offset, ref.size) if isinstance(ref, TarImage) else (0, status.st_size)
        start, length = _locate_middle(size)
        first = _read_range(file, offset, min(size, max(START_BYTES, length)))
        middle = first[start : start + length]
        if start + length > len(first):
            middle = _read_range(file, offset + start, length)
        return _Samples(size, first, middle) if len(middle) == length else None
    except OSError:
        return None
    finally:
        os.close(file)


def _locate_middle(size: int) -> tuple[int, int]:
    """Return the position and length of the middle part of an image that is hashed."""
    length = min(SAMPLE_BYTES, size)
    return (size - length) // 2, length


def _read_range(file: int, start: int, length: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    return os.read(file, length)


def _read_size_with_pillow(image: LoadedImage) -> tuple[int, int]:
    """Return the width and height of an image. Raise `UnusableRow` if Pillow cannot open it."""
    try:
        with io.BytesIO(image.data) if image.data is not None else image.ref.open() as stream:
            return open_header(stream).size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow has its own limits
        raise UnusableRow(TOO_LARGE_IMAGE, f"{image.ref}: {error}") from error
    except FatalDataError:
        raise
    except Exception as error:  # malicious bytes can make Pillow's plugins raise any type of exception
        is_complete = isinstance(error, ImageFormatError | DecodingLimitError | OSError)
        reason = str(error) if is_complete else describe_error(error)
        raise UnusableRow(UNREADABLE_IMAGE, f"{image.ref}: {reason}") from error
