"""Hashes of the images on which a model was trained, so that `evaluate` can warn if it is evaluated on some of them.

They are stored in the model folder, in `training_images.npy`, with 8 bytes per image. The hashes do not depend on the
location of an image, so copies of a data set are recognised. They contain neither images nor paths, but with an
image, you can check if the model was trained on it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from huggingface_hub import try_to_load_from_cache

from llm2clip.data.image_copies import NUM_THREADS, locate, map_in_chunks, sample_digest
from llm2clip.data.image_refs import FileImage, ImageRef, TarImage

TRAINING_IMAGES_FILE = "training_images.npy"


def hash_images(images: Iterable[ImageRef | None]) -> np.ndarray:
    """Return the sorted hashes of distinct images, uint64 (N,). Images that do not exist are omitted.

    The hash of an image file or a member of a tar file is computed from its size and 1,024 bytes from its middle, so
    that few bytes are read. Images in tables are already identified by a hash of all their bytes.
    """
    refs = list({image.key: image for image in images if image is not None}.values())
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        digests = [digest for digest in map_in_chunks(pool, _content_digest, refs) if digest]
    return np.unique(np.frombuffer(b"".join(digests), dtype="<u8"))


def count_training_images(training_images: np.ndarray, images: Iterable[ImageRef | None]) -> int:
    """Return the number of distinct images on which the model was trained.

    Args:
        training_images: Sorted hashes of the training images, uint64 (N,). See `hash_images`.
        images: Images on which the model is evaluated.
    """
    hashes = hash_images(images)
    positions = np.searchsorted(training_images, hashes)
    is_inside = positions < len(training_images)
    return int((training_images[positions[is_inside]] == hashes[is_inside]).sum())


def save_training_images(folder: Path, training_images: np.ndarray) -> None:
    """Write sorted hashes, uint64 (N,), to a model folder."""
    np.save(folder / TRAINING_IMAGES_FILE, training_images, allow_pickle=False)


def load_training_images(model: str | Path) -> np.ndarray | None:
    """Return the hashes of a model's training images, uint64 (N,), memory-mapped.

    Args:
        model: Model folder, or hub id of a model that has been downloaded.

    Returns:
        None if there is no such file, so that the training images are unknown.

    Raises:
        ValueError: The file is damaged.
    """
    file = Path(model) / TRAINING_IMAGES_FILE
    if not Path(model).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(model)):
        file = Path(str(try_to_load_from_cache(str(model), TRAINING_IMAGES_FILE)))
    if not file.is_file():
        return None
    try:
        hashes = np.load(file, mmap_mode="r", allow_pickle=False)
        if hashes.dtype != np.dtype("<u8") or hashes.ndim != 1:
            raise ValueError(f"the array has dtype {hashes.dtype} and shape {hashes.shape}")
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a list of image hashes ({error}): delete this file") from error
    return hashes


def _content_digest(image: ImageRef) -> bytes:
    """Return 8 bytes that identify an image, or b"" if it does not exist."""
    if not isinstance(image, FileImage | TarImage):
        return hashlib.sha256(image.key.encode()).digest()[:8]
    location = locate(image)
    sample = b"" if location is None else sample_digest(location)
    if location is None or not sample:
        return b""
    return hashlib.sha256(location[2].to_bytes(8, "little") + sample).digest()[:8]
