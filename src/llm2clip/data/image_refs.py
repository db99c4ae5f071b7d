"""References to images in files, tar files, tables and memory.

Each kind of reference is a subclass of `ImageRef`. `IMAGE_KINDS` lists the kinds that a record table can contain.
"""

import functools
import hashlib
import io
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple, Self

from llm2clip.data.image_header import MAX_IMAGE_BYTES
from llm2clip.data.remote import FileSlice, get_remote_version, open_file
from llm2clip.data.skip_log import BadRowError
from llm2clip.data.storage import get_parent_folder, is_remote, join_path, parse_file_size
from llm2clip.data.table_cells import memory_map_cached_batches, open_image_cell, read_parquet_cell
from llm2clip.io_utils import FatalDataError, describe_error, hide_url_secrets

_resolve_real_path = functools.lru_cache(maxsize=4096)(os.path.realpath)


class ImageColumns(NamedTuple):
    """Column values that represent an image reference in a record table."""

    container: str | None = None  # path of the containing file or folder; None if the record table contains the image
    name: str = ""  # name of the image file, tar member or table column
    offset: int = 0  # byte offset in a tar file, or row number in a table
    size: int = 0  # size of a tar member in bytes
    digest: bytes | None = None  # SHA-256 of the image's bytes, for images that are identified by their bytes
    data: bytes | None = None  # bytes of an image that cannot be read again


class ImageRef(ABC):
    """Reference to the encoded bytes of an image, valid in any process. `str()` returns a name for messages."""

    __slots__ = ()
    kind_name: ClassVar[str] = "memory"  # storage type, as named in reports
    has_file_name: ClassVar[bool] = False  # True for image files and tar members

    @property
    def key(self) -> str:
        """String that is equal for all references to the same image, even if the references use different paths."""
        return self.canonical_path

    @property
    def canonical_path(self) -> str:
        """Absolute path of the image, with symbolic links to folders resolved."""
        container = self.container_path
        if container is None:
            return str(self)
        return resolve_folder_links(container) + str(self)[len(hide_url_secrets(container)) :]

    @property
    def is_identified(self) -> bool:
        """True if `key` identifies the image. False for a table cell whose bytes have not been read."""
        return True

    @property
    def container_path(self) -> str | None:
        """Path of the file that contains the image, or None for an image in memory."""
        return getattr(self, "path", None)

    def open(self) -> BinaryIO:
        """Open the encoded bytes as a stream. Raise OSError if the image cannot be read."""
        with self._convert_reader_errors():
            return self._open()

    def read(self) -> bytes:
        """Return all encoded bytes. Raise OSError if the image cannot be read or exceeds `MAX_IMAGE_BYTES`."""
        with self._convert_reader_errors(), self._open() as stream:
            size = stream.seek(0, os.SEEK_END)
            if size > MAX_IMAGE_BYTES:
                raise OSError(f"file too large: {size:,} bytes; the limit is {MAX_IMAGE_BYTES:,} bytes")
            stream.seek(0)
            return stream.read()

    def to_columns(self) -> ImageColumns:
        """Convert the reference to column values of a record table. By default, the table stores the image's bytes."""
        data = self.read()
        return ImageColumns(name=str(self), digest=hashlib.sha256(data).digest(), data=data)

    @classmethod
    @abstractmethod
    def from_columns(cls, columns: ImageColumns) -> Self:
        """Create a reference from column values of a record table."""

    @abstractmethod
    def _open(self) -> BinaryIO:
        """Open the encoded bytes as a stream. Corrupt files can cause any type of exception."""

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
    """Image reference, with the image's bytes if the image has already been read."""

    ref: ImageRef
    data: bytes | None
    name: str | None = None  # original file name of the image, if known


@dataclass(frozen=True, slots=True)
class FileImage(ImageRef):
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
        return resolve_folder_links(self.path)

    def _open(self) -> BinaryIO:
        return open_file(self.path)

    def __str__(self) -> str:
        return hide_url_secrets(self.path)


@dataclass(frozen=True, slots=True)
class TarImage(ImageRef):
    """Image in an uncompressed tar file. The image is read at its offset, without scanning the tar file."""

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
        if self.size > MAX_IMAGE_BYTES:
            return ImageRef.read(self)  # raises OSError
        with self._convert_reader_errors(), open_file(self.path) as file:  # much faster than a `FileSlice`
            file.seek(self.offset)
            return file.read(self.size)

    def _open(self) -> BinaryIO:
        return io.BufferedReader(FileSlice(self.path, self.offset, self.size))

    def __str__(self) -> str:
        return f"{hide_url_secrets(self.path)}!{self.name or self.offset}"


class _TableCellImage(ImageRef):
    """Image in a table cell, identified by its bytes, because several cells can contain the same image."""

    __slots__ = ()
    digest: str  # hexadecimal SHA-256 of the image's bytes, or "" if the bytes have not been read

    @property
    def key(self) -> str:
        return self.digest or self.canonical_path

    @property
    def is_identified(self) -> bool:
        return bool(self.digest)


@dataclass(frozen=True, slots=True)
class ParquetImage(_TableCellImage):
    """Image in a Parquet cell that contains bytes or a struct with bytes and a path. Random access is slow."""

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
        cell = read_parquet_cell(self.path, get_file_version(self.path), self.row, self.column)
        return open_image_cell(cell, str(self))

    def __str__(self) -> str:
        return f"{hide_url_secrets(self.path)}[{self.row}].{self.column}"


@dataclass(frozen=True, slots=True)
class InMemoryImage(ImageRef):
    """Encoded image in memory, from a source that can be read only once."""

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
class RecordTableImage(_TableCellImage):
    """Encoded image in a record table, from a source that can be read only once."""

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
        cell = memory_map_cached_batches(self.path)[self.batch].column("image_data")[self.row]
        return open_image_cell(cell, str(self))

    def __str__(self) -> str:
        return self.name


# Record tables store an image's kind as an index into this tuple. Images of kinds that are not listed here are
# converted to `RecordTableImage` objects.
IMAGE_KINDS: tuple[type[ImageRef], ...] = (FileImage, TarImage, ParquetImage, RecordTableImage)


def parse_image_cell(value: Any, file: str, reject_urls: bool) -> LoadedImage | None:
    """Return a reference to the image in a table cell, or None if the cell is empty.

    A cell can contain a path relative to the folder of `file`, encoded bytes, a dict with the keys "bytes" and "path"
    (as in Hugging Face datasets), or an image reference.

    Raises:
        BadRowError: The value has an unsupported type, or it is a URL and `reject_urls` is True.
    """
    if type(value) is LoadedImage:
        return value
    name = None
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        name = value.get("path")
        value = value["bytes"] if value.get("bytes") is not None else name
    if is_missing_value(value) or value == b"":
        return None
    if isinstance(value, ImageRef):
        return LoadedImage(value, None, str(value))
    if isinstance(value, bytes):
        return LoadedImage(InMemoryImage(value, name or f"image in {file}"), value, name)
    if not isinstance(value, str):
        raise BadRowError("malformed row", f"an image must be a path, bytes or null (got {value!r})")
    if reject_urls and ":" in value and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", value):
        raise BadRowError("image is a URL", value)
    path = join_path(get_parent_folder(file), value)
    if is_remote(file):
        return LoadedImage(FileImage(path), None, value)
    if "\\" in value and not os.path.exists(path):  # the path may have Windows separators
        portable = os.path.join(os.path.dirname(file), value.replace("\\", "/"))
        path = portable if os.path.exists(portable) else path
    return LoadedImage(FileImage(path), None, path)


def is_missing_value(value: object) -> bool:
    """Return True for None, empty strings, empty lists and NaN, which pandas uses for missing values."""
    kind = type(value)
    if kind is str or kind is list:
        return not value
    return value is None or (isinstance(value, float) and math.isnan(value))


def compute_content_digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def is_safe_relative_path(name: str) -> bool:
    """Return True if a relative file name cannot refer to a file outside its folder, except through symbolic links."""
    return not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def resolve_folder_links(path: str) -> str:
    """Return the absolute path of a file, with symbolic links to folders resolved. URLs are unchanged."""
    if is_remote(path):
        return path
    folder, name = os.path.split(path)
    return os.path.join(_resolve_real_path(os.path.abspath(folder)), name)


def get_file_version(path: str) -> tuple[tuple[int, int], ...]:
    """Return the size and modification time (in ns) of a file. For a remote file, the time is a hash of its version."""
    if is_remote(path):
        version = get_remote_version(path)
        return ((parse_file_size(version), int(hashlib.sha256(version.encode()).hexdigest()[:15], 16)),)
    status = os.stat(path)
    return ((status.st_size, status.st_mtime_ns),)
