"""Measurement of the fastest number of tokens per batch, on the device and with the captions to be encoded.

A CPU is fastest with batches that fit its caches and a GPU needs large batches; both optima differ between models.
"""

from __future__ import annotations

import time

import torch

from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import TokenizedTexts, default_batch_tokens

MIN_CAPTIONS_TO_TUNE = 4096  # with fewer captions the measurement takes longer than it saves
CPU_CANDIDATES = (512, 1024, 2048, 4096)
GPU_CANDIDATES = (8192, 16384, 32768, 65536, 131072, 262144)
MIN_SPEEDUP = 1.02  # that a larger batch must reach, because it needs more memory


def tune_batch_tokens(encoder: CaptionEncoder, tokens: TokenizedTexts, precision: str = "fp32") -> int:
    """Return the `batch_tokens` with which `encoder` encodes these captions fastest.

    Each candidate is timed on four batches, among them the longest captions, until a larger one is slower or does not
    fit in memory. For fewer than 4096 captions the default of the device is returned without a measurement.
    """
    if len(tokens.ids) < MIN_CAPTIONS_TO_TUNE:
        return default_batch_tokens(encoder.device)
    candidates = CPU_CANDIDATES if encoder.device.type == "cpu" else GPU_CANDIDATES
    best, best_speed = candidates[0] // 2, 0.0  # half of the smallest, if not even that fits
    for candidate in candidates:
        try:
            speed = tokens_per_second(encoder, tokens, candidate, precision)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if speed > MIN_SPEEDUP * best_speed:
            best, best_speed = candidate, speed
        elif speed < best_speed / MIN_SPEEDUP:
            break
    return best


def tokens_per_second(encoder: CaptionEncoder, tokens: TokenizedTexts, batch_tokens: int, precision: str) -> float:
    """Return the encoding speed on up to four batches: the longest one, and those at 1/6, 3/6 and 5/6 of the lengths.

    All batches have about the same number of tokens, so these represent the others.
    """
    batches = [rows for _, rows in tokens.batches(batch_tokens)]
    sample = [batches[i] for i in sorted({0, *(len(batches) * n // 6 for n in (1, 3, 5))})]
    _time_batch(encoder, tokens, sample[0], batch_tokens, precision)  # warm-up
    token_count, seconds = 0, 0.0
    for rows in sample:
        seconds += _time_batch(encoder, tokens, rows, batch_tokens, precision)
        token_count += sum(len(tokens.ids[row]) for row in rows)
    return token_count / seconds


def _time_batch(
    encoder: CaptionEncoder, tokens: TokenizedTexts, rows: list[int], batch_tokens: int, precision: str
) -> float:
    """Return the seconds that encoding these rows takes."""
    batch = TokenizedTexts([tokens.ids[row] for row in rows], [], [tokens.prompt_lengths[row] for row in rows])
    start = time.perf_counter()
    encoder.encode(batch, batch_tokens=batch_tokens, precision=precision)
    return time.perf_counter() - start
