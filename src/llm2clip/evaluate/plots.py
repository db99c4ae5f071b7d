"""SVG plots for reports. Transparent backgrounds and grey text suit both light and dark pages."""

import io
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

GREY = "#808994"
COLOURS = ("#3b7dd8", "#d9822b", "#2f9e6e", "#b0569c", "#8a7a3c", "#5c6bc0", "#c0504d")


def plot_curves(
    curves: Mapping[str, Sequence[float]],
    x: Sequence[float],
    xlabel: str,
    ylabel: str,
    bands: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    tick_labels: Sequence[str] | None = None,
) -> str | None:
    """Plot curves that share x values. Return an SVG, or None if Matplotlib is not installed.

    Args:
        curves: y values of each curve, keyed by curve name.
        bands: Intervals (low, high) to shade, one per x value, keyed by curve name.
        tick_labels: Label of each x value. Default: numbers at positions that Matplotlib chooses.
    """
    if find_spec("matplotlib") is None:
        return None
    figure, axes = create_axes(6.6, 3.6)
    for n, (name, y) in enumerate(curves.items()):
        colour = COLOURS[n % len(COLOURS)]
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o" if len(x) < 12 else None, ms=4, label=name)
        if bands and name in bands:
            low, high = zip(*bands[name], strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if tick_labels is not None:
        axes.set_xticks(x, tick_labels, fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
    return render_svg(figure)


def plot_curves_with_intervals(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], tick_labels: Sequence[str], xlabel: str, ylabel: str
) -> str | None:
    """Plot curves with shaded intervals (see `plot_curves`). A curve has a point (value, low, high) for each label."""
    values, bands = {}, {}
    for name, points in curves.items():
        values[name] = [value for value, _, _ in points]
        bands[name] = [(low, high) for _, low, high in points]
    return plot_curves(values, range(len(tick_labels)), xlabel, ylabel, bands=bands, tick_labels=tick_labels)


def plot_histograms(histograms: Mapping[str, Mapping[int, int]], xlabel: str, ylabel: str) -> str | None:
    """Plot histograms of positive integers on a log axis. Return an SVG, or None if Matplotlib is not installed.

    `histograms` contains the number of occurrences of each integer, keyed by histogram name.
    """
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.ticker import LogLocator

    figure, axes = create_axes(4.8, 2.9)
    low, high = min(map(min, histograms.values())), max(map(max, histograms.values()))
    bins = np.unique(np.geomspace(low, max(high + 1, 2 * low), 31).round())  # each bin contains an integer
    for n, (name, counts) in enumerate(histograms.items()):
        weights, colour = list(counts.values()), COLOURS[n % len(COLOURS)]
        axes.hist(list(counts), bins, weights=weights, histtype="step", color=colour, linewidth=1.8, label=name)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xticks([], minor=True)
    axes.set(xlabel=f"{xlabel} (logarithmic)", ylabel=ylabel)
    if len(histograms) > 1:
        axes.legend(frameon=False, labelcolor=GREY, fontsize=8)
    return render_svg(figure)


def create_axes(width: float, height: float) -> tuple[Any, Any]:
    """Create a figure with a single plot. Return the figure and its axes. `width` and `height` are in inches."""
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


def render_svg(figure: Any) -> str:
    """Convert a figure to SVG. Identical figures produce identical SVGs."""
    import matplotlib
    from matplotlib.text import Text

    stream = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Labels, such as model names, may contain dollar signs, which must not be parsed as math.
    for label in figure.findobj(Text):
        label.set_parse_math(False)
    options: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "llm2clip", "font.family": "sans-serif"}
    options["text.parse_math"] = False
    with matplotlib.rc_context(options):
        figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    text = stream.getvalue()
    return text[text.index("<svg") :]
