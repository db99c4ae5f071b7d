"""A large batch on a small device: memory and time of a step of align in one pass, and with gradient caching.

    python benchmarks/grad_cache.py [--batches 512 2048 16384] [--micro_batch 128] [--tower NAME]
        [--image_size 64] [--at_most 2048]

Forward and backward of the whole model on random pictures and embeddings, each way in a process of its own; memory is
the process's peak beyond what it had before the step. Batches above `--at_most` are not tried in one pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from functools import partial

import torch
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.train.grad_cache import cached_backward
from llm2clip.train.losses import info_nce
from shared import memory, peak_from_here


@onednn_matmul()
def step(batch: int, micro_batch: int, tower: str, size: int) -> str:
    """MB at the peak of a step, and its images/s."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory(device)
    vision = VisionTower.from_pretrained(f"timm:{tower}", pretrained=False, image_size=size)
    model = LLM2CLIP(LLM2CLIPConfig(vision.config, 576, embed_dim=512, adapter_depth=1), vision).to(device).train()
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    embeddings = torch.randn(batch, 576)

    def run(start: int) -> tuple[Tensor, ...]:
        part = slice(start, start + micro_batch)
        image, text, scale, _ = model(pixels[part].to(device), embeddings[part].to(device))
        assert image is not None and text is not None
        return image, text, scale[None]

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return info_nce(image, text, scale.mean())

    before, start = peak_from_here(), time.perf_counter()
    starts = range(0, batch, micro_batch)
    value = (
        loss(*run(0)) if len(starts) == 1 else cached_backward([partial(run, n) for n in starts], loss, model, device)
    )
    value.backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else memory("VmHWM") - before
    return f"{peak:,.0f} | {batch / seconds:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", nargs="+", type=int, default=[512, 2048, 16384])
    parser.add_argument("--micro_batch", type=int, default=128)
    parser.add_argument("--tower", default="tf_efficientnet_lite0")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--at_most", type=int, default=2048)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(step(given.one, given.micro_batch, given.tower, given.image_size))
        sys.exit()
    print(f"{given.tower}, {given.image_size} pixels\n| batch | images in a pass | MB | images/s |\n|---|---|---|---|")
    for batch in given.batches:
        for micro in (batch, given.micro_batch):
            if micro == batch > given.at_most:
                continue
            options = ["--one", str(batch), "--micro_batch", str(micro), "--image_size", str(given.image_size)]
            command = [sys.executable, __file__, *options, "--tower", given.tower]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"| {batch:,} | {micro:,} | {out.strip()} |", flush=True)
