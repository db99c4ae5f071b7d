"""Measure how retrieval improves with the number of training photographs, with and without STRUCTURE.

    python benchmarks/learning_curve.py DATA --out runs/text_towers --names minilm
        [--sizes 250 500 1000 2000 4000 6000] [--structure 0 10 | --trained]

DATA and OUT are those of `text_towers.py`, which must have measured the text towers with the stage `frozen`. The heads
of the frozen tower are trained on random subsets of the training images, with three seeds; a seed also chooses the
subset. `--trained` trains the tower, too, with one seed. All models are tested on the 1,000 images of Flickr8k val.
Results are in OUT/NAME/curve/*.json, tables and the plot in OUT/curve.md and OUT/curve.svg.

STRUCTURE (arXiv 2506.16895) keeps the neighbours of each image and of each caption: its term is the Jensen-Shannon
divergence between the similarities of a batch before and after the heads. `--structure` lists its weights (the paper
uses 10); 0 trains without it.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.evaluate.plots import plot_curves_with_intervals
from llm2clip.reports import format_value_with_interval
from llm2clip.runs.ranks import load_or_compute_json
from llm2clip.store.store import EmbeddingStore
from llm2clip.train import align as align_module
from reproduce_claims import Interval, bootstrap_interval
from shared import make_parser, write_table
from text_towers_data import FLICKR, FROZEN, TRAINED, Benchmark

SIZES = (250, 500, 1000, 2000, 4000, 6000)
SEEDS = (0, 1, 2)
TEMPERATURE = 0.05  # of STRUCTURE's similarities, as in the paper


def structure_loss(original: Tensor, aligned: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence between the softmax similarities of two spaces, averaged over rows.

    `original` has shape (N, D) and `aligned` (N, E). Rows are normalised, then centred, as in the official code.
    """
    first, second = (_similarities(vectors) for vectors in (original, aligned))
    mean = ((first.exp() + second.exp()) / 2).log()
    return (
        F.kl_div(mean, first, reduction="batchmean", log_target=True)
        + F.kl_div(mean, second, reduction="batchmean", log_target=True)
    ) / 2


def _similarities(vectors: Tensor) -> Tensor:
    unit = F.normalize(vectors.float(), dim=-1)
    centred = unit - unit.mean(0)
    return (centred @ centred.T / TEMPERATURE).log_softmax(-1)


@contextmanager
def structure_term(weight: float, steps: int) -> Iterator[None]:
    """Add STRUCTURE to the loss of `align`. The weight grows linearly in the first tenth of the steps."""
    compute_loss, matryoshka_loss = align_module._compute_loss, align_module.matryoshka_loss
    batch, step = None, 0

    def remember_batch(net: Any, new_batch: Any, *args: Any) -> Any:
        nonlocal batch, step
        batch, step = new_batch, step + 1
        return compute_loss(net, new_batch, *args)

    def add_term(loss: Any, dims: Any, image: Tensor, text: Tensor, *args: Any) -> Tensor:
        assert batch is not None
        terms = structure_loss(batch.images, image) + structure_loss(batch.embeddings, text)
        ramp = min(1.0, step / (0.1 * steps))
        return matryoshka_loss(loss, dims, image, text, *args) + weight * ramp * terms / 2

    with patch.multiple(align_module, _compute_loss=remember_batch, matryoshka_loss=add_term):
        yield


def measure(
    benchmark: Benchmark, name: str, size: int, seed: int, structure: float = 0.0, trained: bool = False
) -> None:
    """Train a model on `size` random images and save its hits on Flickr8k val."""
    folder = benchmark.out / name / "curve"
    suffix = "-trained" if trained else f"-structure-{structure:g}" if structure else ""
    run_dir = folder / f"{size}-{seed}{suffix}"

    def train() -> dict[str, Any]:
        images = benchmark.splits.train
        images = images.select(images.count_texts("captions") > 0)
        images = images.select(np.random.default_rng(seed).permutation(len(images))[:size])
        config = replace(TRAINED if trained else FROZEN, seed=seed)
        steps = int(config.epochs * (size // min(size, config.batch_size)))
        store = EmbeddingStore(benchmark.out / name / "store")
        with structure_term(structure, steps) if structure else nullcontext():
            return {"steps": steps, **benchmark.train_and_test(images, store, config, run_dir, [FLICKR])}

    load_or_compute_json(folder / f"{run_dir.name}.json", train)
    shutil.rmtree(run_dir, ignore_errors=True)


# ---- tables and plot -------------------------------------------------------------------------------------------------


def read_hits(out: Path, name: str, size: int, suffix: str = "") -> Tensor | None:
    """Return the hits of each image, averaged over both directions, of shape (seeds, images)."""
    files = [out / name / "curve" / f"{size}-{seed}{suffix}.json" for seed in SEEDS]
    hits = [json.loads(file.read_text())["hits"][FLICKR] for file in files if file.exists()]
    return torch.tensor([[each["I2T"], each["T2I"]] for each in hits]).mean(1) if hits else None


def write_results(out: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Write mean R@1 for each size, with the paired differences to the first text tower and to no STRUCTURE."""
    curves: dict[str, list[Interval]] = {}
    rows = []
    for name in names:
        suffixes = {file.stem.split("-", 2)[2] for file in (out / name / "curve").glob("*-*-*.json")}
        for suffix in ["", *(f"-{each}" for each in sorted(suffixes))]:
            for size in sizes:
                hits = read_hits(out, name, size, suffix)
                if hits is None:
                    continue
                value, *limits = bootstrap_interval(hits)
                row = [name + suffix, f"{size:,}", str(len(hits)), format_value_with_interval(value, limits)]
                references = [read_hits(out, names[0], size, suffix), read_hits(out, name, size)]
                for is_other, reference in zip((name != names[0], bool(suffix)), references, strict=True):
                    if is_other and reference is not None:
                        difference = hits[: len(reference)] - reference[: len(hits)]
                        change, *change_limits = bootstrap_interval(difference)
                        row.append(format_value_with_interval(change, change_limits, "+.1f"))
                    else:
                        row.append("–")
                rows.append(row)
                if "structure" not in suffix:  # these curves would overlap
                    curves.setdefault(name + suffix, []).append((value, limits[0], limits[1]))
    header = ["text tower", "images", "seeds", "mean R@1", f"difference from {names[0]}", "difference from plain"]
    write_table(out / "curve.md", header, rows)
    complete = {name: points for name, points in curves.items() if len(points) == len(sizes)}
    if complete:
        labels = [f"{size:,}" for size in sizes]
        svg = plot_curves_with_intervals(complete, labels, "training photographs", "mean R@1, % (1,000 photographs)")
        if svg is not None:  # Matplotlib is installed
            (out / "curve.svg").write_text(svg)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--names", nargs="+", default=["minilm"], help="text towers; the first is the reference")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--structure", type=float, nargs="+", default=[0.0], metavar="WEIGHT")
    parser.add_argument("--trained", action="store_true")
    args = parser.parse_args()
    if args.trained and any(args.structure):
        parser.error("--structure is only for a frozen tower")
    seeds = SEEDS[:1] if args.trained else SEEDS
    benchmark = Benchmark(args.data.resolve(), args.out.resolve())
    for name, seed, size in product(args.names, seeds, args.sizes):
        for structure in args.structure:
            measure(benchmark, name, size, seed, structure, args.trained)
        write_results(benchmark.out, args.names, args.sizes)


if __name__ == "__main__":
    main()
