"""Key index of a store, which maps caption keys to row numbers without loading the keys into memory.

The index is a uint64 array of shape (3, N), sorted by key. Each 16-byte key is split into two uint64 halves. The three
rows of the array contain the first halves of the keys, the second halves, and the row numbers in the store. The array
is memory-mapped, so a lookup touches only a few pages. It takes 24 bytes per caption, compared with a few thousand
bytes for an embedding.

The index is built with an external sort, which the writer also uses to find duplicate captions. `split_by_key` writes
the keys to `NUM_PARTITIONS` files such that equal keys are in the same file, and `sort_partitions` loads and sorts one
file at a time.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llm2clip.io_utils import atomic_path

PARTITION_BITS = 6
NUM_PARTITIONS = 1 << PARTITION_BITS  # sorting 100 million keys takes about 100 MB of memory
RECORD_BYTES = 24  # size of a record: a key and its position, as three uint64 values


class KeyIndex:
    """Memory-mapped index file of a store."""

    def __init__(self, file: Path) -> None:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or len(array) != 3 or array.dtype != np.uint64:
            raise ValueError(f"{file} is not a key index")
        self.high, self.low, self.row = array

    def __len__(self) -> int:
        return len(self.high)

    def find_keys(self, keys: np.ndarray) -> np.ndarray:
        """Look up keys of shape (N, 16), uint8; return row numbers of shape (N,), int64.

        The row number of a missing key is -1. If a key has several rows, the first row is returned.
        """
        high, low = split_keys(keys)
        rows = np.full(len(keys), -1, np.int64)
        pending = np.argsort(high)  # in sorted order, consecutive lookups touch the same pages
        position = np.searchsorted(self.high, high[pending])
        # Each iteration compares one entry per pending key. Only keys with equal first halves need several iterations.
        while len(pending):
            in_range = position < len(self)
            pending, position = pending[in_range], position[in_range]
            same_high = self.high[position] == high[pending]
            pending, position = pending[same_high], position[same_high]
            match = self.low[position] == low[pending]
            rows[pending[match]] = self.row[position[match]].astype(np.int64)
            pending, position = pending[~match], position[~match] + 1
        return rows


def build_key_index(file: Path, keys: Iterable[np.ndarray]) -> int:
    """Write the index of a store's keys to `file` atomically; return the number of distinct keys.

    Args:
        file: Path of the index. It must end in .npy.
        keys: Keys of all rows in the store, in row order, as uint8 chunks of shape (N, 16).
    """
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as partition_folder:
        partitions = split_by_key(_add_row_numbers(keys), Path(partition_folder))
        count = sum(partition.stat().st_size for partition in partitions) // RECORD_BYTES
        with atomic_path(file) as temporary:
            index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(3, count))
            _allocate_on_disk(temporary)
            start, distinct = 0, 0
            for records in sort_partitions(partitions):
                index[:, start : start + len(records)] = records.T
                start += len(records)
                distinct += len(records) - int(mask_repeated_keys(records).sum())
            index.flush()
            del index  # close the memory map
    return distinct


def _add_row_numbers(keys: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (keys, row numbers of shape (N,), uint64) for each chunk. Row numbers continue across chunks."""
    start = 0
    for chunk in keys:
        yield chunk, np.arange(start, start + len(chunk), dtype=np.uint64)
        start += len(chunk)


def _allocate_on_disk(file: Path) -> None:
    """Allocate disk space for a file, so that a full disk raises OSError here instead of causing SIGBUS later."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


# ---- external sort -------------------------------------------------------------------------------------------------


def split_by_key(chunks: Iterable[tuple[np.ndarray, np.ndarray]], folder: Path) -> list[Path]:
    """Partition keys and positions by the keys' first bits into `NUM_PARTITIONS` files; return the files' paths.

    A record consists of three uint64 values: the first half of the key, the second half, and the position.

    Args:
        chunks: Tuples (keys, positions). Keys have shape (N, 16), uint8, and positions have shape (N,), uint64.
            Positions must increase across all chunks.
    """
    partitions = [folder / f"partition-{number:02d}" for number in range(NUM_PARTITIONS)]
    with ExitStack() as stack:
        streams = [stack.enter_context(partition.open("wb")) for partition in partitions]
        for keys, positions in chunks:
            records = np.stack([*split_keys(keys), positions], axis=1)
            number = (records[:, 0] >> np.uint64(64 - PARTITION_BITS)).astype(np.uint8)
            records = records[np.argsort(number, kind="stable")]
            ends = np.cumsum(np.bincount(number, minlength=NUM_PARTITIONS))
            for stream, part in zip(streams, np.split(records, ends[:-1]), strict=True):
                stream.write(part.data)
    return partitions


def sort_partitions(partitions: Iterable[Path]) -> Iterator[np.ndarray]:
    """Sort the records in the files from `split_by_key`. Delete each file after reading it.

    Yields:
        Uint64 arrays of shape (N, 3), which together contain all records, sorted by key and then by position. Records
        with equal keys are in the same array.
    """
    for partition in partitions:
        records = np.fromfile(partition, np.uint64).reshape(-1, 3)
        partition.unlink()
        # Positions are not used as a sort key, because lexsort is stable and positions increase within the file.
        yield records[np.lexsort((records[:, 1], records[:, 0]))]


def mask_repeated_keys(records: np.ndarray) -> np.ndarray:
    """Return a boolean mask of shape (N,): True for each sorted record with the same key as the previous one."""
    repeats = np.zeros(len(records), np.bool_)
    repeats[1:] = (records[1:, :2] == records[:-1, :2]).all(axis=1)
    return repeats


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split keys of shape (N, 16), uint8, into two halves of shape (N,), uint64, that preserve the sort order."""
    halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]
