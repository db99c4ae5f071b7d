"""A model on the public benchmarks: each by its kind's protocol, from vectors that are worked out once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llm2clip.data.hashing import unique_captions
from llm2clip.distributed import print_once
from llm2clip.evaluate.benchmarks import (
    Benchmark,
    ClassificationData,
    CompositionalExample,
    DataFormatError,
    JudgedRetrieval,
    MissingFileError,
)
from llm2clip.evaluate.compositional import compositional_accuracy
from llm2clip.evaluate.eccv_caption import eccv_metrics
from llm2clip.evaluate.embeddings import EmbeddingSource
from llm2clip.evaluate.retrieval_eval import RetrievalRanks, rank_caption_fields, rows
from llm2clip.evaluate.zero_shot import class_embeddings, class_prompts, classification_accuracy, linear_probe


@dataclass
class BenchmarkResult:
    """A model on a benchmark.

    Args:
        figures: what goes into a file: "benchmark" and "kind"; of retrieval "rows", see `evaluate_caption_fields`; else
            "figures" in percent (but for "its C", a linear probe's), the numbers of "images" and "texts", and of those
            that the model "truncated".
        ranked: of retrieval, what the rows were made of, by the kind of caption.
    """

    figures: dict[str, Any]
    ranked: dict[str, RetrievalRanks] = field(default_factory=dict)


def run_benchmark(benchmark: Benchmark, folder: Path, vectors: EmbeddingSource, probe: bool = False) -> BenchmarkResult:
    """A model's figures on one benchmark.

    Args:
        benchmark: which.
        folder: of the benchmark.
        vectors: by the model.
        probe: of classes, fit a linear one, too, where there are training images.

    Raises:
        MissingFileError: something is missing in the folder.
        DataFormatError: a file is not what it should be.
        TooManySkipped: images cannot be decoded.
    """
    found: dict[str, Any] = {"benchmark": benchmark.name, "kind": benchmark.kind}
    data = benchmark.load(folder)
    if benchmark.kind == "retrieval":
        ranked = rank_caption_fields(vectors, data)
        return BenchmarkResult(found | {"rows": rows(vectors, ranked)}, ranked)
    if benchmark.kind == "judged":
        figures, images, texts = _judged(data, vectors)
    elif benchmark.kind == "choice":
        figures, images, texts = _choices(data, vectors)
    else:
        figures, images, texts = _classes(data, vectors, _training(benchmark, folder) if probe else None)
    return BenchmarkResult(
        found | {"images": images, "texts": len(texts), "truncated": vectors.count_truncated(texts), "figures": figures}
    )


def _training(benchmark: Benchmark, folder: Path) -> ClassificationData | None:
    """What a linear probe learns from, where there is something."""
    try:
        train = benchmark.load_train(folder)
    except MissingFileError as error:
        print_once(f"{benchmark.name}: no linear probe: {error}")
        return None
    if train is None or len(set(train.labels)) < 2:
        print_once(f"{benchmark.name}: no linear probe: it takes training images of two classes")
        return None
    return train


def _judged(data: JudgedRetrieval, vectors: EmbeddingSource) -> tuple[dict[str, float], int, list[str]]:
    seen, kept = vectors.images(data.images)
    if len(kept) < len(data.images):
        lost = next(str(ref) for n, ref in enumerate(data.images) if n not in set(kept))
        raise DataFormatError(
            f"{len(data.images) - len(kept):,} images cannot be decoded, {lost} for one; all are needed"
        )
    texts = list(data.captions)
    return eccv_metrics(data, seen, vectors.texts(texts)), len(kept), texts


def _choices(
    items: Sequence[CompositionalExample], vectors: EmbeddingSource
) -> tuple[dict[str, float], int, list[str]]:
    refs = list({ref.key: ref for item in items for ref in item.images}.values())
    texts = unique_captions(caption for item in items for caption in item.captions)
    seen, kept = vectors.images(refs)
    image = {refs[i].key: vector for i, vector in zip(kept, seen, strict=True)}
    text = dict(zip(texts, vectors.texts(texts), strict=True))
    whole = [item for item in items if all(ref.key in image for ref in item.images)]
    return compositional_accuracy(whole, image, text), len(image), texts


def _classes(
    classes: ClassificationData, vectors: EmbeddingSource, train: ClassificationData | None
) -> tuple[dict[str, float], int, list[str]]:
    seen, kept = vectors.images(classes.images)
    texts = class_prompts(classes)
    found = class_embeddings(vectors.texts(texts), len(classes.names))
    figures = classification_accuracy(seen, [classes.labels[i] for i in kept], found)
    counts = torch.bincount(torch.tensor([classes.labels[i] for i in kept]))
    figures["chance"] = 100.0 / int((counts > 0).sum())
    if train is not None:
        if list(train.names) != list(classes.names):
            raise DataFormatError("the training images are of other classes than those tested, or in another order")
        known, of = vectors.images(train.images)
        fitted = linear_probe(known, [train.labels[i] for i in of], seen, [classes.labels[i] for i in kept])
        figures |= {"linear probe": fitted["top-1"], "its C": fitted["C"]}
    return figures, len(kept), texts
