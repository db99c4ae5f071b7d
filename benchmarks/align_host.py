"""Profile the CPU time that the host spends on each training step of `align`, excluding decoding and the model.

    python benchmarks/align_host.py

In each step, a GPU would have to wait for the main thread. The script measures each thread's CPU time, which hardly
depends on other processes. As in training on a GPU, a background thread prepares the next batches. Images are replaced
with constant pixels, which one worker process sends. Pinned memory is replaced with ordinary memory that is reused, as
PyTorch reuses pinned memory. Copies from pinned memory to the GPU are not included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from llm2clip.config import AlignConfig
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record
from llm2clip.data.table import RecordTable
from llm2clip.data.transforms import Preprocess
from llm2clip.parallel import Prefetcher
from llm2clip.runs.output_folder import MetricsLog
from llm2clip.store.layout import get_image_name
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter
from llm2clip.train import sampling
from llm2clip.train.sampling import AlignBatches, CaptionSampler

IMAGES, CAPTIONS, TEXT_DIM, FEATURE_DIM, IMAGE_SIZE = 16_384, 5, 2048, 1024, 224
MIX = {"captions": 0.5, "long_captions": 0.5}
STEPS = {"512 images": 512, "4,096 cached features": 4096}  # name -> number of images per step
WARM_UP = 2  # number of steps before the measurement
METRICS = {"loss": 1.0, "grad_norm": 1.0, "logit_scale": 1.0, "lr": 1.0, "images_per_second": 1.0, "data_wait": 1.0}
PHASES = ("receive images", "draw captions", "read store", "copy", "metrics", "rest", "total")


class ConstantImages(Dataset):
    """Data set of constant images, which need no decoding."""

    def __init__(self, refs: list[Any]) -> None:
        self.refs = refs

    def __getitem__(self, sample: tuple[int, int]) -> tuple[str, Tensor, tuple[int, int]]:
        pixels = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), sample[1] % 256, dtype=torch.uint8)
        return str(self.refs[sample[1]]), pixels, sample


class Profile:
    """CPU seconds and number of calls, by thread and phase."""

    def __init__(self) -> None:
        self.seconds: Counter[tuple[str, str]] = Counter()
        self.calls: Counter[tuple[str, str]] = Counter()

    def call(self, phase: str, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a function and add its CPU time to a phase."""
        thread = "main thread" if threading.current_thread() is threading.main_thread() else "background thread"
        start = time.thread_time()
        try:
            return function(*args, **options)
        finally:
            self.seconds[thread, phase] += time.thread_time() - start
            self.calls[thread, phase] += 1

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Replace a function or method with a wrapper that adds the CPU time of each call to a phase."""
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, **options: self.call(phase, function, *args, **options))

    def clear(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def milliseconds(self) -> dict[str, dict[str, float]]:
        """Return each phase's CPU time per step in ms, by thread. Each step calls the phase "total" once."""
        table: dict[str, dict[str, float]] = {}
        for (thread, phase), seconds in self.seconds.items():
            table.setdefault(thread, {})[phase] = 1e3 * seconds / self.calls[thread, "total"]
        for phases in table.values():
            phases["rest"] = 2 * phases["total"] - sum(phases.values())
        return table


def run_steps(batches: Any, steps: int, profile: Profile, step: Callable[[Any], None], pause: float) -> Any:
    """Run steps without a model: take a batch, call `step`, and pause so that the next batches can be prepared."""
    with closing(batches):
        for n in range(steps + WARM_UP):
            if n == WARM_UP:
                profile.clear()
            profile.call("total", lambda: step(next(batches)))
            time.sleep(pause)
        return profile.milliseconds()


def run(folder: Path, name: str, steps: int, pause: float) -> dict[str, dict[str, float]]:
    """Run `steps` training steps. Return the milliseconds per step of each phase, by thread."""
    refs = [FileImage(f"/images/{n:09}.jpg") for n in range(IMAGES)]
    texts = [tuple(f"caption {k} of image {n}" for k in range(CAPTIONS)) for n in range(IMAGES)]
    records = [Record(str(n), refs[n], texts[n], (), (f"long caption of image {n}",)) for n in range(IMAGES)]
    store = write_store(folder / "captions", [text for record in records for text in record.texts], TEXT_DIM)
    features = write_store(folder / "features", [get_image_name(ref) for ref in refs], FEATURE_DIM)
    cached = "cached" in name
    config = AlignConfig(
        batch_size=STEPS[name],
        epochs=99,
        caption_mix=MIX,
        captions_per_image=2,
        workers=1,
        tower_lr=0.0 if cached else 1e-5,
    )
    preprocess = Preprocess(IMAGE_SIZE, "squash", 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    model: Any = SimpleNamespace(tower=SimpleNamespace(preprocess=preprocess))  # what `AlignBatches` uses
    table = RecordTable.from_records(records)
    data = AlignBatches(table, store, model.tower.preprocess, config, features=features if cached else None)
    if not cached:
        data.images = ConstantImages(refs)  # type: ignore[assignment]
    sampling.allocate_pinned = allocate_buffer  # type: ignore[assignment]
    profile = Profile()
    profile.wrap(_MultiProcessingDataLoaderIter, "_next_data", "receive images")
    profile.wrap(CaptionSampler, "sample", "draw captions")
    profile.wrap(EmbeddingStore, "take", "read store")
    metrics = MetricsLog(folder / "metrics.jsonl", 0)

    def copied_batches() -> Generator[Any]:
        with closing(data.batches(0)) as batches:
            while True:
                yield profile.call("total", lambda: copy(next(batches)))

    def copy(batch: Any) -> Any:
        return profile.call("copy", batch.map_tensors, copy_to_buffer)  # in place of pin_memory

    def step(batch: Any) -> None:
        batch.to(torch.device("meta"))  # in place of a GPU, which copies and converts by itself
        profile.call("metrics", metrics.write, 1, **METRICS)

    return run_steps(Prefetcher(copied_batches()), steps, profile, step, pause)


_buffers: dict[Any, list[Tensor]] = {}  # trailing shape and dtype -> buffers, oldest first
RING = 4  # number of buffers: one in use, two that are prefetched, and one that is being filled


def allocate_buffer(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a part of a buffer that is reused, in place of pinned memory."""
    ring = _buffers.setdefault((*shape[1:], dtype), [])
    buffer = ring.pop(0) if len(ring) == RING else None
    if buffer is None or len(buffer) < shape[0]:
        buffer = torch.zeros((2 * shape[0], *shape[1:]), dtype=dtype)
    ring.append(buffer)
    return buffer[: shape[0]]


def copy_to_buffer(tensor: Tensor) -> Tensor:
    """Copy a tensor to a buffer, in place of `pin_memory`, unless it already is in a buffer."""
    is_in_buffer = any(tensor.data_ptr() == buffer.data_ptr() for ring in _buffers.values() for buffer in ring)
    return tensor if is_in_buffer else allocate_buffer(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def write_store(folder: Path, keys: list[str], dim: int) -> EmbeddingStore:
    """Write a store of random float16 vectors."""
    vectors = np.random.default_rng(0).standard_normal((len(keys), dim), np.float32)
    writer = StoreWriter(folder, {"benchmark": dim}, dim, dtype="float16")
    writer.write(0, keys, [1] * len(keys), vectors)
    writer.finish()
    return EmbeddingStore(folder)


def measure(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Run the steps in a new process, because `run` permanently wraps the measured functions."""
    command = [sys.executable, __file__, "--run", name, "--steps", str(args.steps), "--pause", str(args.pause)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    times: dict[str, dict[str, float]] = json.loads(output.splitlines()[-1])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="number of measured steps")
    parser.add_argument(
        "--pause",
        type=float,
        default=2.0,
        help="pause after each step in seconds, during which the worker sends images",
    )
    parser.add_argument("--run", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(Path(folder), args.run, args.steps, args.pause)))
        return

    for name in STEPS:
        columns = measure(name, args)
        print(f"\n| CPU time per step of {name}, ms | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
        for phase in PHASES:
            cells = [f"{times[phase]:,.1f}" if phase in times else "" for times in columns.values()]
            print(f"| {phase} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
