"""Evaluation commands: `evaluate`, `benchmarks` and `reproduce`."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace
from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt

from llm2clip.cli.checks import check_sources, resolve_encoder, resolve_model
from llm2clip.cli.commands import DATA_HELP, Commands, add_reading_arguments, column_flags, format_command, select
from llm2clip.config import EncoderConfig, EvaluateConfig, ReproduceConfig
from llm2clip.runs.output_folder import check_output_folder

ROOT_HELP = "Folder that contains one folder per benchmark."


def add_commands(commands: Commands) -> None:
    """Add this module's commands."""
    parser = commands.add(
        "evaluate",
        _evaluate,
        "Evaluate any model on your data or on public benchmarks, or measure the caption retrieval accuracy (CRA) of "
        "any text encoder.",
    )
    parser.add_argument(
        "model",
        nargs="?",
        type=str,
        help="Model folder or hub id; a transformers image-text model; open_clip:NAME/PRETRAINED; st:NAME "
        "(sentence-transformers); or FILE.npz (precomputed embeddings). Optional with --captions.",
    )
    parser.add_argument(
        "data",
        nargs="*",
        type=str,
        default=[],
        help=f"{DATA_HELP} If a source has no splits, the images that `fit` would hold out are used.",
    )
    parser.add_argument("--baselines", nargs="+", type=str, help="Other models to show in the same tables.")
    parser.add_argument(
        "--benchmarks",
        nargs="+",
        type=str,
        help="Names of public benchmarks (see `llm2clip benchmarks`) or `all`; or your own images: folder:PATH (one "
        "subfolder per class), boxes:FILE.json or detection:FILE.json (COCO's format), segmentation:PATH (COCO's "
        "format, or a folder with images/, masks/ and classes.txt).",
    )
    parser.add_argument("--root", type=str, default="data/benchmarks", help=ROOT_HELP)
    parser.add_argument(
        "--out", type=str, help="Output folder for report.html, results.json, and embeddings, which later runs reuse."
    )
    parser.add_argument(
        "--linear_probe", action="store_true", help="Classification: also fit a linear probe to the training images."
    )
    parser.add_argument(
        "--dense_variants",
        nargs="+",
        type=str,
        default=["plain"],
        help="Regions and segmentation: how the embeddings of image parts are computed: `plain`, `maskclip`, `sclip`, "
        "`clearclip` or `naclip`.",
    )
    parser.add_argument(
        "--short_queries",
        action="store_true",
        help="Images with captions: also report retrieval by query length, from single words to whole captions.",
    )
    parser.add_argument(
        "--templates",
        nargs="*",
        type=str,
        help="With --short_queries: also average each query of up to three words with these prompt templates, such as "
        "'a photo of a {}'. Default: the templates that were saved with the model. Also: the templates for class names "
        "in your own images, such as boxes:FILE.json.",
    )
    parser.add_argument(
        "--proposals",
        type=str,
        help="Detection: the boxes to name. A JSON file in COCO's results format; a detector, which is a folder or hub "
        "id of transformers, or torchvision:NAME; or `ground-truth`.",
    )
    parser.add_argument(
        "--crop_proposals",
        action="store_true",
        help="Detection: also name each box by encoding it like an image. This takes one forward pass per box.",
    )
    parser.add_argument(
        "--save_predictions",
        action="store_true",
        help="Segmentation and detection: write label maps (PNG) and detections (COCO's results format) to "
        "OUT/predictions.",
    )
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="Run the Python code that comes with a model, such as Jina-CLIP. Use this only for models that you trust.",
    )
    parser.add_argument("--captions", nargs="+", type=str, help="Sources for caption retrieval accuracy (CRA).")
    parser.add_argument(
        "--all_pairs",
        action="store_true",
        help="CRA: also report the all-pairs protocol: each caption retrieves any other caption of its image.",
    )
    parser.add_argument(
        "--mistakes", type=NonNegativeInt, help="CRA: how many of the worst mistakes to show. Default: 3."
    )
    add_reading_arguments(parser)
    parser.add_class_arguments(EncoderConfig, "encoder")
    parser.add_class_arguments(EvaluateConfig, "evaluate", skip={"data"})

    parser = commands.add("benchmarks", _benchmarks, "List the public benchmarks and where to download each of them.")
    parser.add_argument("--root", type=str, default="data/benchmarks", help=ROOT_HELP)

    parser = commands.add("reproduce", _reproduce, "Test the paper's claims on your data.")
    parser.add_argument("data", type=str, help="Folder that the source paths in --reproduce are relative to.")
    parser.add_argument(
        "--out", type=str, default="runs/reproduce", help="Run directory; the result is OUT/report.html."
    )
    parser.add_argument(
        "--claims", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6], help="Numbers of the claims to test."
    )
    parser.add_argument(
        "--max_skipped",
        type=ClosedUnitInterval,
        default=0.05,
        help="Stop if more than this fraction of the rows cannot be used.",
    )
    parser.add_class_arguments(ReproduceConfig, "reproduce")


def _evaluate(args: Namespace) -> list[str]:
    if args.out is not None:
        check_output_folder(args.out, "evaluation")
    check_sources(args.data, args.captions)
    models = [resolve_model(name) for name in [args.model, *(args.baselines or [])] if name]
    args.encoder.path = resolve_encoder(args.encoder.path)
    from llm2clip.evaluate.runner import evaluate_models

    lines = evaluate_models(
        models,
        args.data or [],
        benchmarks=args.benchmarks or [],
        root=Path(args.root),
        captions=args.captions or [],
        out=Path(args.out) if args.out else None,
        config=args.evaluate,
        num_mistakes=args.mistakes,
        templates=args.templates,
        **select(
            args,
            "encoder",
            "columns",
            "max_skipped",
            "all_pairs",
            "linear_probe",
            "dense_variants",
            "short_queries",
            "proposals",
            "crop_proposals",
            "save_predictions",
            "trust_remote_code",
        ),
    )
    if models and (args.data or args.benchmarks) and not models[0].endswith(".npz"):
        data = [*(args.data or ["PHOTOS"]), *column_flags(args.columns)]
        lines.append(f"Next: {format_command('index', *data, '--model', models[0], '--out', 'INDEX')}")
    return lines


def _benchmarks(args: Namespace) -> list[str]:
    from llm2clip.evaluate.benchmarks import list_benchmarks

    return list_benchmarks(Path(args.root))


def _reproduce(args: Namespace) -> list[str]:
    check_output_folder(args.out, "reproduce")
    check_sources([args.data])
    from llm2clip.tools.reproduce.run import reproduce

    page = reproduce(
        data=Path(args.data),
        out=Path(args.out),
        config=args.reproduce,
        claims=args.claims,
        max_skipped=args.max_skipped,
    )
    return [f"Report: {page}"]
