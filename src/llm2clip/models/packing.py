"""Captions end to end in one row: no token of a batch is padding, and none attends to another caption.

The layers of an LLM that treat each token alone see one long row. Attention goes caption by caption: those of one
length that stand beside each other are one call of attention without any mask, and since batches hold captions of
similar length, there are few calls. It is registered with transformers under the name `packed`, so that
every family of models can use it; a padded batch under that name is read as under `sdpa`.

Resetting `position_ids` alone would not do: under `sdpa` with attention in both directions, captions would see each
other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACKED = "packed"
SHORT = 512  # tokens, up to which scores may lie in memory


def pack_batch(ids: Sequence[Sequence[int]], attention: str, device: torch.device) -> dict[str, Any]:
    """Token ids of B captions, T in all, as a model with `attention` reads them in one row.

    Returns:
        input_ids and position_ids, (1, T) int64; where each caption begins and ends, (B + 1,) int32, under the two
        names that transformers' flash attention reads, with the greatest length. For `packed` the captions' lengths,
        too, and a mask of four dimensions, which keeps transformers from making one of (T, T).
    """
    lengths = [len(row) for row in ids]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    row: dict[str, Any] = {
        "input_ids": torch.tensor([[token for row in ids for token in row]], dtype=torch.long, device=device),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].to(device),
        **{"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds},
        **{"max_length_q": max(lengths), "max_length_k": max(lengths)},
    }
    if attention == PACKED:
        row |= {"caption_lengths": lengths, "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)}
    return row


def can_pack(llm: Any) -> bool:
    """Whether a model, as transformers opened it, can be read so by default.

    That is a decoder of attention layers alone, since others, such as convolutions, would run over from caption to
    caption; whose configuration says in which direction it reads, since windows are counted by that; and which comes
    with `sdpa`.
    """
    config = llm.config
    layers = list(getattr(llm, "layers", []))
    return (
        config._attn_implementation == "sdpa"
        and llm.is_backend_compatible()
        and getattr(config, "is_causal", None) is not None
        and not getattr(config, "use_bidirectional_attention", False)  # Gemma 3's own way, which counts otherwise
        and bool(layers)
        and all(getattr(layer, "self_attn", None) is not None for layer in layers)
        and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    )


def first_token_indices(features: dict[str, Any]) -> list[int]:
    """Where each caption of a batch begins among all tokens of the batch, padding included, row after row."""
    if "cu_seq_lens_q" in features:
        return [int(start) for start in features["cu_seq_lens_q"][:-1]]
    mask = features["attention_mask"]
    return [row * mask.shape[1] + start for row, start in enumerate(mask.argmax(1).tolist())]  # padding may come first


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    caption_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (1, heads, T, D) to (1, T, heads, D), each caption within itself.

    Args:
        caption_lengths: tokens of each caption, T in all; None is an ordinary padded batch with its mask.
        sliding_window: how far a token sees, as transformers' masks count it: fewer tokens back than this when causal,
            this many to each side when not.
    """
    if is_causal is None:  # the configuration does not say
        is_causal = getattr(module, "is_causal", True)
    if caption_lengths is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ValueError(f"{type(module).__name__} lost the captions' lengths: captions would see each other")
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
        )
        return found
    parts, start = [], 0
    for length, group in groupby(caption_lengths):
        count = len(list(group))
        if length == 0:  # an empty text and a tokenizer that adds nothing
            continue
        q, k, v = (
            x[0, :, start : start + count * length].unflatten(1, (count, length)).transpose(0, 1)
            for x in (query, key, value)
        )
        mask = None
        if sliding_window is not None and length > sliding_window:
            at = torch.arange(length, device=query.device)
            back = at[:, None] - at
            mask = (back >= 0) & (back < sliding_window) if is_causal else back.abs() <= sliding_window
            mask = mask[None, None]
        if query.device.type == "cpu" and length <= SHORT and not kwargs.get("dropout"):
            out = unfused_attention(q, k, v, mask, is_causal, kwargs.get("scaling"))
        else:
            out, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=is_causal, **kwargs)
        parts.append(out.flatten(0, 1))
        start += count * length
    return torch.cat(parts)[None], None


def unfused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float | None
) -> Tensor:
    """Attention as two batched products: on a CPU, captions are too short for PyTorch's fused one to pay.

    Args:
        query: (B, heads, L, D).
        key, value: (B, key heads, L, D); query heads that share one stand beside each other.
        mask: (1, 1, L, L), True where a token sees another; None is all, or, if `is_causal`, those before it.
        scaling: of the scores; None is D ** -0.5.

    Returns:
        (B, L, heads, D).
    """
    count, heads, length, depth = query.shape
    query = query * (depth**-0.5 if scaling is None else scaling)
    query = query.reshape(count * key.shape[1], -1, depth)  # heads that share a key, one below the other
    scores = torch.bmm(query, key.flatten(0, 1).transpose(1, 2))
    if mask is None and is_causal and length > 1:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        scores = scores.unflatten(1, (-1, length)).masked_fill(~mask, -torch.inf).flatten(1, 2)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = torch.bmm(weights, value.flatten(0, 1))
    return out.view(count, heads, length, -1).transpose(1, 2)


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, sdpa_mask)
