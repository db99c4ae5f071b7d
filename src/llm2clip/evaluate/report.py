"""The report of a run: one markdown page and a plot of its training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

KS = ("R@1", "R@5", "R@10")


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; floats with one decimal."""
    shown = [[f"{v:.1f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = [header, ["---"] * len(header), *shown]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cra_table(raw: dict[str, Any], tuned: dict[str, Any]) -> str:
    """CRA before and after tuning."""
    rows = [["chance", raw["chance"]], ["raw", raw["CRA"]], ["tuned", tuned["CRA"]]]
    return table([f"caption encoder ({raw['images']:,} images)", "CRA top-1, %"], rows)


def captions_report(figures: dict[str, Any]) -> list[str]:
    """Caption retrieval in lines to print: a table, what else was found, and the worst mistakes as text."""
    ways = ["first to second", "second to first", *(["all pairs"] if "all pairs" in figures else [])]
    rows = [["CRA, their mean", figures["CRA"], "", "", figures["chance"]]]
    for way in ways:
        chance = figures["all pairs chance"]["R@1"] if way == "all pairs" else figures["chance"]
        rows.append([way, *(figures[way][k] for k in KS), chance])
    lines = [
        table([f"captions of {figures['images']:,} images, %", *KS, "chance of R@1"], rows),
        f"mean cosine: {figures['positives']:.3f} of captions of one image, {figures['negatives']:.3f} of others'",
    ]
    if figures["left out"]:
        lines.append(f"{figures['left out']:,} images with fewer than two different captions are left out")
    if figures.get("truncated"):
        lines.append(f"{figures['truncated']:,} captions are longer than the tower's window and were cut")
    for n, mistake in enumerate(figures.get("mistakes", ()), 1):
        lines += [
            f"mistake {n}: {mistake['caption']}",
            f"  found {mistake['found cosine']:.3f}: {mistake['found']}",
            f"  right {mistake['right cosine']:.3f}: {mistake['right']}",
        ]
    return lines


def retrieval_table(untrained: Sequence[dict[str, Any]], trained: Sequence[dict[str, Any]]) -> str:
    """Recall of the untrained and of the trained model, kind of caption by kind, beside chance."""
    rows: list[list[Any]] = []
    for before, after in zip(untrained, trained, strict=True):
        name = f"{after['captions']} ({after['images']:,} images, {after['texts']:,} texts)"
        for label, figures, suffix in (
            ("chance", after, " chance"),
            ("untrained", before, ""),
            ("trained", after, ""),
        ):
            both = [figures[side + suffix][k] for side in ("I2T", "T2I") for k in KS]
            rows.append([name if label == "chance" else "", label, *both])
    return table(["captions", "model", *(f"I2T {k}" for k in KS), *(f"T2I {k}" for k in KS)], rows)


def plot_curves(curves: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """The loss over steps of each stage, side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: lines for name, lines in curves.items() if lines}
    figure = Figure(figsize=(5 * max(1, len(shown)), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for n, (name, lines) in enumerate(shown.items(), start=1):
        axes = figure.add_subplot(1, len(shown), n)
        loss = [line["loss"] for line in lines]
        axes.plot([line["step"] for line in lines], loss, linewidth=0.8, alpha=0.4)
        span = max(1, len(loss) // 20)
        smooth = [sum(loss[max(0, i - span) : i + 1]) / len(loss[max(0, i - span) : i + 1]) for i in range(len(loss))]
        axes.plot([line["step"] for line in lines], smooth, linewidth=1.6)
        axes.set(title=name, xlabel="step", ylabel="loss")
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=130)


def write_report(
    folder: Path,
    *,
    command: str,
    data: str,
    cra: tuple[dict[str, Any], dict[str, Any]] | None,
    untrained: Sequence[dict[str, Any]],
    trained: Sequence[dict[str, Any]],
    curves: dict[str, list[dict[str, Any]]],
) -> Path:
    """Write `folder/report.md` and `folder/curves.png`; return the report's path."""
    plot_curves(curves, folder / "curves.png")
    sections = [
        "# Report",
        f"`{command}`",
        data,
        "## Caption encoder",
        "Caption retrieval accuracy: the first two captions of each held-out image retrieve each other.",
        cra_table(*cra) if cra else "Not measured: too few held-out images have two captions.",
        "## Retrieval",
        "Recall in percent on held-out images. I2T: an image finds one of its captions; T2I: a caption finds its "
        "image. A tie with a wrong answer counts as a miss.",
        retrieval_table(untrained, trained),
        "## Training",
        "![Loss of both stages](curves.png)",
        "## Use it",
        "```python\nfrom llm2clip import LLM2CLIP\n\n"
        f'model = LLM2CLIP.from_pretrained("{folder / "model"}")\n'
        'images = model.encode_image(["photo.jpg"])\n'
        'texts = model.encode_text(["a whole sentence about it"])\n'
        "model.similarity(texts, images)\n```",
    ]
    report = folder / "report.md"
    report.write_text("\n\n".join(sections) + "\n")
    return report
