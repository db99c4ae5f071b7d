"""What the readers yield: raw rows, as the format holds them.

A raw row is `(file, row, fields)`. `row` counts from 1 and is the line in a text file. `fields` is the row as the
format holds it, or a `Bad` where it cannot be read. No reader knows what a caption is: `records` decides that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip.data.image_refs import ImageRef


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """A reference met while its bytes are in hand (not read here if None); `name` is the file it once was."""

    ref: ImageRef
    data: bytes | None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be read: the reason it is counted under, and what was found; and the rows that go with it."""

    reason: str
    value: str
    rows: int = 1


def guess_columns(names: Mapping[str, Sequence[str]], columns: Collection[str]) -> dict[str, str]:
    """Our field to the first of its guessed names that is among `columns`; fields without any are left out."""
    found = ((ours, next((g for g in guesses if g and g in columns), None)) for ours, guesses in names.items())
    return {ours: column for ours, column in found if column is not None}


RawRow = tuple[str, int, dict[str, Any] | BadRow]
ColumnChooser = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> our field: column
