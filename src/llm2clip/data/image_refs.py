"""References to images: where the bytes are, and how they are found again.

A record holds a reference and not the image, so that a list of records is small and goes to any process.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq


class ImageRef(ABC):
    """Where an image's bytes are: small, picklable, readable in any process. `str()` names it in messages."""

    __slots__ = ()

    @property
    def key(self) -> str:
        """Equal for the same image and for no other, however its path is written."""
        return self.canonical_path

    @property
    def canonical_path(self) -> str:
        """Where it is, however its path is written."""
        if (here := self.container_path) is None:
            return str(self)
        folder, name = os.path.split(here)
        return os.path.join(_real(os.path.abspath(folder)), name) + str(self)[len(here) :]

    @property
    def identifies_image(self) -> bool:
        """Whether `key` tells it from others, which that of a cell whose bytes were not read does not."""
        return True

    @property
    def container_path(self) -> str | None:
        """The file or folder that its bytes are in; None of one in memory."""
        return getattr(self, "path", None) or getattr(self, "folder", None)

    @abstractmethod
    def open(self) -> BinaryIO:
        """The bytes as a stream, for who needs only the header."""

    def read(self) -> bytes:
        """All the encoded bytes (not decoded)."""
        with self.open() as stream:
            return stream.read()


@dataclass(frozen=True, slots=True)
class FileImage(ImageRef):
    """An image file."""

    path: str

    @property
    def canonical_path(self) -> str:
        folder, name = os.path.split(self.path)
        return os.path.join(_real(os.path.abspath(folder)), name)

    def open(self) -> BinaryIO:
        return open(self.path, "rb")

    def __str__(self) -> str:
        return self.path


def content_digest(data: bytes) -> str:
    """What tells an image by its bytes."""
    return hashlib.sha256(data).hexdigest()


def is_inside(name: str) -> bool:
    """Whether the name of a file, as someone else wrote it, stays in its folder; links in the folder are its owner's
    affair."""
    return not os.path.isabs(name) and ".." not in name.replace("\\", "/").split("/")


def printable(name: str) -> str:
    """A name that can be written as text: bytes that are no UTF-8 are spelt out."""
    return name.encode("utf-8", "backslashreplace").decode()


@functools.lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


@dataclass(frozen=True, slots=True)
class TarImage(ImageRef):
    """A member of an uncompressed tar, read by seeking: any member costs the same, nothing is extracted."""

    path: str
    offset: int
    size: int
    name: str = ""

    @property
    def key(self) -> str:
        return f"{self.canonical_path}@{self.offset}"  # a tar may hold several of one name

    def open(self) -> BinaryIO:
        return io.BufferedReader(_Window(self.path, self.offset, self.size))

    def __str__(self) -> str:
        return f"{self.path}!{self.name or self.offset}"


class _Window(io.RawIOBase):
    """A stretch of a file as a stream of its own, so that PIL can read a header without the whole member."""

    def __init__(self, path: str, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = open(path, "rb", buffering=0), offset, size, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, (0, self._at, self._size)[whence] + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._offset + self._at)
        got = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._at += got
        return got

    def close(self) -> None:
        self._file.close()
        super().close()


class _Cell(ImageRef):
    """A cell of a table, told by the digest of its bytes where they were met: a table may have a row for each caption,
    the image in each."""

    __slots__ = ()
    digest: str

    @property
    def key(self) -> str:
        return self.digest or self.canonical_path

    @property
    def identifies_image(self) -> bool:
        return bool(self.digest)


@dataclass(frozen=True, slots=True)
class ParquetImage(_Cell):
    """A cell of a parquet file (bytes, or a struct of bytes and path).

    The first read of a row group decodes its whole image column; four such columns are kept a process. Reading in file
    order is therefore cheap, and reading at random costs a row group an image: write small row groups (HF's are 100).
    """

    path: str
    row: int
    column: str
    digest: str = ""

    def open(self) -> BinaryIO:
        stamp = _stamp(self.path)
        try:
            starts = _row_group_starts(self.path, stamp)
            group = bisect_right(starts, self.row) - 1
            column = _parquet_column(self.path, stamp, group, self.column)
        except pa.ArrowException as error:  # some are ValueErrors
            raise OSError(f"{self}: {error}") from error
        if self.row - starts[group] >= len(column):
            raise FileNotFoundError(f"{self} is not there any more")
        value = column[self.row - starts[group]].as_py()
        return _open_cell(value, os.path.dirname(self.path), str(self))

    def __str__(self) -> str:
        return f"{self.path}[{self.row}].{self.column}"


def _stamp(path: str) -> tuple[int, int]:
    """Changes with a file, so that what is kept of an older one is not taken for it."""
    there = os.stat(path)
    return there.st_size, there.st_mtime_ns


@functools.lru_cache(maxsize=1024)
def _row_group_starts(path: str, stamp: tuple[int, int]) -> list[int]:
    meta = pq.read_metadata(path)
    starts = [0]
    for group in range(meta.num_row_groups - 1):
        starts.append(starts[-1] + meta.row_group(group).num_rows)
    return starts


@functools.lru_cache(maxsize=4)
def _parquet_column(path: str, stamp: tuple[int, int], group: int, column: str) -> pa.ChunkedArray:
    # Opened anew and read on this thread: a handle or a thread pool kept over a fork is what hangs data loaders.
    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(0)


@dataclass(frozen=True, slots=True)
class DatasetImage(_Cell):
    """A cell of a Hugging Face data set saved by `save_to_disk`: memory-mapped, so random access is cheap."""

    folder: str
    split: str | None
    row: int
    column: str
    digest: str = ""

    def open(self) -> BinaryIO:
        try:
            value = _saved(self.folder, _stamp(self.folder), self.split)[self.row][self.column]
        except (pa.ArrowException, IndexError) as error:
            raise OSError(f"{self}: {error}") from error
        return _open_cell(value, self.folder, str(self))

    def __str__(self) -> str:
        return f"{self.folder}{'/' + self.split if self.split else ''}[{self.row}].{self.column}"


@functools.lru_cache(maxsize=16)
def _saved(folder: str, stamp: tuple[int, int], split: str | None) -> Any:
    from datasets import load_from_disk

    loaded = load_from_disk(folder)
    return disable_image_decoding(loaded[split] if split is not None and isinstance(loaded, dict) else loaded)


def disable_image_decoding(part: Any) -> Any:
    """A Hugging Face data set whose images come as they are stored: bytes and path."""
    import datasets

    for column, feature in (part.features or {}).items():
        if isinstance(feature, datasets.Image):
            part = part.cast_column(column, datasets.Image(decode=False))
    return part


def _open_cell(value: Any, folder: str, name: str) -> BinaryIO:
    data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
    if data is None and path is None:
        raise FileNotFoundError(f"{name} holds no image")
    return io.BytesIO(data) if data is not None else open(os.path.join(folder, str(path)), "rb")


@dataclass(frozen=True, slots=True)
class MemoryImage(ImageRef):
    """Bytes in memory, for sources that can be read only once. Keep few."""

    data: bytes
    name: str = "image in memory"

    @property
    def key(self) -> str:
        return content_digest(self.data)

    def open(self) -> BinaryIO:
        return io.BytesIO(self.data)

    def __str__(self) -> str:
        return self.name
