"""Report on a `fit` run: metrics before and after each training stage, and loss curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.reporting.error_analysis import read_example_searches
from llm2clip.html_report import (
    Block,
    Code,
    Details,
    Heading,
    Paragraph,
    Plot,
    Table,
    format_interval,
    format_with_interval,
    write_report,
)
from llm2clip.runs.run_description import describe_run, format_duration, format_run


def write_fit_report(
    folder: Path,
    *,
    data: str,
    cra: tuple[dict[str, Any], dict[str, Any]] | None,
    untrained: Sequence[dict[str, Any]],
    trained: Sequence[dict[str, Any]],
    query_templates: dict[str, Any] | None,
    examples: Sequence[Mapping[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
    durations: Mapping[str, float],
    settings: str,
) -> tuple[Path, Path]:
    """Write `folder/report.md` and `folder/report.html`, and return their paths.

    Args:
        folder: Run directory. It must contain `model/`.
        data: One-line description of the training and held-out data.
        cra: Results of `caption_retrieval_accuracy` before and after the `tune` stage, or None if CRA was not measured.
        untrained, trained: Results of `evaluate_caption_fields` before and after the `align` stage.
        query_templates: Result of `ShortQueryResult.to_dict`, or None if there is no caption encoder.
        examples: Result of `collect_example_searches`.
        curves: Rows of each stage's metrics.jsonl, keyed by stage name.
        durations: Duration of each stage in seconds, keyed by stage name.
        settings: Run config as YAML text.
    """
    run = describe_run(sum(durations.values()))
    stages = ", ".join(f"{stage} {format_duration(seconds)}" for stage, seconds in durations.items())
    blocks: list[Block] = [
        Paragraph(f"{format_run(run)} Stages: {stages}."),
        Code(run["command"]),
        Paragraph(data),
        Heading("Caption encoder"),
        Paragraph("Caption retrieval accuracy: how often a held-out image's first two captions retrieve each other."),
        build_caption_retrieval_table(*cra)
        if cra
        else Paragraph("Not measured: too few held-out images have two captions."),
        Heading("Retrieval"),
        Paragraph(
            "Recall on held-out images, in percent. I2T: an image retrieves one of its captions; T2I: a caption "
            "retrieves its image. A tie with a wrong answer counts as a miss. Confidence intervals are 95% bootstrap "
            "intervals over images."
        ),
        build_retrieval_table(untrained, trained),
        *(_build_short_query_blocks(query_templates) if query_templates and query_templates["short queries"] else []),
        Heading("Example searches"),
        Paragraph("Held-out captions and the images that the model retrieves for them. Correct images are marked."),
        *read_example_searches(examples),
        Heading("Training"),
        *(plot_loss(stage, rows) for stage, rows in curves.items() if rows),
        Heading("How to use the model"),
        Code(
            "from llm2clip import LLM2CLIP\n\n"
            f'model = LLM2CLIP.from_pretrained("{folder / "model"}")\n'
            'images = model.encode_image(["photo.jpg"])\n'
            'texts = model.encode_text(["a full sentence about the photo"])\n'
            "model.similarity(texts, images)",
            "python",
        ),
        Details("Settings", settings),
    ]
    return write_report(folder, "report", f"Training of {folder.resolve().name}", blocks)


def build_summary_table(
    cra: tuple[dict[str, Any], dict[str, Any]] | None,
    untrained: Sequence[dict[str, Any]],
    trained: Sequence[dict[str, Any]],
) -> Table:
    """Return a table with the main metrics of a `fit` run. See `write_fit_report` for the arguments."""
    rows: list[list[Any]] = []
    if cra:
        rows.append([f"CRA ({cra[0]['images']:,} images)", cra[0]["chance"], cra[0]["CRA"], cra[1]["CRA"]])
    for before, after in zip(untrained, trained, strict=True):
        for direction in ("I2T", "T2I"):
            name = f"{after['captions']}: {direction} R@1 ({after['images']:,} images)"
            chance = after[f"{direction} chance"]["R@1"]
            rows.append([name, chance, before[direction]["R@1"], after[direction]["R@1"]])
    return Table(["held-out images, %", "chance", "before training", "after training"], rows)


def build_caption_retrieval_table(raw: dict[str, Any], tuned: dict[str, Any]) -> Table:
    """Return a table that compares the CRA before and after the `tune` stage with the chance level."""
    rows: list[list[Any]] = [["chance", raw["chance"], None]]
    for name, metrics in (("raw", raw), ("tuned", tuned)):
        rows.append([name, metrics["CRA"], format_interval(metrics["CRA interval"])])
    header = [f"caption encoder ({raw['images']:,} images)", "CRA top-1, %", "95% interval"]
    return Table(header, rows, frozenset([2]))


def build_retrieval_table(untrained: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> Table:
    """Return a table that compares each caption field's recall before and after training with the chance level."""
    rows: list[list[Any]] = []
    for before, after in zip(untrained, trained, strict=True):
        name = f"{after['captions']} ({after['images']:,} images, {after['texts']:,} texts)"
        rows.append([name, "chance", *_format_recall_cells(after, " chance")])
        rows.append(["", "untrained", *_format_recall_cells(before)])
        rows.append(["", "trained", *_format_recall_cells(after)])
    header = ["captions", "model"]
    for direction in ("I2T", "T2I"):
        header += [f"{direction} R@1", "95% interval", *(f"{direction} R@{k}" for k in KS[1:])]
    return Table(header, rows, highlight=frozenset(range(2, len(rows), 3)))


def _build_short_query_blocks(result: dict[str, Any]) -> list[Block]:
    """Return a report section on one- to three-word queries, encoded with and without the model's templates."""
    literal, with_templates = result["short queries"], result["short queries with templates"]
    header = ["query", *(f"{row['words']} {'word' if row['words'] == '1' else 'words'}: mAP" for row in literal)]
    rows = [
        ["chance", *(row["mAP chance"] for row in literal)],
        ["without templates", *(format_with_interval(row["mAP"], row["mAP interval"]) for row in literal)],
    ]
    text = (
        "Queries are words and short phrases from the held-out captions. Every image with a caption that mentions the "
        "query is a correct answer. "
    )
    if with_templates:
        rows.append(
            ["with templates", *(format_with_interval(row["mAP"], row["mAP interval"]) for row in with_templates)]
        )
        templates = ", ".join(map(repr, result["templates"]))
        limit = "one word" if result["max_words"] == 1 else f"up to {result['max_words']} words"
        text += (
            f"When searching, queries of {limit} are also encoded with the templates {templates}, and the embeddings "
            "are averaged. Because the templates were chosen on these images, the values with templates are slightly "
            "too high."
        )
    else:
        text += "No templates improve the results of these queries, so searches use none."
    return [Heading("Short queries"), Paragraph(text), Table(header, rows, frozenset([len(rows) - 1]))]


def _format_recall_cells(row: Mapping[str, Any], suffix: str = "") -> list[Any]:
    """Return the cells of a `build_retrieval_table` row. The suffix " chance" selects the chance levels."""
    cells: list[Any] = []
    for direction in ("I2T", "T2I"):
        first, *others = (row[direction + suffix][f"R@{k}"] for k in KS)
        interval = None if suffix else format_interval(row[f"{direction} interval"]["R@1"])
        cells += [first, interval, *others]
    return cells


def plot_loss(stage: str, rows: Sequence[dict[str, Any]]) -> Plot:
    """Plot a stage's loss at each step, and the moving average of the loss over about 5% of the steps."""
    losses = [row["loss"] for row in rows]
    window = max(1, len(losses) // 20) + 1
    averages = []
    for n in range(len(losses)):
        recent = losses[max(0, n + 1 - window) : n + 1]
        averages.append(sum(recent) / len(recent))
    curves = {"each step": losses, f"mean of {window} steps": averages}
    return Plot(
        plots.plot_curves(curves, [row["step"] for row in rows], "step", "loss"), f"Training loss during {stage}."
    )
