"""Which images are trained on, which are held out, and whose captions stage 1 may see."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llm2clip.config import EvaluateConfig, TuneConfig
from llm2clip.data.hashing import unique_captions
from llm2clip.data.pairs import ImageCaptions, Item, can_pair, pairable_items
from llm2clip.data.records import KINDS, Images, Record, Source, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.text_pairs import read_text_pairs
from llm2clip.distributed import print_once, process_state

TRAIN, HELD_OUT = {None, "none", "train", "training", "restval"}, ("val", "validation", "valid", "dev", "test")


@dataclass
class Data:
    """Records to train on; records held out, by the kind of their captions; and one line about both."""

    train: list[Record]
    held_out: dict[str, list[Record]]
    summary: str


def read_data(
    sources: Sequence[str], config: EvaluateConfig, columns: dict[str, str], log: SkipLog, images: Images = "header"
) -> Data:
    """Training and held-out records of some sources; an image that several rows or sources name is one record.

    A source with its splits named (PATH@train+none) is trained on as it is. Of any other, records of no split or of a
    training split are trained on; records of the split named val (or validation, valid, dev; else test) are held out.
    Where nothing is held out and `config.data` names no source, a tenth of the images, at most 1,000, is, chosen by a
    hash of the record, of the sources without named splits if there are some. `images` is as of `open_records`.
    """
    opened = read_records(sources, columns, log, images)
    train = [(s, r) for s, r in opened if s.splits or _split(r) in TRAIN]
    rest = [(s, r) for s, r in opened if not s.splits and _split(r) not in TRAIN]
    named = next((name for name in HELD_OUT if any(_split(r) == name for _, r in rest)), None)
    notes = []
    if config.data:
        held = read_records(config.data, columns, log, images)
        tested = {r.image.key for _, r in held if r.image is not None}
        kept = [(s, r) for s, r in train if r.image is None or r.image.key not in tested]
        if leaked := len(train) - len(kept):
            notes.append(f"{leaked:,} left out of training since they are tested on")
        train = kept
    elif named is not None:
        held = [(s, r) for s, r in rest if _split(r) == named]
        rest = [(s, r) for s, r in rest if _split(r) != named]
    else:
        drawn_from = [r for s, r in train if not s.splits] or [r for _, r in train]
        drawn = sorted((r for r in drawn_from if r.image is not None), key=_lot)
        chosen = {id(r) for r in drawn[: min(1000, max(1, len(drawn) // 10))]}
        held = [(s, r) for s, r in train if id(r) in chosen]
        train = [(s, r) for s, r in train if id(r) not in chosen]
    if rest:
        splits = ", ".join(sorted({str(r.split) for _, r in rest}))
        notes.append(f"{len(rest):,} of other splits ({splits}) unused")
    held = [(s, r) for s, r in held if r.image is not None]
    pictured = sum(r.image is not None for _, r in train)
    summary = ", ".join([f"{pictured:,} images to train on", f"{len(held):,} held out", *notes])
    return Data([r for _, r in train], _by_field(held, config.fields, columns), summary)


def read_records(
    sources: Sequence[str | Source], columns: dict[str, str], log: SkipLog, images: Images = "header"
) -> list[tuple[Source, Record]]:
    """The records of some sources and where each is from, one record an image: rows and sources that name the same
    image become one with all their captions, of the split and source that came first. Where a row names no image, rows
    of a source and split that give the same id do."""
    found: dict[Any, tuple[Source, Record]] = {}
    for n, (source, record) in enumerate(stream_records(sources, columns, log, images)):
        key: Any = (source.path, record.split, record.id) if record.named else n
        if record.image is not None and record.image.told:
            key = record.image.key
        if key in found:
            source, first = found[key]
            texts: dict[str, Any] = {
                kind: tuple(unique_captions([*getattr(first, kind), *getattr(record, kind)])) for kind in KINDS
            }
            record = dataclasses.replace(first, **texts)
        found[key] = source, record
    return list(found.values())


def stream_records(
    sources: Sequence[str | Source], columns: dict[str, str], log: SkipLog, images: Images = "header"
) -> Iterator[tuple[Source, Record]]:
    """The records of some sources as they come, and where each is from."""
    for name in sources:
        parsed = Source.parse(name)
        source = dataclasses.replace(parsed, columns={**parsed.columns, **columns})
        for record in open_records(source, log, images):
            yield source, record


def _by_field(
    held: Sequence[tuple[Source, Record]], names: Sequence[str], columns: dict[str, str]
) -> dict[str, list[Record]]:
    """Held-out records by the kind of their captions: captions, long_captions, and the columns named."""
    records = [r for _, r in held]
    fields = {"captions": [r for r in records if r.captions]}
    for kind in KINDS[1:]:
        if any(getattr(r, kind) for r in records):
            fields[kind] = [select_splits(r, getattr(r, kind)) for r in records]
    images = {r.image.key for r in records if r.image is not None}
    sources = [Source(path, splits) for path, splits in dict.fromkeys((s.path, s.splits) for s, _ in held)]
    for name in names:
        quiet = SkipLog(limit=1.0)  # a row without a caption in this language is no fault of the row
        of_name = read_records(
            sources, {**columns, **dict.fromkeys(KINDS, ""), "captions": name}, quiet, images="exists"
        )
        fields[name] = [r for _, r in of_name if r.image is not None and r.image.key in images]
    return fields


def select_splits(record: Record, captions: tuple[str, ...]) -> Record:
    """The record with these captions and no others."""
    return dataclasses.replace(record, captions=captions, short_captions=(), long_captions=())


def tuning_sources(
    train: Sequence[Record],
    held_out: Sequence[Record],
    config: TuneConfig,
    columns: dict[str, str],
    log: SkipLog,
    own: Sequence[str] = (),
) -> list[list[Item]]:
    """What stage 1 sees, source by source: the captions of images that it may see, then text pairs.

    The captions come source by source if the sources have weights, else all as one. Of a source without named splits
    they are those of its training rows.

    Args:
        train: records whose captions are tuned on, read already.
        held_out: records of images that must not be; in `own` they are known as images, in `config.data` by the
            comparable part of their ids. `config.exclude` bars images likewise, wherever they are.
        recipe: its sources come after `own`.
        columns: our field to the sources' column.
        log: where rows that cannot be used are listed.
        own: sources of which some is held out.

    Raises:
        ValueError: there is not a weight for each source, no image has two captions and there are no pairs, or a source
            has fewer pairs than a batch.
    """
    sources = [*own, *config.data]
    groups = [[s] for s in sources] if config.source_weights else [sources] if sources else []
    named = bool(train) + len(groups) + len(config.text_pairs)
    if config.source_weights and len(config.source_weights) != named:
        raise ValueError(
            f"{len(config.source_weights)} --tune.source_weights for {named} sources of captions and pairs; give one for each"
        )
    excluded = {_comparable(r.id) for _, r in stream_records(config.exclude, columns, log, "ignore")}
    barred = excluded | {_comparable(r.id) for r in held_out}
    tested = {r.image.key for r in held_out if r.image is not None}
    mine = {(source.path, source.splits) for source in map(Source.parse, own)}

    def may(source: Source, record: Record) -> bool:
        if not source.splits and _split(record) not in TRAIN:
            return False
        if (source.path, source.splits) not in mine:
            return _comparable(record.id) not in barred
        return _comparable(record.id) not in excluded and (record.image is None or record.image.key not in tested)

    read_here = [read_records(group, columns, log, "named") for group in groups]
    offered = [[r for source, r in some if may(source, r)] for some in read_here]
    if train:
        offered = [[r for r in train if _comparable(r.id) not in excluded], *offered]
    allowed: list[list[Item]] = [
        [ImageCaptions(r.captions + r.short_captions, r.long_captions) for r in records] for records in offered
    ]
    left = len(train) + sum(map(len, read_here)) - sum(map(len, allowed))
    if config.exclude and not left:
        print_once("--tune.exclude: none of its images is among those to tune on")
    if (
        config.steps
        and not config.text_pairs
        and not any(can_pair(c, config.lengths) for c in chain(*allowed) if isinstance(c, ImageCaptions))
    ):
        raise ValueError(
            "no image has two different captions, and tuning learns from such pairs. --tune.steps 0 leaves the LLM as "
            "it is; --tune.data takes captions from elsewhere; --encoder.path takes an LLM that was tuned before"
        )
    pairs: list[list[Item]] = [list(read_text_pairs(path, log)) for path in config.text_pairs]
    if config.steps:
        for items in [*allowed, *pairs]:
            pairable_items(items, config.batch_size * process_state().num_processes, config.lengths)
    counts = [f"the captions of {len(a):,} images" for a in allowed] + [f"{len(p):,} text pairs" for p in pairs]
    print_once(f"tuning on {' + '.join(counts)}" + (f"; {left:,} images left out" if left else ""))
    return [*allowed, *pairs]


def _comparable(name: str) -> str:
    """What of an id is the same in all sources of an image: the number that it begins with, else all of it."""
    if name.isdecimal():
        return name.lstrip("0") or "0"  # COCO's files are called 000000000139, its ids are 139
    found = re.match(r"\d{5,}", name)
    return found[0] if found else name


def _split(record: Record) -> str | None:
    return record.split.lower() if record.split else None


def _lot(record: Record) -> str:
    return hashlib.sha256("\0".join([record.id, *record.texts]).encode(errors="surrogatepass")).hexdigest()
