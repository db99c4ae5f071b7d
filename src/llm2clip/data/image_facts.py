"""Sizes and hashes of images, computed without decoding, and detection of duplicate images.

The hash of an image file covers its size and a sample of bytes from its middle. Files are compared by their full
contents only if their hashes are equal.

Model folders contain the hashes of the training images, so that `evaluate` can warn if a model is evaluated on its own
training images. Anyone who has an image can use the hashes to check whether a model was trained on that image.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import re
from collections.abc import Iterable
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from PIL import Image

from llm2clip.data.image_header import (
    MAX_PIXELS,
    START_BYTES,
    DecodingLimitError,
    ImageFormatError,
    open_image_header,
    parse_image_size,
)
from llm2clip.data.image_refs import IMAGE_KINDS, FileImage, ImageRef, LoadedImage, TarImage, get_file_version
from llm2clip.data.remote import file_exists, open_file
from llm2clip.data.skip_log import BadRowError
from llm2clip.data.storage import is_remote
from llm2clip.io_utils import FatalDataError, describe_error

if TYPE_CHECKING:
    from llm2clip.data.table import RecordTable

TRAINING_IMAGES_FILE = "training_images.npy"
SAMPLE_BYTES = 1024
NUM_THREADS = 16  # enough threads to hide the latency of network file systems
ITEMS_PER_TASK = 32
BATCH_IMAGES = 1 << 14  # maximum number of image references in memory at a time
MISSING_IMAGE, UNREADABLE_IMAGE, TOO_LARGE_IMAGE = "missing image", "unreadable image", "image too large"


class ImageFacts(NamedTuple):
    """Properties of an image that can be read without decoding its pixels. Unknown sizes and hashes are 0."""

    width: int = 0  # pixels
    height: int = 0
    hash: int = 0  # see `get_distinct_image_hashes`
    digest: bytes | None = None  # SHA-256 of a remote image; stored to avoid a second download


def read_image_facts(image: LoadedImage, check: bool, compute_hash: bool) -> ImageFacts:
    """Read the size of an image if `check` is True, and its hash if `compute_hash` is True.

    Raises:
        BadRowError: `check` is True, and the image is missing, unreadable or too large.
    """
    samples = _sample_image_bytes(image) if check or compute_hash else None
    width = height = image_hash = 0
    digest = None
    if check:
        if samples is None and type(image.ref) is FileImage and not file_exists(image.ref.path):
            is_url = is_remote(image.ref.path)
            raise BadRowError(MISSING_IMAGE, str(image.ref) if is_url else os.path.abspath(image.ref.path))
        size = parse_image_size(samples.start, samples.size) if samples is not None else None
        width, height = size or _read_size_with_pillow(image)
        if width * height > MAX_PIXELS:
            raise BadRowError(TOO_LARGE_IMAGE, f"{image.ref}: {width} x {height}")
    if compute_hash:
        image_hash = _hash_image(image.ref, samples)
        if samples is not None and isinstance(image.ref, FileImage | TarImage) and is_remote(image.ref.path):
            digest = hashlib.sha256(image.data).digest() if image.data else _hash_file_content(image.ref) or None
    return ImageFacts(width, height, image_hash, digest)


class _SampledImageBytes(NamedTuple):
    size: int  # size of the encoded image in bytes
    start: bytes  # first bytes of the image, or the entire image
    middle: bytes


def _sample_image_bytes(image: LoadedImage) -> _SampledImageBytes | None:
    """Read samples of an encoded image. Return None for unreadable files and for table cells that were not read."""
    if image.data is not None:
        size = len(image.data)
        start, length = _get_middle_byte_range(size)
        return _SampledImageBytes(size, image.data, image.data[start : start + length])
    ref = image.ref
    if not isinstance(ref, FileImage | TarImage):
        return None
    try:
        with open_file(ref.path) as file:
            offset, size = (ref.offset, ref.size) if isinstance(ref, TarImage) else (0, file.seek(0, os.SEEK_END))
            start, length = _get_middle_byte_range(size)
            file.seek(offset)
            first = file.read(min(size, max(START_BYTES, length)))
            if size <= len(first):
                return _SampledImageBytes(size, first, first[start : start + length])
            file.seek(offset + start)
            middle = file.read(length)
    except FatalDataError:
        raise
    except (OSError, ValueError):
        return None
    return _SampledImageBytes(size, first, middle) if len(middle) == length else None


def _get_middle_byte_range(size: int) -> tuple[int, int]:
    length = min(SAMPLE_BYTES, size)
    return (size - length) // 2, length


def _read_size_with_pillow(image: LoadedImage) -> tuple[int, int]:
    try:
        with io.BytesIO(image.data) if image.data is not None else image.ref.open() as stream:
            return open_image_header(stream).size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow has its own pixel limit
        raise BadRowError(TOO_LARGE_IMAGE, f"{image.ref}: {error}") from error
    except FatalDataError:
        raise
    except Exception as error:  # malicious files can make Pillow raise any type of exception
        is_complete = isinstance(error, ImageFormatError | DecodingLimitError | OSError)
        reason = str(error) if is_complete else describe_error(error)
        raise BadRowError(UNREADABLE_IMAGE, f"{image.ref}: {reason}") from error


# ---- hashes ----------------------------------------------------------------------------------------------------------


def get_distinct_image_hashes(images: Iterable[ImageRef | None]) -> np.ndarray:
    """Return the sorted hashes of all distinct images as a uint64 array of shape (N,). Missing images are omitted.

    The hash of an image file or tar member covers its size and its middle 1,024 bytes. The hash of an image in a table
    covers all of its bytes.
    """
    refs = list({image.key: image for image in images if image is not None}.values())
    with ThreadPool(NUM_THREADS) as pool:
        hashes = np.array(pool.map(_hash_image, refs, ITEMS_PER_TASK), np.uint64)
    return np.unique(hashes[hashes > 0])


def count_training_images(training_images: np.ndarray, images: Iterable[ImageRef | None]) -> int:
    """Count the distinct images whose hashes are in the sorted array `training_images`."""
    hashes = get_distinct_image_hashes(images)
    positions = np.searchsorted(training_images, hashes)
    is_inside = positions < len(training_images)
    return int((training_images[positions[is_inside]] == hashes[is_inside]).sum())


def save_training_image_hashes(folder: Path, training_images: np.ndarray) -> None:
    np.save(folder / TRAINING_IMAGES_FILE, training_images, allow_pickle=False)


def load_training_image_hashes(model: str | Path) -> np.ndarray | None:
    """Load the sorted hashes of a model's training images, of shape (N,), uint64.

    `model` is a folder or the name of a downloaded Hub repository. Return None if the model has no hashes. Raise
    ValueError if the hashes are corrupt.
    """
    from huggingface_hub import try_to_load_from_cache

    file = Path(model) / TRAINING_IMAGES_FILE
    if not Path(model).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        file = Path(str(try_to_load_from_cache(str(model), TRAINING_IMAGES_FILE)))
    if not file.is_file():
        return None
    try:
        hashes = np.load(file, mmap_mode="r", allow_pickle=False)
        if hashes.dtype != np.dtype("<u8") or hashes.ndim != 1:
            raise ValueError(f"dtype {hashes.dtype}, shape {hashes.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a valid array of image hashes ({error}). Delete the file") from error
    return hashes


def _hash_image(image: ImageRef, samples: _SampledImageBytes | None = None) -> int:
    """Return a 64-bit hash of an image, or 0 if the image is empty or missing."""
    if not isinstance(image, FileImage | TarImage):
        return int.from_bytes(hashlib.sha256(image.key.encode()).digest()[:8], "little")
    samples = samples or _sample_image_bytes(LoadedImage(image, None))
    if samples is None or not samples.size:
        return 0
    digest = hashlib.sha256(samples.size.to_bytes(8, "little") + hashlib.sha256(samples.middle).digest())
    return int.from_bytes(digest.digest()[:8], "little")


def _hash_file_content(image: ImageRef | None) -> bytes:
    if not isinstance(image, FileImage | TarImage):
        return b""
    path = image.path if is_remote(image.path) else os.path.realpath(image.path)
    try:
        return _hash_file_content_cached(replace(image, path=path), get_file_version(path))
    except OSError:
        return b""


@functools.lru_cache(maxsize=1 << 16)
def _hash_file_content_cached(image: FileImage | TarImage, version: object) -> bytes:
    with image.open() as stream:
        digest = hashlib.file_digest(cast(Any, stream), "sha256").digest()
    return b"" if digest == hashlib.sha256().digest() else digest


# ---- duplicates ------------------------------------------------------------------------------------------------------


def find_matching_images(records: RecordTable, candidates: RecordTable) -> np.ndarray:
    """Return a boolean mask of shape (N,) that selects the candidates whose image also occurs in `records`.

    Image files with identical bytes are treated as the same image.
    """
    keys = [table.get_numeric_column("key_high") for table in (records, candidates)]
    is_same = candidates.has_image & np.isin(keys[1], keys[0][records.has_image])
    known_hashes, candidate_hashes = _get_file_hashes(records), _get_file_hashes(candidates)
    shared = np.intersect1d(known_hashes, candidate_hashes)
    shared = shared[shared > 0]
    positions = np.flatnonzero(np.isin(candidate_hashes, shared))
    known = _hash_image_contents(records, np.flatnonzero(np.isin(known_hashes, shared)))
    first = find_first_occurrences(*np.concatenate([known, _hash_image_contents(candidates, positions)], axis=1))
    num_known = known.shape[1]
    is_same[positions[first[num_known:] < num_known]] = True
    return is_same


def find_first_occurrences(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return, for each of N rows, the index of the first row with the same key, of shape (N,), int64.

    `high` and `low` contain the upper and lower 64 bits of each 128-bit key, of shape (N,), uint64. Rows with key 0 do
    not match any other row.
    """
    order = np.argsort(high, kind="stable")
    is_same = high[order[1:]] == high[order[:-1]]
    is_equal = is_same & (low[order[1:]] == low[order[:-1]])
    if not np.array_equal(is_same, is_equal):  # if distinct keys share their upper 64 bits, sort by all 128 bits
        order = np.lexsort((low, high))
        is_equal = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    is_equal &= (high[order[1:]] > 0) | (low[order[1:]] > 0)
    is_first = np.concatenate([np.ones(min(1, len(high)), bool), ~is_equal])
    first = np.empty(len(high), np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first


def find_duplicate_images(table: RecordTable, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find images with different keys but identical bytes.

    Args:
        first: For each row, the first row with the same image key, of shape (N,). See `find_first_occurrences`.

    Returns:
        The first row of each duplicate image, and the first row of its original, both of shape (D,), int64.
    """
    hashes = _get_file_hashes(table)
    hashes[first != np.arange(len(first))] = 0
    values, counts = np.unique(hashes[hashes > 0], return_counts=True)
    rows = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    originals = rows[find_first_occurrences(*_hash_image_contents(table, rows))]
    is_copy = originals != rows
    return rows[is_copy], originals[is_copy]


def _hash_image_contents(table: RecordTable, positions: np.ndarray) -> np.ndarray:
    """Return the first 128 bits of the SHA-256 of each image's bytes, as a uint64 array of shape (2, N).

    The hash is 0 for empty and unreadable images. Images whose digest is stored in the record table are not read again.
    """
    hashes = np.empty((2, len(positions)), np.uint64)
    for start in range(0, len(positions), BATCH_IMAGES):
        records = table.select(positions[start : start + BATCH_IMAGES])
        digests = records.column("digest").to_pylist()
        unknown = [n for n, digest in enumerate(digests) if digest is None]
        images = list(records.select(np.array(unknown, int)).get_images())
        with ThreadPool(NUM_THREADS) as pool:
            for n, digest in zip(unknown, pool.map(_hash_file_content, images, ITEMS_PER_TASK), strict=True):
                digests[n] = digest
        data = b"".join(digest[:16].ljust(16, b"\0") for digest in digests)
        hashes[:, start : start + len(digests)] = np.frombuffer(data, ">u8").reshape(-1, 2).T
    return hashes


def _get_file_hashes(table: RecordTable) -> np.ndarray:
    """Return the stored hash of each image file and tar member, and 0 for other images, of shape (N,), uint64."""
    hashes, kinds = table.get_numeric_column("image_hash"), table.get_numeric_column("image_kind")
    kinds_with_hash = [number for number, kind in enumerate(IMAGE_KINDS) if kind.has_file_name]
    hashes[~np.isin(kinds, kinds_with_hash)] = 0
    return hashes
