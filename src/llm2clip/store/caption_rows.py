"""Row numbers of the captions of a record table in an embedding store.

Looking up a caption takes about 2 microseconds, mostly for its hash. The captions of a table are therefore looked up
once, in parallel, and their row numbers are saved in the table's folder. All processes map these files into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from filelock import FileLock

from llm2clip.data.parallel import count_cores, map_in_processes
from llm2clip.data.table import BATCH_ROWS, RecordTable
from llm2clip.io_utils import atomic_dir
from llm2clip.runs.ranks import print_once
from llm2clip.store.layout import index_path, make_caption_keys
from llm2clip.store.store import EmbeddingStore, read_refused_captions

FORMAT_VERSION = 1  # increase it if the files change
MIN_PARALLEL_CAPTIONS = 4_000_000  # fewer captions are looked up in less time than processes take to start
TASKS_PER_CORE = 4


class CaptionSource(Protocol):
    """Source of text inputs for training: an embedding store or, in `clip_finetuning`, tokenized captions."""

    manifest: dict[str, Any]

    def find_rows(self, captions: Iterable[str]) -> np.ndarray:
        """Return the row numbers of N captions, of shape (N,), int64."""
        ...

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return the text inputs of N rows, of shape (N, ...)."""
        ...


@dataclass(frozen=True)
class CaptionRows:
    """Row numbers of each record's captions of one kind, as two flat arrays.

    Attributes:
        rows: Row numbers of all captions, uint32 or int64. Each record's row numbers are sorted and distinct.
        starts: Position of each record's first row number in `rows`, of shape (records + 1,), int64.
    """

    rows: np.ndarray
    starts: np.ndarray

    def __getitem__(self, record: int) -> np.ndarray:
        """Return the distinct row numbers of a record's captions, of shape (captions,)."""
        return self.rows[self.starts[record] : self.starts[record + 1]]


def find_caption_rows(
    table: RecordTable, source: CaptionSource, fields: Sequence[str], identity: str
) -> dict[str, CaptionRows]:
    """Find the captions of each record in the store, for each of the fields that has captions.

    Captions that the tokenizer could not encode and phrases without an embedding are skipped.

    Args:
        identity: Hash of the texts in these fields; see `RecordTable.compute_identity`.

    Raises:
        StoreError: A caption is not in the store.
    """
    if not isinstance(source, EmbeddingStore) or table.folder is None:
        return _look_up_fields(table, source, fields)
    version = [FORMAT_VERSION, identity, source.manifest["fingerprint"], index_path(source.folder, source.shards).name]
    name = hashlib.sha256(repr([*version, *fields]).encode()).hexdigest()[:32]
    folder = table.folder / f"caption-rows-{name}"
    with FileLock(table.folder / "caption-rows.lock"):  # the other processes of this machine wait for the files
        if not folder.exists():
            with atomic_dir(folder) as temporary:
                for field, captions in _look_up_fields(table, source, fields).items():
                    np.save(temporary / f"{field}.rows.npy", captions.rows)
                    np.save(temporary / f"{field}.starts.npy", captions.starts)
    fields = [field for field in fields if (folder / f"{field}.rows.npy").exists()]
    return {field: _map_caption_rows(folder, field) for field in fields}


def _map_caption_rows(folder: Path, field: str) -> CaptionRows:
    rows, starts = (np.load(folder / f"{field}.{name}.npy", mmap_mode="r") for name in ("rows", "starts"))
    return CaptionRows(np.asarray(rows), np.asarray(starts))  # a plain array is faster to index than a memmap


# ---- look-up ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A column of a table whose texts are looked up."""

    table: RecordTable
    field: str
    source: CaptionSource


def _look_up_fields(table: RecordTable, source: CaptionSource, fields: Sequence[str]) -> dict[str, CaptionRows]:
    captions: dict[str, CaptionRows] = {}
    for field in fields:
        num_texts = int(table.count_texts(field).sum(dtype=np.int64))
        if num_texts:
            in_processes = field != "phrases" and num_texts >= MIN_PARALLEL_CAPTIONS and table.folder is not None
            tasks = _split_table(table, field, source) if in_processes else [_Task(table, field, source)]
            captions[field] = _concatenate(list(map_in_processes(_look_up, tasks)))
    if "phrases" in captions and not len(captions["phrases"].rows) and isinstance(source, EmbeddingStore):
        print_once(
            f"No short phrases are used: {source.folder} has no phrase embeddings. To add them, run `llm2clip embed` "
            "with --phrases true"
        )
    return captions


def _split_table(table: RecordTable, field: str, source: CaptionSource) -> list[_Task]:
    """Split a table into parts that are cheap to send to another process."""
    column = table.resolve_field(field)
    assert column is not None
    size = max(BATCH_ROWS, -(-len(table) // (TASKS_PER_CORE * count_cores())))
    parts = [table.blocks.select_files(table.rows[start : start + size]) for start in range(0, len(table), size)]
    return [_Task(RecordTable(*part), column, source) for part in parts]


def _look_up(task: _Task) -> CaptionRows:
    """Find the texts of one field in the store, a batch at a time."""
    find_rows = _make_caption_finder(task.source)
    if task.field == "phrases" and isinstance(task.source, EmbeddingStore):
        find_rows = _make_phrase_finder(task.source)
    parts = []
    for batch in task.table.iterate_batches([task.field]):
        lists = batch.column(0)
        rows = find_rows(lists.flatten())
        record_of_row = np.repeat(np.arange(len(lists)), np.diff(lists.offsets.to_numpy()))
        is_found = rows >= 0
        parts.append(_sort_rows(rows[is_found], record_of_row[is_found], len(lists)))
    return _concatenate(parts)


def _make_caption_finder(source: CaptionSource) -> Callable[[pa.Array], np.ndarray]:
    """Return a function that finds the rows of captions, with -1 for captions that the tokenizer could not encode."""
    if not isinstance(source, EmbeddingStore):
        return lambda captions: source.find_rows(captions.to_pylist())
    refused = {row["caption"] for row in read_refused_captions(source.folder)}

    def find_rows(captions: pa.Array) -> np.ndarray:
        texts = captions.to_pylist()
        rows = source.find_keys(make_caption_keys(texts))
        missing = [texts[n] for n in np.flatnonzero(rows < 0).tolist()]
        source.find_rows(caption for caption in missing if caption not in refused)  # raises StoreError
        return rows

    return find_rows


def _make_phrase_finder(store: EmbeddingStore) -> Callable[[pa.Array], np.ndarray]:
    """Return a function that finds the rows of phrases, with -1 for phrases that were too rare to be embedded."""
    row_of_phrase: dict[str, int] = {}  # many images have the same phrases

    def find_rows(phrases: pa.Array) -> np.ndarray:
        encoded = phrases.dictionary_encode()
        names = encoded.dictionary.to_pylist()
        new = [name for name in names if name not in row_of_phrase]
        row_of_phrase.update(zip(new, store.find_keys(make_caption_keys(new)).tolist(), strict=True))
        rows = np.array([row_of_phrase[name] for name in names], np.int64)
        return rows[encoded.indices.to_numpy()]

    return find_rows


def _sort_rows(rows: np.ndarray, record_of_row: np.ndarray, num_records: int) -> CaptionRows:
    """Sort each record's row numbers and remove duplicates."""
    # Combine each record and row into a single integer, because NumPy sorts integers faster than pairs.
    base = int(rows.max(initial=0)) + 1
    pairs = np.unique(record_of_row * base + rows)
    rows = pairs % base
    starts = np.concatenate([[0], np.cumsum(np.bincount(pairs // base, minlength=num_records))])
    return CaptionRows(rows.astype(np.uint32) if base < 1 << 32 else rows, starts)


def _concatenate(parts: Sequence[CaptionRows]) -> CaptionRows:
    offsets = np.cumsum([0, *(len(part.rows) for part in parts)])
    starts = [np.zeros(1, np.int64), *(part.starts[1:] + offset for part, offset in zip(parts, offsets, strict=False))]
    return CaptionRows(np.concatenate([part.rows for part in parts]), np.concatenate(starts))
