"""Captions and text pairs for `tune`, excluding the captions of held-out images."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llm2clip.config import TuneConfig
from llm2clip.data.merged_records import read_merged_records, stream_records
from llm2clip.data.pairs import ImageCaptions, TuningItem, can_pair, pairable_items
from llm2clip.data.records import Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import is_training_split
from llm2clip.data.text_pairs import read_text_pairs
from llm2clip.distributed import print_once, process_state


def read_tuning_sources(
    train: Sequence[Record],
    held_out: Sequence[Record],
    config: TuneConfig,
    columns: dict[str, str],
    log: SkipLog,
    training_sources: Sequence[str] = (),
) -> list[list[TuningItem]]:
    """Return the training data for `tune`: one list of items per caption source, then one list per text-pair source.

    If `config.source_weights` is not set, all caption sources except `train` are merged into one. If no splits are
    selected for a source, only its records that have no split or a training split are used.

    Args:
        train: Training records that have already been read. Unless empty, they are the first caption source.
        held_out: Records whose images must not be used for tuning.
        config: Tuning settings. `data`, `text_pairs` and `exclude` name the sources; images in `exclude` are never used
            for tuning.
        columns: Column mapping to add to each source's own mapping.
        log: Log in which skipped rows are recorded.
        training_sources: Caption sources from which `held_out` may have been taken; they come before `config.data`.
            Held-out images are recognised by their files in these sources, and by the comparable part of their ids in
            `config.data` (see `comparable_id`).

    Raises:
        ValueError: The number of source weights is wrong, a source has fewer pairs than a batch needs, or there are
            neither text pairs nor images with two captions.
    """
    groups = _caption_groups([*training_sources, *config.data], bool(config.source_weights))
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
        captions.append([_to_item(record) for source, record in records if held_out_filter.allows(source, record)])
    num_removed = num_read - sum(len(items) for items in captions)
    if config.exclude and not num_removed:
        print_once("--tune.exclude has no effect: the tuning data contains none of these images")
    if config.steps and not config.text_pairs:
        _require_two_captions(captions)

    pairs: list[list[TuningItem]] = [list(read_text_pairs(path, log)) for path in config.text_pairs]
    if config.steps:
        for items in [*captions, *pairs]:
            pairable_items(items, config.batch_size * process_state().num_processes)
    counts = [f"the captions of {len(items):,} images" for items in captions]
    counts += [f"{len(items):,} text pairs" for items in pairs]
    removed = f"; {num_removed:,} images excluded" if num_removed else ""
    print_once(f"tuning on {' + '.join(counts)}{removed}")
    return [*captions, *pairs]


def comparable_id(record_id: str) -> str:
    """Return the part of an id that is the same in all data sets with the same images.

    This is the leading number of the id or, if there is none, the entire id. Leading zeros are removed from an id that
    is only a number, because COCO's file names have leading zeros (000000000139) and its ids do not (139). In any other
    id, a leading number must have at least five digits.
    """
    if record_id.isdecimal():
        return record_id.lstrip("0") or "0"
    number = re.match(r"\d{5,}", record_id)
    return number[0] if number else record_id


class _HeldOutFilter:
    """Decides which records may be used for tuning."""

    def __init__(self, held_out: Sequence[Record], excluded_ids: set[str], training_sources: Sequence[str]) -> None:
        self.excluded_ids = excluded_ids
        self.held_out_ids = {comparable_id(record.id) for record in held_out}
        self.held_out_keys = {record.image.key for record in held_out if record.image is not None}
        parsed = [Source.parse(source) for source in training_sources]
        self.training_sources = {(source.path, source.splits) for source in parsed}

    def allows(self, source: Source, record: Record) -> bool:
        if not source.splits and not is_training_split(record):
            return False
        if self.is_excluded(record):
            return False
        if (source.path, source.splits) in self.training_sources:
            return record.image is None or record.image.key not in self.held_out_keys
        return comparable_id(record.id) not in self.held_out_ids

    def is_excluded(self, record: Record) -> bool:
        return comparable_id(record.id) in self.excluded_ids


def _caption_groups(sources: list[str], weighted: bool) -> list[list[str]]:
    """Group the sources that are read together: each source on its own if weighted, otherwise all in one group."""
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
        "LLM unchanged, --tune.data to tune on other captions, or --encoder.path to use an LLM that is already tuned"
    )
