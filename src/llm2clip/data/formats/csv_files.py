"""Readers for CSV and TSV files, and for Flickr8k's captions.txt.

The delimiters of CSV and TSV files are detected, because spreadsheets in many countries use semicolons.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import suppress
from itertools import islice
from typing import Any

from llm2clip.data.formats import BadRow, FilePart, RawRow, ReadOptions, SourceFormat
from llm2clip.data.formats.text_files import (
    BoundedLineIterator,
    LineTooLongError,
    describe_encoding_problem,
    find_image_folder,
    open_text_file,
    read_lines,
    reject_undecodable_text,
)
from llm2clip.data.image_refs import FileImage
from llm2clip.data.remote import open_file
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import join_path
from llm2clip.io_utils import DataFormatError, is_valid_unicode

DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
MAX_CELL_CHARACTERS = 1 << 24  # the csv module's default of 131,072 is too low for long texts
SAMPLE_CHARACTERS = 1 << 16  # number of characters read to detect the delimiter
SAMPLE_ROWS = 50


class DelimitedTextFormat(SourceFormat):
    """CSV or TSV file with a header line. The values of columns with the same name are combined into a list.

    The suffix determines the default delimiter. A different delimiter is used if it makes more rows match the header.
    """

    is_table = is_plain_text = has_lists_as_text = True

    def __init__(self, name: str, delimiter: str) -> None:
        self.name, self.suffixes, self.delimiter = name, (f".{name}",), delimiter

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        csv.field_size_limit(max(csv.field_size_limit(), MAX_CELL_CHARACTERS))
        path, log = part.path, options.log
        delimiter, header_line = _detect_file_delimiter(path, self.delimiter, log)
        with open_text_file(path, newline="", stop=None if part.start else part.stop) as file:
            for _ in range(header_line - 1):
                file.readline()
            lines = BoundedLineIterator(file, path)
            rows = _create_csv_reader(lines, delimiter)
            try:
                header = [name.strip() for name in next(rows, [])]
            except (csv.Error, LineTooLongError) as error:
                raise DataFormatError(f"{path}: malformed CSV header ({error})") from error
            if not is_valid_unicode("".join(header)):
                raise DataFormatError(f"{path}: cannot decode the header: {describe_encoding_problem(path)}")
            if not part.start:
                yield from _read_csv_rows(lines, rows, path, delimiter, header, header_line, log)
        if part.start:
            with open_text_file(path, newline="", start=part.start, stop=part.stop) as file:
                lines = BoundedLineIterator(file, path)
                rows = _create_csv_reader(lines, delimiter)
                yield from _read_csv_rows(lines, rows, path, delimiter, header, part.first_row, log)

    def find_part_starts(self, path: str, target_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (byte offset, line number) for rows that are at least `target_bytes` apart. Stop at a malformed row."""
        yield 0, 1
        detected, header_line = _detect_file_delimiter(path, self.delimiter)
        with open_text_file(path) as text:
            if text.encoding != "utf-8-sig" or not detected.isascii():
                return
        # Delimiters, quotes and line breaks are ASCII, so decoding the file as Latin-1 yields the same rows.
        with io.TextIOWrapper(open_file(path), "latin-1", newline="") as file:
            last = position = end = sum(len(file.readline()) for _ in range(header_line - 1))
            lines = BoundedLineIterator(file, path)

            def iterate_counted_lines() -> Iterator[str]:
                nonlocal position
                for line in lines:
                    position += len(line)
                    yield line

            rows = _create_csv_reader(iterate_counted_lines(), detected)
            number = header_line
            with suppress(csv.Error, LineTooLongError):
                for _ in rows:
                    if end - last >= target_bytes:
                        last = end
                        yield end, number
                    end, number = position, rows.line_num + header_line
                    lines.start_row()


class FlickrCaptionsFormat(SourceFormat):
    """Text file in one of the two formats of Flickr8k's caption files.

    Each line is either `name.jpg,caption`, where the first line can be a header, or `name.jpg#0<TAB>caption`.
    """

    name = "captions.txt"
    suffixes = (".txt",)
    is_plain_text = True

    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        path, image_folder = part.path, None
        for number, line in enumerate(read_lines(path, options.log), 1):
            if isinstance(line, BadRow):
                yield path, number, line
                continue
            name, comma, caption = re.sub(r"#\d+\t", ",", line.strip(), count=1).partition(",")
            name = name.strip()
            if not name or (number == 1 and re.fullmatch(r"image(_name)?|file_?name", name.lower())):
                continue
            if not comma:
                problem = f"a line must be 'name,caption' or 'name#0<TAB>caption' (got {line.strip()!r})"
                yield path, number, BadRow("malformed row", problem)
                continue
            if len(caption) > 1 and caption[0] == caption[-1] == '"':
                caption = caption[1:-1].replace('""', '"')
            if image_folder is None:
                image_folder = find_image_folder(path, [name])
            yield path, number, {"image": FileImage(join_path(image_folder, name)), "caption": caption}


def _create_csv_reader(lines: Iterable[str], delimiter: str) -> Any:
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)


def _read_csv_rows(
    lines: BoundedLineIterator,
    rows: Any,
    path: str,
    delimiter: str,
    header: Sequence[str],
    first_line: int,
    log: SkipLog | None,
) -> Iterator[RawRow]:
    """Yield the remaining rows of a `csv.reader` over `lines`, whose first line has the number `first_line`."""
    repeated = {name for name in header if header.count(name) > 1}
    while True:
        number = rows.line_num + first_line
        lines.start_row()
        try:
            cells = next(rows)
        except StopIteration:
            return
        except (csv.Error, LineTooLongError) as error:
            num_lines = max(1, rows.line_num + first_line - number)  # `line_num` ignores overlong lines
            is_too_long = "field limit" in str(error)
            if "unexpected end" in str(error) or (is_too_long and num_lines > 1):
                # Without a closing quote, the cell would contain all following rows.
                raise DataFormatError(f"{path}: a quote opened in the row at line {number} is not closed") from error
            problem = f"a cell has more than {MAX_CELL_CHARACTERS:,} characters" if is_too_long else str(error)
            if num_lines > 1:
                problem += f" (in a quoted cell that spans {num_lines:,} lines)"
            yield path, number, BadRow("malformed row", problem, num_lines)
            continue
        if cells:
            undecodable = reject_undecodable_text(delimiter.join(cells), path, log)
            yield path, number, undecodable or _build_row_fields(header, repeated, cells)


def _detect_file_delimiter(path: str, default: str, log: SkipLog | None = None) -> tuple[str, int]:
    with open_text_file(path, log, newline="") as file:
        sample = file.read(SAMPLE_CHARACTERS)
    delimiter, header_line = _detect_delimiter(sample, default)
    if delimiter != default and log is not None:
        log.add_note(f"fields separated by {DELIMITERS.get(delimiter, repr(delimiter))}", path)
    return delimiter, header_line


def _detect_delimiter(sample: str, default: str) -> tuple[str, int]:
    """Return a CSV file's delimiter and the line number of its header.

    The delimiter is chosen to maximise the number of rows with as many cells as the header. In a tie, `default` is
    preferred. A first line such as `sep=;`, an Excel convention, overrides the choice.
    """
    specified = re.match(r'"?sep=([^\r\n"])"?\r?\n', sample)
    if specified is not None:
        return specified[1], 2
    best, best_score = default, 0
    for delimiter in dict.fromkeys([default, *DELIMITERS]):
        score = _count_matching_rows(sample, delimiter)
        if score > best_score:
            best, best_score = delimiter, score
    return best, 1


def _count_matching_rows(sample: str, delimiter: str) -> int:
    """Count the rows with as many cells as the header. Return 0 if the header has only one cell."""
    rows = csv.reader(io.StringIO(sample, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        lengths = [len(cells) for cells in islice(rows, SAMPLE_ROWS)]
    except csv.Error:
        return 0
    return lengths.count(lengths[0]) if lengths and lengths[0] > 1 else 0


def _build_row_fields(header: Sequence[str], repeated: Set[str], cells: Sequence[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow("malformed row", f"the row has {len(cells)} cells, but the header has {len(header)}: {cells}")
    fields: dict[str, Any] = dict(zip(header, cells, strict=True))
    for name in repeated:
        fields[name] = [cell for column, cell in zip(header, cells, strict=True) if column == name]
    return fields
