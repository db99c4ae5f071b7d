"""Gradient caching (GradCache, arXiv 2101.06983): contrastive losses over more than fits into one forward pass.

A contrastive loss needs the embeddings of the whole batch, and its gradient by the embeddings needs nothing else. So:

1. Run the model over the batch part by part, without keeping activations.
2. Compute the loss of all embeddings and its gradient by the embeddings.
3. Run the model over each part again, and backpropagate that gradient through it.

The gradients are those of one pass over the whole batch. Memory is that of one part. The cost is one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

ForwardPass = Callable[[], tuple[Tensor, ...]]


def cached_backward(
    passes: Sequence[ForwardPass], loss_function: Callable[..., Tensor], model: nn.Module, device: torch.device
) -> Tensor:
    """Return the loss over the outputs of all passes. Its backward() runs each pass again.

    Args:
        passes: Each runs `model` on a part of the batch and returns tensors with rows; all return the same number of
            tensors.
        loss_function: Maps the concatenated tensors of all passes, one argument for each of them, to a scalar.
        model: The model, with its DDP or FSDP wrapper. DDP exchanges its gradients once, in the last pass.
        device: Device whose random state the passes use.
    """
    # 1. Forward passes without activations.
    random_states, outputs = [], []
    with torch.no_grad():
        for run in passes:
            random_states.append(_random_state(device))
            outputs.append(tuple(x.detach() for x in run()))  # detached: a view of a parameter would need a gradient

    # 2. Loss, and its gradient by the outputs.
    joined = [torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True)]
    loss = loss_function(*joined)
    loss.backward()
    gradients = []  # for each tensor of the outputs, its gradient in the parts of the passes
    for x, parts in zip(joined, zip(*outputs, strict=True), strict=True):
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        gradients.append(gradient.split([len(part) for part in parts]))

    # 3. Forward and backward passes, once backward() is called on the loss.
    def backward(grad_output: Tensor) -> None:
        state_after = _random_state(device)
        for n, (run, state) in enumerate(zip(passes, random_states, strict=True)):
            last = n == len(passes) - 1
            no_sync = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            with torch.enable_grad(), no_sync:
                _set_random_state(state)  # the same dropout as in the first pass
                products = [(x * parts[n]).sum() for x, parts in zip(run(), gradients, strict=True)]
                torch.stack(products).sum().mul(grad_output).backward()
        _set_random_state(state_after)

    loss = loss.detach().requires_grad_()
    loss.register_hook(backward)
    return loss


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
