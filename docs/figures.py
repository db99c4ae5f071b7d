"""Draw the figures in `method.md`.

    python docs/figures.py RUN

RUN is the run directory created by `python benchmarks/reproduce.py`.
"""

import json
import sys
from itertools import pairwise
from pathlib import Path

from llm2clip.evaluate import plots
from llm2clip.evaluate.plots import COLOURS, GREY

FIGURES = Path(__file__).parent / "figures"
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


def draw_data_flow() -> str:
    """Return an SVG diagram of the data flow from captions and images to the shared embedding space."""
    figure, axes = plots.create_axes(9.5, 2.4)
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
    return plots.to_svg(figure)


def draw_caption_retrieval(run_dir: Path) -> str:
    """Return an SVG plot of each encoder's caption retrieval accuracy with intervals, sorted from low to high."""
    claim = json.loads((run_dir / "claims" / "1.json").read_text())
    intervals = {}
    for comparison in claim["comparisons"]:
        for side in ("low", "high"):
            intervals[comparison[side]] = tuple(comparison[f"{side}_interval"])
    by_accuracy = dict(sorted(intervals.items(), key=lambda item: item[1][0]))
    return plots.plot_intervals(by_accuracy, "CRA, % (COCO's 5,000 test images)")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / "path.svg").write_text(draw_data_flow())
    (FIGURES / "cra.svg").write_text(draw_caption_retrieval(Path(sys.argv[1])))
