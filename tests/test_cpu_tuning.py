"""Tests that the CPU settings change neither results nor global state."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llm2clip import cpu_tuning


@pytest.fixture
def clear_cache() -> Iterator[None]:
    """Let `onednn_is_faster` decide anew, before and after the test."""
    cpu_tuning.onednn_is_faster.cache_clear()
    yield
    cpu_tuning.onednn_is_faster.cache_clear()


def test_onednn_matmul_has_float32_accuracy(clear_cache: None) -> None:
    a, b = torch.randn(300, 400), torch.randn(400, 500)
    before = torch.get_float32_matmul_precision()
    with cpu_tuning.onednn_matmul():
        result = a @ b
    assert torch.get_float32_matmul_precision() == before
    exact = a.double() @ b.double()
    assert (result - exact).norm() / exact.norm() < cpu_tuning.FLOAT32_TOLERANCE


@pytest.mark.parametrize(
    ("cpu_name", "avx512", "uses_onednn"), [("AMD EPYC", True, True), ("AMD", False, False), ("Intel", True, False)]
)
def test_onednn_matmul_is_used_on_amd_with_avx512(
    cpu_name: str, avx512: bool, uses_onednn: bool, clear_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: {"cpu_name": cpu_name, "avx512_f": avx512}, raising=False
    )
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: state.update(name=name))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: state["name"])
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    state = {"name": "highest"}
    precisions = []
    with pytest.raises(KeyError), cpu_tuning.onednn_matmul():
        precisions.append(state["name"])
        raise KeyError
    assert precisions == ["medium" if uses_onednn else "highest"] and state["name"] == "highest"


def test_onednn_is_not_used_if_it_rounds_to_bfloat16(clear_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"name": "highest"}
    matmul = torch.Tensor.__matmul__

    def rounding(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if state["name"] == "medium" and a.dtype == torch.float32:
            a, b = a.bfloat16().float(), b.bfloat16().float()
        return matmul(a, b)

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "AMD", "avx512_f": True}, raising=False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda name: state.update(name=name))
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: state["name"])
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounding)
    assert not cpu_tuning.onednn_is_faster()
