"""Counts of synchronisations, kernel launches, attention calls and copies."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

PACKAGE = str(Path(__file__).parent)
_LIBRARY_PATHS = (f"{os.sep}site-packages{os.sep}", f"{os.sep}lib{os.sep}python")
# Operations without a kernel, in addition to views.
WITHOUT_KERNEL = {
    "aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided", "aten.detach",
    "aten.alias", "aten.set_", "aten.resize_", "aten.lift_fresh", "aten._unsafe_view", "aten.sym_size",
}  # fmt: skip
FOREACH_CHUNK = 100  # tensors per kernel in the fused and foreach operations of optimizers


@dataclass
class Counts:
    """Events on the pretended GPU."""

    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    """Synchronisations by cause and source line."""
    kernels: Counter[str] = field(default_factory=Counter)
    """Kernel launches by operation."""
    attention: Counter[str] = field(default_factory=Counter)
    """Attention calls by kernel and dtype, such as "flash bfloat16"."""
    copied_bytes: Counter[str] = field(default_factory=Counter)
    """Bytes copied "to the GPU" and "to the host"."""

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.syncs - other.syncs,
            self.kernels - other.kernels,
            self.attention - other.attention,
            self.copied_bytes - other.copied_bytes,
        )


active_counts: list[Counts] = []


@contextmanager
def count() -> Iterator[Counts]:
    """Count the events inside the `with` block."""
    counts = Counts()
    active_counts.append(counts)
    try:
        yield counts
    finally:
        active_counts.pop(next(i for i, active in enumerate(active_counts) if active is counts))


def count_sync(cause: str) -> None:
    if active_counts:
        line = _calling_line()
        for counts in active_counts:
            counts.syncs[cause, line] += 1


def _calling_line() -> str:
    """Return the innermost source line outside of libraries and of this file, as "file.py:line"."""
    frame: Any = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if (
            not file.startswith(PACKAGE)
            and not file.startswith("<")
            and not any(path in file for path in _LIBRARY_PATHS)
        ):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a library"


def count_kernels(func: Any, name: str, tensors: list[Any]) -> None:
    if name in WITHOUT_KERNEL or func.is_view:
        return
    launches = 1
    if name.startswith(("aten._foreach", "aten._fused", "aten._amp_foreach")):
        launches = max(1, -(-len(tensors) // FOREACH_CHUNK))
    for counts in active_counts:
        counts.kernels[name] += launches


def count_copy(source: torch.Tensor, to_gpu: bool, non_blocking: bool) -> None:
    direction = "to the GPU" if to_gpu else "to the host"
    for counts in active_counts:
        counts.copied_bytes[direction] += source.numel() * source.element_size()
    if not non_blocking:
        count_sync(f"copy {direction}")
