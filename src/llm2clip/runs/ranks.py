"""Utilities for distributed runs: ranks, barriers, gathering rows from all ranks, printing on the main process only."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from llm2clip.io_utils import atomic_write_text, escape_control_characters

PEER_FAILED = (
    "Another process exited, was killed or is not responding. The first error in the output of all processes shows the "
    "cause. Run the same command again to resume"
)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # after this time, a collective operation with a missing rank fails
WAIT_TIMEOUT = timedelta(days=1)  # maximum time that `wait_for_everyone` waits


def process_state() -> PartialState:
    """Return Accelerate's state: rank, world size and device. The first call initialises the process groups.

    On machines without a GPU or other accelerator, Accelerate creates a process group only if `cpu` is set.
    """
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)
    if is_distributed():
        _get_gloo_group(dist.group.WORLD)
    return state


def wait_for_everyone() -> None:
    """Wait until all ranks have called this function, for example while the main process evaluates the model.

    The barrier uses Gloo, which fails immediately if another rank exits or is killed, because the connection to this
    rank closes. NCCL would fail only after a timeout, so the timeout would have to be short.

    Raises:
        RuntimeError: Another rank exited, or did not call this function within `WAIT_TIMEOUT`.
    """
    process_state()
    if not is_distributed():
        return
    try:
        dist.barrier(_get_gloo_group(dist.group.WORLD))
    except RuntimeError as error:
        rank = dist.get_rank()
        raise RuntimeError(f"Process {rank} was waiting for the other processes. {PEER_FAILED}") from error


@lru_cache(maxsize=1)
def _get_gloo_group(world: Any) -> dist.ProcessGroup:
    """Return a Gloo group of all ranks in `world`, the default group. The first call must be made by all ranks."""
    return dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def is_distributed() -> bool:
    """Return True if this process is a member of an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def print_once(*lines: str) -> None:
    """Print lines on the main process only. Control characters are escaped."""
    if lines and process_state().is_main_process:
        print(escape_control_characters("\n".join(lines)), flush=True)


def load_or_compute_json(file: Path, compute: Callable[[], Any]) -> Any:
    """Return the contents of a JSON file. If the file does not exist, the main process computes and writes it first."""
    state = process_state()
    if state.is_main_process and not file.exists():
        atomic_write_text(file, json.dumps(compute(), indent=1))
    wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))


def shut_down_process_group() -> None:
    """Wait for all ranks, then destroy the process group. A rank that exits early could make others fail."""
    if is_distributed():
        wait_for_everyone()
        _get_gloo_group.cache_clear()
        dist.destroy_process_group()


# ---- collective operations -------------------------------------------------------------------------------------------


class RaggedGather:
    """All-gather for tensors whose number of rows may differ between ranks.

    Each rank pads its tensor to the largest number of rows on any rank, and the padding is removed after the gather. In
    a single process, tensors are returned unchanged.

    Attributes:
        single_process: True if tensors are not gathered because this process already has all rows.
        local_size: Number of rows on this rank.
        max_size: Largest number of rows on any rank.
        total_size: Total number of rows on all ranks.
        offset: Index of this rank's first row among all rows.
    """

    def __init__(self, local_size: int, device: torch.device, gather: bool = True) -> None:
        """Exchange row counts between ranks. Must be called by all ranks.

        If `gather` is False, other ranks are ignored, as in a single process.
        """
        self.single_process = not (gather and is_distributed())
        self.local_size = self.max_size = self.total_size = local_size
        self.offset = 0
        if not self.single_process:
            sizes = _all_gather(torch.tensor([local_size], device=device)).tolist()
            self.max_size, self.total_size = max(sizes), sum(sizes)
            self.offset = sum(sizes[: dist.get_rank()])
            valid_rows = [torch.arange(size, device=device) + rank * self.max_size for rank, size in enumerate(sizes)]
            self._valid_rows = torch.cat(valid_rows)

    @property
    def local_slice(self) -> slice:
        """Slice of this rank's rows in a gathered tensor."""
        return slice(self.offset, self.offset + self.local_size)

    def gather(self, x: Tensor, gradients: bool = False) -> Tensor:
        """Return the rows of all ranks as a tensor of shape (total_size, ...). Must be called by all ranks.

        If `gradients` is True, gradients are propagated to all ranks.
        """
        if self.single_process or not self.max_size:
            return x
        padded = torch.cat([x, x.new_zeros(self.max_size - len(x), *x.shape[1:])])
        gathered = _all_gather_with_grad(padded) if gradients else _all_gather(padded)
        return gathered[self._valid_rows]

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Return log(sum over ranks of exp(x)), elementwise. Must be called by all ranks."""
        if self.single_process:
            return x
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        total = torch.where(largest == -torch.inf, 0.0, (x - largest).exp())
        dist.all_reduce(total)
        return largest + total.log()


def _all_gather(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, without gradients. All ranks must have the same number of rows."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def _all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, with gradients. All ranks must have the same number of rows."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def max_over_ranks(value: int, device: torch.device) -> int:
    """Return the maximum of `value` over all ranks. Must be called by all ranks."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)
