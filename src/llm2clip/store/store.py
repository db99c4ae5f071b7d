"""Read access to an embedding store, which contains embeddings of captions or, keyed by image name, image features.

`EmbeddingStore.find_rows` looks up the row numbers of captions, `EmbeddingStore.take` reads the embeddings in these
rows, and `find_caption_rows` looks up all captions of a record table. `layout.py` describes the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import mmap
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from llm2clip.cpu_tuning import get_available_memory
from llm2clip.data.records import TEXT_FIELDS, Record
from llm2clip.data.table import BATCH_ROWS, RecordTable
from llm2clip.io_utils import atomic_dir
from llm2clip.parallel import count_cores, map_in_processes
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import hold_folder_lock
from llm2clip.runs.ranks import print_once
from llm2clip.store import layout
from llm2clip.store.layout import KeyIndex, Shard, StoreError, StoreSpec

MAX_OPEN_FILES = 256  # maximum number of open files per cache; a process can usually open about 1,000 files
CACHED_CHUNK = 1 << 18  # bytes per read from the page cache; fits in the CPU cache
UNCACHED_CHUNK = 1 << 24  # bytes per read from disk; large, so that the disk can reorder the reads
CAPTION_ROWS_VERSION = 1  # format version of the files that `find_caption_rows` writes
MIN_PARALLEL_CAPTIONS = 4_000_000  # looking up fewer captions takes less time than starting processes
TASKS_PER_CORE = 4


class EmbeddingStore:
    """Complete store, opened for reading. Only `folder` and `read_ahead` are pickled. Unpickling reopens the store."""

    def __init__(self, folder: str | Path, read_ahead: bool | None = None) -> None:
        """Open the store at `folder`. Keys and embeddings stay on disk.

        Args:
            read_ahead: Prefetch the memory pages of many rows at once. For stores larger than memory, prefetching is
                several times faster than reading rows on demand, which also reads surrounding pages that are evicted
                before they are used. Default: True if the embeddings take at least half of the available memory.

        Raises:
            StoreError: The folder does not contain a complete store, or a shard is missing or has the wrong size.
        """
        self.folder, self.read_ahead = Path(folder), read_ahead
        self.manifest: dict[str, Any] = layout.read_manifest(self.folder)
        self.embed_dim: int = self.manifest["embed_dim"]
        self.shards = [Shard(**shard) for shard in self.manifest["shards"]]
        self._bounds = np.cumsum([0, *(shard.rows for shard in self.shards)])  # first row of each shard, then the total
        self._dtype = layout.DTYPES[self.manifest["dtype"]]
        if read_ahead is None:
            size = int(self._bounds[-1]) * self.embed_dim * self._dtype.itemsize
            read_ahead = size >= get_available_memory() / 2
        self._uses_madvise = read_ahead and hasattr(mmap, "MADV_WILLNEED")
        self._chunk_bytes = UNCACHED_CHUNK if self._uses_madvise else CACHED_CHUNK
        # Cached methods would create a reference cycle, which would keep files open until the next garbage collection.
        map_embeddings = partial(
            _memory_map_embeddings, self.folder, self.shards, self.embed_dim, self._dtype, self._uses_madvise
        )
        map_scales = partial(_memory_map_scales, self.folder, self.shards)
        for n in range(len(self.shards)):  # checks the files
            map_embeddings(n)
            if self._dtype == np.int8:
                map_scales(n)
        self._open_embeddings = lru_cache(MAX_OPEN_FILES)(map_embeddings)
        self._open_scales = lru_cache(MAX_OPEN_FILES)(map_scales)
        self._index = self._open_index()

    def _open_index(self) -> KeyIndex:
        file = layout.get_index_path(self.folder, self.shards)
        if file.is_file():
            try:
                index = KeyIndex(file)
                if len(index) == self._bounds[-1]:
                    return index
            except layout.READ_ERRORS:
                pass  # a corrupt index is rebuilt below
        layout.build_key_index(file, layout.read_all_keys(self.folder, self.shards))
        return KeyIndex(file)

    def __reduce__(self) -> tuple[type[EmbeddingStore], tuple[Path, bool | None]]:
        return EmbeddingStore, (self.folder, self.read_ahead)

    def __len__(self) -> int:
        """Return the number of distinct captions."""
        return int(self.manifest["captions"])

    def __contains__(self, caption: str) -> bool:
        return bool(self.find_keys(layout.make_caption_keys([caption]))[0] >= 0)

    def find_keys(self, keys: np.ndarray) -> np.ndarray:
        """Look up uint8 keys of shape (N, 16). Return int64 row numbers of shape (N,), with -1 for missing keys."""
        starts = range(0, len(keys), layout.LOOKUP_CHUNK_SIZE)
        parts = [self._index.find_keys(keys[start : start + layout.LOOKUP_CHUNK_SIZE]) for start in starts]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        """Look up N captions. Return their row numbers as an int64 array of shape (N,).

        Raises:
            StoreError: A caption is not in the store.
        """
        parts = [np.empty(0, np.int64)]
        for chunk in layout.iter_chunks(captions, layout.LOOKUP_CHUNK_SIZE):
            rows = self.find_keys(layout.make_caption_keys(chunk))
            missing = rows < 0
            if missing.any():
                caption = chunk[int(missing.argmax())]
                raise StoreError(
                    f"{self.folder} has no embedding for the caption {caption[:120]!r}. Run `llm2clip embed`"
                )
            parts.append(rows)
        return np.concatenate(parts)

    def take(self, rows: np.ndarray | Sequence[int], out: np.ndarray | None = None) -> np.ndarray:
        """Return the embeddings in N rows as an array of shape (N, embed_dim), in the order of `rows`.

        Args:
            out: Array to fill and return, for example in pinned memory. Its dtype must be float32 or, for a float16
                store, float16. Default: a new float32 array.

        Raises:
            IndexError: A row number is out of range.
        """
        rows = np.asarray(rows, dtype=np.int64)
        total = int(self._bounds[-1])
        if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < total):
            raise IndexError(f"row numbers must be between 0 and {total - 1}")
        embeddings = np.empty((len(rows), self.embed_dim), np.float32) if out is None else out
        order = np.argsort(rows, kind="stable")
        chunk_size = max(1, self._chunk_bytes // (self.embed_dim * self._dtype.itemsize))
        buffer = np.empty((min(chunk_size, len(rows)), self.embed_dim), self._dtype)
        for start in range(0, len(rows), chunk_size):
            positions = order[start : start + chunk_size]
            stored = buffer[: len(positions)]
            scales = self._read_sorted_rows(rows[positions], stored)
            values = stored
            if embeddings.dtype != self._dtype:
                values = torch.from_numpy(stored).float().numpy()  # PyTorch converts float16 faster than NumPy
            if scales is not None:
                values *= scales[:, None]
            embeddings[positions] = values
        return embeddings

    def _read_sorted_rows(self, sorted_rows: np.ndarray, out: np.ndarray) -> np.ndarray | None:
        """Read rows into `out` in the store's dtype. For int8, return the scale factor of each row, otherwise None."""
        cuts = np.searchsorted(sorted_rows, self._bounds)
        parts = [(shard, start, stop) for shard, (start, stop) in enumerate(pairwise(cuts)) if start < stop]
        scales = []
        for first in range(0, len(parts), MAX_OPEN_FILES):  # open no more files than fit in the cache
            group = parts[first : first + MAX_OPEN_FILES]
            for shard, start, stop in group if self._uses_madvise else ():
                self._prefetch_memory_pages(self._open_embeddings(shard), sorted_rows[start:stop] - self._bounds[shard])
            for shard, start, stop in group:
                rows = sorted_rows[start:stop] - self._bounds[shard]
                # mode="raise" would make NumPy buffer the output. All rows are in range, so nothing is clipped.
                np.take(self._open_embeddings(shard), rows, axis=0, out=out[start:stop], mode="clip")
                if self._dtype == np.int8:
                    scales.append(self._open_scales(shard)[rows])
        return np.concatenate(scales) if scales else None

    def _prefetch_memory_pages(self, array: Any, rows: np.ndarray) -> None:
        row_bytes = self.embed_dim * self._dtype.itemsize
        starts = rows * row_bytes + array.offset % mmap.ALLOCATIONGRANULARITY
        first_bytes = starts // mmap.PAGESIZE * mmap.PAGESIZE
        sizes = starts + row_bytes - first_bytes
        with suppress(OSError):  # some file systems do not support madvise
            for first_byte, size in zip(first_bytes.tolist(), sizes.tolist(), strict=True):
                array._mmap.madvise(mmap.MADV_WILLNEED, first_byte, size)

    def verify(self) -> None:
        """Verify the checksum of every shard, and check the index.

        Raises:
            StoreError: A shard or the index is corrupt. The message lists the corrupt shards or names the index file.
        """
        corrupt = find_corrupt_shards(self.folder, self.shards, layout.get_store_spec(self.manifest))
        if corrupt:
            numbers = ", ".join(f"{number:05d}" for number in corrupt)
            raise StoreError(
                f"{self.folder} has corrupt shards: {numbers}. Run `llm2clip store repair {self.folder}` to delete them"
            )
        if not self._index.is_intact_index_of(layout.read_all_keys(self.folder, self.shards)):
            index = layout.get_index_path(self.folder, self.shards)
            raise StoreError(f"{index} is corrupt. Run `llm2clip store repair {self.folder}` to rebuild the index")


def find_corrupt_shards(folder: Path, shards: Sequence[Shard], spec: StoreSpec) -> list[int]:
    """Return the numbers of the shards that are missing or have the wrong checksum or spec."""

    def is_intact(shard: Shard) -> bool:
        try:
            metadata = layout.read_shard_metadata(folder, shard.number)
            return (
                metadata == (shard.rows, shard.sha256, spec)
                and layout.compute_shard_checksum(folder, shard.number) == shard.sha256
                and len(layout.read_keys(folder, shard)) == shard.rows
            )
        except layout.READ_ERRORS:
            return False

    with ThreadPoolExecutor(4) as pool:
        intact_shards = pool.map(is_intact, shards)
        results = ProgressBar(intact_shards, "verify", total=len(shards), unit="shard", leave=False, delay=1)
        return [shard.number for shard, intact in zip(shards, results, strict=True) if not intact]


def _memory_map_embeddings(
    folder: Path, shards: Sequence[Shard], embed_dim: int, dtype: np.dtype[Any], uses_madvise: bool, shard: int
) -> np.memmap[Any, Any]:
    path = layout.get_embeddings_path(folder, shards[shard].number)
    array = _memory_map_array(path, (shards[shard].rows, embed_dim), dtype)
    if uses_madvise and array.size:
        with suppress(OSError):
            array._mmap.madvise(mmap.MADV_RANDOM)  # type: ignore[attr-defined]
    return array


def _memory_map_scales(folder: Path, shards: Sequence[Shard], shard: int) -> np.memmap[Any, Any]:
    path = layout.get_scales_path(folder, shards[shard].number)
    return _memory_map_array(path, (shards[shard].rows,), np.dtype(np.float32))


def _memory_map_array(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.memmap[Any, Any]:
    """Open a .npy file as a memory map.

    Raises:
        StoreError: The file is missing or corrupt, or does not have the expected shape, dtype and file size.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing. Run `llm2clip store repair {path.parent}`") from error
    except layout.READ_ERRORS as error:
        raise layout.build_corruption_error(path, error) from error
    is_exact = array.shape == shape and array.dtype == dtype and array.flags.c_contiguous
    if not is_exact or array.offset + array.nbytes != size:
        raise layout.build_corruption_error(path, "its shape, dtype or size does not match the keys file")
    return array


# ---- captions of a record table --------------------------------------------------------------------------------------


class CaptionSource(Protocol):
    """Source of text inputs for training: a store or, in `benchmarks/finetune_clip.py`, tokenized captions."""

    manifest: dict[str, Any]

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        """Return the row numbers of N captions as an int64 array of shape (N,)."""

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the text inputs in N rows as an array of shape (N, ...)."""


@dataclass(frozen=True)
class CaptionRows:
    """Row numbers of each record's captions in one text field.

    Attributes:
        rows: Row numbers of all captions, uint32 or int64. The row numbers of each record are sorted and distinct.
        starts: Position in `rows` of each record's first row number, of shape (records + 1,), int64.
    """

    rows: np.ndarray
    starts: np.ndarray

    def __getitem__(self, record: int) -> np.ndarray:
        """Return the distinct row numbers of a record's captions, as a 1-D array."""
        return self.rows[self.starts[record] : self.starts[record + 1]]


def find_caption_rows(
    table: RecordTable, source: CaptionSource, fields: Sequence[str], caption_hash: str
) -> dict[str, CaptionRows]:
    """Look up the captions of all records in the store. Return the row numbers for each field that has captions.

    Looking up a caption takes about 2 microseconds, mostly to compute its hash. All captions of a table are therefore
    looked up once, in parallel. Their row numbers are saved in the table's folder and memory-mapped by all processes.
    Captions that the tokenizer could not encode and phrases without an embedding are skipped.

    Args:
        caption_hash: Hash of the texts in these fields; see `RecordTable.compute_identity`.

    Raises:
        StoreError: A caption is not in the store.
    """
    if not isinstance(source, EmbeddingStore) or table.folder is None:
        return _look_up_all_fields(table, source, fields)
    version = [
        CAPTION_ROWS_VERSION,
        caption_hash,
        source.manifest["fingerprint"],
        layout.get_index_path(source.folder, source.shards).name,
    ]
    name = hashlib.sha256(repr([*version, *fields]).encode()).hexdigest()[:32]
    folder = table.folder / f"caption-rows-{name}"
    with hold_folder_lock(table.folder, "caption-rows.lock", timeout=-1):
        if not folder.exists():
            with atomic_dir(folder) as temporary:
                for field, captions in _look_up_all_fields(table, source, fields).items():
                    np.save(temporary / f"{field}.rows.npy", captions.rows)
                    np.save(temporary / f"{field}.starts.npy", captions.starts)
    fields = [field for field in fields if (folder / f"{field}.rows.npy").exists()]
    return {field: _memory_map_caption_rows(folder, field) for field in fields}


def _memory_map_caption_rows(folder: Path, field: str) -> CaptionRows:
    rows, starts = (np.load(folder / f"{field}.{name}.npy", mmap_mode="r") for name in ("rows", "starts"))
    return CaptionRows(np.asarray(rows), np.asarray(starts))  # indexing a plain array is faster than indexing a memmap


def _look_up_all_fields(table: RecordTable, source: CaptionSource, fields: Sequence[str]) -> dict[str, CaptionRows]:
    captions: dict[str, CaptionRows] = {}
    for field in fields:
        num_texts = int(table.count_texts(field).sum(dtype=np.int64))
        if num_texts:
            in_processes = field != "phrases" and num_texts >= MIN_PARALLEL_CAPTIONS and table.folder is not None
            size = max(BATCH_ROWS, -(-len(table) // (TASKS_PER_CORE * count_cores())))
            tables = table.split(size) if in_processes else [table]
            parts = map_in_processes(partial(_look_up_field, field=field, source=source), tables)
            captions[field] = _concatenate_rows(list(parts))
    if "phrases" in captions and not len(captions["phrases"].rows) and isinstance(source, EmbeddingStore):
        print_once(
            f"No short phrases are used: {source.folder} has no phrase embeddings. To add them, run `llm2clip embed` "
            "with --phrases true"
        )
    return captions


def _look_up_field(table: RecordTable, field: str, source: CaptionSource) -> CaptionRows:
    refused = layout.read_refused_captions(source.folder) if isinstance(source, EmbeddingStore) else {}
    row_of_phrase: dict[str, int] = {}
    parts = []
    for batch in table.iterate_batches([field]):
        lists = batch.column(0)
        texts = lists.flatten()
        if not isinstance(source, EmbeddingStore):
            rows = source.find_rows(texts.to_pylist())
        elif field == "phrases":
            rows = _look_up_phrases(texts, source, row_of_phrase)
        else:
            rows = _look_up_captions(texts.to_pylist(), source, refused)
        record_of_row = np.repeat(np.arange(len(lists)), np.diff(lists.offsets.to_numpy()))
        is_found = rows >= 0
        parts.append(_sort_rows_by_record(rows[is_found], record_of_row[is_found], len(lists)))
    return _concatenate_rows(parts)


def _look_up_phrases(phrases: pa.Array, store: EmbeddingStore, row_of_phrase: dict[str, int]) -> np.ndarray:
    """Return the row numbers of phrases, or -1 for phrases that were too rare to be embedded.

    Many images share phrases, so each phrase is looked up only once and cached in `row_of_phrase`.
    """
    encoded = phrases.dictionary_encode()
    names = encoded.dictionary.to_pylist()
    new = [name for name in names if name not in row_of_phrase]
    row_of_phrase.update(zip(new, store.find_keys(layout.make_caption_keys(new)).tolist(), strict=True))
    rows = np.array([row_of_phrase[name] for name in names], np.int64)
    return rows[encoded.indices.to_numpy()]


def _look_up_captions(captions: list[str], store: EmbeddingStore, refused: Container[str]) -> np.ndarray:
    """Return the row numbers of captions, or -1 for refused captions, which the tokenizer could not encode."""
    rows = store.find_keys(layout.make_caption_keys(captions))
    missing = [captions[n] for n in np.flatnonzero(rows < 0).tolist()]
    store.find_rows(caption for caption in missing if caption not in refused)  # raises StoreError
    return rows


def _sort_rows_by_record(rows: np.ndarray, record_of_row: np.ndarray, num_records: int) -> CaptionRows:
    # Combine record and row into a single integer, because NumPy sorts integers faster than pairs.
    base = int(rows.max(initial=0)) + 1
    pairs = np.unique(record_of_row * base + rows)
    rows = pairs % base
    starts = np.concatenate([[0], np.cumsum(np.bincount(pairs // base, minlength=num_records))])
    return CaptionRows(rows.astype(np.uint32) if base < 1 << 32 else rows, starts)


def _concatenate_rows(parts: Sequence[CaptionRows]) -> CaptionRows:
    offsets = np.cumsum([0, *(len(part.rows) for part in parts)])
    starts = [np.zeros(1, np.int64), *(part.starts[1:] + offset for part, offset in zip(parts, offsets, strict=False))]
    return CaptionRows(np.concatenate([part.rows for part in parts]), np.concatenate(starts))


def drop_refused_captions(records: Sequence[Record], store: EmbeddingStore) -> Sequence[Record]:
    """Remove captions that the tokenizer could not encode, and drop records without any remaining captions."""
    refused = layout.read_refused_captions(store.folder)
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
