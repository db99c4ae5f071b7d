"""Raw rows, the common output format of all readers.

A raw row is a tuple `(file, row, fields)`. `row` is the row number, starting at 1; for text files, it is the line
number. `fields` is a dict that maps column names to the values in the file, or a `BadRow` if the row cannot be read.
Readers do not interpret the values; the modules `records` and `text_pairs` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read.

    Attributes:
        reason: Short reason. Skipped rows are counted by reason.
        value: Details for the skip log.
        rows: Number of rows that cannot be read, including this row.
    """

    reason: str
    value: str
    rows: int = 1


RawRow = tuple[str, int, dict[str, Any] | BadRow]
ColumnChooser = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> {field: column}
