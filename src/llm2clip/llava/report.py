"""Evaluation report for LLaVA models: metrics, a comparison with the paper, and sample captions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm2clip.data.images import load_thumbnail
from llm2clip.html_report import (
    BAD,
    Block,
    Code,
    Heading,
    Paragraph,
    ResultImage,
    ResultImages,
    Table,
    to_markdown,
    write_report,
)
from llm2clip.llava.evaluate import LlavaResult
from llm2clip.models.hub.model_names import display_names
from llm2clip.published_results import LLAVA
from llm2clip.runs.run_description import format_run

# Benchmarks in the published LLaVA-1.5 table. Each benchmark has a column name and a metric. For POPE, F1 was published
# for each sampling strategy, but not the mean.
COLUMNS = {
    "vqav2": ("VQAv2", "accuracy"),
    "gqa": ("GQA", "accuracy"),
    "vizwiz": ("VizWiz", "accuracy"),
    "scienceqa": ("SQA-IMG", "accuracy"),
    "textvqa": ("TextVQA", "accuracy"),
    "pope": ("POPE", "F1"),
    "mme": ("MME", "perception"),
    "mmbench": ("MMBench", "accuracy"),
    "mmbench-cn": ("MMBench-CN", "accuracy"),
    "llava-bench": ("LLaVA-Bench", "relative"),
    "mm-vet": ("MM-Vet", "total"),
    "seed": ("SEED", "accuracy"),
}
NOTES = {
    "vqav2": "The paper reports test-dev results, which only VQAv2's server can score. Here, val2014 is scored.",
    "vizwiz": "The paper reports test set results, which only VizWiz's server can score. Here, val is scored.",
    "mmbench": "MMBench's server uses an LLM to interpret answers that name no option. Here, they count as wrong.",
}
SAMPLE_IMAGES = 12
THUMBNAIL_SIDE = 280  # length of a thumbnail's longer side, in pixels


def write_llava_report(results: Sequence[LlavaResult], run: Mapping[str, Any], out: Path) -> Path:
    """Write `out/report.html` and `out/report.md`; return the path of the HTML file.

    Args:
        results: Results of the models.
        run: Result of `describe_run`.
        out: Output folder.
    """
    results = _with_display_names(results)
    blocks: list[Block] = [Paragraph(format_run(run)), Code(run["command"])]
    blocks += [Paragraph(warning, BAD) for warning in training_warnings(results)]
    blocks += _paper_comparison(results)
    for task, task_results in _by_task(results).items():
        blocks += _task_section(task, task_results)
    return write_report(out, "report", "Evaluation of multimodal LLMs", blocks)[1]


def format_results(results: Sequence[LlavaResult]) -> str:
    """Return the metrics as one table per task, in Markdown."""
    blocks: list[Block] = []
    for task, task_results in _by_task(_with_display_names(results)).items():
        blocks += _metrics_blocks(task, task_results)
    return to_markdown("Results", blocks)


def training_warnings(results: Sequence[LlavaResult]) -> list[str]:
    """Return one line for each model and task with images on which the model was trained."""
    return [
        f"Warning: {result.model} was trained on {result.trained_on:,} of the images of {result.task}. These results "
        "do not predict those on new images."
        for result in results
        if result.trained_on
    ]


def _with_display_names(results: Sequence[LlavaResult]) -> list[LlavaResult]:
    models = list(dict.fromkeys(result.model for result in results))
    short_names = dict(zip(models, display_names(models), strict=True))
    return [replace(result, model=short_names[result.model]) for result in results]


def _by_task(results: Sequence[LlavaResult]) -> dict[str, list[LlavaResult]]:
    tasks: dict[str, list[LlavaResult]] = {}
    for result in results:
        tasks.setdefault(result.task, []).append(result)
    return tasks


def _paper_comparison(results: Sequence[LlavaResult]) -> list[Block]:
    """Compare the evaluated models with the paper's models on the benchmarks that were run."""
    benchmarks = [task for task in COLUMNS if any(result.task == task for result in results)]
    if not benchmarks:
        return []
    rows: list[list[object]] = []
    for name in LLAVA.rows:
        cells = [LLAVA.cell(name, COLUMNS[task][0]) for task in benchmarks]
        rows.append([name, *(cell[0] if cell and len(cell) == 1 else None for cell in cells)])
    for model in dict.fromkeys(result.model for result in results):
        metrics = {result.task: result.metrics for result in results if result.model == model}
        rows.append([model, *(metrics.get(task, {}).get(COLUMNS[task][1]) for task in benchmarks)])
    return [
        Heading("Comparison with the paper"),
        Paragraph(
            "Metrics are in percent, but MME is in points. The paper uses Vicuna-7B and CLIP L/14 at 336 pixels. "
            f"Source of the paper's metrics: {LLAVA.source}."
        ),
        Table(["model", *(COLUMNS[task][0] for task in benchmarks)], rows),
    ]


def _task_section(task: str, results: Sequence[LlavaResult]) -> list[Block]:
    """Return the report section for one task: a table of metrics with one row per model, and notes."""
    blocks = _metrics_blocks(task, results)
    if task in NOTES and any(result.metrics for result in results):
        blocks.append(Paragraph(NOTES[task]))
    if task == "pope":
        paper_rows = [[name, *(LLAVA.cell(name, "POPE") or ())] for name in LLAVA.rows]
        blocks.append(Table(["F1 in the paper", "random", "adversarial", "popular"], paper_rows))
    if task == "captions":
        blocks += _sample_captions(results)
    return blocks


def _metrics_blocks(task: str, results: Sequence[LlavaResult]) -> list[Block]:
    """Return a heading and a table of metrics with one row per model."""
    heading = Heading(f"{task}: {len(results[0].questions):,} questions")
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    if not names:
        text = "Answers were generated but not scored: scoring requires the benchmark's server or a judge."
        return [heading, Paragraph(text)]
    rows = [[result.model, *(result.metrics.get(name) for name in names)] for result in results]
    return [heading, Table(["model", *names], rows)]


def _sample_captions(results: Sequence[LlavaResult]) -> list[Block]:
    """Show the same random images for each model, with the model's caption and the human captions."""
    blocks: list[Block] = []
    questions = results[0].questions
    sample = random.Random(0).sample(questions, min(SAMPLE_IMAGES, len(questions)))
    for result in results:
        answers = {question.id: answer for question, answer in zip(result.questions, result.answers, strict=True)}
        images = []
        for question in sample:
            if question.id in answers and question.image is not None:
                caption = f"{answers[question.id]} — human: {question.target[0]}"
                images.append(ResultImage(load_thumbnail(question.image, THUMBNAIL_SIDE), None, caption))
        blocks.append(ResultImages(result.model, images))
    return blocks
