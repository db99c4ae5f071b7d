"""What makes CPUs fast changes no number, and nothing outside."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm2clip import cpu_tuning as cpu
from llm2clip.models.packing import unfused_attention


@pytest.fixture
def fresh() -> Iterator[None]:
    cpu.onednn_is_faster.cache_clear()
    yield
    cpu.onednn_is_faster.cache_clear()


def test_products_are_float32s(fresh: None) -> None:
    a, b = torch.randn(300, 400), torch.randn(400, 500)
    before = torch.get_float32_matmul_precision()
    with cpu.onednn_matmul():
        found = a @ b
    assert torch.get_float32_matmul_precision() == before
    exact = a.double() @ b.double()
    assert (found - exact).norm() / exact.norm() < cpu.ROUNDING


@pytest.mark.parametrize(
    ("maker", "avx512", "pays"), [("AMD EPYC", True, True), ("AMD", False, False), ("Intel", True, False)]
)
def test_the_faster_library_is_taken(
    maker: str, avx512: bool, pays: bool, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": maker, "avx512_f": avx512}, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: state.update(name=name))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: state["name"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    state = {"name": "highest"}
    seen = []
    with pytest.raises(KeyError), cpu.onednn_matmul():
        seen.append(state["name"])
        raise KeyError
    assert seen == ["medium" if pays else "highest"] and state["name"] == "highest"


def test_one_that_rounds_to_bfloat16_is_not(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"name": "highest"}
    product = torch.Tensor.__matmul__

    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if state["name"] == "medium" and a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return product(a, b)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD", "avx512_f": True}, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: state.update(name=name))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: state["name"])
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not cpu.onednn_is_faster()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_attention_is_attention(causal: bool, masked: bool) -> None:
    """Against the sum written out in float64: six heads that share two, values of another width."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 7, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 5)
    sees = torch.eye(7, dtype=torch.bool) | (torch.rand(7, 7) < 0.5) if masked else torch.ones(7, 7, dtype=torch.bool)
    found = unfused_attention(q, k, v, sees[None, None] if masked else None, causal, 0.3)
    assert found.shape == (3, 7, 6, 5)
    for head in range(6):
        scores = 0.3 * q[:, head].double() @ k[:, head // 3].double().transpose(1, 2)
        allowed = sees if masked else (sees.tril() if causal else sees)
        weights = (scores.exp() * allowed) / (scores.exp() * allowed).sum(-1, keepdim=True)
        assert torch.allclose(found[:, :, head].double(), weights @ v[:, head // 3].double(), atol=1e-6)
