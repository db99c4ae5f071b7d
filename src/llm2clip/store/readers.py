"""Reading rows of a store from its files: mapped where all of it fits in memory, else asked for one by one.

A map makes the system read whole neighbourhoods around every row that is asked for; when the store is larger than
memory these are thrown out before they are of use. Then each row is one positional read, from several threads, and the
system is told that they come in no order. In both, rows go in the order of their place on the disk.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import psutil
import torch

from llm2clip.store.layout import DTYPES, READ_ERRORS, Shard, StoreError, embeddings_path, scales_path

T = TypeVar("T")
THREADS = 16  # positional reads under way at once: a disk is asked for many things, it answers in its own order
OPEN_FILES = 256  # at most, of each kind: a system allows a process about a thousand


class LRUCache(Generic[T]):
    """What was opened for the shards asked for last."""

    def __init__(self, opened: Callable[[int], T], close: Callable[[T], object] | None = None) -> None:
        self.opened, self.close = opened, close
        self.items: OrderedDict[int, T] = OrderedDict()

    def __getitem__(self, n: int) -> T:
        if n in self.items:
            self.items.move_to_end(n)
            return self.items[n]
        while len(self.items) >= OPEN_FILES:
            self.drop()
        self.items[n] = self.opened(n)
        return self.items[n]

    def drop(self) -> None:
        _, oldest = self.items.popitem(last=False)
        if self.close is not None:
            self.close(oldest)


class RowReader(ABC):
    """Vectors of rows, in the order asked for. Subclasses read the numbers as they lie in a shard."""

    def __init__(self, folder: Path, shards: Sequence[Shard], width: int, dtype: str) -> None:
        """
        Raises:
            StoreError: a shard is missing, or has the wrong size.
        """
        self.folder, self.shards, self.width, self.dtype = folder, list(shards), width, DTYPES[dtype]
        self.bounds = np.array([*(s.start for s in shards), *(s.start + s.rows for s in shards[-1:])], np.int64)
        self.data_at = [self._check(embeddings_path(folder, s.number), s, width * self.dtype.itemsize) for s in shards]
        self.scales: LRUCache[np.ndarray] | None = None
        if self.dtype == np.int8:
            for shard in shards:
                self._check(scales_path(folder, shard.number), shard, 4)
            self.scales = LRUCache(lambda n: _mapped(scales_path(folder, shards[n].number)))

    def _check(self, path: Path, shard: Shard, row: int) -> int:
        """Where the numbers of a file begin."""
        if not path.is_file():
            raise StoreError(f"{path} is missing; `llm2clip store repair {self.folder}`")
        header = path.stat().st_size - shard.rows * row
        with path.open("rb") as f:
            try:
                version = np.lib.format.read_magic(f)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(f)
                whole = f.tell() == header and shape[0] == shard.rows and not fortran
                whole &= dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64)) == row
            except READ_ERRORS:
                whole = False
        if not whole:
            raise StoreError(
                f"{path} is damaged: not the size that its keys say; `llm2clip store repair {self.folder}`"
            )
        return header

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Float32 (N, width) of row numbers, int64 (N,).

        Raises:
            IndexError: there is no such row.
        """
        total = int(self.bounds[-1]) if len(self.bounds) else 0
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < total):
            raise IndexError(f"rows are between 0 and {total - 1}")
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        stored = np.empty((len(rows), self.width), self.dtype)
        cuts = np.searchsorted(ordered, self.bounds)
        parts = [(n, lo, hi) for n, (lo, hi) in enumerate(pairwise(cuts)) if lo < hi]
        self._read([(n, ordered[lo:hi] - self.shards[n].start, stored[lo:hi]) for n, lo, hi in parts])
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        out = torch.from_numpy(stored)[torch.from_numpy(place)].float()  # faster than NumPy's, and on several threads
        if self.scales is not None:
            scale = np.empty(len(rows), np.float32)
            for n, lo, hi in parts:
                scale[lo:hi] = self.scales[n][ordered[lo:hi] - self.shards[n].start]
            out *= torch.from_numpy(scale[place])[:, None]
        return out.numpy()

    @abstractmethod
    def _read(self, parts: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        """Fill arrays (n, width) with rows of shards, both given with the shard's place among all."""


class MmapReader(RowReader):
    """Shards as memory maps."""

    def __init__(self, folder: Path, shards: Sequence[Shard], width: int, dtype: str) -> None:
        super().__init__(folder, shards, width, dtype)
        self.maps = LRUCache(lambda n: _mapped(embeddings_path(folder, shards[n].number)))

    def _read(self, parts: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        for n, rows, out in parts:
            np.take(self.maps[n], rows, axis=0, out=out, mode="clip")  # they are in range; otherwise it copies twice


class PreadReader(RowReader):
    """Each run of neighbouring rows as one read at its place, many at once."""

    def __init__(self, folder: Path, shards: Sequence[Shard], width: int, dtype: str) -> None:
        super().__init__(folder, shards, width, dtype)
        self.files = LRUCache(self._open, os.close)
        self._start()

    def _start(self) -> None:
        self.process, self.pool, self.lock = os.getpid(), ThreadPoolExecutor(THREADS), Lock()

    def _read(self, parts: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        if self.process != os.getpid():  # forked: threads stay behind
            self._start()
        with self.lock:  # no file is closed while another thread's reads are under way
            self._read_all(parts)

    def _read_all(self, parts: list[tuple[int, np.ndarray, np.ndarray]]) -> None:
        wide = self.width * self.dtype.itemsize
        for first in range(0, len(parts), OPEN_FILES):
            reads: list[Callable[[], None]] = []
            for n, rows, out in parts[first : first + OPEN_FILES]:
                file, data = self.files[n], out.view(np.uint8).reshape(-1).data
                breaks = [0, *(np.flatnonzero(np.diff(rows) != 1) + 1).tolist(), len(rows)]
                for lo, hi in pairwise(breaks):
                    reads.append(_reading(file, data[lo * wide : hi * wide], self.data_at[n] + int(rows[lo]) * wide))
            chunk = -(-len(reads) // (4 * THREADS)) or 1
            jobs = [self.pool.submit(_all, reads[i : i + chunk]) for i in range(0, len(reads), chunk)]
            for job in jobs:
                job.result()

    def _open(self, n: int) -> int:
        file = os.open(embeddings_path(self.folder, self.shards[n].number), os.O_RDONLY)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)
        return file

    def __del__(self) -> None:
        while hasattr(self, "files") and self.files.items:
            self.files.drop()


def _mapped(file: Path) -> np.ndarray:
    array: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    return array


def _reading(file: int, out: memoryview, at: int) -> Callable[[], None]:
    def read() -> None:
        if os.preadv(file, [out], at) != len(out):
            raise StoreError("a shard became shorter while it was read")

    return read


def _all(reads: Sequence[Callable[[], None]]) -> None:
    for read in reads:
        read()


def available_memory(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take, by the machine and by its control group."""
    spare = int(psutil.virtual_memory().available)
    limit, used, stat = (group / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.is_file() and used.is_file() and (most := limit.read_text().strip()) != "max":
        pages = re.search(r"^inactive_file (\d+)$", stat.read_text() if stat.is_file() else "", re.MULTILINE)
        spare = min(spare, int(most) - int(used.read_text()) + (int(pages[1]) if pages else 0))
    return spare
