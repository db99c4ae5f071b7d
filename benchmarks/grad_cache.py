"""Measure the memory and time of an `align` step with large batches, with and without gradient caching.

    python benchmarks/grad_cache.py [--batch_sizes 512 2048 16384] [--micro_batch_size 128] [--tower NAME]
        [--image_size 64] [--max_single_pass 2048]

A step runs forward and backward through the whole model on random images and embeddings. Each step is measured in a new
process. The reported memory is the peak during the step minus the memory before it. Without gradient caching, a step is
a single forward pass over the batch. Batches larger than --max_single_pass only run with gradient caching.
"""

import argparse
import subprocess
import sys
import time
from functools import partial

import torch
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.train.losses import info_nce
from llm2clip.train.optim import compute_cached_loss
from measurements import memory_mb, reset_peak_memory

TEXT_DIM = 576


@onednn_matmul()
def measure_step(batch_size: int, micro_batch_size: int, tower_name: str, image_size: int) -> str:
    """Return two table cells: the peak memory of a step in MB, and the speed in images per second."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    tower = VisionTower.from_pretrained(f"timm:{tower_name}", pretrained=False, image_size=image_size)
    config = LLM2CLIPConfig(tower.config, text_dim=TEXT_DIM, embed_dim=512, adapter=AdapterConfig(depth=1))
    model = LLM2CLIP(config, tower).to(device).train()
    pixels = torch.randint(0, 256, (batch_size, 3, image_size, image_size), dtype=torch.uint8)
    embeddings = torch.randn(batch_size, TEXT_DIM)

    def forward(start: int) -> tuple[Tensor, ...]:
        part = slice(start, start + micro_batch_size)
        image, text, scale, _ = model(pixels[part].to(device), embeddings[part].to(device))
        assert image is not None and text is not None
        return image, text, scale[None]

    def loss_function(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return info_nce(image, text, scale.mean())

    memory_before, time_before = reset_peak_memory(), time.perf_counter()
    passes = [partial(forward, start) for start in range(0, batch_size, micro_batch_size)]
    loss = (
        loss_function(*passes[0]()) if len(passes) == 1 else compute_cached_loss(passes, loss_function, model, device)
    )
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = memory_mb("VmHWM") - memory_before
    return f"{peak:,.0f} | {batch_size / (time.perf_counter() - time_before):.0f}"


def measure_in_new_process(batch_size: int, micro_batch_size: int, args: argparse.Namespace) -> str:
    options = {"--measure": batch_size, "--micro_batch_size": micro_batch_size, "--image_size": args.image_size}
    command = [sys.executable, __file__, "--tower", args.tower, *(str(x) for pair in options.items() for x in pair)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[512, 2048, 16384])
    parser.add_argument("--micro_batch_size", type=int, default=128)
    parser.add_argument("--tower", default="tf_efficientnet_lite0")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--max_single_pass", type=int, default=2048)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(measure_step(args.measure, args.micro_batch_size, args.tower, args.image_size))
        return
    print(f"{args.tower}, {args.image_size} pixels")
    print("| batch size | micro-batch size | peak memory, MB | images/s |\n|---|---|---|---|")
    for batch_size in args.batch_sizes:
        if batch_size <= args.max_single_pass:
            print(f"| {batch_size:,} | {batch_size:,} | {measure_in_new_process(batch_size, batch_size, args)} |")
        cells = measure_in_new_process(batch_size, args.micro_batch_size, args)
        print(f"| {batch_size:,} | {args.micro_batch_size:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
