"""Drawings for reports, as SVG that takes the page's colours: axes and text in a grey that both a light and a dark page
can bear, on nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

GREY = "#808994"
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b0569c", "#8a7a3c", "#5c6bc0", "#c0504d")


def plot_curves(
    lines: Mapping[str, Sequence[float]],
    at: Sequence[float],
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    ticks: Sequence[str] | None = None,
    log: bool = False,
) -> str:
    """Lines over common points.

    Args:
        lines: name to the heights.
        at: the points.
        xlabel, ylabel: of the axes.
        bands: name to the ends of an interval at each point.
        ticks: names of the points, in place of numbers.
        log: the points on a logarithmic axis.
    """
    figure, axes = new_axes(6.6, 3.6)
    for n, (name, heights) in enumerate(lines.items()):
        colour = COLOURS[n % len(COLOURS)]
        axes.plot(at, heights, color=colour, linewidth=1.8, marker="o" if len(at) < 12 else None, ms=4, label=name)
        if bands and name in bands:
            low, high = zip(*bands[name], strict=True)
            axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
    if log:
        axes.set_xscale("log")
        shown = [k for k in (1, 2, 5, 10, 20, 50, 100) if k <= max(at)]
        axes.set_xticks(shown, [str(k) for k in shown])
        axes.set_xticks([], minor=True)
    if ticks is not None:
        axes.set_xticks(at, ticks, fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
    return to_svg(figure)


def plot_intervals(sides: Mapping[str, tuple[float, float, float]], xlabel: str) -> str:
    """A dot with its interval a line: name to middle, low, high; the first on top."""
    figure, axes = new_axes(7.5, 0.5 + 0.36 * len(sides))
    for n, (middle, low, high) in enumerate(sides.values()):
        axes.plot([low, high], [-n, -n], color=COLOURS[0], linewidth=2.5, alpha=0.5, solid_capstyle="round")
        axes.plot([middle], [-n], "o", color=COLOURS[0], ms=6)
    axes.set_yticks([-n for n in range(len(sides))], list(sides), fontsize=8)
    axes.set_ylim(-len(sides) + 0.4, 0.6)
    axes.set(xlabel=xlabel)
    return to_svg(figure)


def plot_matrix(scores: Tensor, xlabel: str, ylabel: str) -> str:
    """Cosines, (rows, columns): dark is high."""
    figure, axes = new_axes(4.2, 3.8)
    shown = axes.imshow(scores.numpy(), cmap="magma_r", interpolation="nearest")
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    bar = figure.colorbar(shown, ax=axes, shrink=0.85)
    bar.ax.tick_params(colors=GREY, labelsize=8)
    bar.outline.set_edgecolor(GREY)
    return to_svg(figure)


def new_axes(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_edgecolor(GREY)
        spine.set_linewidth(0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=GREY, labelsize=8)
    axes.xaxis.label.set(color=GREY, size=9)
    axes.yaxis.label.set(color=GREY, size=9)
    axes.grid(color=GREY, alpha=0.2, linewidth=0.6)
    return figure, axes


def to_svg(figure: Any) -> str:
    """A figure as SVG that is the same to the letter each time."""
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llm2clip", "font.family": "sans-serif"}):
        figure.savefig(
            stream, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = stream.getvalue()
    return text[text.index("<svg") :]
