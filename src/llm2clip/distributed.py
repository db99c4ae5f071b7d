"""The processes of a run, as `torchrun` or `accelerate launch` started them; one alone where nobody did.

This is at the bottom of the house: every stage asks here who it is and waits here for the others.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import nn

from llm2clip.io_utils import atomic_write_text


def process_state() -> PartialState:
    """This process among the others of its run; the first call joins them.

    Accelerate takes processes on machines without an accelerator for strangers unless it is told that they compute on
    the CPU. Whoever waits for another's measurement waits as long as it takes.
    """
    cpu = not torch.accelerator.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    return PartialState(cpu=cpu, timeout=timedelta(days=1))


def is_distributed() -> bool:
    """Whether this process is one of a group, to gather from."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def fsdp_enabled() -> bool:
    """Whether the launcher wants the weights shared out."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def set_fsdp_wrap_policy(blocks: Sequence[nn.Module]) -> None:
    """Tell Accelerate to share out a model by these blocks of it, if the launcher wants it shared out.

    Raises:
        ValueError: it wants it done by the first version of FSDP.
    """
    if not fsdp_enabled():
        return
    if os.environ.setdefault("FSDP_VERSION", "2") != "2":
        raise ValueError("weights are shared out with FSDP2: give accelerate launch --fsdp_version 2")
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP" if blocks else "NO_WRAP"
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(dict.fromkeys(type(block).__name__ for block in blocks))


def set_mixed_precision(precision: str) -> str:
    """Accelerate's name for fp32, bf16 or fp16; what another stage or the launcher has chosen is forgotten."""
    name = {"fp32": "no"}.get(precision, precision)
    os.environ["ACCELERATE_MIXED_PRECISION"] = name
    AcceleratorState._reset_state()
    if PartialState._shared_state.get("distributed_type") is DistributedType.FSDP:  # else its plugin is forgotten, too
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return name


def command_line() -> str:
    """The command that this process was begun with, as it would be typed again."""
    return shlex.join(["llm2clip", *sys.argv[1:]])


def print_once(*lines: str) -> None:
    """Print once in a distributed run."""
    if lines and process_state().is_main_process:
        print(*lines, sep="\n", flush=True)


def cached_json(file: Path, measure: Callable[[], Any]) -> Any:
    """The JSON in `file`, made by the main process if it is not there yet."""
    state = process_state()
    if state.is_main_process and not file.exists():
        atomic_write_text(file, json.dumps(measure(), indent=1))
    state.wait_for_everyone()
    return json.loads(file.read_text())


def shutdown() -> None:
    """Part from the other processes once all are here; one that just ends can fail those that still work."""
    if is_distributed():
        process_state().wait_for_everyone()
        torch.distributed.destroy_process_group()
