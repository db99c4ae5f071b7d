"""What source formats share: their interface, and reading of text files.

A format is one subclass of `SourceFormat`. Class attributes describe its rows; its methods divide a file into parts,
read the rows of a part, and prepare remote files. The parts of a file depend only on the file, so the rows do not
depend on the number of processes.

Text files are read in UTF-8 or UTF-16. For other encodings, a message explains how to convert the file to UTF-8. Files
are never decoded with a guessed encoding: for example, any French text in cp1252 can also be decoded as cp1250, but
some letters are then wrong.
"""

from __future__ import annotations

import codecs
import functools
import gzip
import hashlib
import io
import json
import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, TextIO, cast

from charset_normalizer import from_bytes

from llm2clip.data.image_refs import to_valid_unicode
from llm2clip.data.remote import (
    FileSlice,
    get_file_name,
    get_file_size,
    get_local_path,
    get_remote_version,
    is_remote,
    open_file,
)
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import RemoteError
from llm2clip.data.texts import is_valid_unicode
from llm2clip.io_utils import MAX_LINE_CHARACTERS, DataFormatError, FatalDataError, describe_error

UNREADABLE_FILE = "unreadable file"  # reason for skipping the rest of a file
NOT_UTF8 = "not UTF-8"  # reason for skipping a row that cannot be decoded
_BYTE_ORDER_MARKS = (  # UTF-32 marks come first, because one of them starts with a UTF-16 mark
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
# Common encodings of caption files. The Windows encodings cover the corresponding ISO 8859 encodings.
_LIKELY_ENCODINGS = (
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "koi8_r", "shift_jis", "euc_jp", "gb18030",
    "big5", "euc_kr",
)  # fmt: skip
MAX_LISTED_ENCODINGS = 3  # maximum number of likely encodings listed in a message
MAX_SAMPLE_BYTES = 1 << 14  # maximum size of the sample from which the encoding is guessed
MAX_SEARCHED_BYTES = 1 << 28  # maximum number of bytes to search for text that is not UTF-8
MAX_SKIPPED_CHARACTERS = 1 << 30  # files with longer lines are rejected, because they are corrupt or sparse


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


# ---- text files ------------------------------------------------------------------------------------------------------


def open_text(
    path: str, log: SkipLog | None = None, newline: str | None = None, start: int = 0, stop: int | None = None
) -> TextIO:
    """Open a UTF-8 or UTF-16 text file, which may be gzipped (.gz). Byte order marks are removed.

    Undecodable bytes become lone surrogates, so that a reader can skip a row instead of the entire file; see
    `find_undecodable`. To read lines, use `BoundedLines`.

    UTF-16 files are recorded in `log`. `newline` is the newline mode, as in the built-in function `open`. `start` and
    `stop` are the bytes of a UTF-8 file between which the text is read.
    """
    stream = _open_binary(path, start, stop)
    try:
        encoding = "utf-8" if start else detect_encoding(stream.read(4))
        stream.seek(0)
    except Exception:
        stream.close()
        raise
    if encoding in ("utf-8", "utf-8-sig"):
        return io.TextIOWrapper(stream, encoding, "surrogateescape", newline)
    if log is not None:
        log.add_note(f"read as {encoding.upper()}", path)
    return io.TextIOWrapper(stream, encoding, "escape_undecodable", newline)


class LineTooLong(ValueError):
    """A line or a multi-line row has too many characters."""


class BoundedLines:
    """Iterator over the lines of a text file, with a limit on the length of each row. A row may span several lines.

    If a row is too long, `LineTooLong` is raised. Iteration can then continue with the next line.
    """

    def __init__(self, file: TextIO, path: str) -> None:
        self._file, self._path = file, path
        self.start_row()

    def start_row(self) -> None:
        """Reset the character count at the start of a row."""
        self._characters_left = MAX_LINE_CHARACTERS

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(self._characters_left + 1)
        if not line:
            raise StopIteration
        self._characters_left -= len(line)
        if self._characters_left >= 0:
            return line
        self._skip_line(line)
        self.start_row()
        raise LineTooLong(f"a row has more than {MAX_LINE_CHARACTERS:,} characters")

    def _skip_line(self, start: str) -> None:
        part, num_skipped = start, 0
        while part and not part.endswith("\n"):
            part = self._file.readline(1 << 20)
            num_skipped += len(part)
            if num_skipped > MAX_SKIPPED_CHARACTERS:
                raise DataFormatError(f"{self._path}: a line has more than {MAX_SKIPPED_CHARACTERS:,} characters")


def read_lines(
    path: str, log: SkipLog | None = None, newline: str | None = None, start: int = 0, stop: int | None = None
) -> Iterator[str | BadRow]:
    """Yield the lines of a text file. A line that is too long or cannot be decoded becomes a `BadRow`.

    The arguments are the same as for `open_text`.
    """
    with open_text(path, log, newline, start, stop) as file:
        lines = BoundedLines(file, path)
        while True:
            lines.start_row()
            try:
                line = next(lines)
            except StopIteration:
                return
            except LineTooLong as error:
                yield BadRow("malformed row", str(error))
                continue
            yield find_undecodable(line, path, log) or line


def detect_encoding(start: bytes) -> str:
    """Detect a file's encoding from its first four bytes. Return "utf-8-sig", or the name of a UTF-16 or UTF-32 codec.

    A file without a byte order mark is treated as UTF-16 if alternate bytes are 0. This rule is reliable, because
    caption files start with two ASCII characters, and UTF-8 text does not contain zero bytes.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if start.startswith(mark):
            return encoding
    zeros = [byte == 0 for byte in start]
    if zeros == [False, True, False, True]:
        return "utf-16-le"
    if zeros == [True, False, True, False]:
        return "utf-16-be"
    return "utf-8-sig"


def find_undecodable(text: str, path: str, log: SkipLog | None = None) -> BadRow | None:
    """Return None if a text was fully decoded. Otherwise, log the file's likely encodings and return a `BadRow`."""
    if is_valid_unicode(text):
        return None
    if log is not None:
        log.add_note(describe_encoding(path), path)
    return BadRow(NOT_UTF8, to_valid_unicode(text.strip()))


@functools.lru_cache(maxsize=64)
def describe_encoding(path: str) -> str:
    """Return a message with an undecodable line in each likely encoding, and how to convert the file."""
    with _open_binary(path) as stream:
        encoding = detect_encoding(stream.read(4))
    if encoding != "utf-8-sig":
        return f"contains bytes that are not valid {encoding.upper()}"
    sample, line = _sample_undecodable_lines(path)
    if not line:
        return "not UTF-8. Convert the file to UTF-8"
    likely = [match.encoding for match in from_bytes(sample, cp_isolation=list(_LIKELY_ENCODINGS))]
    if sum(byte > 127 for byte in sample) < 0.3 * len(sample):
        likely.insert(0, "cp1252")  # the most common encoding of texts that are mostly ASCII
    readings: dict[str, str] = {}  # decoded line -> encoding
    for encoding in likely:
        try:
            readings.setdefault(line.decode(encoding).strip()[:60], encoding)
        except UnicodeDecodeError:
            continue
    likely_readings = list(islice(readings.items(), MAX_LISTED_ENCODINGS))
    if not likely_readings:
        return "not UTF-8, in an unknown encoding. Convert the file to UTF-8"
    description = "not UTF-8, probably " + " or ".join(f"{encoding} ({text!r})" for text, encoding in likely_readings)
    if path.lower().endswith(".gz"):
        return f"{description}. Convert the file to UTF-8"
    name, advice = "ENCODING", "Convert the file from the encoding that shows this text correctly"
    if len(likely_readings) == 1:
        name, advice = likely_readings[0][1].upper().replace("_", "-"), "Convert the file"
    stem, suffix = os.path.splitext(path)
    command = f"iconv -f {name} -t UTF-8 {shlex.quote(path)} > {shlex.quote(f'{stem}-utf8{suffix}')}"
    return f"{description}. {advice}: `{command}`"


def _open_binary(path: str, start: int = 0, stop: int | None = None) -> BinaryIO:
    if start or stop is not None:
        size = (get_file_size(path) if stop is None else stop) - start
        return io.BufferedReader(FileSlice(path, start, size))
    stream = open_file(path)
    is_compressed = get_file_name(path).lower().endswith(".gz")
    return cast(BinaryIO, gzip.GzipFile(fileobj=stream)) if is_compressed else stream


def _sample_undecodable_lines(path: str) -> tuple[bytes, bytes]:
    """Return a file's first lines that are not valid UTF-8, joined, and the first one of them."""
    sample = first = b""
    num_searched = 0
    with _open_binary(path) as stream:
        while len(sample) <= MAX_SAMPLE_BYTES and num_searched <= MAX_SEARCHED_BYTES:
            line = stream.readline(1 << 20)
            if not line:
                break
            num_searched += len(line)
            if not is_valid_unicode(line.decode(errors="surrogateescape")):
                sample += line
                first = first or line
    return sample[: 2 * MAX_SAMPLE_BYTES], first


def _escape_undecodable(error: UnicodeError) -> tuple[str, int]:
    """Replace undecodable bytes with lone surrogates. Unlike Python's surrogateescape, this also works for UTF-16."""
    assert isinstance(error, UnicodeDecodeError)
    return "\udc80" * (error.end - error.start), error.end


codecs.register_error("escape_undecodable", _escape_undecodable)
