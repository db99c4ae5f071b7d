"""Record tables: columnar, memory-mapped sequences of records.

A table consists of Arrow record batches and the row numbers of its records. All processes on a machine share the
memory-mapped batches, so each process needs only 4 bytes of its own memory per record.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.data.image_facts import ImageFacts, get_distinct_image_hashes
from llm2clip.data.image_refs import IMAGE_KINDS, ImageColumns, ImageRef, InMemoryImage, RecordTableImage
from llm2clip.data.records import TEXT_FIELDS, Record
from llm2clip.data.remote import get_pinned_versions, pin_versions
from llm2clip.data.table_cells import MAX_BATCH_BYTES, map_batches, memory_map_arrow_file
from llm2clip.io_utils import append_checksum

TEXTS = pa.list_(pa.string())
# Names are stored as bytes, because file names are not always valid Unicode; see `encode_file_name`.
SCHEMA = pa.schema(
    [
        ("id", pa.binary()),
        ("id_from_source", pa.bool_()),
        ("split", pa.binary()),
        *[(field, TEXTS) for field in TEXT_FIELDS],
        ("image_kind", pa.int8()),  # index into IMAGE_KINDS, or NO_IMAGE
        ("container", pa.int32()),  # index into the list of containers, which is stored at the end of the file
        ("image_name", pa.binary()),  # name of the file, tar member or table column
        ("offset", pa.int64()),  # byte offset in the tar file, or row number in a table
        ("size", pa.int64()),  # size of a tar member in bytes
        ("digest", pa.binary()),  # SHA-256 of an image in a table or in object storage
        ("image_data", pa.binary()),  # bytes of an image whose source cannot be read again
        ("width", pa.int32()),  # in pixels; 0 if the image header was not read
        ("height", pa.int32()),
        ("image_hash", pa.uint64()),  # see `image_facts.get_distinct_image_hashes`; 0 if the image was not read
        ("key_high", pa.uint64()),  # upper half of the key; rows with equal keys are merged, except for key 0
        ("key_low", pa.uint64()),
        ("draw_hash", pa.uint64()),  # images with the lowest hashes are held out
    ]
)
IMAGE_COLUMNS = ("image_kind", "container", "image_name", "offset", "size", "digest")
NO_IMAGE = -1
_KIND_NUMBERS = {kind: number for number, kind in enumerate(IMAGE_KINDS)}
BATCH_ROWS = 1 << 16  # default number of rows per batch


class RecordTable(Sequence[Record]):
    """Sequence of records in memory-mapped batches. Selecting records does not copy columns.

    `rows` contains each record's row number in `record_batches`, of shape (N,). `folder` contains files derived from
    the table, and is None for a table in memory.
    """

    def __init__(
        self,
        record_batches: RecordBatches,
        rows: np.ndarray,
        folder: Path | None = None,
        caption_field: str | None = None,
        phrases: _PhraseLists | None = None,
    ) -> None:
        self.record_batches, self.rows, self.folder = record_batches, rows, folder
        self._caption_field, self._phrases = caption_field, phrases

    @classmethod
    def from_records(cls, records: Iterable[Record]) -> RecordTable:
        builder = RecordBatchBuilder()
        for record in records:
            builder.add(record)
        batch = builder.take_batch()
        return cls(RecordBatches([batch], [builder.containers]), np.arange(batch.num_rows, dtype=np.int32))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return a record or, for a slice, a table."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} is out of range: the table has {len(self):,} records")
        return next(self._make_records(position, position + 1))

    def __iter__(self) -> Iterator[Record]:
        for start in range(0, len(self), 1024):
            yield from self._make_records(start, min(start + 1024, len(self)))

    def select(self, positions: np.ndarray) -> RecordTable:
        """Return a table with the records selected by integer positions or by a boolean mask."""
        positions = np.flatnonzero(positions) if positions.dtype == bool else positions
        phrases = self._phrases
        if phrases is not None:
            phrases = _PhraseLists(phrases.lists, phrases.rows[positions])
        return RecordTable(self.record_batches, self.rows[positions], self.folder, self._caption_field, phrases)

    def split(self, size: int) -> list[RecordTable]:
        """Split the table into tables of `size` records, each of which maps only the files that contain its records.

        Phrases set by `with_phrases` are not included, because every table would contain all phrases.
        """
        tables = []
        for start in range(0, len(self), size):
            record_batches, rows = self.record_batches.drop_files_without_rows(self.rows[start : start + size])
            tables.append(RecordTable(record_batches, rows, self.folder, self._caption_field))
        return tables

    def use_field_as_captions(self, field: str) -> RecordTable:
        """Return a table whose records have the texts of one field as their only captions."""
        return RecordTable(self.record_batches, self.rows, self.folder, self.resolve_field(field), self._phrases)

    def with_phrases(self, phrases: pa.ChunkedArray) -> RecordTable:
        """Return a copy of the table with the given phrases. `phrases` contains one list of strings per record."""
        assert len(phrases) == len(self)
        lists = _PhraseLists(phrases, np.arange(len(phrases), dtype=np.int32))
        return RecordTable(self.record_batches, self.rows, self.folder, self._caption_field, lists)

    def resolve_field(self, field: str) -> str | None:
        """Return the column that contains the texts of a field, or None if the records have no such texts."""
        if self._caption_field is None or field == "phrases":
            return field
        return self._caption_field if field == "captions" else None

    # ---- columns -----------------------------------------------------------------------------------------------------

    def iterate_batches(self, columns: Sequence[str], size: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the columns of all records, in batches of at most `size` records."""
        for start in range(0, len(self), size):
            yield self._take_columns(columns, start, min(start + size, len(self)))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return the values of a column. Values of rows that are not adjacent are copied."""
        chunks = [batch.column(0) for batch in self.iterate_batches([name])]
        return pa.chunked_array(chunks, TEXTS if name in TEXT_FIELDS else SCHEMA.field(name).type)

    def get_numeric_column(self, name: str) -> np.ndarray:
        """Return the values of a numeric column that has no nulls, of shape (N,)."""
        arrays = [batch.column(0).to_numpy(zero_copy_only=False) for batch in self.iterate_batches([name])]
        return np.concatenate([np.empty(0, SCHEMA.field(name).type.to_pandas_dtype()), *arrays])

    def count_texts(self, field: str) -> np.ndarray:
        """Count the texts in a field of each record. Return an array of shape (N,), int32."""
        counts = [_count_list_items(batch.column(0)) for batch in self.iterate_batches([field])]
        return np.concatenate([np.empty(0, np.int32), *counts])

    def iterate_texts(self, fields: Sequence[str]) -> Iterator[str]:
        """Yield the texts in the given fields of all records, in the order of the records."""
        for batch in self.iterate_batches(fields, 4096):
            columns = [column.to_pylist() for column in batch.columns]
            for texts_by_field in zip(*columns, strict=True):
                for texts in texts_by_field:
                    yield from texts

    @cached_property
    def has_image(self) -> np.ndarray:
        """Boolean mask of shape (N,) that selects the records with an image."""
        return self.get_numeric_column("image_kind") != NO_IMAGE

    def get_images(self) -> ImageRefList:
        return ImageRefList(self.record_batches, self.rows)

    def get_distinct_image_hashes(self) -> np.ndarray:
        """Return the sorted hashes of all distinct images, of shape (N,), uint64."""
        hashes = self.get_numeric_column("image_hash")
        unknown = self.select(self.has_image & (hashes == 0))
        return np.union1d(hashes[hashes > 0], get_distinct_image_hashes(unknown.get_images()))

    def compute_identity(self, *columns: str) -> str:
        """Return a hash of all values in the given columns. With the column "container", also hash the file paths."""
        digest = hashlib.sha256()
        for batch in self.iterate_batches(columns):
            for name in columns:
                for part in _iter_value_buffers(batch.column(name)):
                    digest.update(part)
        if "container" in columns:
            for containers in self.record_batches.containers:
                digest.update(json.dumps(containers).encode())
        return digest.hexdigest()

    # ---- rows --------------------------------------------------------------------------------------------------------

    def _take_columns(self, columns: Sequence[str], start: int, stop: int) -> pa.RecordBatch:
        fields = {name: self.resolve_field(name) if name in TEXT_FIELDS else name for name in columns}
        if self._phrases is not None and "phrases" in fields:
            fields["phrases"] = None
        stored = [field for field in fields.values() if field is not None]
        batch = self.record_batches.take(self.rows[start:stop], stored)
        arrays = []
        for name, field in fields.items():
            if field is not None:
                arrays.append(batch.column(field))
            elif name == "phrases" and self._phrases is not None:
                arrays.append(self._phrases.take(start, stop))
            else:
                arrays.append(pa.ListArray.from_arrays(np.zeros(stop - start + 1, np.int32), pa.array([], pa.string())))
        return pa.RecordBatch.from_arrays(arrays, list(columns))

    def _make_records(self, start: int, stop: int) -> Iterator[Record]:
        values = self._take_columns(["id", "id_from_source", "split", *TEXT_FIELDS], start, stop).to_pydict()
        images = self.record_batches.get_images(self.rows[start:stop])
        for name, from_source, split, *texts, image in zip(*values.values(), images, strict=True):
            yield Record(
                id=decode_file_name(name),
                image=image,
                split=None if split is None else decode_file_name(split),
                id_from_source=from_source,
                **dict(zip(TEXT_FIELDS, map(tuple, texts), strict=True)),
            )


@dataclass(frozen=True)
class _PhraseLists:
    """Lists of phrases that replace the phrases in a table. `rows` contains the list index of each record."""

    lists: pa.ChunkedArray
    rows: np.ndarray

    def take(self, start: int, stop: int) -> pa.Array:
        rows = self.rows[start:stop]
        is_slice = len(rows) > 0 and is_consecutive(rows)
        lists = self.lists.slice(int(rows[0]), len(rows)) if is_slice else self.lists.take(pa.array(rows))
        return lists.chunk(0) if lists.num_chunks == 1 else lists.combine_chunks()


class ImageRefList(Sequence[ImageRef | None]):
    """Image references of a table's records. Worker processes that receive the list memory-map the same files."""

    def __init__(self, record_batches: RecordBatches, rows: Any) -> None:
        self.record_batches, self.rows = record_batches, np.asarray(rows)
        self._shared_rows: Any = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        """Return an image reference (None if the record has no image) or, for a slice, a list of references."""
        if isinstance(index, slice):
            return self.take(index)
        return self.take([index])[0]

    def take(self, positions: Any) -> list[Any]:
        return self.record_batches.get_images(self.rows[positions])

    def __iter__(self) -> Iterator[ImageRef | None]:
        for start in range(0, len(self), 4096):
            yield from self[start : start + 4096]

    def __reduce__(self) -> tuple[Any, ...]:
        import torch

        # PyTorch sends tensors to data loader workers through shared memory, so the row numbers are stored only once.
        # The attribute `_shared_rows` keeps the shared memory alive until the workers have mapped it.
        if self._shared_rows is None:
            self._shared_rows = torch.from_numpy(np.array(self.rows))
        return ImageRefList, (self.record_batches, self._shared_rows)


def _count_list_items(lists: pa.ListArray) -> np.ndarray:
    return np.diff(lists.offsets.to_numpy())


def _iter_value_buffers(array: pa.Array) -> Iterator[Any]:
    """Yield byte buffers that depend only on an array's values, and not on its memory layout."""
    if pa.types.is_list(array.type):
        yield _count_list_items(array).tobytes()
        yield from _iter_value_buffers(array.flatten())
    elif pa.types.is_binary(array.type) or pa.types.is_string(array.type):
        offsets = np.frombuffer(array.buffers()[1], np.int32)[array.offset : array.offset + len(array) + 1]
        yield np.diff(offsets).tobytes()
        if len(array):
            yield memoryview(array.buffers()[2] or b"")[int(offsets[0]) : int(offsets[-1])]
    else:
        yield array.to_numpy(zero_copy_only=False).tobytes()


# ---- batches ---------------------------------------------------------------------------------------------------------


class RecordBatches:
    """Sequence of record batches. Rows are numbered across all batches, starting at 0.

    `containers` lists, for each batch, the paths of the files and folders that contain its images. `paths` contains the
    Arrow file of each batch and the batch's index in the file, and is empty if the batches are in memory.
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        containers: Sequence[Sequence[str]],
        paths: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.batches, self.containers, self.paths = batches, containers, paths
        self.starts = np.cumsum([0, *(batch.num_rows for batch in batches)])

    @classmethod
    def open(cls, files: Sequence[str], versions: Mapping[str, str] | None = None) -> RecordBatches:
        """Memory-map the batches in Arrow files written by `write_record_rows`.

        `versions` maps the URLs of remote files that contain images to the versions to pin; see `remote.pin_versions`.
        """
        pin_versions(versions or {})
        batches: list[pa.RecordBatch] = []
        containers: list[Sequence[str]] = []
        paths: list[tuple[str, int]] = []
        for file in files:
            mapped = map_batches(file)
            names = read_arrow_metadata(file, "containers")
            batches += mapped
            containers += [names] * len(mapped)
            paths += [(file, n) for n in range(len(mapped))]
        return cls(batches, containers, paths)

    @property
    def num_rows(self) -> int:
        return int(self.starts[-1])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.paths:
            containers = {name for names in self.containers for name in names}
            files = list(dict.fromkeys(path for path, _ in self.paths))
            return RecordBatches.open, (files, get_pinned_versions(containers))
        return RecordBatches, (self.batches, self.containers)

    def drop_files_without_rows(self, rows: np.ndarray) -> tuple[RecordBatches, np.ndarray]:
        """Return the batches of the files that contain the given rows, and the new numbers of the rows."""
        if not self.paths:
            return self, rows
        batch_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        files = {self.paths[n][0] for n in np.unique(batch_of_row).tolist()}
        numbers = [n for n, (file, _) in enumerate(self.paths) if file in files]
        record_batches = RecordBatches(
            [self.batches[n] for n in numbers], [self.containers[n] for n in numbers], [self.paths[n] for n in numbers]
        )
        shifts = np.zeros(len(self.batches), np.int64)
        shifts[numbers] = record_batches.starts[:-1] - self.starts[numbers]
        return record_batches, (rows + shifts[batch_of_row]).astype(rows.dtype)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.RecordBatch:
        """Return the given rows and columns. Adjacent rows in a batch are not copied."""
        if not len(rows):
            return pa.RecordBatch.from_arrays(
                [pa.array([], SCHEMA.field(name).type) for name in columns], list(columns)
            )
        batch_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        order = np.argsort(batch_of_row, kind="stable")  # sorted, so that each batch is read only once
        sorted_rows, batch_of_row = rows[order], batch_of_row[order]
        bounds = [0, *(np.flatnonzero(np.diff(batch_of_row)) + 1).tolist(), len(rows)]
        pieces = []
        for start, stop in pairwise(bounds):
            batch = self.batches[batch_of_row[start]].select(list(columns))
            local = sorted_rows[start:stop] - self.starts[batch_of_row[start]]
            if is_consecutive(local):
                pieces.append(batch.slice(int(local[0]), len(local)))
            else:
                pieces.append(batch.take(pa.array(local)))
        if len(pieces) == 1:
            return pieces[0]
        arrays = [pa.concat_arrays([piece.column(n) for piece in pieces]) for n in range(len(columns))]
        batch = pa.RecordBatch.from_arrays(arrays, list(columns))
        if np.array_equal(rows, sorted_rows):
            return batch
        positions = np.empty_like(order)
        positions[order] = np.arange(len(order))
        return batch.take(pa.array(positions))

    def get_images(self, rows: np.ndarray) -> list[ImageRef | None]:
        batches = (np.searchsorted(self.starts, rows, side="right") - 1).tolist()
        cells = self.take(rows, IMAGE_COLUMNS).to_pydict().values()
        cells_by_row = zip(*cells, strict=True)
        return [self._create_image_ref(*args) for args in zip(batches, rows.tolist(), cells_by_row, strict=True)]

    def _create_image_ref(self, batch: int, row: int, cells: tuple[Any, ...]) -> ImageRef | None:
        kind, container, name, offset, size, digest = cells
        if kind == NO_IMAGE:
            return None
        image_class = IMAGE_KINDS[kind]
        if image_class is not RecordTableImage:
            path = self.containers[batch][container]
            return image_class.from_columns(ImageColumns(path, decode_file_name(name), offset, size, digest))
        local = int(row - self.starts[batch])
        if not self.paths:
            data = self.batches[batch].column("image_data")[local].as_py()
            return InMemoryImage.from_columns(ImageColumns(name=decode_file_name(name), data=data))
        file, batch_in_file = self.paths[batch]
        return RecordTableImage.from_columns(ImageColumns(file, decode_file_name(name), local, batch_in_file, digest))


def read_arrow_metadata(file: str, name: str) -> Any:
    """Read the "summary" or the "containers" from a file written by `write_record_rows`."""
    reader = memory_map_arrow_file(file)
    _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    return json.loads(metadata[name])


def encode_file_name(name: str) -> bytes:
    """Encode a name that may not be valid Unicode, such as a file name."""
    return name.encode("utf-8", "surrogatepass")


def decode_file_name(name: bytes) -> str:
    return name.decode("utf-8", "surrogatepass")


def is_consecutive(rows: np.ndarray) -> bool:
    """Return True if the row numbers, of shape (N,) with N > 0, are consecutive."""
    return bool(rows[-1] - rows[0] == len(rows) - 1 and (len(rows) < 3 or np.all(np.diff(rows) == 1)))


# ---- writing ---------------------------------------------------------------------------------------------------------


class RecordBatchBuilder:
    """Builder of record batches. Images that exist only in memory are stored in the batches."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._rows: list[tuple[Any, ...]] = []
        self._containers: dict[str, int] = {}

    @property
    def containers(self) -> list[str]:
        """Paths of the files and folders that contain the images added so far."""
        return list(self._containers)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: Record, source: str = "", facts: ImageFacts = ImageFacts()) -> None:  # noqa: B008 - frozen
        """Add a record. Records without an image will be merged only with records from the same `source`."""
        key_high, key_low = compute_merge_key(record, source)
        kind, image, container = NO_IMAGE, ImageColumns(), 0
        if record.image is not None:
            kind = _KIND_NUMBERS.get(type(record.image), _KIND_NUMBERS[RecordTableImage])
            image = record.image.to_columns()
        if image.container is not None:
            container = self._containers.setdefault(image.container, len(self._containers))
        self.num_bytes += len(image.data or b"")
        self._rows.append(
            (
                encode_file_name(record.id),
                record.id_from_source,
                None if record.split is None else encode_file_name(record.split),
                *(getattr(record, field) for field in TEXT_FIELDS),
                kind,
                container,
                encode_file_name(image.name),
                image.offset,
                image.size,
                image.digest or facts.digest,
                image.data,
                facts.width,
                facts.height,
                facts.hash,
                key_high,
                key_low,
                compute_held_out_hash(record),
            )
        )

    def take_batch(self) -> pa.RecordBatch:
        """Return the collected rows as a batch, and start a new batch. The list of containers is not cleared."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(SCHEMA)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._rows, self.num_bytes = [], 0
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def write_record_rows(file: Path, rows: Iterable[tuple[Record, str, ImageFacts]], metadata: Callable[[], Any]) -> None:
    """Write rows to an Arrow file. Each row is a tuple with the arguments of `RecordBatchBuilder.add`.

    `metadata` is called after the last row. Its result is stored in the file as "summary"; see `read_arrow_metadata`.
    """
    builder = RecordBatchBuilder()
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_file(stream, SCHEMA) as writer:
        for record, source, facts in rows:
            builder.add(record, source, facts)
            if len(builder) >= BATCH_ROWS or builder.num_bytes >= MAX_BATCH_BYTES:
                writer.write_batch(builder.take_batch())
        if len(builder):
            writer.write_batch(builder.take_batch())
        values = {"containers": builder.containers, "summary": metadata()}
        encoded = {name: json.dumps(value) for name, value in values.items()}
        # The schema is at the start of an Arrow file, so the metadata is stored with an empty batch at the end.
        writer.write_batch(builder.take_batch(), custom_metadata=encoded)
    append_checksum(file)


def compute_merge_key(record: Record, source: str) -> tuple[int, int]:
    """Return a 128-bit hash of a record's image or, without an image, of its source, split and id.

    Records with neither an identified image nor an id from the source have the hash (0, 0) and are never merged.
    """
    if record.image is not None and record.image.is_identified:
        text = record.image.key
    elif record.id_from_source:
        text = "\0".join(["id", source, record.split or "", record.id])
    else:
        return 0, 0
    high, low = struct.unpack(">QQ", hashlib.blake2b(encode_file_name(text), digest_size=16).digest())
    return high, low


def compute_held_out_hash(record: Record) -> int:
    """Return the 64-bit hash that decides whether an image is held out."""
    # The captions are included because several records can have the same id.
    text = "\0".join([record.id, *record.texts])
    return int.from_bytes(hashlib.sha256(encode_file_name(text)).digest()[:8], "big")
