"""Training commands: `fit` and its stages `tune`, `embed` and `align`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt

from llm2clip.cli.checks import check_pretrained, check_sources, check_stores, resolve_encoder
from llm2clip.cli.commands import (
    DATA_HELP,
    ArgumentParser,
    Commands,
    add_reading_arguments,
    column_flags,
    format_command,
)
from llm2clip.config import AlignConfig, EmbedConfig, EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.runs.output_folder import check_output_folder

if TYPE_CHECKING:
    from llm2clip.store.store import EmbeddingStore


def add_commands(commands: Commands) -> None:
    """Add this module's commands."""
    parser = commands.add("fit", _fit, "Train on your images and captions: tune, embed, align, evaluate.")
    parser.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    parser.add_argument("--out", type=str, required=True, help="Run directory.")
    add_reading_arguments(parser)
    add_stage_settings(parser)
    parser.add_class_arguments(EvaluateConfig, "evaluate")

    parser = commands.add("tune", _tune, "Tune a language model contrastively on captions.")
    parser.add_argument(
        "data",
        nargs="*",
        type=str,
        default=[],
        help="Caption sources; images are not needed. If a source has no splits, the captions of the images that `fit` "
        "would hold out are skipped.",
    )
    parser.add_argument("--out", type=str, required=True, help="Output folder; the result is OUT/encoder.")
    add_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(TuneConfig, "tune")

    parser = commands.add("embed", _embed, "Encode every caption in DATA once and write the embeddings to a store.")
    parser.add_argument("data", nargs="+", type=str, help="Caption sources; images are not needed.")
    parser.add_argument("--out", type=str, required=True, help="Store folder.")
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="local: this process, or all ranks started by torchrun or accelerate. ray: a Ray cluster.",
    )
    parser.add_argument(
        "--ray_workers",
        type=NonNegativeInt,
        default=0,
        help="Number of Ray workers. 0 means one per GPU or, without a GPU, one per two CPU cores.",
    )
    parser.add_argument(
        "--phrases",
        type=bool,
        default=True,
        help="Also encode the short phrases of DATA, on which `align` trains by default. All captions are then read "
        "into memory.",
    )
    add_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(EmbedConfig, "embed")

    parser = commands.add("align", _align, "Train a vision tower on images and the caption embeddings in a store.")
    parser.add_argument(
        "data",
        nargs="+",
        type=str,
        help=f"{DATA_HELP} If a source has no splits, the images that `fit` would hold out are skipped.",
    )
    parser.add_argument("--store", type=str, help="Store with embeddings of the captions in DATA, written by `embed`.")
    parser.add_argument(
        "--own_text_tower",
        action="store_true",
        help="Baseline, used instead of --store: fine-tune both towers of the CLIP model given by --align.tower.",
    )
    parser.add_argument("--held_out", nargs="+", type=str, help="Sources to evaluate on during training.")
    parser.add_argument(
        "--features",
        type=str,
        help="Store of image features from the frozen tower (--align.tower_lr 0), which several runs can share. "
        "Default: a folder in OUT.",
    )
    parser.add_argument("--out", type=str, required=True, help="Output folder; the result is OUT/model.")
    add_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(AlignConfig, "align")


def add_stage_settings(parser: ArgumentParser) -> None:
    """Add the settings of all training stages."""
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(TuneConfig, "tune")
    parser.add_class_arguments(EmbedConfig, "embed")
    parser.add_class_arguments(AlignConfig, "align")


def _fit(args: Namespace) -> list[str]:
    check_output_folder(args.out, "fit")
    check_sources(args.data, args.tune.data, args.tune.text_pairs, args.tune.exclude, args.evaluate.data)
    args.encoder.path = resolve_encoder(args.encoder.path)
    check_pretrained(args.align.tower)
    from llm2clip.pipeline import fit
    from llm2clip.tools.plan.resources import check_resources

    config = FitConfig(**{field.name: args[field.name] for field in dataclasses.fields(FitConfig)})
    model = fit(args.data, Path(args.out), config, check_resources)
    return [f"Model: {model}", *_model_hints(model, args)]


def _tune(args: Namespace) -> list[str]:
    check_output_folder(args.out, "tune")
    check_sources(args.data, args.tune.data, args.tune.text_pairs, args.tune.exclude)
    args.encoder.path = resolve_encoder(args.encoder.path)
    from llm2clip.runs.lock import run_lock

    with run_lock(Path(args.out)):
        return _run_tune(args)


def _run_tune(args: Namespace) -> list[str]:
    from llm2clip.data.records import Record, Source
    from llm2clip.data.splits import read_splits
    from llm2clip.data.tuning_sources import read_tuning_sources
    from llm2clip.pipeline import check_encoder, start_run, tune
    from llm2clip.runs.ranks import print_once

    if not (Path(args.out) / "encoder").exists():
        check_encoder(args.encoder)
    sources, out = args.data or [], Path(args.out)
    settings = {"data": sources, "columns": args.columns, "encoder": args.encoder, "tune": args.tune}
    log = start_run(out, settings, args.max_skipped)
    pairs = []
    if not (out / "encoder").exists():
        if not (sources or args.tune.data or args.tune.text_pairs):
            raise ValueError("Nothing to tune on: pass caption sources, or text pairs with --tune.text_pairs")
        held_out: list[Record] = []
        if any(not Source.parse(source).splits for source in sources):
            data = read_splits(sources, EvaluateConfig(), args.columns, log, "unchecked")
            held_out = [record for records in data.held_out.values() for record in records]
            if held_out:
                print_once(data.summary)
        pairs = read_tuning_sources([], held_out, args.tune, args.columns, log, training_sources=sources)
        print_once(log.summary())
    encoder = tune(pairs, out, args.encoder, args.tune)
    flags = [*column_flags(args.columns), "--encoder.path", encoder, "--out", "STORE"]
    hint = format_command("embed", *(sources or ["DATA"]), *flags)
    return [f"Caption encoder: {encoder}", f"Next: {hint}"]


def _embed(args: Namespace) -> list[str]:
    check_output_folder(args.out, "store")
    check_sources(args.data)
    args.encoder.path = resolve_encoder(args.encoder.path)
    from llm2clip.runs.lock import run_lock

    with run_lock(Path(args.out)):
        return _run_embed(args)


def _run_embed(args: Namespace) -> list[str]:
    from llm2clip.data.merged_records import stream_records
    from llm2clip.data.noun_phrases import add_phrases
    from llm2clip.data.skip_log import SkipLog
    from llm2clip.pipeline import embed
    from llm2clip.runs.ranks import print_once, process_state

    out = Path(args.out)
    log = SkipLog(out / "skipped.jsonl" if process_state().is_main_process else None, args.max_skipped)
    stream = (record for _, record in stream_records(args.data, args.columns, log, "ignore"))
    records = add_phrases(list(stream)) if args.phrases else stream
    captions = (text for record in records for text in record.texts + record.phrases * args.phrases)
    store = embed(captions, out, args.encoder, args.embed, engine=args.engine, ray_workers=args.ray_workers)
    print_once(log.summary())
    flags = [*column_flags(args.columns), "--store", out, *_encoder_flags(args.encoder), "--out", "RUN"]
    return [f"Store: {out} ({len(store):,} captions)", f"Next: {format_command('align', *args.data, *flags)}"]


def _align(args: Namespace) -> list[str]:
    check_output_folder(args.out, "align")
    if bool(args.store) == args.own_text_tower:
        raise ValueError("pass either --store STORE or --own_text_tower")
    check_sources(args.data, args.held_out)
    check_stores(*([args.store] if args.store else []))
    args.encoder.path = resolve_encoder(args.encoder.path)
    check_pretrained(args.align.tower)
    from llm2clip.runs.lock import run_lock

    with run_lock(Path(args.out)):
        return _run_align(args)


def _run_align(args: Namespace) -> list[str]:
    from llm2clip.data.merged_records import read_merged_records
    from llm2clip.data.noun_phrases import add_phrases
    from llm2clip.data.records import Source
    from llm2clip.data.splits import read_splits
    from llm2clip.pipeline import align, check_align_models, start_run
    from llm2clip.runs.ranks import print_once
    from llm2clip.store.store import EmbeddingStore, drop_missing_phrases, drop_refused_captions
    from llm2clip.train.clip_finetuning import finetune_clip

    out, held_out_sources = Path(args.out), args.held_out or []
    if args.own_text_tower and (held_out_sources or args.features):
        raise ValueError("--own_text_tower does not support --held_out and --features: evaluate the trained model")
    settings = {"data": args.data, "held_out": held_out_sources, "columns": args.columns, "store": args.store}
    log = start_run(out, settings | {"encoder": args.encoder, "align": args.align}, args.max_skipped)
    model_dir = out / "model"
    if not model_dir.exists():
        if args.store:
            check_align_models(args.align)
            store = EmbeddingStore(args.store)
            _check_store(store, args.encoder)
        if held_out_sources or any(not Source.parse(source).splits for source in args.data):
            data = read_splits(args.data, EvaluateConfig(data=held_out_sources), args.columns, log)
            train, held_out = data.train, data.held_out if held_out_sources else {}
            print_once(data.summary)
        else:
            train, held_out = [record for _, record in read_merged_records(args.data, args.columns, log)], {}
        print_once(log.summary())
        if args.own_text_tower:
            finetune_clip(add_phrases(train) if args.align.samples_phrases else train, args.align, out, log)
            return [f"Model: {model_dir}", *_model_hints(model_dir, args, "--baselines", args.align.tower)]
        if args.align.uses_phrases:
            train = drop_missing_phrases(add_phrases(train), store)
        model_dir = align(
            drop_refused_captions(train, store),
            store,
            out,
            args.align,
            log,
            held_out={column: drop_refused_captions(records, store) for column, records in held_out.items()},
            encoder=args.encoder,
            features=Path(args.features) if args.features else None,
        )
    return [f"Model: {model_dir}", *_model_hints(model_dir, args)]


def _model_hints(model: Path, args: Namespace, *flags: str) -> list[str]:
    """Return the commands to run next with a trained model. `flags` are further arguments of `evaluate`."""
    columns, index = column_flags(args.columns), model.parent / "index"
    return [
        f"Next: {format_command('evaluate', model, *args.data, *columns, *flags)}",
        f"      {format_command('index', *args.data, *columns, '--model', model, '--out', index)}",
    ]


def _check_store(store: EmbeddingStore, encoder: EncoderConfig) -> None:
    """On the main process, check that a store is intact and was written with the given encoder."""
    from llm2clip.pipeline import open_encoder
    from llm2clip.runs.ranks import process_state, wait_for_everyone
    from llm2clip.store.layout import check_identity

    if process_state().is_main_process:
        store.verify(progress=True)
        identity = store.manifest["identity"]
        check_identity(identity, open_encoder(encoder, "cpu").identity(identity["precision"]), store.folder)
    wait_for_everyone()


def _encoder_flags(encoder: EncoderConfig) -> list[str]:
    """Return --encoder flags for all settings that differ from the defaults.

    The flags are needed because a store works only with the encoder config with which it was written.
    """
    flags = []
    for name, value in vars(encoder).items():
        if name == "path":
            flags += ["--encoder.path", value]
        elif value != getattr(EncoderConfig(), name):
            flags += [f"--encoder.{name}", value if isinstance(value, str) else json.dumps(value)]
    return flags
