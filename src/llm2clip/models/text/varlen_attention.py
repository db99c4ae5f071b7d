"""Attention within each caption of a packed row, computed by a single kernel on NVIDIA GPUs.

`torch.nn.attention.varlen` wraps flash attention for sequences of different lengths. It computes the attention of all
captions in one call. Without this kernel, `packing.packed_attention` needs one call per caption length. The kernel
requires PyTorch >= 2.13, a GPU with compute capability >= 8.0, and bf16 or fp16. Before its first use, its outputs and
gradients are compared with the results of `scaled_dot_product_attention`.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_HEAD_DIM = 256
MIN_COSINE = 0.999  # minimum cosine similarity between the results of the kernel and of sdpa, both in 16 bits


def varlen_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype in which attention is computed. Under autocast, this is the autocast dtype."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


def can_use_varlen(query: Tensor, key: Tensor, dropout: float) -> bool:
    """Return True if `varlen_attention` supports these queries and keys. For the shapes, see `varlen_attention`."""
    dtype, head_dim = varlen_dtype(query), query.shape[-1]
    if query.device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or dropout:
        return False
    if head_dim % 8 or head_dim > MAX_HEAD_DIM or not torch.backends.cuda.flash_sdp_enabled():
        return False
    if torch.compiler.is_compiling() or load_varlen_attn() is None or not has_flash_hardware(query.device):
        return False
    return matches_sdpa(query.device, dtype, query.shape[1], key.shape[1], head_dim)


@lru_cache
def load_varlen_attn() -> Callable[..., Any] | None:
    """Import PyTorch's `varlen_attn`. Return None if it is missing or does not support grouped-query attention."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def has_flash_hardware(device: torch.device) -> bool:
    """Return True for NVIDIA GPUs of the Ampere generation and later."""
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    max_length: int,
    is_causal: bool,
    sliding_window: int | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Compute attention within each caption of a packed row.

    Args:
        query: queries of shape (1, heads, T, D).
        key: keys of shape (1, key heads, T, D). Consecutive query heads share a key head.
        value: values of shape (1, key heads, T, D).
        boundaries: cumulative caption lengths of shape (B + 1,), int32, on the same device.
        max_length: length of the longest caption in tokens.
        is_causal, sliding_window: see `packing.packed_attention`.
        scaling: factor that multiplies the attention scores. Default: D ** -0.5.

    Returns:
        The attention output of shape (1, T, heads, D).
    """
    varlen_attn = load_varlen_attn()
    assert varlen_attn is not None
    # Number of earlier and later tokens to which a token attends. -1 means no limit.
    before = after = -1
    if sliding_window is not None:
        before, after = (sliding_window - 1 if is_causal else sliding_window), sliding_window
    if is_causal:
        after = 0
    dtype = varlen_dtype(query)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    output: Tensor = varlen_attn(
        q,
        k,
        v,
        boundaries,
        boundaries,
        max_length,
        max_length,
        scale=scaling,
        window_size=(before, after),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[None]


@lru_cache
def matches_sdpa(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int) -> bool:
    """Return True if `varlen_attention` works on a device and agrees with `scaled_dot_product_attention`.

    The comparison uses two random captions, with bidirectional and causal attention. A warning is shown if the kernel
    fails or disagrees.
    """
    try:
        agrees = all(_agrees_with_sdpa(device, dtype, heads, key_heads, head_dim, causal) for causal in (False, True))
        problem = "gives wrong results"
    except (RuntimeError, ValueError, TypeError) as error:
        agrees, problem = False, f"fails ({str(error).splitlines()[0]})"
    if not agrees:
        warnings.warn(f"torch's varlen_attn {problem} on {device}: using slower attention", stacklevel=2)
    return agrees


@torch.inference_mode(False)  # the comparison needs gradients even if the first caption is encoded without them
@torch.autocast("cuda", enabled=False)
def _agrees_with_sdpa(
    device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, causal: bool
) -> bool:
    lengths = [5, 3]
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for count in (heads, key_heads, key_heads):
        x = torch.randn(1, count, sum(lengths), head_dim, generator=generator)
        inputs.append(x.to(device, dtype).requires_grad_())
    boundaries = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    weights = torch.randn(1, sum(lengths), heads, head_dim, generator=generator).to(device, dtype)
    with torch.enable_grad():
        query, key, value = inputs
        output = varlen_attention(query, key, value, boundaries, max(lengths), causal)
        captions = zip(*(x.split(lengths, dim=2) for x in inputs), strict=True)
        parts = [F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True) for q, k, v in captions]
        expected = torch.cat(parts, dim=2).transpose(1, 2)  # (1, T, heads, D)
        gradients = torch.autograd.grad((output * weights).sum(), inputs)
        expected_gradients = torch.autograd.grad((expected * weights).sum(), inputs)
    pairs = zip((output, *gradients), (expected, *expected_gradients), strict=True)
    return all(F.cosine_similarity(a.float().flatten(), b.float().flatten(), dim=0) > MIN_COSINE for a, b in pairs)
