"""Which images are trained on, which are held out, and whose captions stage 1 may see."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from llm2clip.data.captions import unique
from llm2clip.data.records import Record, Source, open_records
from llm2clip.data.skips import SkipLog
from llm2clip.processes import say
from llm2clip.recipes import EvaluateRecipe, TuneRecipe

TRAIN, HELD_OUT = {None, "none", "train", "training", "restval"}, ("val", "validation", "valid", "dev", "test")


@dataclass
class Data:
    """Records to train on; records held out, by the kind of their captions; and one line about both."""

    train: list[Record]
    held_out: dict[str, list[Record]]
    summary: str


def read_data(sources: Sequence[str], recipe: EvaluateRecipe, columns: dict[str, str], log: SkipLog) -> Data:
    """Training and held-out records of some sources.

    A source with its splits named (PATH@train+none) is trained on as it is. Of any other, records of no split or of a
    training split are trained on; records of the split named val (or validation, valid, dev; else test) are held out.
    Where nothing is held out and `recipe.data` names no source, a tenth of the images, at most 1,000, is, chosen by a
    hash of the id.
    """
    opened = [(s, r) for s in (mapped(s, columns) for s in sources) for r in merged(open_records(s, log))]
    train = [(s, r) for s, r in opened if s.splits or r.split in TRAIN]
    rest = [(s, r) for s, r in opened if not s.splits and r.split not in TRAIN]
    named = next((name for name in HELD_OUT if any(r.split == name for _, r in rest)), None)
    note = ""
    if recipe.data:
        held = [(s, r) for s in (mapped(d, columns) for d in recipe.data) for r in merged(open_records(s, log))]
        tested = {str(r.image) for _, r in held if r.image is not None}
        kept = [(s, r) for s, r in train if str(r.image) not in tested]
        if leaked := len(train) - len(kept):
            note = f", {leaked:,} left out of training since they are tested on"
        train = kept
    elif named is not None:
        held = [(s, r) for s, r in rest if r.split == named]
        if unused := len(rest) - len(held):
            note = f", {unused:,} of other splits unused"
    else:
        pictured = sorted((r for _, r in train if r.image is not None), key=lambda r: _hash(r.id))
        chosen = {id(r) for r in pictured[: min(1000, max(1, len(pictured) // 10))]}
        held = [(s, r) for s, r in train if id(r) in chosen]
        train = [(s, r) for s, r in train if id(r) not in chosen]
    held = [(s, r) for s, r in held if r.image is not None]
    images = sum(r.image is not None for _, r in train)
    summary = f"{images:,} images to train on, {len(held):,} held out{note}"
    return Data([r for _, r in train], _by_field(held, recipe.fields, columns), summary)


def _by_field(
    held: Sequence[tuple[Source, Record]], names: Sequence[str], columns: dict[str, str]
) -> dict[str, list[Record]]:
    """Held-out records by the kind of their captions: captions, long_captions, and the columns named."""
    records = [r for _, r in held]
    fields = {"captions": [r for r in records if r.captions]}
    if any(r.long_captions for r in records):
        fields["long_captions"] = [dataclasses.replace(r, captions=r.long_captions, long_captions=()) for r in records]
    images = {str(r.image) for r in records}
    for name in names:
        of_name: list[Record] = []
        for path, splits in dict.fromkeys((s.path, s.splits) for s, _ in held):
            source = Source(path, splits, columns={**columns, "captions": name, "long_captions": ""})
            quiet = SkipLog(limit=1.0)  # a row without a caption in this language is no fault of the row
            of_name += [r for r in merged(open_records(source, quiet, images="exists")) if str(r.image) in images]
        fields[name] = of_name
    return fields


def tuning_captions(
    data: Data, recipe: TuneRecipe, columns: dict[str, str], log: SkipLog
) -> list[list[tuple[str, ...]]]:
    """The captions of each image that stage 1 may see: `recipe.data`'s or else the training data's, without those of
    images that are held out (in other sources too, by the comparable part of their ids) or excluded.

    They come source by source if the sources have weights, else all as one.

    Raises:
        ValueError: there is not a weight for each source.
    """
    if recipe.weights and len(recipe.weights) != len(recipe.data):
        raise ValueError(
            f"{len(recipe.weights)} --tune.weights for {len(recipe.data)} sources of captions; give one for each"
        )
    barred = {
        _comparable(r.id, recipe.exclude_id)
        for s in recipe.exclude
        for r in open_records(mapped(s, columns), log, "ignore")
    }
    offered = [data.train]
    if recipe.data:
        opened = [open_records(mapped(s, columns), log, "ignore") for s in recipe.data]
        offered = [merged(o) for o in (opened if recipe.weights else [chain(*opened)])]
        barred |= {_comparable(r.id, recipe.exclude_id) for f in data.held_out.values() for r in f}
    allowed = [
        [r.texts for r in records if not barred or _comparable(r.id, recipe.exclude_id) not in barred]
        for records in offered
    ]
    left = sum(map(len, offered)) - sum(map(len, allowed))
    counts = " + ".join(f"{len(a):,}" for a in allowed)
    say(f"tuning on the captions of {counts} images" + (f"; {left:,} excluded" if left else ""))
    return allowed


def merged(records: Iterable[Record]) -> list[Record]:
    """One record an image: rows that name the same image, one caption each, become one with all their captions."""
    found: dict[Any, Record] = {}
    for n, record in enumerate(records):
        key = (str(record.image), record.split) if record.image is not None else n
        if key in found:
            first = found[key]
            record = dataclasses.replace(
                first,
                captions=tuple(unique([*first.captions, *record.captions])),
                long_captions=tuple(unique([*first.long_captions, *record.long_captions])),
            )
        found[key] = record
    return list(found.values())


def mapped(source: str, columns: dict[str, str]) -> Source:
    parsed = Source.parse(source)
    return dataclasses.replace(parsed, columns={**parsed.columns, **columns})


def _comparable(name: str, pattern: str) -> str:
    found = re.search(pattern, name)
    return found[0] if found else name


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
