"""Words and short phrases extracted from captions, to be used as queries by `short_queries`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from llm2clip.data.noun_phrases import CONNECTIVES, DETERMINERS, FUNCTION_WORDS, NUMBERS, words_of

# Letters and digits, joined by apostrophes and hyphens, as in "t-shirt" and "man's".
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Spaces before apostrophes in tokenized captions, as in "the dog 's mouth".
_SEPARATE_POSSESSIVE = re.compile(r"\s+(?=['’]s\b)")
_PUNCTUATION = re.compile(r"[^\w\s'’-]+")
# English words that do not name anything visible. Lists for document retrieval, such as scikit-learn's, also contain
# "two", "three", "fire" and "empty", which are useful in queries for images.
_OTHER_STOP_WORDS = """
having doing get gets getting appears seems isn't aren't
hers herself himself itself mine myself ours theirs themselves yours whose someone something he's she's there's
about amid among amongst atop besides front per throughout underneath until upon via within
although nor though whether almost still well
"""
STOP_WORDS = (DETERMINERS | CONNECTIVES | FUNCTION_WORDS | words_of(_OTHER_STOP_WORDS)) - NUMBERS - {"back"}


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(_SEPARATE_POSSESSIVE.sub("", text.lower()))


def split_clauses(text: str) -> list[list[str]]:
    """Return the words of each part of a text between punctuation marks, in lower case."""
    clauses = [split_words(part) for part in _PUNCTUATION.split(text)]
    return [clause for clause in clauses if clause]


def caption_phrases(captions: Iterable[str], num_words: int) -> set[str]:
    """Return the phrases of `num_words` words that occur in an image's captions, in lower case.

    A phrase is a sequence of adjacent words without punctuation in between. Its first and last words must have at least
    two characters and at least one letter, and must not be in `STOP_WORDS`. The words in between can be any words, as
    in "man in red".
    """
    return {
        " ".join(phrase)
        for caption in captions
        for clause in split_clauses(caption)
        for phrase in _ngrams(clause, num_words)
        if _is_content_word(phrase[0]) and _is_content_word(phrase[-1])
    }


def _ngrams(words: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(len(words) - size + 1):
        yield words[start : start + size]


def _is_content_word(word: str) -> bool:
    return len(word) > 1 and word.replace("’", "'") not in STOP_WORDS and any(map(str.isalpha, word))
