"""Evaluation commands: `evaluate` and `benchmarks`."""

from pathlib import Path

from jsonargparse import Namespace

from llm2clip.cli.checks import (
    check_data_sources,
    check_output_folder,
    list_local_sources,
    resolve_encoder_path,
    resolve_model_name,
)
from llm2clip.cli.commands import (
    DATA_HELP,
    CommandGroup,
    add_data_reading_arguments,
    add_dataclass_flags,
    format_column_flags,
    format_command,
    make_options_from_args,
)
from llm2clip.config import EncoderConfig, EvaluateConfig, EvaluateOptions


def add_commands(commands: CommandGroup) -> None:
    parser = commands.add(
        "evaluate",
        _run_evaluate,
        "Evaluate a model on your data or public benchmarks, or measure the caption retrieval accuracy (CRA) of a text "
        "encoder.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=str,
        help="Model folder, hub id, transformers image-text model, open_clip:NAME/PRETRAINED, st:NAME "
        "(sentence-transformers), or FILE.npz (precomputed embeddings). Optional with --captions.",
    )
    parser.add_argument(
        "data",
        nargs="*",
        type=str,
        default=[],
        help=f"{DATA_HELP} If a source has no splits, only the images that `fit` would hold out are used.",
    )
    parser.add_argument("--baselines", nargs="+", type=str, help="Other models to evaluate for comparison.")
    add_dataclass_flags(parser, EvaluateOptions, skip={"columns", "max_skipped"})
    add_data_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(EvaluateConfig, "evaluate", skip={"data"})

    parser = commands.add("benchmarks", _list_benchmarks, "List the public benchmarks and their download locations.")
    parser.add_argument("--root", type=str, default="data/benchmarks", help="Folder with one subfolder per benchmark.")


def _run_evaluate(args: Namespace) -> list[str]:
    if args.out is not None:
        check_output_folder(args.out, "evaluation")
    check_data_sources(args, args.captions)
    models = [resolve_model_name(name) for name in [args.model, *(args.baselines or [])] if name]
    args.encoder.path = resolve_encoder_path(args.encoder.path)
    options = make_options_from_args(EvaluateOptions, args)
    from llm2clip.evaluate.arguments import check_evaluation_arguments

    check_evaluation_arguments(models, args.data or [], options)
    from llm2clip.evaluate.runner import evaluate_models

    lines = evaluate_models(models, args.data or [], options, encoder=args.encoder, config=args.evaluate)
    if models and (args.data or args.benchmarks) and not models[0].endswith(".npz"):
        data = [*list_local_sources(args.data or []), *format_column_flags(args.columns)]
        lines.append(f"Next: {format_command('index', *data, '--model', models[0], '--out', 'INDEX')}")
    return lines


def _list_benchmarks(args: Namespace) -> list[str]:
    from llm2clip.evaluate.benchmarks import list_benchmarks

    return list_benchmarks(Path(args.root))
