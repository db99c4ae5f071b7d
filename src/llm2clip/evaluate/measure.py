"""A model on the public benchmarks: each by its kind's protocol, from vectors that are worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.captions import unique
from llm2clip.evaluate.benchmarks import BENCHMARKS, Absent, Benchmark, Choice, Classes, Judged, Malformed
from llm2clip.evaluate.benchmarks.classes import FOLDER, any_folder
from llm2clip.evaluate.choice import choices
from llm2clip.evaluate.classification import accuracy, class_vectors, linear_probe, prompts
from llm2clip.evaluate.judged import judged_figures
from llm2clip.evaluate.model import Ranked, rank, row
from llm2clip.evaluate.report import table
from llm2clip.evaluate.vectors import VectorSource
from llm2clip.processes import say


@dataclass
class Measured:
    """A model on a benchmark.

    Args:
        figures: what goes into a file: "benchmark" and "kind"; of retrieval "rows", see `evaluate_model`; else
            "figures" in percent, the numbers of "images" and "texts", and of those that the model "cut".
        ranked: of retrieval, what the rows were made of, by the kind of caption.
    """

    figures: dict[str, Any]
    ranked: dict[str, Ranked] = field(default_factory=dict)


def measure(benchmark: Benchmark, folder: Path, vectors: VectorSource, probe: bool = False) -> Measured:
    """A model's figures on one benchmark.

    Args:
        benchmark: which.
        folder: of the benchmark.
        vectors: by the model.
        probe: of classes, fit a linear one, too, where there are training images.

    Raises:
        Absent: something is missing in the folder.
        Malformed: a file is not what it should be.
        TooManySkipped: images cannot be decoded.
    """
    found: dict[str, Any] = {"benchmark": benchmark.name, "kind": benchmark.kind}
    data = benchmark.read(folder)
    if benchmark.kind == "retrieval":
        ranked = rank(vectors, data)
        return Measured(found | {"rows": [row(vectors, name, some) for name, some in ranked.items()]}, ranked)
    if benchmark.kind == "judged":
        figures, images, texts = _judged(data, vectors)
    elif benchmark.kind == "choice":
        figures, images, texts = _choices(data, vectors)
    else:
        figures, images, texts = _classes(data, vectors, _training(benchmark, folder) if probe else None)
    return Measured(found | {"images": images, "texts": len(texts), "cut": vectors.cut(texts), "figures": figures})


def _training(benchmark: Benchmark, folder: Path) -> Classes | None:
    """What a linear probe learns from, where there is something."""
    try:
        train = benchmark.train(folder) if benchmark.train is not None else None
    except Absent as error:
        say(f"{benchmark.name}: no linear probe: {error}")
        return None
    if train is None or len(set(train.labels)) < 2:
        say(f"{benchmark.name}: no linear probe: it takes training images of two classes")
        return None
    return train


def _judged(data: Judged, vectors: VectorSource) -> tuple[dict[str, float], int, list[str]]:
    seen, kept = vectors.images(data.images)
    if len(kept) < len(data.images):
        lost = next(str(ref) for n, ref in enumerate(data.images) if n not in set(kept))
        raise Malformed(f"{len(data.images) - len(kept):,} images cannot be decoded, {lost} for one; all are needed")
    texts = list(data.captions)
    return judged_figures(data, seen, vectors.texts(texts)), len(kept), texts


def _choices(items: Sequence[Choice], vectors: VectorSource) -> tuple[dict[str, float], int, list[str]]:
    refs = list({ref.key: ref for item in items for ref in item.images}.values())
    texts = unique(caption for item in items for caption in item.captions)
    seen, kept = vectors.images(refs)
    image = {refs[i].key: vector for i, vector in zip(kept, seen, strict=True)}
    text = dict(zip(texts, vectors.texts(texts), strict=True))
    whole = [item for item in items if all(ref.key in image for ref in item.images)]
    return choices(whole, image, text), len(image), texts


def _classes(classes: Classes, vectors: VectorSource, train: Classes | None) -> tuple[dict[str, float], int, list[str]]:
    seen, kept = vectors.images(classes.images)
    texts = prompts(classes)
    found = class_vectors(vectors.texts(texts), len(classes.names))
    figures = accuracy(seen, [classes.labels[i] for i in kept], found)
    counts = torch.bincount(torch.tensor([classes.labels[i] for i in kept]))
    figures["chance"] = 100.0 / int((counts > 0).sum())
    if train is not None:
        if list(train.names) != list(classes.names):
            raise Malformed("the training images are of other classes than those tested, or in another order")
        known, of = vectors.images(train.images)
        fitted = linear_probe(known, [train.labels[i] for i in of], seen, [classes.labels[i] for i in kept])
        figures |= {"linear probe": fitted["top-1"], "its C": fitted["C"]}
    return figures, len(kept), texts


def named(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names; "all" is every public one, folder:PATH one's own folder of classes.

    Raises:
        ValueError: there is none of a name.
    """
    own = [any_folder(name.removeprefix(FOLDER)) for name in names if name.startswith(FOLDER)]
    if unknown := [n for n in names if n not in BENCHMARKS and n != "all" and not n.startswith(FOLDER)]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}, all, and {FOLDER}PATH")
    return [*(b for b in BENCHMARKS.values() if "all" in names or b.name in names), *own]


def listed(root: Path) -> list[str]:
    """Lines to print: every benchmark, whether it is under `root`, and how to get those that are not."""
    rows, missing = [], []
    for benchmark in BENCHMARKS.values():
        try:
            where = str(benchmark.find(root).relative_to(root))
        except Absent:
            where = "–"
            missing.append(f"{benchmark.name}: {benchmark.folders[0]}/ with {benchmark.get}")
        rows.append([benchmark.name, benchmark.kind, benchmark.about, where])
    lines = [table(["benchmark", "kind", "what it is", f"under {root}"], rows)]
    return [*lines, *(["How to get the others:", *missing] if missing else [])]
