"""Report sections that compare models with each other and with published results."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.evaluate.benchmarks.base import Benchmark, BenchmarkResult
from llm2clip.evaluate.benchmarks.coco_instances import DEGENERATE
from llm2clip.evaluate.metrics import KS
from llm2clip.evaluate.retrieval import build_error_analysis_section
from llm2clip.io_utils import format_count
from llm2clip.published_results import CRA, CRA_NOTE, get_published_metrics, get_published_notes, get_published_recalls
from llm2clip.reports import (
    Block,
    CollapsibleSection,
    Heading,
    Paragraph,
    Table,
    format_cell,
    format_interval,
    format_value_with_interval,
)

DIRECTIONS = ("I2T", "T2I")
# Published LLM2CLIP models to which the first evaluated model is compared.
REFERENCE_MODELS = ("2024: Llama3-8B-CC", "2024: EVA02 + LLM2CLIP", "2026: Llama-3.1-8B-CC", "2026: SigLIP2 + LLM2CLIP")
CLASS_METRICS = ("class top-1", "IoU", "class AP50")  # per-class metrics in `BenchmarkResult.summary`
MEAN_BENCHMARKS = ("xm3600",)  # benchmarks whose published results are means over all languages
BYTES_PER_VALUE = 2  # search indexes store vectors in float16
MIN_IMAGES = 50  # with fewer images, verdicts say that the recall is imprecise
MIN_ROUGH_IMAGES = 20  # with fewer images, there is no verdict, because even a random order has a high recall
K = 10  # verdicts report R@K


def build_benchmark_section(benchmark: Benchmark, results: Sequence[BenchmarkResult]) -> list[Block]:
    """Return the report section on a benchmark. The models are listed in the order of `results`."""
    blocks: list[Block] = [Heading(f"{benchmark.name}: {_describe_benchmark(benchmark, results[0].summary)}")]
    notes = [Paragraph(note) for note in get_published_notes(benchmark.name)]
    if benchmark.kind != "retrieval":
        blocks += [
            build_metrics_table(results, get_published_metrics(benchmark.name)),
            *build_class_metrics_section(results),
        ]
        if "proposals" in results[0].summary:
            blocks.append(Paragraph(results[0].summary["proposals"]["description"]))
        return [*blocks, *notes, *(block for result in results for block in result.examples)]
    published = get_published_recalls(benchmark.name)
    is_mean = benchmark.name in MEAN_BENCHMARKS
    if is_mean:
        blocks += [Heading("Mean over the languages", 3), build_mean_recall_table(results, published)]
    for n, first_row in enumerate(results[0].summary["rows"]):
        field_name = first_row["captions"]
        rows = {}
        for result in results:
            rows[result.model] = next(row for row in result.summary["rows"] if row["captions"] == field_name)
        size = f"{format_count(first_row['images'], 'image')}, {format_count(first_row['texts'], 'text')}"
        blocks.append(Heading(f"{field_name}: {size}", 3))
        blocks.append(build_recall_table(rows, published if n == 0 and not is_mean else {}))
        analyses = {r.model: r.error_analysis[field_name] for r in results if field_name in r.error_analysis}
        if analyses:
            blocks += build_error_analysis_section(analyses)
    return [*blocks, *build_truncated_embeddings_section(results), *notes]


def _describe_benchmark(benchmark: Benchmark, summary: Mapping[str, Any]) -> str:
    """Return a benchmark's description or, after a partial evaluation, the size of the evaluated part."""
    if benchmark.size is None and "images" in summary:
        regions = f", {summary['regions']:,} boxes" if "regions" in summary else ""
        return f"{benchmark.description}: {format_count(summary['images'], 'image')}{regions}"
    if benchmark.size is None:
        return benchmark.description
    total, unit = benchmark.size
    if unit == "boxes":
        count = summary["regions"] + summary["excluded regions"].get(DEGENERATE, 0)
    elif benchmark.kind == "compositional":
        count = summary["examples"]
    elif benchmark.kind == "retrieval":
        count = max(row["images"] for row in summary["rows"])
    else:
        count = summary["images"]
    if count >= total:
        return benchmark.description
    has_published = get_published_recalls(benchmark.name) or get_published_metrics(benchmark.name)
    note = " (published results: complete benchmark)" if has_published else ""
    return f"part of the benchmark, {count:,} of {total:,} {unit}{note}"


def build_caption_retrieval_section(name: str, metrics: dict[str, Any]) -> list[Block]:
    """Return the report section on caption retrieval. `metrics` is a result of `caption_retrieval_accuracy`."""
    rows: list[list[Any]] = [[f"paper: {model}, COCO", cra, None, 5000] for model, cra in CRA.items()]
    rows.append([name, metrics["CRA"], format_interval(metrics["CRA interval"]), metrics["images"]])
    rows.append(["chance", metrics["chance"], None, metrics["images"]])
    direction_rows: list[list[Any]] = []
    for direction in ("first to second", "second to first"):
        direction_rows.append([direction, *(metrics[direction][f"R@{k}"] for k in KS), metrics["chance"]])
    truncated = "unknown" if metrics["truncated"] is None else f"{metrics['truncated']:,}"
    blocks: list[Block] = [
        Heading("CRA: the first two captions of each image retrieve each other"),
        Table(["text encoder", "CRA, %", "95% interval", "images"], rows, highlight=frozenset([len(CRA)])),
        Paragraph(CRA_NOTE),
        Table(["direction", *(f"R@{k}, %" for k in KS), "chance R@1"], direction_rows),
        Paragraph(
            f"The mean cosine similarity is {metrics['positive cosine']:.3f} between captions of the same image, and "
            f"{metrics['negative cosine']:.3f} between captions of different images."
        ),
        Paragraph(
            f"Images excluded because they do not have two distinct captions: {metrics['excluded']:,}. Captions "
            f"truncated to the encoder's maximum length: {truncated}."
        ),
    ]
    mistakes: list[list[Any]] = []
    for mistake in metrics.get("mistakes", ()):
        cosines = f"{mistake['retrieved cosine']:.2f} / {mistake['correct cosine']:.2f}"
        mistakes.append([mistake["caption"], mistake["retrieved"], mistake["correct"], cosines])
    if mistakes:
        blocks.append(Table(["caption", "retrieved", "correct", "cosines"], mistakes))
    return blocks


def build_recall_table(
    results: Mapping[str, dict[str, Any]], published: Mapping[str, tuple[float | None, ...]]
) -> Table:
    """Return a table of the recall of published models, a random ranking and the evaluated models.

    The last rows show the differences between the first model and each baseline, with paired confidence intervals, and
    the differences between the first model and each published model in `REFERENCE_MODELS`.

    Args:
        results: Rows of `compute_field_metrics`, keyed by model name. Rows of baselines also contain "difference", the
            result of `compute_retrieval_difference`.
        published: Result of `get_published_recalls`.
    """
    header = ["model"]
    for direction in DIRECTIONS:
        header += [f"{direction} R@1", "95% interval", "R@5", "R@10", f"{direction} median rank"]
    first_model, first_row = next(iter(results.items()))
    recalls = {model: _get_recalls_in_both_directions(row) for model, row in results.items()}
    rows = [_make_recall_row(f"paper {model}", recalls) for model, recalls in published.items()]
    rows.append(_make_recall_row("chance", _get_recalls_in_both_directions(first_row, " chance")))
    highlight = frozenset(range(len(rows), len(rows) + len(results)))
    for model, row in results.items():
        intervals = []
        for direction in DIRECTIONS:
            is_trivial = get_informative_recalls(row, direction)[0] is None
            intervals.append(None if is_trivial else format_interval(row[f"{direction} interval"]["R@1"]))
        median_ranks = [f"{row[direction]['median rank']:g}" for direction in DIRECTIONS]
        truncated = _format_truncated_fraction(row["truncated"], row["texts"])
        rows.append(_make_recall_row(model, recalls[model], intervals, median_ranks, truncated))
    paired = {f"{first_model} minus {model}": row.get("difference") for model, row in results.items()}
    for name, values in _subtract_recalls(recalls, published).items():
        difference = paired.get(name)
        limits: list[str | None] = [None, None]
        if difference:
            limits = [format_interval(difference[f"{direction} interval"]["R@1"], "+.1f") for direction in DIRECTIONS]
        rows.append(_make_recall_row(name, values, limits))
    return Table([*header, "truncated"], rows, highlight)


def build_truncated_embeddings_section(results: Sequence[BenchmarkResult]) -> list[Block]:
    """Return a section on R@1 by embedding dimension, or [] if no truncated embeddings were evaluated."""
    recalls: dict[str, dict[int, list[float]]] = {}  # (I2T R@1, T2I R@1), keyed by model and dimension
    for result in results:
        if "dimensions" in result.summary:
            row = result.summary["rows"][0]
            by_dim = recalls.setdefault(result.summary["full model"], {})
            by_dim[result.summary["dimensions"]] = [row[direction]["R@1"] for direction in DIRECTIONS]
    if not recalls:
        return []
    rows = []
    for model, by_dim in recalls.items():
        full = by_dim[max(by_dim)]
        for dim, values in sorted(by_dim.items()):
            fractions = [100 * value / whole if whole else None for value, whole in zip(values, full, strict=True)]
            rows.append([model, dim, BYTES_PER_VALUE * dim, *values, *fractions])
    header = ["model", "dimensions", "bytes per image", *(f"{direction} R@1" for direction in DIRECTIONS)]
    header += [f"{direction} R@1, % of full size" for direction in DIRECTIONS]
    note = "Sizes in bytes are for float16 embeddings, which search indexes store."
    return [Heading("Truncated embeddings", 3), Table(header, rows), Paragraph(note)]


def build_mean_recall_table(
    results: Sequence[BenchmarkResult], published: Mapping[str, tuple[float | None, ...]]
) -> Table:
    """Return a table of the recall averaged over all caption fields."""
    means = {}
    for result in results:
        recalls = [  # (fields, 6)
            [row[direction][f"R@{k}"] for direction in DIRECTIONS for k in KS] for row in result.summary["rows"]
        ]
        means[result.model] = [statistics.fmean(values) for values in zip(*recalls, strict=True)]
    rows: list[list[Any]] = [[f"paper {model}", *recalls] for model, recalls in published.items()]
    highlight = frozenset(range(len(rows), len(rows) + len(results)))
    rows += [[model, *recalls] for model, recalls in means.items()]
    rows += [[name, *values] for name, values in _subtract_recalls(means, published).items()]
    return Table(["model", *(f"{direction} R@{k}" for direction in DIRECTIONS for k in KS)], rows, highlight)


def build_metrics_table(results: Sequence[BenchmarkResult], published: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of the metrics on a benchmark of any kind except "retrieval".

    The table contains the published results, the chance level, the results of each model and method, and the
    differences between the first model and each baseline.
    """
    metric_rows = [(result, row) for result in results for row in result.summary.get("rows", [result.summary])]
    names = list(dict.fromkeys(name for _, row in metric_rows for name in row["metrics"]))
    settings = [key for key in ("method", "logit scale") if any(key in row for _, row in metric_rows)]
    rows: list[list[Any]] = []
    for model, values in published.items():
        rows.append([f"paper {model}", *(None for _ in settings), None, *map(values.get, names), None])
    if "chance" in results[0].summary:
        chances = [results[0].summary["chance"], *(None for _ in names[1:])]
        rows.append(["chance", *(None for _ in settings), None, *chances, None])
    highlight = frozenset(range(len(rows), len(rows) + len(metric_rows)) if rows else ())
    for result, row in metric_rows:
        summary = result.summary
        is_upper_bound = summary.get("proposals", {}).get("is_upper_bound", False)
        name = f"{result.model} (upper bound)" if is_upper_bound else result.model
        cells = [_format_metric_cell(row["metrics"], row.get("intervals", {}), metric) for metric in names]
        truncated = _format_truncated_fraction(summary["truncated"], summary["texts"])
        rows.append([name, *map(row.get, settings), summary["images"], *cells, truncated])
    for result, row in metric_rows:
        if "difference" in row:
            differences = [format_metric_difference(row["difference"], name) for name in names]
            methods = [row[key] if key == "method" else None for key in settings]
            rows.append([f"{results[0].model} minus {result.model}", *methods, None, *differences, None])
    return Table(["model", *settings, "images", *names, "truncated"], rows, highlight)


def _format_metric_cell(metrics: Mapping[str, float], intervals: Mapping[str, Any], name: str) -> str | float | None:
    return format_value_with_interval(metrics[name], intervals[name]) if name in intervals else metrics.get(name)


def format_metric_difference(difference: Mapping[str, Any], name: str) -> str | None:
    metrics, intervals = difference["metrics"], difference["intervals"]
    if name in intervals:
        return format_value_with_interval(metrics[name], intervals[name], "+.1f")
    return f"{metrics[name]:+.1f}" if name in metrics else None


def build_class_metrics_section(results: Sequence[BenchmarkResult]) -> list[Block]:
    """Return a collapsible section with per-class metrics, or [] if the benchmark has no per-class metrics."""
    columns = [(result.model, row) for result in results for row in result.summary.get("rows", ())]
    metric = next((name for name in CLASS_METRICS if columns and name in columns[0][1]), None)
    if metric is None:
        return []
    lines = [f"{n}: {model}, {row['method']}" for n, (model, row) in enumerate(columns, 1)]
    lines += ["", "".join(f"{n:>7}" for n in range(1, len(columns) + 1)) + "  class"]
    for name in columns[0][1][metric]:
        values = [row[metric].get(name) for _, row in columns]
        lines.append("".join(f"{format_cell(value):>7}" for value in values) + f"  {name}")
    return [CollapsibleSection(f"{metric.removeprefix('class ')} per class, %", "\n".join(lines))]


def _format_truncated_fraction(truncated: int | None, texts: int) -> str:
    if truncated is None:
        return "unknown"
    return f"{100 * truncated / max(1, texts):.1f}% of the texts" if truncated else "none"


def _make_recall_row(
    name: str,
    recalls: Sequence[Any],
    intervals: Sequence[str | None] = (None, None),
    median_ranks: Sequence[str | None] = (None, None),
    truncated: str | None = None,
) -> list[Any]:
    cells: list[Any] = [name]
    for n, (interval, median_rank) in enumerate(zip(intervals, median_ranks, strict=True)):
        first, *others = recalls[n * len(KS) : (n + 1) * len(KS)]
        cells += [first, interval, *others, median_rank]
    return [*cells, truncated]


def _subtract_recalls(
    recalls: Mapping[str, Sequence[float | None]], published: Mapping[str, tuple[float | None, ...]]
) -> dict[str, list[str | None]]:
    """Subtract the recalls of all other models and of `REFERENCE_MODELS` from those of the first model."""
    (first_model, first_recalls), *other_models = recalls.items()
    others: dict[str, Sequence[float | None]] = dict(other_models)
    others |= {f"paper {model}": published[model] for model in REFERENCE_MODELS if model in published}
    differences: dict[str, list[str | None]] = {}
    for model, other_recalls in others.items():
        pairs = zip(first_recalls, other_recalls, strict=True)
        differences[f"{first_model} minus {model}"] = [
            None if a is None or b is None else f"{a - b:+.1f}" for a, b in pairs
        ]
    return differences


def _get_recalls_in_both_directions(row: dict[str, Any], suffix: str = "") -> list[float | None]:
    """Return R@1, R@5 and R@10 for I2T, then for T2I. See `get_informative_recalls`."""
    return [recall for direction in DIRECTIONS for recall in get_informative_recalls(row, direction, suffix)]


def get_informative_recalls(row: Mapping[str, Any], direction: str, suffix: str = "") -> list[float | None]:
    """Return R@1, R@5 and R@10. A recall is None if there are so few items that a random order also reaches 100%.

    `row` is a row of `compute_field_metrics`. The suffix " chance" selects the recalls of a random order.
    """
    chances = row[f"{direction} chance"]
    is_trivial = [chances[f"R@{k}"] >= 99.95 for k in KS]  # 99.95 is rounded to 100.0 in tables
    return [None if trivial else row[direction + suffix][f"R@{k}"] for k, trivial in zip(KS, is_trivial, strict=True)]


# ---- verdicts --------------------------------------------------------------------------------------------------------


def describe_percentage(percent: float) -> str:
    """Convert a percentage to a phrase, such as "6 of 10" or "3 of 100"."""
    if percent in (0, 100):
        return "0 of 100" if percent == 0 else "all"
    if percent < 0.5:
        return "fewer than 1 of 100"
    if 9.5 <= percent < 95:
        return f"{percent / 10:.0f} of 10"
    return f"{min(percent, 99):.0f} of 100"


def describe_text_to_image_recall(model: str, row: Mapping[str, Any], captions: str = "captions") -> str:
    """Describe a model's T2I recall in a sentence. `row` is a row of `compute_field_metrics`."""
    images, note = row["images"], ""
    if images < MIN_ROUGH_IMAGES:
        return (
            f"The model cannot be judged from {format_count(images, 'image')}. "
            f"Use at least {MIN_IMAGES} images that are not in the training data."
        )
    if images < MIN_IMAGES:
        low, high = row["T2I interval"][f"R@{K}"]
        note = f" With fewer than {MIN_IMAGES} images, the recall is imprecise (95% interval {low:.0f} to {high:.0f}%)."
    share, chance = describe_percentage(row["T2I"][f"R@{K}"]), describe_percentage(row["T2I chance"][f"R@{K}"])
    return (
        f"{model} ranks the correct image in the top {K} of {images:,} for {share} {captions} "
        f"(random order: {chance}).{note}"
    )


def _describe_difference(
    model: str, baseline: str, difference: float, interval: Sequence[float] | None, metric: str
) -> str:
    if interval is None:
        return f"{model} differs from {baseline} by {difference:+.1f} points of {metric}."
    low, high = interval
    if low > 0:
        limits = format_interval(interval)
        return f"{model} beats {baseline} by {difference:.1f} points of {metric} (95% interval {limits})."
    if high < 0:
        limits = format_interval((-high, -low))
        return f"{model} is {-difference:.1f} points of {metric} worse than {baseline} (95% interval {limits})."
    size = f"{difference:+.1f} points of {metric} (95% interval {format_interval(interval, '+.1f')})"
    return f"The difference from {baseline} may be due to chance: {size}."


def describe_caption_retrieval(encoder: str, metrics: Mapping[str, Any]) -> str:
    """Describe the result of `caption_retrieval_accuracy` in a sentence."""
    images = format_count(metrics["images"], "image")
    if metrics["images"] < MIN_IMAGES:
        return f"The encoder cannot be judged from {images} with two captions. Use at least {MIN_IMAGES} images."
    share = describe_percentage(metrics["CRA"])
    return f"{encoder} retrieves the other caption of the same image for {share} captions ({images})."


def describe_benchmark_results(benchmark: str, results: Sequence[BenchmarkResult]) -> str:
    """Describe the first model's main result on a benchmark, and compare the result with that of the best baseline.

    The first model's truncated embeddings are not used as baselines.
    """
    first = results[0]
    if first.ranks:
        direction, metric = "T2I", "R@10"
        verdict = describe_text_to_image_recall(first.model, first.first_summary_row)
    else:
        metrics = first.first_summary_row["metrics"]
        direction, metric = "metrics", next(name for name in ("group", "mean", *metrics) if name in metrics)
        verdict = f"{first.model} reaches {metrics[metric]:.1f}% {metric} on {benchmark}."
        if metric == "top-1":
            things = "boxes" if "regions" in first.summary else "images"
            share = describe_percentage(metrics[metric])
            verdict = f"{first.model} predicts the correct class for {share} {things} in {benchmark}."
    differences = []
    for result in results[1:]:
        difference = result.first_summary_row.get("difference")
        is_truncated = "full model" in result.summary and result.summary["full model"] == first.model
        if difference and not is_truncated and metric in difference[direction]:
            intervals = difference.get("intervals", difference.get(f"{direction} interval"))
            differences.append((difference[direction][metric], result.model, intervals.get(metric)))
    if differences:
        value, baseline, interval = min(differences)
        verdict += " " + _describe_difference(first.model, baseline, value, interval, metric)
    return verdict
