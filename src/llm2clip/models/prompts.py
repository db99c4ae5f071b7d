"""Prompt ensembles: a text is inserted into several templates and is represented by the mean of their embeddings.

Ensembles of templates such as "a photo of a {}" improve zero-shot classification with CLIP (arXiv 2103.00020, section
3.1.4), because class names and other short texts are unlike the captions on which the model was trained.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PLACEHOLDER = "{}"
# In search, templates are applied to queries of at most this length.
MAX_TEMPLATE_WORDS, MAX_TEMPLATE_CHARACTERS = 3, 50


def check_templates(templates: Sequence[str], name: str = "templates") -> None:
    """Raise ValueError if a template has no placeholder for the text.

    Args:
        templates: Prompt templates.
        name: Name of the argument or flag, for the error message.
    """
    for n, template in enumerate(templates):
        if PLACEHOLDER not in template:
            raise ValueError(
                f"{name}: template {n} ({template!r}) has no {{}} for the text. Example: 'a photo of a {{}}'"
            )


def fill_templates(texts: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Insert every text into every template. The prompts of a text are adjacent, in the order of the templates."""
    return [template.replace(PLACEHOLDER, text) for text in texts for template in templates]


def average_prompts(prompts: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the mean prompt embedding of each text (arXiv 2103.00020).

    The prompt embeddings are L2-normalised before averaging, and their mean is L2-normalised again.

    Args:
        prompts: Embeddings of all prompts, (P, D). The prompts of a text are adjacent.
        counts: Number of prompts for each of the N texts. The sum must be P.

    Returns:
        Text embeddings, (N, D) float32.
    """
    normalized = F.normalize(prompts.float(), dim=-1)
    text_of_prompt = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    sums = normalized.new_zeros(len(counts), prompts.shape[1])
    sums.index_add_(0, text_of_prompt.to(prompts.device), normalized)
    return F.normalize(sums, dim=-1)


def is_short_text(text: str) -> bool:
    """Return True if a text has at most `MAX_TEMPLATE_WORDS` words and `MAX_TEMPLATE_CHARACTERS` characters.

    Words are separated by whitespace. In Chinese, Japanese and Korean text, two characters count as one word.
    """
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        return False
    wide_characters = sum(unicodedata.east_asian_width(character) == "W" for character in text)
    return len(text.split()) <= MAX_TEMPLATE_WORDS and wide_characters <= 2 * MAX_TEMPLATE_WORDS


def query_prompts(texts: Sequence[str], templates: Sequence[str]) -> tuple[list[str], list[int]]:
    """Return the prompts of search queries.

    The prompts of a short query are the query itself and the filled templates. Any other query is its own only prompt.

    Returns:
        All prompts, and the number of prompts for each query. See `average_prompts`.
    """
    groups = [[text, *fill_templates([text], templates)] if is_short_text(text) else [text] for text in texts]
    return [prompt for group in groups for prompt in group], [len(group) for group in groups]
