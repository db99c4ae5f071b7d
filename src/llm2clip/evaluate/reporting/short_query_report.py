"""Report sections on short queries: retrieval metrics by query length, alongside zero-shot accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llm2clip.evaluate.benchmark_eval import BenchmarkResult
from llm2clip.evaluate.benchmarks import Benchmark
from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.reporting.comparison import format_difference
from llm2clip.evaluate.short_queries import METRICS, LengthScores, mean_intervals
from llm2clip.html_report import Block, Heading, Paragraph, Plot, Table, format_interval, with_interval

DEFINITION = (
    "Queries of one to three words are words and phrases from the captions. Every image with a caption that mentions "
    "the query is a correct answer. Longer queries are complete captions. Intervals are 95% bootstrap intervals over "
    "queries. Images that show what the query names, but whose captions do not mention it, count as wrong answers."
)
Curves = Mapping[str, Sequence[LengthScores]]
"""Results for each query length, keyed by model name, with the suffix ", with templates" if templates are used."""


def short_query_blocks(results: Sequence[tuple[Benchmark, Sequence[BenchmarkResult]]]) -> list[Block]:
    """Return one section for each caption field for which short queries were evaluated.

    The first table shows mAP by query length, and top-1 accuracy on each classification benchmark of the same run.

    Args:
        results: Results on each benchmark of the run, in the order of the models.
    """
    accuracies = {b.name: _accuracy_cells(r) for b, r in results if b.kind == "classification"}
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
                Heading(f"{benchmark.name}, {field}: quality by query length"),
                overview_table(curves, accuracies),
                _length_plot(curves),
                Paragraph(DEFINITION),
                metrics_table(curves),
            ]
    return blocks


def overview_table(curves: Curves, accuracies: Mapping[str, Mapping[str, str | None]]) -> Table:
    """Return a table of mAP by query length and of zero-shot accuracy, in percent.

    The last rows show the difference between the first model and each other model. Differences of mAP include 95%
    confidence intervals, which are computed from paired bootstrap resamples.

    Args:
        accuracies: Top-1 accuracy for each row of the table, keyed by benchmark and by the first cell of the row.
    """
    name, first = next(iter(curves.items()))
    header = ["model", *(f"{length.words} {'word' if length.words == '1' else 'words'}: mAP" for length in first)]
    header += [f"{benchmark}: top-1" for benchmark in accuracies]
    rows: list[list[Any]] = [["chance", *(100 * float(s.chance[0]) for s in first), *([None] * len(accuracies))]]
    for model, lengths in curves.items():
        rows.append([model, *map(_map_cell, lengths), *(values.get(model) for values in accuracies.values())])
    highlight = frozenset(range(1, len(rows)))
    for other, lengths in list(curves.items())[1:]:
        cells: list[str | None] = [_difference_cell(a, b) for a, b in zip(first, lengths, strict=True)]
        label = f"{name} minus {other}"
        rows.append([label, *cells, *(values.get(label) for values in accuracies.values())])
    return Table(header, rows, highlight)


def _accuracy_cells(results: Sequence[BenchmarkResult]) -> dict[str, str | None]:
    """Return the top-1 accuracy of each model and each difference, keyed by the first cell of the row."""
    cells: dict[str, str | None] = {}
    for result in results:
        summary = result.summary
        cells[result.model] = with_interval(summary["metrics"]["top-1"], summary["intervals"]["top-1"])
        if "difference" in summary:
            cells[f"{results[0].model} minus {result.model}"] = format_difference(summary["difference"], "top-1")
    return cells


def metrics_table(curves: Curves) -> Table:
    """Return a table of all metrics, with one row for each model and query length."""
    rows: list[list[Any]] = []
    for model, lengths in curves.items():
        for length in lengths:
            entry = length.metrics()
            cells = []
            for name in METRICS:
                cells += [entry[name], format_interval(entry[f"{name} interval"])]
            rows.append([model, length.words, entry["queries"], entry["relevant images per query"], *cells])
    columns = [column for name in METRICS for column in (f"{name}, %", "95% interval")]
    return Table(["model", "words", "queries", "relevant images", *columns], rows)


def _map_cell(length: LengthScores) -> str:
    return with_interval(100 * float(length.scores[:, 0].mean()), mean_intervals(length.scores)[:, 0].tolist())


def _difference_cell(first: LengthScores, other: LengthScores) -> str | None:
    """Return the mean difference in mAP, or None if the models were evaluated on different queries."""
    if first.queries != other.queries:
        return None
    differences = first.scores - other.scores
    interval = mean_intervals(differences, bounds=(-1.0, 1.0))[:, 0].tolist()
    return with_interval(100 * float(differences[:, 0].mean()), interval, "+.1f")


def _length_plot(curves: Curves) -> Plot:
    first = next(iter(curves.values()))
    values, bands = {}, {}
    for name, lengths in curves.items():
        values[name] = [100 * float(length.scores[:, 0].mean()) for length in lengths]
        bands[name] = [tuple(mean_intervals(length.scores)[:, 0].tolist()) for length in lengths]
    svg = plots.plot_curves(
        values,
        x=range(len(first)),
        xlabel="words in the query",
        ylabel="mAP, %",
        bands=bands,
        tick_labels=[length.words for length in first],
    )
    return Plot(svg, "mAP by the number of words in the query, with 95% confidence intervals.")
