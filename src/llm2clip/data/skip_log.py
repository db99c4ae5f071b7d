"""What is left out of a source: counted, listed with file and row, and refused where it is too much."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path


class TooManySkipped(ValueError):
    """More of the rows than allowed gave no record: the source or its mapping is wrong, rather than a few rows."""


class SkipLog:
    """Counts what is left out and lists it, a JSON object a line, in `path` (emptied here, so a rerun starts anew).

    limit: the share of rows that may be skipped. Empty captions dropped from a row that stays are counted apart, in
    `dropped`. One writer a file: give each process its own path, or only the first one.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, max_skipped: float = 0.05) -> None:
        self.path = None if path is None else Path(path)
        self.max_skipped = max_skipped
        self._seen = 0  # counted one by one
        self._rows: dict[str, dict[str, int]] = {}  # of sources, which may be read again, by their splits; "" is all
        self.skipped: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: list[str] = []
        self._known: set[tuple[str, int, str]] = set()
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    @property
    def rows_seen(self) -> int:
        """The rows that there were; of a source that was read twice, once."""
        return self._seen + sum(by.get("") or sum(by.values()) for by in self._rows.values())

    def count_row(self) -> None:
        """One more row."""
        self._seen += 1

    def count_source_rows(self, path: str, splits: str, count: int) -> None:
        """So many rows of some splits of a source by now, in this pass over it."""
        by = self._rows.setdefault(path, {})
        by[splits] = max(count, by.get(splits, 0))

    def count_at_least(self, count: int) -> None:
        """There were so many rows, if nobody counted them."""
        self._seen += max(0, count - self.rows_seen)

    def skip(self, file: str, row: int, reason: str, value: object, rows: int = 1) -> None:
        """A row that gives no record, or so many from it on. One that was skipped before, in an earlier pass or stage,
        counts once."""
        if (file, row, reason) in self._known:
            return
        self._known.add((file, row, reason))
        self.skipped[reason] += rows
        if len(self.examples) < 3:
            self.examples.append(f"{file}, row {row}: {reason}: {str(value)[:200]}")
        self._write(file, row, reason, value)

    def drop(self, file: str, row: int, reason: str, value: object) -> None:
        """A part of a row that is left out while the row stays."""
        self.dropped[reason] += 1
        self._write(file, row, reason, value)

    def _write(self, file: str, row: int, reason: str, value: object) -> None:
        if self.path is not None:
            entry = {"file": file, "row": row, "reason": reason, "value": str(value)[:200]}
            # Opened a line at a time: skips are rare, and what is listed is on disk whatever happens next.
            # backslashreplace: bytes of a file name that are no UTF-8 become \udcXX, which is an escape JSON knows.
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file_:
                file_.write(json.dumps(entry, ensure_ascii=False) + "\n")

    def summary(self) -> str:
        """One line: how many of how many, and why."""
        skipped = f"{self.skipped.total():,} of {self.rows_seen:,} rows skipped{_counts(self.skipped)}"
        return skipped + (f"; parts of rows dropped{_counts(self.dropped)}" if self.dropped else "")

    def check(self) -> None:
        """Raises `TooManySkipped` when the share of skipped rows is over the limit."""
        if self.skipped.total() > self.max_skipped * self.rows_seen:
            listed = f"\nall are listed in {self.path}" if self.path else ""
            examples = "".join(f"\n  {example}" for example in self.examples)
            raise TooManySkipped(
                f"{self.summary()}, over the limit of {self.max_skipped:.1%}{examples}{listed}"
                "\nmend the source, or raise --max_skipped if this is how it is"
            )


def _counts(counter: Counter[str]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in counter.most_common())})" if counter else ""
