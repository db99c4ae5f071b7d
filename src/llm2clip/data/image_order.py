"""Order of the images in each training epoch, which depends only on the data, the seed and the epoch.

The images are either permuted randomly or grouped by shard (tar or Parquet file). To group the images, the shards are
shuffled and divided into windows of several shards, and the images in each window are shuffled. Each remote shard is
then downloaded only once per epoch.
"""

import os
from itertools import chain
from typing import Literal, cast

import numpy as np

from llm2clip.data.image_refs import IMAGE_KINDS, ParquetImage, TarImage
from llm2clip.data.remote import prefetch_remote_files
from llm2clip.data.storage import is_remote
from llm2clip.data.table import RecordTable

ImageOrder = Literal["random", "shards"]
WINDOW = 16  # number of shards whose images are shuffled together
SHARD_KINDS = [IMAGE_KINDS.index(kind) for kind in (TarImage, ParquetImage)]


class EpochImageOrders:
    """Training order of the images in each epoch, as a sequence of record indices."""

    def __init__(
        self,
        records: RecordTable,
        is_usable: np.ndarray,
        seed: int,
        image_order: ImageOrder | None = None,
        read_images: bool = True,
    ) -> None:
        """
        Args:
            is_usable: Boolean mask of shape (N,) that selects the records to use, all of which must have an image.
            read_images: If True, download remote shards in advance.
        """
        self.image_order = image_order or choose_image_order(records)
        self.seed, self.num_images = seed, int(is_usable.sum())
        self._usable: np.ndarray | None = None  # indices of the records to use; None for all records
        if self.num_images < len(records):
            self._usable = np.flatnonzero(is_usable).astype(_choose_index_dtype(len(records)))
        self._shard_of_image, self._shards = np.empty(0, np.int32), _list_container_paths(records)
        self._should_prefetch = read_images and any(map(is_remote, self._shards))
        self._next_prefetch = 0
        if self.image_order == "shards":
            self._shard_of_image, self._shards = compute_shard_indices(records)
            if self._usable is not None:
                self._shard_of_image = self._shard_of_image[self._usable]
        self._epoch, self._order = -1, np.empty(0, np.int32)

    def take(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the indices of the records at positions `start` to `stop - 1` of an epoch."""
        if epoch != self._epoch:
            self._order = np.empty(0, np.int32)  # frees memory before the new order is drawn
            self._epoch = epoch
            if self.image_order == "shards":
                self._order = sample_shard_image_order(self._shard_of_image, self.seed, epoch)
            else:
                self._order = draw_random_image_order(self.num_images, self.seed, epoch)
            self._next_prefetch = 0
        if self._should_prefetch and start >= self._next_prefetch:
            self._prefetch_upcoming_shards(start)
        images = self._order[start:stop]
        return images if self._usable is None else self._usable[images]

    def _prefetch_upcoming_shards(self, start: int) -> None:
        """Start downloading the next remote shards. Update the position at which the next download must start."""
        if self.image_order == "shards":
            upcoming = list_upcoming_shards(self._order, self._shard_of_image, start)
            prefetch_remote_files([self._shards[shard] for shard in upcoming])
            self._next_prefetch = start + max(1, self.num_images // len(self._shards))
            return
        if len(self._shards) <= WINDOW:  # a larger number of shards may not fit in the cache
            prefetch_remote_files(self._shards)
        self._next_prefetch = self.num_images


def draw_random_image_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Return a random permutation of the image indices, of shape (num_images,), int32 or (if necessary) int64."""
    order = np.arange(num_images, dtype=_choose_index_dtype(num_images))
    np.random.default_rng([seed, epoch]).shuffle(order)
    return order


def sample_shard_image_order(shard_of_image: np.ndarray, seed: int, epoch: int, window: int = WINDOW) -> np.ndarray:
    """Return a random permutation of N image indices in which the images of each window of shards are consecutive.

    `shard_of_image` contains the shard index of each image, of shape (N,). `window` is the number of shards per window.
    """
    rng = np.random.default_rng([seed, epoch])
    counts = np.bincount(shard_of_image)
    starts = np.concatenate([[0], np.cumsum(counts)])
    images_by_shard = np.argsort(shard_of_image, kind="stable").astype(_choose_index_dtype(len(shard_of_image)))
    shards = rng.permutation(np.flatnonzero(counts))
    windows = [np.empty(0, images_by_shard.dtype)]
    for first in range(0, len(shards), window):
        parts = [images_by_shard[starts[shard] : starts[shard + 1]] for shard in shards[first : first + window]]
        windows.append(rng.permutation(np.concatenate(parts)))
    return np.concatenate(windows)


def list_upcoming_shards(
    order: np.ndarray, shard_of_image: np.ndarray, start: int, max_shards: int = 2 * WINDOW
) -> list[int]:
    """List the next shards that contain images in `order[start:]`, ordered by their first use."""
    shards: dict[int, None] = {}  # a dict keeps insertion order, unlike a set
    for position in range(start, len(order), 1 << 16):
        shards_of_chunk, first_position = np.unique(
            shard_of_image[order[position : position + (1 << 16)]], return_index=True
        )
        shards.update(dict.fromkeys(shards_of_chunk[np.argsort(first_position)].tolist()))
        if len(shards) >= max_shards:
            break
    return list(shards)[:max_shards]


def compute_shard_indices(records: RecordTable) -> tuple[np.ndarray, list[str]]:
    """Return the shard index of each record's image as an int32 array of shape (N,), and the paths of all shards."""
    record_batches, paths = records.record_batches, _list_container_paths(records)
    number_of_path = {path: number for number, path in enumerate(paths)}
    # shard index of each container, concatenated over the batches
    shard_of_container = np.array([number_of_path[path] for path in chain(*record_batches.containers)], np.int32)
    first_container = np.cumsum([0, *map(len, record_batches.containers)])
    parts = [np.empty(0, np.int32)]
    start = 0
    for batch in records.iterate_batches(["container"]):
        rows = records.rows[start : start + batch.num_rows]
        batch_of_row = np.searchsorted(record_batches.starts, rows, side="right") - 1
        parts.append(shard_of_container[first_container[batch_of_row] + batch.column(0).to_numpy()])
        start += batch.num_rows
    return np.concatenate(parts), paths


def _list_container_paths(records: RecordTable) -> list[str]:
    return list(dict.fromkeys(chain(*records.record_batches.containers)))


# ---- order selection -------------------------------------------------------------------------------------------------


def choose_image_order(records: RecordTable) -> ImageOrder:
    """Return "shards" if all images are in tar or Parquet files (more than `WINDOW`, at least one of them remote).

    Otherwise, return "random". The environment variable LLM2CLIP_IMAGE_ORDER overrides the choice, for example if local
    files are on a slow hard disk.
    """
    forced = os.environ.get("LLM2CLIP_IMAGE_ORDER")
    if forced:
        if forced not in ("random", "shards"):
            raise ValueError(f"LLM2CLIP_IMAGE_ORDER must be random or shards (got {forced})")
        return cast(ImageOrder, forced)
    paths = _list_container_paths(records)
    if len(paths) <= WINDOW or not np.isin(records.get_numeric_column("image_kind"), SHARD_KINDS).all():
        return "random"
    return "shards" if any(map(is_remote, paths)) else "random"


def _choose_index_dtype(num_images: int) -> type[np.signedinteger]:
    return np.int32 if num_images < 1 << 31 else np.int64
