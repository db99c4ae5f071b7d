"""Each stage as its own verb, and what the verbs share: opening an encoder, building a model, beginning a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, EvaluateConfig, TuneConfig
from llm2clip.data.merged_records import read_merged_records, stream_records
from llm2clip.data.records import CAPTION_FIELDS, Record, Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits
from llm2clip.data.tuning_sources import read_tuning_sources
from llm2clip.distributed import print_once, process_state
from llm2clip.evaluate.retrieval_eval import make_validator
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.run_config import save_or_check_config
from llm2clip.store.encode import embed
from llm2clip.store.layout import check_identity
from llm2clip.store.ray_engine import embed_with_ray
from llm2clip.store.store import EmbeddingStore, refused_captions
from llm2clip.train.align import align
from llm2clip.train.tune import tune


def tune_stage(
    data: Sequence[str],
    out: Path,
    encoder: EncoderConfig,
    recipe: TuneConfig,
    columns: dict[str, str],
    max_skipped: float,
) -> Path:
    """`llm2clip tune`: the folder of the tuned caption encoder, `out/encoder`. Of sources without named splits what a
    fit holds out is left out."""
    settings = {"data": list(data), "columns": columns, "encoder": encoder, "tune": recipe}
    done = out / "encoder"
    if done.exists():
        save_or_check_config(settings, out / "recipe.yaml")  # are they those of the one that is there?
        return done
    log = begin(out, settings, max_skipped)
    process_state().wait_for_everyone()  # all have looked before anyone is done
    if not (data or recipe.data or recipe.pairs):
        raise ValueError("name sources of captions, or of text pairs with --tune.text_pairs")
    held_out: list[Record] = []
    if any(not Source.parse(d).splits for d in data):  # what a fit holds out is not tuned on here either
        found = read_splits(data, EvaluateConfig(), columns, log, "unchecked")
        held_out = [r for some in found.held_out.values() for r in some]
        if held_out:
            print_once(found.summary)
    items = read_tuning_sources([], held_out, recipe, columns, log, training_sources=data)
    print_once(log.summary())
    return tune(items, open_encoder(encoder, recipe), recipe, out)


def embed_stage(
    data: Sequence[str],
    out: Path,
    encoder: EncoderConfig,
    recipe: EmbedConfig,
    columns: dict[str, str],
    max_skipped: float,
) -> EmbeddingStore:
    """`llm2clip embed`: the store at `out`; captions that it holds already are kept."""
    log = SkipLog(out / "skipped.jsonl" if process_state().is_main_process else None, max_skipped)
    records = stream_records(data, columns, log, "ignore")
    captions = (text for _, record in records for text in record.texts)
    store = fill(captions, partial(open_encoder, encoder), out, recipe)
    print_once(log.summary())
    return store


def align_stage(
    data: Sequence[str],
    store_folder: Path,
    out: Path,
    encoder: EncoderConfig,
    recipe: AlignConfig,
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
    if process_state().is_main_process:
        store.verify(progress=True)
        identity = store.manifest["identity"]
        check_identity(identity, open_encoder(encoder).identity(identity["precision"]), store_folder)
    process_state().wait_for_everyone()
    if held_out or any(not Source.parse(d).splits for d in data):  # what a fit holds out is not trained on here either
        found = read_splits(data, EvaluateConfig(data=list(held_out)), columns, log)
        records, tested = found.train, found.held_out if held_out else {}
        print_once(found.summary)
    else:
        records, tested = [r for _, r in read_merged_records(data, columns, log)], {}
    print_once(log.summary())
    fields = {name: readable(some, store) for name, some in tested.items()}
    validate = make_validator(fields, log, store) if fields else None
    model = align(readable(records, store), store, new_model(recipe, store), recipe, out, log, validate, features)
    if process_state().is_main_process:
        model.save_pretrained(folder, encoder=open_encoder(encoder))
    return folder


# ---- what the stages share ------------------------------------------------------------------------------------------


def fill(
    captions: Iterable[str], opening: Callable[[], CaptionEncoder], out: Path, recipe: EmbedConfig
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
        texts: dict[str, Any] = {kind: left(getattr(record, kind)) for kind in CAPTION_FIELDS}
        return dataclasses.replace(record, **texts)

    return [r for r in map(without, records) if r.texts]


def open_encoder(recipe: EncoderConfig, tuning: TuneConfig | None = None) -> CaptionEncoder:
    """The caption encoder of a recipe; on the CPU if tuning is to make it small for the device."""
    device = "cpu" if tuning is not None and tuning.quantize else None
    return CaptionEncoder.from_pretrained(**dataclasses.asdict(recipe), device=device)


def new_model(recipe: AlignConfig, store: EmbeddingStore) -> LLM2CLIP:
    """A model to be trained: its tower pretrained, its heads drawn from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    tower = VisionTower.from_pretrained(recipe.tower, image_size=recipe.image_size, pretrained=recipe.pretrained)
    tower.freeze_norm = recipe.pretrained  # else there is nothing in the norms to be kept
    config = LLM2CLIPConfig.from_config(recipe, tower.config, store.width, store.manifest["identity"])
    return LLM2CLIP(config, tower).to(process_state().device)


def begin(out: Path, settings: dict[str, Any], max_skipped: float) -> SkipLog:
    """Keep the settings of a run in its folder, or refuse others; the log of what it skips."""
    main = process_state().is_main_process
    if main:
        save_or_check_config(settings, out / "recipe.yaml")
    return SkipLog(out / "skipped.jsonl" if main else None, max_skipped)
