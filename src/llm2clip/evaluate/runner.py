"""Evaluation of models on the user's data and on public benchmarks, with a report on the results."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from llm2clip.config import EncoderConfig, EvaluateConfig, EvaluateOptions
from llm2clip.data.build_table import build_record_table, read_data_splits
from llm2clip.data.image_facts import count_training_images, load_training_image_hashes
from llm2clip.data.records import Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.arguments import check_evaluation_arguments
from llm2clip.evaluate.benchmarks import get_benchmarks
from llm2clip.evaluate.benchmarks.base import Benchmark, BenchmarkResult
from llm2clip.evaluate.caption_retrieval import TextEncoder, caption_retrieval_accuracy, open_text_encoder
from llm2clip.evaluate.classification import evaluate_classification, evaluate_compositionality
from llm2clip.evaluate.comparison import (
    build_benchmark_section,
    build_caption_retrieval_section,
    describe_benchmark_results,
    describe_caption_retrieval,
)
from llm2clip.evaluate.detection import evaluate_detection
from llm2clip.evaluate.embeddings import EmbeddingSource, open_embedding_source
from llm2clip.evaluate.regions import evaluate_regions
from llm2clip.evaluate.retrieval import analyse_retrieval_errors, compute_retrieval_difference, evaluate_retrieval
from llm2clip.evaluate.segmentation import evaluate_segmentation
from llm2clip.evaluate.short_queries import build_short_query_sections, evaluate_short_queries
from llm2clip.io_utils import MissingFileError, atomic_write_text, format_count, sanitize_file_name
from llm2clip.models.loading import get_display_names
from llm2clip.models.prompts import QueryTemplates
from llm2clip.models.vision.dense import DENSE_VARIANTS
from llm2clip.reports import BAD, Block, Paragraph, render_markdown, write_report
from llm2clip.runs.output_folder import convert_to_plain_types
from llm2clip.runs.ranks import print_once, process_state
from llm2clip.runs.run_description import build_run_section, describe_run


class IncompleteEvaluationError(ValueError):
    """Error raised if an evaluation failed. All other results have been written."""


USER_DATA = "data"  # benchmark name of the user's images and captions
NUM_MISTAKES = 3  # maximum number of caption retrieval mistakes shown in the report
EXAMPLE_QUERIES = 6  # maximum number of example queries, and of failed queries, shown in the report


def evaluate_models(
    models: Sequence[str],
    data: Sequence[str],
    options: EvaluateOptions,
    encoder: EncoderConfig | None = None,
    config: EvaluateConfig | None = None,
) -> list[str]:
    """Evaluate models, print tables, and write results.json, report.md and report.html to `options.out`.

    In a distributed run, each rank encodes a share of the images and texts, and computes all metrics. The main process
    prints and writes the results.

    results.json contains "caption retrieval" (the result of `caption_retrieval_accuracy`), "results" (a list of
    `BenchmarkResult.summary` dicts) and "run" (the result of `describe_run`, and the settings). Each entry of "results"
    also has the following keys:

    - "model": Name of the model.
    - "images trained on": Number of benchmark images on which the model was trained, if known.
    - "difference": For baselines, the first model's metrics minus the baseline's metrics. If the entry has "rows", each
        row has a "difference" instead.
    - "short queries": Retrieval metrics for each query length, if `options.short_queries` is True. In retrieval
        entries, each row has this key and, with templates, "short queries with templates" and "query templates".

    Args:
        models: Model to evaluate, followed by any baselines. See `open_embedding_source`.
        data: Sources of images and captions. If no splits are specified, only the images that `fit` would hold out are
            evaluated.
        encoder: Caption encoder whose caption retrieval accuracy is measured if `models` is empty.
        config: Evaluation settings, such as additional caption fields to evaluate.

    Returns:
        Lines to print at the end: summaries of skipped rows, warnings and the path of the report.

    Raises:
        ValueError: There is nothing to evaluate, a benchmark does not exist, or every evaluation failed.
        IncompleteEvaluationError: Some evaluations failed. All other results have been written.
    """
    start = time.time()
    encoder, config = encoder or EncoderConfig(), config or EvaluateConfig()
    check_evaluation_arguments(models, data, options)
    _check_output_folder_and_variants(options)
    log = _make_skip_log(options, "records")
    title_name = get_display_names(models or [encoder.path])[0]
    evaluation = _EvaluationRun(options)
    if options.captions:
        text_encoder = open_text_encoder(models[0] if models else None, encoder, options.trust_remote_code)
        evaluation.measure_caption_retrieval(title_name, text_encoder, log)
    if data or options.benchmarks:
        user_data = [_read_user_benchmark(data, config, options.columns, log)] if data else []
        benchmarks = [*user_data, *get_benchmarks(options.benchmarks, options.templates or ())]
        evaluation.run_benchmarks(models, benchmarks, log)
    last_lines = [log.summary()] if log.rows_seen and not data else []
    last_lines += evaluation.skipped + evaluation.proposals + evaluation.warnings
    if evaluation.out is not None and process_state().is_main_process:
        settings = {"models": models, "data": data, **vars(options), "encoder": encoder, "config": config}
        page = evaluation.write_results(f"Evaluation of {title_name}", describe_run(time.time() - start), settings)
        last_lines.append(f"Report: {page}")
    if evaluation.failures:
        print_once(*last_lines)
        lines = ["some evaluations failed, but all other evaluations are complete:", *evaluation.failures]
        raise IncompleteEvaluationError("\n".join(lines))
    return last_lines


@dataclass
class _BenchmarkRun:
    """Benchmark to run, with the benchmark's folder, its skip log and the results of all models."""

    benchmark: Benchmark
    folder: Path
    log: SkipLog
    results: list[BenchmarkResult] = field(default_factory=list)


class _EvaluationRun:
    """Results and report of an evaluation. Files are written and errors are analysed only if `options.out` is set.

    If the evaluation of a model on a benchmark fails, the error is recorded in `failures`, and all other evaluations
    continue.
    """

    def __init__(self, options: EvaluateOptions) -> None:
        self.out = Path(options.out) if options.out else None
        self.skipped: list[str] = []  # descriptions of skipped rows and benchmarks
        self.proposals: list[str] = []  # descriptions of the box proposals for detection benchmarks
        self.warnings: list[str] = []
        self.failures: list[str] = []
        self._options = options
        self._runs: list[_BenchmarkRun] = []
        self._results: dict[str, Any] = {}  # contents of results.json
        self._verdict = ""  # verdict of the last section, and of the report
        self._blocks: list[Block] = []
        self._is_distributed = process_state().num_processes > 1

    def write_results(self, title: str, run: dict[str, Any], settings: dict[str, Any]) -> Path:
        """Write results.json, report.html and report.md. Return the path of report.html."""
        assert self.out is not None
        plain_settings = convert_to_plain_types(settings)
        self._save_results("run", run | {"settings": plain_settings})
        problems = [Paragraph(line, BAD) for line in [*self.warnings, *self.failures]]
        settings_text = yaml.safe_dump(plain_settings, sort_keys=False, allow_unicode=True)
        page = self.out / "report.html"
        run_section = build_run_section(run, settings=settings_text)
        run_section += [Paragraph(line) for line in self.skipped]
        write_report(page, title, self._verdict, [*problems, *self._blocks, *run_section])
        return page

    def _save_results(self, key: str, values: Any) -> None:
        self._results[key] = values
        if self.out is not None and process_state().is_main_process:
            text = json.dumps(self._results, indent=1, ensure_ascii=False)
            atomic_write_text(self.out / "results.json", text)

    def _add_report_section(self, title: str, verdict: str, blocks: Sequence[Block]) -> None:
        self._verdict = verdict
        self._blocks += blocks
        tables = [block for block in blocks if not isinstance(block, Paragraph)] if title == "Results" else blocks
        print_once(render_markdown(title, tables, verdict))

    def measure_caption_retrieval(self, name: str, encoder: TextEncoder, log: SkipLog) -> None:
        options = self._options
        metrics = caption_retrieval_accuracy(
            [record.captions for record in build_record_table(options.captions, options.columns, log, "unchecked")],
            encoder,
            num_mistakes=NUM_MISTAKES,
        )
        self._save_results("caption retrieval", metrics)
        blocks = build_caption_retrieval_section(name, metrics)
        self._add_report_section("Caption retrieval", describe_caption_retrieval(name, metrics), blocks)

    def run_benchmarks(self, models: Sequence[str], benchmarks: Sequence[Benchmark], log: SkipLog) -> None:
        """Evaluate all models on all benchmarks and add the results to the report.

        `log` records skipped rows of the user's data. Each public benchmark has a separate log.
        """
        missing = []
        for benchmark in benchmarks:
            try:
                folder = benchmark.find_folder(Path(self._options.root))
            except MissingFileError as error:
                missing.append(_describe_evaluation_failure(benchmark.name, benchmark, error))
                continue
            name = f"{len(self._runs)}-{benchmark.name}"
            benchmark_log = log if benchmark.name == USER_DATA else _make_skip_log(self._options, name)
            self._runs.append(_BenchmarkRun(benchmark, folder, benchmark_log))
        for n, name in enumerate(get_display_names(models) if self._runs else []):
            for _ in self._evaluate_model(models[n], name, is_baseline=n > 0):
                # Save the results after each benchmark, so that they are not lost if a later benchmark fails.
                self._save_results("results", self._get_result_summaries())
        with_results = [run for run in self._runs if run.results]
        if not with_results:
            raise ValueError("\n".join(["nothing could be evaluated:", *missing, *self.failures]))
        self._collect_report_messages(missing)
        blocks: list[Block] = []
        for run in with_results:
            blocks += build_benchmark_section(run.benchmark, run.results)
        blocks += build_short_query_sections([(run.benchmark, run.results) for run in self._runs])
        first = with_results[0]
        self._add_report_section("Results", describe_benchmark_results(first.benchmark.name, first.results), blocks)

    def _collect_report_messages(self, missing: list[str]) -> None:
        for run in self._runs:
            if run.log.skipped or run.benchmark.name == USER_DATA:  # always summarise the user's data
                self.skipped.append(f"{run.benchmark.name}: {run.log.summary()}.")
            if run.results and "proposals" in run.results[0].summary:
                description = run.results[0].summary["proposals"]["description"]
                self.proposals.append(f"{run.benchmark.name}: {description}")
        if "all" in self._options.benchmarks:  # "all" includes benchmarks that have not been downloaded
            self.skipped += missing
        else:
            self.failures = missing + self.failures
        for summary in self._get_result_summaries():
            if summary.get("images trained on"):
                self.warnings.append(
                    f"Warning: {summary['model']} was trained on {summary['images trained on']:,} of the images in "
                    f"{summary['benchmark']}, so the results do not reflect performance on new images."
                )

    def _evaluate_model(self, model: str, name: str, is_baseline: bool) -> Iterator[BenchmarkResult]:
        """Evaluate a model on all benchmarks, and yield the result for each benchmark.

        Embeddings truncated to `EvaluateOptions.dims` are treated as additional baselines. Baselines that cannot be
        loaded are skipped.
        """
        try:
            cache_dir = self.out / "vectors" if self.out else None
            embeddings = open_embedding_source(model, self._runs[0].log, cache_dir, self._options.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            if not is_baseline or self._is_distributed:  # if a single rank skipped a model, the other ranks would hang
                raise
            self.failures.append(f"Skipped {name}: {error}")
            return
        sources = {name: embeddings}
        for dim in self._options.dims:
            if dim == embeddings.embed_dim:
                continue
            try:
                sources[f"{name}, {dim} dimensions"] = embeddings.truncate(dim)
            except ValueError as error:
                if not is_baseline:
                    raise
                self.failures.append(f"Skipped {name}: {error}")
        training_images = load_training_image_hashes(model)
        for run in self._runs:
            for n, (source_name, source) in enumerate(sources.items()):
                source.log = run.log
                result = self._evaluate_embedding_source(run, source, source_name, training_images)
                if result is not None:
                    self._analyse_benchmark_result(result, is_baseline or n > 0)
                    if self._options.dims:
                        result.summary |= {"full model": name, "dimensions": source.embed_dim}
                    run.results.append(result)
                    yield result

    def _evaluate_embedding_source(
        self, run: _BenchmarkRun, embeddings: EmbeddingSource, name: str, training_images: np.ndarray | None
    ) -> BenchmarkResult | None:
        """Evaluate embeddings on a benchmark. If the evaluation fails, record the error and return None."""
        benchmark = run.benchmark
        print_once(f"{name}: {benchmark.name}")
        try:
            result = _evaluate_benchmark(benchmark, run.folder, embeddings, self._options)
        except (OSError, ValueError) as error:
            # Invalid data causes the same error on every rank, but other errors may occur on a single rank.
            if self._is_distributed and not isinstance(error, MissingFileError | ValueError):
                raise
            self.failures.append(_describe_evaluation_failure(f"{name} on {benchmark.name}", benchmark, error))
            return None
        result.model = name
        if training_images is not None and process_state().is_main_process:
            result.summary["images trained on"] = count_training_images(training_images, result.images)
        if run.results:
            _add_metric_differences(run.results[0], result)
        if self._options.short_queries:
            self._evaluate_short_queries(result, embeddings)
        return result

    def _evaluate_short_queries(self, result: BenchmarkResult, embeddings: EmbeddingSource) -> None:
        templates = embeddings.query_templates
        if self._options.templates is not None:
            templates = QueryTemplates(tuple(self._options.templates))
        for caption_field, ranks in result.ranks.items():
            try:
                scores = evaluate_short_queries(embeddings, ranks, templates)
            except ValueError as error:
                benchmark = result.summary["benchmark"]
                self.failures.append(
                    f"Skipped short queries for {result.model} on {benchmark}, {caption_field}: {error}"
                )
                continue
            result.short_queries[caption_field] = scores
            row = next(row for row in result.summary["rows"] if row["captions"] == caption_field)
            row["short queries"] = [length.to_dict() for length in scores.plain]
            if scores.with_templates is not None:
                row["short queries with templates"] = [length.to_dict() for length in scores.with_templates]
                row["query templates"] = dataclasses.asdict(templates)

    def _analyse_benchmark_result(self, result: BenchmarkResult, is_baseline: bool) -> None:
        """Analyse errors and draw examples for the report. Then free the memory of images and embeddings."""
        if self.out is not None and process_state().is_main_process:
            for n, (caption_field, ranks) in enumerate(result.ranks.items()):
                # Examples in all 36 languages of Crossmodal-3600 would add 2,000 images to the report.
                num_queries = EXAMPLE_QUERIES if n == 0 and not is_baseline else 0
                result.error_analysis[caption_field] = analyse_retrieval_errors(ranks, num_queries)
            if result.draw_examples is not None and not is_baseline:
                result.examples = result.draw_examples()
        result.draw_examples = None
        empty = torch.empty(0)
        result.ranks = {key: replace(ranks, images=empty, texts=empty) for key, ranks in result.ranks.items()}

    def _get_result_summaries(self) -> list[dict[str, Any]]:
        return [{"model": result.model, **result.summary} for run in self._runs for result in run.results]


def _evaluate_benchmark(
    benchmark: Benchmark, folder: Path, embeddings: EmbeddingSource, options: EvaluateOptions
) -> BenchmarkResult:
    data, variants = benchmark.load(folder), options.dense_variants
    if benchmark.kind == "retrieval":
        result = evaluate_retrieval(data, embeddings)
    elif benchmark.kind == "compositional":
        result = evaluate_compositionality(data, embeddings)
    elif benchmark.kind == "classification":
        result = evaluate_classification(data, embeddings)
    elif benchmark.kind == "regions":
        result = evaluate_regions(data, embeddings, variants)
    elif benchmark.kind == "segmentation":
        result = evaluate_segmentation(data, embeddings, variants)
    else:
        result = evaluate_detection(data, embeddings, options)
    result.summary = {"benchmark": benchmark.name, "kind": benchmark.kind, **result.summary}
    return result


def _add_metric_differences(first: BenchmarkResult, result: BenchmarkResult) -> None:
    if "" in first.bootstrap:
        result.summary["difference"] = first.bootstrap[""].subtract(result.bootstrap[""])
    for row in result.summary.get("rows", ()):
        caption_field, method = row.get("captions"), row.get("method")
        if caption_field in first.ranks:
            row["difference"] = compute_retrieval_difference(first.ranks[caption_field], result.ranks[caption_field])
        elif method in first.bootstrap:
            row["difference"] = first.bootstrap[method].subtract(result.bootstrap[method])


def _check_output_folder_and_variants(options: EvaluateOptions) -> None:
    if process_state().num_processes > 1 and options.out is None:
        raise ValueError("a distributed evaluation requires --out: ranks exchange embeddings via the output folder")
    for variant in options.dense_variants:
        if variant not in DENSE_VARIANTS:
            raise ValueError(f"unknown dense variant {variant!r}: choose from {', '.join(DENSE_VARIANTS)}")


def _read_user_benchmark(
    data: Sequence[str], config: EvaluateConfig, columns: dict[str, str], log: SkipLog
) -> Benchmark:
    """Return the user's data as a retrieval benchmark. Raise ValueError if only some of the sources specify splits."""
    without_splits = [source for source in data if not Source.parse(source).splits]
    if not without_splits:
        splits = read_data_splits([], replace(config, data=list(data)), columns, log)
    elif len(without_splits) == len(data):
        splits = read_data_splits(data, config, columns, log)
    else:
        raise ValueError(
            f"{without_splits[0]} specifies no splits: specify splits for all sources (PATH@test) or for none. "
            "If no splits are specified, only the images that `fit` would hold out are evaluated"
        )
    num_images = max(map(len, splits.held_out.values()))
    description = splits.rule if without_splits and not config.data else format_count(num_images, "image")
    print_once(f"Evaluating {description}")
    return Benchmark(
        name=USER_DATA,
        kind="retrieval",
        description=description.partition(" (")[0],
        folders=(str(Path.cwd()),),  # any existing folder, because `read` ignores it
        read=lambda _: splits.held_out,
        source="images with captions",
    )


def _describe_evaluation_failure(name: str, benchmark: Benchmark, error: Exception) -> str:
    source = f". Required files: {benchmark.source}" if isinstance(error, MissingFileError) else ""
    return f"Skipped {name}: {error}{source}"


def _make_skip_log(options: EvaluateOptions, name: str) -> SkipLog:
    file = None
    if options.out is not None and process_state().is_main_process:
        file = Path(options.out) / "skipped" / f"{sanitize_file_name(name)}.jsonl"
    return SkipLog(file, options.max_skipped)
