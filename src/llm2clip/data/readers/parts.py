"""Division of source files into parts that several processes can read at the same time.

The parts of a file depend only on the file, so the rows do not depend on the number of processes.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO

from llm2clip.data.columns import UNREADABLE_FILE, BadRow, ColumnChooser, RawRow
from llm2clip.data.image_refs import open_parquet
from llm2clip.data.readers.csv_files import find_row_starts, read_captions_txt, read_csv
from llm2clip.data.readers.encoding import detect_encoding
from llm2clip.data.readers.json_files import read_json_lines, read_json_list
from llm2clip.data.readers.tables import read_huggingface, read_parquet
from llm2clip.data.readers.tar import read_image_folder, read_tar
from llm2clip.data.remote import get_file_size, get_local_path, is_remote, open_file
from llm2clip.data.retries import RemoteError
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import MAX_LINE_CHARACTERS, DataFormatError, FatalDataError, describe_error

CHUNK_BYTES = 1 << 20
DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True)
class FilePart:
    """Part of a source file, or a whole file or folder.

    Attributes:
        kind: Format name returned by `find_files`.
        path: File or folder.
        start: Start of the part: byte position of a row, or index of a row group in a Parquet file.
        stop: End of the part, exclusive, in the same unit. None stands for the end of the file. The row at `stop`
            belongs to the next part.
        first_row: Row or line number of the part's first row in the file, starting at 1.
    """

    kind: str
    path: str
    start: int = 0
    stop: int | None = None
    first_row: int = 1


def split_file(kind: str, path: str, target_bytes: int = 64 << 20) -> list[FilePart]:
    """Divide a large file into parts of about `target_bytes`.

    Only .jsonl, .csv, .tsv and Parquet files are divided. A file that cannot be read is also one part, so that
    `read_part` reports the error.
    """
    with suppress(Exception):  # corrupt Parquet metadata can make pyarrow raise any type of exception
        if get_file_size(path) > target_bytes:
            if kind in DELIMITERS and not path.lower().endswith(".gz"):
                return _make_parts(kind, path, find_row_starts(path, DELIMITERS[kind], target_bytes))
            if kind == "jsonl" and not path.lower().endswith(".gz"):
                return _make_parts(kind, path, _find_line_starts(path, target_bytes))
            if kind == "parquet":
                return _split_parquet(path, target_bytes)
    return [FilePart(kind, path)]


def read_part(
    part: FilePart,
    choose: ColumnChooser,
    image_bytes: bool = True,
    splits: Sequence[str] | None = (),
    log: SkipLog | None = None,
) -> Iterator[RawRow]:
    """Yield the raw rows in a part of a file. Together, the parts of a file have the rows of the whole file.

    A corrupt file can make a library raise any type of exception. In this case, the last row is a `BadRow`, so a single
    corrupt file does not stop a run.

    Args:
        part: Part to read.
        choose: Function that selects which columns of a table to read.
        image_bytes: Whether to read images embedded in Parquet files.
        splits: Splits of a Hugging Face data set to read. If empty or None, all splits are read. Each row's `split`
            field is set to the name of its split, unless `splits` is None, in which case rows keep their own values.
        log: Skip log. It records notes about files, such as unusual encodings.

    Raises:
        DataFormatError: No part of the file can be read. The message contains the reason.
        OSError: The file does not exist, or the disk cannot be read.
    """
    number = part.first_row - 1
    if is_remote(part.path) and part.kind != "images":
        try:
            get_local_path(part.path)  # downloads the file
        except RemoteError as error:
            yield part.path, part.first_row, BadRow(UNREADABLE_FILE, str(error))
            return
    try:
        for row in _open_reader(part, choose, image_bytes, splits, log):
            number = row[1]
            yield row
    except (DataFormatError, FatalDataError, OSError):
        raise
    except Exception as error:
        yield part.path, number + 1, BadRow(UNREADABLE_FILE, describe_error(error))


def _open_reader(
    part: FilePart, choose: ColumnChooser, image_bytes: bool, splits: Sequence[str] | None, log: SkipLog | None
) -> Iterator[RawRow]:
    kind, path = part.kind, part.path
    if kind == "parquet":
        groups = None if part.stop is None else range(part.start, part.stop)
        return read_parquet(path, choose, image_bytes, groups, part.first_row)
    if kind in ("hf", "saved"):
        return read_huggingface(path, kind == "saved", choose, splits)
    if kind in DELIMITERS:
        return read_csv(path, DELIMITERS[kind], log, part.start, part.stop, part.first_row)
    if kind == "jsonl":
        return read_json_lines(path, log, part.start, part.stop, part.first_row)
    if kind == "captions.txt":
        return read_captions_txt(path, log)
    if kind == "images":
        return read_image_folder(path, log)
    return read_tar(path, image_bytes) if kind == "tar" else read_json_list(path, log)


def _make_parts(kind: str, path: str, starts: Iterator[tuple[int, int]]) -> list[FilePart]:
    """Return the parts of a file that begin at these positions and row numbers."""
    positions, rows = zip(*starts, strict=True)
    stops = [*positions[1:], None]
    return [FilePart(kind, path, *bounds) for bounds in zip(positions, stops, rows, strict=True)]


def _find_line_starts(path: str, target_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the byte positions and numbers of the first lines that start at or after each multiple of `target_bytes`.

    Nothing more is yielded after a line that is too long, which occurs in sparse files.
    """
    start, number = 0, 1
    yield start, number
    with open_file(path) as file:
        if detect_encoding(file.read(4)) != "utf-8-sig":
            return
        size = file.seek(0, os.SEEK_END)
        for target in range(target_bytes, size, target_bytes):
            if target <= start:
                continue
            file.seek(target - 1)
            rest_of_line = file.readline(MAX_LINE_CHARACTERS)
            stop = target - 1 + len(rest_of_line)
            if not rest_of_line.endswith(b"\n") or stop == size:
                return
            number += _count_newlines(file, start, stop)
            start = stop
            yield start, number


def _count_newlines(file: BinaryIO, start: int, stop: int) -> int:
    file.seek(start)
    num_newlines = 0
    while start < stop and (chunk := file.read(min(CHUNK_BYTES, stop - start))):
        num_newlines += chunk.count(b"\n")
        start += len(chunk)
    return num_newlines


def _split_parquet(path: str, target_bytes: int) -> list[FilePart]:
    """Divide a Parquet file into ranges of row groups with at least `target_bytes` of uncompressed data each."""
    with open_parquet(path) as parquet_file:
        metadata = parquet_file.metadata
    parts = []
    start, num_bytes, first_row, row = 0, 0, 1, 1
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        if group.num_rows < 0 or group.total_byte_size < 0:
            return [FilePart("parquet", path)]
        row += group.num_rows
        num_bytes += group.total_byte_size
        if num_bytes >= target_bytes or index == metadata.num_row_groups - 1:
            parts.append(FilePart("parquet", path, start, index + 1, first_row))
            start, num_bytes, first_row = index + 1, 0, row
    return parts or [FilePart("parquet", path)]
