"""Captions and general text pairs for `tune`, without the captions of held-out images.

Text pairs are, for example, questions with answers, titles with documents, or paraphrases. The format is the same as in
E5's training data (arXiv 2212.03533). A row has the form `{"query": ..., "positive": ..., "negatives": [...],
"instruction": ...}`. All table formats that are supported for records are also supported here. The fields `negatives`
and `instruction` are optional, and other common column names are recognised, too. Sentence pairs with a label or a
score are not supported, because the two sentences may contradict each other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm2clip.config import TuneConfig
from llm2clip.data import readers
from llm2clip.data.columns import BadRow, guess_columns
from llm2clip.data.pairs import ImageCaptions, Pair, TuningItem, can_pair, resolve_pairs_per_step
from llm2clip.data.records import EARLY_CHECK_ROWS, NO_SPLIT, Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import is_training_split, read_merged_records, same_image_filter, stream_records
from llm2clip.io_utils import DataFormatError
from llm2clip.runs.ranks import print_once, process_state

COLUMN_NAMES = {  # pair field -> common column names, in order of preference
    "query": ("query", "anchor", "question", "title"),
    "positive": ("positive", "pos", "positives", "document", "answer", "passage", "text"),
    "negatives": ("negatives", "negative", "neg", "hard_negatives"),
    "instruction": ("instruction", "instruct", "task"),
    "split": ("split",),
}


def read_tuning_sources(
    train: Sequence[Record],
    held_out: Sequence[Record],
    config: TuneConfig,
    columns: dict[str, str],
    log: SkipLog,
    training_sources: Sequence[str] = (),
) -> list[list[TuningItem]]:
    """Read the training data for `tune`; return one list of items per caption source, then one per text-pair source.

    If `config.source_weights` is not set, all caption sources except `train` are merged into one source. If no splits
    are selected for a source, only records that have no split or a training split are used.

    Args:
        train: Training records that have already been read. If there are any, they form the first caption source.
        held_out: Records whose images must not be used for tuning.
        config: Tuning settings. Caption sources are listed in `data`, and text-pair sources in `text_pairs`. Images in
            the sources listed under `exclude` are never used for tuning.
        columns: Column mapping that is added to each source's own mapping.
        log: Log in which to record skipped rows.
        training_sources: Caption sources from which `held_out` may have been drawn. They precede the sources in
            `config.data`. In all sources, held-out images are recognised by their image files. In `config.data`,
            held-out images are also recognised by the comparable part of their ids; see `comparable_id`.

    Raises:
        ValueError: The number of source weights is wrong, a source has too few pairs, or no pair can be
            formed because there are neither text pairs nor images with two captions.
    """
    groups = _group_sources([*training_sources, *config.data], bool(config.source_weights))
    num_sources = bool(train) + len(groups) + len(config.text_pairs)
    if config.source_weights and len(config.source_weights) != num_sources:
        raise ValueError(
            f"--tune.source_weights must have one weight for each of the {num_sources} caption and text-pair sources "
            f"(got {len(config.source_weights)})"
        )
    excluded = stream_records(config.exclude, columns, log, "ignore")
    held_out_filter = _HeldOutFilter(held_out, {comparable_id(record.id) for _, record in excluded}, training_sources)

    num_read = len(train)
    captions: list[list[TuningItem]] = []
    if train:
        captions.append([_to_item(record) for record in train if not held_out_filter.is_excluded(record)])
    for group in groups:
        records = read_merged_records(group, columns, log, "unchecked")
        num_read += len(records)
        is_held_out = same_image_filter(held_out, [record for _, record in records])
        captions.append(
            [
                _to_item(record)
                for source, record in records
                if held_out_filter.allows(source, record) and not is_held_out(record)
            ]
        )
    num_removed = num_read - sum(len(items) for items in captions)
    if config.exclude and not num_removed:
        print_once("--tune.exclude has no effect: the tuning data contains none of these images")
    if config.steps and not config.text_pairs:
        _require_two_captions(captions)

    pairs: list[list[TuningItem]] = [list(read_text_pairs(path, log)) for path in config.text_pairs]
    if config.steps:
        resolve_pairs_per_step([*captions, *pairs], config.batch_size, process_state().num_processes)
    counts = [f"the captions of {len(items):,} images" for items in captions]
    counts += [f"{len(items):,} text pairs" for items in pairs]
    removed = f"; {num_removed:,} images excluded" if num_removed else ""
    print_once(f"tuning on {' + '.join(counts)}{removed}")
    return [*captions, *pairs]


def comparable_id(record_id: str) -> str:
    """Return the part of an id that all data sets with the same images have in common.

    If the id starts with a number, that number is returned. Otherwise, the entire id is returned. If the id consists
    only of a number, leading zeros are removed, because COCO's file names have leading zeros (000000000139) but COCO's
    ids do not (139). In any other id, a leading number counts only if it has at least five digits.
    """
    if record_id.isdecimal():
        return record_id.lstrip("0") or "0"
    number = re.match(r"\d{5,}", record_id)
    return number[0] if number else record_id


class _HeldOutFilter:
    """Filter that selects the records that may be used for tuning, by split and id."""

    def __init__(self, held_out: Sequence[Record], excluded_ids: set[str], training_sources: Sequence[str]) -> None:
        self.excluded_ids = excluded_ids
        self.held_out_ids = {comparable_id(record.id) for record in held_out}
        parsed = [Source.parse(source) for source in training_sources]
        self.training_sources = {(source.path, source.splits) for source in parsed}

    def allows(self, source: Source, record: Record) -> bool:
        if not source.splits and not is_training_split(record):
            return False
        if self.is_excluded(record):
            return False
        if (source.path, source.splits) in self.training_sources:
            return True
        return comparable_id(record.id) not in self.held_out_ids

    def is_excluded(self, record: Record) -> bool:
        return comparable_id(record.id) in self.excluded_ids


def _group_sources(sources: list[str], weighted: bool) -> list[list[str]]:
    """Group sources for reading. If `weighted`, each source is its own group; otherwise, all sources form one group."""
    if weighted:
        return [[source] for source in sources]
    return [sources] if sources else []


def _to_item(record: Record) -> ImageCaptions:
    return ImageCaptions(short=record.captions + record.short_captions, long=record.long_captions)


def _require_two_captions(captions: Sequence[Sequence[TuningItem]]) -> None:
    for items in captions:
        if any(isinstance(item, ImageCaptions) and can_pair(item) for item in items):
            return
    raise ValueError(
        "no image has two different captions, but tuning needs them as positive pairs. Use --tune.steps 0 to leave the "
        "LLM unchanged, or --tune.data to tune on a data set with several captions per image"
    )


# ---- text pairs ------------------------------------------------------------------------------------------------------


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
            if source.splits and (_get_first_text(fields.get("split")) or NO_SPLIT) not in source.splits:
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
    query = _get_first_text(fields.get(columns.get("query", "")))
    positive = _get_first_text(fields.get(columns.get("positive", "")))
    negatives = _list_texts(fields.get(columns.get("negatives", "")))
    instruction = _get_first_text(fields.get(columns.get("instruction", "")))
    return Pair(
        anchor=query,
        positive=positive,
        negatives=tuple(text for text in negatives if text not in (query, positive)),
        # The instruction ends with a newline, because tokenizers would merge a space with the following word.
        instruction=f"{instruction}\n" if instruction else "",
    )


def _get_first_text(value: Any) -> str:
    """Return the first text in a cell. Return an empty string if the cell contains no text."""
    return next(iter(_list_texts(value)), "")


def _list_texts(value: Any) -> list[str]:
    """Return the texts in a cell, which contains either a single text or a list of texts."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]
