"""Mixed precision and FSDP: Accelerate settings, and helpers for models sharded with FSDP2.

With `accelerate launch --use_fsdp --fsdp_version 2`, Accelerate shards the weights. This has two consequences for the
training loops. First, every forward pass gathers weights from all ranks, so all ranks must run the same number of
forward passes. Second, each rank has only a shard of each parameter, so parameters must be gathered before they are
saved.
"""

import copy
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_fsdp_enabled() -> bool:
    """Return True if `accelerate launch --use_fsdp` was used."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def set_fsdp_wrap_policy(layers: Sequence[nn.Module]) -> None:
    """If FSDP is enabled, make Accelerate shard a model layer by layer.

    Args:
        layers: Transformer layers of the model. If empty, the model is sharded as a single unit.

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
    """Set Accelerate's mixed precision to fp32, bf16 or fp16, and return Accelerate's name for this precision.

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

    By default, Accelerate sums gradients in the forward pass's precision. Call this before `accelerator.prepare`.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, reduce_dtype=torch.float32)


def copy_to_meta_device(model: nn.Module) -> nn.Module:
    """Return a copy of a model with all parameters on the meta device, where they take up no memory."""
    meta_parameters: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, meta_parameters)


def gather_to_cpu(empty_model: nn.Module, sharded_model: nn.Module) -> nn.Module:
    """Gather the weights of a sharded model on the CPU, into an empty copy of it. Must be called by all ranks.

    Args:
        empty_model: Copy of the model made with `copy_to_meta_device` before the model was sharded.
    """
    state = {name: full_tensor(tensor).cpu() for name, tensor in sharded_model.state_dict().items()}
    empty_model.load_state_dict(state, assign=True)
    return empty_model.cpu()


def full_tensor(weight: Tensor) -> Tensor:
    """Return a parameter as a single unsharded tensor. Must be called by all ranks."""
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def distribute_like(weight: Tensor, value: Tensor) -> Tensor:
    """Move an unsharded value to a parameter's device and shard it like the parameter. Must be called by all ranks.

    The value must be the same on all ranks.
    """
    value = value.to(weight.device)
    if not isinstance(weight, DTensor):
        return value
    return distribute_tensor(value, weight.device_mesh, weight.placements)
