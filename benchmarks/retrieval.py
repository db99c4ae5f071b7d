"""Time and memory of R@1/5/10 both ways: here, and by CLIP_benchmark's functions, on the same random vectors.

    pip install --no-deps clip-benchmark
    python benchmarks/retrieval.py [--images 5000] [--width 512] [--turns 3] [--large]

Five captions an image. Each way has a process of its own; memory is the process's peak beyond the vectors, the
libraries being warm. CLIP_benchmark is called as its own `evaluate` calls it, on batches of 64. `--large` is 100,000
images and 500,000 captions, float16, here alone, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.evaluate.ranks import two_way_ranks
from llm2clip.evaluate.recall import KS, recall
from shared import memory, peak_from_here


def vectors(images: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Images, five captions of each near it, and whose they are; made in parts, to leave no memory behind."""
    torch.manual_seed(0)
    image, text = torch.empty(images, width, dtype=dtype), torch.empty(5 * images, width, dtype=dtype)
    for lo in range(0, images, 1000):
        some = F.normalize(torch.randn(min(1000, images - lo), width), dim=-1)
        image[lo : lo + 1000] = some
        near = some.repeat_interleave(5, 0) + 0.25 * torch.randn(5 * len(some), width)
        text[5 * lo : 5 * lo + len(near)] = F.normalize(near, dim=-1)
    return image, text, torch.arange(images).repeat_interleave(5)


def ours(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    of_image, of_text = two_way_ranks(image, text, owner, progress=len(image) > 50_000)
    return [*recall(of_image).values(), *recall(of_text).values()]


def theirs(image: Tensor, text: Tensor, owner: Tensor) -> list[float]:
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = text @ image.t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner] = True
    found = []
    for a, b in ((scores.T, positive.T), (scores, positive)):
        for k in KS:
            hits = batchify(recall_at_k, a, b, 64, "cpu", k=k) > 0
            found.append(100 * hits.double().mean().item())
    return found


def one(way: str, images: int, width: int) -> str:
    """Seconds, MB and the six figures of one way."""
    way_of = theirs if way == "theirs" else ours
    way_of(*vectors(64, width, torch.float32))
    image, text, owner = vectors(images, width, torch.float16 if way == "large" else torch.float32)
    before, start = peak_from_here(), time.perf_counter()
    figures = way_of(image, text, owner)
    seconds = time.perf_counter() - start
    return json.dumps([seconds, memory("VmHWM") - before, figures])


def measured(way: str, images: int, width: int, turns: int) -> tuple[float, float, list[float]]:
    """The median of the seconds, the largest memory, and the figures, which must be the same in all turns."""
    command = [sys.executable, __file__, "--one", way, "--images", str(images), "--width", str(width)]
    runs = (subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout for _ in range(turns))
    done = [json.loads(run) for run in runs]
    assert all(figures == done[0][2] for _, _, figures in done)
    return statistics.median(s for s, _, _ in done), max(m for _, m, _ in done), done[0][2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(one(given.one, given.images, given.width))
        sys.exit()
    if given.large:
        seconds, memory, figures = measured("large", 100_000, given.width, 1)
        print(f"100,000 images x 500,000 captions, {given.width} wide: {seconds:,.0f} s, {memory:,.0f} MB; {figures}")
        sys.exit()
    found = {way: measured(way, given.images, given.width, given.turns) for way in ("theirs", "ours")}
    names = {"theirs": "CLIP_benchmark", "ours": "here"}
    print(f"{given.images:,} images x {5 * given.images:,} captions, {given.width} wide")
    print("| way | seconds | ratio | MB | ratio | I2T R@1/5/10, T2I R@1/5/10 |\n|---|---|---|---|---|---|")
    base_s, base_m, _ = found["theirs"]
    for way, (seconds, memory, figures) in found.items():
        ratios = f"{seconds:.2f} | {base_s / seconds:.1f}x | {memory:,.0f} | 1/{base_m / memory:.0f}"
        print(f"| {names[way]} | {ratios} | {' '.join(f'{x:.2f}' for x in figures)} |")
