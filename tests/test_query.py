"""Embeddings of queries: positive and negative parts, and prompt templates."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.search.query import NEGATIVE_WEIGHT, QueryEncoder, SearchQuery, combine_embeddings


def test_embed_query_averages_positives_and_subtracts_negatives(dual_encoder: DualEncoder) -> None:
    black = torch.zeros(3, 9, 9).byte()
    red, dog = dual_encoder.encode_texts(["red", "dog"])
    image = F.normalize(dual_encoder.encode_images([dual_encoder.transform(black)]), dim=1)[0]
    assert combine_embeddings([red.numpy()]) == pytest.approx(red.numpy(), abs=1e-6)
    text_and_image = QueryEncoder(dual_encoder).embed(SearchQuery(["red"], [black])).combined
    assert text_and_image == pytest.approx(F.normalize(red + image, dim=0).numpy(), abs=1e-6)
    with_negative = QueryEncoder(dual_encoder).embed(SearchQuery(["red"], negative_texts=["dog"])).combined
    expected = F.normalize(red - NEGATIVE_WEIGHT * dog, dim=0).numpy()
    assert with_negative == pytest.approx(expected, abs=1e-6)


def test_embed_query_averages_short_texts_with_templates(dual_encoder: DualEncoder) -> None:
    """Only texts of up to three words are averaged, and the text itself counts like a template."""
    templates, long = QueryTemplates(("a photo of a {}", "{} on grey")), "a red one on grey"
    prompts = dual_encoder.encode_texts(["red", "a photo of a red", "red on grey"]).double()
    short = F.normalize(prompts.mean(0), dim=0)
    query = QueryEncoder(dual_encoder).embed(SearchQuery(["red"], templates=templates)).combined
    assert query == pytest.approx(short.numpy(), abs=1e-6)
    assert query != pytest.approx(QueryEncoder(dual_encoder).embed(SearchQuery(["red"])).combined, abs=1e-3)
    unchanged = QueryEncoder(dual_encoder).embed(SearchQuery([long], templates=templates)).combined
    assert unchanged == pytest.approx(dual_encoder.encode_texts([long])[0].numpy(), abs=1e-6)
    negative = (
        QueryEncoder(dual_encoder).embed(SearchQuery([long], negative_texts=["red"], templates=templates)).combined
    )
    expected = F.normalize(dual_encoder.encode_texts([long])[0] - NEGATIVE_WEIGHT * short, dim=0)
    assert negative == pytest.approx(expected.numpy(), abs=1e-6)
    with_default = dataclasses.replace(dual_encoder, query_templates=templates)
    assert QueryEncoder(with_default).embed(SearchQuery(["red"])).combined == pytest.approx(short.numpy(), abs=1e-6)
    literal = QueryEncoder(with_default).embed(SearchQuery(["red"], templates=NO_TEMPLATES)).combined
    assert literal == pytest.approx(dual_encoder.encode_texts(["red"])[0].numpy(), abs=1e-6)


def test_embed_query_of_only_negatives_is_their_opposite(dual_encoder: DualEncoder) -> None:
    dog = dual_encoder.encode_texts(["dog"])[0]
    assert QueryEncoder(dual_encoder).embed(SearchQuery(negative_texts=["dog"])).combined == pytest.approx(
        -dog.numpy(), abs=1e-6
    )
    with pytest.raises(ValueError, match="the query is empty"):
        QueryEncoder(dual_encoder).embed(SearchQuery())
