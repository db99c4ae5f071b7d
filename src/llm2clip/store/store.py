"""Read access to an embedding store, which contains an embedding of every caption in a data set.

`EmbeddingStore.find_rows` looks up the row numbers of captions, and `EmbeddingStore.take` reads the embeddings in
these rows. The module `layout` describes the files in a store.

Embeddings are read through memory maps or, if the store is too large for memory, with positional reads. With a memory
map, the operating system also reads the pages around every requested row. If the store is larger than memory, these
pages are evicted before they are used. `PreadReader` therefore uses one positional read for each run of consecutive
rows, reads in several threads, and advises the operating system that access is random. Both readers access rows in
on-disk order.
"""

from __future__ import annotations

import dataclasses
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch

from llm2clip.data.columns import TEXT_FIELDS
from llm2clip.data.records import Record
from llm2clip.io_utils import read_jsonl
from llm2clip.progress import ProgressBar
from llm2clip.store.layout import (
    DTYPES,
    READ_ERRORS,
    KeyIndex,
    Shard,
    StoreError,
    StoreSpec,
    build_corruption_error,
    build_key_index,
    compute_shard_checksum,
    embeddings_path,
    get_store_spec,
    index_path,
    iter_chunks,
    make_caption_keys,
    read_all_keys,
    read_keys,
    read_manifest,
    read_shard_metadata,
    scales_path,
)

ReadMode = Literal["auto", "mmap", "pread"]
LOOKUP_CHUNK_SIZE = 1 << 18  # number of captions to hash and look up at once
NUM_THREADS = 16  # maximum number of concurrent positional reads; the disk can reorder concurrent reads
MAX_OPEN_FILES = 256  # maximum number of open files per cache; the limit per process is usually about a thousand


class EmbeddingStore:
    """Read access to a complete store. Pickling keeps only the folder and read mode; unpickling reopens the store."""

    def __init__(self, folder: str | Path, read_mode: ReadMode = "auto") -> None:
        """Open the store at `folder`. Keys and embeddings stay on disk.

        Args:
            read_mode: "mmap" reads embeddings through memory maps, and "pread" uses positional reads. "auto" selects
                "mmap" if the embeddings take less than half of the available memory, and "pread" otherwise.

        Raises:
            StoreError: The folder does not contain a complete store, or a shard is missing or has the wrong size.
        """
        self.folder, self.read_mode = Path(folder), read_mode
        self.manifest: dict[str, Any] = read_manifest(self.folder)
        self.embed_dim: int = self.manifest["embed_dim"]
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self._total_rows = sum(shard.rows for shard in self.shards)
        dtype = self.manifest["dtype"]
        if read_mode == "auto":
            size = self._total_rows * self.embed_dim * DTYPES[dtype].itemsize
            read_mode = "mmap" if size < get_available_memory() / 2 else "pread"
        reader_class: type[RowReader] = MmapReader if read_mode == "mmap" else PreadReader
        self._reader = reader_class(self.folder, self.shards, self.embed_dim, dtype)
        self._index = self._open_index()

    def _open_index(self) -> KeyIndex:
        """Open the key index; build it if it is missing or corrupt."""
        file = index_path(self.folder, self.shards)
        if file.is_file():
            try:
                index = KeyIndex(file)
                if len(index) == self._total_rows:
                    return index
            except READ_ERRORS:
                pass  # the index is corrupt; it is rebuilt below
        build_key_index(file, read_all_keys(self.folder, self.shards))
        return KeyIndex(file)

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Path, ReadMode]]:
        return EmbeddingStore, (self.folder, self.read_mode)

    def __len__(self) -> int:
        """Return the number of distinct captions."""
        return int(self.manifest["captions"])

    def __contains__(self, caption: str) -> bool:
        return bool(self.find_keys(make_caption_keys([caption]))[0] >= 0)

    def find_keys(self, keys: np.ndarray) -> np.ndarray:
        """Look up keys of shape (N, 16), uint8; return row numbers of shape (N,), int64, with -1 for missing keys."""
        starts = range(0, len(keys), LOOKUP_CHUNK_SIZE)
        parts = [self._index.find_keys(keys[start : start + LOOKUP_CHUNK_SIZE]) for start in starts]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        """Look up N captions; return their row numbers, of shape (N,), int64.

        Raises:
            StoreError: A caption is not in the store. The message quotes the caption.
        """
        parts = [np.empty(0, np.int64)]
        for chunk in iter_chunks(captions, LOOKUP_CHUNK_SIZE):
            rows = self.find_keys(make_caption_keys(chunk))
            missing = rows < 0
            if missing.any():
                caption = chunk[int(missing.argmax())]
                raise StoreError(
                    f"{self.folder} has no embedding for the caption {caption[:120]!r}. Run `llm2clip embed`"
                )
            parts.append(rows)
        return np.concatenate(parts)

    def take(self, rows: np.ndarray | Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Read the embeddings in N rows as a float32 array of shape (N, embed_dim), in the order of `rows`.

        Args:
            out: Array to fill and return, for example in pinned memory. Its dtype is float32 or, for a float16 store,
                float16. Default: a new float32 array.

        Raises:
            IndexError: A row number is out of range.
        """
        return self._reader.take(np.asarray(rows, dtype=np.int64), out)

    def verify(self, progress: bool = False) -> None:
        """Verify the checksum of every shard, and check the index.

        Raises:
            StoreError: A shard or the index is corrupt. The message lists the corrupt shards or names the index file.
        """
        corrupt = find_corrupt_shards(self.folder, self.shards, get_store_spec(self.manifest), progress)
        if corrupt:
            numbers = ", ".join(f"{number:05d}" for number in corrupt)
            raise StoreError(
                f"{self.folder} has corrupt shards: {numbers}. Run `llm2clip store repair {self.folder}` to delete them"
            )
        if not self._index.is_index_of(read_all_keys(self.folder, self.shards)):
            index = index_path(self.folder, self.shards)
            raise StoreError(f"{index} is corrupt. Run `llm2clip store repair {self.folder}` to rebuild the index")


def find_corrupt_shards(folder: Path, shards: Sequence[Shard], spec: StoreSpec, progress: bool = False) -> list[int]:
    """List the numbers of the shards that are missing or have the wrong checksum or spec."""

    def is_intact(shard: Shard) -> bool:
        try:
            metadata = read_shard_metadata(folder, shard.number)
            return (
                metadata == (shard.rows, shard.sha256, spec)
                and compute_shard_checksum(folder, shard.number) == shard.sha256
                and len(read_keys(folder, shard)) == shard.rows
            )
        except READ_ERRORS:
            return False

    with ThreadPoolExecutor(4) as pool:
        results = ProgressBar(
            pool.map(is_intact, shards),
            desc="verify",
            total=len(shards),
            unit="shard",
            disable=not progress,
            delay=1,
            leave=False,
        )
        return [shard.number for shard, intact in zip(shards, results, strict=True) if not intact]


# ---- readers -------------------------------------------------------------------------------------------------------


class ShardRows(NamedTuple):
    """Rows to read from one shard."""

    shard: int  # index of the shard in the list of shards
    rows: np.ndarray  # row numbers within the shard, of shape (N,), int64, in ascending order
    out: np.ndarray  # array to fill, of shape (N, embed_dim), in the store's dtype


class RowReader(ABC):
    """Base class for reading embeddings by row number. Subclasses implement how values are read from the shards.

    Attributes:
        chunk_bytes: Number of bytes to read before they are converted and sorted.
    """

    chunk_bytes: int

    def __init__(self, folder: Path, shards: Sequence[Shard], embed_dim: int, dtype: str) -> None:
        """Check the files of all shards.

        Raises:
            StoreError: A file is missing, or its shape, dtype or size is wrong.
        """
        stored_dtype = DTYPES[dtype]

        def open_embeddings(n: int) -> np.memmap[Any, Any]:
            return _open_array(embeddings_path(folder, shards[n].number), (shards[n].rows, embed_dim), stored_dtype)

        def open_scales(n: int) -> np.memmap[Any, Any]:
            return _open_array(scales_path(folder, shards[n].number), (shards[n].rows,), np.dtype(np.float32))

        self.embed_dim, self.dtype = embed_dim, stored_dtype
        # Row number of each shard's first row, then the total number of rows.
        self.bounds = np.cumsum([0, *(shard.rows for shard in shards)])
        self.data_offsets = [open_embeddings(n).offset for n in range(len(shards))]
        self.open_embeddings = lru_cache(MAX_OPEN_FILES)(open_embeddings)
        self.open_scales = None
        if dtype == "int8":
            for n in range(len(shards)):
                open_scales(n)  # checks the file
            self.open_scales = lru_cache(MAX_OPEN_FILES)(open_scales)

    def take(self, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read the embeddings in N rows of the store; see `EmbeddingStore.take`. `rows` has shape (N,), int64."""
        total = int(self.bounds[-1])
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < total):
            raise IndexError(f"row numbers must be between 0 and {total - 1}")
        embeddings = np.empty((len(rows), self.embed_dim), np.float32) if out is None else out
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        chunk_size = max(1, self.chunk_bytes // (self.embed_dim * self.dtype.itemsize))
        buffer = np.empty((min(chunk_size, len(rows)), self.embed_dim), self.dtype)
        for start in range(0, len(rows), chunk_size):
            chunk = sorted_rows[start : start + chunk_size]
            stored = buffer[: len(chunk)]
            parts = self._split_by_shard(chunk, stored)
            self._read(parts)
            values = stored
            if embeddings.dtype != self.dtype:
                values = torch.from_numpy(stored).float().numpy()  # PyTorch converts float16 faster than NumPy
            if self.open_scales is not None:
                values *= np.concatenate([self.open_scales(part.shard)[part.rows] for part in parts])[:, None]
            embeddings[order[start : start + chunk_size]] = values
        return embeddings

    def _split_by_shard(self, sorted_rows: np.ndarray, out: np.ndarray) -> list[ShardRows]:
        """Group the rows by shard. The `out` array of each group is a view of this group's rows in `out`."""
        parts = []
        cuts = np.searchsorted(sorted_rows, self.bounds)
        for shard, (start, stop) in enumerate(pairwise(cuts)):
            if start < stop:
                parts.append(ShardRows(shard, sorted_rows[start:stop] - self.bounds[shard], out[start:stop]))
        return parts

    @abstractmethod
    def _read(self, parts: list[ShardRows]) -> None:
        """Read the rows of each part into its `out` array."""


class MmapReader(RowReader):
    """Reader that uses memory maps."""

    chunk_bytes = 1 << 18  # fits in the CPU's cache, so main memory is read and written only once

    def _read(self, parts: list[ShardRows]) -> None:
        for part in parts:
            # All rows are in range, so nothing is clipped. With mode="raise", NumPy would buffer the output.
            np.take(self.open_embeddings(part.shard), part.rows, axis=0, out=part.out, mode="clip")


class PreadReader(RowReader):
    """Reader that uses one positional read for each run of consecutive rows. Several threads read in parallel."""

    chunk_bytes = 1 << 24  # many reads, so that all threads are busy and the disk can reorder them

    def __init__(self, folder: Path, shards: Sequence[Shard], embed_dim: int, dtype: str) -> None:
        super().__init__(folder, shards, embed_dim, dtype)
        self.open_file = lru_cache(MAX_OPEN_FILES)(
            lambda n: _RandomAccessFile(embeddings_path(folder, shards[n].number))
        )
        self.process_id, self.pool = os.getpid(), ThreadPoolExecutor(NUM_THREADS)

    def _read(self, parts: list[ShardRows]) -> None:
        if self.process_id != os.getpid():  # after a fork, the parent's threads do not exist in this process
            self.process_id, self.pool = os.getpid(), ThreadPoolExecutor(NUM_THREADS)
        for first in range(0, len(parts), MAX_OPEN_FILES):
            self._read_parts(parts[first : first + MAX_OPEN_FILES])

    def _read_parts(self, parts: list[ShardRows]) -> None:
        row_bytes = self.embed_dim * self.dtype.itemsize
        reads: list[tuple[_RandomAccessFile, memoryview, int]] = []  # (file, memory to fill, file offset)
        for part in parts:
            file, offset = self.open_file(part.shard), self.data_offsets[part.shard]
            memory = part.out.view(np.uint8).reshape(-1).data
            run_ends = (np.flatnonzero(np.diff(part.rows) != 1) + 1).tolist()
            for start, stop in pairwise([0, *run_ends, len(part.rows)]):
                file_offset = offset + int(part.rows[start]) * row_bytes
                reads.append((file, memory[start * row_bytes : stop * row_bytes], file_offset))
        chunk_size = -(-len(reads) // (4 * NUM_THREADS)) or 1
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


def _open_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
    """Open a .npy file as a memory map.

    Raises:
        StoreError: The file is missing or corrupt, or does not contain exactly an array of this shape and dtype.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. Run `llm2clip store repair {path.parent}`") from error
    except READ_ERRORS as error:
        raise build_corruption_error(path, error) from error
    is_exact = array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
    if not is_exact or array.offset + array.nbytes != size:
        raise build_corruption_error(path, "its shape, dtype or size does not match the keys file")
    return array


def get_available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes this process can still allocate, given the available RAM and its cgroup's limit."""
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


# ---- captions without an embedding ---------------------------------------------------------------------------------


def drop_refused_captions(records: Sequence[Record], store: EmbeddingStore) -> Sequence[Record]:
    """Remove captions that the tokenizer could not encode, and drop records that have no captions left."""
    refused = {row["caption"] for row in read_refused_captions(store.folder)}
    if not refused:
        return records
    remaining = []
    for record in records:
        captions: dict[str, Any] = {}
        for field in TEXT_FIELDS:
            captions[field] = tuple(caption for caption in getattr(record, field) if caption not in refused)
        record = dataclasses.replace(record, **captions)
        if record.texts:
            remaining.append(record)
    return remaining


def read_refused_captions(folder: Path) -> list[dict[str, Any]]:
    """Read the captions that the tokenizer could not encode, as dicts with the keys "caption" and "why"."""
    return [row for file in sorted(folder.glob("refused-*.jsonl")) for _, row in read_jsonl(file)]
