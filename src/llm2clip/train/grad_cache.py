"""Gradient caching (GradCache, arXiv 2101.06983) for contrastive losses over batches too large for one forward pass.

A contrastive loss is a function of the embeddings of the complete batch, and so is its gradient with respect to these
embeddings. The model's parameter gradients can therefore be computed in three steps:

1. Run the model on each part of the batch in turn, without storing activations.
2. Compute the loss over the embeddings of all parts, and its gradient with respect to these embeddings.
3. Run the model on each part again and backpropagate the gradient of the part's embeddings through the model.

The resulting gradients equal those from a single pass over the complete batch. Only one part's activations are in
memory at a time. The cost is a second forward pass over the batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

ForwardPass = Callable[[], tuple[Tensor, ...]]


def compute_cached_loss(
    passes: Sequence[ForwardPass], loss_function: Callable[..., Tensor], model: nn.Module, device: torch.device
) -> Tensor:
    """Return the loss on the outputs of all passes. Calling backward() on the loss reruns each pass.

    Args:
        passes: One function per part of the batch. Each function runs `model` on its part and returns a tuple of
            tensors with one row per item. All tuples must have the same length.
        loss_function: Function that returns the scalar loss. Argument n is the concatenation of the n-th tensors from
            all passes.
        model: The model, including its DDP or FSDP wrapper. Gradients are reduced only once, in the last pass.
        device: Device on which the passes run. Its random state is saved and restored, so that each pass uses the same
            dropout masks when it is rerun.
    """
    # 1. Forward passes, without storing activations.
    random_states, outputs = [], []
    with torch.no_grad():
        for run in passes:
            random_states.append(_get_random_state(device))
            # Detach, because an output that is a view of a parameter would require a gradient.
            outputs.append(tuple(x.detach() for x in run()))

    # 2. Loss, and its gradient with respect to the outputs.
    joined = [torch.cat(parts).requires_grad_() for parts in zip(*outputs, strict=True)]
    loss = loss_function(*joined)
    loss.backward()
    gradients = []  # gradient of each output tensor, split into one part for each pass
    for x, parts in zip(joined, zip(*outputs, strict=True), strict=True):
        gradient = torch.zeros_like(x) if x.grad is None else x.grad
        gradients.append(gradient.split([len(part) for part in parts]))

    # 3. Forward and backward passes, run when backward() is called on the loss.
    def backward(grad_output: Tensor) -> None:
        state_after = _get_random_state(device)
        for n, (run, state) in enumerate(zip(passes, random_states, strict=True)):
            with torch.enable_grad(), _sync_gradients(model, n == len(passes) - 1):
                _set_random_state(state)  # same dropout masks as in the first forward pass
                products = [(x * parts[n]).sum() for x, parts in zip(run(), gradients, strict=True)]
                torch.stack(products).sum().mul(grad_output).backward()
        _set_random_state(state_after)

    loss = loss.detach().requires_grad_()
    loss.register_hook(backward)
    return loss


@contextmanager
def _sync_gradients(model: nn.Module, sync: bool) -> Iterator[None]:
    """Reduce the gradients of a DDP or FSDP model inside the `with` block only if `sync` is True."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
    with model.no_sync() if isinstance(model, DistributedDataParallel) and not sync else nullcontext():
        yield


def _get_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
