"""Weights shared out over the processes (FSDP2), as `accelerate launch --use_fsdp --fsdp_version 2` asks.

Accelerate does it; here is what the loops must mind. A forward pass gathers weights from all processes, so all
must make the same number of them. A trained weight is whole only once it is gathered, for a checkpoint or at the end.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from llm2clip.distributed import is_distributed


def extra_forward_passes(model: nn.Module, made: int, device: torch.device) -> int:
    """How many forward passes more a process must make of a batch, so that all make the same number."""
    if not isinstance(model, FSDPModule) or not is_distributed():
        return 0
    most = torch.tensor(made, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most) - made


def full_tensor(weight: Tensor) -> Tensor:
    """A weight as one tensor, on all processes, which all ask at once."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def copy_into(weight: Tensor, value: Tensor) -> None:
    """Write a whole value into a weight, or this process's part of it."""
    value = value.to(weight.device)
    weight.copy_(
        distribute_tensor(value, weight.device_mesh, weight.placements) if isinstance(weight, DTensor) else value
    )


def empty_copy(model: nn.Module) -> nn.Module:
    """A copy whose weights take no memory and hold nothing."""
    empty: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, empty)


def gather_to_cpu(bare: nn.Module, sharded: nn.Module) -> nn.Module:
    """The model `bare`, from before the weights were shared out, with the whole ones, on the CPU."""
    bare.load_state_dict({name: full_tensor(t).cpu() for name, t in sharded.state_dict().items()}, assign=True)
    return bare.cpu()
