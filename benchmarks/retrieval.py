"""Measure the time and memory of computing R@1/5/10 in both directions, compared with CLIP_benchmark.

    pip install --no-deps clip-benchmark
    python benchmarks/retrieval.py

Both libraries use the same random embeddings of 5,000 images and 25,000 captions. Each measurement runs in its own
process, after a warm-up. The reported memory is the peak of the process, not including the embeddings. The functions of
CLIP_benchmark are called as in its own `evaluate` function, with batches of 64.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.evaluate.metrics import KS, compute_recall, two_way_ranks
from measurements import memory_mb, reset_peak_memory, run_in_new_process
from shared import print_header, print_row

IMAGES, DIM, REPEATS = 5000, 512, 3


def random_embeddings(num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return image embeddings, embeddings of five captions per image, and the image index of each caption.

    The embeddings are drawn in chunks, because memory freed by large temporary tensors would distort the measurement.
    """
    torch.manual_seed(0)
    images, texts = torch.empty(num_images, DIM), torch.empty(5 * num_images, DIM)
    for start in range(0, num_images, 1000):
        chunk = F.normalize(torch.randn(min(1000, num_images - start), DIM), dim=-1)
        images[start : start + 1000] = chunk
        captions = chunk.repeat_interleave(5, 0) + 0.25 * torch.randn(5 * len(chunk), DIM)
        texts[5 * start : 5 * start + len(captions)] = F.normalize(captions, dim=-1)
    return images, texts, torch.arange(num_images).repeat_interleave(5)


def llm2clip_recalls(images: Tensor, texts: Tensor, owner: Tensor) -> list[float]:
    image_ranks, text_ranks = two_way_ranks(images, texts, owner)
    return [*compute_recall(image_ranks).values(), *compute_recall(text_ranks).values()]


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


def measure(method: str) -> tuple[float, float, list[float]]:
    """Return a method's time in seconds, memory in MB and six recalls."""
    compute = METHODS[method]
    compute(*random_embeddings(64))  # warm-up
    images, texts, owner = random_embeddings(IMAGES)
    memory_before, start = reset_peak_memory(), time.perf_counter()
    recalls = compute(images, texts, owner)
    seconds = time.perf_counter() - start
    return seconds, memory_mb("VmHWM") - memory_before, recalls


METHODS = {"CLIP_benchmark": clip_benchmark_recalls, "llm2clip": llm2clip_recalls}


def main() -> None:
    print_header("implementation", "seconds", "additional memory, MB", "I2T R@1/5/10, T2I R@1/5/10")
    for method in METHODS:
        results = [run_in_new_process(measure, method) for _ in range(REPEATS)]
        seconds = statistics.median(result[0] for result in results)
        memory = max(result[1] for result in results)
        recalls = " ".join(f"{value:.2f}" for value in results[0][2])
        print_row(method, f"{seconds:.2f}", f"{memory:,.0f}", recalls)


if __name__ == "__main__":
    main()
