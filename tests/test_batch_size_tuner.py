"""The token budget that is tried on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm2clip.models import batch_size_tuner as budget
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.length_batching import TokenizedTexts


def test_the_fastest_budget_is_taken(encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger ones only where they pay; none after one that is slower, or that does not fit."""
    tokens = TokenizedTexts([[1, 2]] * budget.MIN_CAPTIONS_TO_TUNE, [], [0] * budget.MIN_CAPTIONS_TO_TUNE)
    tried: list[int] = []

    def rates(known: dict[int, float]) -> None:
        def rate(encoder: CaptionEncoder, tokens: TokenizedTexts, size: int, precision: str) -> float:
            tried.append(size)
            if size not in known:
                raise torch.OutOfMemoryError
            return known[size]

        tried.clear()
        monkeypatch.setattr(budget, "tokens_per_second", rate)

    rates({512: 100, 1024: 120, 2048: 121, 4096: 110})
    assert budget.tune_batch_tokens(encoder, tokens) == 1024 and tried == [512, 1024, 2048, 4096]
    rates({512: 100, 1024: 90, 2048: 1000})
    assert budget.tune_batch_tokens(encoder, tokens) == 512 and tried == [512, 1024]
    rates({512: 100, 1024: 120})
    assert budget.tune_batch_tokens(encoder, tokens) == 1024 and tried == [512, 1024, 2048]
    rates({})
    assert budget.tune_batch_tokens(encoder, tokens) == 256  # not even the least one fits
    tried.clear()
    assert budget.tune_batch_tokens(encoder, encoder.tokenize(["a few"])) == 1024 and not tried


def test_batches_of_all_lengths_are_timed(encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(budget.time, "perf_counter", lambda: float(next(clock)))
    read: list[int] = []
    encode = encoder.encode

    def counted(tokens: TokenizedTexts, **options: Any) -> torch.Tensor:
        read.append(len(tokens.ids[0]))
        return encode(tokens, **options)

    monkeypatch.setattr(encoder, "encode", counted)
    lengths = [40] * 10 + [20] * 20 + [10] * 40 + [5] * 80  # 400 tokens of each
    tokens = TokenizedTexts([[1] * n for n in lengths], [], [0] * len(lengths))
    assert budget.tokens_per_second(encoder, tokens, 200, "fp32") == 200  # a second a batch
    assert read == [40, 40, 40, 10, 5]
