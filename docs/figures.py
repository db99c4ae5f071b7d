"""The figures of `method.md`: `python docs/figures.py RUN`, where RUN is a run of `llm2clip reproduce`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llm2clip.evaluate.reporting import plots
from llm2clip.evaluate.reporting.plots import COLOURS, GREY

FIGURES = Path(__file__).parent / "figures"
BOXES = {  # name: x, y, colour
    "captions": (0, 1, 0),
    "language model\n(tuned, then frozen)": (1.25, 1, 0),
    "store\n(each caption once)": (2.5, 1, 0),
    "adapter": (3.75, 1, 2),
    "images": (0, 0, 1),
    "vision tower": (1.25, 0, 2),
    "projection": (2.5, 0, 2),
    "one space:\nloss, metrics,\nsearch": (4.9, 0.5, 3),
}


def path() -> str:
    """The way of a caption and of an image."""
    figure, axes = plots.new_axes(9.5, 2.4)
    axes.axis("off")
    axes.set(xlim=(-0.5, 5.5), ylim=(-0.5, 1.5))
    for name, (x, y, colour) in BOXES.items():
        box = {"boxstyle": "round,pad=0.5", "facecolor": "none", "edgecolor": COLOURS[colour], "linewidth": 1.4}
        axes.text(x, y, name, ha="center", va="center", color=GREY, fontsize=9, bbox=box)
    rows = [list(BOXES)[:4], list(BOXES)[4:7]]
    steps = [(a, b) for row in rows for a, b in zip(row, [*row[1:], list(BOXES)[-1]], strict=True)]
    for a, b in steps:
        (x, y, _), (u, v, _) = BOXES[a], BOXES[b]
        arrow = {"arrowstyle": "->", "color": GREY, "shrinkA": 46, "shrinkB": 46}
        axes.annotate("", (u, v), (x, y), arrowprops=arrow)
    axes.text(4.9, -0.35, "green: what align trains", ha="center", color=COLOURS[2], fontsize=8)
    return plots.to_svg(figure)


def cra(run: Path) -> str:
    """Caption retrieval of the encoders of a run, with intervals."""
    claim = json.loads((run / "claims/1.json").read_text())
    sides = {}
    for comparison in claim["comparisons"]:
        for side in ("low", "high"):
            sides[comparison[side]] = tuple(comparison[f"{side}_figure"])
    return plots.plot_intervals(
        dict(sorted(sides.items(), key=lambda item: item[1][0])), "CRA, % (COCO's 5,000 test images)"
    )


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / "path.svg").write_text(path())
    (FIGURES / "cra.svg").write_text(cra(Path(sys.argv[1])))
