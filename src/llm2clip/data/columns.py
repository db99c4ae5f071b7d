"""Mapping of data columns to record fields, and conversion of table cells. `records` and `pairs` use it."""

import ast
import difflib
import functools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from llm2clip.data.formats.base import NOT_UTF8
from llm2clip.data.image_refs import FileImage, ImageRef, LoadedImage, MemoryImage, to_valid_unicode
from llm2clip.data.remote import get_parent, is_remote, join_path
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError

CAPTION_FIELDS = ("captions", "short_captions", "long_captions")
TEXT_FIELDS = (*CAPTION_FIELDS, "phrases")
COLUMN_NAMES = {  # record field -> common column names, in order of preference
    "id": ("id", "image_id", "__key__"),
    "image": ("image", "filepath", "file_name", "filename", "path", "img", "image_path", "image_name"),
    "captions": ("captions", "caption", "text", "texts", "title", "sentences", "sentence", "txt", "comment"),
    "short_captions": ("short_captions", "short_caption"),
    "long_captions": ("long_captions", "long_caption"),
    "phrases": ("phrases",),
    "split": ("split",),
}

# Placeholders for missing values in CSV cells, in lower case.
MISSING_TEXTS = frozenset({"nan", "-nan", "none", "null", "n/a", "#n/a", "#na", "<na>"})

MAX_CAPTION_CHARACTERS = 1 << 20  # maximum for all captions in a cell; encoders use only a few hundred words of each
MAX_LITERAL_CHARACTERS = 1 << 16  # maximum length of a Python list literal that is parsed
# Python's parser takes quadratic time for some expressions, such as f-strings, so it is given only list literals that
# match this pattern.
_PYTHON_LIST = re.compile(
    r"""\s*\[(?:[\s,]|None|[uU]?(?:'[^'\\]*+(?:\\.[^'\\]*+)*+'|"[^"\\]*+(?:\\.[^"\\]*+)*+"))*+\]\s*""", re.DOTALL
)


def guess_columns(names: Mapping[str, Sequence[str]], columns: Collection[str]) -> dict[str, str]:
    """Map each field to a column that has one of the field's common names. Fields without a match are omitted.

    `names` lists each field's common names in order of preference. Matching ignores case (`Caption`, `FILE_NAME`) and
    treats spaces, hyphens and underscores as equivalent. If several columns match a name, an exact match is preferred.
    """
    columns_by_name: dict[str, str] = {}
    for column in columns:
        columns_by_name.setdefault(_normalize_name(column), column)
    chosen = {}
    for field, candidates in names.items():
        for candidate in candidates:
            column = candidate if candidate in columns else columns_by_name.get(_normalize_name(candidate), "")
            if candidate and column:
                chosen[field] = column
                break
    return chosen


class ColumnMapper:
    """Mapper from record fields to a source's columns. It keeps track of all columns seen so far.

    Args:
        source: Name of the source, for error messages.
        mapping: User-defined mapping from field to column name, which overrides automatic detection. An empty column
            name disables the field.
        require_captions: Whether to raise an error if the source has no caption column.
    """

    def __init__(self, source: str, mapping: Mapping[str, str], require_captions: bool = True) -> None:
        self.source, self.mapping, self.require_captions = source, mapping, require_captions
        self.columns: dict[str, None] = {}  # all columns seen so far, in order
        self._names = COLUMN_NAMES | {field: (column,) for field, column in mapping.items()}
        self._cache: dict[tuple[str, ...], dict[str, str]] = {}

    def map_table(self, file: str, columns: Sequence[str]) -> dict[str, str]:
        """Return a dict {field: column} for a table whose rows all have the same columns. See `check` for errors."""
        key = tuple(columns)
        if key not in self._cache:
            self.columns |= dict.fromkeys(columns)
            self._cache[key] = self._guess_columns(columns)
            self.check(file)
        return self._cache[key]

    def map_row(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """Return a dict {field: column} for a row with its own set of keys, such as a JSON object.

        If several keys match a field, keys without a value are ignored.
        """
        names = filled = tuple(fields)
        if any(map(is_null, fields.values())):
            filled = tuple(
                name for name in names if _normalize_name(name) in COLUMN_NAMES["image"] or not is_null(fields[name])
            )
        key = (*names, "", *filled)
        if key not in self._cache:  # cached, because a source has only a few distinct sets of keys
            self.columns |= dict.fromkeys(names)
            self._cache[key] = self._guess_columns(names) | self._guess_columns(filled)
        return self._cache[key]

    @property
    def has_captions(self) -> bool:
        return bool(self._guess_columns(self.columns).keys() & set(CAPTION_FIELDS))

    @property
    def has_images(self) -> bool:
        return "image" in self._guess_columns(self.columns)

    def check(self, file: str = "") -> None:
        """Raise DataFormatError if the source lacks a mapped column or a caption column."""
        where = file or self.source
        for field, column in self.mapping.items():
            if column and column not in self.columns:
                similar = difflib.get_close_matches(column, self.columns, n=1)
                hint = f" (did you mean {similar[0]}?)" if similar else ""
                raise DataFormatError(f"{where}: no column {column!r} for {field}{hint}; {self._describe_columns()}")
        if self.require_captions and not self.has_captions:
            raise DataFormatError(f"{where}: {self.describe_missing('captions')}")

    def describe_missing(self, field: str) -> str:
        """Return an error message that explains how to select a column for `field`.

        If a column name contains a typical substring, such as "img" or "text", the message suggests that column. If
        there are only images, it suggests to caption them.
        """
        if field == "captions" and all(_normalize_name(column) in COLUMN_NAMES["image"] for column in self.columns):
            return (
                "the images have no captions. To let a multimodal model write captions, run `llm2clip caption` first, "
                "or add --caption MODEL to `llm2clip fit`"
            )
        parts = ("img", "image", "photo", "pic", "file", "path") if field == "image" else ("caption", "text", "descr")
        similar = (column for column in self.columns if any(part in column.lower() for part in parts))
        message = f"no {field.removesuffix('s')} column; {self._describe_columns()}. "
        if any(re.search(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", column.lower()) for column in self.columns):
            return message + "The first line of the file must contain the column names, such as image,caption"
        return message + f"Select one with --columns {field}={next(similar, 'NAME')}"

    def _describe_columns(self) -> str:
        return f"the file has the columns {', '.join(self.columns)}" if self.columns else "the file has no columns"

    def _guess_columns(self, columns: Collection[str]) -> dict[str, str]:
        chosen = guess_columns(self._names, columns)
        # In sources with long captions, such as the Image Paragraphs data set, the `sentences` column contains the
        # sentences of the long caption rather than separate captions.
        guessed = None if "captions" in self.mapping else chosen.get("captions")
        if guessed in ("sentences", "sentence") and "long_captions" in chosen:
            del chosen["captions"]
        return chosen


@functools.lru_cache(maxsize=4096)
def _normalize_name(column: str) -> str:
    return re.sub(r"[\s-]+", "_", column.strip().lower())


# ---- cells -----------------------------------------------------------------------------------------------------------


class UnusableRow(Exception):
    """A row cannot be converted to a record. Skipped rows are counted by `reason`."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason, value)
        self.reason, self.value = reason, value


def is_null(value: object) -> bool:
    """Return True for missing values: None, an empty string, an empty list, or NaN (as used by pandas)."""
    if value is None:
        return True
    kind = type(value)
    if kind is str or kind is list:
        return not value
    return value == "" or value == [] or (isinstance(value, float) and math.isnan(value))


def is_missing_text(cell: object) -> bool:
    """Return True if a table cell contains a placeholder for a missing value, such as "nan" or "n/a"."""
    return isinstance(cell, str) and len(cell) < 10 and cell.strip().lower() in MISSING_TEXTS


def clean_text_cells(values: Mapping[str, Any], log: SkipLog, file: str, row: int) -> dict[str, Any]:
    """Return the values of a row of a text table. Placeholders for missing values become None and are logged.

    If several columns share a name, captions are taken from all of them, and other fields from the last column that has
    a value.
    """
    cleaned: dict[str, Any] = {}
    for name, value in values.items():
        cells = value if isinstance(value, list) else [value]
        # "none" is a valid split name.
        present = cells if name == "split" else [cell for cell in cells if not is_missing_text(cell)]
        for _ in range(len(cells) - len(present)):
            log.record_dropped(file, row, "missing value", value)
        if isinstance(value, list) and name in TEXT_FIELDS:
            cleaned[name] = present
        else:
            cleaned[name] = present[-1] if present else None
    return cleaned


def parse_captions(value: Any, parse_lists: bool, log: SkipLog, file: str, row: int) -> tuple[str, ...]:
    """Return the stripped captions in a cell, which contains either a single caption or a list of captions.

    If `parse_lists` is True, strings that look like JSON or Python lists are parsed. Empty captions are dropped and
    recorded in `log` with the cell's location.

    Raises:
        UnusableRow: The value is neither a string nor a list of strings, a caption is not valid Unicode, or the total
            length of the captions exceeds `MAX_CAPTION_CHARACTERS`.
    """
    if isinstance(value, str):
        value = _parse_list(value) if parse_lists else [value]
    elif is_null(value):
        return ()
    if not isinstance(value, list):
        raise UnusableRow("malformed row", f"captions must be text or a list of texts (got {value!r})")
    num_characters = 0
    for text in value:
        if isinstance(text, str):
            num_characters += len(text)
    if num_characters > MAX_CAPTION_CHARACTERS:
        raise UnusableRow(
            "malformed row", f"the captions have {num_characters:,} characters; the limit is {MAX_CAPTION_CHARACTERS:,}"
        )
    captions = []
    for text in value:
        if not isinstance(text, str) and text is not None:
            raise UnusableRow("malformed row", f"a caption must be text (got {text!r})")
        text = (text or "").strip()
        if not text:
            log.record_dropped(file, row, "empty caption", value)
            continue
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError as error:
            if "\udc80" <= text[error.start] <= "\udcff":  # a byte that could not be decoded (surrogateescape)
                raise UnusableRow(NOT_UTF8, to_valid_unicode(text)) from error
            raise UnusableRow("malformed row", f"not valid Unicode: {text!r}") from error
        captions.append(text)
    return tuple(captions)


def parse_name(value: Any, field: str) -> str | None:
    """Return an id or split name, or None if it is missing. Raise `UnusableRow` if it is neither text nor a number."""
    if type(value) is str:
        return value.strip() or None
    if is_null(value):
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UnusableRow("malformed row", f"{field} must be text or a number (got {value!r})")
    return str(value).strip() or None


def parse_image(value: Any, file: str, reject_urls: bool) -> LoadedImage | None:
    """Return a reference to the image in a cell, or None if the value is missing.

    A cell may contain a path relative to the folder of `file`, encoded bytes, a Hugging Face dict with the keys "bytes"
    and "path", or a reference created by the reader.

    Raises:
        UnusableRow: The value has an unsupported type, or it is a URL and `reject_urls` is True.
    """
    if type(value) is LoadedImage:
        return value
    name = None
    if isinstance(value, dict) and {"bytes", "path"} & value.keys():
        name = value.get("path")
        value = value["bytes"] if value.get("bytes") is not None else name
    if is_null(value) or value == b"":
        return None
    if isinstance(value, ImageRef):
        return LoadedImage(value, None, str(value))
    if isinstance(value, bytes):
        return LoadedImage(MemoryImage(value, name or f"image in {file}"), value, name)
    if not isinstance(value, str):
        raise UnusableRow("malformed row", f"an image must be a path, bytes or null (got {value!r})")
    if reject_urls and ":" in value and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://|data:", value):
        raise UnusableRow("image is a URL", value)
    path = join_path(get_parent(file), value)
    if is_remote(file):
        return LoadedImage(FileImage(path), None, value)
    if "\\" in value and not os.path.exists(path):  # a relative path written on Windows
        portable = os.path.join(os.path.dirname(file), value.replace("\\", "/"))
        path = portable if os.path.exists(portable) else path
    return LoadedImage(FileImage(path), None, path)


def _parse_list(text: str) -> list[Any]:
    """Parse a JSON or Python list of strings. Any other text is returned as a list with one item."""
    if text.lstrip().startswith("["):
        parsers: list[Callable[[str], Any]] = [json.loads]
        if len(text) <= MAX_LITERAL_CHARACTERS and _PYTHON_LIST.fullmatch(text):
            parsers.append(ast.literal_eval)
        for parse in parsers:
            try:
                value = parse(text.strip())
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(value, list) and all(isinstance(item, str | None) for item in value):
                return value
    return [text]
