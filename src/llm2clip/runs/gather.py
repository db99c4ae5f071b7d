"""Collective operations that gather rows from all ranks, and helpers for models sharded with FSDP2.

With `accelerate launch --use_fsdp --fsdp_version 2`, Accelerate shards the weights. This has two consequences for the
training loops. First, every forward pass gathers weights from all ranks, so all ranks must run the same number of
forward passes. Second, each rank has only a shard of each parameter, so parameters must be gathered before they are
saved.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from llm2clip.runs.ranks import is_distributed
from llm2clip.runs.training_state import full_tensor


class RaggedGather:
    """All-gather for tensors whose number of rows may differ between ranks.

    Each rank pads its tensor to the largest number of rows on any rank, and the padding is removed after the gather. In
    a single process, tensors are returned unchanged.

    Attributes:
        single_process: True if tensors are not gathered because this process already has all rows.
        local_size: Number of rows on this rank.
        max_size: Largest number of rows on any rank.
        total_size: Number of rows on all ranks.
        offset: Index of this rank's first row among all rows.
    """

    def __init__(self, local_size: int, device: torch.device, gather: bool = True) -> None:
        """Exchange the row counts between ranks. Must be called by all ranks.

        Args:
            local_size: Number of rows on this rank.
            device: Device of the tensors to gather.
            gather: If False, ignore all other ranks, as in a single process.
        """
        self.single_process = not (gather and is_distributed())
        self.local_size = self.max_size = self.total_size = local_size
        self.offset = 0
        if not self.single_process:
            sizes = all_gather(torch.tensor([local_size], device=device)).tolist()
            self.max_size, self.total_size = max(sizes), sum(sizes)
            self.offset = sum(sizes[: dist.get_rank()])
            valid_rows = [torch.arange(size, device=device) + rank * self.max_size for rank, size in enumerate(sizes)]
            self._valid_rows = torch.cat(valid_rows)

    @property
    def local_slice(self) -> slice:
        """Position of this rank's rows in a gathered tensor."""
        return slice(self.offset, self.offset + self.local_size)

    def gather(self, x: Tensor, gradients: bool = False) -> Tensor:
        """Return the rows of all ranks, of shape (total_size, ...). Must be called by all ranks.

        If `gradients` is True, gradients are propagated to all ranks.
        """
        if self.single_process or not self.max_size:
            return x
        padded = torch.cat([x, x.new_zeros(self.max_size - len(x), *x.shape[1:])])
        gathered = all_gather_with_grad(padded) if gradients else all_gather(padded)
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


def all_gather(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, without gradients. All ranks must have the same number of rows."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, with gradients. All ranks must have the same number of rows."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


def max_over_ranks(value: int, device: torch.device) -> int:
    """Return the largest `value` of any rank. Must be called by all ranks."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


def reduce_gradients_in_fp32(accelerator: Accelerator) -> None:
    """Make FSDP sum gradients in float32, both over ranks and over the passes of a gradient cache.

    By default, Accelerate sums them in the precision of the forward pass. Call this before `accelerator.prepare`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def empty_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with all parameters on the meta device, where they take no memory."""
    meta_parameters: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, meta_parameters)


def gather_to_cpu(empty_model: nn.Module, sharded_model: nn.Module) -> nn.Module:
    """Gather the weights of a sharded model into an empty copy on the CPU. Must be called by all ranks.

    Args:
        empty_model: Copy of the model from before it was sharded, created with `empty_copy`.
    """
    state = {name: full_tensor(tensor).cpu() for name, tensor in sharded_model.state_dict().items()}
    empty_model.load_state_dict(state, assign=True)
    return empty_model.cpu()
