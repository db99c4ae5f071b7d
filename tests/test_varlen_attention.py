"""Selection of `varlen_attn` for packed rows, its arguments, and its output. No GPU is needed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from llm2clip.models.text import packing
from llm2clip.models.text import varlen_attention as varlen
from llm2clip.models.text.caption_encoder import CaptionEncoder

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = [5, 5, 3, 1, 1, 4]


def reference_varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as PyTorch documents `varlen_attn`: (T, heads, D) in and out, (earlier, later) tokens, -1 for all."""
    assert cu_seq_q.dtype == torch.int32 and max_q == max_k == int(cu_seq_q.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    repeats = query.shape[1] // key.shape[1]
    outputs = []
    for start, stop in zip(cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), strict=True):
        q = query[start:stop]
        k, v = (x[start:stop].repeat_interleave(repeats, dim=1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
        later = torch.arange(stop - start) - torch.arange(stop - start)[:, None]  # key position - query position
        before, after = (stop - start if size == -1 else size for size in window_size)
        scores = scores.masked_fill((later > after) | (-later > before), -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v))
    return torch.cat(outputs)


def attend(dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.Tensor]:
    """Return the output of packed attention on random inputs, and the inputs' gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, sum(LENGTHS), HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    qkv = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS  # type: ignore[assignment]
    boundaries = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    options |= {"caption_lengths": LENGTHS, "cu_seq_lens_q": boundaries, "max_length_q": max(LENGTHS)}
    output, _ = packing.packed_attention(module, *qkv, attention_mask=None, **options)
    gradients = torch.autograd.grad((output * torch.randn(output.shape, generator=generator)).sum(), qkv)
    return [output, *gradients]


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attention_computes_packed_attention(
    causal: bool, window: int | None, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"is_causal": causal, "sliding_window": window, "scaling": scaling}
    expected = attend(**options)
    monkeypatch.setattr(varlen, "load_varlen_attn", lambda: reference_varlen_attn)
    monkeypatch.setattr(packing, "can_use_varlen", lambda query, key, dropout: True)
    for result, reference in zip(attend(**options), expected, strict=True):
        torch.testing.assert_close(result, reference)


def test_encode_with_varlen_attention_equals_packed_attention(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model passes everything on that the kernel needs."""
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    texts = ["a dog", "two cats in the snow", "a boat"]
    expected = encoder.encode(texts)
    calls = []

    def record(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return reference_varlen_attn(*args, **options)

    monkeypatch.setattr(varlen, "load_varlen_attn", lambda: record)
    monkeypatch.setattr(packing, "can_use_varlen", lambda query, key, dropout: True)
    torch.testing.assert_close(encoder.encode(texts), expected)
    assert len(calls) == 3  # one per layer


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the checks of the GPU succeed. Tensors on the GPU are fake."""
    monkeypatch.setattr(varlen, "load_varlen_attn", lambda: reference_varlen_attn)
    monkeypatch.setattr(varlen, "has_flash_hardware", lambda device: True)
    monkeypatch.setattr(varlen, "matches_sdpa", lambda *args: True)


def can_use_varlen(
    dtype: torch.dtype = torch.bfloat16, head_dim: int = 64, device: str = "cuda", dropout: float = 0.0
) -> bool:
    with FakeTensorMode():
        query = torch.empty(1, 4, 6, head_dim, dtype=dtype, device=device)
        return varlen.can_use_varlen(query, query, dropout)


def test_can_use_varlen_requires_16_bits_on_a_gpu(gpu: None) -> None:
    assert can_use_varlen() and can_use_varlen(torch.float16) and can_use_varlen(head_dim=256)
    assert not can_use_varlen(torch.float32)
    assert not can_use_varlen(device="cpu")
    assert not can_use_varlen(dropout=0.1)
    assert not can_use_varlen(head_dim=36) and not can_use_varlen(head_dim=264)


def test_varlen_dtype_is_the_autocast_dtype() -> None:
    """Under autocast, rotary embeddings return fp32 queries. With bf16+N, the first layers run without autocast."""
    query = torch.empty(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert varlen.varlen_dtype(query) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert varlen.varlen_dtype(query) == torch.float32
    assert varlen.varlen_dtype(query.half()) == torch.float16


@pytest.mark.parametrize(
    ("name", "result"), [("load_varlen_attn", None), ("has_flash_hardware", False), ("matches_sdpa", False)]
)
def test_can_use_varlen_requires_kernel_and_hardware(
    gpu: None, name: str, result: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert can_use_varlen()
    monkeypatch.setattr(varlen, name, lambda *args: result)
    assert not can_use_varlen()


@pytest.mark.parametrize(("capability", "supported"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_has_flash_hardware_from_ampere(
    capability: tuple[int, int], supported: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen.has_flash_hardware(torch.device("cuda")) == supported
    monkeypatch.setattr(torch.version, "cuda", None)  # AMD GPUs, and builds for CPUs
    assert not varlen.has_flash_hardware(torch.device("cuda"))


@pytest.mark.parametrize("inference", [False, True])
def test_matches_sdpa_compares_outputs_and_gradients(inference: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.device("cpu"), torch.bfloat16, HEADS, KEY_HEADS, HEAD_DIM)

    def check() -> bool:
        varlen.matches_sdpa.cache_clear()
        with torch.inference_mode(inference):
            return varlen.matches_sdpa(*arguments)

    def fail(*args: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nmore")

    kernels = {
        "gives wrong results": lambda *args, **options: reference_varlen_attn(*args, **options) + 1,
        "": lambda *args, **options: reference_varlen_attn(*args, **options).detach() + 0 * args[0],
        r"fails \(no kernel image is available\)": fail,
    }
    try:
        monkeypatch.setattr(varlen, "load_varlen_attn", lambda: reference_varlen_attn)
        assert check()
        for message, kernel in kernels.items():
            monkeypatch.setattr(varlen, "load_varlen_attn", lambda kernel=kernel: kernel)
            with pytest.warns(UserWarning, match=f"varlen_attn {message}.*slower attention"):
                assert not check()
    finally:
        varlen.matches_sdpa.cache_clear()


def test_installed_varlen_attn_accepts_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, PyTorch's own function computes shapes and dtypes only."""
    kernel = varlen.load_varlen_attn()
    if kernel is None:
        pytest.skip("this version of PyTorch has no suitable varlen_attn")
    expected = set(inspect.signature(reference_varlen_attn).parameters)
    assert expected <= set(inspect.signature(kernel).parameters)
    monkeypatch.setattr(varlen, "varlen_dtype", lambda query: torch.bfloat16)  # as under autocast, which needs a GPU
    query = torch.empty(1, HEADS, sum(LENGTHS), HEAD_DIM, device="meta")
    key = torch.empty(1, KEY_HEADS, sum(LENGTHS), HEAD_DIM, device="meta", dtype=torch.bfloat16)
    boundaries = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
    output = varlen.varlen_attention(query, key, key, boundaries, max(LENGTHS), is_causal=False)
    assert output.shape == (1, sum(LENGTHS), HEADS, HEAD_DIM) and output.dtype == torch.bfloat16
