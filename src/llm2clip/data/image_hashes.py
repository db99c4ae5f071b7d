"""Image hashes, used to find identical images and to record which images a model was trained on.

A hash covers an image's size and a short sample from the middle, so files are not read in full. To detect copies, only
images with the same hash are read in full; see `hash_contents`.

The hashes of the training images, 8 bytes each, are stored in the model folder as `training_images.npy`. They allow
`evaluate` to warn if a model is evaluated on its training images. The hashes do not depend on where an image is stored,
so copies of a data set are recognised. Neither images nor paths can be recovered from the hashes, but anyone with a
copy of an image can check whether the model was trained on it.
"""

import functools
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np

from llm2clip.data.image_refs import FileImage, ImageRef, TarImage, get_file_version, resolve_folder
from llm2clip.data.remote import get_file_size, open_file

TRAINING_IMAGES_FILE = "training_images.npy"
SAMPLE_BYTES = 1024
NUM_THREADS = 16  # many threads help on network file systems with high latency
ITEMS_PER_TASK = 32
CHUNK_BYTES = 1 << 20

S = TypeVar("S")
T = TypeVar("T")

Location = tuple[str, int, int]  # path, offset and size of the image


def hash_contents(images: Sequence[ImageRef | None]) -> list[bytes]:
    """Return the SHA-256 of all bytes of each image file or tar member, and b"" for images that cannot be read.

    The result is also b"" for empty images and for images in tables, whose keys are already hashes of their bytes.
    """
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return list(_map_in_chunks(pool, hash_content, images))


def hash_content(image: ImageRef | None) -> bytes:
    """Return the SHA-256 of all bytes of a single image. See `hash_contents`."""
    location = _locate(image) if isinstance(image, FileImage | TarImage) else None
    if location is None:
        return b""
    try:
        return _hash_range_cached(*location, get_file_version(location[0]))
    except OSError:
        return b""


def compute_image_hash(image: ImageRef) -> int:
    """Return the hash of a single image (see `hash_images`), or 0 if the image does not exist."""
    return int.from_bytes(_hash_image(image), "little")


def hash_image_sample(size: int, sample: bytes) -> int:
    """Return the hash of an image file or tar member from its size and its middle `SAMPLE_BYTES` bytes."""
    return int.from_bytes(_combine_hash(size, hashlib.sha256(sample).digest()), "little")


def hash_images(images: Iterable[ImageRef | None]) -> np.ndarray:
    """Return the sorted hashes of all distinct images as a uint64 array of shape (N,). Missing images are omitted.

    To avoid reading whole files, image files and tar members are hashed by their size and middle 1,024 bytes only.
    Images in tables are already identified by a hash of all their bytes.
    """
    refs = list({image.key: image for image in images if image is not None}.values())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        digests = [digest for digest in _map_in_chunks(pool, _hash_image, refs) if digest]
    return np.unique(np.frombuffer(b"".join(digests), dtype="<u8"))


def count_training_images(training_images: np.ndarray, images: Iterable[ImageRef | None]) -> int:
    """Count the distinct images whose hashes are in the sorted array `training_images`."""
    hashes = hash_images(images)
    positions = np.searchsorted(training_images, hashes)
    is_inside = positions < len(training_images)
    return int((training_images[positions[is_inside]] == hashes[is_inside]).sum())


def save_training_image_hashes(folder: Path, training_images: np.ndarray) -> None:
    """Save the hashes from `hash_images` in a model folder."""
    np.save(folder / TRAINING_IMAGES_FILE, training_images, allow_pickle=False)


def load_training_image_hashes(model: str | Path) -> np.ndarray | None:
    """Load a model's sorted training image hashes as a memory-mapped uint64 array of shape (N,).

    `model` is a model folder, or the Hub id of a downloaded model. Return None if the model has no hashes.

    Raises:
        ValueError: The hash file is corrupt.
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
            raise ValueError(f"it has dtype {hashes.dtype} and shape {hashes.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a valid array of image hashes ({error}). Delete this file") from error
    return hashes


def _hash_image(image: ImageRef) -> bytes:
    """Return 8 bytes that identify an image, or b"" if it does not exist."""
    if not isinstance(image, FileImage | TarImage):
        return hashlib.sha256(image.key.encode()).digest()[:8]
    location = _locate(image)
    sample = b"" if location is None else _hash_sample(location)
    if location is None or not sample:
        return b""
    return _combine_hash(location[2], sample)


def _combine_hash(size: int, sample: bytes) -> bytes:
    return hashlib.sha256(size.to_bytes(8, "little") + sample).digest()[:8]


def _map_in_chunks(pool: ThreadPoolExecutor, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
    """Apply a function to all items in a thread pool. Each task processes a chunk. Yield the results in order."""
    chunks = [items[start : start + ITEMS_PER_TASK] for start in range(0, len(items), ITEMS_PER_TASK)]
    for results in pool.map(lambda chunk: [function(item) for item in chunk], chunks):
        yield from results


def _locate(image: FileImage | TarImage) -> Location | None:
    """Return an image's location with symbolic links resolved, or None if the image is empty or missing."""
    path = resolve_folder(image.path)
    try:
        if os.path.islink(path):
            path = os.path.realpath(path)
        size = image.size if isinstance(image, TarImage) else get_file_size(path)
    except (OSError, ValueError):
        return None
    return (path, image.offset if isinstance(image, TarImage) else 0, size) if size else None


def _hash_sample(location: Location) -> bytes:
    """Return a hash of a few bytes from the middle of an image, or b"" if they cannot be read."""
    path, offset, size = location
    length = min(SAMPLE_BYTES, size)
    return _hash_range(path, offset + (size - length) // 2, length)


@functools.lru_cache(maxsize=1 << 16)
def _hash_range_cached(path: str, offset: int, size: int, version: object) -> bytes:
    return _hash_range(path, offset, size)


def _hash_range(path: str, start: int, length: int) -> bytes:
    digest = hashlib.sha256()
    try:
        with open_file(path) as file:
            file.seek(start)
            while length > 0:
                data = file.read(min(length, CHUNK_BYTES))
                if not data:
                    return b""
                digest.update(data)
                length -= len(data)
    except OSError:
        return b""
    return digest.digest()
