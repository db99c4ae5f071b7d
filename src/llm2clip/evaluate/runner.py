"""Evaluation of one or more models on the user's data and on public benchmarks, with a report of the results."""

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
from llm2clip.data.build_table import open_table
from llm2clip.data.image_hashes import count_training_images, load_training_image_hashes
from llm2clip.data.records import Source
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.splits import read_splits
from llm2clip.evaluate.benchmark_eval import BenchmarkResult, run_benchmark
from llm2clip.evaluate.benchmarks import Benchmark, get_benchmarks, has_user_data
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy, open_text_encoder
from llm2clip.evaluate.embeddings import EmbeddingSource, open_embedding_source
from llm2clip.evaluate.reporting.comparison import (
    build_benchmark_blocks,
    build_caption_retrieval_blocks,
    build_short_query_blocks,
)
from llm2clip.evaluate.reporting.error_analysis import analyze_errors
from llm2clip.evaluate.reporting.verdicts import describe_caption_retrieval, describe_results
from llm2clip.evaluate.retrieval import compute_retrieval_difference
from llm2clip.evaluate.short_queries import score_short_queries
from llm2clip.io_utils import MissingFileError, atomic_write_text, sanitize_name
from llm2clip.models.loading import get_display_names
from llm2clip.models.prompts import QueryTemplates, check_templates
from llm2clip.models.vision.dense import DENSE_VARIANTS
from llm2clip.reports import BAD, Block, Paragraph, render_markdown, write_report
from llm2clip.runs.output_folder import to_plain_types
from llm2clip.runs.ranks import print_once, process_state
from llm2clip.runs.run_description import build_run_section, describe_run


class IncompleteEvaluationError(ValueError):
    """Some of the requested evaluations failed. Raised only after all other results have been written."""


USER_DATA = "data"  # benchmark name for the user's own images and captions
EXAMPLE_QUERIES = 6  # maximum number of example queries, and of failed queries, that the report shows


def evaluate_models(
    models: Sequence[str],
    data: Sequence[str],
    options: EvaluateOptions,
    encoder: EncoderConfig | None = None,
    config: EvaluateConfig | None = None,
) -> list[str]:
    """Evaluate models, print tables, and write results.json, report.md and report.html to `options.out`.

    In a distributed run, each rank encodes some of the images and texts, and then computes all metrics. The main
    process prints and writes the results.

    results.json contains "caption retrieval" (the result of `caption_retrieval_accuracy`), "results" and "run" (the
    result of `describe_run`, with the settings). "results" is a list of `BenchmarkResult.summary` dicts with the
    additional key "model" and, if the training images are known, "images trained on": the number of benchmark images on
    which the model was trained.

    A baseline's classification result, and each row of its other results, also contains "difference": the first
    model's metrics minus the baseline's (see `compute_retrieval_difference` and `BootstrapMetrics.subtract`). With
    `options.short_queries`, each row of a retrieval result also contains "short queries" and, if there are templates,
    "short queries with templates" (both lists of `LengthScores.to_dict` dicts) and "query templates".

    Args:
        models: Model to evaluate, followed by the baselines (see `open_embedding_source`).
        data: Sources of images and captions. If no splits are specified, the images that `fit` would hold out are
            evaluated.
        encoder: Caption encoder whose caption retrieval accuracy is measured if `models` is empty.
        config: Evaluation settings, such as additional caption fields to evaluate.

    Returns:
        Lines to print at the end: a summary of the skipped rows, warnings, and the path of the report.

    Raises:
        ValueError: If there is nothing to evaluate, a benchmark does not exist, or every evaluation failed.
        IncompleteEvaluationError: If some evaluations failed. The other results have been written.
    """
    start = time.time()
    encoder, config = encoder or EncoderConfig(), config or EvaluateConfig()
    _check_arguments(models, data, options)
    log = _make_skip_log(options, "records")
    title_name = get_display_names(models or [encoder.path])[0]
    evaluation = _Evaluation(Path(options.out) if options.out else None)
    if options.captions:
        records = open_table(options.captions, options.columns, log, "unchecked")
        text_encoder = open_text_encoder(models[0] if models else None, encoder, options.trust_remote_code)
        metrics = caption_retrieval_accuracy(
            [record.captions for record in records],
            text_encoder,
            all_pairs=options.all_pairs,
            num_mistakes=3 if options.mistakes is None else options.mistakes,
        )
        evaluation.save("caption retrieval", metrics)
        blocks = build_caption_retrieval_blocks(title_name, metrics)
        evaluation.add_section("Caption retrieval", describe_caption_retrieval(title_name, metrics), blocks)
    if data or options.benchmarks:
        user_data = [_read_user_benchmark(data, config, options.columns, log)] if data else []
        benchmarks = [*user_data, *get_benchmarks(options.benchmarks, options.templates or ())]
        runner = BenchmarkRunner(benchmarks, log, options)
        _run_benchmarks(runner, models, options, evaluation)
    last_lines = [log.summary()] if log.rows_seen and not data else []
    last_lines += evaluation.skipped + evaluation.proposals + evaluation.warnings
    if evaluation.out is not None and process_state().is_main_process:
        settings = {"models": models, "data": data, **vars(options), "encoder": encoder, "config": config}
        page = evaluation.write(f"Evaluation of {title_name}", describe_run(time.time() - start), settings)
        last_lines.append(f"Report: {page}")
    if evaluation.failures:
        print_once(*last_lines)
        lines = ["some evaluations failed, but the others are complete:", *evaluation.failures]
        raise IncompleteEvaluationError("\n".join(lines))
    return last_lines


@dataclass
class _Evaluation:
    """Results and report of an evaluation so far.

    Args:
        out: Output folder, or None if nothing is written.
        results: Contents of results.json.
        verdict: Verdict of the last section, which becomes the verdict of the report.
        skipped: Descriptions of skipped rows and benchmarks.
        proposals: Descriptions of the proposals for detection benchmarks.
    """

    out: Path | None
    results: dict[str, Any] = field(default_factory=dict)
    verdict: str = ""
    blocks: list[Block] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    proposals: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def save(self, key: str, values: Any) -> None:
        """Set an entry of results.json, and write the file."""
        self.results[key] = values
        if self.out is not None and process_state().is_main_process:
            text = json.dumps(self.results, indent=1, ensure_ascii=False)
            atomic_write_text(self.out / "results.json", text)

    def add_section(self, title: str, verdict: str, blocks: Sequence[Block]) -> None:
        """Add blocks to the report, and print their tables."""
        self.verdict = verdict
        self.blocks += blocks
        tables = [block for block in blocks if not isinstance(block, Paragraph)] if title == "Results" else blocks
        print_once(render_markdown(title, tables, verdict))

    def write(self, title: str, run: dict[str, Any], settings: dict[str, Any]) -> Path:
        """Write results.json, report.md and report.html, and return the path of the page."""
        assert self.out is not None
        plain_settings = to_plain_types(settings)
        self.save("run", run | {"settings": plain_settings})
        problems = [Paragraph(line, BAD) for line in [*self.warnings, *self.failures]]
        settings_text = yaml.safe_dump(plain_settings, sort_keys=False, allow_unicode=True)
        page = self.out / "report.html"
        run_section = build_run_section(run, settings=settings_text)
        run_section += [Paragraph(line) for line in self.skipped]
        write_report(page, title, self.verdict, [*problems, *self.blocks, *run_section])
        return page


def _run_benchmarks(
    runner: BenchmarkRunner, models: Sequence[str], options: EvaluateOptions, evaluation: _Evaluation
) -> None:
    """Evaluate all models on all benchmarks, and add the results to `evaluation`."""
    for n, name in enumerate(get_display_names(models) if runner.runs else []):
        for _ in runner.evaluate_model(models[n], name, is_baseline=n > 0):
            evaluation.save("results", runner.get_summaries())  # so that no results are lost if a later benchmark fails
    if not runner.get_summaries():
        raise ValueError("\n".join(["nothing could be evaluated:", *runner.missing, *runner.failures]))
    skipped = runner.list_skipped_rows()
    if "all" in options.benchmarks:  # with "all", missing benchmarks do not count as failures
        skipped += runner.missing
        evaluation.failures = runner.failures
    else:
        evaluation.failures = runner.missing + runner.failures
    evaluation.skipped, evaluation.proposals = skipped, runner.describe_proposals()
    evaluation.warnings = runner.list_warnings()
    first = next(run for run in runner.runs if run.results)
    evaluation.add_section("Results", describe_results(first.benchmark.name, first.results), runner.build_blocks())


@dataclass
class BenchmarkRun:
    """An available benchmark with its folder, its skip log and the models' results."""

    benchmark: Benchmark
    folder: Path
    log: SkipLog
    results: list[BenchmarkResult] = field(default_factory=list)


class BenchmarkRunner:
    """Runner that evaluates models on benchmarks.

    If an evaluation fails, the error is recorded in `failures`, and the remaining evaluations still run. Benchmarks
    that have no folder in `options.root` are recorded in `missing`.
    """

    def __init__(self, benchmarks: Sequence[Benchmark], log: SkipLog, options: EvaluateOptions) -> None:
        """
        Args:
            log: Skip log for the user's data.
            options: If `options.out` is not set, embeddings are not cached, and errors are not analysed.
        """
        self.runs: list[BenchmarkRun] = []
        self.missing: list[str] = []
        self.failures: list[str] = []
        self._options = options
        self._out = Path(options.out) if options.out else None
        for benchmark in benchmarks:
            try:
                folder = benchmark.find(Path(options.root))
            except MissingFileError as error:
                self.missing.append(_describe_failure(benchmark.name, benchmark, error))
                continue
            name = f"{len(self.runs)}-{benchmark.name}"
            benchmark_log = log if benchmark.name == USER_DATA else _make_skip_log(options, name)
            self.runs.append(BenchmarkRun(benchmark, folder, benchmark_log))

    def evaluate_model(self, model: str, name: str, is_baseline: bool) -> Iterator[BenchmarkResult]:
        """Evaluate a model on all benchmarks, and yield each result as soon as it is available.

        With `EvaluateOptions.dims`, truncated embeddings are evaluated like further baselines.

        Args:
            model: See `open_embedding_source`.
            name: Model name to show in tables.
            is_baseline: If True, skip the model if it cannot be loaded, and show no example images for it.
        """
        is_distributed = process_state().num_processes > 1
        try:
            cache_dir = self._out / "vectors" if self._out else None
            embeddings = open_embedding_source(model, self.runs[0].log, cache_dir, self._options.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            if not is_baseline or is_distributed:  # if only this rank skipped the model, the others would wait forever
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
        for run in self.runs:
            for n, (source_name, source) in enumerate(sources.items()):
                source.log = run.log
                result = self._evaluate_source(run, source, source_name, training_images, is_baseline or n > 0)
                if result is not None:
                    if self._options.dims:
                        result.summary |= {"full model": name, "dimensions": source.embed_dim}
                    run.results.append(result)
                    yield result

    def _evaluate_source(
        self,
        run: BenchmarkRun,
        embeddings: EmbeddingSource,
        name: str,
        training_images: np.ndarray | None,
        is_baseline: bool,
    ) -> BenchmarkResult | None:
        """Evaluate one source of embeddings on one benchmark. Record an error in `failures` and return None."""
        benchmark = run.benchmark
        print_once(f"{name}: {benchmark.name}")
        predictions_dir = None
        if self._out is not None and self._options.save_predictions:
            predictions_dir = self._out / "predictions" / sanitize_name(benchmark.name) / sanitize_name(name)
        try:
            result = run_benchmark(benchmark, run.folder, embeddings, self._options, predictions_dir)
        except (OSError, ValueError) as error:
            # Invalid data causes the same error on every rank. Other errors may occur only on this rank.
            is_distributed = process_state().num_processes > 1
            if is_distributed and not isinstance(error, MissingFileError | ValueError):
                raise
            self.failures.append(_describe_failure(f"{name} on {benchmark.name}", benchmark, error))
            return None
        result.model = name
        if training_images is not None and process_state().is_main_process:
            result.summary["images trained on"] = count_training_images(training_images, result.images)
        if run.results:
            _add_differences(run.results[0], result)
        if self._options.short_queries:
            self._add_short_queries(result, embeddings)
        if self._out is not None and process_state().is_main_process:
            for n, (caption_field, ranks) in enumerate(result.ranks.items()):
                # With examples for all 36 languages of Crossmodal-3600, the report would contain 2,000 images.
                with_examples = not is_baseline and n == 0
                result.error_analysis[caption_field] = analyze_errors(ranks, EXAMPLE_QUERIES if with_examples else 0)
            if result.draw_examples is not None and not is_baseline:
                result.examples = result.draw_examples()
        result.draw_examples = None  # free the memory of images and embeddings
        empty = torch.empty(0)
        result.ranks = {key: replace(ranks, images=empty, texts=empty) for key, ranks in result.ranks.items()}
        return result

    def _add_short_queries(self, result: BenchmarkResult, embeddings: EmbeddingSource) -> None:
        """Add the short-query metrics of each caption field to `result`. Record errors in `failures`."""
        templates = embeddings.query_templates
        if self._options.templates is not None:
            templates = QueryTemplates(tuple(self._options.templates))
        for caption_field, ranks in result.ranks.items():
            try:
                scores = score_short_queries(embeddings, ranks, templates)
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

    def get_summaries(self) -> list[dict[str, Any]]:
        """Return the entries for "results" in results.json."""
        return [{"model": result.model, **result.summary} for run in self.runs for result in run.results]

    def build_blocks(self) -> list[Block]:
        """Return a report section for each benchmark with results, followed by the sections on short queries."""
        blocks: list[Block] = []
        for run in self.runs:
            if run.results:
                blocks += build_benchmark_blocks(run.benchmark, run.results)
        return blocks + build_short_query_blocks([(run.benchmark, run.results) for run in self.runs])

    def list_warnings(self) -> list[str]:
        """Return a warning for each result whose model was trained on some of the benchmark's images."""
        lines = []
        for summary in self.get_summaries():
            if summary.get("images trained on"):
                lines.append(
                    f"Warning: {summary['model']} was trained on {summary['images trained on']:,} of the images "
                    f"in {summary['benchmark']}. These results do not predict performance on new images."
                )
        return lines

    def list_skipped_rows(self) -> list[str]:
        """Return one line for each benchmark with skipped rows. The user's data always gets a line."""
        lines = []
        for run in self.runs:
            if run.log.skipped or run.benchmark.name == USER_DATA:
                lines.append(f"{run.benchmark.name}: {run.log.summary()}.")
        return lines

    def describe_proposals(self) -> list[str]:
        """Return a one-line description of the proposals for each detection benchmark."""
        summaries = [run.results[0].summary for run in self.runs if run.results]
        return [f"{s['benchmark']}: {s['proposals']['description']}" for s in summaries if "proposals" in s]


def _add_differences(first: BenchmarkResult, result: BenchmarkResult) -> None:
    """Add the metric differences between the first model and a baseline to the baseline's summary or to its rows."""
    if "" in first.bootstrap:
        result.summary["difference"] = first.bootstrap[""].subtract(result.bootstrap[""])
    for row in result.summary.get("rows", ()):
        caption_field, method = row.get("captions"), row.get("method")
        if caption_field in first.ranks:
            row["difference"] = compute_retrieval_difference(first.ranks[caption_field], result.ranks[caption_field])
        elif method in first.bootstrap:
            row["difference"] = first.bootstrap[method].subtract(result.bootstrap[method])


def _check_arguments(models: Sequence[str], data: Sequence[str], options: EvaluateOptions) -> None:
    """Raise ValueError if there is nothing to evaluate, or an option is invalid or has no effect."""
    has_images = bool(data or options.benchmarks)
    if has_images and not models:
        raise ValueError("no model given: put the model first, before the data or --benchmarks")
    if not (options.captions or has_images):
        raise ValueError(
            "nothing to evaluate: pass a model and either data or --benchmarks; for caption retrieval, pass --captions"
        )
    if process_state().num_processes > 1 and options.out is None:
        raise ValueError("a distributed evaluation needs --out: the ranks exchange embeddings through this folder")
    for variant in options.dense_variants:
        if variant not in DENSE_VARIANTS:
            raise ValueError(f"unknown dense variant {variant!r}; choose from {', '.join(DENSE_VARIANTS)}")
    if options.short_queries and not has_images:
        raise ValueError("--short_queries needs images with captions: pass data or --benchmarks")
    has_class_names = any(map(has_user_data, options.benchmarks))
    if options.templates is not None and not options.short_queries and not has_class_names:
        raise ValueError(
            "--templates applies only to short queries and to your own images with class names: add --short_queries, "
            "or pass a benchmark such as boxes:FILE.json"
        )
    check_templates(options.templates or (), "--templates")


def _read_user_benchmark(
    data: Sequence[str], config: EvaluateConfig, columns: dict[str, str], log: SkipLog
) -> Benchmark:
    """Return the user's data as a retrieval benchmark.

    Raises:
        ValueError: If only some of the sources specify splits.
    """
    without_splits = [source for source in data if not Source.parse(source).splits]
    if not without_splits:
        splits = read_splits([], replace(config, data=list(data)), columns, log)
    elif len(without_splits) == len(data):
        splits = read_splits(data, config, columns, log)
    else:
        raise ValueError(
            f"{without_splits[0]}: specify the splits to evaluate (PATH@test) for all sources or for none. Without "
            "splits, the images that `fit` would hold out are evaluated"
        )
    num_images = max(map(len, splits.held_out.values()))
    description = splits.rule if without_splits and not config.data else f"{num_images:,} images"
    print_once(f"Evaluating {description}")
    return Benchmark(
        name=USER_DATA,
        kind="retrieval",
        description=description.partition(" (")[0],
        folders=(str(Path.cwd()),),  # unused, but the folder must exist
        read=lambda _: splits.held_out,
        source="images with captions",
    )


def _describe_failure(name: str, benchmark: Benchmark, error: Exception) -> str:
    source = f". Required files: {benchmark.source}" if isinstance(error, MissingFileError) else ""
    return f"Skipped {name}: {error}{source}"


def _make_skip_log(options: EvaluateOptions, name: str) -> SkipLog:
    """Create a skip log. If `options.out` is set, the main process writes it to `options.out/skipped/NAME.jsonl`."""
    file = None
    if options.out is not None and process_state().is_main_process:
        file = Path(options.out) / "skipped" / f"{sanitize_name(name)}.jsonl"
    return SkipLog(file, options.max_skipped)
