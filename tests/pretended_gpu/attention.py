"""Attention on the pretended GPU: which kernel a GPU would use, and the same result from the CPU."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from pretended_gpu.counts import active_counts
from pretended_gpu.tensors import REPLACED, GpuTensor

aten = torch.ops.aten
_cpu_attention = F.scaled_dot_product_attention


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Replace `F.scaled_dot_product_attention`: count the kernel that a GPU would use, and run the CPU's."""
    if has_torch_function((query, key, value)):  # a TorchFunctionMode is active; it also sees the original function
        options = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
        return handle_torch_function(  # type: ignore[no-any-return]
            attention, (query, key, value), query, key, value, **options, enable_gqa=enable_gqa
        )
    if not isinstance(query, GpuTensor):
        return _cpu_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    _count_attention(query, attn_mask)
    if query.shape[1] != key.shape[1]:  # a GPU kernel reads shared heads in place, so these copies are not counted
        copies = query.shape[1] // key.shape[1]
        key, value = (x[:, :, None].expand(-1, -1, copies, -1, -1).flatten(1, 2) for x in (key, value))
        for counts in active_counts:
            counts.kernels["aten.clone"] -= 2
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype)
    fused = aten._scaled_dot_product_flash_attention_for_cpu  # without dropout
    output: torch.Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return F.dropout(output, dropout_p) if dropout_p else output


def _count_attention(query: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Count one attention call by the kernel that compute capability 8.0 or later uses for these arguments."""
    is_half, head_dim = query.dtype in (torch.float16, torch.bfloat16), query.shape[-1]
    if is_half and mask is None and head_dim <= 256:
        kernel = "flash"
    elif head_dim % 4 == 0:
        kernel = "memory-efficient" if mask is None else "memory-efficient with mask"
    else:
        kernel = "math"
    for counts in active_counts:
        counts.attention[f"{kernel} {str(query.dtype).removeprefix('torch.')}"] += 1


# ---- variable-length attention (torch.nn.attention.varlen) -----------------------------------------------------------


def _varlen_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replace `torch_attn::_varlen_attn`. Queries are (T, heads, D); `starts` are the cumulative lengths (B + 1,)."""
    is_causal, scale, window = _varlen_options(args)
    output = torch.empty_like(query)
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v = (x[start:stop].transpose(0, 1).float() for x in (query, key, value))
        output[start:stop] = (_weights(q, k, is_causal, scale, window) @ _expand(v, q)).transpose(0, 1)
    for counts in active_counts:
        counts.attention[f"flash {str(query.dtype).removeprefix('torch.')}"] += 1
    log_sum_exp = torch.zeros(query.shape[1], query.shape[0])  # not used by the backward pass below
    return output, log_sum_exp, torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    starts: torch.Tensor,
    _starts: torch.Tensor,
    _max_q: int,
    _max_k: int,
    is_causal: bool,
    _rng_state: torch.Tensor,
    scale: float | None = None,
    window: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Replace `torch_attn::_varlen_attn_backward`, with the closed-form gradient of softmax attention."""
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for start, stop in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        q, k, v, g = (x[start:stop].transpose(0, 1).float() for x in (query, key, value, grad))  # (heads, L, D)
        weights, factor = _weights(q, k, is_causal, scale, window), q.shape[-1] ** -0.5 if scale is None else scale
        grad_weights = g @ _expand(v, q).mT
        grad_scores = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * factor
        shared = len(k), -1, *k.shape[1:]  # the query heads of each key head
        grads[0][start:stop] = (grad_scores @ _expand(k, q)).transpose(0, 1)
        grads[1][start:stop] = (grad_scores.mT @ q).view(shared).sum(1).transpose(0, 1)
        grads[2][start:stop] = (weights.mT @ g).view(shared).sum(1).transpose(0, 1)
    return grads


def _varlen_options(args: tuple[Any, ...]) -> tuple[bool, float | None, list[int] | None]:
    """Return is_causal, scale and window_size from the arguments after the cumulative query lengths."""
    options = [*args[3:], False, None, None][:3] if len(args) < 6 else list(args[3:6])
    return bool(options[0]), options[1], options[2]


def _expand(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Repeat key heads, so that there is one for each query head."""
    return x.repeat_interleave(len(query) // len(x), 0)


def _weights(
    query: torch.Tensor, key: torch.Tensor, is_causal: bool, scale: float | None, window: list[int] | None
) -> torch.Tensor:
    """Return the attention weights (heads, L, L). A window of -1 is unlimited."""
    left, right = window or (-1, -1)
    scores = query @ _expand(key, query).mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    positions = torch.arange(scores.shape[-1])
    distance = positions[:, None] - positions  # positive for earlier tokens
    visible = torch.ones_like(distance, dtype=torch.bool)
    if is_causal:
        visible &= distance >= 0
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= distance >= -right
    return scores.masked_fill(~visible, -torch.inf).softmax(-1)


REPLACED["torch_attn._varlen_attn"] = _varlen_forward
REPLACED["torch_attn._varlen_attn_backward"] = _varlen_backward
