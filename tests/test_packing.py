"""Packed attention: model inputs, pooling, gradients, memory, and the single kernel for all captions on GPUs."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from llm2clip.models.text import packing
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import (
    compute_packed_attention,
    compute_unfused_attention,
    pack_captions,
    remove_prompt_hidden_states,
    supports_packed_attention,
)

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = [5, 5, 3, 1, 1, 4]


def random_qkv(length: int) -> list[torch.Tensor]:
    """Return query, key and value, each (1, heads, length, D), which require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attend(qkv: list[torch.Tensor], lengths: list[int], **options: Any) -> torch.Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS  # type: ignore[assignment]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    options |= {"caption_lengths": lengths, "cu_seq_lens_q": boundaries, "max_length_q": max(lengths)}
    output, _ = compute_packed_attention(module, *qkv, attention_mask=None, **options)
    return output


def with_gradients(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the output, and the gradients of a random linear function of the output."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_gradients_match_captions_alone(causal: bool, window: int | None) -> None:
    lengths = [5, 5, 0, 3, 1, 1, 4]
    options = {"is_causal": causal, "sliding_window": window}
    packed, alone = random_qkv(sum(lengths)), random_qkv(sum(lengths))
    parts = zip(*(x.split(lengths, dim=2) for x in alone), strict=True)
    expected = torch.cat([attend(list(qkv), [qkv[0].shape[2]], **options) for qkv in parts if qkv[0].shape[2]], dim=1)
    results = with_gradients(attend(packed, lengths, **options), packed)
    for result, reference in zip(results, with_gradients(expected, alone), strict=True):
        torch.testing.assert_close(result, reference)


def test_packed_attention_takes_the_direction_from_the_module_by_default() -> None:
    module, qkv = torch.nn.Module(), random_qkv(5)

    def compute_attention(**options: Any) -> torch.Tensor:
        return compute_packed_attention(module, *qkv, attention_mask=None, caption_lengths=[3, 2], **options)[0]

    causal, bidirectional = compute_attention(is_causal=True), compute_attention(is_causal=False)
    assert torch.equal(compute_attention(), causal) and not torch.equal(causal, bidirectional)
    module.is_causal = False  # type: ignore[assignment]
    assert torch.equal(compute_attention(), bidirectional)
    assert torch.equal(compute_attention(is_causal=True), causal)


def test_packed_attention_applies_dropout() -> None:
    """Attention weights add up to 1, so values of 1 change only if weights are dropped."""
    query, key, value = random_qkv(8)
    qkv = [query, key, torch.ones_like(value)]
    torch.testing.assert_close(attend(qkv, [4, 4], is_causal=False), torch.ones(1, 8, HEADS, HEAD_DIM))
    assert (attend(qkv, [4, 4], is_causal=False, dropout=0.5) - 1).abs().max() > 0.1


class CountElements(TorchDispatchMode):
    """Counts the elements of all tensors that operations return, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        storages = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in storages:
            self.count += result.numel()
        return result


def test_packed_attention_backward_is_linear_in_number_of_lengths() -> None:
    """A slice's backward pass fills a tensor with the length of the row, so one slice per length would be quadratic."""

    def elements_per_token(number_of_lengths: int) -> float:
        lengths = [2 + i % number_of_lengths for i in range(64)]
        lengths.sort(reverse=True)
        output = attend(random_qkv(sum(lengths)), lengths)
        with CountElements() as elements:
            output.sum().backward()
        scores = sum(length**2 for length in lengths) * HEADS
        return (elements.count - 8 * scores) / sum(lengths)

    assert elements_per_token(64) < 1.5 * elements_per_token(1)


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("length", [1, 2, 7])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_unfused_attention_matches_its_definition(
    masked: bool, causal: bool, length: int, scaling: float | None
) -> None:
    """Compare with the definition in float64: 6 query heads, 2 key heads, values of another dimension."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, length, dim) for heads, dim in ((6, 8), (2, 8), (2, 5)))
    full = torch.ones(length, length, dtype=torch.bool)
    allowed = torch.eye(length, dtype=torch.bool) | (torch.rand(length, length) < 0.5) if masked else full
    mask = allowed[None, None] if masked else None
    output = compute_unfused_attention(q, k, v, mask, causal, scaling)
    assert output.shape == (3, length, 6, 5)
    visible = allowed.tril() if causal and not masked else allowed
    for head in range(6):
        scores = (scaling or 8**-0.5) * q[:, head].double() @ k[:, head // 3].double().transpose(1, 2)
        weights = (scores.exp() * visible) / (scores.exp() * visible).sum(-1, keepdim=True)
        assert torch.allclose(output[:, :, head].double(), weights @ v[:, head // 3].double(), atol=1e-6)
    low = compute_unfused_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, causal, scaling)
    assert low.dtype == torch.bfloat16


def test_pack_captions_inputs() -> None:
    batch = pack_captions([[5, 6, 7], [8], [9, 10]], "packed", torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert batch["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 6]
    assert batch["max_length_q"] == batch["max_length_k"] == 3
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("prompt_length", [1, 2, 3])
def test_pooling_without_prompts_equals_sentence_transformers(prompt_length: int) -> None:
    """Captions that consist of their prompt, or of a part of it, have a zero embedding."""
    pooling = Pooling(8, "mean", include_prompt=False)
    batch = pack_captions([[1, 2, 3, 4, 5], [1, 2], [1, 2, 3, 4], [1, 2, 3]], "packed", torch.device("cpu"))
    batch |= {"token_embeddings": torch.randn(1, 14, 8), "prompt_length": prompt_length}
    expected = pooling(dict(batch))["sentence_embedding"]
    remove_prompt_hidden_states(batch)
    assert "prompt_length" not in batch
    assert torch.equal(pooling(batch)["sentence_embedding"], expected)


@pytest.mark.parametrize(
    "change", [{"layer_types": ["chunked_attention"] * 3}, {"use_bidirectional_attention": True}, {"is_causal": None}]
)
def test_supports_packed_attention_rejects_unsupported_attention(llm: Path, change: dict) -> None:
    model = AutoModel.from_pretrained(llm)
    model.config.is_causal = False
    assert supports_packed_attention(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not supports_packed_attention(model)


def test_packed_attention_without_caption_lengths_fails(encoder: CaptionEncoder) -> None:
    features = encoder.collate(encoder.tokenize(["a dog", "two cats"]).ids)
    del features["caption_lengths"]
    with pytest.raises(ValueError, match="would attend to each other"):
        encoder.st(features)


# ---- varlen_attn ----------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("window", [None, 1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_varlen_attention_computes_packed_attention(
    causal: bool, window: int | None, scaling: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"is_causal": causal, "sliding_window": window, "scaling": scaling}
    qkv = random_qkv(sum(LENGTHS))
    expected = with_gradients(attend(qkv, LENGTHS, **options), qkv)
    monkeypatch.setattr(packing, "load_varlen_attn", lambda: reference_varlen_attn)
    monkeypatch.setattr(packing, "can_use_varlen_attention", lambda query, dropout: True)
    for result, reference in zip(with_gradients(attend(qkv, LENGTHS, **options), qkv), expected, strict=True):
        torch.testing.assert_close(result, reference)


def test_encode_with_varlen_attention_equals_packed_attention(
    encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model passes everything on that the kernel needs."""
    texts = ["a dog", "two cats in the snow", "a boat"]
    expected = encoder.encode(texts)
    calls = []

    def record(*args: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return reference_varlen_attn(*args, **options)

    monkeypatch.setattr(packing, "load_varlen_attn", lambda: record)
    monkeypatch.setattr(packing, "can_use_varlen_attention", lambda query, dropout: True)
    torch.testing.assert_close(encoder.encode(texts), expected)
    assert len(calls) == 3  # one per layer


def test_can_use_varlen_attention_requires_16_bits_and_a_kernel_for_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the GPU are fake."""

    def can_use(dtype: Any = torch.bfloat16, head_dim: int = 64, device: str = "cuda", dropout: float = 0.0) -> bool:
        with FakeTensorMode():
            query = torch.empty(1, 4, 6, head_dim, dtype=dtype, device=device)
            return packing.can_use_varlen_attention(query, dropout)

    monkeypatch.setattr(packing, "load_varlen_attn", lambda: reference_varlen_attn)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert can_use() and can_use(torch.float16) and can_use(head_dim=256)
    assert not can_use(torch.float32)
    assert not can_use(device="cpu")
    assert not can_use(dropout=0.1)
    assert not can_use(head_dim=36) and not can_use(head_dim=264)
    for owner, name, result in (
        (packing, "load_varlen_attn", lambda: None),
        (torch.cuda, "get_device_capability", lambda device: (7, 5)),
        (torch.version, "cuda", None),  # AMD GPUs, and builds for CPUs
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, result)
            assert not can_use()


def test_varlen_dtype_is_the_autocast_dtype() -> None:
    """Under autocast, rotary embeddings return fp32 queries. With bf16+N, the first layers run without autocast."""
    query = torch.empty(1)
    with torch.autocast("cpu", torch.bfloat16):
        assert packing.get_varlen_dtype(query) == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert packing.get_varlen_dtype(query) == torch.float32
    assert packing.get_varlen_dtype(query.half()) == torch.float16


def test_installed_varlen_attn_accepts_these_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device `meta`, PyTorch's own function computes shapes and dtypes only."""
    kernel = packing.load_varlen_attn()
    if kernel is None:
        pytest.skip("this version of PyTorch has no suitable varlen_attn")
    expected = set(inspect.signature(reference_varlen_attn).parameters)
    assert expected <= set(inspect.signature(kernel).parameters)
    monkeypatch.setattr(
        packing, "get_varlen_dtype", lambda query: torch.bfloat16
    )  # as under autocast, which needs a GPU
    query = torch.empty(1, HEADS, sum(LENGTHS), HEAD_DIM, device="meta")
    key = torch.empty(1, KEY_HEADS, sum(LENGTHS), HEAD_DIM, device="meta", dtype=torch.bfloat16)
    boundaries = torch.empty(len(LENGTHS) + 1, dtype=torch.int32, device="meta")
    output = packing.compute_varlen_attention(query, key, key, boundaries, max(LENGTHS), is_causal=False)
    assert output.shape == (1, sum(LENGTHS), HEADS, HEAD_DIM) and output.dtype == torch.bfloat16
