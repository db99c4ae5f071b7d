"""Key index of a store, which maps caption keys to row numbers with constant memory use.

A 16-byte key is split into two uint64 halves. The index is an array of shape (3, N), uint64, sorted by key. Its three
rows contain the first halves of the keys, the second halves, and the row numbers in the store. The array is
memory-mapped, so that a lookup touches only a few pages. It takes 24 bytes per caption, while an embedding takes a few
thousand bytes.

The index is built with an external sort, which `write_plan` also uses:

1. `write_records` writes every key and its position to a file of fixed-size records.
2. `sorted_partitions` splits this file into partitions by the first bits of the keys, so that each partition fits in
    memory and equal keys are in the same partition, and then sorts the partitions one after another.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llm2clip.io_utils import atomic_path

PARTITION_SIZE = 1 << 22  # number of records to sort at once: 100 MB, plus another 100 MB for sorting


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
        # Each iteration compares one entry per pending key. A second iteration is needed only for keys with the same
        # first half but different second halves.
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
        keys: Keys of all rows of the store, in row order, in chunks of shape (N, 16), uint8.
    """
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as temporary_folder:
        records = Path(temporary_folder) / "records"
        count = write_records(_add_row_numbers(keys), records)
        with atomic_path(file) as temporary:
            index = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint64, shape=(3, count))
            _allocate_on_disk(temporary)
            start, distinct = 0, 0
            for partition in sorted_partitions(records, count):
                index[:, start : start + len(partition)] = partition.T
                start += len(partition)
                distinct += len(partition) - int(repeats_previous_key(partition).sum())
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


def write_records(chunks: Iterable[tuple[np.ndarray, np.ndarray]], file: Path) -> int:
    """Write keys and positions to a file of records; return the number of records.

    A record consists of three uint64 values: the first half of the key, the second half, and the position. The file has
    no header.

    Args:
        chunks: (keys of shape (N, 16), uint8; positions of shape (N,), uint64) for each chunk. Positions must increase
            across all chunks.
        file: File to write.
    """
    count = 0
    with file.open("wb") as stream:
        for keys, positions in chunks:
            np.stack([*split_keys(keys), positions], axis=1).tofile(stream)
            count += len(keys)
    return count


def sorted_partitions(file: Path, count: int) -> Iterator[np.ndarray]:
    """Sort the `count` records in a file by key, then by position, and delete the file.

    Yields:
        Consecutive partitions of the sorted records, of shape (N, 3), uint64. Records with equal keys are in the same
        partition.
    """
    bits = max(0, (count - 1) // PARTITION_SIZE).bit_length()
    for partition in _split_by_key(file, bits) if bits else [file]:
        records = np.fromfile(partition, np.uint64).reshape(-1, 3)
        partition.unlink()
        if len(records):
            # Positions are not used as a sort key, because lexsort is stable and positions increase within the file.
            yield records[np.lexsort((records[:, 1], records[:, 0]))]


def repeats_previous_key(partition: np.ndarray) -> np.ndarray:
    """Return a boolean mask of shape (N,) that is True for each sorted record whose key equals the previous key."""
    return np.append([False], (partition[1:, :2] == partition[:-1, :2]).all(axis=1))


def _split_by_key(file: Path, bits: int) -> list[Path]:
    """Split a file of records into 2 ** bits files by the first bits of the keys; delete the original file."""
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
    """Split keys of shape (N, 16), uint8, into two halves of shape (N,), uint64, that have the same sort order."""
    halves = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return halves[:, 0], halves[:, 1]
