"""Extraction of short phrases, such as "dog" and "red hat", from captions. The phrases are used as extra captions.

The rules below are for English. For other languages, or to use the output of a parser, provide a `phrases` column.
Noun phrase libraries (spaCy, NLTK) are not used, because their models are not available from PyPI.

The words between two function words or punctuation marks form a run, as in RAKE (Rose et al. 2010, "Automatic keyword
extraction from individual documents"). A run may contain a verb ("a brown dog runs"), so nouns are identified from the
captions themselves: a noun is a word that often stands alone between an article and a function word ("a dog in", "the
hat").
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa

from llm2clip.data.table import RecordTable
from llm2clip.runs.ranks import print_once

MIN_IMAGES = 3  # phrases and nouns found in the captions of fewer images are discarded, because they are often wrong
MAX_WORDS = 4  # maximum number of words in a phrase


def to_word_set(text: str) -> frozenset[str]:
    """Return the set of whitespace-separated words in a text."""
    return frozenset(text.split())


ARTICLES = to_word_set("a an the his its their")  # a word that stands alone after one of these words is a noun
NUMBERS = to_word_set("two three four five six seven eight nine ten")
DETERMINERS = (
    ARTICLES
    | NUMBERS
    | to_word_set("this that these those her my your our some several many few both each every another no one")
)
# Words that a noun phrase without a determiner may follow ("with sunglasses", "dogs and cats").
CONNECTIVES = to_word_set(
    "and or of in on at to with without for from by near over under through across into onto behind beside between "
    "along around against above below inside outside beneath next like toward towards past off during before after"
)
# Other function words. They end a run, but no phrase starts after them.
FUNCTION_WORDS = to_word_set(
    "is are was were be been being am do does did has have had can could will would may might must should he she it "
    "they them him who whom which what where when while as if than then there here not only very also just so too but "
    "because that's it's i you we me us all any other others more most much such same own up down out away back "
    "together"
)
# Nouns that do not name anything visible in an image. Phrases that end with one are not used.
VAGUE_NOUNS = to_word_set(
    "front top bottom side sides middle center centre left right end edge part parts kind type lot lots number group "
    "bunch couple pair pairs set image picture photo photograph view scene background foreground something someone"
)
# Function words that occur in most English captions but are rare in other languages.
ENGLISH_WORDS = to_word_set("the of with and is are on at")
_BOUNDARIES = DETERMINERS | CONNECTIVES | FUNCTION_WORDS
# A token: a word, or a punctuation mark or number, which ends a run.
_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]|\d+")


def add_phrases(records: RecordTable) -> RecordTable:
    """Return the records with phrases extracted from their captions. Print a message if no phrases are found.

    The records are returned unchanged if any record already has phrases from a data column, or if the captions are not
    in English.
    """
    if records.count_texts("phrases").any():
        return records
    captions = [record.texts for record in records]
    phrases = extract_phrases(captions) if is_english([text for texts in captions for text in texts]) else []
    if not any(phrases):
        print_once(
            "No short phrases are used: the captions are not in English, or no phrase occurs in the captions of "
            f"{MIN_IMAGES} or more images. To use your own phrases, add a `phrases` column to the data"
        )
        return records
    return records.with_phrases(pa.chunked_array([pa.array(phrases, pa.list_(pa.string()))]))


def is_english(captions: Sequence[str]) -> bool:
    """Return True if at least a third of the captions contain a common English function word.

    The phrase rules are for English: in other languages, most of what they find is not a phrase. At most 10,000 evenly
    spaced captions are checked, and captions with fewer than four words are ignored.
    """
    sample = [caption.lower().split() for caption in captions[:: len(captions) // 10_000 + 1]]
    sentences = [words for words in sample if len(words) >= 4]
    return sum(not ENGLISH_WORDS.isdisjoint(words) for words in sentences) * 3 >= len(sentences) > 0


def extract_phrases(captions: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the lower-case phrases in each image's captions, in order of first appearance.

    A phrase ends with a noun and starts after a determiner or connective, or at the start of a sentence. The noun alone
    is also a phrase. Only phrases that occur in the captions of at least `MIN_IMAGES` images are returned.
    """
    nouns = _select_frequent({noun for text in texts for noun in _find_lone_nouns(text)} for texts in captions)
    candidates = [tuple(dict.fromkeys(p for text in texts for p in _find_phrases(text, nouns))) for texts in captions]
    frequent = _select_frequent(candidates)
    return [tuple(frequent[phrase] for phrase in phrases if phrase in frequent) for phrases in candidates]


def _select_frequent(sets: Iterable[Iterable[str]]) -> dict[str, str]:
    """Return a dict that maps each string found in at least `MIN_IMAGES` of the sets to itself.

    Looking up phrases in this dict lets all images share one string object per phrase.
    """
    counts = Counter(item for items in sets for item in items)
    return {item: item for item, count in counts.items() if count >= MIN_IMAGES}


def _split_into_runs(text: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield (preceding token, words, following token) for each run of content words in a text.

    The start and the end of the text are treated as the token ".".
    """
    before, run = ".", list[str]()
    for token in [*_TOKEN.findall(text.lower()), "."]:
        if token[0].isalpha() and token not in _BOUNDARIES:
            run.append(token)
            continue
        if run:
            yield before, run, token
        before, run = token, []


def _find_lone_nouns(text: str) -> Iterator[str]:
    """Yield the words that stand alone after an article and before a function word or the end of a sentence.

    Words before "and", "or" or a comma are excluded, because they may be adjectives ("a black and white dog").
    """
    for before, run, after in _split_into_runs(text):
        if len(run) == 1 and before in ARTICLES and (after == "." or (after in _BOUNDARIES - {"and", "or"})):
            yield run[0]


def _find_phrases(text: str, nouns: dict[str, str]) -> Iterator[str]:
    """Yield the noun phrase at the start of each run, and that phrase's last noun."""
    for before, run, _ in _split_into_runs(text):
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
