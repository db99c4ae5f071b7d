"""Raw rows, the common output format of all readers.

A raw row is a tuple `(file, row, fields)`. `row` counts from 1; for text files it is the line number. `fields` is a
dict from column names to values as they are in the file, or a `BadRow` if the row cannot be read. Readers do not
interpret the fields; the modules `records` and `text_pairs` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read.

    Attributes:
        reason: Category for counting skipped rows.
        value: Details for the skip log.
        rows: Number of rows that are lost, including this row.
    """

    reason: str
    value: str
    rows: int = 1


RawRow = tuple[str, int, dict[str, Any] | BadRow]
ColumnChooser = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> {field: column}
