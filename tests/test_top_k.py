"""Chunked top-k search, compared with a full sort."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm2clip.evaluate.top_k import top_k_neighbors


@pytest.mark.parametrize(("k", "chunk_size"), [(1, 7), (5, 7), (9, 4), (40, 16), (100, 2048)])
def test_top_k_neighbors_match_a_full_sort(k: int, chunk_size: int) -> None:
    g = torch.Generator().manual_seed(0)
    queries, items = (F.normalize(torch.randn(n, 6, generator=g), dim=-1) for n in (20, 37))
    scores, indices = top_k_neighbors(queries, items, k, chunk_size)
    expected = (queries.double() @ items.double().T).sort(descending=True)
    assert torch.equal(indices, expected.indices[:, :k])
    torch.testing.assert_close(scores.double(), expected.values[:, :k], atol=1e-6, rtol=0)
