"""How many tokens a batch should have: tried on the device with the captions at hand, not guessed.

A CPU is fastest with what stays in its caches, a GPU must be filled, and both differ from model to model.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from llm2clip.models.length_batching import TokenizedTexts, default_batch_tokens

if TYPE_CHECKING:
    from llm2clip.models.caption_encoder import CaptionEncoder

MIN_CAPTIONS_TO_TUNE = 4096  # captions below which trying takes longer than it saves
CPU_BUDGETS = (512, 1024, 2048, 4096)
GPU_BUDGETS = (8192, 16384, 32768, 65536, 131072, 262144)
GAIN = 1.02  # a larger batch must be faster by this: it takes more memory


def tune_batch_tokens(encoder: CaptionEncoder, tokens: TokenizedTexts, precision: str = "fp32") -> int:
    """The `batch_tokens` with which `encoder` reads such captions fastest; its device's default for a few.

    Each size is tried on four batches, the longest captions among them, until larger ones do not pay or do not fit.
    """
    if len(tokens.ids) < MIN_CAPTIONS_TO_TUNE:
        return default_batch_tokens(encoder.device)
    budgets = CPU_BUDGETS if encoder.device.type == "cpu" else GPU_BUDGETS
    best, fastest = budgets[0] // 2, 0.0  # where not even the first one fits
    for budget in budgets:
        try:
            rate = tokens_per_second(encoder, tokens, budget, precision)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        if rate > GAIN * fastest:
            best, fastest = budget, rate
        elif rate < fastest / GAIN:
            break
    return best


def tokens_per_second(encoder: CaptionEncoder, tokens: TokenizedTexts, budget: int, precision: str) -> float:
    """Of four batches spread over the lengths; batches are about equal in tokens, so these stand for all."""
    batches = [rows for _, rows in tokens.batches(budget)]
    some = [batches[i] for i in sorted({0, *(len(batches) * n // 6 for n in (1, 3, 5))})]
    done, took = 0, 0.0
    for turn, rows in enumerate([some[0], *some]):
        ids, unpooled = [tokens.ids[r] for r in rows], [tokens.prompt_lengths[r] for r in rows]
        start = time.perf_counter()
        encoder.encode(TokenizedTexts(ids, [], unpooled), batch_tokens=budget, precision=precision)
        if turn:  # the first one warms up
            done += sum(map(len, ids))
            took += time.perf_counter() - start
    return done / took
