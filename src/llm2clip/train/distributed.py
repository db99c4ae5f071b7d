"""What the losses take from the other processes. Alone, a process has it all already."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from llm2clip.distributed import is_distributed


def all_gather(x: Tensor) -> Tensor:
    """The rows of all processes, as many of each, without gradients."""
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(x: Tensor) -> Tensor:
    """The rows of all processes, as many of each."""
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))


class RaggedGather:
    """Rows of which the processes have different numbers: filled up for the way, and cut again."""

    def __init__(self, mine: int, device: torch.device, gather: bool = True) -> None:
        """
        Args:
            mine: the number of this process's rows.
            device: of what will be gathered.
            gather: false takes this process for the only one.
        """
        self.alone = not (gather and is_distributed())
        self.mine = self.most = self.total = mine
        self.first = 0
        if not self.alone:
            counts = all_gather(torch.tensor([mine], device=device)).tolist()
            self.most, self.total = max(counts), sum(counts)
            self.first = sum(counts[: dist.get_rank()])
            self.kept = torch.cat(
                [torch.arange(count, device=device) + rank * self.most for rank, count in enumerate(counts)]
            )

    @property
    def own(self) -> slice:
        """Where this process's rows are among all."""
        return slice(self.first, self.first + self.mine)

    def all(self, x: Tensor, gradients: bool = False) -> Tensor:
        """The rows of all processes, which must all call this."""
        if self.alone or not self.most:
            return x
        filled = torch.cat([x, x.new_zeros(self.most - len(x), *x.shape[1:])])
        return (all_gather_with_grad(filled) if gradients else all_gather(filled))[self.kept]

    def log_sum_exp(self, x: Tensor) -> Tensor:
        """The log of the sum of exp(x) over all processes, elementwise."""
        if self.alone:
            return x
        most = x.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX)
        total = torch.where(most == -torch.inf, 0.0, (x - most).exp())
        dist.all_reduce(total)
        return most + total.log()
