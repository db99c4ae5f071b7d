"""Key index of a store: maps the key of a caption to its row, with memory that does not grow with the number of keys.

A key has 16 bytes, handled as two uint64 halves. The index is one array (3, N) uint64, sorted by key: first halves,
second halves, rows. It is memory-mapped: a lookup touches only a few pages. Its size is 24 bytes per caption; the
embedding takes a few thousand.

The index is built by an external sort, which `dedup` also uses:

1. `write_records` appends every key with its position to a file of records.
2. `sorted_partitions` splits that file into partitions by the first bits of the keys, so that each fits in memory and
   equal keys meet in the same partition. It then sorts one partition after the other.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llm2clip.io_utils import atomic_path

PARTITION_SIZE = 1 << 22  # records sorted at once: 100 MB, and as much again for sorting


class KeyIndex:
    """A memory-mapped index file."""

    def __init__(self, file: Path) -> None:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or len(array) != 3 or array.dtype != np.uint64:
            raise ValueError(f"{file} is not a key index")
        self.high, self.low, self.row = array

    def __len__(self) -> int:
        return len(self.high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Look up keys, (N, 16) uint8; return their rows, (N,) int64.

        The row is -1 for a key that is not in the index, and the first row for a key with several.
        """
        high, low = split_keys(keys)
        rows = np.full(len(keys), -1, np.int64)
        pending = np.argsort(high)  # in sorted order, neighbouring lookups touch the same pages
        position = np.searchsorted(self.high, high[pending])
        # Each round compares one entry per pending key. More than one round is needed only where the first halves are
        # equal and the second halves differ.
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
        file: Path of the index, ending in .npy.
        keys: Keys of all rows in order, in chunks of (n, 16) uint8.
    """
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as temporary_folder:
        records = Path(temporary_folder) / "records"
        count = write_records(_with_row_numbers(keys), records)
        with atomic_path(file) as temporary:
            index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(3, count))
            _allocate_on_disk(temporary)
            start, distinct = 0, 0
            for partition in sorted_partitions(records, count):
                index[:, start : start + len(partition)] = partition.T
                start += len(partition)
                repeated = (partition[1:, :2] == partition[:-1, :2]).all(axis=1)
                distinct += len(partition) - int(repeated.sum())
            index.flush()
            del index  # closes the map
    return distinct


def _with_row_numbers(keys: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield each chunk of keys with its row numbers, uint64, counted over all chunks."""
    start = 0
    for chunk in keys:
        yield chunk, np.arange(start, start + len(chunk), dtype=np.uint64)
        start += len(chunk)


def _allocate_on_disk(file: Path) -> None:
    """Allocate the blocks of a file, so that a full disk raises OSError here; writing to the map would be a SIGBUS."""
    if hasattr(os, "posix_fallocate"):
        with file.open("r+b") as stream:
            os.posix_fallocate(stream.fileno(), 0, file.stat().st_size)


# ---- external sort -------------------------------------------------------------------------------------------------


def write_records(chunks: Iterable[tuple[np.ndarray, np.ndarray]], file: Path) -> int:
    """Write records (first half of the key, second half, position) to a file; return their number.

    Args:
        chunks: Keys (n, 16) uint8 with their positions (n,) uint64. Positions must increase over all chunks.
        file: File to write: an array (number of records, 3) uint64 without header.
    """
    count = 0
    with file.open("wb") as stream:
        for keys, positions in chunks:
            np.stack([*split_keys(keys), positions], axis=1).tofile(stream)
            count += len(keys)
    return count


def sorted_partitions(file: Path, count: int) -> Iterator[np.ndarray]:
    """Sort the `count` records of a file by key, then position; delete the file.

    Yields:
        Consecutive parts of the sorted records, (n, 3) uint64. All records of a key are in the same part.
    """
    bits = max(0, (count - 1) // PARTITION_SIZE).bit_length()
    for partition in _split_by_key(file, bits) if bits else [file]:
        records = np.fromfile(partition, np.uint64).reshape(-1, 3)
        partition.unlink()
        if len(records):
            # lexsort is stable and positions increase within the file, so they need not be a sort key.
            yield records[np.lexsort((records[:, 1], records[:, 0]))]


def _split_by_key(file: Path, bits: int) -> list[Path]:
    """Split a file of records into 2 ** bits files by the first bits of the keys; delete the file."""
    partitions = [file.with_name(f"{file.name}-{number}") for number in range(1 << bits)]
    with ExitStack() as stack:
        streams = [stack.enter_context(partition.open("wb")) for partition in partitions]
        source = stack.enter_context(file.open("rb"))
        while len(records := np.fromfile(source, np.uint64, count=3 * PARTITION_SIZE).reshape(-1, 3)):
            number = (records[:, 0] >> np.uint64(64 - bits)).astype(np.int64)
            ordered = records[np.argsort(number, kind="stable")]
            ends = np.cumsum(np.bincount(number, minlength=len(partitions)))
            for stream, part in zip(streams, np.split(ordered, ends[:-1]), strict=True):
                part.tofile(stream)
    file.unlink()
    return partitions


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split keys, (N, 16) uint8, into two uint64 halves, (N,) each, that sort like the bytes."""
    halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]
