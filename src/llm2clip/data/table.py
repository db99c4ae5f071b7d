"""Record tables: columnar, memory-mapped lists of records.

A table consists of Arrow record batches and of the numbers of the selected rows. Batches are mapped from files (see
`build_table.py`), so all processes of a machine share their pages, and a process needs 4 bytes of its own per record.
`Record` is the view of a single row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.data.blocks import BATCH_ROWS, NO_IMAGE, SCHEMA, TEXTS, Blocks, RowBuilder, are_adjacent, decode_name
from llm2clip.data.columns import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.image_hashes import hash_images
from llm2clip.data.image_refs import ImageRef
from llm2clip.data.records import Record


class RecordTable(Sequence[Record]):
    """Sequence of records in memory-mapped batches. Selecting records copies no columns.

    Attributes:
        blocks: Batches that contain the rows.
        rows: Row number of each record in the concatenated batches, of shape (N,), int32 or int64.
        folder: Folder for files that are derived from the table, or None for a table in memory.
    """

    def __init__(
        self,
        blocks: Blocks,
        rows: np.ndarray,
        folder: Path | None = None,
        caption_field: str | None = None,
        phrases: _Phrases | None = None,
    ) -> None:
        self.blocks, self.rows, self.folder = blocks, rows, folder
        self._caption_field, self._phrases = caption_field, phrases

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> RecordTable:
        """Create a table in memory."""
        builder = RowBuilder()
        for record in records:
            builder.add(record)
        batch = builder.take_batch()
        return cls(Blocks([batch], [builder.containers]), np.arange(batch.num_rows, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a record or, for a slice, a table."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of a table with {len(self):,} records")
        row = int(self.rows[position])
        captions, short, long = (self._get_texts(field, row) for field in CAPTION_FIELDS)
        split = self.blocks.get_value("split", row)
        return Record(
            id=decode_name(self.blocks.get_value("id", row)),
            image=self.blocks.get_image(row),
            captions=captions,
            short_captions=short,
            long_captions=long,
            split=None if split is None else decode_name(split),
            phrases=self._get_texts("phrases", row) if self._phrases is None else self._phrases.get(position),
            id_from_source=self.blocks.get_value("id_from_source", row),
        )

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 1024):
            yield from self._make_records(start, min(start + 1024, len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def select(self, positions: np.ndarray) -> RecordTable:
        """Return a table with the records at these positions (integers), or where a boolean mask is True."""
        positions = np.flatnonzero(positions) if positions.dtype == bool else positions
        phrases = self._phrases
        if phrases is not None:
            phrases = _Phrases(phrases.lists, positions if phrases.rows is None else phrases.rows[positions])
        return RecordTable(self.blocks, self.rows[positions], self.folder, self._caption_field, phrases)

    def split(self, size: int) -> list[RecordTable]:
        """Split the table into tables of at most `size` consecutive records, for example one per worker process.

        A process that receives such a table maps only the files that contain its records.
        """
        tables = []
        for start in range(0, len(self), size):
            table = self.select(np.arange(start, min(start + size, len(self))))
            table.blocks, table.rows = self.blocks.select_files(table.rows)
            tables.append(table)
        return tables

    def use_as_captions(self, field: str) -> RecordTable:
        """Return the records with the texts of one field as their captions, and without their other captions."""
        return RecordTable(self.blocks, self.rows, self.folder, self.resolve_field(field), self._phrases)

    def with_phrases(self, phrases: pa.ChunkedArray) -> RecordTable:
        """Return the records with other phrases: lists of strings, one per record."""
        assert len(phrases) == len(self)
        return RecordTable(self.blocks, self.rows, self.folder, self._caption_field, _Phrases(phrases))

    def resolve_field(self, field: str) -> str | None:
        """Return the column that contains the texts of a field, or None if the records have no such texts."""
        if self._caption_field is None or field == "phrases":
            return field
        return self._caption_field if field == "captions" else None

    # ---- columns -----------------------------------------------------------------------------------------------------

    def iterate_batches(self, columns: Sequence[str], size: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the columns of all records, in batches of at most `size` records."""
        for start in range(0, len(self), size):
            stop = min(start + size, len(self))
            yield self._take(columns, start, stop)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return the values of a column, one per record. Rows that are not adjacent are copied."""
        chunks = [batch.column(0) for batch in self.iterate_batches([name])]
        return pa.chunked_array(chunks, TEXTS if name in TEXT_FIELDS else SCHEMA.field(name).type)

    def numbers(self, name: str) -> np.ndarray:
        """Return a column of numbers without missing values, of shape (N,)."""
        arrays = [batch.column(0).to_numpy(zero_copy_only=False) for batch in self.iterate_batches([name])]
        return np.concatenate([np.empty(0, SCHEMA.field(name).type.to_pandas_dtype()), *arrays])

    def count_texts(self, field: str) -> np.ndarray:
        """Return the number of texts that each record has in a field, of shape (N,), int32."""
        counts = [_count_items(batch.column(0)) for batch in self.iterate_batches([field])]
        return np.concatenate([np.empty(0, np.int32), *counts])

    def iterate_texts(self, fields: Sequence[str]) -> Iterator[str]:
        """Yield the texts of each record, in the order of the fields."""
        for start in range(0, len(self), 4096):
            batch = self._take(fields, start, min(start + 4096, len(self)))
            columns = [column.to_pylist() for column in batch.columns]
            for texts_by_field in zip(*columns, strict=True):
                for texts in texts_by_field:
                    yield from texts

    @cached_property
    def has_image(self) -> np.ndarray:
        """Boolean mask of the records with an image, of shape (N,)."""
        return self.numbers("image_kind") != NO_IMAGE

    def get_images(self) -> ImageList:
        """Return the image references of all records."""
        return ImageList(self.blocks, self.rows)

    def hash_images(self) -> np.ndarray:
        """Return the sorted hashes of all distinct images, of shape (N,), uint64. See `image_hashes.hash_images`.

        Only images whose bytes were not read when the table was built are read.
        """
        hashes = self.numbers("image_hash")
        unknown = self.select(self.has_image & (hashes == 0))
        return np.union1d(hashes[hashes > 0], hash_images(unknown.get_images()))

    def compute_identity(self, *columns: str) -> str:
        """Return a hash of some columns of the records. Image columns are hashed with the paths of their files."""
        digest = hashlib.sha256()
        for batch in self.iterate_batches(columns):
            for name in columns:
                for part in _list_hashed_parts(batch.column(name)):
                    digest.update(part)
        if "container" in columns:
            for containers in self.blocks.containers:
                digest.update(json.dumps(containers).encode())
        return digest.hexdigest()

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _take(self, columns: Sequence[str], start: int, stop: int) -> pa.RecordBatch:
        """Return the columns of the records from `start` to `stop`."""
        stored = [name for name in columns if not (name in TEXT_FIELDS and self._is_replaced(name))]
        batch = self.blocks.take(self.rows[start:stop], stored)
        arrays = []
        for name in columns:
            if name in stored:
                arrays.append(batch.column(name))
            elif name == "phrases" and self._phrases is not None:
                arrays.append(self._phrases.take(start, stop))
            elif (field := self.resolve_field(name)) is not None:
                arrays.append(self.blocks.take(self.rows[start:stop], [field]).column(0))
            else:
                arrays.append(pa.ListArray.from_arrays(np.zeros(stop - start + 1, np.int32), pa.array([], pa.string())))
        return pa.RecordBatch.from_arrays(arrays, list(columns))

    def _get_texts(self, field: str, row: int) -> tuple[str, ...]:
        column = self.resolve_field(field)
        return () if column is None else tuple(self.blocks.get_value(column, row))

    def _is_replaced(self, field: str) -> bool:
        if field == "phrases":
            return self._phrases is not None
        return self._caption_field is not None

    def _make_records(self, start: int, stop: int) -> Iterator[Record]:
        values = self._take(["id", "id_from_source", "split", *TEXT_FIELDS], start, stop).to_pydict()
        texts = [list(map(tuple, values[field])) for field in TEXT_FIELDS]
        images = self.get_images()[start:stop]
        rows = zip(values["id"], values["id_from_source"], values["split"], images, *texts, strict=True)
        for name, from_source, split, image, captions, short, long, phrases in rows:
            yield Record(
                id=decode_name(name),
                image=image,
                captions=captions,
                short_captions=short,
                long_captions=long,
                split=None if split is None else decode_name(split),
                phrases=phrases,
                id_from_source=from_source,
            )


@dataclass(frozen=True)
class _Phrases:
    """Phrases that replace those of a table: lists of strings, and the index of each record's list (None: in order)."""

    lists: pa.ChunkedArray
    rows: np.ndarray | None = None

    def get(self, position: int) -> tuple[str, ...]:
        """Return the phrases of one record."""
        return tuple(self.lists[position if self.rows is None else int(self.rows[position])].as_py())

    def take(self, start: int, stop: int) -> pa.Array:
        """Return the phrases of the records from `start` to `stop`."""
        rows = np.arange(start, stop) if self.rows is None else self.rows[start:stop]
        is_slice = len(rows) > 0 and are_adjacent(rows)
        lists = self.lists.slice(int(rows[0]), len(rows)) if is_slice else self.lists.take(pa.array(rows))
        return lists.chunk(0) if lists.num_chunks == 1 else lists.combine_chunks()


class ImageList(Sequence[ImageRef | None]):
    """Image references of the records in a table. A worker process that receives this list maps the same files."""

    def __init__(self, blocks: Blocks, rows: Any) -> None:
        self.blocks, self.rows = blocks, np.asarray(rows)
        self._shared_rows: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return an image reference (None if the record has no image) or, for a slice, a list of them."""
        if isinstance(index, slice):
            return self.blocks.get_images(self.rows[index])
        return self.blocks.get_image(int(self.rows[index]))

    def take(self, positions: np.ndarray) -> list[Any]:
        """Return the image references of N records, which is faster than one by one."""
        return self.blocks.get_images(self.rows[positions])

    def __iter__(self) -> Iterator[ImageRef | None]:
        for start in range(0, len(self), 4096):
            yield from self[start : start + 4096]

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        # PyTorch sends tensors to data loader workers in shared memory, so there is one copy of the row numbers. The
        # shared memory must exist until the workers have mapped it, so this list refers to it.
        if self._shared_rows is None:
            self._shared_rows = torch.from_numpy(np.array(self.rows))
        return ImageList, (self.blocks, self._shared_rows)


def _count_items(lists: pa.ListArray) -> np.ndarray:
    """Return the length of each list, of shape (N,), int32."""
    return np.diff(lists.offsets.to_numpy())


def _list_hashed_parts(array: pa.Array) -> Iterator[Any]:
    """Yield byte buffers that determine an array's values, wherever the array is stored."""
    if pa.types.is_list(array.type):
        yield _count_items(array).tobytes()
        yield from _list_hashed_parts(array.flatten())
    elif pa.types.is_binary(array.type) or pa.types.is_string(array.type):
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        yield np.diff(offsets).tobytes()
        if len(array):
            yield memoryview(array.buffers()[2] or b"")[int(offsets[0]) : int(offsets[-1])]
    else:
        yield array.to_numpy(zero_copy_only=False).tobytes()
