"""Measure the memory and time of an `align` step with large batches, with and without gradient caching.

    python benchmarks/grad_cache.py

A step runs forward and backward through the whole model on random images and embeddings. Each step is measured in a new
process. The reported memory is the peak during the step minus the memory before it. A step whose micro-batch is the
batch runs without gradient caching.
"""

import time
from functools import partial

import torch
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, use_onednn_matmul
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.train.losses import info_nce
from llm2clip.train.optim import compute_cached_loss
from measurements import memory_mb, reset_peak_memory, run_in_new_process
from shared import print_header, print_row

STEPS = ((512, 512), (512, 128), (2048, 2048), (2048, 128), (16384, 128))  # (batch size, micro-batch size)
IMAGE_SIZE, TEXT_DIM = 64, 576


@use_onednn_matmul()
def measure_step(batch_size: int, micro_batch_size: int) -> tuple[float, float]:
    """Return the peak memory of a step in MB, and the speed in images per second."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    keep_freed_memory(device)
    tower = VisionTower.from_pretrained("timm:tf_efficientnet_lite0", pretrained=False, image_size=IMAGE_SIZE)
    config = LLM2CLIPConfig(tower.config, text_dim=TEXT_DIM, embed_dim=512, adapter=AdapterConfig(depth=1))
    model = LLM2CLIP(config, tower).train()
    pixels = torch.randint(0, 256, (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    embeddings = torch.randn(batch_size, TEXT_DIM)

    def forward(start: int) -> tuple[Tensor, ...]:
        part = slice(start, start + micro_batch_size)
        image, text, scale, _ = model(pixels[part], embeddings[part])
        return image, text, scale[None]

    def compute_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return info_nce(image, text, scale.mean())

    memory_before, time_before = reset_peak_memory(), time.perf_counter()
    passes = [partial(forward, start) for start in range(0, batch_size, micro_batch_size)]
    is_cached = len(passes) > 1
    loss = compute_cached_loss(passes, compute_loss, model, device) if is_cached else compute_loss(*passes[0]())
    loss.backward()
    return memory_mb("VmHWM") - memory_before, batch_size / (time.perf_counter() - time_before)


if __name__ == "__main__":
    print_header("batch size", "micro-batch size", "memory, MB", "images/s")
    for batch_size, micro_batch_size in STEPS:
        memory, rate = run_in_new_process(measure_step, batch_size, micro_batch_size)
        print_row(f"{batch_size:,}", f"{micro_batch_size:,}", f"{memory:,.0f}", f"{rate:.0f}")
