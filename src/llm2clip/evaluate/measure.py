"""A model on the public benchmarks: each by its kind's protocol, from vectors that are worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.captions import unique
from llm2clip.evaluate.benchmarks import BENCHMARKS, Absent, Benchmark, Choice, Classes, Judged, Malformed
from llm2clip.evaluate.choice import choices
from llm2clip.evaluate.classification import accuracy, class_vectors, prompts
from llm2clip.evaluate.judged import judged_figures
from llm2clip.evaluate.model import evaluate_model
from llm2clip.evaluate.report import RECALL, recall_row, table
from llm2clip.evaluate.vectors import Vectors


def measure(benchmark: Benchmark, folder: Path, vectors: Vectors) -> dict[str, Any]:
    """A model's figures on one benchmark.

    Args:
        benchmark: which.
        folder: of the benchmark.
        vectors: by the model.

    Returns:
        "benchmark" and "kind"; of retrieval "rows", see `evaluate_model`; else "figures" in percent, the numbers of
        "images" and "texts", and of those that the model "cut".

    Raises:
        Absent: something is missing in the folder.
        Malformed: a file is not what it should be.
        TooManySkipped: images cannot be decoded.
    """
    found: dict[str, Any] = {"benchmark": benchmark.name, "kind": benchmark.kind}
    data = benchmark.read(folder)
    if benchmark.kind == "retrieval":
        return found | {"rows": evaluate_model(vectors, data)}
    if benchmark.kind == "judged":
        figures, images, texts = _judged(data, vectors)
    elif benchmark.kind == "choice":
        figures, images, texts = _choices(data, vectors)
    else:
        figures, images, texts = _classes(data, vectors)
    return found | {"images": images, "texts": len(texts), "cut": vectors.cut(texts), "figures": figures}


def _judged(data: Judged, vectors: Vectors) -> tuple[dict[str, float], int, list[str]]:
    seen, kept = vectors.images(data.images)
    if len(kept) < len(data.images):
        lost = next(str(ref) for n, ref in enumerate(data.images) if n not in set(kept))
        raise Malformed(f"{len(data.images) - len(kept):,} images cannot be decoded, {lost} for one; all are needed")
    texts = list(data.captions)
    return judged_figures(data, seen, vectors.texts(texts)), len(kept), texts


def _choices(items: Sequence[Choice], vectors: Vectors) -> tuple[dict[str, float], int, list[str]]:
    refs = list({ref.key: ref for item in items for ref in item.images}.values())
    texts = unique(caption for item in items for caption in item.captions)
    seen, kept = vectors.images(refs)
    image = {refs[i].key: vector for i, vector in zip(kept, seen, strict=True)}
    text = dict(zip(texts, vectors.texts(texts), strict=True))
    whole = [item for item in items if all(ref.key in image for ref in item.images)]
    return choices(whole, image, text), len(image), texts


def _classes(classes: Classes, vectors: Vectors) -> tuple[dict[str, float], int, list[str]]:
    seen, kept = vectors.images(classes.images)
    texts = prompts(classes)
    found = class_vectors(vectors.texts(texts), len(classes.names))
    figures = accuracy(seen, [classes.labels[i] for i in kept], found)
    counts = torch.bincount(torch.tensor([classes.labels[i] for i in kept]))
    return figures | {"chance": 100.0 / int((counts > 0).sum())}, len(kept), texts


def named(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names; "all" is every one.

    Raises:
        ValueError: there is none of a name.
    """
    if unknown := [name for name in names if name not in BENCHMARKS and name != "all"]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}, and all")
    return [b for b in BENCHMARKS.values() if "all" in names or b.name in names]


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


def shown(results: Sequence[dict[str, Any]]) -> list[str]:
    """Tables to print, one a kind of benchmark."""
    lines = []
    rows = [(found["benchmark"], row) for found in results if found["kind"] == "retrieval" for row in found["rows"]]
    if rows:
        cells = [[name, *recall_row(row), _share(row["cut"], row["texts"])] for name, row in rows]
        lines.append(table(["benchmark", *RECALL, "cut"], cells))
    for found in results:
        if found["kind"] != "retrieval":
            header = ["benchmark", "images", *found["figures"], "cut"]
            cells = [found["benchmark"], found["images"], *found["figures"].values()]
            lines.append(table(header, [[*cells, _share(found["cut"], found["texts"])]]))
    return lines


def _share(cut: int | None, texts: int) -> str:
    return "not known" if cut is None else f"{100 * cut / max(1, texts):.1f}% of the texts" if cut else "none"
