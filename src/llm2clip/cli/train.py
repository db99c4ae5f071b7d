"""Training commands: `fit`, its stages `tune`, `embed` and `align`, and `distill`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace
from jsonargparse.typing import NonNegativeInt

from llm2clip.cli.caption import add_caption_arguments, prepare_captioning
from llm2clip.cli.checks import (
    check_data_sources,
    check_output_folder,
    check_pretrained_names,
    check_stores_exist,
    list_local_sources,
    resolve_encoder_path,
    resolve_model_name,
)
from llm2clip.cli.commands import (
    DATA_HELP,
    ArgumentParser,
    CommandGroup,
    add_data_reading_arguments,
    format_column_flags,
    format_command,
    make_options_from_args,
)
from llm2clip.config import (
    AUTO,
    AlignConfig,
    DistillConfig,
    EmbedConfig,
    EncoderConfig,
    EvaluateConfig,
    FitConfig,
    TuneConfig,
)
from llm2clip.io_utils import format_count, require_extra

if TYPE_CHECKING:
    from llm2clip.data.table import RecordTable
    from llm2clip.pipeline import Run


def add_commands(commands: CommandGroup) -> None:
    _add_fit_command(commands)
    _add_tune_command(commands)
    _add_embed_command(commands)
    _add_align_command(commands)
    _add_distill_command(commands)


def _add_fit_command(commands: CommandGroup) -> None:
    parser = commands.add("fit", _run_fit, "Train on your images and captions: tune, embed, align, evaluate.")
    parser.add_argument("data", nargs="+", type=str, help=DATA_HELP)
    parser.add_argument("--out", type=str, required=True, help="Run directory.")
    add_caption_arguments(parser)
    add_data_reading_arguments(parser)
    add_stage_settings(parser)
    parser.add_class_arguments(EvaluateConfig, "evaluate")


def _add_tune_command(commands: CommandGroup) -> None:
    parser = commands.add("tune", _run_tune, "Tune a language model contrastively on captions.")
    parser.add_argument(
        "data",
        nargs="*",
        type=str,
        default=[],
        help="Caption sources; images are not needed. In a source without splits, the captions of images that `fit` "
        "would hold out are skipped.",
    )
    parser.add_argument("--out", type=str, required=True, help="Output folder. The tuned encoder is in OUT/encoder.")
    add_data_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(TuneConfig, "tune")


def _add_embed_command(commands: CommandGroup) -> None:
    parser = commands.add("embed", _run_embed, "Encode every caption in DATA once, and store the embeddings.")
    parser.add_argument("data", nargs="+", type=str, help="Caption sources; images are not needed.")
    parser.add_argument("--out", type=str, required=True, help="Store folder.")
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="local: use this process, or all ranks started by torchrun or accelerate. ray: use a Ray cluster.",
    )
    parser.add_argument(
        "--ray_workers",
        type=NonNegativeInt,
        default=0,
        help="Number of Ray workers. 0 means one per GPU or, without GPUs, one per two CPU cores.",
    )
    parser.add_argument(
        "--phrases",
        type=bool,
        default=True,
        help="Also encode short phrases, such as 'red hat', on which `align` trains by default. Reads all captions "
        "into memory.",
    )
    add_data_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(EmbedConfig, "embed")


def _add_align_command(commands: CommandGroup) -> None:
    parser = commands.add("align", _run_align, "Train a vision tower on images and the caption embeddings in a store.")
    parser.add_argument(
        "data",
        nargs="+",
        type=str,
        help=f"{DATA_HELP} In a source without splits, the images that `fit` would hold out are skipped.",
    )
    parser.add_argument(
        "--store", type=str, required=True, help="Store with the caption embeddings of DATA, written by `embed`."
    )
    parser.add_argument("--held_out", nargs="+", type=str, help="Held-out sources for evaluation during training.")
    parser.add_argument(
        "--features",
        type=str,
        help="Folder for the cached image features of a frozen tower (--align.tower_lr 0). Several runs can share the "
        "folder. Default: a folder in OUT.",
    )
    parser.add_argument("--out", type=str, required=True, help="Output folder. The trained model is in OUT/model.")
    add_data_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(AlignConfig, "align")


def _add_distill_command(commands: CommandGroup) -> None:
    parser = commands.add("distill", _run_distill, "Train a small text encoder to replace the LLM and adapter.")
    parser.add_argument("model", type=str, help="Teacher: the folder or hub id of an llm2clip model.")
    parser.add_argument(
        "data",
        nargs="+",
        type=str,
        help=f"{DATA_HELP} The student learns from the captions and phrases of the training records. In a source "
        "without splits, the captions of images that `fit` would hold out are skipped.",
    )
    parser.add_argument(
        "--student",
        type=str,
        default="all-minilm-l6-v2",
        help="Text encoder to train: a sentence-transformers model or an LLM (folder, hub id or name of a built-in "
        "model), layers:N (the first N layers of the teacher), static (one embedding per token in the teacher's "
        "vocabulary) or static:NAME (in the vocabulary of another model).",
    )
    parser.add_argument("--texts", type=str, help="UTF-8 or UTF-16 file with additional texts, one per line.")
    parser.add_argument(
        "--store",
        type=str,
        help="Store with caption embeddings from the teacher's encoder. Only texts that are not in the store are "
        "encoded. Default: the store next to the model, if there is one.",
    )
    parser.add_argument("--out", type=str, required=True, help="Output folder. The trained model is in OUT/model.")
    add_data_reading_arguments(parser)
    parser.add_class_arguments(DistillConfig, "distill")
    parser.add_class_arguments(EvaluateConfig, "evaluate")


def add_stage_settings(parser: ArgumentParser) -> None:
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.set_defaults({"encoder.path": AUTO})
    parser.add_class_arguments(TuneConfig, "tune")
    parser.add_class_arguments(EmbedConfig, "embed")
    parser.add_class_arguments(AlignConfig, "align")


def _run_fit(args: Namespace) -> list[str]:
    check_output_folder(args.out, "fit")
    if args.tune.qlora:
        require_extra("qlora", "--tune.qlora")
    other_sources = (args.tune.data, args.tune.text_pairs, args.tune.exclude, args.evaluate.data)
    check_data_sources(args, *other_sources, require_captions=not (args.caption or args.caption_model))
    if args.encoder.path != AUTO:
        args.encoder.path = resolve_encoder_path(args.encoder.path)
    check_pretrained_names(args.align.tower)
    index_data = _format_index_sources(args)  # before `prepare_captioning` changes `args.data`
    write_captions = prepare_captioning(args)
    from llm2clip.pipeline import fit, open_run
    from llm2clip.runs.ranks import print_once

    with open_run("fit", args.data, Path(args.out), make_options_from_args(FitConfig, args)) as run:
        if write_captions is not None:
            _check_disk_and_memory(run, None)
            write_captions()
        print_once(*_check_disk_and_memory(run, run.data.train))
        model = fit(run)
    return [f"Model: {model}", *_format_next_commands(model, args, index_data=index_data)]


def _check_disk_and_memory(run: Run, records: RecordTable | None) -> list[str]:
    """Check whether disk space and memory suffice for the run. Return warnings to print."""
    from llm2clip.runs.ranks import process_state
    from llm2clip.tools.plan import check_resources

    if run.model_dir.exists() or not process_state().is_main_process:
        return []
    return check_resources(run.config, run.out, records)


def _run_tune(args: Namespace) -> list[str]:
    check_output_folder(args.out, "tune")
    if args.tune.qlora:
        require_extra("qlora", "--tune.qlora")
    check_data_sources(args, args.tune.data, args.tune.text_pairs, args.tune.exclude, image_check="ignore")
    args.encoder.path = resolve_encoder_path(args.encoder.path)
    from llm2clip.pipeline import open_run, tune

    with open_run("tune", args.data, Path(args.out), make_options_from_args(FitConfig, args)) as run:
        encoder = tune(run)
    flags = [*format_column_flags(args.columns), "--encoder.path", encoder, "--out", "STORE"]
    hint = format_command("embed", *(args.data or ["DATA"]), *flags)
    return [f"Caption encoder: {encoder}", f"Next: {hint}"]


def _run_embed(args: Namespace) -> list[str]:
    check_output_folder(args.out, "store")
    if args.engine == "ray":
        require_extra("ray", "--engine ray")
    check_data_sources(args, image_check="ignore")
    args.encoder.path = resolve_encoder_path(args.encoder.path)
    from llm2clip.pipeline import embed, open_run

    out = Path(args.out)
    with open_run("embed", args.data, out, make_options_from_args(FitConfig, args)) as run:
        store = embed(run, args.encoder, phrases=args.phrases, engine=args.engine, ray_workers=args.ray_workers)
    flags = [*format_column_flags(args.columns), "--store", out, *_make_encoder_flags(args.encoder), "--out", "RUN"]
    captions = format_count(len(store), "caption")
    return [f"Store: {out} ({captions})", f"Next: {format_command('align', *args.data, *flags)}"]


def _run_align(args: Namespace) -> list[str]:
    check_output_folder(args.out, "align")
    check_data_sources(args, args.held_out)
    check_stores_exist(args.store)
    args.encoder.path = resolve_encoder_path(args.encoder.path)
    check_pretrained_names(args.align.tower)
    from llm2clip.pipeline import align, open_run
    from llm2clip.store.store import EmbeddingStore

    held_out = args.held_out or []
    config = dataclasses.replace(make_options_from_args(FitConfig, args), evaluate=EvaluateConfig(data=held_out))
    with open_run("align", args.data, Path(args.out), config, held_out=held_out, store=args.store) as run:
        features = Path(args.features) if args.features else None
        model = align(run, EmbeddingStore(args.store), args.encoder, features)
    return [f"Model: {model}", *_format_next_commands(model, args)]


def _run_distill(args: Namespace) -> list[str]:
    check_output_folder(args.out, "distill")
    check_data_sources(args, args.evaluate.data, image_check="ignore")
    check_stores_exist(*([args.store] if args.store else []))
    if args.texts is not None and not Path(args.texts).is_file():
        raise FileNotFoundError(f"--texts {args.texts}: no such file")
    args.model = resolve_model_name(args.model)
    kind, _, argument = args.student.partition(":")
    if kind == "static" and argument:
        args.student = f"static:{resolve_encoder_path(argument)}"
    elif kind not in ("static", "layers"):
        args.student = resolve_encoder_path(args.student)
    from llm2clip.pipeline import DistillOptions, distill

    model = distill(make_options_from_args(DistillOptions, args), Path(args.out))
    return [f"Model: {model}", *_format_next_commands(model, args, "--baselines", args.model)]


def _format_next_commands(
    model: Path, args: Namespace, *flags: str, index_data: Sequence[str] | None = None
) -> list[str]:
    """Format the commands to run next. `flags` are additional arguments for `evaluate`."""
    index_data = index_data or _format_index_sources(args)
    index = model.parent / "index"
    return [
        f"Next: {format_command('evaluate', model, *args.data, *format_column_flags(args.columns), *flags)}",
        f"      {format_command('index', *index_data, '--model', model, '--out', index)}",
        f"      {format_command('search', index, 'a description of an image')}",
        f"      {format_command('serve', index)}",
    ]


def _format_index_sources(args: Namespace) -> list[str]:
    """Return the sources that `index` can read, and the --columns flag."""
    return [*list_local_sources(args.data), *format_column_flags(args.columns)]


def _make_encoder_flags(encoder: EncoderConfig) -> list[str]:
    """Return the --encoder flags that `align` needs for a store created with this encoder."""
    flags = []
    for name, value in vars(encoder).items():
        if name == "path":
            flags += ["--encoder.path", value]
        elif value != getattr(EncoderConfig(), name):
            flags += [f"--encoder.{name}", value if isinstance(value, str) else json.dumps(value)]
    return flags
