"""Measure how fast the embedding store reads rows, adds captions and looks up captions.

    python benchmarks/store.py FOLDER [--rows 2000000] [--width 1024] [--batch 4096] [--repeats 5]
        [--captions 1000000 10000000]

Reading: a store of random embeddings is created in FOLDER. Batches of random rows are read alternately with a plain
memory map, and with `EmbeddingStore` without and with `read_ahead`. For `cold` reads, the store's
files are dropped from the page cache before each batch. For `hot` reads, the entire store has already been read once.
The table shows medians and ranges.

Captions: in a separate process, captions (some of them repeated) are generated, deduplicated as in `llm2clip embed`,
written as shards with one-dimensional embeddings, and looked up again. The table shows times in seconds, without the
time to generate the captions. It also shows the process's memory at the start and its peak memory.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.store.layout import embeddings_path, list_shard_numbers
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter

SHARD_SIZE = 65536
CAPTION_BENCHMARK = """
import random, sys, time
from pathlib import Path
import numpy as np
from llm2clip.store.layout import iter_chunks
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import open_for_writing

count, folder = int(sys.argv[1]), Path(sys.argv[2])
NOUNS = "dog man woman child horse bird boat train street beach field kitchen table window tree ball".split()

def captions():
    rng = random.Random(0)
    for _ in range(count):
        nouns = rng.choices(NOUNS, k=rng.choice((2, 3, 4, 5, 6)))
        yield " and ".join(f"a {noun} of {rng.randrange(20)}" for noun in nouns)

def peak_memory():
    status = Path("/proc/self/status").read_text()  # ru_maxrss would include the parent's
    return int(status.split("VmHWM:")[1].split()[0]) / 1024

memory_before, times = peak_memory(), [time.perf_counter()]
for _ in captions():
    pass
times.append(time.perf_counter())
with open_for_writing(captions(), folder, {"weights": "none"}, 1, dtype="float16", shard_size=65536) as plan:
    times.append(time.perf_counter())
    for number in plan.shards:
        texts = plan.read_captions(number)
        plan.writer.write(number, texts, [len(texts)] * len(texts), np.zeros((len(texts), 1)))
times.append(time.perf_counter())
store = EmbeddingStore(folder)
for texts in iter_chunks(captions(), 8192):
    store.find_rows(texts)
times.append(time.perf_counter())
generate, deduplicate, write, look_up = (stop - start for start, stop in zip(times, times[1:]))
seconds = (deduplicate - generate, write, look_up - generate)
cells = [f"{count:,}", f"{len(store):,}", *(f"{t:.1f}" for t in seconds)]
print("| " + " | ".join([*cells, f"{memory_before:.0f}", f"{peak_memory():.0f}"]) + " |")
"""


class Reader(Protocol):
    """Interface of the readers that are compared."""

    def take(self, rows: np.ndarray) -> np.ndarray: ...


class PlainMap:
    """Baseline with one memory map per file. Rows are read in the requested order."""

    def __init__(self, folder: Path) -> None:
        self.maps = [np.load(embeddings_path(folder, n), mmap_mode="r") for n in list_shard_numbers(folder)]

    def take(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self.maps[row // SHARD_SIZE][row % SHARD_SIZE] for row in rows]).astype(np.float32)


def write_random_store(folder: Path, rows: int, width: int) -> None:
    rng = np.random.default_rng(0)
    writer = StoreWriter(folder, {"weights": "random"}, width)
    for number, start in enumerate(range(0, rows, SHARD_SIZE)):
        count = min(SHARD_SIZE, rows - start)
        keys = rng.integers(0, 256, (count, 16), dtype=np.uint8)
        embeddings = rng.normal(size=(count, width)).astype(np.float16)
        writer.write(number, [], [1] * count, embeddings, keys)
    writer.finish()


def drop_page_cache(folder: Path) -> None:
    for number in list_shard_numbers(folder):
        file = os.open(embeddings_path(folder, number), os.O_RDONLY)
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def measure_reads(folder: Path, rows: int, batch: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Return the speeds of cold and hot reads in rows per second, for each reader."""
    readers: dict[str, Reader] = {
        "plain memory map": PlainMap(folder),
        "EmbeddingStore": EmbeddingStore(folder, read_ahead=False),
        "EmbeddingStore, read ahead": EmbeddingStore(folder, read_ahead=True),
    }
    rng = np.random.default_rng(1)
    rates: dict[str, dict[str, list[float]]] = {name: {"cold": [], "hot": []} for name in readers}

    def read_one_batch_each(kind: str) -> None:
        for name, reader in readers.items():
            batch_rows = rng.integers(0, rows, batch)
            if kind == "cold":
                drop_page_cache(folder)
            start = time.perf_counter()
            reader.take(batch_rows)
            rates[name][kind].append(batch / (time.perf_counter() - start))

    for _ in range(repeats):
        read_one_batch_each("cold")
    for reader in readers.values():  # read the entire store once
        for first in range(0, rows, batch):
            reader.take(np.arange(first, min(first + batch, rows)))
    for _ in range(10 * repeats):
        read_one_batch_each("hot")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--captions", type=int, nargs="*", default=[1_000_000, 10_000_000])
    args = parser.parse_args()

    if not (args.folder / "manifest.json").exists():
        write_random_store(args.folder, args.rows, args.width)
    size = sum(embeddings_path(args.folder, n).stat().st_size for n in list_shard_numbers(args.folder))
    print(f"{args.rows:,} rows of dimension {args.width}: {size / 1e9:.1f} GB (float32: {2 * size / 1e9:.1f} GB)")
    keep_freed_memory(torch.device("cpu"))  # as in training
    print("| reader | cold, rows/s | hot, rows/s |\n| --- | --- | --- |")
    for name, rates in measure_reads(args.folder, args.rows, args.batch, args.repeats).items():
        cells = [f"{statistics.median(r):,.0f} ({min(r):,.0f} to {max(r):,.0f})" for r in rates.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    if args.captions:
        print("\n| captions | distinct | deduplicate, s | write, s | look up all, s | memory before, MB | peak, MB |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for count in args.captions:
        with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
            subprocess.run([sys.executable, "-c", CAPTION_BENCHMARK, str(count), temporary], check=True)


if __name__ == "__main__":
    main()
