"""Length bucketing, which groups texts of similar length into batches with a maximum number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Tokens per batch, including padding. A CPU is fastest with batches that fit in its caches; a GPU needs large batches.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 32768
# Maximum size of an LLM's hidden states in a batch, in elements. With this value, an LLM with 8 billion parameters
# (4,096 dimensions) needs 2.5 GB for the activations of a batch of 16,384 tokens, which is large enough for every GPU.
MAX_HIDDEN_SIZE = 1 << 26


def default_batch_tokens(device: torch.device) -> int:
    """Return the default number of tokens per batch for a device."""
    return GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


def default_encoding_tokens(device: torch.device, hidden_size: int) -> int:
    """Return the default number of tokens per batch for encoding with an LLM that has `hidden_size` dimensions."""
    return min(default_batch_tokens(device), max(CPU_BATCH_TOKENS, MAX_HIDDEN_SIZE // hidden_size))


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of a list of texts.

    Attributes:
        ids: token ids of each text.
        truncated: indices of the texts that were truncated to `max_length`.
        prompt_lengths: number of leading tokens of each text that are excluded from pooling.
    """

    ids: list[list[int]]
    truncated: list[int]
    prompt_lengths: list[int]

    def batches(self, max_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Yield (prompt length, text indices) for each batch.

        All texts in a batch have the same prompt length and a similar total length. A batch has at most `max_tokens`
        tokens, including padding.
        """
        for prompt_length in sorted(set(self.prompt_lengths)):
            members = [i for i, length in enumerate(self.prompt_lengths) if length == prompt_length]
            for batch in length_batches([len(self.ids[i]) for i in members], max_tokens):
                yield prompt_length, [members[i] for i in batch]


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Group rows of similar length into batches, and yield the row indices of each batch.

    A batch has at most `max_tokens` tokens, including padding. A row longer than `max_tokens` forms a batch of its own.
    The longest rows come first, so that an out-of-memory error occurs in the first batch rather than late in a run.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, max_tokens // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size
