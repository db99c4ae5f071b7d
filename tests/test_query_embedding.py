"""Tests of `search.query_embedding`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.query_embedding import NEGATIVE_WEIGHT, Query, combine, embed_query


def test_embed_query_averages_positives_and_subtracts_negatives(dual_encoder: DualEncoder) -> None:
    black = torch.zeros(3, 9, 9).byte()
    red, dog = dual_encoder.encode_texts(["red", "dog"])
    image = F.normalize(dual_encoder.encode_images([dual_encoder.transform(black)]), dim=1)[0]
    assert combine([red.numpy()]) == pytest.approx(red.numpy(), abs=1e-6)
    text_and_image = embed_query(dual_encoder, Query(["red"], [black]))
    assert text_and_image == pytest.approx(F.normalize(red + image, dim=0).numpy(), abs=1e-6)
    with_negative = embed_query(dual_encoder, Query(["red"], negative_texts=["dog"]))
    expected = F.normalize(red - NEGATIVE_WEIGHT * dog, dim=0).numpy()
    assert with_negative == pytest.approx(expected, abs=1e-6)


def test_embed_query_rejects_a_query_without_positives(dual_encoder: DualEncoder) -> None:
    with pytest.raises(ValueError, match="the query is empty"):
        embed_query(dual_encoder, Query(negative_texts=["dog"]))
