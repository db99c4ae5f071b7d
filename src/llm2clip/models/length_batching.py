"""Captions to batches of tokens: those of similar length together, under a budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Tokens in a batch, padding included: a CPU is fastest with what stays in its caches, a GPU must be filled.
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 1024, 32768


def default_batch_tokens(device: torch.device) -> int:
    """Tokens in a batch where nobody says how many."""
    return GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


@dataclass(frozen=True)
class TokenizedTexts:
    """Token ids of some captions, in their order; which of them were cut to `max_length`; and how many tokens at the
    start of each are read but not pooled."""

    ids: list[list[int]]
    truncated: list[int]
    prompt_lengths: list[int]

    def batches(self, budget: int) -> Iterator[tuple[int, list[int]]]:
        """Rows that can be read together: of one number of unpooled tokens, which comes first, and similar length, at
        most `budget` tokens with their padding."""
        for length in sorted(set(self.prompt_lengths)):
            members = [i for i, u in enumerate(self.prompt_lengths) if u == length]
            for group in length_batches([len(self.ids[i]) for i in members], budget):
                yield length, [members[g] for g in group]


def length_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Row numbers grouped by similar length, longest first, each group at most `budget` tokens with its padding.

    Longest first, so that memory runs out at once or never. A row longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, lengths[order[start]]))
        yield order[start : start + size]
        start += size
