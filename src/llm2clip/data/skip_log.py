"""Log of skipped rows: each is counted and listed with file and row, and too many of them are an error."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path


class TooManySkipped(ValueError):
    """More rows than allowed were skipped: the source or its column mapping is probably wrong."""


class SkipLog:
    """Counts skipped rows and lists them as JSON lines.

    Each file must have a single writer: give every process its own path, or a path only to the first.

    Args:
        path: Where the rows are listed. The file is emptied here, so every run starts a new list. None: no list.
        max_skipped: Fraction of the rows that may be skipped.

    Attributes:
        skipped: Number of skipped rows by reason.
        dropped: Number of dropped parts of rows (such as empty captions) by reason; these rows are not skipped.
        examples: Descriptions of the first three skipped rows.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, max_skipped: float = 0.05) -> None:
        self.path = None if path is None else Path(path)
        self.max_skipped = max_skipped
        self.skipped: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: list[str] = []
        self._single_rows = 0  # counted one by one
        self._source_rows: dict[str, dict[str, int]] = {}  # path -> splits -> rows; splits "" are all rows of the path
        self._skipped_rows: set[tuple[str, int, str]] = set()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    @property
    def rows_seen(self) -> int:
        """The number of rows read so far. A source that is read several times counts once."""
        source_rows = sum(splits.get("") or sum(splits.values()) for splits in self._source_rows.values())
        return self._single_rows + source_rows

    def count_row(self) -> None:
        """Count one row."""
        self._single_rows += 1

    def count_source_rows(self, path: str, splits: str, count: int) -> None:
        """Set the number of rows that the current pass over a source has read so far.

        Args:
            path: Path of the source.
            splits: The selected splits; empty if the pass reads all rows.
            count: Number of rows.
        """
        counts = self._source_rows.setdefault(path, {})
        counts[splits] = max(count, counts.get(splits, 0))

    def count_at_least(self, count: int) -> None:
        """Raise the number of rows to `count`, for data whose rows were not counted while reading."""
        self._single_rows += max(0, count - self.rows_seen)

    def skip(self, file: str, row: int, reason: str, value: object, rows: int = 1) -> None:
        """Record a skipped row, or `rows` of them from this one on.

        A row that was skipped before for the same reason, in an earlier pass or stage, is not recorded again.
        """
        if (file, row, reason) in self._skipped_rows:
            return
        self._skipped_rows.add((file, row, reason))
        self.skipped[reason] += rows
        if len(self.examples) < 3:
            self.examples.append(f"{file}, row {row}: {reason}: {str(value)[:200]}")
        self._write(file, row, reason, value)

    def drop(self, file: str, row: int, reason: str, value: object) -> None:
        """Record a part of a row that was dropped; the row itself is used."""
        self.dropped[reason] += 1
        self._write(file, row, reason, value)

    def summary(self) -> str:
        """Return one line with the numbers of skipped rows and dropped parts and their reasons."""
        summary = f"{self.skipped.total():,} of {self.rows_seen:,} rows skipped{_format_counts(self.skipped)}"
        if self.dropped:
            summary += f"; parts of rows dropped{_format_counts(self.dropped)}"
        return summary

    def check(self) -> None:
        """Raise `TooManySkipped` if the fraction of skipped rows is above the limit."""
        if self.skipped.total() <= self.max_skipped * self.rows_seen:
            return
        examples = "".join(f"\n  {example}" for example in self.examples)
        listed = f"\nAll of them are listed in {self.path}." if self.path else ""
        raise TooManySkipped(
            f"{self.summary()}, over the limit of {self.max_skipped:.1%}{examples}{listed}"
            "\nFix the source, or raise the limit with --max_skipped."
        )

    def _write(self, file: str, row: int, reason: str, value: object) -> None:
        if self.path is None:
            return
        entry = {"file": file, "row": row, "reason": reason, "value": str(value)[:200]}
        # Opened for each line: skipped rows are rare, and the list must be on disk if the run is killed.
        # backslashreplace: file names that are not UTF-8 contain lone surrogates, which become JSON's \udcXX escapes.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _format_counts(counter: Counter[str]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in counter.most_common())})" if counter else ""
