"""Measure the peak memory of a computation with fake tensors, which have shapes but need no memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Records the peak size of all live tensors, in bytes: the weights of `modules`, and everything allocated since."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}  # address of a storage -> size
        self.live = self.peak = 0
        for module in modules:
            for tensor in (*module.parameters(), *module.buffers()):
                self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves(output):
            if isinstance(value, Tensor):
                self._add(value)
        return output

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


@contextmanager
def fake_tensors(*models: nn.Module) -> Iterator[None]:
    """Run the `with` block on fake CPU tensors, to which the weights of `models` on the meta device are converted."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models:
            model.to_empty(device="cpu")
        yield


def count_bytes(*modules: nn.Module) -> int:
    """Return the size of all weights and buffers, in bytes."""
    return PeakMemory(*modules).peak
