"""`llm2clip fit` and its stages `tune`, `embed`, `align`; `plan`; and `store`, between the stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from llm2clip.cli.commands import (
    DATA_HELP,
    Commands,
    add_machine_arguments,
    add_reading_arguments,
    machine_from_args,
    select,
)
from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig

if TYPE_CHECKING:
    from llm2clip.store.store import EmbeddingStore


def add(commands: Commands) -> None:
    """The verbs of this file."""
    sub = commands.add("fit", _fit, "The whole path: tune, embed, align, evaluate; resumable.")
    sub.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    sub.add_argument("--out", type=str, required=True, help="run folder")
    add_reading_arguments(sub)
    _stages(sub)
    sub.add_class_arguments(EvaluateConfig, "evaluate")

    sub = commands.add("tune", _tune, "Stage 1: teach the language model to tell captions apart.")
    about = "sources of captions, images not needed; without splits, what a fit holds out is left out"
    sub.add_argument("data", nargs="*", type=str, default=[], help=about)
    sub.add_argument("--out", type=str, required=True, help="folder; OUT/encoder is the result")
    add_reading_arguments(sub)
    sub.add_class_arguments(EncoderConfig, "encoder")
    sub.add_class_arguments(TuneConfig, "tune")

    sub = commands.add("embed", _embed, "Encode every caption of DATA once into a store.")
    sub.add_argument("data", nargs="+", type=str, help="sources of captions; images are not needed")
    sub.add_argument("--out", type=str, required=True, help="store folder")
    add_reading_arguments(sub)
    sub.add_class_arguments(EncoderConfig, "encoder")
    sub.add_class_arguments(EmbedConfig, "embed")

    sub = commands.add("align", _align, "Stage 2: train a vision tower against a store.")
    sub.add_argument("data", nargs="+", type=str, help=f"{DATA_HELP}; without, what a fit holds out is left out")
    sub.add_argument("--store", type=str, required=True, help="store of DATA's captions, made by `embed`")
    sub.add_argument("--held_out", nargs="+", type=str, help="sources to evaluate on while training")
    sub.add_argument(
        "--features", type=str, help="store of the frozen tower's features, for several runs; OUT/features"
    )
    sub.add_argument("--out", type=str, required=True, help="run folder; OUT/model is the result")
    add_reading_arguments(sub)
    sub.add_class_arguments(EncoderConfig, "encoder")
    sub.add_class_arguments(AlignConfig, "align")

    sub = commands.add(
        "plan", _plan, "What a fit would take: parameters, FLOP, memory and hours; nothing is fetched or run."
    )
    sub.add_argument("--images", type=int, required=True, help="images to train on")
    sub.add_argument("--captions_per_image", type=float, default=2.0, help="captions of each, on average")
    sub.add_argument("--tokens_per_caption", type=float, default=84.0, help="with the template's, on average")
    add_machine_arguments(sub)
    _stages(sub)

    store = commands.group("store", "Look after stores of embedded captions, and bring them to and from other forms.")
    store.add("verify", _verify, "Read everything and compare checksums.").add_argument("folder", type=str)
    store.add("repair", _repair, "Drop damaged shards; `embed` encodes what they held again.").add_argument(
        "folder", type=str
    )
    some = store.add("merge", _merge, "Put stores of several machines together.")
    some.add_argument("folders", nargs="+", type=str)
    some.add_argument("--out", type=str, required=True, help="store folder")
    some = store.add("export", _export, "To a parquet file, or to tars as the official LLM2CLIP code reads them.")
    some.add_argument("folder", type=str)
    some.add_argument("--parquet", type=str, help="file to write")
    some.add_argument("--tars", nargs="+", type=str, help="tars of samples; X_text_embeddings.tar appears beside X.tar")
    some = store.add("import", _import_, "From a parquet file, or from the tars of the official LLM2CLIP code.")
    some.add_argument("--parquet", type=str, help="file with columns embedding, and key or caption")
    some.add_argument("--tars", nargs="+", type=str, help="tars of samples, X_text_embeddings.tar beside X.tar")
    some.add_argument("--out", type=str, required=True, help="store folder")
    some.add_argument("--precision", type=str, default="fp32", help="in which the vectors were computed")
    some.add_class_arguments(EncoderConfig, "encoder")


def _stages(parser: ArgumentParser) -> None:
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(TuneConfig, "tune")
    parser.add_class_arguments(EmbedConfig, "embed")
    parser.add_class_arguments(AlignConfig, "align")


def _fit(given: Namespace) -> list[str]:
    from llm2clip.fit import fit

    settings = {f.name: given[f.name] for f in dataclasses.fields(FitConfig)}
    model = fit(given.data, Path(given.out), FitConfig(**settings))
    return [f"Next:   llm2clip evaluate {model} DATA"]


def _tune(given: Namespace) -> list[str]:
    from llm2clip.pipeline import tune_stage

    out = Path(given.out)
    encoder = tune_stage(given.data or [], out, given.encoder, given.tune, given.columns, given.max_skipped)
    return [f"Caption encoder: {encoder}", f"Next: llm2clip embed DATA --encoder.path {encoder} --out STORE"]


def _embed(given: Namespace) -> list[str]:
    from llm2clip.pipeline import embed_stage

    out = Path(given.out)
    store = embed_stage(given.data, out, given.encoder, given.embed, given.columns, given.max_skipped)
    same = [  # the encoder's settings are a part of what the store is of
        f"--encoder.{name} {json.dumps(value) if isinstance(value, bool | str) and name != 'path' else value}"
        for name, value in vars(given.encoder).items()
        if value != getattr(EncoderConfig(), name) or name == "path"
    ]
    return [
        f"Store: {out} ({len(store):,} captions)",
        f"Next: llm2clip align DATA --store {out} {' '.join(same)} --out RUN",
    ]


def _align(given: Namespace) -> list[str]:
    from llm2clip.pipeline import align_stage

    store, out = Path(given.store), Path(given.out)
    held_out, features = given.held_out or [], Path(given.features) if given.features else None
    model = align_stage(
        given.data, store, out, given.encoder, given.align, given.columns, given.max_skipped, held_out, features
    )
    return [f"Model: {model}", f"Next: llm2clip evaluate {model} DATA"]


def _plan(given: Namespace) -> list[str]:
    from llm2clip.tools.plan.plan import plan_fit
    from llm2clip.tools.plan.report import format_plan

    config = FitConfig(**select(given, "encoder", "tune", "embed", "align"))
    asked = select(given, "images", "captions_per_image", "tokens_per_caption")
    return format_plan(plan_fit(config, machine_from_args(given), **asked)).splitlines()


def _verify(given: Namespace) -> list[str]:
    from llm2clip.store.store import EmbeddingStore

    store = EmbeddingStore(given.folder)
    store.verify(progress=True)
    return [f"{given.folder}: {len(store):,} captions in {len(store.shards)} shards, all as they were written"]


def _repair(given: Namespace) -> list[str]:
    from llm2clip.store.maintenance import repair_store
    from llm2clip.store.store import EmbeddingStore

    dropped = repair_store(given.folder, progress=True)
    left = f"{len(EmbeddingStore(given.folder)):,} captions are left; `llm2clip embed` encodes the others again"
    return [f"dropped: {', '.join(dropped) or 'nothing'}", left]


def _merge(given: Namespace) -> list[str]:
    from llm2clip.store.maintenance import merge_stores

    return _filled(given.out, merge_stores(given.out, given.folders))


def _export(given: Namespace) -> list[str]:
    from llm2clip.store.import_export import to_official, to_parquet
    from llm2clip.store.store import EmbeddingStore

    _one_form(given)
    if given.parquet:
        to_parquet(EmbeddingStore(given.folder), given.parquet)
        return [given.parquet]
    return list(map(str, to_official(EmbeddingStore(given.folder), given.tars)))


def _import_(given: Namespace) -> list[str]:
    from llm2clip.pipeline import open_encoder
    from llm2clip.store.import_export import from_official, from_parquet

    _one_form(given)
    if given.parquet and given.encoder == EncoderConfig():  # the file says which encoder its vectors are of
        return _filled(given.out, from_parquet(given.parquet, given.out))
    identity = open_encoder(given.encoder).identity(given.precision)
    if given.parquet:
        return _filled(given.out, from_parquet(given.parquet, given.out, identity))
    return _filled(given.out, from_official(given.tars, given.out, identity))


def _one_form(given: Namespace) -> None:
    if (given.parquet is None) == (given.tars is None):
        raise ValueError("name either --parquet FILE or --tars X.tar ...")


def _filled(out: str, store: EmbeddingStore) -> list[str]:
    return [f"{out}: {len(store):,} captions"]
