"""Prompt ensembles: a text is inserted into several templates, and the embeddings of the prompts are averaged.

Templates such as "a photo of a {}" improve zero-shot classification with CLIP (arXiv 2103.00020, section 3.1.4),
because class names and other short texts differ from the captions that CLIP was trained on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PLACEHOLDER = "{}"
# Limits for queries that are inserted into templates.
MAX_TEMPLATE_WORDS, MAX_TEMPLATE_CHARACTERS = 3, 50


def check_prompt_templates(templates: Sequence[str], name: str = "templates") -> None:
    """Raise ValueError if a template has no {} placeholder. The error mentions the argument or flag `name`."""
    for n, template in enumerate(templates):
        if PLACEHOLDER not in template:
            raise ValueError(
                f"{name}: template {n} ({template!r}) has no {{}} placeholder. Valid example: 'a photo of a {{}}'"
            )


@dataclass(frozen=True)
class QueryTemplates:
    """Prompt templates for short queries. Longer queries are encoded unchanged."""

    templates: tuple[str, ...] = ()  # such as "a photo of a {}"
    max_words: int = MAX_TEMPLATE_WORDS  # maximum number of words in a short query

    def __post_init__(self) -> None:
        check_prompt_templates(self.templates)
        if not 1 <= self.max_words <= MAX_TEMPLATE_WORDS:
            raise ValueError(f"max_words must be between 1 and {MAX_TEMPLATE_WORDS} (got {self.max_words})")

    @classmethod
    def from_dict(cls, values: Any) -> QueryTemplates:
        """Create query templates from a dict with "templates" and "max_words". Raise ValueError for invalid values."""
        if not isinstance(values, dict):
            raise ValueError(f"query templates must be a dict (got {values!r})")
        templates, max_words = values.get("templates"), values.get("max_words")
        if not isinstance(templates, list) or not all(isinstance(template, str) for template in templates):
            raise ValueError(f"query templates: 'templates' must be a list of strings (got {templates!r})")
        if not isinstance(max_words, int):
            raise ValueError(f"query templates: 'max_words' must be an integer (got {max_words!r})")
        return cls(tuple(templates), max_words)


NO_TEMPLATES = QueryTemplates()  # all queries are encoded unchanged


def fill_prompt_templates(texts: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Insert every text into every template. The prompts of each text are adjacent, in the order of the templates."""
    return [template.replace(PLACEHOLDER, text) for text in texts for template in templates]


def normalize(vectors: np.ndarray) -> np.ndarray:
    """L2-normalise vectors of shape (..., D). Return float32. Zero vectors remain zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def average_prompt_embeddings(prompts: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """Average the prompt embeddings of each of N texts (arXiv 2103.00020). Return shape (N, D), float32.

    `prompts` contains the prompt embeddings, of shape (P, D), grouped by text. `counts` contains the number of prompts
    of each text, at least 1. The embeddings are L2-normalised before and after averaging.
    """
    starts = np.cumsum([0, *counts])[:-1]
    return normalize(np.add.reduceat(normalize(prompts), starts, axis=0))


def is_short_text(text: str, max_words: int = MAX_TEMPLATE_WORDS) -> bool:
    """Return True if a text has at most `max_words` words and `MAX_TEMPLATE_CHARACTERS` characters.

    Words are separated by whitespace. In Chinese, Japanese and Korean text, two characters count as one word.
    """
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        return False
    wide_characters = sum(unicodedata.east_asian_width(character) == "W" for character in text)
    return len(text.split()) <= max_words and wide_characters <= 2 * max_words


def build_query_prompts(texts: Sequence[str], templates: QueryTemplates) -> tuple[list[str], list[int]]:
    """Return the prompts of all search queries, and the number of prompts for each query.

    The prompts of a short query are the query and the filled templates. The only prompt of a longer query is the query.
    """
    groups = []
    for text in texts:
        is_short = is_short_text(text, templates.max_words)
        groups.append([text, *fill_prompt_templates([text], templates.templates)] if is_short else [text])
    return [prompt for group in groups for prompt in group], [len(group) for group in groups]
