"""`llm2clip evaluate`, `benchmarks` and `reproduce`."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from llm2clip.cli.commands import DATA_HELP, Commands, add_reading_arguments, select
from llm2clip.config import EncoderConfig, EvaluateConfig, ReproduceConfig


def add(commands: Commands) -> None:
    """The verbs of this file."""
    sub = commands.add(
        "evaluate", _evaluate, "Any model on your data or on public benchmarks, or CRA of any caption encoder."
    )
    sub.add_argument(
        "model",
        nargs="?",
        type=str,
        help="model folder or hub id; or one to compare with: a transformers model of images and texts, "
        "open_clip:NAME/PRETRAINED, st:NAME (sentence-transformers), FILE.npz of vectors; not needed with --captions",
    )
    about = f"{DATA_HELP}; without splits, what a fit of it holds out"
    sub.add_argument("data", nargs="*", type=str, default=[], help=about)
    sub.add_argument("--against", nargs="+", type=str, help="other models in the same tables")
    sub.add_argument("--captions", nargs="+", type=str, help="sources of captions for caption retrieval (CRA)")
    sub.add_argument(
        "--benchmarks", nargs="+", type=str, help="public ones by name, see `llm2clip benchmarks`; all; folder:PATH"
    )
    sub.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")
    sub.add_argument(
        "--out", type=str, help="folder for report.html, results.json, and vectors, which are then made once"
    )
    sub.add_argument("--all_pairs", action="store_true", help="CRA: each caption also looks for any other of its image")
    sub.add_argument("--mistakes", type=int, default=3, help="CRA: how many of the worst to show")
    sub.add_argument("--linear_probe", action="store_true", help="of classes: fit one to the training images, too")
    add_reading_arguments(sub)
    sub.add_class_arguments(EncoderConfig, "encoder")
    sub.add_class_arguments(EvaluateConfig, "evaluate", skip={"data"})

    sub = commands.add("benchmarks", _benchmarks, "The public benchmarks: which are here, and how to get the others.")
    sub.add_argument("--root", type=str, default="benchmarks", help="folder that holds the benchmarks' folders")

    sub = commands.add(
        "reproduce", _reproduce, "Test the paper's claims on your data, and say of each whether it holds."
    )
    sub.add_argument("data", type=str, help="folder that the sources of --reproduce are relative to")
    sub.add_argument("--out", type=str, default="runs/reproduce", help="run folder; OUT/report.html is the result")
    sub.add_argument("--claims", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6], help="their numbers")
    sub.add_argument("--max_skipped", type=float, default=0.05, help="largest share of bad rows put up with")
    sub.add_class_arguments(ReproduceConfig, "reproduce")


def _evaluate(given: Namespace) -> list[str]:
    from llm2clip.evaluate.verb import evaluate_models

    return evaluate_models(
        [m for m in (given.model, *(given.against or [])) if m],
        given.data or [],
        benchmarks=given.benchmarks or [],
        root=Path(given.root),
        captions=given.captions or [],
        out=Path(given.out) if given.out else None,
        config=given.evaluate,
        **select(given, "encoder", "columns", "max_skipped", "all_pairs", "mistakes", "linear_probe"),
    )


def _benchmarks(given: Namespace) -> list[str]:
    from llm2clip.evaluate.benchmarks import list_benchmarks

    return list_benchmarks(Path(given.root))


def _reproduce(given: Namespace) -> list[str]:
    from llm2clip.tools.reproduce.run import reproduce

    page = reproduce(Path(given.data), Path(given.out), given.reproduce, given.claims, given.max_skipped)
    return [f"Report: {page}"]
