"""Report sections that compare models with each other and with published results: tables, plots and example images."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.evaluate.benchmark_eval import BenchmarkResult
from llm2clip.evaluate.benchmarks import Benchmark
from llm2clip.evaluate.benchmarks.coco_instances import DEGENERATE
from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.reporting.error_analysis import build_error_analysis_blocks
from llm2clip.evaluate.short_queries import METRICS, LengthScores, compute_mean_intervals
from llm2clip.published_results import CRA, CRA_NOTE, get_published_metrics, get_published_notes, get_published_rows
from llm2clip.reports import (
    Block,
    Details,
    Figure,
    Heading,
    Paragraph,
    Table,
    format_cell,
    format_interval,
    format_with_interval,
)

DIRECTIONS = ("I2T", "T2I")
# Names of published LLM2CLIP models to compare with the first evaluated model. See `get_published_rows`.
REFERENCE_MODELS = ("2024: Llama3-8B-CC", "2024: EVA02 + LLM2CLIP", "2026: Llama-3.1-8B-CC", "2026: SigLIP2 + LLM2CLIP")
CLASS_METRICS = ("class top-1", "IoU", "class AP50")  # per-class metrics in the rows of `BenchmarkResult.summary`
MEAN_BENCHMARKS = ("xm3600",)  # benchmarks for which only the mean over all languages was published
SHORT_QUERY_NOTE = (
    "One- to three-word queries are words and phrases from the captions. Every image with a caption that mentions the "
    "query is a correct answer. Other images are wrong answers, even if they show what the query names. Longer queries "
    "are complete captions. Intervals are 95% bootstrap intervals over queries."
)
BYTES_PER_VALUE = 2  # search indexes store vectors in float16
Curves = Mapping[str, Sequence[LengthScores]]
"""Results for each query length, keyed by model name. The key ends in ", with templates" if templates are used."""


def build_benchmark_blocks(benchmark: Benchmark, results: Sequence[BenchmarkResult]) -> list[Block]:
    """Return the report section for a benchmark. Models appear in the order of `results`."""
    blocks: list[Block] = [Heading(f"{benchmark.name}: {_describe_benchmark(benchmark, results[0].summary)}")]
    notes = [Paragraph(note) for note in get_published_notes(benchmark.name)]
    if benchmark.kind != "retrieval":
        blocks += [build_metrics_table(results, get_published_metrics(benchmark.name)), *build_class_details(results)]
        if "proposals" in results[0].summary:
            blocks.append(Paragraph(results[0].summary["proposals"]["description"]))
        return [*blocks, *notes, *(block for result in results for block in result.examples)]
    published = get_published_rows(benchmark.name)
    is_mean = benchmark.name in MEAN_BENCHMARKS
    if is_mean:
        blocks += [Heading("Mean over the languages", 3), build_mean_recall_table(results, published)]
    for n, first_row in enumerate(results[0].summary["rows"]):
        field_name = first_row["captions"]
        rows = {}
        for result in results:
            rows[result.model] = next(row for row in result.summary["rows"] if row["captions"] == field_name)
        blocks.append(Heading(f"{field_name}: {first_row['images']:,} images, {first_row['texts']:,} texts", 3))
        blocks.append(build_recall_table(rows, published if n == 0 and not is_mean else {}))
        analyses = {r.model: r.error_analysis[field_name] for r in results if field_name in r.error_analysis}
        if analyses:
            blocks += build_error_analysis_blocks(analyses)
    return [*blocks, *build_dimension_blocks(results), *notes]


def _describe_benchmark(benchmark: Benchmark, summary: Mapping[str, Any]) -> str:
    """Return the benchmark's description, or the size of the evaluated part if not all of it was evaluated."""
    if benchmark.size is None and "images" in summary:
        regions = f", {summary['regions']:,} boxes" if "regions" in summary else ""
        return f"{benchmark.description}: {summary['images']:,} images{regions}"
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
    has_published = get_published_rows(benchmark.name) or get_published_metrics(benchmark.name)
    note = "; published results are for the complete benchmark" if has_published else ""
    return f"part of the benchmark, {count:,} of {total:,} {unit}{note}"


def build_caption_retrieval_blocks(name: str, metrics: dict[str, Any]) -> list[Block]:
    """Return the report section on caption retrieval, including the CRA in the paper (5,000 images of COCO).

    Args:
        metrics: Result of `caption_retrieval_accuracy`.
    """
    rows: list[list[Any]] = [[f"paper: {model}, COCO", cra, None, 5000] for model, cra in CRA.items()]
    rows.append([name, metrics["CRA"], format_interval(metrics["CRA interval"]), metrics["images"]])
    rows.append(["chance", metrics["chance"], None, metrics["images"]])
    direction_rows: list[list[Any]] = []
    for protocol in ("first to second", "second to first", "all pairs"):
        if protocol in metrics:
            chance = metrics["all pairs chance"]["R@1"] if protocol == "all pairs" else metrics["chance"]
            direction_rows.append([protocol, *_get_recalls(metrics[protocol]), chance])
    truncated = "unknown" if metrics["truncated"] is None else f"{metrics['truncated']:,}"
    blocks: list[Block] = [
        Heading("CRA: the first two captions of each image retrieve each other"),
        Table(["text encoder", "CRA, %", "95% interval", "images"], rows, highlight=frozenset([len(CRA)])),
        Paragraph(CRA_NOTE),
        Table(["direction", *(f"R@{k}, %" for k in KS), "chance R@1"], direction_rows),
        Paragraph(
            f"Mean cosine: {metrics['positive cosine']:.3f} for captions of the same image, "
            f"{metrics['negative cosine']:.3f} for captions of different images."
        ),
        Paragraph(
            f"Images excluded because they have fewer than two distinct captions: {metrics['excluded']:,}. Captions "
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
    """Return a recall table with rows for the published results, the chance level and the evaluated models.

    The last rows contain the differences between the first model and each baseline, with paired confidence intervals,
    and between the first model and each published model in `REFERENCE_MODELS`.

    Args:
        results: Metrics, keyed by model name. See `compute_field_metrics` and `compute_retrieval_difference`.
        published: Published recall, keyed by model name. See `get_published_rows`.
    """
    header = ["model"]
    for direction in DIRECTIONS:
        header += [f"{direction} R@1", "95% interval", "R@5", "R@10", f"{direction} median rank"]
    header.append("truncated")
    rows = [_make_recall_row(f"paper {model}", recalls) for model, recalls in published.items()]
    first_row = next(iter(results.values()))
    rows.append(_make_recall_row("chance", _get_both_recalls(first_row, " chance")))
    highlight = frozenset(range(len(rows), len(rows) + len(results)))
    for model, row in results.items():
        limits = [row[f"{direction} interval"]["R@1"] for direction in DIRECTIONS]
        rows.append(
            _make_recall_row(
                model,
                _get_both_recalls(row),
                intervals=[format_interval(interval) for interval in limits],
                median_ranks=[f"{row[direction]['median rank']:g}" for direction in DIRECTIONS],
                truncated=format_truncated(row["truncated"], row["texts"]),
            )
        )
    differences = _subtract_recalls({model: _get_both_recalls(row) for model, row in results.items()}, published)
    first_model = next(iter(results))
    paired = {f"{first_model} minus {model}": row.get("difference") for model, row in results.items()}
    for name, values in differences.items():
        difference = paired.get(name)
        limits = [difference[f"{direction} interval"]["R@1"] if difference else None for direction in DIRECTIONS]
        rows.append(
            _make_recall_row(name, values, [interval and format_interval(interval, "+.1f") for interval in limits])
        )
    return Table(header, rows, highlight)


def build_dimension_blocks(results: Sequence[BenchmarkResult]) -> list[Block]:
    """Return a plot and a table of R@1 by number of dimensions, for the first caption field.

    The result is empty if no truncated embeddings were evaluated (`EvaluateOptions.dims`).
    """
    recalls: dict[str, dict[int, list[float]]] = {}  # (I2T R@1, T2I R@1), keyed by model and number of dimensions
    for result in results:
        if "dimensions" in result.summary:
            row = result.summary["rows"][0]
            by_dim = recalls.setdefault(result.summary["full model"], {})
            by_dim[result.summary["dimensions"]] = [row[direction]["R@1"] for direction in DIRECTIONS]
    all_dims = sorted({dim for by_dim in recalls.values() for dim in by_dim})
    if not all_dims:
        return []
    curves, rows = {}, []
    for model, by_dim in recalls.items():
        full = by_dim[max(by_dim)]
        for n, direction in enumerate(DIRECTIONS):
            curves[f"{model} {direction}"] = [by_dim[dim][n] if dim in by_dim else math.nan for dim in all_dims]
        for dim in sorted(by_dim):
            (i2t, t2i), (full_i2t, full_t2i) = by_dim[dim], full
            fractions = [100 * i2t / full_i2t if full_i2t else None, 100 * t2i / full_t2i if full_t2i else None]
            rows.append([model, dim, BYTES_PER_VALUE * dim, i2t, t2i, *fractions])
    labels = [f"{dim}\n{BYTES_PER_VALUE * dim:,} B" for dim in all_dims]
    positions = range(len(all_dims))
    svg = plots.plot_curves(curves, positions, "dimensions and bytes per image", "R@1, %", tick_labels=labels)
    header = ["model", "dimensions", "bytes per image", *(f"{direction} R@1" for direction in DIRECTIONS)]
    header += [f"{direction}, % of full size" for direction in DIRECTIONS]
    caption = "R@1 with truncated embeddings. The sizes in bytes are those of float16 vectors, as in search indexes."
    return [Heading("Truncated embeddings", 3), Table(header, rows), Figure(svg, caption)]


def build_mean_recall_table(
    results: Sequence[BenchmarkResult], published: Mapping[str, tuple[float | None, ...]]
) -> Table:
    """Return a table of recall averaged over caption fields, without chance levels."""
    means = {}
    for result in results:
        recalls = [_get_both_recalls(row) for row in result.summary["rows"]]  # (fields, 6)
        means[result.model] = [statistics.fmean(values) for values in zip(*recalls, strict=True)]
    rows: list[list[Any]] = [[f"paper {model}", *recalls] for model, recalls in published.items()]
    highlight = frozenset(range(len(rows), len(rows) + len(results)))
    rows += [[model, *recalls] for model, recalls in means.items()]
    rows += [[name, *values] for name, values in _subtract_recalls(means, published).items()]
    return Table(["model", *(f"{direction} R@{k}" for direction in DIRECTIONS for k in KS)], rows, highlight)


def build_metrics_table(results: Sequence[BenchmarkResult], published: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a metrics table for a benchmark of any kind except "retrieval".

    The rows show the published results (see `get_published_metrics`), the chance level (unless it is a metric), and the
    results of each model and method. The last rows show the differences between the first model and each baseline, with
    paired confidence intervals. The method and logit scale columns are omitted if no row uses them.
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
        truncated = format_truncated(summary["truncated"], summary["texts"])
        rows.append([name, *map(row.get, settings), summary["images"], *cells, truncated])
    for result, row in metric_rows:
        if "difference" in row:
            differences = [format_difference(row["difference"], name) for name in names]
            methods = [row[key] if key == "method" else None for key in settings]
            rows.append([f"{results[0].model} minus {result.model}", *methods, None, *differences, None])
    return Table(["model", *settings, "images", *names, "truncated"], rows, highlight)


def _format_metric_cell(metrics: Mapping[str, float], intervals: Mapping[str, Any], name: str) -> str | float | None:
    return format_with_interval(metrics[name], intervals[name]) if name in intervals else metrics.get(name)


def format_difference(difference: Mapping[str, Any], name: str) -> str | None:
    """Format one metric from the result of `BootstrapMetrics.subtract`, e.g. "+1.2 (-0.3 to +2.5)"."""
    metrics, intervals = difference["metrics"], difference["intervals"]
    if name in intervals:
        return format_with_interval(metrics[name], intervals[name], "+.1f")
    return f"{metrics[name]:+.1f}" if name in metrics else None


def build_class_details(results: Sequence[BenchmarkResult]) -> list[Block]:
    """Return a collapsed section with the per-class metrics of each model and method, or [] if there are none."""
    columns = [(result.model, row) for result in results for row in result.summary.get("rows", ())]
    metric = next((name for name in CLASS_METRICS if columns and name in columns[0][1]), None)
    if metric is None:
        return []
    lines = [f"{n}: {model}, {row['method']}" for n, (model, row) in enumerate(columns, 1)]
    lines += ["", "".join(f"{n:>7}" for n in range(1, len(columns) + 1)) + "  class"]
    for name in columns[0][1][metric]:
        values = [row[metric].get(name) for _, row in columns]
        lines.append("".join(f"{format_cell(value):>7}" for value in values) + f"  {name}")
    return [Details(f"{metric.removeprefix('class ')} per class, %", "\n".join(lines))]


def format_truncated(truncated: int | None, texts: int) -> str:
    """Format the percentage of texts that exceed a model's maximum length."""
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
    """Return a row of `build_recall_table`. `recalls` must be ordered as in `_get_both_recalls`."""
    cells: list[Any] = [name]
    for recalls_of_direction, interval, median_rank in zip(
        (recalls[: len(KS)], recalls[len(KS) :]), intervals, median_ranks, strict=True
    ):
        cells += [recalls_of_direction[0], interval, *recalls_of_direction[1:], median_rank]
    return [*cells, truncated]


def _subtract_recalls(
    recalls: Mapping[str, Sequence[float]], published: Mapping[str, tuple[float | None, ...]]
) -> dict[str, list[str | None]]:
    """Subtract the recall of each other model, including `REFERENCE_MODELS`, from the recall of the first model."""
    (first_model, first_recalls), *other_models = recalls.items()
    others: dict[str, Sequence[float | None]] = dict(other_models)
    others |= {f"paper {model}": published[model] for model in REFERENCE_MODELS if model in published}
    differences: dict[str, list[str | None]] = {}
    for model, other_recalls in others.items():
        pairs = zip(first_recalls, other_recalls, strict=True)
        differences[f"{first_model} minus {model}"] = [None if b is None else f"{a - b:+.1f}" for a, b in pairs]
    return differences


def _get_both_recalls(row: dict[str, Any], suffix: str = "") -> list[float]:
    """Return R@1, R@5 and R@10 for I2T, followed by R@1, R@5 and R@10 for T2I."""
    return [value for direction in DIRECTIONS for value in _get_recalls(row[direction + suffix])]


def _get_recalls(metrics: dict[str, float]) -> list[float]:
    return [metrics[f"R@{k}"] for k in KS]


# ---- short queries ---------------------------------------------------------------------------------------------------


def build_short_query_blocks(results: Sequence[tuple[Benchmark, Sequence[BenchmarkResult]]]) -> list[Block]:
    """Return one report section per caption field that has short-query results.

    The first table in a section shows mAP by query length and top-1 accuracy on each of the classification benchmarks.

    Args:
        results: All benchmarks in the run, each with one result per model.
    """
    accuracies = {b.name: _format_accuracy_cells(r) for b, r in results if b.kind == "classification"}
    blocks: list[Block] = []
    for benchmark, model_results in results:
        for field in dict.fromkeys(name for result in model_results for name in result.short_queries):
            curves = {}
            for result in model_results:
                scores = result.short_queries.get(field)
                if scores is not None:
                    curves[result.model] = scores.plain
                    if scores.with_templates is not None:
                        curves[f"{result.model}, with templates"] = scores.with_templates
            blocks += [
                Heading(f"{benchmark.name}, {field}: retrieval quality by query length"),
                build_overview_table(curves, accuracies),
                _plot_query_lengths(curves),
                Paragraph(SHORT_QUERY_NOTE),
                _build_short_query_metrics_table(curves),
            ]
    return blocks


def build_overview_table(curves: Curves, accuracies: Mapping[str, Mapping[str, str | None]]) -> Table:
    """Return a table of mAP by query length and of zero-shot accuracy, both in percent.

    The last rows show the difference between the first model and each other model. mAP differences come with 95%
    confidence intervals from paired bootstrap resamples.

    Args:
        accuracies: Formatted top-1 accuracies, keyed by benchmark name and then by row label.
    """
    name, first = next(iter(curves.items()))
    header = ["model", *(f"{length.words} {'word' if length.words == '1' else 'words'}: mAP" for length in first)]
    header += [f"{benchmark}: top-1" for benchmark in accuracies]
    rows: list[list[Any]] = [["chance", *(100 * float(s.chance[0]) for s in first), *([None] * len(accuracies))]]
    for model, lengths in curves.items():
        rows.append([model, *map(_format_mean_ap, lengths), *(values.get(model) for values in accuracies.values())])
    highlight = frozenset(range(1, len(rows)))
    for other, lengths in list(curves.items())[1:]:
        cells: list[str | None] = [_format_difference_cell(a, b) for a, b in zip(first, lengths, strict=True)]
        label = f"{name} minus {other}"
        rows.append([label, *cells, *(values.get(label) for values in accuracies.values())])
    return Table(header, rows, highlight)


def _format_accuracy_cells(results: Sequence[BenchmarkResult]) -> dict[str, str | None]:
    """Return each model's top-1 accuracy and its difference from the first model's, keyed by row label."""
    cells: dict[str, str | None] = {}
    for result in results:
        summary = result.summary
        cells[result.model] = format_with_interval(summary["metrics"]["top-1"], summary["intervals"]["top-1"])
        if "difference" in summary:
            cells[f"{results[0].model} minus {result.model}"] = format_difference(summary["difference"], "top-1")
    return cells


def _build_short_query_metrics_table(curves: Curves) -> Table:
    """Return a table of all short-query metrics, with one row per model and query length."""
    rows: list[list[Any]] = []
    for model, lengths in curves.items():
        for length in lengths:
            entry = length.to_dict()
            cells = []
            for name in METRICS:
                cells += [entry[name], format_interval(entry[f"{name} interval"])]
            rows.append([model, length.words, entry["queries"], entry["relevant images per query"], *cells])
    columns = [column for name in METRICS for column in (f"{name}, %", "95% interval")]
    return Table(["model", "words", "queries", "relevant images", *columns], rows)


def _format_mean_ap(length: LengthScores) -> str:
    return format_with_interval(length.mean_ap, length.intervals[:, 0].tolist())


def _format_difference_cell(first: LengthScores, other: LengthScores) -> str | None:
    """Format the mean difference in mAP. Return None if the models were evaluated on different queries."""
    if first.queries != other.queries:
        return None
    differences = first.scores - other.scores
    interval = compute_mean_intervals(differences, bounds=(-1.0, 1.0))[:, 0].tolist()
    return format_with_interval(100 * float(differences[:, 0].mean()), interval, "+.1f")


def _plot_query_lengths(curves: Curves) -> Figure:
    points = {}
    for name, lengths in curves.items():
        points[name] = [(length.mean_ap, *length.intervals[:, 0].tolist()) for length in lengths]
    labels = [length.words for length in next(iter(curves.values()))]
    svg = plots.plot_interval_curves(points, labels, "words in the query", "mAP, %")
    return Figure(svg, "mAP by query length in words, with 95% confidence intervals.")
