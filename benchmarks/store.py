"""How fast rows of a store are read, and what keys cost: ways side by side in one run.

    python benchmarks/store.py FOLDER [--rows 2000000] [--width 1024] [--batch 4096] [--turns 5]
        [--captions 1000000 10000000]

FOLDER gets a store of random vectors, `rows` of them. `cold` tells the system to forget the store's files before each
batch; `hot` reads batches after all of the store was read once. Rates are medians, with the least and the most. Then
captions, made up and some of them repeated: received as `llm2clip embed` does, written as shards of one number each,
and looked up again, in a process of its own whose peak memory is told; the time to make them up is taken off.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.store.layout import embeddings_path, shard_numbers
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter

SHARD = 65536
CAPTIONS = """
import random, sys, time
from pathlib import Path
import numpy as np
from llm2clip.store.encode import filling
from llm2clip.store.dedup import Incoming, groups
from llm2clip.store.store import EmbeddingStore

count, folder = int(sys.argv[1]), Path(sys.argv[2])
THINGS = "dog man woman child horse bird boat train street beach field kitchen table window tree ball".split()

def captions():
    rng = random.Random(0)
    for _ in range(count):
        some = rng.choices(THINGS, k=rng.choice((2, 3, 4, 5, 6)))
        yield " and ".join(f"a {thing} of {rng.randrange(20)}" for thing in some)

def peak():
    status = Path("/proc/self/status").read_text()  # ru_maxrss would be the parent's, too
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

before, times = peak(), [time.perf_counter()]
for _ in captions():
    pass
times.append(time.perf_counter())
with filling(captions(), folder, {"weights": "none"}, 1, "float16", 65536) as work:
    times.append(time.perf_counter())
    incoming = Incoming(work.came)
    for number, part in work.parts:
        some = incoming[part]
        work.writer.write(number, some, [len(some)] * len(some), np.zeros((len(some), 1)))
times.append(time.perf_counter())
store = EmbeddingStore(folder)
for some in groups(captions(), 8192):
    store.rows(some)
times.append(time.perf_counter())
made, received, written, joined = (b - a for a, b in zip(times, times[1:]))
cells = [f"{count:,}", f"{len(store):,}", *(f"{t:.0f}" for t in (received - made, written, joined - made))]
print("| " + " | ".join([*cells, f"{before:.0f}", f"{peak():.0f}"]) + " |")
"""


def make(folder: Path, rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    writer = StoreWriter(folder, {"weights": "random"}, width)
    for number, start in enumerate(range(0, rows, SHARD)):
        count = min(SHARD, rows - start)
        keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        writer.write_keyed(number, keys, [1] * count, rng.normal(size=(count, width)).astype(np.float16))
    writer.finish()


def forget(folder: Path) -> None:
    for number in shard_numbers(folder):
        file = os.open(embeddings_path(folder, number), os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


class PlainMap:
    """The common way: a memory map of each file, rows in the order in which they were asked for."""

    def __init__(self, folder: Path) -> None:
        self.maps = [np.load(embeddings_path(folder, n), mmap_mode="r") for n in shard_numbers(folder)]

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.maps[row // SHARD][row % SHARD] for row in rows]).astype(np.float32)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--captions", type=int, nargs="*", default=[1_000_000, 10_000_000])
    given = parser.parse_args()

    if not (given.folder / "manifest.json").exists():
        make(given.folder, given.rows, given.width)
    size = sum(embeddings_path(given.folder, n).stat().st_size for n in shard_numbers(given.folder))
    print(f"{given.rows:,} rows of {given.width}: {size / 1e9:.1f} GB, in the official float32 {2 * size / 1e9:.1f} GB")
    ways = {
        "a plain memory map": PlainMap(given.folder),
        "here, mapped, in order": EmbeddingStore(given.folder, "map"),
        "here, positional": EmbeddingStore(given.folder, "positional"),
    }
    keep_freed_memory(torch.device("cpu"))  # as training does
    rng = np.random.default_rng(1)
    rates: dict[str, dict[str, list[float]]] = {name: {"cold": [], "hot": []} for name in ways}

    def turn(kind: str) -> None:
        for name, way in ways.items():
            rows = rng.integers(0, given.rows, given.batch)
            if kind == "cold":
                forget(given.folder)
            start = time.perf_counter()
            way.take(rows)
            rates[name][kind].append(given.batch / (time.perf_counter() - start))

    for _ in range(given.turns):
        turn("cold")
    for way in ways.values():
        for first in range(0, given.rows, given.batch):
            way.take(np.arange(first, min(first + given.batch, given.rows)))
    for _ in range(10 * given.turns):
        turn("hot")
    print("| way | cold rows/s | hot rows/s |\n| --- | --- | --- |")
    for name, kinds in rates.items():
        cells = [f"{statistics.median(k):,.0f} ({min(k):,.0f} to {max(k):,.0f})" for k in kinds.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| captions | different | received, s | written, s | all found, s | MB before | MB at the peak |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for count in given.captions:
        with tempfile.TemporaryDirectory(dir=given.folder) as temporary:
            subprocess.run([sys.executable, "-c", CAPTIONS, str(count), temporary], check=True)
