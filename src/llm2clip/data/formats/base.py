"""Interface of source formats, and the raw rows that they read.

A format is one subclass of `SourceFormat`. Class attributes describe its rows; its methods divide a file into parts,
read the rows of a part, and prepare remote files. The parts of a file depend only on the file, so the rows do not
depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from llm2clip.data.remote import get_file_size, get_local_path, get_remote_version, is_remote
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import RemoteError
from llm2clip.io_utils import DataFormatError, FatalDataError, describe_error

UNREADABLE_FILE = "unreadable file"  # reason for skipping the rest of a file
NOT_UTF8 = "not UTF-8"  # reason for skipping a row that cannot be decoded


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read. Skipped rows are counted by `reason`."""

    reason: str
    value: str  # details for the skip log
    rows: int = 1  # number of rows that cannot be read, including this row


# File, row number and fields. The row number starts at 1; in a text file, it is the line number. The fields are a dict
# {column name: raw value}, which `columns` interprets.
RawRow = tuple[str, int, dict[str, Any] | BadRow]
ColumnChooser = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> {field: column}


def choose_all_columns(file: str, names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class ReadOptions:
    """What to read from a file.

    Attributes:
        choose: Selects the columns to read from a table.
        image_bytes: Whether to read images embedded in tables and tar files.
        splits: Splits of a Hugging Face data set to read. If empty or None, all splits are read. Each row's `split`
            field is set to the name of its split, unless `splits` is None, in which case rows keep their own values.
        log: Skip log. It records notes about files, such as unusual encodings.
    """

    choose: ColumnChooser = choose_all_columns
    image_bytes: bool = True
    splits: Sequence[str] | None = ()
    log: SkipLog | None = None


@dataclass(frozen=True)
class FilePart:
    """Part of a source file, or a complete file or folder.

    Attributes:
        start: Start of the part: byte position of a row, or index of a row group in a Parquet file.
        stop: End of the part, exclusive, in the same unit. None stands for the end of the file. The row at `stop`
            belongs to the next part.
        first_row: Row or line number of the part's first row in the file, starting at 1.
    """

    format: SourceFormat
    path: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1


class SourceFormat(ABC):
    """A format of data sources.

    Attributes:
        name: Unique name.
        suffixes: Lower-case file name suffixes of this format.
        is_folder: True if a source is a folder whose files are listed and downloaded one by one.
        is_shard: True if a folder of such files is a data set.
        has_caption_columns: False if captions are stored in files next to the images instead of columns.
        is_table: True if all rows of a file have the same columns.
        is_plain_text: True if all cells are text, so that missing values are written as words, such as "nan", and each
            caption has its own row.
        has_lists_as_text: True if a text may contain a JSON or Python list of captions.
    """

    name: str
    suffixes: tuple[str, ...] = ()
    is_folder = False
    is_shard = False
    has_caption_columns = True
    is_table = False
    is_plain_text = False
    has_lists_as_text = False

    @abstractmethod
    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        """Yield the rows in a part. If the entire file cannot be read, raise `DataFormatError`. See `read_rows`."""

    def split(self, path: str, target_bytes: int) -> list[FilePart]:
        """Divide a large file into parts of about `target_bytes`. May raise any type of exception."""
        return [FilePart(self, path)]

    def estimate_text_bytes(self, part: FilePart) -> float:
        """Estimate how many bytes of text a local part contains."""
        return (part.stop or os.path.getsize(part.path)) - part.start

    def download(self, path: str) -> None:
        """Download the remote files that `read` needs."""
        get_local_path(path)

    def compute_version(self, path: str) -> str:
        """Return a string that changes if a file, or a file in a folder, changes."""
        if is_remote(path):
            return get_remote_version(path)
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
        digest = hashlib.sha256()
        for file in files:
            digest.update(os.fsencode(file))
            with suppress(FileNotFoundError):  # for example, a symbolic link whose target is missing
                status = os.stat(file)
                digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def make_parts(file_format: SourceFormat, path: str, starts: Iterator[tuple[int, int]]) -> list[FilePart]:
    """Return the parts of a file that begin at these positions and row numbers."""
    positions, rows = zip(*starts, strict=True)
    stops = [*positions[1:], None]
    return [FilePart(file_format, path, *bounds) for bounds in zip(positions, stops, rows, strict=True)]


def split_file(file: FilePart, target_bytes: int) -> list[FilePart]:
    """Divide a large file into parts of about `target_bytes`.

    A file that cannot be read is a single part, so that `read_rows` reports the error.
    """
    with suppress(Exception):  # corrupt Parquet metadata can make pyarrow raise any type of exception
        if get_file_size(file.path) > target_bytes:
            return file.format.split(file.path, target_bytes)
    return [file]


def read_rows(part: FilePart, options: ReadOptions = ReadOptions()) -> Iterator[RawRow]:
    """Yield the raw rows in a part of a file. Together, the parts of a file have the rows of the complete file.

    A corrupt file can make a library raise any type of exception. In this case, the last row is a `BadRow`, so a single
    corrupt file does not stop a run.

    Raises:
        DataFormatError: No part of the file can be read. The message contains the reason.
        OSError: The file does not exist, or the disk cannot be read.
    """
    number = part.first_row - 1
    if is_remote(part.path):
        try:
            part.format.download(part.path)
        except RemoteError as error:
            yield part.path, part.first_row, BadRow(UNREADABLE_FILE, str(error))
            return
    try:
        for row in part.format.read(part, options):
            number = row[1]
            yield row
    except (DataFormatError, FatalDataError, OSError):
        raise
    except Exception as error:
        yield part.path, number + 1, BadRow(UNREADABLE_FILE, describe_error(error))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON, or return a `BadRow` if it is malformed."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow("malformed row", f"{error}: {text[:200]!r}")
