"""Batches of texts of similar length, and packed attention without padding.

Packed attention concatenates all captions in a batch into a single row, in which each token attends only to tokens of
the same caption. Consecutive captions of equal length are processed in one unmasked attention call. In 16-bit precision
on recent NVIDIA GPUs, a single call computes attention for all captions (`compute_varlen_attention`).

The attention function is registered with transformers as `packed`, so every model family can use packed attention. For
padded batches, `packed` is equivalent to `sdpa`.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from llm2clip.models.text.caption_encoder import CaptionEncoder

# Default number of tokens per batch, including padding.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 32768
# Maximum of tokens * hidden size in a default batch. For an 8B LLM (hidden size 4,096), the maximum is 16,384 tokens.
# A batch of 16,384 tokens saturates any GPU and takes 2.5 GB for activations.
MAX_HIDDEN_ELEMENTS = 1 << 26
MIN_CAPTIONS_TO_TUNE = 4096  # for fewer captions, tuning the batch size would take longer than it saves
CPU_CANDIDATES = (512, 1024, 2048, 4096)
GPU_CANDIDATES = (8192, 16384, 32768, 65536, 131072, 262144)
MIN_SPEEDUP = 1.02  # minimum speedup that justifies the memory of a larger batch


def get_default_batch_tokens(device: torch.device) -> int:
    return GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


def get_default_encoding_batch_tokens(device: torch.device, hidden_size: int) -> int:
    return min(get_default_batch_tokens(device), max(CPU_BATCH_TOKENS, MAX_HIDDEN_ELEMENTS // hidden_size))


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of texts."""

    ids: list[list[int]]
    truncated: list[int]  # indices of texts that were truncated to the encoder's `max_length`
    prompt_lengths: list[int]  # number of leading tokens to exclude from pooling in each text

    def batches(self, max_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (prompt length, text indices) for each batch of texts with the same prompt length."""
        for prompt_length in sorted(set(self.prompt_lengths)):
            members = [i for i, length in enumerate(self.prompt_lengths) if length == prompt_length]
            for batch in batch_by_length([len(self.ids[i]) for i in members], max_tokens):
                yield prompt_length, [members[i] for i in batch]


def batch_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group texts of similar token length into batches. Yield the text indices of each batch.

    A batch has at most `max_tokens` tokens, including padding, unless it consists of a single longer text. The first
    batch contains the longest texts, so that an out-of-memory error occurs early.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def tune_batch_tokens(encoder: CaptionEncoder, tokens: TokenizedTexts, precision: str = "fp32") -> int:
    """Return the value of `batch_tokens` that maximises the speed of an encoder on the captions.

    Candidates are timed in increasing order until a candidate is slower than the best candidate or does not fit in
    memory. For fewer than 4,096 captions, the encoder's default is returned without timing.
    """
    if len(tokens.ids) < MIN_CAPTIONS_TO_TUNE:
        return encoder.default_batch_tokens
    candidates = CPU_CANDIDATES if encoder.device.type == "cpu" else GPU_CANDIDATES
    # If even the smallest candidate does not fit in memory, half of the smallest candidate is returned.
    best, best_speed = candidates[0] // 2, 0.0
    for candidate in candidates:
        try:
            speed = measure_tokens_per_second(encoder, tokens, candidate, precision)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if speed > MIN_SPEEDUP * best_speed:
            best, best_speed = candidate, speed
        elif speed < best_speed / MIN_SPEEDUP:
            break
    return best


def measure_tokens_per_second(
    encoder: CaptionEncoder, tokens: TokenizedTexts, batch_tokens: int, precision: str
) -> float:
    """Measure the encoding speed in tokens per second on up to four batches.

    The batches are sorted by descending caption length. The batches at positions 0, 1/6, 3/6 and 5/6 are timed.
    """
    all_rows = [rows for _, rows in tokens.batches(batch_tokens)]
    indices = sorted({0, *(len(all_rows) * n // 6 for n in (1, 3, 5))})
    token_count, seconds = 0, 0.0
    for n, i in enumerate([0, *indices]):  # the first call is a warm-up
        rows = all_rows[i]
        batch = TokenizedTexts([tokens.ids[row] for row in rows], [], [tokens.prompt_lengths[row] for row in rows])
        start = time.perf_counter()
        encoder.encode(batch, batch_tokens=batch_tokens, precision=precision)
        if n > 0:
            seconds += time.perf_counter() - start
            token_count += sum(map(len, batch.ids))
    return token_count / seconds


PACKED = "packed"
MAX_UNFUSED_LENGTH = 512  # maximum caption length in tokens for `compute_unfused_attention`, to limit memory
MAX_VARLEN_HEAD_DIM = 256


def pack_captions(ids: Sequence[Sequence[int]], attention: str, device: torch.device) -> dict[str, Any]:
    """Pack B captions (T tokens in total) into a single row, in the layout that the attention implementation expects.

    Returns:
        Keyword arguments for the model:

        - input_ids and position_ids: int64, of shape (1, T).
        - seq_idx: caption index of each token, int64, of shape (1, T). Without seq_idx, sentence-transformers' pooling
          would synchronise with the GPU to count the tokens.
        - cu_seq_lens_q and cu_seq_lens_k: cumulative caption lengths, int32, of shape (B + 1,).
        - max_length_q and max_length_k: length of the longest caption.
        - caption_lengths (only for `packed`): list of caption lengths.
        - attention_mask (only for `packed`): 4-dimensional dummy mask that prevents transformers from building a mask
          of shape (T, T).
    """
    lengths = [len(row) for row in ids]
    total = sum(lengths)
    boundaries = np.cumsum([0, *lengths])
    # Transfer all inputs to the device in a single copy.
    host = np.concatenate(
        [
            np.fromiter(chain.from_iterable(ids), np.int64, total),
            np.arange(total) - np.repeat(boundaries[:-1], lengths),
            np.repeat(np.arange(len(lengths)), lengths),
            boundaries,
        ]
    )
    copied = copy_to_device(torch.from_numpy(host), device)
    tokens, positions, captions, starts = copied.split([total, total, total, len(boundaries)])
    starts = starts.to(torch.int32)
    batch: dict[str, Any] = {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "seq_idx": captions[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    if attention == PACKED:
        batch["caption_lengths"] = lengths
        batch["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    return batch


def remove_prompt_hidden_states(features: dict[str, Any]) -> None:
    """Remove the hidden states of prompt tokens from the LLM output for a packed batch, in place.

    Unlike in sentence-transformers, no GPU synchronisation is required. In addition to the entries from
    `pack_captions`, `features` contains `prompt_length`, the number of leading tokens to remove from each caption.
    """
    prompt_length = features.pop("prompt_length")
    lengths = np.array(features["caption_lengths"])
    new_lengths = np.maximum(lengths - prompt_length, 0)
    captions = np.repeat(np.arange(len(lengths)), new_lengths)
    new_boundaries = np.cumsum([0, *new_lengths])
    # Number of removed tokens before each remaining token.
    removed = np.cumsum(lengths - new_lengths)[captions]
    indices = np.arange(len(captions)) + removed
    host = torch.from_numpy(np.concatenate([indices, captions, new_boundaries]))
    states = features["token_embeddings"]  # (1, T, D)
    copied = copy_to_device(host, states.device)
    token_indices, caption_indices, starts = copied.split([len(indices), len(captions), len(new_boundaries)])
    features["token_embeddings"] = states[:, token_indices]
    features["seq_idx"] = caption_indices[None]
    features["cu_seq_lens_q"] = starts.to(torch.int32)


def copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device. Copies to a GPU are asynchronous so that the CPU can prepare the next batch."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def supports_packed_attention(llm: Any) -> bool:
    """Return True if a transformers model returns the same embeddings with packed attention as with padding.

    The model must be a decoder, loaded with `sdpa`, whose tokens interact only through attention and not, for example,
    through convolutions. The config must specify `is_causal`, which determines the shape of sliding windows.
    """
    config = llm.config
    layers = list(getattr(llm, "layers", []))
    return (
        config._attn_implementation == "sdpa"
        and llm.is_backend_compatible()
        and getattr(config, "is_causal", None) is not None
        and not getattr(config, "use_bidirectional_attention", False)  # the setting changes Gemma 3's sliding windows
        and bool(layers)
        and all(getattr(layer, "self_attn", None) is not None for layer in layers)
        and set(getattr(config, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    )


def compute_packed_attention(
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
    """Compute attention within each caption of a packed row. The signature is defined by transformers.

    Args:
        query: Queries of shape (1, heads, T, D).
        key, value: Keys and values of shape (1, key heads, T, D). In grouped-query attention, consecutive query heads
            share a key head.
        attention_mask: Mask for a padded batch. Ignored for packed rows.
        caption_lengths: Number of tokens in each caption, T in total. None for a padded batch.
        sliding_window: Attention span in tokens, as defined by transformers' masks. In causal attention, the span
            includes the token itself. In bidirectional attention, the span is the number of tokens on each side.

    Returns:
        Attention output of shape (1, T, heads, D), and None in place of the attention weights.
    """
    if is_causal is None:  # the config does not specify whether attention is causal
        is_causal = getattr(module, "is_causal", True)
    if caption_lengths is None:
        if attention_mask is not None and attention_mask.shape[-1] != key.shape[2]:
            raise ValueError(
                f"{type(module).__name__} does not pass caption_lengths to the attention function, so captions in a "
                "packed batch would attend to each other. Load the model with attention='sdpa'"
            )
        padded: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
        )
        return padded

    if "cu_seq_lens_q" in kwargs and can_use_varlen_attention(query, kwargs.get("dropout") or 0.0):
        output = compute_varlen_attention(
            query,
            key,
            value,
            boundaries=kwargs["cu_seq_lens_q"],
            max_length=kwargs["max_length_q"],
            is_causal=is_causal,
            sliding_window=sliding_window,
            scaling=kwargs.get("scaling"),
        )
        return output, None

    return _compute_attention_in_length_groups(
        module, query, key, value, caption_lengths, sliding_window, is_causal, kwargs
    ), None


def _compute_attention_in_length_groups(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    caption_lengths: Sequence[int],
    sliding_window: int | None,
    is_causal: bool,
    options: dict[str, Any],
) -> Tensor:
    # Consecutive captions of equal length share a single attention call. Empty captions are skipped.
    groups = [(length, len(list(group))) for length, group in groupby(caption_lengths) if length > 0]
    # `split` is used because the backward pass of each slice would allocate a gradient of length T.
    group_sizes = [length * count for length, count in groups]
    queries, keys, values = (x[0].split(group_sizes, dim=1) for x in (query, key, value))
    outputs = []
    for (length, count), *qkv in zip(groups, queries, keys, values, strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)  # (count, heads, length, D)
        mask = None
        if sliding_window is not None and length > sliding_window:
            mask = _build_sliding_window_mask(length, sliding_window, is_causal, query.device)
        if query.device.type == "cpu" and length <= MAX_UNFUSED_LENGTH and not options.get("dropout"):
            output = compute_unfused_attention(q, k, v, mask, is_causal, options.get("scaling"))
        else:
            output, _ = sdpa_attention_forward(module, q, k, v, mask, is_causal=is_causal, **options)
        outputs.append(output.flatten(0, 1))
    return torch.cat(outputs)[None]


def _build_sliding_window_mask(length: int, window: int, is_causal: bool, device: torch.device) -> Tensor:
    """Return a mask of shape (1, 1, length, length). Element (0, 0, i, j) is True if token i attends to token j."""
    positions = torch.arange(length, device=device)
    distance = positions[:, None] - positions  # [i, j] is positive if token j precedes token i
    mask = (distance >= 0) & (distance < window) if is_causal else distance.abs() <= window
    return mask[None, None]


def compute_unfused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scaling: float | None
) -> Tensor:
    """Compute attention with two batched matmuls, which are faster than `sdpa` for short captions on CPUs.

    `query` has shape (B, heads, L, D). `key` and `value` have shape (B, key heads, L, D). The output has shape (B, L,
    heads, D). `mask` is a boolean mask of shape (1, 1, L, L). With a mask, `is_causal` is ignored.
    """
    batch, heads, length, head_dim = query.shape
    query = query * (head_dim**-0.5 if scaling is None else scaling)
    # Stack the query heads that share a key head. The shape becomes (B * key heads, heads per key head * L, D).
    query = query.reshape(batch * key.shape[1], -1, head_dim)
    scores = torch.bmm(query, key.flatten(0, 1).transpose(1, 2))
    if mask is None and is_causal and length > 1:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        scores = scores.unflatten(1, (-1, length)).masked_fill(~mask, -torch.inf).flatten(1, 2)
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    output = torch.bmm(weights, value.flatten(0, 1))
    return output.view(batch, heads, length, -1).transpose(1, 2)


def compute_varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    max_length: int,
    is_causal: bool,
    sliding_window: int | None = None,
    scaling: float | None = None,
) -> Tensor:
    """Compute attention within each caption of a packed row with flash attention (`torch.nn.attention.varlen`).

    `boundaries` are the cumulative caption lengths, of shape (B + 1,), int32, on the device of `query`. For the other
    arguments and the output, see `compute_packed_attention`.
    """
    varlen_attn = load_varlen_attn()
    assert varlen_attn is not None
    # Maximum numbers of earlier and later tokens that a token attends to, or -1 for no limit.
    before = after = -1
    if sliding_window is not None:
        before, after = (sliding_window - 1 if is_causal else sliding_window), sliding_window
    if is_causal:
        after = 0
    dtype = get_varlen_dtype(query)
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))  # (T, heads, D)
    options = {"scale": scaling, "window_size": (before, after), "enable_gqa": q.shape[1] != k.shape[1]}
    output: Tensor = varlen_attn(q, k, v, boundaries, boundaries, max_length, max_length, **options)
    return output[None]


def get_varlen_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype for attention: the autocast dtype if autocast is enabled, or the dtype of the queries."""
    device_type = query.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else query.dtype


def can_use_varlen_attention(query: Tensor, dropout: float) -> bool:
    """Return True if `compute_varlen_attention` supports the dropout and queries of shape (1, heads, T, D)."""
    device, dtype, head_dim = query.device, get_varlen_dtype(query), query.shape[-1]
    if device.type != "cuda" or torch.version.cuda is None or dtype not in (torch.bfloat16, torch.float16) or dropout:
        return False
    if head_dim % 8 or head_dim > MAX_VARLEN_HEAD_DIM or not torch.backends.cuda.flash_sdp_enabled():
        return False
    if torch.compiler.is_compiling() or load_varlen_attn() is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)  # flash attention requires Ampere or later


@lru_cache
def load_varlen_attn() -> Callable[..., Any] | None:
    """Import `varlen_attn` from PyTorch. Return None if the function or a required argument is missing."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


ALL_ATTENTION_FUNCTIONS.register(PACKED, compute_packed_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(PACKED, sdpa_mask)
