"""Tensors on the pretended GPU, and the dispatch of their operations to the CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from pretended_gpu.counts import count_copy, count_kernels, count_sync

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

# Operations that synchronise, because the host needs a value or an output shape depends on values.
SYNCHRONISING = {
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten._unique2", "aten.unique_dim",
    "aten.unique_consecutive", "aten.bincount", "aten.repeat_interleave", "aten.equal", "aten.is_nonzero",
    "aten.embedding_dense_backward",
}  # fmt: skip
INDEXING = {"aten.index", "aten.index_put", "aten.index_put_", "aten._index_put_impl_", "aten._unsafe_index"}
# Operations that accept tensors from both devices. PyTorch copies indices on the CPU to the GPU, and then waits.
ACCEPT_BOTH_DEVICES = {"aten.copy_", "aten._to_copy", "aten.set_", *INDEXING}
# Operations that the CPU does not have: name -> function of CPU tensors that replaces it.
REPLACED: dict[str, Any] = {}


class MixedDevicesError(RuntimeError):
    """An operation received tensors from the CPU and from the GPU."""


class GpuTensor(torch.Tensor):
    """A tensor that reports the device `cuda:0`. Its values are in `values`, a CPU tensor."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            layout=values.layout,
            device=GPU,
        )

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values  # type: ignore[method-assign, assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"GpuTensor({self.values!r})"

    def tolist(self) -> Any:
        count_sync("tolist")
        return self.values.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def pin_memory(self, *_: Any) -> Any:
        raise RuntimeError("cannot pin a tensor on the GPU")

    # The storage is used to find shared weights, to save files and to compare addresses.

    def untyped_storage(self) -> Any:
        return self.values.untyped_storage()

    def storage(self) -> Any:
        return self.values.storage()

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], *_: Any) -> GpuTensor:
        return GpuTensor(inner["values"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied: Any = GpuTensor(self.values.detach().clone())
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the values, so that a saved tensor is loaded on the CPU, as with `map_location="cpu"`."""
        return self.values.detach().requires_grad_(self.requires_grad).__reduce_ex__(protocol)


class CreationMode(TorchDispatchMode):
    """Passes operations on the GPU to `_dispatch`, including those that create a GPU tensor from none."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # `types` contains the types of the arguments that are tensor subclasses. Flattening the arguments is slower.
        if GpuTensor in types or _is_gpu(kwargs.get("device")):
            return _dispatch(func, args, kwargs)
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


@cache
def _is_composite(func: Any) -> bool:
    """Return True if PyTorch implements an operation only by means of other operations."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return has_kernel(func.name(), "CompositeImplicitAutograd") and not has_kernel(func.name(), "CPU")


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the CPU values of its arguments, and count what a GPU would do."""
    if _is_composite(func):
        with CreationMode():
            return func.decompose(*args, **kwargs)
    name = str(func).rpartition(".")[0] or str(func)
    tensors: list[torch.Tensor] = []

    def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
        tensors.append(tensor)
        return tensor.values if isinstance(tensor, GpuTensor) else tensor

    cpu_args = _map_tensors(to_cpu, args)
    cpu_kwargs = {key: _map_tensors(to_cpu, value) for key, value in kwargs.items()}
    on_gpu = any(isinstance(x, GpuTensor) for x in tensors)
    if on_gpu:
        _check_devices(func, name, tensors)
        _count_implicit_syncs(name, args, kwargs)
    if name == "aten.copy_":
        target, source = args[0], args[1]
        is_fill = source.ndim == 0 and isinstance(target, GpuTensor)  # needs no copy
        if isinstance(target, GpuTensor) != isinstance(source, GpuTensor) and not is_fill:
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
            count_copy(source, isinstance(target, GpuTensor), non_blocking)
    if name == "aten._to_copy" and kwargs.get("device") is not None and _is_gpu(kwargs["device"]) != on_gpu:
        count_copy(args[0], not on_gpu, kwargs.get("non_blocking", False))

    # Run on the CPU. The result is on the requested device, or on that of the arguments.
    result_on_gpu = on_gpu if kwargs.get("device") is None else _is_gpu(kwargs["device"])
    if _is_gpu(kwargs.get("device")):
        cpu_kwargs["device"] = CPU
    if "pin_memory" in cpu_kwargs:
        cpu_kwargs["pin_memory"] = False
    result = REPLACED.get(name, func)(*cpu_args, **cpu_kwargs)
    if name == "aten._local_scalar_dense":
        return result
    if result_on_gpu:
        count_kernels(func, name, tensors)
        result = _map_tensors(GpuTensor, result)
    if result_on_gpu or func._schema.is_mutable:
        return return_and_correct_aliasing(func, args, kwargs, result)
    return result


def _map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Apply a function to all tensors in lists and tuples. PyTorch's functions for nested values are slower."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)([_map_tensors(function, item) for item in value])
    return value


def _check_devices(func: Any, name: str, tensors: list[torch.Tensor]) -> None:
    """Raise MixedDevicesError if a CPU tensor is not allowed. Tensors with a single value are always allowed."""
    if name in ACCEPT_BOTH_DEVICES or name.startswith(("prim.", "c10d.", "profiler.")):
        return
    shapes = [tuple(x.shape) for x in tensors if not isinstance(x, GpuTensor) and x.ndim > 0]
    if shapes:
        raise MixedDevicesError(f"{func}: all tensors must be on the same device, but tensors {shapes} are on the CPU")


def _count_implicit_syncs(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    if name in SYNCHRONISING and kwargs.get("output_size") is None:
        count_sync(name.removeprefix("aten."))
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if not isinstance(args[0], GpuTensor):
            raise MixedDevicesError(f"{name}: a tensor on the CPU is indexed by a tensor on the GPU")
        if len(args) > 2 and not isinstance(args[2], GpuTensor) and args[2].ndim > 0:
            raise MixedDevicesError(f"{name}: values on the CPU are written to a tensor on the GPU")
        if any(not isinstance(index, GpuTensor) for index in indices):
            count_sync("indices on the CPU")
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            count_sync("boolean mask")
