"""Readers for the embeddings in a store, using memory maps or, if the store exceeds memory, positional reads.

With a memory map, the operating system also reads the pages around every requested row. If the store is larger than
memory, these pages are evicted before they are used. `PreadReader` therefore reads each run of consecutive rows with a
positional read, in several threads, and declares to the operating system that access is random. Both readers access
rows in the order in which they are stored on disk.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import torch

from llm2clip.store.layout import (
    DTYPES,
    READ_ERRORS,
    Shard,
    StoreError,
    build_damage_error,
    embeddings_path,
    scales_path,
)

THREADS = 16  # maximum number of concurrent positional reads; the disk can reorder concurrent reads
MAX_OPEN_FILES = 256  # per cache; operating systems usually allow about a thousand open files per process


@dataclass(frozen=True)
class ShardRows:
    """Rows to read from one shard.

    Attributes:
        shard: Index of the shard in the list of shards.
        rows: Row numbers within the shard in ascending order, of shape (N,), int64.
        out: Array to fill, of shape (N, embed_dim), in the store's dtype.
    """

    shard: int
    rows: np.ndarray
    out: np.ndarray


class RowReader(ABC):
    """Reader of embeddings by row number. Subclasses implement how values are read from the shards."""

    def __init__(self, folder: Path, shards: Sequence[Shard], embed_dim: int, dtype: str) -> None:
        """Check the files of all shards.

        Raises:
            StoreError: A file is missing or has the wrong size.
        """
        self.folder, self.shards, self.embed_dim, self.dtype = folder, list(shards), embed_dim, DTYPES[dtype]
        ends = [shard.start + shard.rows for shard in shards]
        self.bounds = np.array([*(shard.start for shard in shards), *ends[-1:]], np.int64)
        row_bytes = embed_dim * self.dtype.itemsize
        self.data_offsets = [_check_data_offset(embeddings_path(folder, s.number), s.rows, row_bytes) for s in shards]
        self.scales: Callable[[int], np.ndarray] | None = None  # opens the scale factors of a shard
        if self.dtype == np.int8:
            for shard in shards:
                _check_data_offset(scales_path(folder, shard.number), shard.rows, row_bytes=4)
            self.scales = lru_cache(MAX_OPEN_FILES)(lambda n: _open_memory_map(scales_path(folder, shards[n].number)))

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Read the embeddings in the given rows, in the given order.

        Args:
            rows: Row numbers in the store, of shape (N,), int64.

        Returns:
            Embeddings of shape (N, embed_dim), float32.

        Raises:
            IndexError: A row number is out of range.
        """
        total = int(self.bounds[-1]) if len(self.bounds) else 0
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < total):
            raise IndexError(f"row numbers must be between 0 and {total - 1}")
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        stored = np.empty((len(rows), self.embed_dim), self.dtype)
        parts = self._split_by_shard(sorted_rows, stored)
        self._read(parts)
        position = np.empty_like(order)  # position of each requested row in `sorted_rows`
        position[order] = np.arange(len(order))
        # torch is faster than NumPy here, because it uses several threads.
        embeddings = torch.from_numpy(stored)[torch.from_numpy(position)].float()
        if self.scales is not None:
            scales = np.concatenate([np.empty(0, np.float32), *(self.scales(p.shard)[p.rows] for p in parts)])
            embeddings *= torch.from_numpy(scales[position])[:, None]
        return embeddings.numpy()

    def _split_by_shard(self, sorted_rows: np.ndarray, out: np.ndarray) -> list[ShardRows]:
        """Group the rows by shard. The `out` array of each group is a view of the matching rows of `out`."""
        parts = []
        cuts = np.searchsorted(sorted_rows, self.bounds)
        for shard, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                rows = sorted_rows[start:stop] - self.shards[shard].start
                parts.append(ShardRows(shard, rows, out[start:stop]))
        return parts

    @abstractmethod
    def _read(self, parts: list[ShardRows]) -> None:
        """Read the rows of each part into its `out` array."""


class MmapReader(RowReader):
    """Reader that uses memory maps."""

    def __init__(self, folder: Path, shards: Sequence[Shard], embed_dim: int, dtype: str) -> None:
        super().__init__(folder, shards, embed_dim, dtype)
        self.map = lru_cache(MAX_OPEN_FILES)(lambda n: _open_memory_map(embeddings_path(folder, shards[n].number)))

    def _read(self, parts: list[ShardRows]) -> None:
        for part in parts:
            # All rows are in range, so nothing is clipped. With mode="raise", NumPy would buffer the output.
            np.take(self.map(part.shard), part.rows, axis=0, out=part.out, mode="clip")


class PreadReader(RowReader):
    """Reader that uses one positional read for each run of consecutive rows. Several threads read in parallel."""

    def __init__(self, folder: Path, shards: Sequence[Shard], embed_dim: int, dtype: str) -> None:
        super().__init__(folder, shards, embed_dim, dtype)
        self.open = lru_cache(MAX_OPEN_FILES)(lambda n: _RandomAccessFile(embeddings_path(folder, shards[n].number)))
        self.process_id, self.pool = os.getpid(), ThreadPoolExecutor(THREADS)

    def _read(self, parts: list[ShardRows]) -> None:
        if self.process_id != os.getpid():  # after a fork, the parent's threads do not exist in this process
            self.process_id, self.pool = os.getpid(), ThreadPoolExecutor(THREADS)
        for first in range(0, len(parts), MAX_OPEN_FILES):
            self._read_parts(parts[first : first + MAX_OPEN_FILES])

    def _read_parts(self, parts: list[ShardRows]) -> None:
        row_bytes = self.embed_dim * self.dtype.itemsize
        reads: list[tuple[_RandomAccessFile, memoryview, int]] = []  # file, memory to fill, offset in the file
        for part in parts:
            file, offset = self.open(part.shard), self.data_offsets[part.shard]
            memory = part.out.view(np.uint8).reshape(-1).data
            run_ends = (np.flatnonzero(np.diff(part.rows) != 1) + 1).tolist()
            for start, stop in pairwise([0, *run_ends, len(part.rows)]):
                at = offset + int(part.rows[start]) * row_bytes
                reads.append((file, memory[start * row_bytes : stop * row_bytes], at))
        chunk_size = -(-len(reads) // (4 * THREADS)) or 1
        chunks = [reads[i : i + chunk_size] for i in range(0, len(reads), chunk_size)]
        for _ in self.pool.map(_read_chunk, chunks):
            pass  # iterating re-raises exceptions from the threads


def _read_chunk(reads: Sequence[tuple[_RandomAccessFile, memoryview, int]]) -> None:
    for file, memory, offset in reads:
        if os.preadv(file.descriptor, [memory], offset) != len(memory):
            raise StoreError("a shard was truncated while it was being read")


class _RandomAccessFile:
    """File opened for positional reads. The file is closed when this object is deleted."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):  # the attribute is missing if __init__ raised an error
            os.close(self.descriptor)


def _open_memory_map(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _check_data_offset(path: Path, rows: int, row_bytes: int) -> int:
    """Check the shape and size of a .npy file; return the offset of its data.

    Raises:
        StoreError: The file is missing, or does not contain `rows` rows of `row_bytes` bytes each.
    """
    if not path.is_file():
        raise StoreError(f"{path} is missing. Run `llm2clip store repair {path.parent}`")
    offset = path.stat().st_size - rows * row_bytes
    with path.open("rb") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
            else:
                shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
            stored_row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
            valid = shape[:1] == (rows,) and stored_row_bytes == row_bytes and not fortran_order
            valid = valid and stream.tell() == offset
        except READ_ERRORS:
            valid = False
    if not valid:
        raise build_damage_error(path, "its shape or size does not match the keys file")
    return offset


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the number of bytes that this process can still allocate within available RAM and its cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    limit_file, usage_file, stat_file = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit_file.is_file() and usage_file.is_file()):
        return available
    limit = limit_file.read_text().strip()
    if limit == "max":
        return available
    stat = stat_file.read_text() if stat_file.is_file() else ""
    reclaimable = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)  # cached file pages
    left = int(limit) - int(usage_file.read_text()) + (int(reclaimable[1]) if reclaimable else 0)
    return min(available, left)
