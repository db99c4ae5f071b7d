"""Extraction of short phrases, such as "dog" and "red hat", from captions. The phrases are used as extra captions.

The rules below are for English. For other languages, or to use the output of a parser, provide a `phrases` column.
Noun phrase libraries (spaCy, NLTK) are not used, because their models are not available from PyPI.

The words between two function words or punctuation marks form a run, as in RAKE (Rose et al. 2010, "Automatic keyword
extraction from individual documents"). A run may contain a verb ("a brown dog runs"), so nouns are identified from the
captions themselves: a noun is a word that often stands alone between an article and a function word ("a dog in", "the
hat").

Three passes read the captions in batches: they count the lone nouns, count the phrases, and select the frequent
phrases; see `phrase_table.py`. Tokens and runs are identified with array operations on all characters of a batch.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm2clip.data.texts import make_text_key

MIN_IMAGES = 3  # phrases and nouns in the captions of fewer images are discarded, because they are often wrong
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
_STARTERS = DETERMINERS | CONNECTIVES
_BOUNDARIES = _STARTERS | FUNCTION_WORDS
RULES_VERSION = 1  # increase it if the rules extract other phrases from the same captions

# Kinds of characters. A token is a run of letters, a run of digits, or another character that is not skipped.
_SKIPPED, _LETTER, _DIGIT, _JOINER, _MARK, _UNKNOWN = range(6)
# Properties of a token. A phrase may start after a `_BEFORE_PHRASE` token; a lone noun stands before an `_AFTER_NOUN`.
_CONTENT, _ARTICLE, _BEFORE_PHRASE, _AFTER_NOUN, _NOUN, _VAGUE = (1 << bit for bit in range(6))
_SEPARATOR = "\n"  # token before and after each caption
_HASH_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def is_english(captions: Sequence[str]) -> bool:
    """Return True if at least a third of the captions contain a common English function word.

    The phrase rules are for English: in other languages, most of what they find is not a phrase. Captions with fewer
    than four words are ignored.
    """
    sample = [caption.lower().split() for caption in captions]
    sentences = [words for words in sample if len(words) >= 4]
    return sum(not ENGLISH_WORDS.isdisjoint(words) for words in sentences) * 3 >= len(sentences) > 0


class CaptionBatch(NamedTuple):
    """Captions of consecutive images.

    Attributes:
        num_images: Number of images, N.
        texts: All captions, image after image.
        images: Image of each caption, from 0 to N-1, int64.
    """

    num_images: int
    texts: list[str]
    images: np.ndarray

    @classmethod
    def from_columns(cls, columns: Sequence[pa.ListArray]) -> "CaptionBatch":
        """Create a batch from several columns with lists of captions. Each image's captions keep the columns' order."""
        num_images = len(columns[0])
        images = np.concatenate([np.repeat(np.arange(num_images), np.diff(column.offsets)) for column in columns])
        order = np.argsort(images, kind="stable")
        texts = pa.concat_arrays([column.flatten() for column in columns])
        return cls(num_images, texts.take(pa.array(order)).to_pylist(), images[order])


class PhraseCounts(NamedTuple):
    """Numbers of images in which phrases occur.

    Phrases are represented by 64-bit hashes, so that counting a phrase takes 9 bytes. If two phrases had the same hash
    (probability: 1 in 100,000 for 20 million different phrases), a rare phrase might be taken for a frequent one.

    Attributes:
        hashes: Sorted distinct hashes, uint64.
        counts: Number of images with each phrase, at most `MIN_IMAGES`, uint8.
    """

    hashes: np.ndarray
    counts: np.ndarray

    @classmethod
    def merge(cls, parts: Iterable["PhraseCounts"]) -> "PhraseCounts":
        """Add up the counts of different images."""
        total = cls(np.zeros(0, np.uint64), np.zeros(0, np.uint8))
        pending = list[PhraseCounts]()
        for part in parts:
            pending.append(part)
            # Adding up takes time for all hashes, so wait until there are as many new ones.
            if sum(len(counts.hashes) for counts in pending) >= len(total.hashes):
                total, pending = _add_counts([total, *pending]), []
        return _add_counts([total, *pending])

    def select_frequent(self) -> np.ndarray:
        """Return the sorted hashes of the phrases that occur in at least `MIN_IMAGES` images."""
        return self.hashes[self.counts >= MIN_IMAGES]


def _add_counts(parts: Sequence[PhraseCounts]) -> PhraseCounts:
    hashes = np.concatenate([part.hashes for part in parts])
    if not len(hashes):
        return parts[0]
    order = np.argsort(hashes)
    hashes = hashes[order]
    counts = np.concatenate([part.counts for part in parts])[order]
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    sums = np.add.reduceat(counts, starts, dtype=np.int64)
    return PhraseCounts(hashes[starts], np.minimum(sums, MIN_IMAGES).astype(np.uint8))


def count_lone_nouns(batches: Iterable[CaptionBatch]) -> Counter[str]:
    """Count the images in which each word stands alone after an article and before a function word or the sentence end.

    Words before "and", "or" or a comma are excluded, because they may be adjectives ("a black and white dog").
    """
    vocabulary, counts = Vocabulary(), Counter[str]()
    for batch in batches:
        runs = _split_into_runs(batch, vocabulary)
        flags = vocabulary.flags[runs.tokens]
        is_lone = (runs.stops - runs.starts == 1) & (flags[runs.starts - 1] & _ARTICLE > 0)
        is_lone &= flags[runs.stops] & _AFTER_NOUN > 0
        words = runs.tokens[runs.starts[is_lone]]
        pairs = np.unique(runs.images[is_lone] * len(vocabulary.tokens) + words)
        ids, numbers = np.unique(pairs % len(vocabulary.tokens), return_counts=True)
        for word_id, number in zip(ids.tolist(), numbers.tolist(), strict=True):
            counts[vocabulary.tokens[word_id]] += number
    return counts


def count_phrases(batches: Iterable[CaptionBatch], nouns: Collection[str]) -> PhraseCounts:
    """Count the images in which each phrase occurs, given the nouns."""
    vocabulary = Vocabulary(nouns)

    def count_in_batch(batch: CaptionBatch) -> PhraseCounts:
        candidates = _find_candidates(batch, vocabulary)
        counts = np.bincount(candidates.phrases, minlength=len(candidates.hashes))
        return PhraseCounts(candidates.hashes, np.minimum(counts, MIN_IMAGES).astype(np.uint8))

    return PhraseCounts.merge(map(count_in_batch, batches))


def find_phrases(
    batches: Iterable[CaptionBatch], nouns: Collection[str], frequent: np.ndarray
) -> Iterator[pa.ListArray]:
    """Yield the lower-case phrases of each batch's images, in order of first appearance.

    A phrase ends with a noun and starts after a determiner or connective, or at the start of a sentence. The noun alone
    is also a phrase. Phrases whose hash is not in the sorted array `frequent` are omitted.
    """
    vocabulary = Vocabulary(nouns)
    for batch in batches:
        candidates = _find_candidates(batch, vocabulary)
        is_frequent = (
            np.append(frequent, np.uint64(0))[np.searchsorted(frequent, candidates.hashes)] == candidates.hashes
        )
        new_index = np.cumsum(is_frequent) - 1
        texts = candidates.get_texts(is_frequent, vocabulary)
        is_selected = is_frequent[candidates.phrases]
        lengths = np.bincount(candidates.images[is_selected], minlength=batch.num_images)
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
        yield pa.ListArray.from_arrays(offsets, texts.take(new_index[candidates.phrases[is_selected]]))


class Vocabulary:
    """Tokens with integer ids.

    Attributes:
        tokens: Token of each id, a list of V strings. The first is the separator of captions.
        flags: Properties of each token, uint8 of shape (V,).
        hashes: Hash of each token, uint64 of shape (V,).
    """

    def __init__(self, nouns: Collection[str] = ()) -> None:
        self._nouns = frozenset(nouns)
        self._ids: dict[str, int] = {}
        self.tokens = list[str]()
        self.flags = np.zeros(0, np.uint8)
        self.hashes = np.zeros(0, np.uint64)
        self.find_ids([_SEPARATOR])

    def find_ids(self, tokens: Sequence[str]) -> np.ndarray:
        """Return the ids of distinct tokens, int32. Add the tokens that are new."""
        new_tokens = [token for token in tokens if token not in self._ids]
        if new_tokens:
            self._ids.update(zip(new_tokens, range(len(self._ids), len(self._ids) + len(new_tokens)), strict=True))
            self.tokens += new_tokens
            self.flags = np.append(self.flags, np.array(list(map(self._compute_flags, new_tokens)), np.uint8))
            keys = np.array(list(map(make_text_key, new_tokens)), np.int64)
            self.hashes = np.append(self.hashes, keys.view(np.uint64))
        return np.array([self._ids[token] for token in tokens], np.int32)

    def _compute_flags(self, token: str) -> int:
        """Return the properties of a token."""
        flags = _FLAGS_OF_TOKEN.get(token)
        if flags is None:
            flags = _CONTENT if token[0].isalpha() else _BEFORE_PHRASE * token.isdigit()
        return flags | _NOUN * (token in self._nouns)


def _list_flags() -> dict[str, int]:
    """Return the properties of the tokens in the rules."""
    flags = dict.fromkeys(VAGUE_NOUNS, _CONTENT | _VAGUE)
    for token in [".", _SEPARATOR, *_BOUNDARIES]:
        flags[token] = _AFTER_NOUN * (token not in ("and", "or")) | _ARTICLE * (token in ARTICLES)
        flags[token] |= _BEFORE_PHRASE * (token not in FUNCTION_WORDS - _STARTERS)
    return flags


_FLAGS_OF_TOKEN = _list_flags()


class _Runs(NamedTuple):
    """Runs of content words in the captions of a batch.

    Attributes:
        tokens: Ids of all tokens, int64. The tokens before and after a run are not content words.
        starts: Index in `tokens` of the first word of each run, int64.
        stops: Index in `tokens` of the token after each run, int64.
        images: Image of each run, int64.
    """

    tokens: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    images: np.ndarray


def _split_into_runs(batch: CaptionBatch, vocabulary: Vocabulary) -> _Runs:
    """Split the captions into runs of content words. The start and the end of a caption are sentence boundaries."""
    tokens = _tokenize(batch.texts, vocabulary)
    is_content = vocabulary.flags[tokens] & _CONTENT > 0
    edges = np.flatnonzero(is_content[1:] != is_content[:-1]) + 1  # the first and the last token are separators
    starts, stops = edges[::2], edges[1::2]
    separators = np.flatnonzero(tokens == 0)
    return _Runs(tokens, starts, stops, batch.images[np.searchsorted(separators, starts) - 1])


def _tokenize(texts: Sequence[str], vocabulary: Vocabulary) -> np.ndarray:
    r"""Return the token ids of all texts, with a separator before and after each text.

    Tokens are lower-case words, and numbers and punctuation marks, which end a run. The words may contain single
    apostrophes and hyphens. This is equivalent to finding all matches of the regular expression
    [^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]|\d+
    """
    text = _SEPARATOR.join(["", *texts, ""])
    if text.count(_SEPARATOR) > len(texts) + 1:
        text = _SEPARATOR.join(["", *(text.replace(_SEPARATOR, " ") for text in texts), ""])
    text = text.lower()
    encoding, dtype = ("ascii", np.uint8) if text.isascii() else ("utf-32-le", np.uint32)
    characters = np.frombuffer(text.encode(encoding), dtype)
    kinds = _classify_characters(characters)
    is_letter = kinds == _LETTER
    joiners = np.flatnonzero((kinds[1:-1] == _JOINER) & is_letter[:-2] & is_letter[2:]) + 1
    kinds[joiners] = _LETTER
    is_start = kinds >= _JOINER
    is_start[1:] |= kinds[1:] != kinds[:-1]
    in_token = np.flatnonzero(kinds != _SKIPPED)
    starts = np.flatnonzero(is_start[in_token])
    offsets = np.append(starts, len(in_token)) * characters.itemsize
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(characters[in_token])]
    tokens = pa.Array.from_buffers(pa.large_binary(), len(starts), buffers).dictionary_encode()
    distinct = [token.decode(encoding) for token in tokens.dictionary.to_pylist()]
    return vocabulary.find_ids(distinct)[tokens.indices.to_numpy()]


def _classify_characters(characters: np.ndarray) -> np.ndarray:
    """Return the kind of each character (code point) as a uint8 array."""
    table = _get_kind_table()
    kinds: np.ndarray = table.take(characters)
    if kinds.max() == _UNKNOWN:
        for code in np.unique(characters[kinds == _UNKNOWN]).tolist():
            table[code] = _classify_character(chr(code))
        kinds = table.take(characters)
    return kinds


@cache
def _get_kind_table() -> np.ndarray:
    """Return the kinds of all code points seen so far. The others are `_UNKNOWN`."""
    return np.full(0x110000, _UNKNOWN, np.uint8)


def _classify_character(character: str) -> int:
    """Return the kind of a character."""
    if character == _SEPARATOR:
        return _MARK
    if character.isdecimal():
        return _DIGIT
    if character.isalnum():
        return _LETTER
    if character == "_" or character.isspace():
        return _SKIPPED
    return _JOINER if character in "'’-" else _MARK


class _Candidates(NamedTuple):
    """Phrases in the captions of a batch, in order of first appearance in each image.

    Attributes:
        hashes: Sorted hashes of the D distinct phrases, uint64 of shape (D,).
        examples: Ids of the words of each distinct phrase, padded in front with -1, int64 of shape (D, `MAX_WORDS`).
        phrases: Phrase of each candidate, from 0 to D-1, int64 of shape (C,).
        images: Image of each candidate, int64 of shape (C,).
    """

    hashes: np.ndarray
    examples: np.ndarray
    phrases: np.ndarray
    images: np.ndarray

    def get_texts(self, is_selected: np.ndarray, vocabulary: Vocabulary) -> pa.StringArray:
        """Return the texts of the selected distinct phrases."""
        tokens = pa.array(vocabulary.tokens, pa.string())
        columns = self.examples[is_selected].T
        words = [tokens.take(pa.array(column, mask=column < 0)) for column in columns]
        return pc.binary_join_element_wise(*words, " ", null_handling="skip")


def _find_candidates(batch: CaptionBatch, vocabulary: Vocabulary) -> _Candidates:
    """Find the noun phrase at the start of each run, and that phrase's last noun. Several in an image count once."""
    runs = _split_into_runs(batch, vocabulary)
    flags = vocabulary.flags[runs.tokens]
    is_noun = flags & _NOUN > 0
    follows = flags[runs.starts - 1] & _BEFORE_PHRASE > 0
    starts, stops, images = runs.starts[follows], runs.stops[follows], runs.images[follows]
    nouns, others = np.append(np.flatnonzero(is_noun), len(is_noun)), np.flatnonzero(~is_noun)
    first_nouns = nouns[np.searchsorted(nouns, starts)]
    has_noun = first_nouns < stops
    starts, first_nouns, images = starts[has_noun], first_nouns[has_noun], images[has_noun]
    lasts = others[np.searchsorted(others, first_nouns)] - 1
    is_used = flags[lasts] & _VAGUE == 0
    starts, lasts, images = starts[is_used], lasts[is_used], images[is_used]
    lengths = np.minimum(lasts + 1 - starts, MAX_WORDS)
    # The last noun of a longer phrase follows the phrase.
    order = np.repeat(np.arange(len(lasts)), 1 + (lengths > 1))
    is_second = np.append(False, order[1:] == order[:-1])[: len(order)]
    lengths = np.where(is_second, 1, lengths[order])
    lasts, images = lasts[order], images[order]
    word_hashes = vocabulary.hashes[runs.tokens]
    hashes = word_hashes[lasts]
    for back in range(1, MAX_WORDS):
        hashes = np.where(lengths > back, hashes * _HASH_FACTOR + word_hashes[lasts - back], hashes)
    distinct, examples, phrases = np.unique(hashes, return_index=True, return_inverse=True)
    _, kept = np.unique(images * len(distinct) + phrases, return_index=True)
    kept.sort()
    distances = np.arange(MAX_WORDS)[::-1]
    words = runs.tokens[lasts[examples, None] - distances]
    words[distances >= lengths[examples, None]] = -1
    return _Candidates(distinct, words, phrases[kept], images[kept])
