"""Measure CPU training speed with and without `keep_freed_memory`, each in its own process.

    python benchmarks/malloc.py

A training step is a forward and a backward pass of EfficientNet-Lite0 on 64 images of 160 pixels.
"""

import time

import torch

from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.models.vision.vision_tower import VisionTower
from measurements import run_in_new_process
from shared import print_header, print_row

SIZE, BATCH_SIZE, STEPS = 160, 64, 3


def measure_images_per_second(keep: bool) -> float:
    if keep:
        keep_freed_memory(torch.device("cpu"))
    tower = VisionTower.from_pretrained("timm:tf_efficientnet_lite0", pretrained=False, image_size=SIZE).train()
    pixels = torch.randint(0, 256, (BATCH_SIZE, 3, SIZE, SIZE), dtype=torch.uint8)
    start = 0.0
    for step in range(STEPS + 1):
        if step == 1:  # the first step is a warm-up
            start = time.perf_counter()
        tower(pixels).square().mean().backward()
    return BATCH_SIZE * STEPS / (time.perf_counter() - start)


if __name__ == "__main__":
    returned, kept = (run_in_new_process(measure_images_per_second, keep) for keep in (False, True))
    print_header("malloc returns freed memory, images/s", "malloc keeps freed memory, images/s", "ratio")
    print_row(f"{returned:.1f}", f"{kept:.1f}", f"{kept / returned:.2f}x")
