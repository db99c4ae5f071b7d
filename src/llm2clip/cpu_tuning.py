"""Memory and CPU settings of malloc and PyTorch that speed up training and encoding without changing results."""

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

# Upper bound on the relative error of a float32 matmul over a few hundred terms. The error of a bfloat16 matmul is a
# thousand times larger.
FLOAT32_TOLERANCE = 1e-6
# mallopt parameters, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8


def keep_freed_memory(device: torch.device) -> None:
    """Make malloc keep freed memory instead of returning it to the operating system after every training step.

    Activations are large allocations. By default, glibc maps and unmaps each of them, and the kernel zeroes the pages
    every time. With this setting, training EfficientNet-Lite0 on two cores is up to twice as fast
    (`benchmarks/malloc.py`). The setting takes effect only on the CPU and with glibc.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    if not libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the maximum before glibc 2.35
    libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def limit_malloc_arenas() -> None:
    """Let all threads that start later share two malloc arenas, so that not every thread keeps freed memory.

    By default, each thread of a server keeps the memory of the images that it has decoded. With large images, a server
    with 64 worker threads grows to several times its size (`benchmarks/hostile_clients.py`).
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 2)


def free_memory() -> None:
    """Delete objects in reference cycles, and return freed memory to the operating system.

    After `keep_freed_memory`, malloc keeps the memory of the freed activations and optimizer states in blocks. If no
    block were large enough for the weights of the next model, loading it would take additional memory.
    """
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def get_available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return how many bytes this process can still allocate, given the available RAM and its cgroup's limit."""
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
def onednn_matmul() -> Iterator[None]:
    """Compute float32 matmuls on the CPU with oneDNN instead of MKL if oneDNN is faster. Also works as a decorator.

    On AMD CPUs, MKL does not use AVX-512. oneDNN does, and is more than twice as fast. PyTorch uses oneDNN for float32
    only if the matmul precision is "medium". This precision also allows rounding to bfloat16, so `onednn_is_faster`
    verifies that oneDNN does not round. On machines with a GPU, the precision is unchanged, because a change would also
    affect the GPU.
    """
    use_onednn = not torch.accelerator.is_available() and onednn_is_faster()
    with float32_matmul_precision("medium") if use_onednn else nullcontext():
        yield


@contextmanager
def float32_matmul_precision(precision: str) -> Iterator[None]:
    """Set PyTorch's float32 matmul precision, and restore the previous precision on exit."""
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)


@lru_cache
@torch.inference_mode()
def onednn_is_faster() -> bool:
    """Return True if oneDNN computes float32 matmuls faster than MKL on this CPU, and with float32 accuracy.

    Speed is inferred from the CPU model. If it were measured, ranks could make different choices, and their results
    would differ in the last bits.
    """
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not (str(capabilities.get("cpu_name")).startswith("AMD") and capabilities.get("avx512_f")):
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(256, 512, generator=generator), torch.randn(512, 256, generator=generator)
    with float32_matmul_precision("medium"):
        result = a @ b
    exact = a.double() @ b.double()
    return bool((result - exact).norm() < FLOAT32_TOLERANCE * exact.norm())


def flex_attention_is_correct() -> bool:
    """Return False on CPUs without AVX-512, where compiled flex attention returns NaN for a batch size of 1."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512"
