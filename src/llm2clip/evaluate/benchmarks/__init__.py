"""Readers of the public sets, in the form in which the field hands them out, each with its protocol and its source."""

from __future__ import annotations

from llm2clip.evaluate.benchmarks import classes, compositional, judged, karpathy, languages, long
from llm2clip.evaluate.benchmarks.base import Absent, Benchmark, Choice, Classes, Judged, Malformed

BENCHMARKS = {
    benchmark.name: benchmark
    for room in (karpathy, judged, long, languages, compositional, classes)
    for benchmark in room.BENCHMARKS
}

__all__ = ["BENCHMARKS", "Absent", "Benchmark", "Choice", "Classes", "Judged", "Malformed"]
