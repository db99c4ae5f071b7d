"""What returning memory to the system costs a CPU trainer: EfficientNet-Lite0, forward and backward, with and without
`reuse_memory`, each in a process of its own.

    python benchmarks/malloc.py [--size 160] [--batch 64]
"""

import argparse
import subprocess
import sys
import time

import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.models.vision_tower import VisionTower


def images_per_second(size: int, batch: int, steps: int = 3) -> float:
    tower = VisionTower.from_pretrained("timm:tf_efficientnet_lite0", pretrained=False, image_size=size).train()
    pixels = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8)
    start = 0.0
    for step in range(steps + 1):
        if step == 1:
            start = time.perf_counter()  # the first step warms up
        tower(pixels).square().mean().backward()
    return batch * steps / (time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--one", choices=("plain", "reuse"), help="measure one way and print the figure")
    given = parser.parse_args()
    if given.one:
        if given.one == "reuse":
            keep_freed_memory(torch.device("cpu"))
        print(images_per_second(given.size, given.batch))
    else:
        command = [sys.executable, __file__, "--size", str(given.size), "--batch", str(given.batch), "--one"]
        speed = {way: float(subprocess.check_output([*command, way])) for way in ("plain", "reuse")}
        print(f"{speed['plain']:.1f} images/s plain, {speed['reuse']:.1f} with reuse_memory: "
              f"{speed['reuse'] / speed['plain']:.2f}x")  # fmt: skip
