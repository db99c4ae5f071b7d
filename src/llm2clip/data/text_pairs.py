"""General text pairs: questions and answers, titles and documents, paraphrases, as E5's data are (arXiv 2212.03533).

A row is `{"query": ..., "positive": ..., "negatives": [...], "instruction": ...}` in any format of tables that records
are read from; negatives and instruction are optional, and the columns may go by other names of the field.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llm2clip.data import readers
from llm2clip.data.pairs import Pair
from llm2clip.data.records import EARLY
from llm2clip.data.rows import Bad
from llm2clip.data.skips import SkipLog

NAMES = {  # what the fields are commonly called; the first that is there is taken
    "query": ("query", "anchor", "question", "sentence1", "text1", "title"),
    "positive": ("positive", "pos", "positives", "document", "answer", "sentence2", "text2", "passage", "text"),
    "negatives": ("negatives", "negative", "neg", "hard_negatives"),
    "instruction": ("instruction", "instruct", "task"),
}


def open_pairs(path: str, log: SkipLog | None = None) -> Iterator[Pair]:
    """The pairs of a source, one at a time, in its order. Of several positives the first is taken.

    A row that lacks a text, or whose two texts are the same, is skipped, counted and listed in `log`.

    Raises:
        ValueError: there is no column of queries or of positives, or no pair at all.
        TooManySkipped: too many rows are bad.
    """
    log = SkipLog() if log is None else log
    count = 0
    for kind, file in readers.find(path):
        for where, number, fields in readers.read(kind, file, _choose, image_bytes=False):
            log.seen_one()
            if isinstance(fields, Bad):
                log.skip(where, number, fields.reason, fields.value)
                continue
            columns = _choose(where, list(fields))
            values = {ours: fields.get(column) for ours, column in columns.items()}
            query, positive = (next(iter(_strings(values.get(name))), "") for name in ("query", "positive"))
            if not query or not positive or query == positive:
                log.skip(where, number, "no pair of two texts", f"{query[:80]!r}, {positive[:80]!r}")
                if log.seen >= EARLY:
                    log.check()
                continue
            count += 1
            negatives = tuple(t for t in _strings(values.get("negatives")) if t not in (query, positive))
            instruction = next(iter(_strings(values.get("instruction"))), "")
            yield Pair(query, positive, negatives, f"{instruction} " if instruction else "")
    log.check()
    if not count:
        raise ValueError(f"{path}: no text pair; {log.summary()}")


def _choose(file: str, names: Any) -> dict[str, str]:
    """Our field to the column that holds it."""
    chosen = {}
    for ours, guesses in NAMES.items():
        found = next((guess for guess in guesses if guess in names), None)
        if found is not None:
            chosen[ours] = found
    for ours in ("query", "positive"):
        if ours not in chosen:
            raise ValueError(
                f"{file}: no column for {ours} (one of {', '.join(NAMES[ours])}); it has {', '.join(names)}"
            )
    return chosen


def _strings(value: Any) -> list[str]:
    """The texts of a cell: one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
