"""General text pairs for `tune`, such as questions with answers, titles with documents, and paraphrases.

The format is the one used for the training data of E5 (arXiv 2212.03533). A row has the form `{"query": ...,
"positive": ..., "negatives": [...], "instruction": ...}`. All table formats that are supported for records are also
supported here. The fields `negatives` and `instruction` are optional, and other common column names are recognised,
too. Sentence pairs with a label or a score are not supported, because the two sentences may contradict each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm2clip.data import readers
from llm2clip.data.columns import BadRow, guess_columns
from llm2clip.data.pairs import Pair
from llm2clip.data.records import EARLY_CHECK_ROWS, NO_SPLIT, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError

COLUMN_NAMES = {  # pair field -> usual column names, in order of preference
    "query": ("query", "anchor", "question", "title"),
    "positive": ("positive", "pos", "positives", "document", "answer", "passage", "text"),
    "negatives": ("negatives", "negative", "neg", "hard_negatives"),
    "instruction": ("instruction", "instruct", "task"),
    "split": ("split",),
}


def read_text_pairs(path: str, log: SkipLog | None = None) -> Iterator[Pair]:
    """Yield the pairs in a source (`PATH` or `PATH@split`) in order. Of several positives in a row, the first is used.

    Rows in which a text is missing or both texts are identical are skipped and recorded in `log`.

    Raises:
        ValueError: The source has no query column, no positive column, or no pairs.
        TooManySkipped: Too many rows were skipped.
    """
    log, source = SkipLog() if log is None else log, Source.parse(path)
    num_pairs, columns_known = 0, False
    for kind, file in readers.find_files(source.path):
        rows = readers.read_source(kind, file, _choose_columns, image_bytes=False, splits=source.splits, log=log)
        for row_file, number, fields in rows:
            if isinstance(fields, BadRow):
                for _ in range(fields.rows):
                    log.count_row()
                log.skip(row_file, number, fields.reason, fields.value, fields.rows)
                continue
            if source.splits and (_first_text(fields.get("split")) or NO_SPLIT) not in source.splits:
                continue
            log.count_row()
            try:
                columns = _choose_columns(row_file, list(fields))
                columns_known = True
            except DataFormatError:
                if not columns_known:  # the first row lacks these columns, so the file does not contain pairs
                    raise
                columns = {}  # this JSON object lacks the required keys
            pair = _to_pair(fields, columns)
            if pair.anchor == pair.positive or not pair.anchor or not pair.positive:
                log.skip(
                    row_file, number, "missing or identical texts", f"{pair.anchor[:80]!r}, {pair.positive[:80]!r}"
                )
                if log.rows_seen >= EARLY_CHECK_ROWS:
                    log.check()
                continue
            try:
                "".join([*pair.texts, *pair.negatives, pair.instruction]).encode()
            except UnicodeEncodeError as error:
                log.skip(row_file, number, "not valid Unicode", error)
                continue
            num_pairs += 1
            yield pair
    log.check()
    if not num_pairs:
        raise ValueError(f"{path}: no text pairs; {log.summary()}")


def _choose_columns(file: str, columns: Sequence[str]) -> dict[str, str]:
    """Map pair fields to columns.

    Raises:
        DataFormatError: There is no query column or no positive column.
    """
    chosen = guess_columns(COLUMN_NAMES, columns)
    for field in ("query", "positive"):
        if field not in chosen:
            names = ", ".join(COLUMN_NAMES[field])
            raise DataFormatError(f"{file}: no column for {field} (one of {names}); it has {', '.join(columns)}")
    return chosen


def _to_pair(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Pair:
    query = _first_text(fields.get(columns.get("query", "")))
    positive = _first_text(fields.get(columns.get("positive", "")))
    negatives = _texts(fields.get(columns.get("negatives", "")))
    instruction = _first_text(fields.get(columns.get("instruction", "")))
    return Pair(
        anchor=query,
        positive=positive,
        negatives=tuple(text for text in negatives if text not in (query, positive)),
        # The instruction ends with a newline, because tokenizers would merge a space with the following word.
        instruction=f"{instruction}\n" if instruction else "",
    )


def _first_text(value: Any) -> str:
    """Return the first text in a cell. Return an empty string if the cell contains no text."""
    return next(iter(_texts(value)), "")


def _texts(value: Any) -> list[str]:
    """Return the texts in a cell, which contains either a single text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
