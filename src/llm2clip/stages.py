"""Each stage as its own verb, and what the verbs share: opening an encoder, building a model, beginning a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm2clip.cache.embed import embed
from llm2clip.cache.format import check_identity
from llm2clip.cache.ray_engine import embed_with_ray
from llm2clip.cache.store import EmbeddingStore, refused_captions
from llm2clip.data.records import KINDS, Record, Source
from llm2clip.data.skips import SkipLog
from llm2clip.data.split import read, read_data, stream, tuning_sources
from llm2clip.evaluate.model import validator
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.text import CaptionEncoder
from llm2clip.models.vision import VisionTower
from llm2clip.processes import processes, say
from llm2clip.recipes import AlignRecipe, EmbedRecipe, EncoderRecipe, EvaluateRecipe, TuneRecipe, keep
from llm2clip.train.align import align
from llm2clip.train.tune import tune


def tune_stage(
    data: Sequence[str],
    out: Path,
    encoder: EncoderRecipe,
    recipe: TuneRecipe,
    columns: dict[str, str],
    max_skipped: float,
) -> Path:
    """`llm2clip tune`: the folder of the tuned caption encoder, `out/encoder`. Of sources without named splits what a
    fit holds out is left out."""
    settings = {"data": list(data), "columns": columns, "encoder": encoder, "tune": recipe}
    done = out / "encoder"
    if done.exists():
        keep(settings, out / "recipe.yaml")  # are they those of the one that is there?
        return done
    log = begin(out, settings, max_skipped)
    processes().wait_for_everyone()  # all have looked before anyone is done
    if not (data or recipe.data or recipe.pairs):
        raise ValueError("name sources of captions, or of text pairs with --tune.pairs")
    held_out: list[Record] = []
    if any(not Source.parse(d).splits for d in data):  # what a fit holds out is not tuned on here either
        found = read_data(data, EvaluateRecipe(), columns, log, "named")
        held_out = [r for some in found.held_out.values() for r in some]
        if held_out:
            say(found.summary)
    items = tuning_sources([], held_out, recipe, columns, log, own=data)
    say(log.summary())
    return tune(items, open_encoder(encoder, recipe), recipe, out)


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
    records = stream(data, columns, log, "ignore")
    captions = (text for _, record in records for text in record.texts)
    store = fill(captions, partial(open_encoder, encoder), out, recipe)
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
    held_out: Sequence[str] = (),
    features: Path | None = None,
) -> Path:
    """`llm2clip align`: the trained model folder, `out/model`. Of sources without named splits what a fit holds out is
    left out. The captions of `held_out` must be in the store, too."""
    settings = {"data": list(data), "held_out": list(held_out), "columns": columns, "store": store_folder}
    settings |= {"encoder": encoder, "align": recipe}
    log = begin(out, settings, max_skipped)
    folder = out / "model"
    if folder.exists():
        return folder
    store = EmbeddingStore(store_folder)
    if processes().is_main_process:
        store.verify(progress=True)
        identity = store.manifest["identity"]
        check_identity(identity, open_encoder(encoder).identity(identity["precision"]), store_folder)
    processes().wait_for_everyone()
    if held_out or any(not Source.parse(d).splits for d in data):  # what a fit holds out is not trained on here either
        found = read_data(data, EvaluateRecipe(data=list(held_out)), columns, log)
        records, tested = found.train, found.held_out if held_out else {}
        say(found.summary)
    else:
        records, tested = [r for _, r in read(data, columns, log)], {}
    say(log.summary())
    fields = {name: readable(some, store) for name, some in tested.items()}
    validate = validator(fields, log, store) if fields else None
    model = align(readable(records, store), store, new_model(recipe, store), recipe, out, log, validate, features)
    if processes().is_main_process:
        model.save_pretrained(folder, encoder=open_encoder(encoder))
    return folder


# ---- what the stages share ------------------------------------------------------------------------------------------


def fill(
    captions: Iterable[str], opening: Callable[[], CaptionEncoder], out: Path, recipe: EmbedRecipe
) -> EmbeddingStore:
    """The store at `out` with all captions, by the recipe's engine."""
    options = dataclasses.asdict(recipe)
    engine, workers = options.pop("engine"), options.pop("workers")
    if engine == "ray":
        return embed_with_ray(captions, opening, out, workers=workers, **options)
    return embed(captions, opening(), out, **options)


def readable(records: Sequence[Record], store: EmbeddingStore) -> list[Record]:
    """Records without the captions that the tokenizer refused, which the store therefore lacks."""
    if not (refused := refused_captions(store.folder)):
        return list(records)

    def left(captions: Sequence[str]) -> tuple[str, ...]:
        return tuple(c for c in captions if c not in refused)

    def without(record: Record) -> Record:
        texts: dict[str, Any] = {kind: left(getattr(record, kind)) for kind in KINDS}
        return dataclasses.replace(record, **texts)

    return [r for r in map(without, records) if r.texts]


def open_encoder(recipe: EncoderRecipe, tuning: TuneRecipe | None = None) -> CaptionEncoder:
    """The caption encoder of a recipe; on the CPU if tuning is to make it small for the device."""
    device = "cpu" if tuning is not None and tuning.quantize else None
    return CaptionEncoder.from_pretrained(**dataclasses.asdict(recipe), device=device)


def new_model(recipe: AlignRecipe, store: EmbeddingStore) -> LLM2CLIP:
    """A model to be trained: its tower pretrained, its heads drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    tower = VisionTower.from_pretrained(recipe.tower, image_size=recipe.image_size, pretrained=recipe.pretrained)
    tower.freeze_norm = recipe.pretrained  # else there is nothing in the norms to be kept
    config = LLM2CLIPConfig.of_recipe(recipe, tower.config, store.width, store.manifest["identity"])
    return LLM2CLIP(config, tower).to(processes().device)


def begin(out: Path, settings: dict[str, Any], max_skipped: float) -> SkipLog:
    """Keep the settings of a run in its folder, or refuse others; the log of what it skips."""
    main = processes().is_main_process
    if main:
        keep(settings, out / "recipe.yaml")
    return SkipLog(out / "skipped.jsonl" if main else None, max_skipped)
