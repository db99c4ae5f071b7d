"""Order in which training reads the images of an epoch. It depends only on the data, the seed and the epoch.

Two orders exist. In a random order, consecutive images lie anywhere in the data, which is fast on an SSD. In a shard
order, shards (tar or Parquet files) are read in random order, a window of shards at a time, and the images of a window
are shuffled. Slow disks, network file systems and object storage then read each shard only once per epoch.
"""

from collections.abc import Iterator

import numpy as np

WINDOW = 16  # number of shards whose images are shuffled together


def draw_random_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return a permutation of all images, of shape (num_images,).

    The dtype is int32, or int64 if there are 2^31 or more images. Drawing the order takes no other memory.
    """
    order = np.arange(num_images, dtype=_choose_dtype(num_images))
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def draw_shard_order(shard_of_image: np.ndarray, seed: int, epoch: int, window: int = WINDOW) -> np.ndarray:
    """Return a permutation of all images in which the images of a window of shards are consecutive.

    Args:
        shard_of_image: Shard number of each image, of shape (N,), non-negative integers.
        window: Number of shards whose images are shuffled together. The last window may have fewer shards.

    Returns:
        Image numbers of shape (N,), with the same dtype as those of `draw_random_order`.
    """
    rng = np.random.default_rng([seed, epoch])
    counts = np.bincount(shard_of_image)
    starts = np.concatenate([[0], np.cumsum(counts)])
    images_by_shard = np.argsort(shard_of_image, kind="stable").astype(_choose_dtype(len(shard_of_image)))
    shards = rng.permutation(np.flatnonzero(counts))
    windows = [np.empty(0, images_by_shard.dtype)]
    for first in range(0, len(shards), window):
        parts = [images_by_shard[starts[shard] : starts[shard + 1]] for shard in shards[first : first + window]]
        windows.append(rng.permutation(np.concatenate(parts)))
    return np.concatenate(windows)


def list_upcoming_shards(
    order: np.ndarray, shard_of_image: np.ndarray, start: int, max_shards: int = 2 * WINDOW
) -> list[int]:
    """List the next shards that contain images of `order[start:]`, in the order in which they are first needed."""
    shards: dict[int, None] = {}  # a dict, because a set has no order
    for chunk in _iterate_chunks(order[start:]):
        shards_of_chunk, first_position = np.unique(shard_of_image[chunk], return_index=True)
        shards.update(dict.fromkeys(shards_of_chunk[np.argsort(first_position)].tolist()))
        if len(shards) >= max_shards:
            break
    return list(shards)[:max_shards]


def _iterate_chunks(order: np.ndarray, size: int = 1 << 16) -> Iterator[np.ndarray]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _choose_dtype(num_images: int) -> type[np.signedinteger]:
    return np.int32 if num_images < 1 << 31 else np.int64
