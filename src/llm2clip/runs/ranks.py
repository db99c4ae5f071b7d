"""Distributed training: ranks, barriers, collective operations, mixed precision and FSDP2 sharding."""

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from llm2clip.io_utils import atomic_write_text, escape_control_characters

PEER_FAILED = (
    "Another process exited, was killed or is not responding. To find the cause, look for the earliest error in the "
    "output of the processes. Run the same command again to resume"
)
COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # timeout of collective operations
WAIT_TIMEOUT = timedelta(days=1)  # timeout of `wait_for_everyone`


def process_state() -> PartialState:
    """Return Accelerate's state: rank, world size and device. The first call initialises the process groups."""
    # On machines without an accelerator, Accelerate creates a process group only if `cpu` is set.
    use_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    state = PartialState(cpu=use_cpu or not torch.accelerator.is_available(), timeout=COLLECTIVE_TIMEOUT)
    if is_distributed():
        _get_gloo_group(dist.group.WORLD)
    return state


def wait_for_everyone() -> None:
    """Wait until all ranks have called this function, for example while the main process evaluates the model.

    The barrier uses Gloo, which fails as soon as another rank exits or is killed. NCCL would fail only after a timeout.

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
    """Return a Gloo group of all ranks in the default group `world`. The first call must be made by all ranks."""
    return dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)


def is_distributed() -> bool:
    """Return True if this process is part of an initialised process group."""
    return dist.is_available() and dist.is_initialized()


def print_once(*lines: str) -> None:
    """Print lines on the main process only. Control characters are escaped."""
    if lines and process_state().is_main_process:
        print(escape_control_characters("\n".join(lines)), flush=True)


def load_or_compute_json(file: Path, compute: Callable[[], Any]) -> Any:
    """Load a JSON file. If the file does not exist, the main process first computes and writes its contents."""
    state = process_state()
    if state.is_main_process and not file.exists():
        atomic_write_text(file, json.dumps(compute(), indent=1))
    wait_for_everyone()
    return json.loads(file.read_text(encoding="utf-8"))


def shut_down_process_group() -> None:
    """Wait for all ranks, then destroy the process group. A rank that exits early could make other ranks fail."""
    if is_distributed():
        wait_for_everyone()
        _get_gloo_group.cache_clear()
        dist.destroy_process_group()


# ---- collective operations -------------------------------------------------------------------------------------------


class RaggedGather:
    """All-gather for tensors whose number of rows may differ between ranks.

    Each rank pads its tensor to the maximum number of rows on any rank, and the padding is removed after the gather. In
    a single process, tensors are returned unchanged. `offset` is the global index of this rank's first row.
    """

    def __init__(self, local_size: int, device: torch.device, gather: bool = True) -> None:
        """Exchange row counts between ranks, unless `gather` is False. Must be called by all ranks."""
        self.single_process = not (gather and is_distributed())
        self.local_size = self.max_size = self.total_size = local_size
        self.offset = 0
        if not self.single_process:
            sizes = _all_gather_rows(torch.tensor([local_size], device=device)).tolist()
            self.max_size, self.total_size = max(sizes), sum(sizes)
            self.offset = sum(sizes[: dist.get_rank()])
            valid_rows = [torch.arange(size, device=device) + rank * self.max_size for rank, size in enumerate(sizes)]
            self._valid_rows = torch.cat(valid_rows)

    @property
    def local_slice(self) -> slice:
        return slice(self.offset, self.offset + self.local_size)

    def gather(self, x: Tensor, gradients: bool = False) -> Tensor:
        """Return the rows of all ranks as a tensor of shape (total_size, ...). Must be called by all ranks.

        If `gradients` is True, gradients are propagated to all ranks.
        """
        if self.single_process or not self.max_size:
            return x
        padded = torch.cat([x, x.new_zeros(self.max_size - len(x), *x.shape[1:])])
        if gradients:
            from torch.distributed.nn.functional import all_gather

            return torch.cat(all_gather(padded))[self._valid_rows]
        return _all_gather_rows(padded)[self._valid_rows]

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """Return log(sum over ranks of exp(x)), elementwise. Must be called by all ranks."""
        if self.single_process:
            return x
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        total = torch.where(largest == -torch.inf, 0.0, (x - largest).exp())
        dist.all_reduce(total)
        return largest + total.log()


def _all_gather_rows(x: Tensor) -> Tensor:
    """Gather the rows of all ranks, without gradients. All ranks must have the same number of rows."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_reduce_max(value: int, device: torch.device) -> int:
    """Return the maximum of `value` over all ranks. Must be called by all ranks."""
    if not is_distributed():
        return value
    largest = torch.tensor(value, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


# ---- mixed precision and FSDP ----------------------------------------------------------------------------------------

# With `accelerate launch --use_fsdp --fsdp_version 2`, Accelerate shards the weights.
# Every forward pass gathers weights from all ranks, so all ranks must run the same number of forward passes.
# Each rank has only a shard of each parameter, so parameters must be gathered before they are saved.


def is_fsdp_enabled() -> bool:
    """Return True if `accelerate launch --use_fsdp` was used."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def set_fsdp_wrap_policy(layers: Sequence[nn.Module]) -> None:
    """If FSDP is enabled, make Accelerate shard these transformer layers or, if there are none, the complete model.

    Raises:
        ValueError: The launcher selected FSDP version 1.
    """
    if not is_fsdp_enabled():
        return
    if os.environ.setdefault("FSDP_VERSION", "2") != "2":
        raise ValueError("FSDP version 1 is not supported: run accelerate launch with --fsdp_version 2")
    layer_classes = dict.fromkeys(type(layer).__name__ for layer in layers)
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "TRANSFORMER_BASED_WRAP" if layers else "NO_WRAP"
    os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = ",".join(layer_classes)


def set_mixed_precision(precision: str) -> str:
    """Set Accelerate's mixed precision to fp32, bf16 or fp16. Return Accelerate's name for this precision.

    This setting overrides any precision set by the launcher or by an earlier stage in the same process.
    """
    name = "no" if precision == "fp32" else precision
    os.environ["ACCELERATE_MIXED_PRECISION"] = name
    AcceleratorState._reset_state()
    # Accelerate restores its FSDP plugin only when it changes the distributed type from MULTI_GPU to FSDP.
    if PartialState._shared_state.get("distributed_type") is DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return name


def enable_fp32_gradient_reduction(accelerator: Accelerator) -> None:
    """Make FSDP sum gradients in float32, both over ranks and over the passes of gradient caching.

    By default, Accelerate sums gradients in the forward pass's precision. Must be called before `accelerator.prepare`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def copy_to_meta_device(model: nn.Module) -> nn.Module:
    """Return a copy of a model with all parameters on the meta device, where they use no memory."""
    meta_parameters: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, meta_parameters)


def gather_to_cpu(empty_model: nn.Module, sharded_model: nn.Module) -> nn.Module:
    """Gather the weights of a sharded model on the CPU. Must be called by all ranks.

    `empty_model` receives the weights. It must be a copy made with `copy_to_meta_device` before the model was sharded.
    """
    state = {name: full_tensor(tensor).cpu() for name, tensor in sharded_model.state_dict().items()}
    empty_model.load_state_dict(state, assign=True)
    return empty_model.cpu()


def full_tensor(weight: Tensor) -> Tensor:
    """Return a parameter as a single unsharded tensor. Must be called by all ranks."""
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight  # only DTensors have this method
    return full


def distribute_like(weight: Tensor, value: Tensor) -> Tensor:
    """Move an unsharded value, identical on all ranks, to a parameter's device, and shard it like the parameter."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # importing DTensor takes half a second

    value = value.to(weight.device)
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements)
