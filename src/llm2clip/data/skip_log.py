"""Log of skipped rows, with a limit on the fraction of rows that can be skipped."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.io_utils import format_count, hide_url_secrets, to_valid_unicode

MAX_NOTES = 5  # maximum number of notes in the summary
MAX_VALUE_CHARACTERS = 200  # maximum length of a value in the log
MAX_PATH_CHARACTERS = 4096
# reason for skipping a row -> advice on how to fix the source
ADVICE_BY_REASON = {
    "missing image": "Relative image paths are resolved against the folder of the caption file. Move the caption file, "
    "or correct the paths",
    "image is a URL": "Image URLs are not downloaded. Download the images first, for example with img2dataset "
    "--output_format webdataset, and pass the tar files",
    "no caption": "In a folder of images or a tar file, the captions of x.jpg must be in x.txt or x.json. A folder can "
    "also contain captions.csv or captions.jsonl with the captions of all images",
}


class BadRowError(Exception):
    """Raised when a row cannot be converted to a record. Skipped rows are counted by `reason`."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason, value)
        self.reason, self.value = reason, value


class TooManySkippedError(ValueError):
    """Raised when too many rows are skipped, usually because the source or its column mapping is wrong."""


class SkipLog:
    """Counter of skipped rows, which are also listed in a JSON Lines file.

    An existing file is overwritten. Only one process may write to the file.

    Attributes:
        max_skipped: Maximum fraction of rows that may be skipped.
        skipped: Number of skipped rows by reason.
        dropped: Number of rows with a dropped value, by reason.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, max_skipped: float = 0.05) -> None:
        self.path = None if path is None else Path(path)
        self.max_skipped = max_skipped
        self.skipped: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.examples: list[str] = []
        self.notes: dict[str, dict[str, None]] = {}
        self._copies = np.empty(0, np.uint64)  # hashes of the merged duplicate images
        self._num_rows = 0  # number of rows counted with `count_rows`
        self._source_rows: dict[str, dict[str, int]] = {}  # path -> split -> number of rows
        self._recorded: set[tuple[str, int, str]] = set()  # (file, row, reason) of each logged problem
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text("")

    @property
    def rows_seen(self) -> int:
        """Number of rows read so far. If a source is read several times, its rows are counted only once."""
        return self._num_rows + sum(sum(splits.values()) for splits in self._source_rows.values())

    @property
    def num_duplicate_images(self) -> int:
        return len(self._copies)

    def count_rows(self, count: int) -> None:
        """Add `count` to the row count. For sources that can be read several times, use `count_source_rows`."""
        self._num_rows += count

    def count_source_rows(self, path: str, split: str, count: int) -> None:
        """Set the number of rows read so far from a split of a source. `split` is "" if the split is unknown."""
        counts = self._source_rows.setdefault(path, {})
        counts[split] = max(count, counts.get(split, 0))

    def count_at_least(self, count: int) -> None:
        """Increase the row count to at least `count`, for data whose rows were not counted during reading."""
        self._num_rows += max(0, count - self.rows_seen)

    def skip(self, file: str, row: int, reason: str, value: object, rows: int = 1) -> None:
        """Record `rows` skipped rows, starting at `row` (0 for images). Ignore calls that repeat the row and reason."""
        file = hide_url_secrets(file)
        if not self._record_once(file, row, reason):
            return
        self.skipped[reason] += rows
        if len(self.examples) < 3:
            self.examples.append(f"{file}, row {row}: {reason}: {str(value)[:MAX_VALUE_CHARACTERS]}")
        self._write_log_entry(file, row, reason, value)

    def record_dropped(self, file: str, row: int, reason: str, value: object) -> None:
        """Record that a value in a row was dropped. Ignore calls that repeat the row and reason."""
        file = hide_url_secrets(file)
        if self._record_once(file, row, reason):
            self.dropped[reason] += 1
            self._write_log_entry(file, row, reason, value)

    def count_duplicate_images(self, hashes: np.ndarray) -> None:
        """Count merged duplicate images. `hashes` contains the hash of each image, of shape (N,), uint64."""
        self._copies = np.union1d(self._copies, hashes)

    def add_note(self, text: str, file: str) -> None:
        """Add a note to the summary, for example about the unusual encoding of a file. Ignore repeated notes."""
        self.notes.setdefault(text, {})[to_valid_unicode(hide_url_secrets(file))] = None

    def replay(self, events: Iterable[Sequence[Any]]) -> None:
        """Repeat the calls recorded by a `RecordingSkipLog`."""
        for name, *args in events:
            getattr(self, name)(*args)

    def summary(self) -> str:
        """Return a one-line summary: the counts of skipped rows and dropped values by reason, followed by the notes."""
        return "; ".join([self._format_skip_totals(), *self.list_notes()])

    def check(self) -> None:
        """Raise `TooManySkippedError` if the fraction of skipped rows exceeds the limit."""
        if self.skipped.total() <= self.max_skipped * self.rows_seen:
            return
        examples = "".join(f"\n  {example}" for example in self.examples)
        listed = f"\nAll skipped rows are listed in {self.path}." if self.path else ""
        notes = "".join(f"\n{note}" for note in self.list_notes())
        most_common, _ = self.skipped.most_common(1)[0]
        advice = f"\n{ADVICE_BY_REASON.get(most_common, 'Fix the source')}"
        if self.skipped.total() < self.rows_seen / 2:  # if most rows are skipped, the source is probably wrong
            advice += ", or raise the limit with --max_skipped"
        raise TooManySkippedError(
            f"{self._format_skip_totals()}, over the limit of {self.max_skipped:.1%}{examples}{listed}{notes}{advice}."
        )

    def list_notes(self) -> list[str]:
        """Return up to `MAX_NOTES` notes. Each note starts with one affected file and the number of other files."""
        notes = []
        for text, files in islice(self.notes.items(), MAX_NOTES):
            others = f" and {len(files) - 1:,} more" if len(files) > 1 else ""
            notes.append(f"{next(iter(files))}{others}: {text}")
        return notes

    def _record_once(self, file: str, row: int, reason: str) -> bool:
        key = (file, row, reason)
        if key in self._recorded:
            return False
        self._recorded.add(key)
        return True

    def _format_skip_totals(self) -> str:
        numbers = f"{self.skipped.total():,} of {self.rows_seen:,} rows skipped{_format_counts(self.skipped)}"
        if self.dropped:
            numbers += f"; dropped values{_format_counts(self.dropped)}"
        if len(self._copies):
            numbers += f"; {format_count(len(self._copies), 'duplicate image')} merged with the originals"
        return numbers

    def _write_log_entry(self, file: str, row: int, reason: str, value: object) -> None:
        if self.path is None:
            return
        entry = {"file": file, "row": row, "reason": reason, "value": str(value)[:MAX_VALUE_CHARACTERS]}
        # The file is reopened for each line, so that no line is lost if the run is killed.
        # Lone surrogates, from file names that are not UTF-8, are written as \udcXX, which is valid JSON.
        with self.path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(json.dumps(entry, ensure_ascii=False) + "\n")


class RecordingSkipLog(SkipLog):
    """Skip log that records method calls, which `SkipLog.replay` can repeat in another process."""

    def __init__(self) -> None:
        super().__init__(max_skipped=1.0)
        self.events: list[list[Any]] = []

    def count_source_rows(self, path: str, split: str, count: int) -> None:
        """Do nothing, because `ReadSummary` already contains the number of rows."""

    def skip(self, file: str, row: int, reason: str, value: object, rows: int = 1) -> None:
        self.events.append(["skip", file, row, reason, str(value)[:MAX_PATH_CHARACTERS], rows])

    def record_dropped(self, file: str, row: int, reason: str, value: object) -> None:
        self.events.append(["record_dropped", file, row, reason, str(value)[:MAX_VALUE_CHARACTERS]])

    def add_note(self, text: str, file: str) -> None:
        if self._record_once(file, 0, text):
            self.events.append(["add_note", text, file])


def _format_counts(counter: Counter[str]) -> str:
    return f" ({', '.join(f'{reason}: {count:,}' for reason, count in counter.most_common())})" if counter else ""
