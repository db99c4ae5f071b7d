"""Detection of the columns that hold the id, image, captions and split of a record."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

CAPTION_FIELDS = ("captions", "short_captions", "long_captions")
COLUMN_NAMES = {  # field of a record -> its usual column names, the preferred one first
    "id": ("id", "image_id", "__key__"),
    "image": ("image", "filepath", "file_name", "filename", "path", "img", "image_path"),
    "captions": ("captions", "caption", "text", "texts", "title", "sentences", "sentence", "txt"),
    "short_captions": ("short_captions", "short_caption"),
    "long_captions": ("long_captions", "long_caption"),
    "split": ("split",),
}


def guess_columns(names: Mapping[str, Sequence[str]], columns: Collection[str]) -> dict[str, str]:
    """Map each field to the first of its names that is among `columns`; fields without one are left out."""
    chosen = {}
    for field, candidates in names.items():
        for candidate in candidates:
            if candidate and candidate in columns:
                chosen[field] = candidate
                break
    return chosen


def is_null(value: object) -> bool:
    """Return whether a value stands for "no value": None, an empty string or list, or NaN (as pandas writes it)."""
    return value is None or value == "" or value == [] or (isinstance(value, float) and math.isnan(value))


class ColumnMapper:
    """Maps the fields of a record to the columns of a source, and records which columns the source has.

    Args:
        source: Name of the source in error messages.
        mapping: Field to column, as set by the user. It replaces the guess; an empty column disables the field.
        require_captions: Whether a source without any column of captions is an error.
    """

    def __init__(self, source: str, mapping: Mapping[str, str], require_captions: bool = True) -> None:
        self.source, self.mapping, self.require_captions = source, mapping, require_captions
        self.columns: dict[str, None] = {}  # all columns so far, in order
        self.has_captions = False
        self._names = COLUMN_NAMES | {field: (column,) for field, column in mapping.items()}
        self._cache: dict[tuple[str, ...], dict[str, str]] = {}

    def map_table(self, file: str, columns: Sequence[str]) -> dict[str, str]:
        """Return {field: column} for a table, whose rows all have the same columns.

        Raises:
            ValueError: As `check`.
        """
        key = tuple(columns)
        if key not in self._cache:
            self._remember(key, columns, self._guess(columns))
            self.check(file)
        return self._cache[key]

    def map_row(self, fields: Mapping[str, Any]) -> dict[str, str]:
        """Return {field: column} for a row with keys of its own, such as a JSON object.

        If several keys match a field, those without a value are passed over.
        """
        names = tuple(fields)
        filled = tuple(name for name in names if name in COLUMN_NAMES["image"] or not is_null(fields[name]))
        key = (*names, "", *filled)
        if key not in self._cache:  # the rows of a source have few combinations of keys
            self._remember(key, names, self._guess(names) | self._guess(filled))
        return self._cache[key]

    def check(self, file: str = "") -> None:
        """Check that the source has the mapped columns and a column of captions.

        Raises:
            ValueError: A column is missing. The message lists the columns that exist.
        """
        where = file or self.source
        existing = f"it has {', '.join(self.columns) or 'no columns'}"
        for field, column in self.mapping.items():
            if column and column not in self.columns:
                similar = difflib.get_close_matches(column, self.columns, n=1)
                hint = f" (did you mean {similar[0]}?)" if similar else ""
                raise ValueError(f"{where}: no column {column!r} for {field}{hint}; {existing}")
        if self.require_captions and not self.has_captions:
            raise ValueError(
                f'{where}: no column of captions; {existing}. Name one with --columns \'{{"captions": "NAME"}}\''
            )

    def _guess(self, columns: Sequence[str]) -> dict[str, str]:
        chosen = guess_columns(self._names, columns)
        # Sentences next to a long caption are its parts (image paragraphs), not captions of their own.
        guessed = None if "captions" in self.mapping else chosen.get("captions")
        if guessed in ("sentences", "sentence") and "long_captions" in chosen:
            del chosen["captions"]
        return chosen

    def _remember(self, key: tuple[str, ...], columns: Sequence[str], chosen: dict[str, str]) -> None:
        self.columns |= dict.fromkeys(columns)
        self.has_captions = self.has_captions or bool(chosen.keys() & set(CAPTION_FIELDS))
        self._cache[key] = chosen
