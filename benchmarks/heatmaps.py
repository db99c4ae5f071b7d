"""Measure whether the heat maps of `llm2clip search` point at objects: the pointing game (arXiv 1608.00507).

    python benchmarks/heatmaps.py MODEL ROOT

ROOT contains COCO in the subfolder coco/. For each image and each class in it, the query is "a photo of a CLASS.", and
the heat map hits if its maximum is inside a box of the class. "Chance" is the fraction of heat map cells inside these
boxes. The 95% confidence intervals are computed by bootstrapping over images.
"""

from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from llm2clip.data.images import load_image
from llm2clip.evaluate.benchmarks import BENCHMARKS
from llm2clip.evaluate.metrics import bootstrap_intervals
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.search.explain import compute_heatmap, require_dense_encoder
from shared import make_parser, print_header, print_row


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("model", help="model, as in `llm2clip evaluate`")
    parser.add_argument("root", type=Path, help="folder with COCO in the subfolder coco/")
    args = parser.parse_args()
    model = open_dual_encoder(args.model)
    dense = require_dense_encoder(model)
    benchmark = BENCHMARKS["coco-boxes"]
    data = benchmark.load(benchmark.find_folder(args.root))
    queries = model.encode_texts([f"a photo of a {name}." for name in data.names]).numpy()
    hits: list[list[float]] = []  # for each image, 1 or 0 for each class in it
    chances: list[float] = []
    for ref, size, boxes, labels in zip(tqdm(data.images), data.sizes, data.boxes, data.labels, strict=True):
        pixels = dense.resize(load_image(ref), dense.localization_image_size)
        hits.append([])
        for label in np.unique(labels):
            heatmap = compute_heatmap(dense, pixels, queries[label])
            inside = find_cells_in_boxes(boxes[labels == label], size, heatmap.shape)
            hits[-1].append(float(inside.flat[heatmap.argmax()]))
            chances.append(float(inside.mean()))
    sums = torch.tensor([sum(image) for image in hits], dtype=torch.float64)
    counts = torch.tensor([len(image) for image in hits], dtype=torch.float64)
    low, high = (100 * bootstrap_intervals(sums[:, None], counts)).flatten().tolist()
    rate = 100 * np.mean([hit for image in hits for hit in image])
    print_header("queries", "hits, % (95% interval)", "chance, %")
    print_row(f"{len(chances):,}", f"{rate:.1f} ({low:.1f} to {high:.1f})", f"{100 * np.mean(chances):.1f}")


def find_cells_in_boxes(boxes: np.ndarray, size: tuple[int, int], grid: tuple[int, ...]) -> np.ndarray:
    """Return a boolean mask of shape (h, w) that is True for each cell whose centre is inside a box.

    `size` is the width and height of the image in pixels, and `grid` the height and width of the heat map in cells.
    """
    x = (np.arange(grid[1]) + 0.5) / grid[1] * size[0]
    y = (np.arange(grid[0]) + 0.5) / grid[0] * size[1]
    left, top, right, bottom = boxes.T[..., None]  # (B, 1) each
    columns = (left <= x) & (x <= right)  # (B, w)
    rows = (top <= y) & (y <= bottom)  # (B, h)
    inside: np.ndarray = (rows[:, :, None] & columns[:, None]).any(0)
    return inside


if __name__ == "__main__":
    main()
