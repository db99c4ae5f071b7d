"""Nearest items against sorting everything."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm2clip.evaluate.eccv_caption import top_k_neighbors


@pytest.mark.parametrize(("k", "tile"), [(1, 7), (5, 7), (9, 4), (40, 16), (100, 2048)])
def test_nearest_is_the_head_of_the_sorted(k: int, tile: int) -> None:
    g = torch.Generator().manual_seed(0)
    queries, items = (F.normalize(torch.randn(n, 6, generator=g), dim=-1) for n in (20, 37))
    scores, which = top_k_neighbors(queries, items, k, tile)
    right = (queries.double() @ items.double().T).sort(descending=True)
    assert torch.equal(which, right.indices[:, :k])
    torch.testing.assert_close(scores.double(), right.values[:, :k], atol=1e-6, rtol=0)
