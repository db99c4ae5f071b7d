"""Which row of a store holds a caption: all keys sorted, on disk, in memory that does not grow with their number.

A key is 16 bytes; the index is one array of three lines, (3, N) uint64: the keys' first halves in order, their second
halves, the rows. It is mapped, not read: finding a caption touches a few pages. It is built as an external sort: keys
are dealt into parts by their first bits, and one part is sorted at a time. 24 bytes a caption, beside some thousands
for its vector.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

PART = 1 << 22  # keys that are sorted at once: 100 MB, and as much again to sort them


class KeyIndex:
    """Finds the rows of keys in an index file."""

    def __init__(self, file: Path) -> None:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.ndim != 2 or len(array) != 3 or array.dtype != np.uint64:
            raise ValueError(f"{file} is not an index")
        self.high, self.low, self.row = array

    def __len__(self) -> int:
        return len(self.high)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Rows of keys, (N, 16) uint8, as (N,) int64; -1 where there is none, the first where there are several."""
        high, low = split_keys(keys)
        order = np.argsort(high)  # neighbours are on the same pages
        found = np.full(len(keys), -1, np.int64)
        at = np.searchsorted(self.high, high[order])
        waiting = order
        while len(waiting):  # more than one round only where first halves are equal and second ones are not
            inside = at < len(self)
            waiting, at = waiting[inside], at[inside]
            same = self.high[at] == high[waiting]
            waiting, at = waiting[same], at[same]
            hit = self.low[at] == low[waiting]
            found[waiting[hit]] = self.row[at[hit]].astype(np.int64)
            waiting, at = waiting[~hit], at[~hit] + 1
        return found


def build_key_index(file: Path, keys: Iterable[np.ndarray]) -> int:
    """Write the index of a store's keys to `file`, whole or not at all; the number of different keys.

    Args:
        file: of the index, .npy.
        keys: of all rows in their order, in pieces of (n, 16) uint8.
    """
    with tempfile.TemporaryDirectory(prefix=f".{file.name}-", dir=file.parent) as temporary:
        records, whole = Path(temporary) / "keys", Path(temporary) / file.name
        count, start, different = write_records(numbered_keys(keys), records), 0, 0
        out = np.lib.format.open_memmap(whole, mode="w+", dtype=np.uint64, shape=(3, count))
        if hasattr(os, "posix_fallocate"):  # a disk that is full says so here; in a map it would kill the process
            with whole.open("r+b") as f:
                os.posix_fallocate(f.fileno(), 0, whole.stat().st_size)
        for part in sorted_partitions(records, count):
            out[:, start : start + len(part)] = part.T
            start += len(part)
            different += 1 + int((part[1:, :2] != part[:-1, :2]).any(axis=1).sum())
        out.flush()
        del out
        os.replace(whole, file)
    return different


def numbered_keys(keys: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of keys with their places, uint64, which count through all of them."""
    count = 0
    for some in keys:
        yield some, np.arange(count, count + len(some), dtype=np.uint64)
        count += len(some)


def write_records(keys: Iterable[tuple[np.ndarray, np.ndarray]], file: Path) -> int:
    """Write pieces of keys and places as records (first half, second half, place) to a file; their number."""
    count = 0
    with file.open("wb") as out:
        for some, places in keys:
            np.stack([*split_keys(some), places], axis=1).tofile(out)
            count += len(some)
    return count


def sorted_partitions(file: Path, count: int) -> Iterator[np.ndarray]:
    """The `count` records of a file in order, by key and then place, in parts (n, 3) uint64 that no key straddles. The
    file is used up."""
    bits = max(0, (count - 1) // PART).bit_length()
    for part in [file] if bits == 0 else _parted(file, bits):
        records = np.fromfile(part, np.uint64).reshape(-1, 3)
        part.unlink()
        if len(records):
            yield records[np.lexsort((records[:, 2], records[:, 1], records[:, 0]))]


def split_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys (N, 16) uint8 as two numbers each, which order as the bytes do."""
    both = np.ascontiguousarray(keys).view(">u8").astype(np.uint64)
    return both[:, 0], both[:, 1]


def _parted(whole: Path, bits: int) -> list[Path]:
    """The records of a file in files by the first bits of their keys."""
    parts = [whole.with_name(f"{whole.name}-{n}") for n in range(1 << bits)]
    files = [part.open("wb") for part in parts]
    try:
        with whole.open("rb") as source:
            while len(records := np.fromfile(source, np.uint64, count=3 * PART).reshape(-1, 3)):
                group = records[:, 0] >> np.uint64(64 - bits)
                records = records[np.argsort(group, kind="stable")]
                bounds = np.searchsorted(np.sort(group), np.arange((1 << bits) + 1, dtype=np.uint64))
                for file, lo, hi in zip(files, bounds[:-1], bounds[1:], strict=True):
                    records[lo:hi].tofile(file)
    finally:
        for file in files:
            file.close()
    whole.unlink()
    return parts
