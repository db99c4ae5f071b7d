"""Nearest items against sorting everything; precision against cases worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm2clip.evaluate.nearest import nearest, precision_at_r


@pytest.mark.parametrize(("k", "tile"), [(1, 7), (5, 7), (9, 4), (40, 16), (100, 2048)])
def test_nearest_is_the_head_of_the_sorted(k: int, tile: int) -> None:
    g = torch.Generator().manual_seed(0)
    queries, items = (F.normalize(torch.randn(n, 6, generator=g), dim=-1) for n in (20, 37))
    scores, which = nearest(queries, items, k, tile)
    right = (queries.double() @ items.double().T).sort(descending=True)
    assert torch.equal(which, right.indices[:, :k])
    torch.testing.assert_close(scores.double(), right.values[:, :k], atol=1e-6, rtol=0)


def test_precision_by_hand() -> None:
    """Two right answers at ranks 1 and 3 of R = 3: precisions 1/1 and 2/3 there, over 3; none at all; the only one."""
    found = torch.tensor([[4, 0, 7, 1], [0, 1, 2, 3], [5, 4, 3, 2]])
    figures = precision_at_r(found, [[4, 7, 9], [8, 9], [5]])
    assert figures["mAP@R"] == pytest.approx(100 * ((1 + 2 / 3) / 3 + 0 + 1) / 3)
    assert figures["R-precision"] == pytest.approx(100 * (2 / 3 + 0 + 1) / 3)
    for wrong in ([[], [1], [1]], [[1, 2, 3, 4, 5], [1], [1]]):
        with pytest.raises(ValueError, match="right answers"):
            precision_at_r(found, wrong)
