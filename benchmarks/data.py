"""Measure how fast the data in tar files is read, and how much memory this takes, at up to millions of images.

    python benchmarks/data.py FOLDER [--samples 400000 2000000 8000000]

Samples are a JPEG of 32 x 32 pixels and two captions, in webdataset tar files. Samples that exist in FOLDER are reused.
Each step runs in a new process. CPU seconds include the worker processes. The table shows the peak memory that no file
backs ("private" memory), summed over all processes, and the private memory of the process at the end of the step.
"""

import gc
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np

from llm2clip.config import AlignConfig, EvaluateConfig
from llm2clip.data.build_table import read_data_splits
from llm2clip.data.noun_phrases import add_noun_phrases
from llm2clip.data.records import TEXT_FIELDS
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.data.transforms import PreprocessConfig
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import open_store_for_writing
from llm2clip.train.sampling import AlignBatches
from measurements import Timer, list_processes, run_in_new_process
from samples import make_samples
from shared import make_parser, print_header, print_row

IMAGE_SIZE = 224
PREPROCESS = PreprocessConfig(IMAGE_SIZE, "squash", 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
STEPS = {  # name -> (part, number of cores or 0 for all)
    "read the sources with one core": ("read", 1),
    "read the sources with two cores": ("read", 2),
    "open the table": ("read", 0),
    "extract phrases with two cores": ("phrases", 2),
    "prepare the first step of `align`": ("align", 0),
    "the same, in a resumed run": ("align", 0),
}


def read_records(source: str, folder: Path) -> RecordTable:
    options: dict[str, Any] = {"keep_selected_splits": True, "folder": folder / "data"}
    return read_data_splits([f"{source}@none"], EvaluateConfig(), {}, SkipLog(), **options).train


def write_store(records: RecordTable, folder: Path) -> EmbeddingStore:
    """Write a store with one-dimensional embeddings of the captions and phrases, unless it exists."""
    if not (folder / "manifest.json").exists():
        texts = records.iterate_texts(TEXT_FIELDS)
        with open_store_for_writing(texts, folder, {"weights": "none"}, 1, dtype="float16", shard_size=1 << 16) as plan:
            for number in plan.shards:
                captions = plan.read_captions(number)
                plan.writer.write(number, captions, [1] * len(captions), np.ones((len(captions), 1), np.float32))
    return EmbeddingStore(folder)


def open_batches(records: RecordTable, store: EmbeddingStore, workers: int, batch_size: int) -> AlignBatches:
    """Open the training batches of `align` with two captions per image."""
    config = AlignConfig(batch_size=batch_size, workers=workers, captions_per_image=2, epochs=99)
    return AlignBatches(records, store, PREPROCESS, config)


class PeakMemory(threading.Thread):
    """Thread that records the peak private memory in MB of this process and its descendants."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stop = 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self.stop.wait(0.5):
            self.peak = max(self.peak, sum(map(read_private_memory, list_processes(os.getpid()))))


def read_private_memory(pid: int) -> float:
    """Return the memory of a process that no file backs, in MB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # the process has ended
        return 0.0
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return values["Pss_Anon"] + values["Pss_Shmem"]


def measure_step(part: str, cores: int, source: str, folder: Path) -> tuple[float, float, float, float]:
    """Run a step. Return its CPU and wall seconds, the peak private memory and that at the end, in MB."""
    if cores:
        os.sched_setaffinity(0, range(cores))
    timer, memory = Timer(), PeakMemory()
    if part == "read":
        with timer:
            records = read_records(source, folder)
    elif part == "phrases":
        records = read_records(source, folder)
        with timer:
            records = add_noun_phrases(records)
    else:
        records = add_noun_phrases(read_records(source, folder))
        store = EmbeddingStore(folder / "store")
        with timer:
            batches = open_batches(records, store, workers=0, batch_size=128)
            next(batches.iterate_samples(0))
    memory.stop.set()
    gc.collect()
    private = read_private_memory(os.getpid())
    return timer.cpu, timer.seconds, max(memory.peak, private), private


def prepare_store(source: str, folder: Path) -> None:
    write_store(add_noun_phrases(read_records(source, folder)), folder / "store")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder for the samples and the tables")
    parser.add_argument("--samples", type=int, nargs="+", default=[400_000, 2_000_000, 8_000_000])
    args = parser.parse_args()
    columns = ("images", "step", "CPU, s", "CPU, µs per image", "wall, s", "peak memory, MB", "memory at the end, MB")
    print_header(*columns)
    for count in args.samples:
        source, work = make_samples(args.folder, count, pixels=32), args.folder / f"work-{count}"
        for step, (part, cores) in STEPS.items():
            if step.startswith("read"):
                shutil.rmtree(work, ignore_errors=True)
            if part == "align":
                run_in_new_process(prepare_store, source, work)
            cpu, seconds, peak, private = run_in_new_process(measure_step, part, cores, source, work)
            times = (f"{cpu:.1f}", f"{1e6 * cpu / count:.1f}", f"{seconds:.1f}")
            print_row(f"{count:,}", step, *times, f"{peak:,.0f}", f"{private:,.0f}")


if __name__ == "__main__":
    main()
