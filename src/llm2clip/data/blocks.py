"""Record batches, mapped from the files of a record table. See `table.py`."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from llm2clip.data.columns import TEXT_FIELDS
from llm2clip.data.image_refs import (
    DatasetImage,
    FileImage,
    ImageRef,
    MemoryImage,
    ParquetImage,
    StoredImage,
    TarImage,
    map_batches,
)
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
IMAGE_KINDS: tuple[type[ImageRef], ...] = (FileImage, TarImage, ParquetImage, DatasetImage, StoredImage)
NO_IMAGE = -1
BATCH_ROWS = 1 << 16  # rows per batch when a table is read in batches


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
        if IMAGE_KINDS[kind] is StoredImage:
            local = row - self._starts[batch]
            if not self.paths:
                return MemoryImage(self.batches[batch].column("image_data")[local].as_py(), decode_name(name))
            return StoredImage(*self.paths[batch], local, (digest or b"").hex(), decode_name(name))
        path = self.containers[batch][container]
        text = decode_name(name)
        if IMAGE_KINDS[kind] is FileImage:
            return FileImage(path + text)
        if IMAGE_KINDS[kind] is TarImage:
            return TarImage(path, offset, size, text)
        hexdigest = "" if digest is None else digest.hex()
        if IMAGE_KINDS[kind] is ParquetImage:
            return ParquetImage(path, offset, text, hexdigest)
        folder, split = json.loads(path)
        return DatasetImage(folder, split, offset, text, hexdigest)


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
