"""Measure the time and memory of computing R@1/5/10 in both directions, compared with CLIP_benchmark.

    pip install --no-deps clip-benchmark
    python benchmarks/retrieval.py [--images 5000] [--dim 512] [--repeats 3] [--large]

Both libraries use the same random embeddings, with five captions per image. Each measurement runs in its own process,
after a warm-up. The reported memory is the peak of the process, not including the embeddings. The functions of
CLIP_benchmark are called as in its own `evaluate` function, with batches of 64. `--large` measures only llm2clip, on
100,000 images and 500,000 captions in float16, which takes minutes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.evaluate.metrics import KS, recall, two_way_ranks
from measurements import memory_mb, reset_peak_memory


def random_embeddings(num_images: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return image embeddings, embeddings of five captions per image, and the image index of each caption.

    The embeddings are drawn in chunks, because memory freed by large temporary tensors would distort the measurement.
    """
    torch.manual_seed(0)
    images = torch.empty(num_images, dim, dtype=dtype)
    texts = torch.empty(5 * num_images, dim, dtype=dtype)
    for start in range(0, num_images, 1000):
        chunk = F.normalize(torch.randn(min(1000, num_images - start), dim), dim=-1)
        images[start : start + 1000] = chunk
        captions = chunk.repeat_interleave(5, 0) + 0.25 * torch.randn(5 * len(chunk), dim)
        texts[5 * start : 5 * start + len(captions)] = F.normalize(captions, dim=-1)
    return images, texts, torch.arange(num_images).repeat_interleave(5)


def llm2clip_recalls(images: Tensor, texts: Tensor, owner: Tensor) -> list[float]:
    image_ranks, text_ranks = two_way_ranks(images, texts, owner)
    return [*recall(image_ranks).values(), *recall(text_ranks).values()]


def clip_benchmark_recalls(images: Tensor, texts: Tensor, owner: Tensor) -> list[float]:
    from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

    scores = texts @ images.t()
    positives = torch.zeros_like(scores, dtype=torch.bool)
    positives[torch.arange(len(scores)), owner] = True
    recalls = []
    for direction_scores, direction_positives in ((scores.T, positives.T), (scores, positives)):
        for k in KS:
            hits = batchify(recall_at_k, direction_scores, direction_positives, 64, "cpu", k=k) > 0
            recalls.append(100 * hits.double().mean().item())
    return recalls


def measure(method: str, num_images: int, dim: int) -> str:
    """Return a JSON list of a method's time in seconds, memory in MB and six recalls."""
    compute = clip_benchmark_recalls if method == "clip_benchmark" else llm2clip_recalls
    compute(*random_embeddings(64, dim, torch.float32))  # warm-up
    dtype = torch.float16 if method == "large" else torch.float32
    images, texts, owner = random_embeddings(num_images, dim, dtype)
    memory_before, start = reset_peak_memory(), time.perf_counter()
    recalls = compute(images, texts, owner)
    seconds = time.perf_counter() - start
    return json.dumps([seconds, memory_mb("VmHWM") - memory_before, recalls])


def measure_in_processes(method: str, num_images: int, dim: int, repeats: int) -> tuple[float, float, list[float]]:
    """Return the median time, the largest peak memory, and the recalls, which must be equal in all repeats."""
    command = [sys.executable, __file__, "--measure", method, "--images", str(num_images), "--dim", str(dim)]
    results = []
    for _ in range(repeats):
        output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        results.append(json.loads(output))
    recalls = results[0][2]
    assert all(result[2] == recalls for result in results)
    return statistics.median(result[0] for result in results), max(result[1] for result in results), recalls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure(args.measure, args.images, args.dim))
        return
    if args.large:
        seconds, megabytes, recalls = measure_in_processes("large", 100_000, args.dim, 1)
        print(f"100,000 images x 500,000 captions, {args.dim} dimensions")
        print(f"{seconds:,.0f} s, {megabytes:,.0f} MB of memory; recalls: {recalls}")
        return
    names = {"clip_benchmark": "CLIP_benchmark", "llm2clip": "llm2clip"}
    results = {method: measure_in_processes(method, args.images, args.dim, args.repeats) for method in names}
    print(f"{args.images:,} images x {5 * args.images:,} captions, {args.dim} dimensions")
    print("| method | seconds | speed-up | peak MB | ratio | I2T R@1/5/10, T2I R@1/5/10 |\n|---|---|---|---|---|---|")
    base_seconds, base_megabytes, _ = results["clip_benchmark"]
    for method, (seconds, megabytes, recalls) in results.items():
        speedup, ratio = base_seconds / seconds, base_megabytes / megabytes
        shown = " ".join(f"{value:.2f}" for value in recalls)
        print(f"| {names[method]} | {seconds:.2f} | {speedup:.1f}x | {megabytes:,.0f} | 1/{ratio:.0f} | {shown} |")


if __name__ == "__main__":
    main()
