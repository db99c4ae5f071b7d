"""Reading several data sources, merging records with the same image, and choosing held-out images."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm2clip.config import EvaluateConfig
from llm2clip.data.columns import CAPTION_FIELDS, TEXT_FIELDS
from llm2clip.data.image_hashes import find_copies
from llm2clip.data.records import NO_SPLIT, ImageCheck, Record, Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.texts import deduplicate_captions

TRAIN_SPLITS = (NO_SPLIT, "train", "training", "restval")
HELD_OUT_SPLITS = ("val", "validation", "valid", "dev", "test")  # the first of these splits that exists is held out
HELD_OUT_DIVISOR = 10  # one in this many images is held out if the data has no held-out split
MAX_HELD_OUT = 1000  # maximum number of images to hold out if the data has no held-out split

SourcedRecord = tuple[Source, Record]


@dataclass
class DataSplits:
    """Training records and held-out records.

    Attributes:
        held_out: Maps each caption field to the held-out records that have an image. The `captions` of these records
            are the captions in that field. The fields are `captions`, `short_captions` and `long_captions`, if present
            in the data, and the columns listed in `EvaluateConfig.fields`.
        summary: One-line description of the training and held-out records, to print for the user.
        rule: Explanation of how the held-out images were chosen and how to use all images instead. It is shown by
            commands that use only the held-out records.
    """

    train: list[Record]
    held_out: dict[str, list[Record]]
    summary: str
    rule: str


def read_splits(
    sources: Sequence[str],
    config: EvaluateConfig,
    columns: dict[str, str],
    log: SkipLog,
    image_check: ImageCheck = "header",
    keep_selected_splits: bool = False,
) -> DataSplits:
    """Read sources and divide their records into training and held-out records. Each image has one record.

    If splits are selected for a source (`PATH@train+none`), all records in these splits are used for training.
    Otherwise, only records with a training split or no split are used. The held-out records are determined by the first
    of these rules that applies:

    1. If `config.data` lists sources, their records are held out, and their images are removed from the training data.
    2. If a source has a split named val, validation, valid, dev or test, that split is held out. If there are several
       such splits, the one that comes first in this list is held out.
    3. Otherwise, a tenth of the training images (at most 1,000) is held out, chosen by a hash of each record. Sources
       with selected splits contribute held-out images only if all sources have selected splits.

    Args:
        sources: Paths, optionally followed by `@split+split`.
        config: Evaluation settings, which list held-out sources and additional caption columns.
        columns: Column mapping that extends or overrides each source's own mapping.
        image_check: How to check images; see `open_records`.
        keep_selected_splits: If True and all sources have selected splits, hold out no images instead of applying
            rule 3.
    """
    records = read_merged_records(sources, columns, log, image_check)
    splits = Counter(record.split or NO_SPLIT for _, record in records if record.image is not None)
    train = [(source, record) for source, record in records if source.splits or is_training_split(record)]
    other = [(source, record) for source, record in records if not source.splits and not is_training_split(record)]
    notes = []
    other_splits = {_get_split_name(record) for _, record in other}
    held_out_split = next((name for name in HELD_OUT_SPLITS if name in other_splits), None)
    if config.data:
        held_out = read_merged_records(config.data, columns, log, image_check)
        is_held_out = build_same_image_filter([record for _, record in held_out], [record for _, record in train])
        num_before = len(train)
        train = [(source, record) for source, record in train if not is_held_out(record)]
        if num_leaked := num_before - len(train):
            notes.append(f"{num_leaked:,} held-out images removed from training")
    elif held_out_split is not None:
        held_out = [(source, record) for source, record in other if _get_split_name(record) == held_out_split]
        other = [(source, record) for source, record in other if _get_split_name(record) != held_out_split]
    elif keep_selected_splits and all(Source.parse(source).splits for source in sources):
        held_out = []
    else:
        train, held_out = _draw_held_out(train)
    if other:
        names = ", ".join(sorted({str(record.split) for _, record in other}))
        notes.append(f"{len(other):,} records from other splits ({names}) not used")
    held_out = [(source, record) for source, record in held_out if record.image is not None]
    num_images = sum(record.image is not None for _, record in train)
    return DataSplits(
        train=[record for _, record in train],
        held_out=_group_by_caption_field(held_out, config.fields, columns),
        summary=", ".join([f"{num_images:,} training images", f"{len(held_out):,} held out", *notes]),
        rule=_describe_rule(len(held_out), held_out_split, splits),
    )


def _describe_rule(num_held_out: int, held_out_split: str | None, splits: Counter[str]) -> str:
    """Explain which images in the sources are held out, and how to use all images instead.

    `held_out_split` is None if the images were drawn from the training images. `splits` maps splits to image counts.
    """
    reason = f"the {held_out_split} split"
    if held_out_split is None:
        reason = f"one in {HELD_OUT_DIVISOR}, at most {MAX_HELD_OUT:,}, because no split is named {HELD_OUT_SPLITS[0]}"
        reason += f" or {HELD_OUT_SPLITS[-1]}"
    return (
        f"{num_held_out:,} held-out images out of {splits.total():,} ({reason}). To use all images, list their splits: "
        f"PATH@{'+'.join(sorted(splits))}"
    )


def is_training_split(record: Record) -> bool:
    """Return True if a record is in a training split or has no split."""
    return _get_split_name(record) in TRAIN_SPLITS


def replace_captions(record: Record, captions: tuple[str, ...]) -> Record:
    """Return a copy of a record with all captions replaced by `captions`."""
    return dataclasses.replace(record, captions=captions, short_captions=(), long_captions=())


def _get_split_name(record: Record) -> str:
    return record.split.lower() if record.split else NO_SPLIT


def _draw_held_out(train: Sequence[SourcedRecord]) -> tuple[list[SourcedRecord], list[SourcedRecord]]:
    """Hold out a tenth of the images, chosen by hash. Return (remaining training records, held-out records)."""
    candidates = [record for source, record in train if not source.splits] or [record for _, record in train]
    shuffled = sorted((record for record in candidates if record.image is not None), key=_hash_record)
    count = min(MAX_HELD_OUT, max(1, len(shuffled) // HELD_OUT_DIVISOR))
    drawn = {id(record) for record in shuffled[:count]}
    held_out = [(source, record) for source, record in train if id(record) in drawn]
    return [(source, record) for source, record in train if id(record) not in drawn], held_out


def _hash_record(record: Record) -> str:
    # The captions are included because several records may have the same id. surrogatepass is needed because an id may
    # come from a file name that is not UTF-8.
    return hashlib.sha256("\0".join([record.id, *record.texts]).encode(errors="surrogatepass")).hexdigest()


def _group_by_caption_field(
    held_out: Sequence[SourcedRecord], extra_columns: Sequence[str], columns: dict[str, str]
) -> dict[str, list[Record]]:
    """Group held-out records by caption field. For each extra caption column, read the sources again."""
    records = [record for _, record in held_out]
    fields = {"captions": [record for record in records if record.captions]}
    for name in CAPTION_FIELDS[1:]:
        if any(getattr(record, name) for record in records):
            fields[name] = [replace_captions(record, getattr(record, name)) for record in records]
    sources = [Source(path, splits) for path, splits in dict.fromkeys((s.path, s.splits) for s, _ in held_out)]
    for name in extra_columns:
        only_this_column = {**columns, **dict.fromkeys(CAPTION_FIELDS, ""), "captions": name}
        quiet = SkipLog(max_skipped=1.0)  # some rows are expected to have no caption in this column
        candidates = read_merged_records(sources, only_this_column, quiet, image_check="exists")
        is_held_out = build_same_image_filter(records, [record for _, record in candidates])
        fields[name] = [record for _, record in candidates if is_held_out(record)]
    return fields


# ---- merging records -------------------------------------------------------------------------------------------------


def read_merged_records(
    sources: Sequence[str | Source], columns: dict[str, str], log: SkipLog, image_check: ImageCheck = "header"
) -> list[SourcedRecord]:
    """Read all records from several sources and merge records with the same image.

    Rows with the same image are merged into one record with all their distinct captions, even if the sources differ.
    The merged record keeps the id, split and source of the first row. Image files with the same bytes are treated as
    the same image; see `find_copies`. Rows without an image are merged if they have the same id, source path and split.

    Args:
        columns: Column mapping that extends or overrides each source's own mapping.
        log: Skip log. It records skipped rows and counts duplicate images.
        image_check: How to check images; see `open_records`. If "ignore", the bytes of image files are not compared.

    Returns:
        A list with one (source, record) pair per image, in order of first appearance.

    Raises:
        ValueError: Images are checked, but no record has an image. See `open_records` for other errors.
    """
    merged: dict[Any, SourcedRecord] = {}

    def add(key: Any, source: Source, record: Record) -> None:
        if key in merged:
            source, first = merged[key]
            record = _merge_records(first, record)
        merged[key] = source, record

    for number, (source, record) in enumerate(stream_records(sources, columns, log, image_check)):
        add(_build_merge_key(source, record, number), source, record)
    if image_check in ("header", "exists") and merged and not any(record.image for _, record in merged.values()):
        names = ", ".join(str(source) for source in sources)
        message = (
            f"{names}: none of the {len(merged):,} records has an image. Only `tune` and `embed` accept text-only data"
        )
        raise ValueError("\n".join([message, *log.list_notes()]))
    if image_check != "ignore":
        copies = find_copies(record.image for _, record in merged.values())
        log.count_copies(copies)
        for copy, first_key in copies.items():
            add(first_key, *merged.pop(copy))
    return list(merged.values())


def stream_records(
    sources: Sequence[str | Source], columns: dict[str, str], log: SkipLog, image_check: ImageCheck = "header"
) -> Iterator[SourcedRecord]:
    """Yield (source, record) for each record in several sources, in order. Do not merge records.

    The arguments are the same as for `read_merged_records`.
    """
    for name in sources:
        parsed = Source.parse(name)
        source = dataclasses.replace(parsed, columns={**parsed.columns, **columns})
        for record in open_records(source, log, image_check):
            yield source, record


def build_same_image_filter(records: Sequence[Record], candidates: Sequence[Record]) -> Callable[[Record], bool]:
    """Return a function that checks whether a candidate has the same image as one of the records.

    Image files with the same bytes are treated as the same image. All candidates must be passed in a single call, so
    that only files of the same size need to be compared.
    """
    copies = find_copies([record.image for record in [*records, *candidates]])

    def get_image_key(record: Record) -> str | None:
        return None if record.image is None else copies.get(record.image.key, record.image.key)

    keys = {get_image_key(record) for record in records} - {None}
    return lambda candidate: get_image_key(candidate) in keys


def _build_merge_key(source: Source, record: Record, number: int) -> Any:
    if record.image is not None and record.image.identifies_image:
        return record.image.key
    if record.id_from_source:
        return source.path, record.split, record.id
    return number  # nothing identifies the image, so the record is never merged


def _merge_records(first: Record, second: Record) -> Record:
    texts: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        texts[name] = tuple(deduplicate_captions([*getattr(first, name), *getattr(second, name)]))
    return dataclasses.replace(first, **texts)
