"""Image references, which specify where the encoded bytes of an image are stored.

Records contain references instead of images, so lists of records are small and can be sent to other processes. A kind
of reference is one subclass of `ImageRef`, which reads the bytes, names the image, and converts itself to and from the
columns of a record table. `IMAGE_KINDS` lists the kinds that a record table may contain.
"""

import functools
import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq

from llm2clip.data.image_header import MAX_FILE_BYTES
from llm2clip.data.remote import FileSlice, get_version_numbers, is_remote, open_file, open_remote
from llm2clip.io_utils import FatalDataError, describe_error, hide_url_secrets

# Limit on the decoded image bytes in a Parquet row group. Because of compression and shared values, a file of a few
# hundred bytes can expand to many gigabytes.
MAX_ROW_GROUP_BYTES = 2 << 30
MAX_BATCH_BYTES = 256 << 20  # approximate limit on the size of the rows decoded in one batch
MAX_WINDOW_BYTES = 128 << 20  # approximate limit on the size of the adjacent cells that are kept when a cell is read
MAX_CACHE_BYTES = 256 << 20  # limit on the total size of the decoded cells that each process caches
MAX_CELL_BYTES = 256 << 20  # size limit for an image in a table cell


class ImageColumns(NamedTuple):
    """Image reference, as stored in the columns of a record table.

    Attributes:
        container: Path of the file or folder that contains the image. None if the bytes are stored in the table.
        name: File name, tar member or table column.
        offset: Position in a tar file, or row number in a table.
        size: Number of bytes of a tar member.
        digest: SHA-256 of the image's bytes, if they identify the image.
        data: Bytes of an image that cannot be read again.
    """

    container: str | None = None
    name: str = ""
    offset: int = 0
    size: int = 0
    digest: bytes | None = None
    data: bytes | None = None


class ImageRef(ABC):
    """Reference to an image's encoded bytes. References are small, picklable and valid in any process.

    `str()` returns a name for use in messages.

    Attributes:
        kind_name: Where such images are stored, for reports.
        has_file_name: True if the image is a file, or a member of an archive, with a file name of its own.
    """

    __slots__ = ()
    kind_name: ClassVar[str] = "memory"
    has_file_name: ClassVar[bool] = False

    @property
    def key(self) -> str:
        """String that is the same for all references to an image, even if they write its path differently."""
        return self.canonical_path

    @property
    def canonical_path(self) -> str:
        """Absolute path of the file, with symbolic links to folders resolved."""
        container = self.container_path
        if container is None:
            return str(self)
        return resolve_folder(container) + str(self)[len(hide_url_secrets(container)) :]

    @property
    def identifies_image(self) -> bool:
        """True if `key` identifies the image. False for a table cell whose bytes have not been read, because other
        cells may contain the same image."""
        return True

    @property
    def container_path(self) -> str | None:
        """Path of the file or folder that contains the bytes, or None for an image in memory."""
        return getattr(self, "path", None) or getattr(self, "folder", None)

    def open(self) -> BinaryIO:
        """Open the encoded bytes as a stream, for example to read only the header.

        Raises:
            OSError: The image cannot be read.
        """
        with self._convert_reader_errors():
            return self._open()

    def read(self) -> bytes:
        """Return all encoded bytes.

        Raises:
            OSError: The image cannot be read, or is larger than `MAX_FILE_BYTES`.
        """
        with self._convert_reader_errors(), self._open() as stream:
            return read_image_file(stream)

    def to_columns(self) -> ImageColumns:
        """Convert the reference to the columns of a record table. By default, the bytes are stored in the table."""
        data = self.read()
        return ImageColumns(name=str(self), digest=hashlib.sha256(data).digest(), data=data)

    @classmethod
    @abstractmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        """Create a reference from the columns of a record table."""

    @abstractmethod
    def _open(self) -> BinaryIO:
        """Open the encoded bytes as a stream. May raise any type of exception if the file is corrupt."""

    @contextmanager
    def _convert_reader_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, FatalDataError):
            raise
        except Exception as error:
            raise OSError(f"{self}: {describe_error(error)}") from error


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """An image reference, together with the image's bytes if they have already been read."""

    ref: ImageRef
    data: bytes | None
    name: str | None = None  # original file name, if known


@dataclass(frozen=True, slots=True)
class FileImage(ImageRef):
    """An image file."""

    kind_name: ClassVar[str] = "image files"
    has_file_name: ClassVar[bool] = True
    path: str

    def to_columns(self) -> ImageColumns:
        end = self.path.rfind("/") + 1
        return ImageColumns(self.path[:end], self.path[end:])

    @classmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        return cls(f"{columns.container}{columns.name}")

    @property
    def canonical_path(self) -> str:
        return resolve_folder(self.path)

    def _open(self) -> BinaryIO:
        return open_file(self.path)

    def __str__(self) -> str:
        return hide_url_secrets(self.path)


@dataclass(frozen=True, slots=True)
class TarImage(ImageRef):
    """A member of an uncompressed tar file. With its offset, the member can be read without scanning the file."""

    kind_name: ClassVar[str] = "tar files"
    has_file_name: ClassVar[bool] = True
    path: str
    offset: int
    size: int
    name: str = ""

    def to_columns(self) -> ImageColumns:
        return ImageColumns(self.path, self.name, self.offset, self.size)

    @classmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        return cls(columns.container or "", columns.offset, columns.size, columns.name)

    @property
    def key(self) -> str:
        return f"{self.canonical_path}@{self.offset}"  # several members of a tar file may have the same name

    def read(self) -> bytes:
        if self.size > MAX_FILE_BYTES:
            return ImageRef.read(self)  # raises an error
        with self._convert_reader_errors(), open_file(self.path) as file:  # much faster than through `FileSlice`
            file.seek(self.offset)
            return file.read(self.size)

    def _open(self) -> BinaryIO:
        return io.BufferedReader(FileSlice(self.path, self.offset, self.size))

    def __str__(self) -> str:
        return f"{hide_url_secrets(self.path)}!{self.name or self.offset}"


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

    Reading a cell decodes its row group up to that cell, plus as many of the following cells as fit in
    `MAX_WINDOW_BYTES`. Each process caches up to `MAX_CACHE_BYTES` of decoded cells. Reading in file order is therefore
    fast. In random order, most reads must first decode a row group. Files should have small row groups; Hugging Face
    uses 100 rows.
    """

    kind_name: ClassVar[str] = "Parquet files"
    path: str
    row: int
    column: str
    digest: str = ""

    def to_columns(self) -> ImageColumns:
        return ImageColumns(self.path, self.column, self.row, digest=bytes.fromhex(self.digest) or None)

    @classmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        return cls(columns.container or "", columns.offset, columns.name, (columns.digest or b"").hex())

    def _open(self) -> BinaryIO:
        return _open_cell(_read_parquet_cell(self.path, self.row, self.column), self)

    def __str__(self) -> str:
        return f"{hide_url_secrets(self.path)}[{self.row}].{self.column}"


@dataclass(frozen=True, slots=True)
class DatasetImage(_TableCell):
    """A cell in a Hugging Face data set written by `save_to_disk`. Memory mapping makes random access fast."""

    kind_name: ClassVar[str] = "Hugging Face data sets"
    folder: str
    split: str | None
    row: int
    column: str
    digest: str = ""

    def to_columns(self) -> ImageColumns:
        container = json.dumps([self.folder, self.split])
        return ImageColumns(container, self.column, self.row, digest=bytes.fromhex(self.digest) or None)

    @classmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        folder, split = json.loads(columns.container or "")
        return cls(folder, split, columns.offset, columns.name, (columns.digest or b"").hex())

    def _open(self) -> BinaryIO:
        version = get_file_version(os.path.join(self.folder, self.split or ""))
        dataset = _open_saved_column(self.folder, version, self.split, self.column)
        return _open_cell(dataset[self.row][self.column], self)

    def __str__(self) -> str:
        return f"{self.folder}{'/' + self.split if self.split else ''}[{self.row}].{self.column}"


@dataclass(frozen=True, slots=True)
class MemoryImage(ImageRef):
    """An encoded image in memory, for sources that can be read only once."""

    data: bytes
    name: str = "image in memory"

    @classmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        assert columns.data is not None
        return cls(columns.data, columns.name)

    @property
    def key(self) -> str:
        return compute_content_digest(self.data)

    def _open(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class StoredImage(_TableCell):
    """An encoded image in a record table, for sources that can be read only once."""

    kind_name: ClassVar[str] = "the record table"
    path: str
    batch: int
    row: int
    digest: str = ""
    name: str = ""

    @classmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        return cls(columns.container or "", columns.size, columns.offset, (columns.digest or b"").hex(), columns.name)

    def _open(self) -> BinaryIO:
        return _open_cell(_map_cached_batches(self.path)[self.batch].column("image_data")[self.row], self)

    def __str__(self) -> str:
        return self.name


# An image's kind is stored in record tables as its index in this list. An image of another kind is a `StoredImage`.
IMAGE_KINDS: tuple[type[ImageRef], ...] = (FileImage, TarImage, ParquetImage, DatasetImage, StoredImage)


def read_image_file(stream: BinaryIO) -> bytes:
    """Return the contents of an open image file.

    Raises:
        OSError: The file cannot be read, or is larger than `MAX_FILE_BYTES`. A sparse file can claim to be terabytes
            in size.
    """
    size = stream.seek(0, os.SEEK_END)
    if size > MAX_FILE_BYTES:
        raise OSError(f"file too large: {size:,} bytes; the limit is {MAX_FILE_BYTES:,} bytes")
    stream.seek(0)
    return stream.read()


def compute_content_digest(data: bytes) -> str:
    """Return the hexadecimal SHA-256 hash of an image's bytes, which identifies the image."""
    return hashlib.sha256(data).hexdigest()


def is_safe_relative_path(name: str) -> bool:
    """Return True if a file name from a data set is relative and does not contain "..".

    Such a name cannot refer to a file outside the data set's folder, except through a symbolic link. Symbolic links are
    not checked.
    """
    return not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def to_valid_unicode(name: str) -> str:
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
    """Make a path absolute and resolve symbolic links in its folder, but not in its file name. Keep URLs unchanged."""
    if is_remote(path):
        return path
    folder, name = os.path.split(path)
    folder = _resolve_real_path(folder if os.path.isabs(folder) else os.path.abspath(folder))
    return os.path.join(folder, name)


@functools.lru_cache(maxsize=4096)
def _resolve_real_path(folder: str) -> str:
    return os.path.realpath(os.path.abspath(folder))


def get_file_version(path: str) -> tuple[tuple[int, int], ...]:
    """Return the size and modification time (in ns) of a file, or of every file in a folder and its subfolders.

    For a remote file, a hash of its etag takes the place of the modification time. A folder's own modification time is
    not enough, because overwriting a file in the folder does not change it.
    """
    if is_remote(path):
        return (get_version_numbers(path),)
    files = [path]
    if os.path.isdir(path):
        files = sorted(os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
    return tuple((status.st_size, status.st_mtime_ns) for status in map(os.stat, files))


# ---- cells of tables -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Window:
    """Consecutive decoded cells in a row group."""

    start: int  # index of the first cell in the row group
    cells: pa.ChunkedArray
    num_bytes: int


_windows: OrderedDict[tuple[object, ...], _Window] = OrderedDict()  # decoded cells, least recently used first


def _read_parquet_cell(path: str, row: int, column: str) -> pa.Scalar:
    """Return a cell, if possible from a cached window of decoded cells. The total size of all windows is limited.

    No lock is used, because a process forked while another thread holds the lock would wait forever. If two threads
    need the same window, both decode it.
    """
    version = get_file_version(path)
    starts, batch_size = _read_row_group_layout(path, version)
    group = bisect_right(starts, row) - 1
    row -= starts[group]
    key = (path, version, group, column)
    window = _windows.pop(key, None)
    if window is None or not window.start <= row < window.start + len(window.cells):
        window = _decode_window(path, group, column, row, batch_size)
    _windows[key] = window
    while len(_windows) > 64 or sum(w.num_bytes for w in list(_windows.values())) > MAX_CACHE_BYTES:
        _windows.popitem(last=False)
    return window.cells[row - window.start]


@functools.lru_cache(maxsize=1024)
def _read_row_group_layout(path: str, version: object) -> tuple[list[int], int]:
    """Return the index of each row group's first row, and the number of rows to decode at a time."""
    with open_parquet(path) as file:
        metadata = file.metadata
    starts = [0]
    for group in range(metadata.num_row_groups - 1):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return starts, choose_parquet_batch_size(metadata)


def _decode_window(path: str, group: int, column: str, row: int, batch_size: int) -> _Window:
    """Decode a row group up to the given row, plus as many of the following rows as fit in `MAX_WINDOW_BYTES`.

    Raises:
        FileNotFoundError: The row group does not contain this row.
        OSError: The cells up to this row take more than `MAX_ROW_GROUP_BYTES`.
    """
    # The file is reopened each time and read without threads, because file handles and thread pools that survive a
    # fork can deadlock in data loader workers.
    batches: deque[pa.Array] = deque()
    start = num_bytes = num_decoded = 0
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size, row_groups=[group], columns=[column], use_threads=False):
            index = batch.schema.get_field_index(column)  # the batch may have other columns, such as "image.x"
            if index < 0:
                raise OSError(f"{path} must have exactly one column {column!r}")
            cells = batch.column(index)
            batches.append(cells)
            num_bytes += cells.nbytes
            num_decoded += cells.nbytes
            while num_bytes > MAX_WINDOW_BYTES and start + len(batches[0]) <= row:
                start += len(batches[0])
                num_bytes -= batches.popleft().nbytes
            is_decoded = row < start + sum(map(len, batches))
            if is_decoded and num_bytes > MAX_WINDOW_BYTES:
                break
            if not is_decoded and num_decoded > MAX_ROW_GROUP_BYTES:
                raise _build_row_group_error(group)
    if row >= start + sum(map(len, batches)):
        raise FileNotFoundError(f"{path} no longer has row {row} in row group {group}")
    return _Window(start, pa.chunked_array(batches), num_bytes)


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file. Of a remote file that is not in the cache, only the parts that are used are downloaded."""
    if not is_remote(path):
        with pq.ParquetFile(path) as file:
            yield file
        return
    with open_remote(path) as source, pq.ParquetFile(source) as file:
        yield file


def choose_parquet_batch_size(metadata: pq.FileMetaData) -> int:
    """Return the number of rows (at most 64) to read at a time from a Parquet file.

    All rows in a row group can share one large value, so each value can be as large as the entire row group. Even then,
    a batch takes at most `MAX_BATCH_BYTES`, unless it is a single row.
    """
    return max(1, min(64, MAX_BATCH_BYTES // max([1, *_list_row_group_bytes(metadata)])))


def check_row_group_sizes(metadata: pq.FileMetaData) -> None:
    """Raise OSError if a Parquet file's metadata lists a row group larger than `MAX_ROW_GROUP_BYTES`."""
    for group, num_bytes in enumerate(_list_row_group_bytes(metadata)):
        if num_bytes > MAX_ROW_GROUP_BYTES:
            raise _build_row_group_error(group)


def _list_row_group_bytes(metadata: pq.FileMetaData) -> list[int]:
    """Return the uncompressed size of each row group, as stated in the file's metadata."""
    # Column sizes are not used, because `RowGroupMetaData.column` crashes the process if the metadata is corrupt.
    return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _build_row_group_error(group: int) -> OSError:
    return OSError(
        f"the images in row group {group} take more than {MAX_ROW_GROUP_BYTES:,} bytes. Rewrite the file with smaller "
        "row groups, such as 100 rows each"
    )


@functools.lru_cache(maxsize=16)
def _open_saved_column(folder: str, version: object, split: str | None, column: str) -> Any:
    from datasets import load_from_disk

    loaded = load_from_disk(folder)
    dataset = loaded[split] if split is not None and isinstance(loaded, dict) else loaded
    return disable_image_decoding(dataset.select_columns([column]))


def map_batches(path: str) -> list[pa.RecordBatch]:
    """Map an Arrow file into memory."""
    reader = pa.ipc.open_file(pa.memory_map(path))
    return [reader.get_batch(n) for n in range(reader.num_record_batches)]


@functools.lru_cache(maxsize=1024)
def _map_cached_batches(path: str) -> list[pa.RecordBatch]:
    return map_batches(path)


def _open_cell(cell: Any, ref: ImageRef) -> BinaryIO:
    """Open the image in a table cell, which contains bytes or a struct with bytes (Arrow or Python values).

    Paths in cells are not opened. The cell contained bytes when the reference was created, so a path means that the
    table has changed, and the path could point to any file on this machine.

    Raises:
        OSError: The cell contains no bytes, or more than `MAX_CELL_BYTES`.
    """
    data = cell.get("bytes") if isinstance(cell, dict | pa.StructScalar) else cell
    if isinstance(data, pa.Scalar):
        data = data.as_buffer() if data.is_valid else None
    if data is None:
        raise FileNotFoundError(f"{ref} does not contain the bytes of an image")
    size = memoryview(data).nbytes
    if size > MAX_CELL_BYTES:
        raise OSError(f"image too large: {size:,} bytes; the limit for a table cell is {MAX_CELL_BYTES:,} bytes")
    return io.BytesIO(data)
