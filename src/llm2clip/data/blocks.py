"""Rows of a record table: their columns, writing them, and mapping them into memory. See `table.py`."""

from __future__ import annotations

import hashlib
import json
import struct
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.data.columns import TEXT_FIELDS
from llm2clip.data.image_facts import ImageFacts
from llm2clip.data.image_refs import (
    IMAGE_KINDS,
    MAX_BATCH_BYTES,
    ImageColumns,
    ImageRef,
    MemoryImage,
    StoredImage,
    map_batches,
)
from llm2clip.data.records import Record
from llm2clip.data.remote import get_pinned_versions, pin_versions

TEXTS = pa.list_(pa.string())
# Names that come from file names may not be valid Unicode, so they are stored as bytes; see `encode_name`.
SCHEMA = pa.schema(
    [
        ("id", pa.binary()),
        ("id_from_source", pa.bool_()),
        ("split", pa.binary()),
        *[(field, TEXTS) for field in TEXT_FIELDS],
        ("image_kind", pa.int8()),  # index into IMAGE_KINDS, or NO_IMAGE
        ("container", pa.int32()),  # index into the file's list of containers
        ("image_name", pa.binary()),  # file name, tar member or column
        ("offset", pa.int64()),  # position in the tar file, or row number in a table
        ("size", pa.int64()),  # bytes, only for tar members
        ("digest", pa.binary()),  # SHA-256 of an image in a table or in object storage
        ("image_data", pa.binary()),  # bytes of an image that cannot be read again
        ("width", pa.int32()),  # pixels; 0 if the header was not checked
        ("height", pa.int32()),
        ("image_hash", pa.uint64()),  # see `image_hashes.hash_images`; 0 if the image was not read
        ("key_high", pa.uint64()),  # rows with the same key are merged; 0 for rows that are never merged
        ("key_low", pa.uint64()),
        ("draw_hash", pa.uint64()),  # order in which images are held out
    ]
)
_COLUMN_INDEX = {name: n for n, name in enumerate(SCHEMA.names)}
IMAGE_COLUMNS = ("image_kind", "container", "image_name", "offset", "size", "digest")
NO_IMAGE = -1
_KIND_NUMBERS = {kind: number for number, kind in enumerate(IMAGE_KINDS)}
_HALVES = struct.Struct(">QQ")
BATCH_ROWS = 1 << 16  # rows per batch when a table is read in batches


# ---- reading --------------------------------------------------------------------------------------------------------


class Blocks:
    """Record batches, numbered consecutively, with the paths of the files and folders that contain their images.

    Attributes:
        batches: Batches with the columns in `SCHEMA`.
        containers: Paths of the containers of each batch's images.
        paths: Arrow file of each batch, and the index of the batch in this file. Empty for batches in memory.
        starts: Number of the first row of each batch, followed by the total number of rows.
    """

    def __init__(
        self,
        batches: Sequence[pa.RecordBatch],
        containers: Sequence[Sequence[str]],
        paths: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.batches, self.containers, self.paths = batches, containers, paths
        self.starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self._starts: list[int] = self.starts.tolist()  # faster for single rows

    @classmethod
    def open(cls, files: Sequence[str], versions: Mapping[str, str] | None = None) -> Blocks:
        """Map the batches in Arrow files that were written by `write_rows`.

        `versions` contains the versions of remote files with images to pin; see `remote.pin_versions`.
        """
        pin_versions(versions or {})
        batches: list[pa.RecordBatch] = []
        containers: list[Sequence[str]] = []
        paths: list[tuple[str, int]] = []
        for file in files:
            mapped = map_batches(file)
            names = read_metadata(file, "containers")
            batches += mapped
            containers += [names] * len(mapped)
            paths += [(file, n) for n in range(len(mapped))]
        return cls(batches, containers, paths)

    @property
    def num_rows(self) -> int:
        return self._starts[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.paths:
            containers = {name for names in self.containers for name in names}
            files = list(dict.fromkeys(path for path, _ in self.paths))
            return Blocks.open, (files, get_pinned_versions(containers))
        return Blocks, (self.batches, self.containers)

    def select_files(self, rows: np.ndarray) -> tuple[Blocks, np.ndarray]:
        """Return the batches of the files that contain these rows, and the numbers of the rows in these batches."""
        if not self.paths:
            return self, rows
        batch_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        files = {self.paths[n][0] for n in np.unique(batch_of_row).tolist()}
        numbers = [n for n, (file, _) in enumerate(self.paths) if file in files]
        blocks = Blocks(
            [self.batches[n] for n in numbers],
            [self.containers[n] for n in numbers],
            [self.paths[n] for n in numbers],
        )
        shifts = np.zeros(len(self.batches), np.int64)
        shifts[numbers] = blocks.starts[:-1] - self.starts[numbers]
        return blocks, (rows + shifts[batch_of_row]).astype(rows.dtype)

    def take(self, rows: np.ndarray, columns: Sequence[str]) -> pa.RecordBatch:
        """Return some columns of N rows. Adjacent rows of one batch are not copied."""
        if not len(rows):
            return pa.RecordBatch.from_arrays(
                [pa.array([], SCHEMA.field(name).type) for name in columns], list(columns)
            )
        batch_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        bounds = [0, *(np.flatnonzero(np.diff(batch_of_row)) + 1).tolist(), len(rows)]
        if len(bounds) > 64 and len(bounds) > 2 * len(self.batches):  # rows in random order: visit each batch once
            order = np.argsort(batch_of_row, kind="stable")
            inverse = np.empty_like(order)
            inverse[order] = np.arange(len(order))
            return self.take(rows[order], columns).take(pa.array(inverse))
        pieces = []
        for start, stop in pairwise(bounds):
            batch = self.batches[batch_of_row[start]].select(list(columns))
            local = rows[start:stop] - self.starts[batch_of_row[start]]
            if are_adjacent(local):
                pieces.append(batch.slice(int(local[0]), len(local)))
            else:
                pieces.append(batch.take(pa.array(local)))
        if len(pieces) == 1:
            return pieces[0]
        arrays = [pa.concat_arrays([piece.column(n) for piece in pieces]) for n in range(len(columns))]
        return pa.RecordBatch.from_arrays(arrays, list(columns))

    def get_images(self, rows: np.ndarray) -> list[ImageRef | None]:
        """Return the image references of N rows."""
        batches = (np.searchsorted(self.starts, rows, side="right") - 1).tolist()
        values = self.take(rows, IMAGE_COLUMNS).to_pydict()
        columns = [values[name] for name in IMAGE_COLUMNS]
        return [self._make_image(*cells) for cells in zip(batches, rows.tolist(), *columns, strict=True)]

    def get_image(self, row: int) -> ImageRef | None:
        """Return the image reference of one row."""
        batch = bisect_right(self._starts, row) - 1
        return self._make_image(batch, row, *(self.get_value(name, row) for name in IMAGE_COLUMNS))

    def get_value(self, column: str, row: int) -> Any:
        """Return a value of one row as a Python object."""
        batch = bisect_right(self._starts, row) - 1
        return self.batches[batch].column(_COLUMN_INDEX[column])[row - self._starts[batch]].as_py()

    def _make_image(
        self, batch: int, row: int, kind: int, container: int, name: bytes, offset: int, size: int, digest: bytes | None
    ) -> ImageRef | None:
        if kind == NO_IMAGE:
            return None
        image_class = IMAGE_KINDS[kind]
        if image_class is not StoredImage:
            path = self.containers[batch][container]
            return image_class.from_columns(ImageColumns(path, decode_name(name), offset, size, digest))
        local = row - self._starts[batch]
        if not self.paths:
            data = self.batches[batch].column("image_data")[local].as_py()
            return MemoryImage.from_columns(ImageColumns(name=decode_name(name), data=data))
        file, batch_in_file = self.paths[batch]
        return StoredImage.from_columns(ImageColumns(file, decode_name(name), local, batch_in_file, digest))


def read_metadata(file: str, name: str) -> Any:
    """Return the "summary" or the "containers" of a file written by `write_rows`."""
    reader = pa.ipc.open_file(pa.memory_map(file))
    _, metadata = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
    return json.loads(metadata[name])


def encode_name(name: str) -> bytes:
    """Encode a name that may come from a file name that is not valid Unicode."""
    return name.encode("utf-8", "surrogatepass")


def decode_name(name: bytes) -> str:
    """Decode a name from `encode_name`."""
    return name.decode("utf-8", "surrogatepass")


def are_adjacent(rows: np.ndarray) -> bool:
    """Return True if row numbers, of shape (N,), N > 0, are consecutive."""
    return bool(rows[-1] - rows[0] == len(rows) - 1 and (len(rows) < 3 or np.all(np.diff(rows) == 1)))


# ---- writing --------------------------------------------------------------------------------------------------------


class RowBuilder:
    """Collects records as rows of a batch. The bytes of images that are only in memory are stored."""

    def __init__(self) -> None:
        self.num_bytes = 0  # size of the stored images
        self._rows: list[tuple[Any, ...]] = []
        self._containers: dict[str, int] = {}

    @property
    def containers(self) -> list[str]:
        """Paths of the containers of all images added so far."""
        return list(self._containers)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: Record, source: str = "", facts: ImageFacts = ImageFacts()) -> None:  # noqa: B008 - frozen
        """Add a record. Rows without an image are merged only within the same `source`."""
        key_high, key_low = hash_merge_key(record, source)
        kind, image, container = NO_IMAGE, ImageColumns(), 0
        if record.image is not None:
            kind = _KIND_NUMBERS.get(type(record.image), _KIND_NUMBERS[StoredImage])
            image = record.image.to_columns()
        if image.container is not None:
            container = self._containers.setdefault(image.container, len(self._containers))
        self.num_bytes += len(image.data or b"")
        self._rows.append(
            (
                encode_name(record.id),
                record.id_from_source,
                None if record.split is None else encode_name(record.split),
                record.captions,
                record.short_captions,
                record.long_captions,
                record.phrases,
                kind,
                container,
                encode_name(image.name),
                image.offset,
                image.size,
                image.digest or facts.digest,
                image.data,
                facts.width,
                facts.height,
                facts.hash,
                key_high,
                key_low,
                hash_draw(record),
            )
        )

    def take_batch(self) -> pa.RecordBatch:
        """Return the collected rows as a batch, and start a new one. The containers remain numbered."""
        columns = zip(*self._rows, strict=True) if self._rows else [()] * len(SCHEMA)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._rows, self.num_bytes = [], 0
        return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def write_rows(file: Path, rows: Iterable[tuple[Record, str, ImageFacts]], metadata: Callable[[], Any]) -> None:
    """Write rows, given as the arguments of `RowBuilder.add`, to an Arrow file that can be mapped into memory.

    `metadata` is called at the end. Its value is saved with the rows; see `read_metadata`.
    """
    builder = RowBuilder()
    with pa.OSFile(str(file), "wb") as stream, pa.ipc.new_file(stream, SCHEMA) as writer:
        for record, source, facts in rows:
            builder.add(record, source, facts)
            if len(builder) >= BATCH_ROWS or builder.num_bytes >= MAX_BATCH_BYTES:
                writer.write_batch(builder.take_batch())
        if len(builder):
            writer.write_batch(builder.take_batch())
        values = {"containers": builder.containers, "summary": metadata()}
        encoded = {name: json.dumps(value) for name, value in values.items()}
        # An Arrow file starts with its schema, so what is known only at the end belongs to an empty last batch.
        writer.write_batch(builder.take_batch(), custom_metadata=encoded)


def hash_merge_key(record: Record, source: str) -> tuple[int, int]:
    """Return a 128-bit hash of what identifies a record: its image or, without an image, its source, split and id.

    Return (0, 0) if nothing identifies the record. Such records are never merged.
    """
    if record.image is not None and record.image.identifies_image:
        return _hash_128(record.image.key)
    if not record.id_from_source:
        return 0, 0
    return _hash_128("\0".join(["id", source, record.split or "", record.id]))


def _hash_128(text: str) -> tuple[int, int]:
    high, low = _HALVES.unpack(hashlib.blake2b(encode_name(text), digest_size=16).digest())
    return high, low


def hash_draw(record: Record) -> int:
    """Return the hash by which held-out images are chosen: the first 64 bits of SHA-256 of the id and the captions."""
    # The captions are included because several records may have the same id.
    text = "\0".join([record.id, *record.texts])
    return int.from_bytes(hashlib.sha256(encode_name(text)).digest()[:8], "big")
