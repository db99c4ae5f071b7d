"""Measure CPU training speed with and without `keep_freed_memory`, each in its own process.

    python benchmarks/malloc.py [--size 160] [--batch_size 64]

A training step is a forward and a backward pass of EfficientNet-Lite0.
"""

import argparse
import subprocess
import sys
import time

import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.models.vision.vision_tower import VisionTower

DEFAULT, KEEP = "default", "keep_freed_memory"


def measure_images_per_second(size: int, batch_size: int, steps: int = 3) -> float:
    """Measure the training speed over `steps` steps, after one warm-up step. `size` is the image size in pixels."""
    tower = VisionTower.from_pretrained("timm:tf_efficientnet_lite0", pretrained=False, image_size=size).train()
    pixels = torch.randint(0, 256, (batch_size, 3, size, size), dtype=torch.uint8)
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()
        tower(pixels).square().mean().backward()
    return batch_size * steps / (time.perf_counter() - start)


def measure_in_subprocess(variant: str, size: int, batch_size: int) -> float:
    """Return the training speed, measured in a new process, in images per second."""
    options = ["--size", str(size), "--batch_size", str(batch_size), "--variant", variant]
    return float(subprocess.check_output([sys.executable, __file__, *options]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=160, help="image size in pixels")
    parser.add_argument("--batch_size", type=int, default=64, help="number of images per step")
    parser.add_argument(
        "--variant", choices=(DEFAULT, KEEP), help="measure only this variant, and print its speed in images/s"
    )
    args = parser.parse_args()
    if args.variant:
        if args.variant == KEEP:
            keep_freed_memory(torch.device("cpu"))
        print(measure_images_per_second(args.size, args.batch_size))
    else:
        default = measure_in_subprocess(DEFAULT, args.size, args.batch_size)
        keep = measure_in_subprocess(KEEP, args.size, args.batch_size)
        print(f"{default:.1f} images/s by default, {keep:.1f} with keep_freed_memory: {keep / default:.2f}x")
