"""Replaces the functions of torch.cuda and torch.accelerator that call the CUDA driver."""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo.trace_rules
import torch.nn.functional as F
import torch.nn.utils.clip_grad
from torch.optim.optimizer import _foreach_supported_types
from torch.utils import _foreach_utils

from pretended_gpu.attention import attention
from pretended_gpu.counts import count_sync
from pretended_gpu.tensors import CreationMode, GpuTensor

MEMORY = 80 << 30  # bytes that the pretended GPU reports


class _NoGrad(torch.no_grad):
    """Replaces `torch.inference_mode`, because tensors created in inference mode cannot be wrapped."""

    def __new__(cls, mode: Any = True) -> Any:
        return super().__new__(cls, None if isinstance(mode, bool) else mode)

    def __init__(self, mode: bool = True) -> None:
        super().__init__()


class _Event:
    """Replaces `torch.cuda.Event`. All work is complete as soon as it has been submitted."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def wait(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        count_sync("wait for an event")


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


def _synchronize(*_: Any, **__: Any) -> None:
    count_sync("synchronize")


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _replace_functions() -> None:
    """Replace the parts of PyTorch that call the CUDA driver."""
    torch._dynamo.trace_rules.get_torch_obj_rule_map()  # lists functions of torch, so it must come before the changes
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name="pretended GPU", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, warp_size=32,
        gcnArchName="", regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, L2_cache_size=50 << 20,
        shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472, is_integrated=False,
        is_multi_gpu_board=False, uuid="0",
    )  # fmt: skip
    stream = SimpleNamespace(
        synchronize=_synchronize,
        wait_stream=_do_nothing,
        wait_event=_do_nothing,
        record_event=_do_nothing,
        cuda_stream=0,
    )
    constants = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0,
        "mem_get_info": (MEMORY, MEMORY), "get_device_name": properties.name, "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "is_bf16_supported": True, "current_stream": stream, "default_stream": stream,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
    }  # fmt: skip
    for name, value in constants.items():
        setattr(cuda, name, _constant(value))
    for name in ("_lazy_init", "init", "set_device", "empty_cache", "ipc_collect", "reset_peak_memory_stats"):
        setattr(cuda, name, _do_nothing)
    cuda.synchronize, cuda.Event = _synchronize, _Event

    # GPU operations draw random numbers from the CPU's generator, so its state is that of the GPU as well.
    random = {
        "manual_seed": _do_nothing, "manual_seed_all": _do_nothing, "seed": _do_nothing, "seed_all": _do_nothing,
        "get_rng_state": lambda *_: torch.get_rng_state(), "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
    }  # fmt: skip
    for name, function in random.items():
        setattr(cuda, name, function)
        setattr(cuda.random, name, function)

    accelerator: Any = torch.accelerator
    accelerator.is_available, accelerator.device_count = _constant(True), _constant(1)
    accelerator.current_accelerator, accelerator.current_device_index = _constant(torch.device("cuda")), _constant(0)
    accelerator.set_device_index, accelerator.synchronize = _do_nothing, _synchronize

    internals: Any = torch._C
    internals._cuda_getDevice = internals._cuda_getCurrentRawStream = _constant(0)
    internals._cuda_getDeviceCount = _constant(1)
    internals._nn.scaled_dot_product_attention = F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    cuda.amp.common.amp_definitely_not_available = _constant(False)
    torch.version.cuda = "13.0"  # type: ignore[assignment]
    torch.backends.cuda.is_built = _constant(True)
    torch.inference_mode = torch.autograd.grad_mode.inference_mode = _NoGrad  # type: ignore[assignment, misc]

    # Use the optimizers' and clip_grad_norm_'s foreach implementations, as on a GPU, and load weights into wrappers.
    _foreach_supported_types.append(GpuTensor)
    is_gpu = lambda tensors, device: device.type == "cuda"  # noqa: E731
    _foreach_utils._has_foreach_support = torch.nn.utils.clip_grad._has_foreach_support = is_gpu
    torch.__future__.set_swap_module_params_on_conversion(True)


def install_in_thread() -> CreationMode:
    """Enable the pretended GPU in the current thread. Return the dispatch mode, which must be entered."""
    torch.autograd.set_multithreading_enabled(False)  # run backward passes in this thread, with its dispatch mode
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") creates a CPU tensor and copies it
    return CreationMode()


_run_thread = threading.Thread.run


def _run_thread_with_gpu(thread: threading.Thread) -> None:
    with install_in_thread():
        _run_thread(thread)


def install() -> None:
    """Enable the pretended GPU in this process, for all threads."""
    _replace_functions()
    threading.Thread.run = _run_thread_with_gpu  # type: ignore[method-assign]
    install_in_thread().__enter__()
