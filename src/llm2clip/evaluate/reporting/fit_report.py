"""The report of a fit, report.md and report.html: what tuning and alignment changed, and their loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.reporting import plots
from llm2clip.html_report import Block, Code, Heading, Paragraph, Plot, Table, write_report


def write_fit_report(
    folder: Path,
    *,
    command: str,
    data: str,
    cra: tuple[dict[str, Any], dict[str, Any]] | None,
    untrained: Sequence[dict[str, Any]],
    trained: Sequence[dict[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
) -> tuple[Path, Path]:
    """Write `folder/report.md` and `folder/report.html`; their paths.

    Args:
        folder: of the run, with `model/`.
        command: that made it.
        data: a line about what was trained on and held out.
        cra: figures of `caption_accuracy` before and after tuning; None if they could not be measured.
        untrained, trained: figures of `evaluate_caption_fields` before and after alignment.
        curves: by stage, the lines of its metrics.jsonl.
    """
    what = "Caption retrieval accuracy: the first two captions of each held-out image retrieve each other."
    blocks: list[Block] = [Code(command), Paragraph(data), Heading("Caption encoder"), Paragraph(what)]
    blocks.append(cra_table(*cra) if cra else Paragraph("Not measured: too few held-out images have two captions."))
    blocks += [
        Heading("Retrieval"),
        Paragraph(
            "Recall in percent on held-out images. I2T: an image finds one of its captions; T2I: a caption finds its "
            "image. A tie with a wrong answer counts as a miss."
        ),
        retrieval_table(untrained, trained),
        Heading("Training"),
        *(loss_plot(stage, lines) for stage, lines in curves.items() if lines),
        Heading("Use it"),
        Code(
            "from llm2clip import LLM2CLIP\n\n"
            f'model = LLM2CLIP.from_pretrained("{folder / "model"}")\n'
            'images = model.encode_image(["photo.jpg"])\n'
            'texts = model.encode_text(["a whole sentence about it"])\n'
            "model.similarity(texts, images)",
            "python",
        ),
    ]
    return write_report(folder, "report", "Report", blocks)


def cra_table(raw: dict[str, Any], tuned: dict[str, Any]) -> Table:
    """CRA before and after tuning, beside chance."""
    rows = [["chance", raw["chance"]], ["raw", raw["CRA"]], ["tuned", tuned["CRA"]]]
    return Table([f"caption encoder ({raw['images']:,} images)", "CRA top-1, %"], rows, frozenset([2]))


def retrieval_table(untrained: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> Table:
    """Recall of the untrained and of the trained model, kind of caption by kind, beside chance."""
    rows: list[list[Any]] = []
    for before, after in zip(untrained, trained, strict=True):
        name = f"{after['captions']} ({after['images']:,} images, {after['texts']:,} texts)"
        for label, figures, suffix in (
            ("chance", after, " chance"),
            ("untrained", before, ""),
            ("trained", after, ""),
        ):
            both = [figures[side + suffix][f"R@{k}"] for side in ("I2T", "T2I") for k in KS]
            rows.append([name if label == "chance" else "", label, *both])
    strong = frozenset(range(2, len(rows), 3))
    return Table(["captions", "model", *(f"{side} R@{k}" for side in ("I2T", "T2I") for k in KS)], rows, strong)


def loss_plot(stage: str, lines: Sequence[dict[str, Any]]) -> Plot:
    """The loss of each step of a stage, and its mean over the last twentieth of them."""
    loss = [line["loss"] for line in lines]
    span = max(1, len(loss) // 20)
    smooth = [sum(loss[max(0, i - span) : i + 1]) / len(loss[max(0, i - span) : i + 1]) for i in range(len(loss))]
    shown = {"each step": loss, f"mean of {span + 1} steps": smooth}
    return Plot(plots.plot_curves(shown, [line["step"] for line in lines], "step", "loss"), f"Loss of {stage}.")
