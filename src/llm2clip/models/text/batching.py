"""Batching of texts by length, with a token limit per batch that can be tuned for speed.

CPUs are fastest with batches that fit in their caches, whereas GPUs need large batches. The best batch size also
depends on the model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from llm2clip.models.text.caption_encoder import CaptionEncoder

# Default number of tokens per batch, including padding.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 32768
# Maximum number of hidden-state elements (tokens * hidden size) in a default batch. An 8B LLM (hidden size 4,096) thus
# encodes batches of 16,384 tokens, whose activations take 2.5 GB. Such batches are large enough for any GPU.
MAX_HIDDEN_ELEMENTS = 1 << 26
MIN_CAPTIONS_TO_TUNE = 4096  # with fewer captions, tuning takes more time than it saves
CPU_CANDIDATES = (512, 1024, 2048, 4096)
GPU_CANDIDATES = (8192, 16384, 32768, 65536, 131072, 262144)
MIN_SPEEDUP = 1.02  # larger batches need more memory, so they are used only if faster by this factor


def get_default_batch_tokens(device: torch.device) -> int:
    """Return the default number of tokens per batch for a device."""
    return GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


def get_default_encoding_tokens(device: torch.device, hidden_size: int) -> int:
    """Return the default number of tokens per batch for encoding with an LLM of the given hidden size."""
    return min(get_default_batch_tokens(device), max(CPU_BATCH_TOKENS, MAX_HIDDEN_ELEMENTS // hidden_size))


@dataclass(frozen=True)
class TokenizedTexts:
    """Tokenized texts.

    Attributes:
        ids: token ids of each text.
        truncated: indices of texts that were truncated to the encoder's `max_length`.
        prompt_lengths: number of leading tokens to exclude from pooling in each text.
    """

    ids: list[list[int]]
    truncated: list[int]
    prompt_lengths: list[int]

    def batches(self, max_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (prompt length, text indices) for each batch. All texts in a batch have the same prompt length.

        For `max_tokens` and the batch order, see `batch_by_length`.
        """
        for prompt_length in sorted(set(self.prompt_lengths)):
            members = [i for i, length in enumerate(self.prompt_lengths) if length == prompt_length]
            for batch in batch_by_length([len(self.ids[i]) for i in members], max_tokens):
                yield prompt_length, [members[i] for i in batch]


def batch_by_length(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group texts of similar token length into batches, and yield the text indices of each batch.

    A batch has at most `max_tokens` tokens, including padding. A text longer than `max_tokens` forms its own batch. The
    longest texts come first, so an out-of-memory error occurs in the first batch rather than late in a run.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size


def tune_batch_tokens(encoder: CaptionEncoder, tokens: TokenizedTexts, precision: str = "fp32") -> int:
    """Find the `batch_tokens` value with which an encoder processes the given captions fastest.

    Candidates are timed in increasing order (see `measure_tokens_per_second`). The search stops when a candidate is
    slower than the best one so far or does not fit in memory. With fewer than 4,096 captions, nothing is timed, and the
    encoder's default is returned.
    """
    if len(tokens.ids) < MIN_CAPTIONS_TO_TUNE:
        return encoder.default_batch_tokens
    candidates = CPU_CANDIDATES if encoder.device.type == "cpu" else GPU_CANDIDATES
    # If even the smallest candidate does not fit in memory, half of it is returned.
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
    """Measure the encoding speed on up to four batches.

    Batches are sorted by caption length. The timed batches are the one with the longest captions and those 1/6, 3/6 and
    5/6 of the way through the list. These batches are representative because all have about the same number of tokens.
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
