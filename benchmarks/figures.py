"""Draw the figures in `docs/method.md`.

    python benchmarks/figures.py RUN

RUN is the run directory created by `python benchmarks/reproduce.py`.
"""

import json
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from llm2clip.evaluate.plots import COLOURS, GREY, create_axes, render_svg

FIGURES = Path(__file__).parents[1] / "docs/figures"
TEXT, IMAGE, TRAINED, SHARED = COLOURS[:4]
BOXES = {  # label: x, y, colour
    "captions": (0, 1, TEXT),
    "language model\n(tuned, then frozen)": (1.25, 1, TEXT),
    "store\n(each caption once)": (2.5, 1, TEXT),
    "adapter": (3.75, 1, TRAINED),
    "images": (0, 0, IMAGE),
    "vision tower": (1.25, 0, TRAINED),
    "projection": (2.5, 0, TRAINED),
    "shared space:\nloss, metrics,\nsearch": (4.9, 0.5, SHARED),
}


def plot_intervals(intervals: Mapping[str, tuple[float, float, float]], xlabel: str) -> str:
    """Plot each (value, low, high) with a horizontal error bar, keyed by label from top to bottom. Return the SVG."""
    figure, axes = create_axes(7.5, 0.5 + 0.36 * len(intervals))
    for n, (value, low, high) in enumerate(intervals.values()):
        axes.plot([low, high], [-n, -n], color=COLOURS[0], linewidth=2.5, alpha=0.5, solid_capstyle="round")
        axes.plot([value], [-n], "o", color=COLOURS[0], ms=6)
    axes.set_yticks([-n for n in range(len(intervals))], list(intervals), fontsize=8)
    axes.set_ylim(-len(intervals) + 0.4, 0.6)
    axes.set(xlabel=xlabel)
    return render_svg(figure)


def draw_data_flow() -> str:
    """Return an SVG diagram of the data flow from captions and images to the shared embedding space."""
    figure, axes = create_axes(9.5, 2.4)
    axes.axis("off")
    axes.set(xlim=(-0.5, 5.5), ylim=(-0.5, 1.5))
    for label, (x, y, colour) in BOXES.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "none", "edgecolor": colour, "linewidth": 1.4}
        axes.text(x, y, label, ha="center", va="center", color=GREY, fontsize=9, bbox=box)
    labels = list(BOXES)
    text_path, image_path = [*labels[:4], labels[-1]], [*labels[4:7], labels[-1]]
    arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 46, "shrinkB": 46}
    for start, end in [*pairwise(text_path), *pairwise(image_path)]:
        axes.annotate("", xy=BOXES[end][:2], xytext=BOXES[start][:2], arrowprops=arrow)
    axes.text(4.9, -0.35, "green: trained by align", ha="center", color=TRAINED, fontsize=8)
    return render_svg(figure)


def draw_caption_retrieval(run_dir: Path) -> str:
    """Return an SVG plot of each encoder's caption retrieval accuracy with intervals, sorted from low to high."""
    claim = json.loads((run_dir / "claims" / "1.json").read_text())
    intervals = {}
    for comparison in claim["comparisons"]:
        for side in ("low", "high"):
            intervals[comparison[side]] = tuple(comparison[f"{side}_interval"])
    by_accuracy = dict(sorted(intervals.items(), key=lambda item: item[1][0]))
    return plot_intervals(by_accuracy, "CRA, % (COCO's 5,000 test images)")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / "path.svg").write_text(draw_data_flow())
    (FIGURES / "cra.svg").write_text(draw_caption_retrieval(Path(sys.argv[1])))
