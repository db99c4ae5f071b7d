"""Measure how long the host delays each training step of `align`, apart from the device's work and image decoding.

    python benchmarks/align_host.py

The device's work is replaced with a pause in which, as with a GPU, the host is idle. Images are replaced with
constant pixels. The time that remains of a step is the time for which a GPU would wait: for the next batch, for its
captions and for their embeddings.

    one by one    captions sampled for one image at a time, and no background thread, as in version 0.1
    batch         captions of a batch sampled with array operations, no background thread
    background    the same, in a background thread (`train/prefetch.py`), as on GPUs
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from llm2clip.config import AlignConfig
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record
from llm2clip.data.transforms import Preprocess
from llm2clip.store.image_features import image_name
from llm2clip.store.store import EmbeddingStore
from llm2clip.store.writer import StoreWriter
from llm2clip.train.align import _prepare_batches
from llm2clip.train.caption_sampling import CaptionSampler
from llm2clip.train.prefetch import Prefetcher
from llm2clip.train.sampling import AlignBatches

IMAGES, CAPTIONS, TEXT_DIM, FEATURE_DIM, IMAGE_SIZE = 16_384, 5, 2048, 1024, 224
CPU = torch.device("cpu")


class ConstantImages(Dataset):
    """Images that need no decoding."""

    def __init__(self, refs: list[FileImage]) -> None:
        self.refs = refs

    def __getitem__(self, sample: tuple[int, int]) -> tuple[str, Tensor, tuple[int, int]]:
        pixels = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), sample[1] % 256, dtype=torch.uint8)
        return str(self.refs[sample[1]]), pixels, sample


class OneByOne(CaptionSampler):
    """Samples the captions of one image at a time, as version 0.1."""

    def sample(self, epochs: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = [self._rows(epoch, image) for epoch, image in zip(epochs.tolist(), images.tolist(), strict=True)]
        flat = np.array([row for rows_of_image in rows for row in rows_of_image])
        return flat, np.repeat(np.arange(len(rows)), [len(rows_of_image) for rows_of_image in rows])

    def _rows(self, epoch: int, image: int) -> list[int]:
        rng = np.random.default_rng([self.seed, epoch, image])
        kinds = [(np.unique(c[image]), w) for c, w in zip(self.captions_by_kind, self.weights, strict=True)]
        kinds = [(rng.permutation(rows), weight) for rows, weight in kinds if len(rows) and weight]
        weights = np.array([weight for _, weight in kinds])
        sampled: list[int] = []
        used: Counter[int] = Counter()
        for kind in rng.choice(len(kinds), self.captions_per_image, p=weights / weights.sum()).tolist():
            rows = kinds[kind][0]
            if used[kind] < len(rows):
                sampled.append(int(rows[used[kind]]))
            used[kind] += 1
        return sampled


def write_store(folder: Path, names: list[str], dim: int) -> EmbeddingStore:
    """Write a store of random float16 vectors."""
    writer = StoreWriter(folder, {"benchmark": dim}, dim, dtype="float16")
    writer.write(0, names, [1] * len(names), np.random.default_rng(0).standard_normal((len(names), dim), np.float32))
    writer.finish()
    return EmbeddingStore(folder)


def host_seconds(batches: Any, steps: int, pause: float) -> list[float]:
    """Return the host time of each step. The first two steps, which start the workers, are not included."""
    times = []
    with closing(batches):
        for step in range(steps + 2):
            start = time.perf_counter()
            _, inputs = next(batches)
            inputs.to(CPU)
            if step >= 2:
                times.append(time.perf_counter() - start)
            time.sleep(pause)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured steps")
    parser.add_argument("--pause", type=float, default=0.3, help="seconds that the device takes for a step")
    args = parser.parse_args()

    refs = [FileImage(f"/images/{n:09}.jpg") for n in range(IMAGES)]
    texts = [tuple(f"caption {k} of image {n}" for k in range(CAPTIONS)) for n in range(IMAGES)]
    records = [Record(str(n), refs[n], texts[n], (), (f"long caption of image {n}",)) for n in range(IMAGES)]
    preprocess = Preprocess(IMAGE_SIZE, "squash", 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3)
    model: Any = SimpleNamespace(tower=SimpleNamespace(preprocess=preprocess))
    mix = {"captions": 0.5, "long_captions": 0.5}
    pixels = AlignConfig(batch_size=512, epochs=99, caption_mix=mix, captions_per_image=2, workers=1)
    cached = AlignConfig(batch_size=4096, epochs=99, caption_mix=mix, captions_per_image=2, tower_lr=0.0)
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "captions", [t for record in records for t in record.texts], TEXT_DIM)
        features = write_store(Path(folder) / "features", [image_name(ref) for ref in refs], FEATURE_DIM)
        print("| step | one by one | batch | background |\n|---|---|---|---|")
        for name, config in (("512 images", pixels), ("4,096 cached features", cached)):
            cells = []
            for mode in ("one by one", "batch", "background"):
                data = AlignBatches(records, store, model, config, features=features if config is cached else None)
                if config is pixels:
                    data.images = ConstantImages(refs)  # type: ignore[assignment]
                if mode == "one by one":
                    data.captions = OneByOne(data.captions.captions_by_kind, data.captions.weights.tolist(), config)
                batches = _prepare_batches(data, store, 0, CPU)
                times = host_seconds(Prefetcher(batches) if mode == "background" else batches, args.steps, args.pause)
                cells.append(f"{statistics.median(times) * 1e3:,.1f} ms")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
