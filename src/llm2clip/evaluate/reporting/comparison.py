"""Models side by side on benchmarks, beside the paper's figures: the tables, plots and pictures of a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llm2clip.evaluate.benchmarks import Benchmark
from llm2clip.evaluate.published_results import CRA, published_rows
from llm2clip.evaluate.recall import KS
from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.reporting.error_analysis import FIRST, ErrorAnalysis
from llm2clip.html_report import Block, Heading, Paragraph, Plot, Table

WAYS = ("I2T", "T2I")
OURS = ("Llama3-8B-CC", "EVA02 + LLM2CLIP")  # the paper's rows that a model is held against


@dataclass
class ModelResult:
    """One model on one benchmark.

    Args:
        model: its name.
        figures: as of `Measured`.
        details: by the kind of caption.
    """

    model: str
    figures: dict[str, Any]
    details: dict[str, ErrorAnalysis] = field(default_factory=dict)


def result_blocks(benchmark: Benchmark, results: Sequence[ModelResult]) -> list[Block]:
    """A benchmark's part of the report, its models in the order given."""
    found: list[Block] = [Heading(f"{benchmark.name}: {benchmark.about}")]
    if benchmark.kind != "retrieval":
        return [*found, _figures(results)]
    for n, first in enumerate(results[0].figures["rows"]):
        kind = first["captions"]
        rows = [(r, next(row for row in r.figures["rows"] if row["captions"] == kind)) for r in results]
        found.append(Heading(f"{kind}: {first['images']:,} images, {first['texts']:,} texts", 3))
        found.append(recall_table(rows, published_rows(benchmark.name) if n == 0 else {}))
        seen = {r.model: r.details[kind] for r, _ in rows if kind in r.details}
        if seen:
            found += example_blocks(seen)
    return found


def caption_blocks(name: str, figures: dict[str, Any]) -> list[Block]:
    """Caption retrieval beside the paper's, on COCO's 5,000 images, and what was confused most.

    Args:
        name: of the text encoder.
        figures: as of `caption_accuracy`.
    """
    low, high = figures["CRA interval"]
    rows: list[list[Any]] = [[f"paper: {model}, COCO", cra, None, 5000] for model, cra in CRA.items()]
    rows.append([name, figures["CRA"], f"{low:.1f} to {high:.1f}", figures["images"]])
    rows.append(["chance", figures["chance"], None, figures["images"]])
    ways = [way for way in ("first to second", "second to first", "all pairs") if way in figures]
    by_way = [
        [way, *_recalls_at(figures[way]), figures[f"{way} chance"]["R@1"] if way == "all pairs" else figures["chance"]]
        for way in ways
    ]
    said = [
        f"Mean cosine: {figures['positive cosine']:.3f} of captions of one image, {figures['negative cosine']:.3f} of others'.",
        f"{figures['excluded']:,} images with fewer than two different captions are left out. Cut to the encoder's "
        f"window: {'not known' if figures['truncated'] is None else figures['truncated']} of the captions.",
    ]
    mistakes = [
        [m["caption"], m["found"], m["right"], f"{m['found cosine']:.2f} / {m['right cosine']:.2f}"]
        for m in figures.get("mistakes", ())
    ]
    return [
        Heading("CRA: the first two captions of each image find each other"),
        Table(["", "CRA, %", "95%", "images"], rows, frozenset([len(CRA)])),
        Table(["", *(f"R@{k}, %" for k in KS), "chance of R@1"], by_way),
        *map(Paragraph, said),
        *([Table(["caption", "found", "should have found", "cosines"], mistakes)] if mistakes else []),
    ]


def recall_table(
    rows: Sequence[tuple[ModelResult, dict[str, Any]]], paper: dict[str, tuple[float | None, ...]]
) -> Table:
    """The paper's rows, chance, the models' with intervals, and what the first is above the others."""
    header = ["", *(name for way in WAYS for name in (f"{way} R@1", "95%", "R@5", "R@10")), "median rank", "cut"]
    body: list[list[Any]] = [[f"paper: {name}", *_spread(figures), None, None] for name, figures in paper.items()]
    _, some = rows[0]
    body.append(["chance", *(v for w in WAYS for v in _recalls(some[f"{w} chance"])), None, None])
    strong = frozenset(range(len(body), len(body) + len(rows)))
    for result, row in rows:
        sides = [v for way in WAYS for v in _recalls(row[way], row[f"{way} interval"]["R@1"])]
        ranks = " / ".join(f"{row[way]['median rank']:g}" for way in WAYS)
        body.append([result.model, *sides, ranks, format_percent(row["truncated"], row["texts"])])
    first, figures = rows[0]
    own = [value for way in WAYS for value in _recalls_at(figures[way])]
    others: dict[str, list[float | None]] = {
        r.model: [v for way in WAYS for v in _recalls_at(row[way])] for r, row in rows[1:]
    }
    for name, printed in paper.items():
        if name in OURS:
            others[f"the paper's {name}"] = list(printed)
    for name, other in others.items():
        gains = [None if b is None else f"{a - b:+.1f}" for a, b in zip(own, other, strict=True)]
        body.append(
            [f"{first.model} above {name}", gains[0], None, *gains[1:3], gains[3], None, *gains[4:], None, None]
        )
    return Table(header, body, strong)


def example_blocks(seen: dict[str, ErrorAnalysis]) -> list[Block]:
    """Plots of all models; the matrix and the pictures of the first."""
    found: list[Block] = []
    lines = {f"{name} {way}": d.curves[way] for name, d in seen.items() for way in WAYS}
    found.append(
        Plot(
            plots.plot_curves(lines, range(1, FIRST + 1), "k", "R@k, %", log=True), "Recall among the first k answers."
        )
    )
    name, first = next(iter(seen.items()))
    if len(first.bins) > 1:
        found.append(
            Plot(
                plots.plot_curves(
                    {model: [middle for middle, *_ in d.by_length] for model, d in seen.items()},
                    range(len(first.bins)),
                    f"{first.unit} of the caption",
                    "T2I R@1, %",
                    {model: [(low, high) for _, low, high in d.by_length] for model, d in seen.items()},
                    [f"{low}–{high}" if low < high else str(low) for low, high in first.bins],
                ),
                "Recall against the length of the caption, with 95% intervals.",
            )
        )
    found.append(
        Plot(
            plots.plot_matrix(first.matrix, "images", "their first captions"),
            f"Cosines by {name}: what belongs together is on the diagonal.",
        )
    )
    if first.found:
        found += [
            Heading("What was found", 3),
            Paragraph(
                f"Captions evenly spread over the set, and the pictures that {name} finds; its own is marked as right."
            ),
            *first.found,
        ]
    if first.failures:
        found += [Heading("The worst failures", 3), Paragraph("Captions whose own picture came last."), *first.failures]
    return found


def format_percent(cut: int | None, texts: int) -> str:
    """How many texts were cut to a model's window."""
    return "not known" if cut is None else f"{100 * cut / max(1, texts):.1f}% of the texts" if cut else "none"


def _figures(results: Sequence[ModelResult]) -> Table:
    names = list(dict.fromkeys(name for r in results for name in r.figures["figures"]))
    body = [
        [
            r.model,
            r.figures["images"],
            *(r.figures["figures"].get(name) for name in names),
            format_percent(r.figures["truncated"], r.figures["texts"]),
        ]
        for r in results
    ]
    return Table(["", "images", *names, "cut"], body)


def _spread(figures: Sequence[float | None]) -> list[float | None]:
    """The paper's six figures under a table's columns."""
    i1, i5, i10, t1, t5, t10 = figures
    return [i1, None, i5, i10, t1, None, t5, t10]


def _recalls_at(figures: dict[str, float]) -> list[float]:
    return [figures[f"R@{k}"] for k in KS]


def _recalls(figures: dict[str, float], ends: Sequence[float] | None = None) -> list[Any]:
    return [figures["R@1"], f"{ends[0]:.1f} to {ends[1]:.1f}" if ends else None, figures["R@5"], figures["R@10"]]
