"""Each stage as its own verb, and what the stages share: reading data, opening models, saying where things are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from llm2clip.cache.embed import embed
from llm2clip.cache.store import EmbeddingStore, check_identity
from llm2clip.data.captions import unique
from llm2clip.data.records import Record, Source, open_records
from llm2clip.data.skips import SkipLog
from llm2clip.evaluate.captions import caption_accuracy
from llm2clip.evaluate.model import evaluate_model
from llm2clip.evaluate.report import KS, table
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.text import CaptionEncoder
from llm2clip.models.vision import VisionTower
from llm2clip.processes import processes
from llm2clip.quickstart.assets import resolve
from llm2clip.recipes import AlignRecipe, EmbedRecipe, EncoderRecipe, EvaluateRecipe, TuneRecipe, keep
from llm2clip.train.align import align
from llm2clip.train.tune import tune

TRAIN, HELD_OUT = {None, "none", "train", "training", "restval"}, ("val", "validation", "valid", "dev", "test")


def tune_stage(
    data: Sequence[str],
    out: Path,
    encoder: EncoderRecipe,
    recipe: TuneRecipe,
    columns: dict[str, str],
    max_skipped: float,
) -> Path:
    """`llm2clip tune`: the folder of the tuned caption encoder, `out/encoder`."""
    settings = {"data": list(data), "columns": columns, "encoder": encoder, "tune": recipe}
    log = _begin(out, settings, max_skipped)
    sources = dataclasses.replace(recipe, data=[*data, *recipe.data])
    texts = tuning_captions(Data([], {}, ""), sources, columns, log)
    say(log.summary())
    return tune(texts, open_encoder(encoder), recipe, out)


def embed_stage(
    data: Sequence[str],
    out: Path,
    encoder: EncoderRecipe,
    recipe: EmbedRecipe,
    columns: dict[str, str],
    max_skipped: float,
) -> EmbeddingStore:
    """`llm2clip embed`: the store at `out`; captions that it holds already are kept."""
    log = SkipLog(out / "skipped.jsonl" if processes().is_main_process else None, max_skipped)
    records = (r for s in data for r in open_records(_mapped(s, columns), log, "ignore"))
    store = embed((t for r in records for t in r.texts), open_encoder(encoder), out, **dataclasses.asdict(recipe))
    say(log.summary())
    return store


def align_stage(
    data: Sequence[str],
    store_folder: Path,
    out: Path,
    encoder: EncoderRecipe,
    recipe: AlignRecipe,
    columns: dict[str, str],
    max_skipped: float,
) -> Path:
    """`llm2clip align`: the trained model folder, `out/model`."""
    settings = {"data": list(data), "columns": columns, "store": store_folder, "encoder": encoder, "align": recipe}
    log = _begin(out, settings, max_skipped)
    folder = out / "model"
    if folder.exists():
        return folder
    store = EmbeddingStore(store_folder)
    text = open_encoder(encoder)
    check_identity(store.manifest["identity"], text.identity(store.manifest["identity"]["precision"]), store_folder)
    records = _merged(r for s in data for r in open_records(_mapped(s, columns), log))
    say(log.summary())
    text.to("cpu")  # only its folder is wanted from here on
    model = align(records, store, new_model(recipe, store), recipe, out, log)
    if processes().is_main_process:
        model.save_pretrained(folder, encoder=text)
    return folder


def evaluate_stage(
    model: str | None,
    captions: Sequence[str],
    out: Path | None,
    encoder: EncoderRecipe,
    recipe: EvaluateRecipe,
    columns: dict[str, str],
    max_skipped: float,
) -> dict[str, Any]:
    """`llm2clip evaluate`: prints tables and, with `out`, writes out/results.json. The main process does the work.

    Raises:
        ValueError: there is nothing to evaluate.
    """
    if not captions and not (model and recipe.data):
        raise ValueError("name a model folder and --evaluate.data, or --captions and --encoder.path")
    if not processes().is_main_process:
        return {}
    results: dict[str, Any] = {}
    log = SkipLog(None, max_skipped)
    if captions:
        texts = [r.captions for s in captions for r in open_records(_mapped(s, columns), log, "ignore")]
        text = LLM2CLIP.from_pretrained(model).encoder if model else open_encoder(encoder)
        results["captions"] = figures = caption_accuracy(texts, text)
        say(table(["CRA top-1, %", "images", "chance"], [[figures["CRA"], figures["images"], figures["chance"]]]))
    if model and recipe.data:
        records = read_data([], recipe, columns, log)
        rows = evaluate_model(LLM2CLIP.from_pretrained(model), records.held_out, log, batch=recipe.batch)
        results["retrieval"] = rows
        shown = [[r["captions"], r["images"], r["texts"], *(r[d][k] for d in ("I2T", "T2I") for k in KS)] for r in rows]
        say(table(["captions", "images", "texts", *(f"{d} {k}" for d in ("I2T", "T2I") for k in KS)], shown))
    say(log.summary())
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


# ---- what the stages share ------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Records to train on; records held out, by the kind of their captions; and one line about both."""

    train: list[Record]
    held_out: dict[str, list[Record]]
    summary: str


def say(*lines: str) -> None:
    """Print once in a distributed run."""
    if processes().is_main_process:
        print(*lines, sep="\n", flush=True)


def once(file: Path, measure: Callable[[], Any]) -> Any:
    """The JSON in `file`, made by the main process if it is not there yet."""
    state = processes()
    if state.is_main_process and not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        tmp = file.with_suffix(".tmp")
        tmp.write_text(json.dumps(measure(), indent=1))
        tmp.replace(file)
    state.wait_for_everyone()
    return json.loads(file.read_text())


def open_encoder(recipe: EncoderRecipe) -> CaptionEncoder:
    """The caption encoder of a recipe, fetched first if it goes by one of our names."""
    options = dataclasses.asdict(recipe)
    return CaptionEncoder.from_pretrained(resolve(options.pop("path")), **options)


def new_model(recipe: AlignRecipe, store: EmbeddingStore) -> LLM2CLIP:
    """A model to be trained: its tower pretrained, its heads drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    tower = VisionTower.from_pretrained(
        resolve(recipe.tower), image_size=recipe.image_size, pretrained=recipe.pretrained
    )
    config = LLM2CLIPConfig(
        tower=tower.config,
        text_width=store.width,
        width=recipe.width,
        adapter_depth=recipe.adapter_depth,
        adapter_expansion=recipe.adapter_expansion,
        normalize_input=recipe.normalize_input,
        encoder=store.manifest["identity"],
    )
    return LLM2CLIP(config, tower).to(processes().device)


def read_data(sources: Sequence[str], recipe: EvaluateRecipe, columns: dict[str, str], log: SkipLog) -> Data:
    """Training and held-out records of some sources.

    A source with its splits named (PATH@train+none) is trained on as it is. Of any other, records of no split or of a
    training split are trained on; records of the split named val (or validation, valid, dev; else test) are held out.
    Where nothing is held out and `recipe.data` names no source, a tenth of the images, at most 1,000, is, chosen by a
    hash of the id.
    """
    train: list[Record] = []
    leaked: list[Record] = []
    rest: list[tuple[Source, Record]] = []
    for source in (_mapped(s, columns) for s in sources):
        for record in _merged(open_records(source, log)):
            if source.splits or record.split in TRAIN:
                train.append(record)
            else:
                rest.append((source, record))
    held: list[tuple[Source, Record]] = []
    if recipe.data:
        held = [(s, r) for s in (_mapped(d, columns) for d in recipe.data) for r in _merged(open_records(s, log))]
        tested = {str(r.image) for _, r in held}
        leaked = [r for r in train if r.image is not None and str(r.image) in tested]
        train = [r for r in train if r.image is None or str(r.image) not in tested]
    else:
        for name in HELD_OUT:
            if found := [(s, r) for s, r in rest if r.split == name]:
                held, rest = found, [(s, r) for s, r in rest if r.split != name]
                break
        else:
            with_image = sorted((r for r in train if r.image is not None), key=lambda r: _hash(r.id))
            chosen = {id(r) for r in with_image[: min(1000, max(1, len(with_image) // 10))]}
            held = [(_mapped(sources[0], columns), r) for r in train if id(r) in chosen]
            train = [r for r in train if id(r) not in chosen]
    pictured = [r for _, r in held if r.image is not None]
    fields = {"captions": [r for r in pictured if r.captions]}
    if any(r.long_captions for r in pictured):
        fields["long_captions"] = [dataclasses.replace(r, captions=r.long_captions, long_captions=()) for r in pictured]
    ids = {str(r.image) for r in pictured}
    for name in recipe.fields:
        of_field: list[Record] = []
        for path, splits in dict.fromkeys((s.path, s.splits) for s, _ in held):
            mapped = Source(path, splits, columns={**columns, "captions": name, "long_captions": ""})
            quiet = SkipLog(limit=1.0)  # a row without a caption in this language is no fault of the row
            of_field += [r for r in _merged(open_records(mapped, quiet, images="exists")) if str(r.image) in ids]
        fields[name] = of_field
    unused = f", {len(rest):,} of other splits unused" if rest and not recipe.data else ""
    unused += f", {len(leaked):,} left out of training since they are tested on" if leaked else ""
    images = sum(r.image is not None for r in train)
    return Data(train, fields, f"{images:,} images to train on, {len(pictured):,} held out{unused}")


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
        for r in open_records(_mapped(s, columns), log, "ignore")
    }
    offered = [data.train]
    if recipe.data:
        opened = [open_records(_mapped(s, columns), log, "ignore") for s in recipe.data]
        offered = [_merged(o) for o in (opened if recipe.weights else [chain(*opened)])]
        barred |= {_comparable(r.id, recipe.exclude_id) for f in data.held_out.values() for r in f}
    allowed = [
        [r.texts for r in records if not barred or _comparable(r.id, recipe.exclude_id) not in barred]
        for records in offered
    ]
    left = sum(map(len, offered)) - sum(map(len, allowed))
    counts = " + ".join(f"{len(a):,}" for a in allowed)
    say(f"tuning on the captions of {counts} images" + (f"; {left:,} excluded" if left else ""))
    return allowed


def _merged(records: Iterable[Record]) -> list[Record]:
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


def _mapped(source: str, columns: dict[str, str]) -> Source:
    parsed = Source.parse(source)
    return dataclasses.replace(parsed, columns={**parsed.columns, **columns})


def _comparable(name: str, pattern: str) -> str:
    found = re.search(pattern, name)
    return found[0] if found else name


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _begin(out: Path, settings: dict[str, Any], max_skipped: float) -> SkipLog:
    main = processes().is_main_process
    if main:
        keep(settings, out / "recipe.yaml")
    return SkipLog(out / "skipped.jsonl" if main else None, max_skipped)
