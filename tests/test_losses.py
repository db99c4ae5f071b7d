"""InfoNCE against a float64 reference, with duplicates, in low precision, and over processes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import distributed
from llm2clip.train.losses import info_nce


def reference(image: torch.Tensor, text: torch.Tensor, scale: float, ids: list[int] | None = None) -> torch.Tensor:
    """Row by row in float64, straight from the definition."""
    image, text = image.double(), text.double()
    n = len(image)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(n):
        for a, b in ((image, text), (text, image)):
            negatives = [j for j in range(n) if j == i or ids is None or ids[j] != ids[i]]
            logits = [scale * (a[i] * b[j]).sum() for j in negatives]
            total = total - (scale * (a[i] * b[i]).sum() - torch.logsumexp(torch.stack(logits), 0)) / 2
    return total / n


def vectors(n: int, d: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(F.normalize(torch.randn(n, d, generator=g), dim=-1) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("ids", [None, [0, 1, 2, 3, 4, 5], [0, 1, 0, 2, 2, 2]])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_value_and_gradient(scale: float, ids: list[int] | None) -> None:
    image, text = (v.requires_grad_() for v in vectors(6))
    loss = info_nce(image, text, scale, None if ids is None else torch.tensor(ids))
    ours = torch.autograd.grad(loss, (image, text))
    right = reference(image, text, scale, ids)
    theirs = torch.autograd.grad(right, (image, text))
    assert loss.item() == pytest.approx(right.item(), abs=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.double(), b.double(), atol=1e-5)


def test_by_hand() -> None:
    """Two orthogonal pairs at scale 1: each row is log(1 + e^-1)."""
    eye = torch.eye(2)
    assert info_nce(eye, eye, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_logits_are_float32_under_autocast() -> None:
    image, text = vectors(64, 32)
    with torch.autocast("cpu", torch.bfloat16):
        low = info_nce(image, text, 100.0)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(reference(image, text, 100.0).item(), abs=1e-4)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_gradients_of_one(processes: int, tmp_path: Path) -> None:
    """Averaged as DDP does, gradients of N processes are those of one with the whole batch, duplicates included."""
    distributed(processes, _one_rank, str(tmp_path))
    weight = torch.eye(8).requires_grad_()
    image, text = vectors(8)
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 1])
    loss = info_nce(F.normalize(image @ weight, dim=-1), F.normalize(text @ weight, dim=-1), 10.0, ids)
    loss.backward()
    parts = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(processes)]
    assert torch.allclose(torch.stack([p["grad"] for p in parts]).mean(0), weight.grad, atol=1e-6)
    assert sum(p["loss"] for p in parts).item() / processes == pytest.approx(loss.item(), abs=1e-6)


def _one_rank(folder: str) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    weight = torch.eye(8).requires_grad_()
    image, text = vectors(8)
    ids = torch.tensor([0, 1, 2, 0, 3, 4, 5, 1])
    loss = info_nce(
        F.normalize(image[mine] @ weight, dim=-1), F.normalize(text[mine] @ weight, dim=-1), 10.0, ids[mine]
    )
    loss.backward()
    torch.save({"grad": weight.grad, "loss": loss.detach()}, f"{folder}/{rank}.pt")
