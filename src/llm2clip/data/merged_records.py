"""Readers for several sources, which either merge the records of each image or stream all records."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llm2clip.data.columns import TEXT_FIELDS
from llm2clip.data.image_hashes import find_copies
from llm2clip.data.records import ImageCheck, Record, Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.texts import unique_captions

SourcedRecord = tuple[Source, Record]


def read_merged_records(
    sources: Sequence[str | Source], columns: dict[str, str], log: SkipLog, image_check: ImageCheck = "header"
) -> list[SourcedRecord]:
    """Read all records from several sources and merge records that have the same image.

    Rows with the same image are merged into one record with all their distinct captions, even across sources. The
    merged record keeps the id, split and source of the first row. Image files with the same bytes count as the same
    image; see `find_copies`. Rows without an image are merged if they have the same id, source path and split.

    Args:
        sources: Paths or `Source` objects.
        columns: Column mapping that is added to each source's own mapping.
        log: Log in which to record skipped rows and count copies of images.
        image_check: How to check images; see `open_records`. If "ignore", the bytes of image files are not compared.

    Returns:
        A list of (source, record) pairs, one for each image, in order of first appearance.

    Raises:
        ValueError: Images are checked, but no record has one. See `open_records` for other errors.
    """
    merged: dict[Any, SourcedRecord] = {}
    for number, (source, record) in enumerate(stream_records(sources, columns, log, image_check)):
        key = _merge_key(source, record, number)
        if key in merged:
            first_source, first = merged[key]
            merged[key] = first_source, _merge(first, record)
        else:
            merged[key] = source, record
    if image_check in ("header", "exists") and merged and not any(record.image for _, record in merged.values()):
        names = ", ".join(str(source) for source in sources)
        message = (
            f"{names}: none of the {len(merged):,} records has an image. Only `tune` and `embed` accept texts alone"
        )
        raise ValueError("\n".join([message, *log.list_notes()]))
    if image_check != "ignore":
        copies = find_copies(record.image for _, record in merged.values())
        log.count_copies(copies)
        for copy, first_key in copies.items():
            _, record = merged.pop(copy)
            first_source, first = merged[first_key]
            merged[first_key] = first_source, _merge(first, record)
    return list(merged.values())


def stream_records(
    sources: Sequence[str | Source], columns: dict[str, str], log: SkipLog, image_check: ImageCheck = "header"
) -> Iterator[SourcedRecord]:
    """Yield (source, record) for each record in several sources, in order. Records are not merged.

    Takes the same arguments as `read_merged_records`.
    """
    for name in sources:
        parsed = Source.parse(name)
        source = dataclasses.replace(parsed, columns={**parsed.columns, **columns})
        for record in open_records(source, log, image_check):
            yield source, record


def same_image_filter(records: Sequence[Record], candidates: Sequence[Record]) -> Callable[[Record], bool]:
    """Return a function that returns True if a candidate has the same image as one of the records.

    Image files with the same bytes count as the same image. All candidates must be known in advance, so that only files
    of the same size are compared.
    """
    copies = find_copies([record.image for record in [*records, *candidates]])

    def image_key(record: Record) -> str | None:
        return None if record.image is None else copies.get(record.image.key, record.image.key)

    keys = {image_key(record) for record in records} - {None}
    return lambda candidate: image_key(candidate) in keys


def _merge_key(source: Source, record: Record, number: int) -> Any:
    if record.image is not None and record.image.identifies_image:
        return record.image.key
    if record.id_from_source:
        return source.path, record.split, record.id
    return number  # nothing identifies the image, so the record is never merged


def _merge(first: Record, second: Record) -> Record:
    texts: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        texts[name] = tuple(unique_captions([*getattr(first, name), *getattr(second, name)]))
    return dataclasses.replace(first, **texts)
