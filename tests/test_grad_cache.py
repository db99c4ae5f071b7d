"""Gradient caching on several ranks."""

from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from conftest import run_distributed
from llm2clip.runs.ranks import full_tensor
from llm2clip.train.optim import compute_cached_loss

# The function with which FSDP reduces gradients; the first is new in PyTorch 2.13.
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def test_fsdp_reduces_gradients_once_for_all_passes() -> None:
    run_distributed(2, _compare_passes_on_rank)


def _compare_passes_on_rank() -> None:
    """Compare four passes with a single pass: equal gradients, and equally many reductions."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    gradients, reductions = [], []
    for size in (8, 2):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        with mock.patch.object(dist, REDUCE_SCATTER, wraps=getattr(dist, REDUCE_SCATTER)) as reduce_scatter:
            for _ in range(2):  # the second step adds to the gradients of the first
                passes = [partial(_run, model, part) for part in inputs.split(size)]
                compute_cached_loss(passes, lambda x: (x @ x.T).logsumexp(1).mean(), model, inputs.device).backward()
        reductions.append(reduce_scatter.call_count)
        gradients.append([full_tensor(parameter.grad) for parameter in model.parameters()])
    assert reductions[0] == reductions[1] > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def _run(model: nn.Module, inputs: Tensor) -> tuple[Tensor]:
    return (model(inputs),)
