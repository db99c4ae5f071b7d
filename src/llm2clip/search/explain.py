"""Explanation of a hit: how much its score changes if a word is removed from the query's texts.

Words are separated by whitespace, and punctuation at their ends is not part of them. In scripts without spaces between
words, each Chinese character, each run of hiragana or katakana, and each run of Thai, Lao, Burmese or Khmer letters
counts as a word.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from llm2clip.data.texts import UNSPACED
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import QueryTemplates, average_prompts, fill_templates
from llm2clip.search.query import SearchQuery, embed_images
from llm2clip.search.request_images import BadRequest

MAX_WORDS = 40  # each word takes at least one text embedding
UNSPACED_WORDS = re.compile(
    r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|[\u3040-\u309f]+|[\u30a0-\u30ff]+|"
    rf"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]+|(?:(?!{UNSPACED.pattern})[^\W_])+"
)


class QueryWord(NamedTuple):
    """A word of a query.

    Args:
        text_index: Index of the text that contains the word.
        start, end: Character offsets of the word in this text.
        effect: Score with the full query minus the score without the word. None until it has been computed.
    """

    text: str
    text_index: int
    start: int
    end: int
    effect: float | None = None


class Explanation(NamedTuple):
    """Score of an image, and the effect of each word of the query on the score."""

    score: float
    words: list[QueryWord]


@dataclass(frozen=True)
class Explainer:
    """A query without each of its words. The caller encodes the prompts and the images of the query.

    Attributes:
        prompts: Prompts of the query, then those of all texts without a word.
        query_counts: Number of prompts for each text and each negative text of the query.
        words: Words of the query, at most MAX_WORDS.
        word_counts: Number of prompts for the text without each word. 0 if no words remain.
    """

    query: SearchQuery
    prompts: list[str]
    query_counts: list[int]
    words: list[QueryWord]
    word_counts: list[int]

    def explain(
        self, prompts: np.ndarray, images: Sequence[np.ndarray], hits: Sequence[np.ndarray], vector: np.ndarray
    ) -> Explanation:
        """Return the score of an image, and the effect of each word.

        Args:
            prompts: Embeddings of `prompts`, of shape (P, D).
            images, hits: Embeddings of the query's images and earlier hits, as in `SearchQuery.combine`.
            vector: L2-normalised embedding of the image, of shape (D,).
        """
        counts = [*self.query_counts, *(count for count in self.word_counts if count)]
        texts = list(average_prompts(torch.from_numpy(prompts), counts).numpy())
        texts, remaining = texts[: len(self.query_counts)], iter(texts[len(self.query_counts) :])
        score = float(self.query.combine_texts(texts, images, hits).combined @ vector)
        words = []
        for word, count in zip(self.words, self.word_counts, strict=True):
            replacement = [next(remaining)] if count else []
            others = [*texts[: word.text_index], *replacement, *texts[word.text_index + 1 :]]
            query = self.query
            if not count:
                query_texts = [text for index, text in enumerate(query.texts) if index != word.text_index]
                query = dataclasses.replace(query, texts=query_texts)
            # Nothing remains of a query that consists of one word. Its score is then 0.
            without = float(query.combine_texts(others, images, hits).combined @ vector) if query else 0.0
            words.append(word._replace(effect=score - without))
        return Explanation(score, words)


def prepare_explanation(query: SearchQuery, default_templates: QueryTemplates) -> Explainer:
    """Find the words of a query and build the prompts without each of them.

    Prompt templates are used for a text without a word only if they are used for the complete text. Otherwise, the
    templates would change the score more than the word.

    Raises:
        BadRequest: The query has no texts.
        ValueError: A text is empty.
    """
    if not query.texts:
        raise BadRequest(
            "an explanation requires a query with at least one text, because it rates the words of the texts"
        )
    prompts, counts = query.build_prompts(default_templates)
    templates = default_templates if query.templates is None else query.templates
    words = find_words(query.texts)
    word_counts = []
    for word in words:
        text = remove_word(query.texts[word.text_index], word)
        new_prompts = []
        if find_words([text]):
            filled = fill_templates([text], templates.templates) if counts[word.text_index] > 1 else []
            new_prompts = [text, *filled]
        prompts += new_prompts
        word_counts.append(len(new_prompts))
    return Explainer(query, prompts, counts, words, word_counts)


def explain_hit(model: DualEncoder, query: SearchQuery, vector: np.ndarray) -> Explanation:
    """Explain the score of an image for a query without earlier hits.

    Args:
        vector: L2-normalised embedding of the image, of shape (D,).
    """
    explainer = prepare_explanation(query, model.query_templates)
    images = embed_images(model, [*query.images, *query.negative_images]).numpy()
    return explainer.explain(model.encode_texts(explainer.prompts).numpy(), list(images), [], vector)


def find_words(texts: Sequence[str]) -> list[QueryWord]:
    """Return the first MAX_WORDS words of several texts."""
    words: list[QueryWord] = []
    for index, text in enumerate(texts):
        for start, end in _iterate_words(text):
            if len(words) == MAX_WORDS:
                return words
            words.append(QueryWord(text[start:end], index, start, end))
    return words


def _iterate_words(text: str) -> Iterator[tuple[int, int]]:
    """Yield the start and end of each word in a text."""
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


def remove_word(text: str, word: QueryWord) -> str:
    """Return a text without a word, and without one of the spaces around it."""
    before, after = text[: word.start], text[word.end :]
    if not before or before[-1].isspace():
        after = after.lstrip()
    return (before + after).strip()
