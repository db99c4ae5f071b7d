"""Image references, which specify where the encoded bytes of an image are stored.

Records contain references instead of images, so that lists of records are small and can be sent to other processes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.image_header import MAX_FILE_BYTES

# Limit on the decoded image bytes of a Parquet row group. A file of a few hundred bytes can expand to many gigabytes,
# because rows can share a value and because values are compressed.
MAX_ROW_GROUP_BYTES = 2 << 30
MAX_BATCH_BYTES = 512 << 20  # approximate limit on the image bytes that are decoded at a time


class ImageRef(ABC):
    """Location of an image's bytes. It is small, can be pickled, and works in any process. `str()` returns a name."""

    __slots__ = ()

    @property
    def key(self) -> str:
        """String that is the same for all references to an image, even if their paths are written differently."""
        return self.canonical_path

    @property
    def canonical_path(self) -> str:
        """Absolute path of the file, with symbolic links to folders resolved."""
        container = self.container_path
        if container is None:
            return str(self)
        return resolve_folder(container) + str(self)[len(container) :]

    @property
    def identifies_image(self) -> bool:
        """True if `key` identifies the image. False for a table cell whose bytes have not been read, because other
        cells may contain the same image."""
        return True

    @property
    def container_path(self) -> str | None:
        """Path of the file or folder that contains the bytes, or None for an image in memory."""
        return getattr(self, "path", None) or getattr(self, "folder", None)

    @abstractmethod
    def open(self) -> BinaryIO:
        """Open the encoded bytes as a stream, so that the header can be read on its own."""

    def read(self) -> bytes:
        """Return all encoded bytes.

        Raises:
            OSError: The image cannot be read, or it has more than `MAX_FILE_BYTES` bytes.
        """
        with self.open() as stream:
            return read_image_file(stream)


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image reference, together with the image's bytes if they have already been read.

    Attributes:
        ref: Reference to the image.
        data: Encoded bytes, or None if they have not been read.
        name: Original file name, if known.
    """

    ref: ImageRef
    data: bytes | None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class FileImage(ImageRef):
    """An image file."""

    path: str

    @property
    def canonical_path(self) -> str:
        return resolve_folder(self.path)

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def __str__(self) -> str:
        return self.path


@dataclass(frozen=True, slots=True)
class TarImage(ImageRef):
    """A member of an uncompressed tar file. Its offset is known, so it can be read without scanning the file."""

    path: str
    offset: int
    size: int
    name: str = ""

    @property
    def key(self) -> str:
        return f"{self.canonical_path}@{self.offset}"  # several members of a tar file may have the same name

    def open(self) -> BinaryIO:
        return io.BufferedReader(_FileSlice(self.path, self.offset, self.size))

    def __str__(self) -> str:
        return f"{self.path}!{self.name or self.offset}"


class _FileSlice(io.RawIOBase):
    """Stream over part of a file. It lets Pillow read an image's header without reading the entire tar member."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._offset, self._size, self._position = offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        start = (0, self._position, self._size)[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._position))
        self._file.seek(self._offset + self._position)
        count = self._file.readinto(memoryview(buffer)[:size]) or 0
        self._position += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


class _TableCell(ImageRef):
    """A table cell that contains an image. A hash of the bytes identifies the image, because a table with one row per
    caption contains each image several times. `digest` is empty if the bytes have not been read."""

    __slots__ = ()
    digest: str

    @property
    def key(self) -> str:
        return self.digest or self.canonical_path

    @property
    def identifies_image(self) -> bool:
        return bool(self.digest)


@dataclass(frozen=True, slots=True)
class ParquetImage(_TableCell):
    """A cell in a Parquet file. It contains either bytes or a struct with bytes and a path.

    The first read from a row group decodes the entire image column of that row group. Each process caches the decoded
    columns of four row groups. Reading in file order is therefore fast, but each read in random order usually decodes
    another row group. Row groups should therefore be small; Hugging Face uses 100 rows.
    """

    path: str
    row: int
    column: str
    digest: str = ""

    def open(self) -> BinaryIO:
        version = _file_version(self.path)
        try:
            starts = _row_group_starts(self.path, version)
            group = bisect_right(starts, self.row) - 1
            column = _parquet_column(self.path, version, group, self.column)
        except pa.ArrowException as error:  # some Arrow exceptions are ValueErrors
            raise OSError(f"{self}: {error}") from error
        if self.row - starts[group] >= len(column):
            raise FileNotFoundError(f"{self} no longer exists")
        value = column[self.row - starts[group]].as_py()
        return _open_cell(value, os.path.dirname(self.path), str(self))

    def __str__(self) -> str:
        return f"{self.path}[{self.row}].{self.column}"


@dataclass(frozen=True, slots=True)
class DatasetImage(_TableCell):
    """A cell in a Hugging Face data set written by `save_to_disk`. Memory mapping makes random access fast."""

    folder: str
    split: str | None
    row: int
    column: str
    digest: str = ""

    def open(self) -> BinaryIO:
        try:
            value = _saved_dataset(self.folder, _file_version(self.folder), self.split)[self.row][self.column]
        except (pa.ArrowException, IndexError) as error:
            raise OSError(f"{self}: {error}") from error
        return _open_cell(value, self.folder, str(self))

    def __str__(self) -> str:
        return f"{self.folder}{'/' + self.split if self.split else ''}[{self.row}].{self.column}"


@dataclass(frozen=True, slots=True)
class MemoryImage(ImageRef):
    """An encoded image in memory, for sources that can be read only once."""

    data: bytes
    name: str = "image in memory"

    @property
    def key(self) -> str:
        return content_digest(self.data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


def read_image_file(stream: BinaryIO) -> bytes:
    """Return the contents of an open image file.

    Raises:
        OSError: The file cannot be read, or it has more than `MAX_FILE_BYTES` bytes. A sparse file can claim to have
            terabytes.
    """
    size = stream.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise OSError(f"file too large: {size:,} bytes are more than {MAX_FILE_BYTES:,}")
    stream.seek(0)
    return stream.read()


def content_digest(data: bytes) -> str:
    """Return the hexadecimal SHA-256 hash of an image's bytes, which identifies the image."""
    return hashlib.sha256(data).hexdigest()


def is_inside(name: str) -> bool:
    """Return True if a file name from a data set is relative and does not contain "..".

    Such a name cannot refer to a file outside the data set's folder, except through a symbolic link. Symbolic links are
    not checked.
    """
    return not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def printable(name: str) -> str:
    """Convert a file name to valid Unicode. Bytes that are not UTF-8 are replaced with escape sequences."""
    return name.encode("utf-8", "backslashreplace").decode()


def disable_image_decoding(dataset: Any) -> Any:
    """Make a Hugging Face data set return each image undecoded, as a dict with the keys "bytes" and "path"."""
    import datasets

    for column, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def resolve_folder(path: str) -> str:
    """Make a path absolute and resolve symbolic links in its folder. The file name is not resolved."""
    folder, name = os.path.split(path)
    return os.path.join(_real_path(os.path.abspath(folder)), name)


@functools.lru_cache(maxsize=4096)
def _real_path(folder: str) -> str:
    return os.path.realpath(folder)


def _file_version(path: str) -> tuple[int, int]:
    """Return a file's size and modification time. They are part of cache keys, so that stale entries are never used."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _row_group_starts(path: str, version: tuple[int, int]) -> list[int]:
    metadata = pq.read_metadata(path)
    starts = [0]
    for group in range(metadata.num_row_groups - 1):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts


@functools.lru_cache(maxsize=4)
def _parquet_column(path: str, version: tuple[int, int], group: int, column: str) -> pa.ChunkedArray:
    # The file is reopened each time and read without threads, because file handles and thread pools that survive a
    # fork can deadlock in data loader workers.
    batch_size = _batch_size(path, version, column)
    with pq.ParquetFile(path) as file:
        batches, num_bytes = [], 0
        for batch in file.iter_batches(batch_size, row_groups=[group], columns=[column], use_threads=False):
            num_bytes += batch.nbytes
            if num_bytes > MAX_ROW_GROUP_BYTES:
                raise _row_group_error(group)
            batches.append(batch.column(0))
        return pa.chunked_array(batches, type=file.schema_arrow.field(column).type)


@functools.lru_cache(maxsize=1024)
def _batch_size(path: str, version: tuple[int, int], column: str) -> int:
    """Cached `parquet_batch_size`, because it scans all row groups, and every row group is read separately."""
    with pq.ParquetFile(path) as file:
        return parquet_batch_size(file, [column])


def parquet_batch_size(file: pq.ParquetFile, image_columns: Collection[str]) -> int:
    """Return the number of rows (at most 64) to read at a time from a Parquet file with images.

    All rows of a row group can share one large value, so each image can be as large as the entire row group. In this
    worst case, the images in a batch still take at most `MAX_BATCH_BYTES`, unless the batch is a single row.

    Raises:
        OSError: The images of a row group have more than `MAX_ROW_GROUP_BYTES` bytes according to the file's metadata.
    """
    largest = 1
    for group in range(file.metadata.num_row_groups):
        metadata = file.metadata.row_group(group)
        chunks = [metadata.column(index) for index in range(metadata.num_columns)]
        images = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in image_columns]
        num_bytes = sum(chunk.total_uncompressed_size for chunk in images)
        if num_bytes > MAX_ROW_GROUP_BYTES:
            raise _row_group_error(group)
        largest = max(largest, num_bytes)
    return max(1, min(64, MAX_BATCH_BYTES // largest))


def _row_group_error(group: int) -> OSError:
    return OSError(
        f"the images of row group {group} have more than {MAX_ROW_GROUP_BYTES:,} bytes. Rewrite the file with smaller "
        "row groups, such as 100 rows"
    )


@functools.lru_cache(maxsize=16)
def _saved_dataset(folder: str, version: tuple[int, int], split: str | None) -> Any:
    from datasets import load_from_disk

    loaded = load_from_disk(folder)
    return disable_image_decoding(loaded[split] if split is not None and isinstance(loaded, dict) else loaded)


def _open_cell(value: Any, folder: str, name: str) -> BinaryIO:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is not None:
        return io.BytesIO(data)
    if path is None:
        raise FileNotFoundError(f"{name} does not contain an image")
    return open(os.path.join(folder, str(path)), "rb")
