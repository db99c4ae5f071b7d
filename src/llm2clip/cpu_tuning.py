"""What PyTorch leaves lying on a CPU: memory that is kept, and products by the faster of its two libraries.

At the bottom of the house: whatever computes there, trains or encodes, asks for both.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

ROUNDING = 1e-6  # of float32 sums of a few hundred products; of bfloat16 it is a thousand times that


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU under glibc, keep freed memory instead of handing it back to the system after every step.

    Activations are large blocks that malloc maps and unmaps each time, and the kernel zeroes each page again:
    training EfficientNet-Lite0 on two cores runs up to twice as fast without (`benchmarks/malloc.py`).
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    trim_threshold, mmap_threshold = -1, -3  # the parameters' numbers in malloc.h
    if not libc.mallopt(mmap_threshold, 1 << 30):
        libc.mallopt(mmap_threshold, 32 << 20)  # the most that glibc before 2.35 takes
    libc.mallopt(trim_threshold, (1 << 31) - 1)


@contextmanager
def onednn_matmul() -> Iterator[None]:
    """Within this, or in a function under it, float32 products on a CPU go to oneDNN where that is faster than MKL.

    MKL does not use AVX-512 on AMD's processors; oneDNN does, and is more than twice as fast there
    (`benchmarks/products.py`). PyTorch asks it only where it may round to bfloat16. Whether it does is seen, not
    believed: it is taken only where its products are float32's. Where a GPU is at hand nothing is changed, since the
    switch would be the GPU's, too.
    """
    if torch.accelerator.is_available() or not onednn_is_faster():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@lru_cache
@torch.inference_mode()
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 faster than MKL on this CPU, and as exactly.

    Which is faster is known, not timed: every process of a run must come to the same, to the last bit.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (str(capabilities.get("cpu_name")).startswith("AMD") and capabilities.get("avx512_f")):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = a @ b
    finally:
        torch.set_float32_matmul_precision(before)
    exact = a.double() @ b.double()
    return bool((found - exact).norm() < ROUNDING * exact.norm())


def flex_attention_is_correct() -> bool:
    """Whether PyTorch compiles flex attention to something right for this CPU: for AVX2 a batch of one gives NaN."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
