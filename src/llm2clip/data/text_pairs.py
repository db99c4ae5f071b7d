"""General text pairs: questions and answers, titles and documents, paraphrases, as E5's data are (arXiv 2212.03533).

A row is `{"query": ..., "positive": ..., "negatives": [...], "instruction": ...}` in any format of tables that records
are read from; negatives and instruction are optional, and the columns may go by other names of the field. Two sentences
with a label or a score are not taken for a pair: they may contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llm2clip.data import readers
from llm2clip.data.pairs import Pair
from llm2clip.data.raw_rows import BadRow, guess_columns
from llm2clip.data.records import EARLY_CHECK_ROWS, NO_SPLIT, Source
from llm2clip.data.skip_log import SkipLog

NAMES = {  # what the fields are commonly called; the first that is there is taken
    "query": ("query", "anchor", "question", "title"),
    "positive": ("positive", "pos", "positives", "document", "answer", "passage", "text"),
    "negatives": ("negatives", "negative", "neg", "hard_negatives"),
    "instruction": ("instruction", "instruct", "task"),
    "split": ("split",),
}


def read_text_pairs(path: str, log: SkipLog | None = None) -> Iterator[Pair]:
    """The pairs of a source (PATH or PATH@split), one at a time, in its order. Of several positives the first is taken.

    A row that lacks a text, or whose two texts are the same, is skipped, counted and listed in `log`.

    Raises:
        ValueError: there is no column of queries or of positives, or no pair at all.
        TooManySkipped: too many rows are bad.
    """
    log, source = SkipLog() if log is None else log, Source.parse(path)
    count, columns_met = 0, False
    for kind, file in readers.find_source(source.path):
        for where, number, fields in readers.read_source(kind, file, _choose, image_bytes=False, splits=source.splits):
            if isinstance(fields, BadRow):
                log.count_row()
                log.skip(where, number, fields.reason, fields.value)
                continue
            if source.splits and (_text(fields.get("split")) or NO_SPLIT) not in source.splits:
                continue
            log.count_row()
            try:
                columns = _choose(where, list(fields))
                columns_met = True
            except ValueError:
                if not columns_met:  # the file is of something else
                    raise
                columns = {}  # a row of JSON has names of its own, and may lack one
            query, positive = (_text(fields.get(columns.get(name, ""))) for name in ("query", "positive"))
            if not query or not positive or query == positive:
                log.skip(where, number, "no pair of two texts", f"{query[:80]!r}, {positive[:80]!r}")
                if log.rows_seen >= EARLY_CHECK_ROWS:
                    log.check()
                continue
            wrong = _strings(fields.get(columns.get("negatives", "")))
            instruction = _text(fields.get(columns.get("instruction", "")))
            try:
                "".join([query, positive, *wrong, instruction]).encode()
            except UnicodeEncodeError as error:
                log.skip(where, number, "not valid Unicode", error)
                continue
            count += 1
            yield Pair(
                query,
                positive,
                tuple(text for text in wrong if text not in (query, positive)),
                f"{instruction}\n" if instruction else "",  # a space would join the word after it
            )
    log.check()
    if not count:
        raise ValueError(f"{path}: no text pair; {log.summary()}")


def _choose(file: str, names: Sequence[str]) -> dict[str, str]:
    """Our field to the column that holds it."""
    chosen = guess_columns(NAMES, names)
    for ours in ("query", "positive"):
        if ours not in chosen:
            raise ValueError(
                f"{file}: no column for {ours} (one of {', '.join(NAMES[ours])}); it has {', '.join(names)}"
            )
    return chosen


def _text(value: Any) -> str:
    """The first text of a cell, or nothing."""
    return next(iter(_strings(value)), "")


def _strings(value: Any) -> list[str]:
    """The texts of a cell: one, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
