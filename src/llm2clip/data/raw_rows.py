"""Raw rows, the common output of all readers.

A raw row is `(file, row, fields)`. `row` counts from 1 and is the line number in a text file. `fields` is a dict with
the names and values of the format, or a `BadRow` if the row cannot be read. Readers do not interpret the fields;
`records` and `text_pairs` do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read.

    Attributes:
        reason: Category under which the row is counted.
        value: Details for the skip log.
        rows: Number of rows that are lost with it, itself included.
    """

    reason: str
    value: str
    rows: int = 1


RawRow = tuple[str, int, dict[str, Any] | BadRow]
ColumnChooser = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> {field: column}
