"""Reference implementation of the phrase rules: one caption at a time, with a regular expression."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from llm2clip.data.noun_phrases import (
    ARTICLES,
    CONNECTIVES,
    DETERMINERS,
    FUNCTION_WORDS,
    MAX_WORDS,
    MIN_IMAGES,
    VAGUE_NOUNS,
)

BOUNDARIES = DETERMINERS | CONNECTIVES | FUNCTION_WORDS
# A token: a word, or a punctuation mark or number, which ends a run.
TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]|\d+")


def extract_phrases(captions: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the phrases in each image's captions."""
    nouns = select_frequent({noun for text in texts for noun in find_lone_nouns(text)} for texts in captions)
    candidates = [tuple(dict.fromkeys(p for text in texts for p in find_phrases(text, nouns))) for texts in captions]
    frequent = select_frequent(candidates)
    return [tuple(phrase for phrase in phrases if phrase in frequent) for phrases in candidates]


def select_frequent(sets: Iterable[Iterable[str]]) -> set[str]:
    counts = Counter(item for items in sets for item in items)
    return {item for item, count in counts.items() if count >= MIN_IMAGES}


def split_into_runs(text: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield (preceding token, words, following token) for each run of content words in a text."""
    before, run = ".", list[str]()
    for token in [*TOKEN.findall(text.lower()), "."]:
        if token[0].isalpha() and token not in BOUNDARIES:
            run.append(token)
            continue
        if run:
            yield before, run, token
        before, run = token, []


def find_lone_nouns(text: str) -> Iterator[str]:
    for before, run, after in split_into_runs(text):
        if len(run) == 1 and before in ARTICLES and (after == "." or (after in BOUNDARIES - {"and", "or"})):
            yield run[0]


def find_phrases(text: str, nouns: set[str]) -> Iterator[str]:
    for before, run, _ in split_into_runs(text):
        if before != "." and not before.isdigit() and before not in DETERMINERS | CONNECTIVES:
            continue
        start = next((n for n, word in enumerate(run) if word in nouns), None)
        if start is None:
            continue
        stop = next((n for n in range(start, len(run)) if run[n] not in nouns), len(run))
        phrase = run[max(0, stop - MAX_WORDS) : stop]
        if phrase[-1] in VAGUE_NOUNS:
            continue
        yield " ".join(phrase)
        if len(phrase) > 1:
            yield phrase[-1]
