"""Packed batches and packed attention: model inputs, pooling, gradients, and the memory of the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.utils._python_dispatch import TorchDispatchMode

from llm2clip.models.text.packing import pack_captions, packed_attention, remove_prompts

HEADS, KEY_HEADS, HEAD_DIM = 4, 2, 8


def random_qkv(length: int) -> list[torch.Tensor]:
    """Return query, key and value, each (1, heads, length, D), which require gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, length, HEAD_DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def attend(qkv: list[torch.Tensor], lengths: list[int], **options: Any) -> torch.Tensor:
    module = torch.nn.Module()
    module.num_key_value_groups = HEADS // KEY_HEADS  # type: ignore[assignment]
    output, _ = packed_attention(module, *qkv, attention_mask=None, caption_lengths=lengths, **options)
    return output


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_packed_attention_gradients_match_captions_alone(causal: bool, window: int | None) -> None:
    lengths = [5, 5, 0, 3, 1, 1, 4]
    options = {"is_causal": causal, "sliding_window": window}
    packed, alone = random_qkv(sum(lengths)), random_qkv(sum(lengths))
    output = attend(packed, lengths, **options)
    parts = zip(*(x.split(lengths, dim=2) for x in alone), strict=True)
    expected = torch.cat([attend(list(qkv), [qkv[0].shape[2]], **options) for qkv in parts if qkv[0].shape[2]], dim=1)
    torch.testing.assert_close(output, expected)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for x, y in zip(packed, alone, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


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
    remove_prompts(batch)
    assert "prompt_length" not in batch
    assert torch.equal(pooling(batch)["sentence_embedding"], expected)
