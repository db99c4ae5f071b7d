"""The losses against float64 references written from the definition, against open_clip, and over processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip.loss
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import distributed
from llm2clip.train import losses
from llm2clip.train.losses import cosine_loss, info_nce, sigmoid_loss

SCALE, BIAS = 14.3, -3.0
# Images 0 and 2 share a text, 3 and 4 have one only, which is the same, and image 1 has a text twice.
OWNER = [0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 5]
IDS = [1, 2, 3, 4, 4, 3, 5, 6, 6, 7, 8]


def vectors(n: int, m: int, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    image, text = torch.randn(n, d, generator=g), torch.randn(m, d, generator=g)
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def info_nce_reference(image: Tensor, text: Tensor, scale: Tensor, owner: list[int], ids: list[int]) -> Tensor:
    """Pair by pair in float64, straight from the definition."""
    image, text, scale, n = image.double(), text.double(), scale.double(), len(image)
    total = torch.zeros((), dtype=torch.float64)
    for j, i in enumerate(owner):
        own = [ids[k] for k in range(len(ids)) if owner[k] == i]
        texts = [k for k in range(len(ids)) if ids[k] not in own]
        images = [k for k in range(n) if ids[j] not in [ids[t] for t in range(len(ids)) if owner[t] == k]]
        positive = scale * (image[i] @ text[j])
        to_text = torch.stack([positive, *(scale * (image[i] @ text[k]) for k in texts)]).logsumexp(0) - positive
        to_image = torch.stack([positive, *(scale * (image[k] @ text[j]) for k in images)]).logsumexp(0) - positive
        total = total + (to_text + to_image) / 2 / owner.count(i)
    return total / n


def sigmoid_reference(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, owner: list[int], ids: list[int]
) -> Tensor:
    image, text, scale, bias, n = image.double(), text.double(), scale.double(), bias.double(), len(image)
    total = torch.zeros((), dtype=torch.float64)
    for j, mine in enumerate(owner):
        for i in range(n):
            logit = scale * (image[i] @ text[j]) + bias
            if i == mine:
                total = total - torch.sigmoid(logit).log() / owner.count(mine)
            elif ids[j] not in [ids[t] for t in range(len(ids)) if owner[t] == i]:
                total = total - torch.sigmoid(-logit).log() / owner.count(mine)
    return total / n


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The value and the gradients by all inputs, in float64."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad(3 * value, leaves)  # a loss is a part of something, and takes its gradient on
    return [value.detach().double(), *(g.double() / 3 for g in gradients)]


@pytest.fixture(params=[5, 1 << 20])
def strips(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips of one row, and all in one."""
    monkeypatch.setitem(losses.CHUNK, "cpu", request.param)


RAGGED = [(OWNER, IDS), (OWNER, list(range(11))), (list(range(6)), [0, 1, 0, 2, 2, 2]), ([0, 1, 2, 3], [7, 7, 7, 7])]


@pytest.mark.usefixtures("strips")
@pytest.mark.parametrize(("owner", "ids"), RAGGED)
@pytest.mark.parametrize("scale", [1.0, SCALE, 100.0])
def test_values_and_gradients(scale: float, owner: list[int], ids: list[int]) -> None:
    image, text = vectors(owner[-1] + 1, len(owner))
    numbers = torch.tensor(scale), torch.tensor(BIAS)
    who = torch.tensor(owner), torch.tensor(ids)
    for found, right in (
        (
            with_gradients(lambda i, t, s: info_nce(i, t, s, *who), image, text, numbers[0]),
            with_gradients(lambda i, t, s: info_nce_reference(i, t, s, owner, ids), image, text, numbers[0]),
        ),
        (
            with_gradients(lambda i, t, s, b: sigmoid_loss(i, t, s, b, *who), image, text, *numbers),
            with_gradients(lambda i, t, s, b: sigmoid_reference(i, t, s, b, owner, ids), image, text, *numbers),
        ),
    ):
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6 * max(1, scale), rtol=1e-5)


@pytest.mark.usefixtures("strips")
def test_one_text_an_image_is_what_open_clip_does() -> None:
    image, text = vectors(12, 12, 16)
    scale, bias = torch.tensor(SCALE), torch.tensor(BIAS)
    theirs: Any = open_clip.loss.ClipLoss()
    for a, b in zip(
        with_gradients(info_nce, image, text, scale), with_gradients(theirs, image, text, scale), strict=True
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    siglip: Any = open_clip.loss.SigLipLoss()
    for a, b in zip(
        with_gradients(sigmoid_loss, image, text, scale, bias),
        with_gradients(siglip, image, text, scale, bias),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_by_hand() -> None:
    """Two orthogonal pairs at scale 1: each row is log(1 + e^-1), each sigmoid pair log(1 + e^-1) or log 2."""
    eye = torch.eye(2)
    assert info_nce(eye, eye, 1.0).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert sigmoid_loss(eye, eye, 1.0, 0.0).item() == pytest.approx(math.log(1 + math.exp(-1)) + math.log(2))
    owner = torch.tensor([0, 0, 1])
    text = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert cosine_loss(eye, text, owner).item() == pytest.approx((0.5 + 0) / 2)
    assert cosine_loss(eye, eye.flip(0)).item() == pytest.approx(1.0)


def test_extremes_stay_finite_and_exact() -> None:
    """At scale 100 a text may be 200 logits below the others: its column has a sum that float32 would lose."""
    image = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1e-3], [0.9, -0.1], [-1.0, 0.0]]), dim=-1)
    text = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.01], [1.0, 0.1]]), dim=-1)
    scale = torch.tensor(100.0)
    found = with_gradients(info_nce, image, text, scale)
    right = with_gradients(lambda i, t, s: info_nce_reference(i, t, s, [0, 1, 2, 3], [0, 1, 2, 3]), image, text, scale)
    for a, b in zip(found, right, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_logits_are_float32_under_autocast() -> None:
    image, text = vectors(64, 64, 32)
    right = info_nce_reference(image, text, torch.tensor(100.0), list(range(64)), list(range(64))).item()
    with torch.autocast("cpu", torch.bfloat16):
        low = info_nce(image, text, 100.0)
        assert sigmoid_loss(image, text, 100.0, -10.0).dtype == torch.float32
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(right, abs=1e-4)


def test_memory_does_not_grow_with_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor of the loss is as large as a tenth of all logits."""
    monkeypatch.setitem(losses.CHUNK, "cpu", 1 << 12)
    largest = 0

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    image, text = (x.requires_grad_() for x in vectors(512, 512))
    with Watching():
        info_nce(image, text, 10.0).backward()
        sigmoid_loss(image, text, 10.0, 0.0).backward()
    assert largest <= 512 * 512 / 10


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_give_the_gradients_of_one(processes: int, tmp_path: Path) -> None:
    """Averaged as DDP does, gradients of N processes are those of one with the whole batch: ragged texts, duplicates
    across processes, scale and bias included."""
    distributed(processes, _one_rank, str(tmp_path))
    right = _gradients(slice(0, 8))
    parts = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(processes)]
    for name, value in right.items():
        found = torch.stack([p[name] for p in parts]).mean(0)
        torch.testing.assert_close(found, value, atol=1e-6, rtol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def _gradients(mine: slice) -> dict[str, Tensor]:
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 6, 7])
    ids = torch.tensor([1, 2, 3, 4, 5, 1, 6, 7, 8, 3, 9, 10])
    image, text = vectors(8, 12)
    texts = (owner >= mine.start) & (owner < mine.stop)
    out: dict[str, Tensor] = {}
    for name in ("infonce", "sigmoid", "cosine"):
        weight, numbers = torch.eye(8).requires_grad_(), torch.tensor([10.0, -2.0]).requires_grad_()
        i, t = F.normalize(image[mine] @ weight, dim=-1), F.normalize(text[texts] @ weight.T, dim=-1)
        who = owner[texts] - mine.start, ids[texts]
        if name == "infonce":
            loss = info_nce(i, t, numbers[0], *who)
        elif name == "sigmoid":
            loss = sigmoid_loss(i, t, numbers[0], numbers[1], *who)
        else:
            loss = cosine_loss(i, t, who[0])
        loss.backward()
        assert weight.grad is not None
        out[f"{name} weight"], out[f"{name} loss"] = weight.grad, loss.detach()
        if numbers.grad is not None:
            out[f"{name} numbers"] = numbers.grad
    return out


def _one_rank(folder: str) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.save(_gradients(slice(rank * 8 // world, (rank + 1) * 8 // world)), f"{folder}/{rank}.pt")
