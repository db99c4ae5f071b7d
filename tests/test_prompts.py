"""Prompt ensembles, compared with averages that are computed one text at a time in float64."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.prompts import (
    QueryTemplates,
    average_prompt_embeddings,
    build_query_prompts,
    check_prompt_templates,
    fill_prompt_templates,
    is_short_text,
)

TEMPLATES = ["a photo of a {}.", "{}", "{} and {}"]


def mean_direction(vectors: torch.Tensor) -> torch.Tensor:
    """Return the normalised mean of the normalised vectors, float64 (D,)."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64)
    for vector in vectors.double():
        total += vector / vector.norm() / len(vectors)
    return total / total.norm()


def test_average_prompt_embeddings_ignores_norms_and_allows_different_numbers_of_prompts() -> None:
    prompts = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    averages = torch.from_numpy(average_prompt_embeddings(prompts.numpy(), [1, 3, 2]))
    for row, group in zip(averages, prompts.split([1, 3, 2]), strict=True):
        torch.testing.assert_close(row.double(), mean_direction(group), atol=1e-6, rtol=0)
    assert average_prompt_embeddings(prompts[:0].numpy(), []).shape == (0, 5)


def test_fill_prompt_templates_keeps_the_prompts_of_a_text_together() -> None:
    assert fill_prompt_templates(["dog", "big {} cat"], TEMPLATES) == [
        "a photo of a dog.", "dog", "dog and dog",
        "a photo of a big {} cat.", "big {} cat", "big {} cat and big {} cat",
    ]  # fmt: skip


def test_encode_text_averages_the_filled_templates(model_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    texts = ["dog", "two cats"]
    averages = model.encode_text(texts, templates=TEMPLATES)
    for text, average in zip(texts, averages, strict=True):
        prompts = [template.replace("{}", text) for template in TEMPLATES]
        torch.testing.assert_close(average.double(), mean_direction(model.encode_text(prompts)), atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_text(texts, templates="{}"), F.normalize(model.encode_text(texts), dim=-1))
    assert model.encode_text("dog", templates=TEMPLATES).shape == (1, model.config.embed_dim)
    assert not torch.allclose(averages, model.encode_text(texts), atol=1e-3)
    assert torch.equal(model.encode_text(texts, templates=[]), model.encode_text(texts))
    with pytest.raises(ValueError, match=r"templates: template 1 \('the dog'\) has no \{\}"):
        model.encode_text(texts, templates=["a {}", "the dog"])


def test_encode_query_averages_short_queries_with_the_templates_of_the_model(model_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    queries = ["dog", "a dog runs on grass"]
    torch.testing.assert_close(model.encode_query(queries), model.encode_text(queries))
    model.config.query_templates = QueryTemplates(("a photo of a {}.",), 1)
    short, long = model.encode_query(queries)
    expected = mean_direction(model.encode_text(["dog", "a photo of a dog."]))
    torch.testing.assert_close(short.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(long, model.encode_text(queries[1])[0])


def test_check_prompt_templates_names_the_flag() -> None:
    check_prompt_templates(TEMPLATES)
    with pytest.raises(ValueError, match=r"--templates: template 0 \('\{ \}'\)"):
        check_prompt_templates(["{ }"], "--templates")


@pytest.mark.parametrize(
    ("text", "is_short"),
    [
        ("deer", True),
        ("a red hat", True),
        ("a very red hat", False),
        ("x" * 60, False),
        ("红色的帽子", True),
        ("戴红帽子的学生", False),
    ],
)
def test_templates_apply_to_queries_of_up_to_three_words(text: str, is_short: bool) -> None:
    assert is_short_text(text) == is_short
    templates = QueryTemplates(("a photo of {}", "{}!"))
    prompts, counts = build_query_prompts(["a b c d", text], templates)
    expected = [text, f"a photo of {text}", f"{text}!"] if is_short else [text]
    assert prompts == ["a b c d", *expected] and counts == [1, len(expected)]


def test_templates_apply_up_to_their_number_of_words() -> None:
    one_word = QueryTemplates(("a photo of {}",), max_words=1)
    assert build_query_prompts(["dog", "red dog"], one_word) == (["dog", "a photo of dog", "red dog"], [2, 1])


@pytest.mark.parametrize(
    "values",
    [
        None,
        {},
        {"templates": "a {}", "max_words": 1},
        {"templates": ["a {}"], "max_words": "1"},
        {"templates": ["a"], "max_words": 1},
        {"templates": ["a {}"], "max_words": 0},
        {"templates": ["a {}"], "max_words": 4},
    ],
)
def test_invalid_query_templates_are_rejected(values: object) -> None:
    with pytest.raises(ValueError, match=r"templates|max_words"):
        QueryTemplates.from_dict(values)
    assert QueryTemplates.from_dict({"templates": ["a {}"], "max_words": 2}) == QueryTemplates(("a {}",), 2)
