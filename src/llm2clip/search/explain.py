"""Explanations of hits: the effect of each query word on the score, and heat maps of the similarity to the query.

In scripts without spaces, a word is a Chinese character, a run of hiragana or katakana, or a run of Thai, Lao, Burmese
or Khmer letters. The cells of a heat map are the patches of a vision transformer, or the positions in the last feature
map of a convolutional network.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from llm2clip.io_utils import UNSPACED
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import average_prompt_embeddings, fill_prompt_templates
from llm2clip.models.vision.dense import DenseEncoder
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.types import UnsupportedQueryError

MAX_WORDS = 40  # limited, because each word requires at least one text embedding
UNSPACED_WORDS = re.compile(
    r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[\u3040-\u309f]+|[\u30a0-\u30ff]+|"
    rf"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+|(?:(?!{UNSPACED.pattern})[^\W_])+"
)


@dataclasses.dataclass(frozen=True)
class QueryWord:
    """Query word and its effect: the score of the complete query minus the score of the query without the word."""

    text: str
    text_index: int  # index of the query text that contains the word
    start: int  # index of the word's first character in the text, in Unicode code points
    end: int  # index after the word's last character
    effect: float = 0.0


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Cosine similarity between an image and a query, and the effects of the first MAX_WORDS words of the query."""

    score: float
    words: list[QueryWord]


def explain_hit(
    encoder: QueryEncoder, query: SearchQuery, vector: np.ndarray, hits: Sequence[np.ndarray] = ()
) -> Explanation:
    """Return the score of an image, and the effect of each of the first MAX_WORDS words of a query.

    Prompt templates are applied to a shortened text only if they are applied to the complete text. Otherwise, the
    templates would change the score more than the removed word.

    Args:
        vector: L2-normalised embedding of the image, of shape (D,).
        hits: Embeddings of the earlier hits that are part of the query, as in `SearchQuery.combine`.

    Raises:
        UnsupportedQueryError: The query has no texts.
        ValueError: A text is empty.
    """
    if not query.texts:
        raise UnsupportedQueryError(
            "the query has no texts. An explanation shows the effect of each word, so add at least one text"
        )
    default_templates = encoder.model.query_templates
    templates = default_templates if query.templates is None else query.templates
    prompts, counts = query.build_prompts(default_templates)
    words = find_query_words(query.texts)
    shortened_counts = []  # per word: number of prompts for the text without the word, or 0 if no words remain
    for word in words:
        text = remove_query_word(query.texts[word.text_index], word)
        shortened_prompts = []
        if find_query_words([text]):
            filled = fill_prompt_templates([text], templates.templates) if counts[word.text_index] > 1 else []
            shortened_prompts = [text, *filled]
        prompts += shortened_prompts
        shortened_counts.append(len(shortened_prompts))

    images = list(encoder.embed_images([*query.images, *query.negative_images]))
    all_counts = [*counts, *(count for count in shortened_counts if count)]
    embeddings = list(average_prompt_embeddings(encoder.embed_texts(prompts), all_counts))
    texts, shortened_texts = embeddings[: len(counts)], iter(embeddings[len(counts) :])
    score = float(query.combine(texts, images, hits).combined @ vector)
    effects = []
    for word, count in zip(words, shortened_counts, strict=True):
        before, after = texts[: word.text_index], texts[word.text_index + 1 :]
        if count:
            remaining, others = query, [*before, next(shortened_texts), *after]
        else:
            query_texts = [text for index, text in enumerate(query.texts) if index != word.text_index]
            remaining, others = dataclasses.replace(query, texts=query_texts), [*before, *after]
        # Without its only word, a query is empty, and the score is 0.
        without = float(remaining.combine(others, images, hits).combined @ vector) if remaining else 0.0
        effects.append(dataclasses.replace(word, effect=score - without))
    return Explanation(score, effects)


def find_query_words(texts: Sequence[str]) -> list[QueryWord]:
    words: list[QueryWord] = []
    for index, text in enumerate(texts):
        for start, end in _find_word_spans(text):
            if len(words) == MAX_WORDS:
                return words
            words.append(QueryWord(text[start:end], index, start, end))
    return words


def _find_word_spans(text: str) -> Iterator[tuple[int, int]]:
    for token in re.finditer(r"\S+", text):
        if UNSPACED.search(token[0]):
            for part in UNSPACED_WORDS.finditer(token[0]):
                yield token.start() + part.start(), token.start() + part.end()
            continue
        start, end = token.span()
        while start < end and _is_punctuation(text[start]):
            start += 1
        while start < end and _is_punctuation(text[end - 1]):
            end -= 1
        if start < end:
            yield start, end


def _is_punctuation(character: str) -> bool:
    return unicodedata.category(character).startswith("P")


def remove_query_word(text: str, word: QueryWord) -> str:
    """Remove a word and one adjacent space from a text."""
    before, after = text[: word.start], text[word.end :]
    if not before or before[-1].isspace():
        after = after.lstrip()
    return (before + after).strip()


# ---- heat maps


def require_dense_encoder(model: DualEncoder) -> DenseEncoder:
    """Return a model's dense encoder. Raise ValueError if the model does not have one."""
    if model.dense is None:
        raise ValueError("this model does not support heat maps, because its image encoder cannot embed image regions")
    return model.dense


def compute_heatmap(dense: DenseEncoder, pixels: Tensor, query: np.ndarray) -> np.ndarray:
    """Return the cosine similarity between a query and each cell of an image, as a float32 array of shape (h, w).

    Args:
        pixels: uint8 image of shape (3, H, W), resized with `dense.resize`.
        query: L2-normalised float32 vector of shape (D,).

    Raises:
        ValueError: The model returned NaN or infinity.
    """
    cells = dense.encode(pixels[None], dense.localization_variant)[0]  # (h, w, D)
    heatmap = (cells @ torch.from_numpy(query).to(cells)).cpu().numpy()
    if not np.isfinite(heatmap).all():
        raise ValueError("the model returned NaN or infinity for an image")
    return heatmap
