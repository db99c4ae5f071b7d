"""Readers for public benchmarks as distributed by their authors, with the protocol and source of each benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm2clip.evaluate.benchmarks import (
    classification,
    coco_boxes,
    compositional,
    eccv_caption,
    karpathy_splits,
    long_captions,
    multilingual,
    ov_coco,
    segmentation,
)
from llm2clip.evaluate.benchmarks.base import (
    Benchmark,
    ClassificationData,
    CompositionalExample,
    DetectionData,
    JudgedRetrieval,
    RegionData,
    SegmentationData,
)
from llm2clip.evaluate.benchmarks.classification import FOLDER_PREFIX, folder_benchmark
from llm2clip.evaluate.benchmarks.coco_boxes import BOXES_PREFIX, boxes_benchmark
from llm2clip.html_report import Table, to_markdown
from llm2clip.io_utils import DataFormatError, MissingFileError
from llm2clip.published_results import published_metrics, published_rows

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "ClassificationData",
    "CompositionalExample",
    "DataFormatError",
    "DetectionData",
    "JudgedRetrieval",
    "MissingFileError",
    "RegionData",
    "SegmentationData",
    "get_benchmarks",
    "list_benchmarks",
]

_MODULES = (
    karpathy_splits,
    eccv_caption,
    long_captions,
    multilingual,
    compositional,
    classification,
    coco_boxes,
    segmentation,
    ov_coco,
)
BENCHMARKS = {benchmark.name: benchmark for module in _MODULES for benchmark in module.BENCHMARKS}


def get_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks with the given names.

    The name "all" selects every public benchmark. A name of the form folder:PATH creates a zero-shot classification
    benchmark from a folder that contains one subfolder per class. A name of the form boxes:FILE creates a region
    classification benchmark from a JSON file in COCO's format.

    Raises:
        ValueError: If a name is unknown.
    """
    user_benchmarks = []
    for name in names:
        if name.startswith(FOLDER_PREFIX):
            user_benchmarks.append(folder_benchmark(name.removeprefix(FOLDER_PREFIX)))
        elif name.startswith(BOXES_PREFIX):
            user_benchmarks.append(boxes_benchmark(name.removeprefix(BOXES_PREFIX)))
        elif name not in BENCHMARKS and name != "all":
            choices = [*BENCHMARKS, "all", f"{FOLDER_PREFIX}PATH", f"{BOXES_PREFIX}FILE"]
            raise ValueError(f"no benchmark {name!r}; choose from {', '.join(choices)}")
    public = [benchmark for benchmark in BENCHMARKS.values() if "all" in names or benchmark.name in names]
    return public + user_benchmarks


def list_benchmarks(root: Path) -> list[str]:
    """Return lines of text that list all benchmarks and their folders in `root`.

    For each benchmark, the table shows for how many models the LLM2CLIP authors published results. For each missing
    benchmark, a line says where to download its files.
    """
    rows, missing = [], []
    for benchmark in BENCHMARKS.values():
        try:
            folder = str(benchmark.find(root).relative_to(root))
        except MissingFileError:
            folder = "–"
            missing.append(f"{benchmark.name} ({benchmark.folders[0]}/): {benchmark.source}")
        published = len(published_rows(benchmark.name) or published_metrics(benchmark.name)) or None
        rows.append([benchmark.name, benchmark.kind, benchmark.description, published, folder])
    table = Table(["benchmark", "kind", "description", "published results", f"folder in {root}"], rows)
    lines = [to_markdown("Benchmarks", [table])]
    if missing:
        lines += [f"To use the missing benchmarks, put these files into folders in {root}:", *missing]
    return lines
