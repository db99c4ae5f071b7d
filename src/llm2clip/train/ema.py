"""A running mean of the weights, which often retrieves better than the weights of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """mean <- decay * mean + (1 - decay) * weights, of those that are trained, after each step.

    Early on the decay is (1 + steps) / (10 + steps) where that is less, so that the first weights are soon forgotten.
    Weights shared out over processes are averaged where they lie.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.mean = {name: _local(p).clone() for name, p in self.weights.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step `step`, counted from 1."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.mean.values()), [_local(p) for p in self.weights.values()], share)

    @contextmanager
    def instead(self) -> Iterator[None]:
        """Within this, the model has the mean for its weights."""
        self.exchange()
        try:
            yield
        finally:
            self.exchange()

    @torch.no_grad()
    def exchange(self) -> None:
        """The mean and the weights change places."""
        for name, p in self.weights.items():
            kept = _local(p).clone()
            _local(p).copy_(self.mean[name])
            self.mean[name].copy_(kept)

    def save(self, folder: Path, rank: int) -> None:
        """Into a checkpoint, a file for each process that holds parts of its own, else the main one's."""
        state = {name: mean.cpu().contiguous() for name, mean in self.mean.items()}
        if rank == 0 or any(isinstance(p, DTensor) for p in self.weights.values()):
            save_file(state, folder / f"ema-{rank}.safetensors")

    def load(self, folder: Path, rank: int) -> None:
        """From a checkpoint."""
        file = folder / f"ema-{rank}.safetensors"
        for name, mean in load_file(file if file.is_file() else folder / "ema-0.safetensors").items():
            self.mean[name].copy_(mean)


def _local(p: Tensor) -> Tensor:
    """This process's part of a weight, in its own memory."""
    data = p.detach()
    return data.to_local() if isinstance(data, DTensor) else data
