"""Measure the time and memory of the contrastive losses, forward and backward, compared with open_clip.

    python benchmarks/losses.py [--sizes 4096 16384] [--device cpu]

Times are measured in one process, alternating between the losses. Peak memory is measured in a separate process for
each loss, and includes neither the inputs nor their gradients, which every loss must compute (2 N D floats each). On a
GPU, it is the memory allocated by PyTorch.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.train.losses import info_nce, sigmoid_loss
from measurements import memory_mb, reset_peak_memory, run_in_new_process
from shared import format_median, make_parser, print_header, print_row

DIM, REPEATS = 1024, 3
SCALE, BIAS = 20.0, -10.0
clip_loss, siglip_loss = ClipLoss(), SigLipLoss()
LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "open_clip ClipLoss": lambda image, text, scale, bias: clip_loss(image, text, scale),
    "llm2clip info_nce": lambda image, text, scale, bias: info_nce(image, text, scale),
    "open_clip SigLipLoss": siglip_loss,
    "llm2clip sigmoid_loss": sigmoid_loss,
}


def make_inputs(n: int, device: str) -> list[Tensor]:
    """Return image and text embeddings of shape (N, D), the logit scale and bias. All of them require gradients."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(n, DIM, generator=generator)
    text = 0.3 * image + torch.randn(n, DIM, generator=generator)
    inputs = [F.normalize(image, dim=-1), F.normalize(text, dim=-1), torch.tensor(SCALE), torch.tensor(BIAS)]
    return [x.to(device).requires_grad_() for x in inputs]


def time_pass(name: str, inputs: list[Tensor]) -> float:
    """Return the time of a forward and a backward pass, in seconds."""
    for x in inputs:
        x.grad = None
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    LOSSES[name](*inputs).backward()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


@use_onednn_matmul()
def measure_peak(name: str, n: int, device: str) -> float:
    """Return the peak memory of one pass in MB, without the inputs and gradients. Must be called in a new process."""
    time_pass(name, make_inputs(64, device))  # load the libraries before measuring
    inputs = make_inputs(n, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
        time_pass(name, inputs)
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        before = reset_peak_memory()
        time_pass(name, inputs)
        peak = memory_mb("VmHWM")
    return peak - before - 2 * n * DIM * 4 / 1e6


def print_rows(n: int, device: str) -> None:
    """Print the table rows for N images and N texts."""
    inputs = make_inputs(n, device)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for repeat in range(REPEATS + 1):
        for name in LOSSES:
            elapsed = time_pass(name, inputs)
            if repeat:  # the first repeat is a warm-up
                seconds[name].append(elapsed)
    for name, times in seconds.items():
        memory = run_in_new_process(measure_peak, name, n, device)
        print_row(f"{n:,}", name, format_median(times, ".2f"), f"{memory:,.0f}")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    with use_onednn_matmul():
        print_header("N", "loss", "seconds, median (range)", "memory, MB")
        for n in args.sizes:
            print_rows(n, args.device)


if __name__ == "__main__":
    main()
