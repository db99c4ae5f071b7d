"""Gradient caching (GradCache, arXiv 2101.06983): contrastive losses over batches too large for one forward pass.

A contrastive loss depends only on the embeddings of the complete batch, and so does its gradient with respect to the
embeddings. The gradients for the model can therefore be computed in three steps:

1. Run the model on each part of the batch in turn, without keeping activations.
2. Compute the loss on all embeddings and its gradient with respect to the embeddings.
3. Run the model on each part again, and backpropagate the embedding gradients through the model.

The gradients equal those of one pass over the complete batch. Only the activations of one part are in memory at a time,
at the cost of one more forward pass.
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
    """Return the loss on the outputs of all passes. Calling backward() on the loss runs each pass again.

    Args:
        passes: Functions that run `model` on one part of the batch each. Every function returns a tuple of tensors with
            one row per item, and all tuples have the same length.
        loss_function: Function that returns the scalar loss. Its arguments are the tensors of the passes, each
            concatenated over all passes.
        model: The model, including its DDP or FSDP wrapper. DDP reduces the gradients once, in the last pass.
        device: Device whose random state the passes use.
    """
    # 1. Forward passes without activations.
    random_states, outputs = [], []
    with torch.no_grad():
        for run in passes:
            random_states.append(_random_state(device))
            outputs.append(tuple(x.detach() for x in run()))  # detached: a view of a parameter would need a gradient

    # 2. Loss, and its gradient with respect to the outputs.
    joined = [torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True)]
    loss = loss_function(*joined)
    loss.backward()
    gradients = []  # for each output tensor, its gradient split by pass
    for x, parts in zip(joined, zip(*outputs, strict=True), strict=True):
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        gradients.append(gradient.split([len(part) for part in parts]))

    # 3. Forward and backward passes, run when backward() is called on the loss.
    def backward(grad_output: Tensor) -> None:
        state_after = _random_state(device)
        for n, (run, state) in enumerate(zip(passes, random_states, strict=True)):
            last = n == len(passes) - 1
            no_sync = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext()
            with torch.enable_grad(), no_sync:
                _set_random_state(state)  # same dropout masks as in the first forward pass
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
