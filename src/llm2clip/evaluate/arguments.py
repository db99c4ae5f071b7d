"""Argument checks for `llm2clip evaluate`. Heavy imports are avoided, so that errors are reported immediately."""

from collections.abc import Sequence

from llm2clip.config import EvaluateOptions
from llm2clip.evaluate.benchmarks import get_benchmarks, is_user_benchmark
from llm2clip.models.prompts import check_prompt_templates


def check_evaluation_arguments(models: Sequence[str], data: Sequence[str], options: EvaluateOptions) -> None:
    """Raise ValueError if there is nothing to evaluate, a benchmark is unknown, or an option would have no effect."""
    has_images = bool(data or options.benchmarks)
    if has_images and not models:
        raise ValueError("no model was specified: pass a model before the data or --benchmarks")
    if not (options.captions or has_images):
        raise ValueError(
            "nothing to evaluate: pass a model and either data or --benchmarks, or --captions for caption retrieval"
        )
    if options.short_queries and not has_images:
        raise ValueError("--short_queries requires images with captions: pass data or --benchmarks")
    has_class_names = any(map(is_user_benchmark, options.benchmarks))
    if options.templates is not None and not options.short_queries and not has_class_names:
        raise ValueError(
            "--templates applies only to short queries and to your own images with class names: add --short_queries, "
            "or pass a benchmark such as boxes:FILE.json"
        )
    check_prompt_templates(options.templates or (), "--templates")
    get_benchmarks(options.benchmarks, options.templates or ())
