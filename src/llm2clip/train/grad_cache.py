"""Gradient caching (GradCache, arXiv 2101.06983): a loss over more than fits into one pass of the model.

A contrastive loss needs the vectors of the whole batch, and its gradient by them needs nothing else. So the model runs
over the batch part by part, keeping no activations; the loss gives its gradient by the vectors; and the model runs over
each part again, this time for the backward pass. The gradients are those of one pass over the whole batch, memory is
that of a part, and the price is one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Pass = Callable[[], tuple[Tensor, ...]]


def cached_backward(
    passes: Sequence[Pass], loss: Callable[..., Tensor], model: nn.Module, device: torch.device
) -> Tensor:
    """The loss of all passes' outputs together, whose backward pass runs each of them again.

    Args:
        passes: each runs `model` once on a part of the batch and gives tensors with rows, as many of them as the
            others give.
        loss: takes the rows of all passes, one argument for each of those tensors; gives a scalar.
        model: as it is distributed; its gradients are exchanged once, in the last pass.
        device: whose random state the passes use.
    """
    states, parts = [], []
    with torch.no_grad():
        for run in passes:
            states.append(_random_state(device))
            parts.append(tuple(x.detach() for x in run()))  # a view of a parameter would ask for its gradient
    outputs = [torch.cat(some).requires_grad_() for some in zip(*parts, strict=True)]
    value = loss(*outputs)
    value.backward()
    rows = [[len(x) for x in some] for some in zip(*parts, strict=True)]
    gradients = [
        torch.zeros_like(x).split(n) if x.grad is None else x.grad.split(n) for x, n in zip(outputs, rows, strict=True)
    ]

    def again(upstream: Tensor) -> None:
        after = _random_state(device)
        for n, (run, state) in enumerate(zip(passes, states, strict=True)):
            last = n == len(passes) - 1
            alone = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            with torch.enable_grad(), alone:
                _set_random_state(state)  # the same dropout as before
                outputs = zip(run(), (some[n] for some in gradients), strict=True)
                torch.stack([(x * gradient).sum() for x, gradient in outputs]).sum().mul(upstream).backward()
        _set_random_state(after)

    value = value.detach().requires_grad_()
    value.register_hook(again)
    return value


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
