"""The contrastive losses against open_clip's, forward and backward: time side by side in one process, memory each in
one of its own.

    python benchmarks/losses.py [--sizes 4096 16384] [--width 1024] [--turns 3] [--device cpu]

Memory is what the process (on a GPU, PyTorch) had at its peak beyond what it had with the inputs made and the libraries
warm; "working" is that without the gradients of the inputs, 2 N D floats which any loss has to leave behind.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.train.losses import info_nce, sigmoid_loss
from shared import memory, peak_from_here

SCALE, BIAS = 20.0, -10.0
clip, siglip = ClipLoss(), SigLipLoss()
WAYS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "open_clip ClipLoss": lambda i, t, s, b: clip(i, t, s),
    "here, info_nce": lambda i, t, s, b: info_nce(i, t, s),
    "open_clip SigLipLoss": lambda i, t, s, b: siglip(i, t, s, b),
    "here, sigmoid_loss": lambda i, t, s, b: sigmoid_loss(i, t, s, b),
}


def inputs(n: int, d: int, device: str) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    image = torch.randn(n, d, generator=g)
    text = 0.3 * image + torch.randn(n, d, generator=g)
    made = [F.normalize(image, dim=-1), F.normalize(text, dim=-1), torch.tensor(SCALE), torch.tensor(BIAS)]
    return [x.to(device).requires_grad_() for x in made]


def once(way: str, given: list[Tensor]) -> float:
    """Seconds of a forward and a backward pass."""
    for x in given:
        x.grad = None
    if given[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    WAYS[way](*given).backward()
    if given[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(way: str, n: int, d: int, device: str) -> float:
    """MB at the peak of one pass beyond those before it; in a process of its own."""
    once(way, inputs(64, d, device))
    given = inputs(n, d, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once(way, given)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    before = peak_from_here()
    once(way, given)
    return memory("VmHWM") - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    with onednn_matmul():
        if given.peak:
            print(peak(given.peak, given.sizes[0], given.width, given.device))
            sys.exit()
        print(
            "| N | loss | seconds, median (least to most) | against open_clip | MB at the peak | working MB | against |"
        )
        print("|---|---|---|---|---|---|---|")
        for n in given.sizes:
            made = inputs(n, given.width, given.device)
            seconds: dict[str, list[float]] = {way: [] for way in WAYS}
            for turn in range(given.turns + 1):
                for way in WAYS:
                    took = once(way, made)
                    if turn:
                        seconds[way].append(took)
            memory = {}
            for way in WAYS:
                command = [sys.executable, __file__, "--peak", way, "--sizes", str(n), "--width", str(given.width)]
                out = subprocess.run([*command, "--device", given.device], capture_output=True, text=True, check=True)
                memory[way] = float(out.stdout.split()[-1])
            gradients = 2 * n * given.width * 4 / 1e6
            for way, other in zip(WAYS, [w for w in WAYS if "open" in w for _ in "12"], strict=True):
                took, theirs = seconds[way], seconds[other]
                ratio = statistics.median(a / b for a, b in zip(took, theirs, strict=True))
                working, their_working = memory[way] - gradients, memory[other] - gradients
                shown = f"{statistics.median(took):.2f} ({min(took):.2f} to {max(took):.2f})"
                cells = [f"{n:,}", way, shown, f"{ratio:.2f}x", f"{memory[way]:,.0f}", f"{working:,.0f}"]
                print("| " + " | ".join([*cells, f"1/{their_working / max(working, 1):.0f}"]) + " |", flush=True)
