"""Batches of texts of similar length, and the measurement of the fastest batch size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llm2clip.models.text import batching
from llm2clip.models.text.batching import TokenizedTexts, default_encoding_tokens, length_batches
from llm2clip.models.text.caption_encoder import CaptionEncoder


def test_tune_batch_tokens_takes_the_fastest(encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger batch must be faster, and none is tried after one that is slower or does not fit in memory."""
    tokens = TokenizedTexts([[1, 2]] * batching.MIN_CAPTIONS_TO_TUNE, [], [0] * batching.MIN_CAPTIONS_TO_TUNE)
    tried: list[int] = []

    def set_speeds(speeds: dict[int, float]) -> None:
        """Simulate these speeds; other sizes do not fit in memory."""

        def speed(encoder: CaptionEncoder, tokens: TokenizedTexts, size: int, precision: str) -> float:
            tried.append(size)
            if size not in speeds:
                raise torch.OutOfMemoryError
            return speeds[size]

        tried.clear()
        monkeypatch.setattr(batching, "tokens_per_second", speed)

    set_speeds({512: 100, 1024: 120, 2048: 121, 4096: 110})
    assert batching.tune_batch_tokens(encoder, tokens) == 1024 and tried == [512, 1024, 2048, 4096]
    set_speeds({512: 100, 1024: 90, 2048: 1000})
    assert batching.tune_batch_tokens(encoder, tokens) == 512 and tried == [512, 1024]
    set_speeds({512: 100, 1024: 120})
    assert batching.tune_batch_tokens(encoder, tokens) == 1024 and tried == [512, 1024, 2048]
    set_speeds({})
    assert batching.tune_batch_tokens(encoder, tokens) == 256  # not even the smallest one fits
    tried.clear()
    assert batching.tune_batch_tokens(encoder, encoder.tokenize(["a few"])) == 1024 and not tried


def test_tokens_per_second_times_batches_of_all_lengths(
    encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    encoded_lengths: list[int] = []
    encode = encoder.encode

    def record_and_encode(tokens: TokenizedTexts, **options: Any) -> torch.Tensor:
        encoded_lengths.append(len(tokens.ids[0]))
        return encode(tokens, **options)

    monkeypatch.setattr(encoder, "encode", record_and_encode)
    lengths = [40] * 10 + [20] * 20 + [10] * 40 + [5] * 80  # 400 tokens of each length
    tokens = TokenizedTexts([[1] * n for n in lengths], [], [0] * len(lengths))
    assert batching.tokens_per_second(encoder, tokens, 200, "fp32") == 200  # one second per batch
    assert encoded_lengths == [40, 40, 40, 10, 5]


@pytest.mark.parametrize(
    ("device", "hidden_size", "tokens"), [("cuda", 576, 32768), ("cuda", 4096, 16384), ("cpu", 4096, 1024)]
)
def test_default_encoding_tokens_limits_the_memory_of_large_llms(device: str, hidden_size: int, tokens: int) -> None:
    assert default_encoding_tokens(torch.device(device), hidden_size) == tokens


def test_length_batches_cover_all_rows_within_max_tokens() -> None:
    lengths = torch.randint(1, 60, (200,)).tolist()
    batches = list(length_batches(lengths, 128))
    assert sorted(r for b in batches for r in b) == list(range(200))
    assert all(len(b) * max(lengths[r] for r in b) <= 128 for b in batches)
    assert list(length_batches([500], 128)) == [[0]]
