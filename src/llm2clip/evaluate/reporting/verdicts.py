"""Sentences that state the main result of an evaluation in words, for the top of a report."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.evaluate.benchmark_eval import BenchmarkResult

MIN_IMAGES = 50  # with fewer images, recall says little about other images
K = 10  # retrieval is described by R@K


def describe_share(percent: float) -> str:
    """Express a percentage as a fraction in words, such as "6 of 10" or "3 of 100"."""
    if percent in (0, 100):
        return "none" if percent == 0 else "all"
    if percent < 0.5:
        return "fewer than 1 of 100"
    if 9.5 <= percent < 95:
        return f"{percent / 10:.0f} of 10"
    return f"{min(percent, 99):.0f} of 100"


def count_things(count: int, noun: str) -> str:
    """Return a number with its noun, such as "1 image" or "1,000 images"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def describe_retrieval(model: str, row: Mapping[str, Any], captions: str = "captions") -> str:
    """State in words for how many captions a model finds the image.

    Args:
        row: A row of `compute_field_metrics`.
        captions: Noun phrase for the captions, such as "held-out captions".
    """
    images = row["images"]
    if images < MIN_IMAGES:
        return (
            f"Only {count_things(images, 'image')} evaluated: too few to judge the model. "
            f"Use at least {MIN_IMAGES} images that it was not trained on."
        )
    share, chance = describe_share(row["T2I"][f"R@{K}"]), describe_share(row["T2I chance"][f"R@{K}"])
    return (
        f"{model} finds the right image among the first {K} of {images:,} for {share} {captions} "
        f"(a random order: {chance})."
    )


def describe_difference(baseline: str, difference: float, interval: Sequence[float] | None, metric: str) -> str:
    """State in words whether a model is better than a baseline.

    Args:
        difference: Metric of the model minus metric of the baseline, in percentage points.
        interval: 95% confidence interval of the difference, or None if it is unknown.
    """
    if interval is None:
        return f"It differs from {baseline} by {difference:+.1f} points of {metric}."
    low, high = interval
    if low > 0:
        return f"It beats {baseline} by {difference:.1f} points of {metric} (95% interval {low:.1f} to {high:.1f})."
    if high < 0:
        return (
            f"It is {-difference:.1f} points of {metric} worse than {baseline} "
            f"(95% interval {-high:.1f} to {-low:.1f})."
        )
    return (
        f"The difference from {baseline} may be chance: {difference:+.1f} points of {metric} "
        f"(95% interval {low:+.1f} to {high:+.1f})."
    )


def describe_caption_retrieval(encoder: str, metrics: Mapping[str, Any]) -> str:
    """State the caption retrieval accuracy in words. `metrics` is a result of `caption_retrieval_accuracy`."""
    images = count_things(metrics["images"], "image")
    if metrics["images"] < MIN_IMAGES:
        return f"Only {images} with two captions: too few to judge the encoder. Use at least {MIN_IMAGES}."
    return f"For {describe_share(metrics['CRA'])} of {images}, {encoder} finds the second caption from the first."


def describe_results(benchmark: str, results: Sequence[BenchmarkResult]) -> str:
    """State the first model's main result on a benchmark in words, and compare it with the best baseline.

    Truncated embeddings of the first model are not baselines.
    """
    first = results[0]
    if first.ranks:
        direction, metric = "T2I", "R@10"
        verdict = describe_retrieval(first.model, first.summary["rows"][0])
    else:
        direction, metric = "metrics", _choose_main_metric(first)
        verdict = _describe_metric(first, benchmark, metric)
    differences = []
    for result in results[1:]:
        difference = _get_entry(result).get("difference")
        is_truncated = "full model" in result.summary and result.summary["full model"] == first.model
        if difference and not is_truncated and metric in difference[direction]:
            intervals = difference.get("intervals", difference.get(f"{direction} interval"))
            differences.append((difference[direction][metric], result.model, intervals.get(metric)))
    if differences:
        value, baseline, interval = min(differences)
        verdict += " " + describe_difference(baseline, value, interval, metric)
    return verdict


def _get_entry(result: BenchmarkResult) -> Mapping[str, Any]:
    """Return the first row of a result, or its summary if it has no rows."""
    rows: Sequence[Mapping[str, Any]] = result.summary.get("rows", [result.summary])
    return rows[0]


def _choose_main_metric(result: BenchmarkResult) -> str:
    metrics = _get_entry(result)["metrics"]
    return next((name for name in ("group", "mean") if name in metrics), next(iter(metrics)))


def _describe_metric(result: BenchmarkResult, benchmark: str, metric: str) -> str:
    value = _get_entry(result)["metrics"][metric]
    if metric == "top-1":
        things = "boxes" if "regions" in result.summary else "images"
        return f"{result.model} names the right class for {describe_share(value)} {things} of {benchmark}."
    return f"{result.model} reaches {value:.1f}% {metric} on {benchmark}."
