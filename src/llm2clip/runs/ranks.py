"""Utilities for distributed runs: ranks, barriers, FSDP settings, printing on the main process only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import nn

from llm2clip.io_utils import atomic_write_text, escape_control_characters

PEER_FAILED = (
    "Another process has exited, was killed or does not respond: the first error in the output of all processes shows "
    "the cause. Run the same command again to resume"
)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # after this time, a collective operation with a missing rank fails
WAIT_TIMEOUT = timedelta(days=1)  # for `wait_for_everyone`


def process_state() -> PartialState:
    """Return Accelerate's state: rank, world size and device. The first call initialises the process groups.

    On machines without a GPU or other accelerator, Accelerate creates a process group only if `cpu` is set.
    """
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)
    if is_distributed():
        _group_for_long_waits(torch.distributed.group.WORLD)
    return state


def wait_for_everyone() -> None:
    """Wait up to `WAIT_TIMEOUT` for all ranks, for example while the main process evaluates the model.

    The wait uses Gloo, which fails immediately if another rank exits or is killed, because its connection is closed.
    NCCL would fail only after its timeout, which would therefore have to be short.

    Raises:
        RuntimeError: Another rank has exited, or did not arrive before the timeout.
    """
    process_state()
    if not is_distributed():
        return
    try:
        torch.distributed.barrier(_group_for_long_waits(torch.distributed.group.WORLD))
    except RuntimeError as error:
        rank = torch.distributed.get_rank()
        raise RuntimeError(f"Process {rank} was waiting for the other processes. {PEER_FAILED}") from error


@lru_cache(maxsize=1)
def _group_for_long_waits(world: Any) -> torch.distributed.ProcessGroup:
    """Return a Gloo group of all ranks in `world`, the default group. The first call must be made by all ranks."""
    return torch.distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def is_distributed() -> bool:
    """Return True if this process is a member of an initialised process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def fsdp_enabled() -> bool:
    """Return True if `accelerate launch --use_fsdp` was used."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def set_fsdp_wrap_policy(layers: Sequence[nn.Module]) -> None:
    """If FSDP is enabled, make Accelerate shard a model layer by layer.

    Args:
        layers: Transformer layers of the model. If empty, the model is sharded as a single unit.

    Raises:
        ValueError: FSDP version 1 was selected in the launcher.
    """
    if not fsdp_enabled():
        return
    if os.environ.setdefault("FSDP_VERSION", "2") != "2":
        raise ValueError("FSDP version 1 is not supported: run accelerate launch with --fsdp_version 2")
    layer_classes = dict.fromkeys(type(layer).__name__ for layer in layers)
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP" if layers else "NO_WRAP"
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(layer_classes)


def set_mixed_precision(precision: str) -> str:
    """Set Accelerate's mixed precision to fp32, bf16 or fp16, and return Accelerate's name for this precision.

    This setting overrides any precision set by the launcher or by an earlier stage in the same process.
    """
    name = "no" if precision == "fp32" else precision
    os.environ["ACCELERATE_MIXED_PRECISION"] = name
    AcceleratorState._reset_state()
    # After the reset, Accelerate restores its FSDP plugin only if it derives the distributed type from the environment
    # again, starting from MULTI_GPU.
    if PartialState._shared_state.get("distributed_type") is DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return name


def print_once(*lines: str) -> None:
    """Print lines on the main process only. Control characters are escaped."""
    if lines and process_state().is_main_process:
        print(escape_control_characters("\n".join(lines)), flush=True)


def cached_json(file: Path, compute: Callable[[], Any]) -> Any:
    """Return the contents of a JSON file. If the file does not exist, the main process computes and writes it first."""
    state = process_state()
    if state.is_main_process and not file.exists():
        atomic_write_text(file, json.dumps(compute(), indent=1))
    wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))


def shutdown() -> None:
    """Wait for all ranks, then destroy the process group. If a rank exited early, others could fail."""
    if is_distributed():
        wait_for_everyone()
        _group_for_long_waits.cache_clear()
        torch.distributed.destroy_process_group()
