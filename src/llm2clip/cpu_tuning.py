"""CPU performance settings for glibc malloc and PyTorch."""

import ctypes
import gc
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

FLOAT32_TOLERANCE = 1e-6  # relative error of a float32 matmul; bfloat16 errors are about a thousand times larger
# Parameters of mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory(device: torch.device) -> None:
    """Make malloc keep freed memory instead of returning it to the operating system after every training step.

    By default, glibc maps and unmaps the memory of every large activation, and the kernel zeroes its pages each time.
    Keeping the memory makes training EfficientNet-Lite0 on two cores up to twice as fast (`benchmarks/malloc.py`). On
    other devices or without glibc, this function does nothing.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    if not libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum before glibc 2.35
    libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def limit_malloc_arenas() -> None:
    """Limit malloc to two arenas that all new threads share, so that each thread does not keep its own freed memory.

    With the default limit, a server with 64 worker threads uses several times as much memory after decoding large
    images (`benchmarks/hostile_clients.py`).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2)


def free_memory() -> None:
    """Run garbage collection, and return freed memory to the operating system.

    After `keep_freed_memory`, malloc keeps freed activations and optimizer states in blocks that may be too small for
    the weights of the next model. Loading the next model would then take additional memory.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def get_available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes this process can still allocate, given the free RAM and the cgroup's memory limit."""
    available = int(psutil.virtual_memory().available)
    limit_file, usage_file, stat_file = (cgroup / f"memory.{name}" for name in ("max", "current", "stat"))
    if not (limit_file.is_file() and usage_file.is_file()):
        return available
    limit = limit_file.read_text().strip()
    if limit == "max":
        return available
    stat = stat_file.read_text() if stat_file.is_file() else ""
    reclaimable = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)  # cached file pages
    left = int(limit) - int(usage_file.read_text()) + (int(reclaimable[1]) if reclaimable else 0)
    return min(available, left)


@contextmanager
def use_onednn_matmul() -> Iterator[None]:
    """Compute float32 matmuls on the CPU with oneDNN instead of MKL if oneDNN is faster. Also works as a decorator.

    On AMD CPUs, MKL does not use AVX-512. oneDNN does, and is more than twice as fast. PyTorch uses oneDNN for float32
    only if the matmul precision is "medium". This precision also allows rounding to bfloat16, so `is_onednn_faster`
    verifies that oneDNN does not round. On machines with a GPU, the precision is left unchanged, because it also
    applies to matmuls on the GPU.
    """
    use_onednn = not torch.accelerator.is_available() and is_onednn_faster()
    with use_float32_matmul_precision("medium") if use_onednn else nullcontext():
        yield


@contextmanager
def use_float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set PyTorch's float32 matmul precision, and restore the previous precision on exit."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@lru_cache
@torch.inference_mode()
def is_onednn_faster() -> bool:
    """Return True if oneDNN computes float32 matmuls faster than MKL on this CPU, and with float32 accuracy.

    The speed is inferred from the CPU model, because measurements could differ between ranks. Ranks that used
    different libraries would compute slightly different results.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (str(capabilities.get("cpu_name")).startswith("AMD") and capabilities.get("avx512_f")):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    with use_float32_matmul_precision("medium"):
        result = a @ b
    exact = a.double() @ b.double()
    return bool((result - exact).norm() < FLOAT32_TOLERANCE * exact.norm())


def is_flex_attention_correct() -> bool:
    """Return False on CPUs without AVX-512, where compiled flex attention returns NaN for a batch size of 1."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
