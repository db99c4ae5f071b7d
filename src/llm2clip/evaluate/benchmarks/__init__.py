"""Readers of the public sets, in the form in which the field hands them out, each with its protocol and its source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm2clip.evaluate.benchmarks import classification as classes
from llm2clip.evaluate.benchmarks import compositional
from llm2clip.evaluate.benchmarks import eccv_caption as judged
from llm2clip.evaluate.benchmarks import karpathy_splits as karpathy
from llm2clip.evaluate.benchmarks import long_captions as long
from llm2clip.evaluate.benchmarks import multilingual as languages
from llm2clip.evaluate.benchmarks.base import Benchmark, ClassificationData, CompositionalExample, JudgedRetrieval
from llm2clip.evaluate.benchmarks.classification import FOLDER, folder_benchmark
from llm2clip.html_report import Table, to_markdown
from llm2clip.io_utils import DataFormatError, MissingFileError

BENCHMARKS = {
    benchmark.name: benchmark
    for room in (karpathy, judged, long, languages, compositional, classes)
    for benchmark in room.BENCHMARKS
}

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "ClassificationData",
    "CompositionalExample",
    "DataFormatError",
    "JudgedRetrieval",
    "MissingFileError",
    "get_benchmarks",
    "list_benchmarks",
]


def get_benchmarks(names: Sequence[str]) -> list[Benchmark]:
    """The benchmarks of these names; "all" is every public one, folder:PATH one's own folder of classes.

    Raises:
        ValueError: there is none of a name.
    """
    own = [folder_benchmark(name.removeprefix(FOLDER)) for name in names if name.startswith(FOLDER)]
    if unknown := [n for n in names if n not in BENCHMARKS and n != "all" and not n.startswith(FOLDER)]:
        raise ValueError(f"no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}, all, and {FOLDER}PATH")
    return [*(b for b in BENCHMARKS.values() if "all" in names or b.name in names), *own]


def list_benchmarks(root: Path) -> list[str]:
    """Lines to print: every benchmark, whether it is under `root`, and how to get those that are not."""
    rows, missing = [], []
    for benchmark in BENCHMARKS.values():
        try:
            where = str(benchmark.find(root).relative_to(root))
        except MissingFileError:
            where = "–"
            missing.append(f"{benchmark.name}: {benchmark.folders[0]}/ with {benchmark.get}")
        rows.append([benchmark.name, benchmark.kind, benchmark.about, where])
    table = to_markdown("Benchmarks", [Table(["benchmark", "kind", "what it is", f"under {root}"], rows)], "")
    return [table, *(["How to get the others:", *missing] if missing else [])]
