"""Reading records (images with their captions) from sources in any supported format.

`open_records` is the entry point. It reads all formats in `readers`, validates every row, and logs each skipped row
with the file, row number and reason. URLs in the data are never downloaded.
"""

from __future__ import annotations

import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from PIL import Image

from llm2clip.data import readers
from llm2clip.data.columns import (
    COLUMN_NAMES,
    TEXT_FIELDS,
    BadRow,
    ColumnMapper,
    RawRow,
    UnusableRow,
    is_missing_text,
    parse_captions,
    parse_image,
    parse_name,
)
from llm2clip.data.image_header import MAX_PIXELS, DecodingLimitError, ImageFormatError, open_header
from llm2clip.data.image_refs import FileImage, ImageRef, LoadedImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError, describe_error

ImageCheck = Literal["header", "exists", "unchecked", "ignore"]
NO_SPLIT = "none"  # split name that means "no split", both in split selections and in the data
EARLY_CHECK_ROWS = 1000  # after this many rows, reading stops as soon as too many rows have been skipped


@dataclass(frozen=True, slots=True)
class Record:
    """An image and its captions.

    Attributes:
        id: Id from the source. If the source has no ids, this is the image's file name without its suffix. If there is
            no file name either, it is `file:row`.
        image: Reference to the image, or None if the source contains only texts.
        captions: Captions from the source, stripped but never truncated.
        short_captions: Short captions written by a model.
        long_captions: Long captions written by a model.
        split: Name of the split, or None if the record has no split.
        phrases: Short phrases that describe parts of the image; see `data/noun_phrases.py`. They do not count as
            captions.
        id_from_source: True if the id comes from the source.
    """

    id: str
    image: ImageRef | None
    captions: tuple[str, ...]
    short_captions: tuple[str, ...] = ()
    long_captions: tuple[str, ...] = ()
    split: str | None = None
    phrases: tuple[str, ...] = ()
    id_from_source: bool = field(default=True, compare=False)

    @property
    def texts(self) -> tuple[str, ...]:
        """All captions: first the original captions, then the short ones, then the long ones."""
        return self.captions + self.short_captions + self.long_captions


@dataclass(frozen=True)
class Source:
    """A source of records.

    Attributes:
        path: File, folder, glob or brace pattern, or `hf:NAME` for a Hugging Face data set.
        splits: Names of the splits to read. The name "none" selects records without a split. If empty, all records are
            read.
        columns: Mapping from record field (id, image, captions, short_captions, long_captions, phrases or split) to
            column name. An empty column name disables the field. Unmapped fields are detected by their usual column
            names.
    """

    path: str
    splits: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.columns:
            if name not in COLUMN_NAMES:
                raise ValueError(f"columns: unknown field {name!r}; available fields: {', '.join(COLUMN_NAMES)}")

    @classmethod
    def parse(cls, value: str | os.PathLike[str] | Mapping[str, Any] | Source) -> Source:
        """Create a source from `path`, `path@split+split`, or a mapping with the keys path, splits and columns.

        If the entire string is the path of an existing file or folder, it is never split at an @.
        """
        if isinstance(value, Source):
            return value
        if isinstance(value, Mapping):
            if "path" not in value or not set(value) <= {"path", "splits", "columns"}:
                keys = ", ".join(map(str, value))
                raise ValueError(f"a source must have a path and may have splits and columns (got {keys})")
            source = cls.parse(value["path"])
            splits = value.get("splits") or ()
            splits = tuple(splits.split("+") if isinstance(splits, str) else map(str, splits))
            return cls(source.path, splits or source.splits, dict(value.get("columns") or {}))
        text = os.fspath(value)
        selection = re.fullmatch(r"(.+)@([^@/\\]+)", text, flags=re.DOTALL)
        if selection is None or os.path.exists(os.path.expanduser(text)):
            return cls(text)
        return cls(selection[1], tuple(name for name in selection[2].split("+") if name))

    def __str__(self) -> str:
        return f"{self.path}@{'+'.join(self.splits)}" if self.splits else self.path


def open_records(
    source: str | os.PathLike[str] | Mapping[str, Any] | Source,
    log: SkipLog | None = None,
    image_check: ImageCheck = "header",
    require_captions: bool = True,
) -> Iterator[Record]:
    """Return an iterator over the records in a source, in their original order.

    The path is resolved immediately, and rows are read on demand. The exceptions are .csv, .tsv and captions.txt files.
    They are read in full before the first record is returned, because any row may contain a caption of the first image.
    Rows with the same image and split are merged into one record, at the position of the first of these rows.

    Args:
        source: Path, `path@split+split`, or anything else that `Source.parse` accepts.
        log: Log in which to record skipped rows. By default, no log file is written, and up to 5% of the rows may be
            skipped.
        image_check: How to check each image.

            - "header": check the image's format and size, which takes about 0.1 ms if the file is cached. Truncated
              pixel data is not detected.
            - "exists": check that the image file exists.
            - "unchecked": do not check images, so that no row is skipped because of its image. Use this if only the
              captions are needed.
            - "ignore": do not check images, and do not read image bytes in tables. As a result, identical images in
              different rows of a table have different references.
        require_captions: If True, skip rows without captions. If False, keep such rows if they have an image, and
            search folders recursively for images, tar files and tables.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: The format is unknown, a column is missing, the source is empty, or the selected splits are empty.
        TooManySkipped: Too many rows were skipped. The limit is checked at the end and, after the first 1,000 rows,
            whenever a row is skipped.
    """
    source = Source.parse(source)
    if image_check not in get_args(ImageCheck):
        raise ValueError(f"image_check must be one of {', '.join(get_args(ImageCheck))} (got {image_check!r})")
    log = SkipLog() if log is None else log
    files = readers.find_files(source.path, all_files=not require_captions, log=log)
    return _RecordReader(source, log, image_check, require_captions).read(files)


@dataclass(frozen=True, slots=True)
class _ParsedRow:
    """A record whose captions and image have not been checked yet."""

    file: str
    row: int
    record: Record
    image: LoadedImage | None
    num_rows: int  # number of source rows that were merged into this row; 0 if they have already been counted


class _RecordReader:
    """A single pass over a source."""

    def __init__(self, source: Source, log: SkipLog, image_check: ImageCheck, require_captions: bool) -> None:
        self.source, self.log, self.require_captions = source, log, require_captions
        self.read_bytes = image_check != "ignore"
        self.check_images = image_check in ("header", "exists")
        self.check_headers = image_check == "header"
        self.mapper = ColumnMapper(str(source), source.columns, require_captions)
        self.split_counts: Counter[str] = Counter()
        self.row_counts: Counter[str] = Counter()  # rows in the selected splits of this source, by split
        is_path = not source.path.startswith("hf:")
        self._log_path = os.path.realpath(os.path.expanduser(source.path)) if is_path else source.path
        self._listed_images: set[str] = set()  # image files listed in a folder's caption files

    def read(self, files: Sequence[tuple[str, str]]) -> Iterator[Record]:
        num_records = 0
        for kind, path in files:
            # In image folders and tar files, captions are in separate files instead of columns.
            self.mapper.require_captions = self.require_captions and kind not in ("images", "tar")
            for row in self._read_rows(kind, path):
                try:
                    with _convert_errors_to_unusable_row():
                        self._check_row(row)
                except UnusableRow as error:
                    self._skip(row.file, row.row, error.reason, error.value, row.num_rows)
                    continue
                num_records += 1
                yield row.record
        if self.mapper.columns:
            self.mapper.check()
            if self.check_images and not self.mapper.has_images:
                self.log.note(self.mapper.describe_missing("image"), self.source.path)
        self.log.check()
        if not num_records:
            raise ValueError(f"{self.source}: no records{self._list_splits()}; {self.log.summary()}")

    def _read_rows(self, kind: str, path: str) -> Iterable[_ParsedRow]:
        splits = None if "split" in self.source.columns else self.source.splits
        raw_rows = readers.read_source(kind, path, self.mapper.map_table, self.read_bytes, splits, self.log)
        rows = self._parse_rows(raw_rows, kind)
        return _merge_rows(rows) if kind in ("csv", "tsv", "captions.txt") else rows

    def _parse_rows(self, raw_rows: Iterable[RawRow], kind: str) -> Iterator[_ParsedRow]:
        """Parse raw rows; yield the valid rows in the selected splits."""
        for file, number, fields in raw_rows:
            is_listed = kind == "images" and FileImage(file).key in self._listed_images
            num_rows = 0 if is_listed else 1  # its row in the caption file has already been counted
            split = ""  # unknown
            try:
                with _convert_errors_to_unusable_row():
                    if isinstance(fields, BadRow):
                        num_rows *= fields.rows
                        raise UnusableRow(fields.reason, fields.value)
                    values = self._select_values(file, number, fields, kind)
                    split = parse_name(values.get("split"), "split") or NO_SPLIT
                    self.split_counts[split] += 1
                    if self.source.splits and split not in self.source.splits:
                        continue
                    row = self._parse_row(file, number, values, split, kind, num_rows)
            except UnusableRow as error:
                self._count_rows(split, num_rows)
                self._skip(file, number, error.reason, error.value, num_rows)
                continue
            self._count_rows(split, num_rows)
            if not self.require_captions and row.image is not None and isinstance(row.image.ref, FileImage):
                self._listed_images.add(row.image.ref.key)
            yield row

    def _select_values(self, file: str, number: int, fields: dict[str, Any], kind: str) -> dict[str, Any]:
        """Return a row's values as a dict {record field: value}."""
        if kind in ("csv", "tsv", "parquet", "hf", "saved"):
            columns = self.mapper.map_table(file, list(fields))
        else:
            columns = self.mapper.map_row(fields)
        values = {name: fields.get(column) for name, column in columns.items()}
        return self._clean_cells(values, file, number) if kind in ("csv", "tsv", "captions.txt") else values

    def _parse_row(
        self, file: str, number: int, values: dict[str, Any], split: str, kind: str, num_rows: int
    ) -> _ParsedRow:
        record_id = parse_name(values.get("id"), "id")
        image = parse_image(values.get("image"), file, reject_urls=self.check_images)
        stem = os.path.splitext(os.path.basename(image.name or ""))[0] if image else ""
        parse_lists = kind in ("csv", "tsv", "tar")
        record = Record(
            id=record_id or stem or f"{os.path.basename(file).split('.')[0]}:{number}",
            image=image.ref if image else None,
            captions=parse_captions(values.get("captions"), parse_lists, self.log, file, number),
            # In these fields, an empty string means "no captions" rather than an empty caption.
            short_captions=parse_captions(values.get("short_captions") or None, parse_lists, self.log, file, number),
            long_captions=parse_captions(values.get("long_captions") or None, parse_lists, self.log, file, number),
            phrases=self._parse_phrases(values.get("phrases"), parse_lists, file, number),
            split=None if split == NO_SPLIT else split,
            id_from_source=record_id is not None,
        )
        return _ParsedRow(file, number, record, image, num_rows)

    def _parse_phrases(self, value: Any, parse_lists: bool, file: str, number: int) -> tuple[str, ...]:
        """Return the phrases in a cell. Phrases are optional, so other values, such as boxes, are dropped."""
        try:
            return parse_captions(value or None, parse_lists, self.log, file, number)
        except UnusableRow as error:
            self.log.record_dropped(file, number, "malformed phrases", error.value)
            return ()

    def _clean_cells(self, values: dict[str, Any], file: str, number: int) -> dict[str, Any]:
        """Return a row's cells. Missing values such as NaN are replaced with None and counted in the log.

        If several columns share a name, captions are taken from all of them, and other fields from the last column that
        has a value.
        """
        cleaned: dict[str, Any] = {}
        for name, value in values.items():
            cells = value if isinstance(value, list) else [value]
            present = [cell for cell in cells if not is_missing_text(cell)]
            if name == "split":
                present = cells  # "none" is a valid split name (`NO_SPLIT`)
            for _ in range(len(cells) - len(present)):
                self.log.record_dropped(file, number, "missing value", value)
            if isinstance(value, list) and name in TEXT_FIELDS:
                cleaned[name] = present
            else:
                cleaned[name] = present[-1] if present else None
        return cleaned

    def _check_row(self, row: _ParsedRow) -> None:
        """Check the captions and the image of a row.

        Raises:
            UnusableRow: The row has no captions, or its image cannot be used.
        """
        record = row.record
        if not record.texts and (self.require_captions or not record.image):
            reason = "no caption" if self.require_captions else "no image and no caption"
            raise UnusableRow(reason, record.image or (record.id if record.id_from_source else ""))
        if row.image is not None and self.check_images:
            _check_image(row.image, self.check_headers)

    def _count_rows(self, split: str, count: int) -> None:
        self.row_counts[split] += count
        self.log.count_source_rows(self._log_path, split, self.row_counts[split])

    def _skip(self, file: str, row: int, reason: str, value: object, rows: int) -> None:
        if not rows:
            return
        self.log.skip(file, row, reason, value, rows)
        if self.row_counts.total() >= EARLY_CHECK_ROWS:
            if not self.mapper.has_captions:
                self.mapper.check()
            self.log.check()

    def _list_splits(self) -> str:
        counts = [f"{name} ({count:,} rows)" for name, count in self.split_counts.items()]
        return f"; its splits: {', '.join(counts)}" if counts else ""


@contextmanager
def _convert_errors_to_unusable_row() -> Iterator[None]:
    """Convert an unexpected exception to `UnusableRow`, so that a single bad row does not stop a run."""
    try:
        yield
    except (UnusableRow, DataFormatError):
        raise
    except Exception as error:
        raise UnusableRow("malformed row", describe_error(error)) from error


def _merge_rows(rows: Iterable[_ParsedRow]) -> Iterator[_ParsedRow]:
    """Merge rows with the same image and split. Rows without an image are merged if they have the same id and split."""
    groups: dict[tuple[object, ...], list[_ParsedRow]] = {}
    for row in rows:
        record = row.record
        key: tuple[object, ...] = (row.file, row.row)
        if record.image is not None:
            key = (True, str(record.image), record.split)
        elif record.id_from_source:
            key = (False, record.id, record.split)
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        texts: dict[str, Any] = {}
        for name in TEXT_FIELDS:
            texts[name] = tuple(text for row in group for text in getattr(row.record, name))
        record = replace(group[0].record, **texts)
        yield replace(group[0], record=record, num_rows=sum(row.num_rows for row in group))


def _check_image(image: LoadedImage, read_header: bool) -> None:
    """Check that an image file exists. If `read_header` is True, also check that its format and size are supported.

    Raises:
        UnusableRow: The image is missing, unreadable or larger than `MAX_PIXELS`.
    """
    if isinstance(image.ref, FileImage) and not os.path.isfile(image.ref.path):
        raise UnusableRow("missing image", os.path.abspath(image.ref.path))
    if not read_header:
        return
    try:
        with io.BytesIO(image.data) if image.data is not None else image.ref.open() as stream:
            width, height = open_header(stream).size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # Pillow's own limits
        raise UnusableRow("image too large", f"{image.ref}: {error}") from error
    except Exception as error:  # malicious bytes can make Pillow's plugins raise any type of exception
        is_complete = isinstance(error, ImageFormatError | DecodingLimitError | OSError)
        reason = str(error) if is_complete else describe_error(error)
        raise UnusableRow("unreadable image", f"{image.ref}: {reason}") from error
    if width * height > MAX_PIXELS:
        raise UnusableRow("image too large", f"{image.ref}: {width} x {height}")
