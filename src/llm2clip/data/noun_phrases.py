"""Extraction of short phrases, such as "dog" and "red hat", from captions, for use as additional captions.

The extraction rules are for English. To use phrases in another language, or from a parser, add a `phrases` column to
the data. NLP libraries such as spaCy and NLTK are not used, because their models are not available from PyPI.

As in RAKE (Rose et al. 2010, "Automatic keyword extraction from individual documents"), each caption is divided into
runs of words at function words and punctuation marks. A word is treated as a noun if it occurs alone between an article
and a function word in the captions of several images, like "dog" in "a dog in". The captions are read three times: to
count nouns, to count phrases, and to select the phrases of each image.
"""

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from llm2clip.data.records import CAPTION_FIELDS
from llm2clip.data.table import TEXTS, RecordTable
from llm2clip.data.table_cells import map_batches
from llm2clip.io_utils import append_checksum, atomic_path, has_valid_checksum
from llm2clip.parallel import map_in_processes
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import hold_folder_lock

T = TypeVar("T")
MIN_IMAGES = 3  # phrases and nouns found for fewer images are often wrong and are discarded
MAX_WORDS = 4  # maximum number of words in a phrase
PART_IMAGES = 1 << 16  # number of images per worker task
MIN_PARALLEL_IMAGES = 100_000  # smaller tables are processed without workers, because workers take seconds to start
LANGUAGE_SAMPLES = 10_000  # maximum number of records whose language is checked
RULES_VERSION = 1  # increment when the extraction rules change


def make_word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


ARTICLES = make_word_set("a an the his its their")  # a single word after one of these words is treated as a noun
NUMBERS = make_word_set("two three four five six seven eight nine ten")
DETERMINERS = (
    ARTICLES
    | NUMBERS
    | make_word_set("this that these those her my your our some several many few both each every another no one")
)
# Words that can precede a noun phrase without a determiner, as in "with sunglasses" or "dogs and cats".
CONNECTIVES = make_word_set(
    "and or of in on at to with without for from by near over under through across into onto behind beside between "
    "along around against above below inside outside beneath next like toward towards past off during before after"
)
# Function words that end a run of words and cannot precede a noun phrase.
FUNCTION_WORDS = make_word_set(
    "is are was were be been being am do does did has have had can could will would may might must should he she it "
    "they them him who whom which what where when while as if than then there here not only very also just so too but "
    "because that's it's i you we me us all any other others more most much such same own up down out away back "
    "together"
)
# Nouns that do not name a visible object. Phrases that end with one of these nouns are discarded.
VAGUE_NOUNS = make_word_set(
    "front top bottom side sides middle center centre left right end edge part parts kind type lot lots number group "
    "bunch couple pair pairs set image picture photo photograph view scene background foreground something someone"
)
# Function words that occur in most English captions but are rare in other languages.
ENGLISH_WORDS = make_word_set("the of with and is are on at")
_BOUNDARIES = DETERMINERS | CONNECTIVES | FUNCTION_WORDS
_BEFORE_PHRASE = DETERMINERS | CONNECTIVES | {"."}
# A single word before "and" or "or" is not treated as a noun, because it may be an adjective ("a black and white dog").
_AFTER_NOUN = (_BOUNDARIES - {"and", "or"}) | {"."}
# A token is a word (with optional inner apostrophes and hyphens), a punctuation mark or a number.
_TOKEN = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]|\d+")


# ---- rules -----------------------------------------------------------------------------------------------------------


def is_english(captions: Sequence[str]) -> bool:
    """Return True if a common English word occurs in at least a third of the captions with four or more words."""
    sample = [caption.lower().split() for caption in captions]
    sentences = [words for words in sample if len(words) >= 4]
    return sum(not ENGLISH_WORDS.isdisjoint(words) for words in sentences) * 3 >= len(sentences) > 0


def split_into_content_word_runs(caption: str) -> Iterator[tuple[str, list[str], str]]:
    """Yield (preceding token, words, following token) for each run of content words in a caption.

    Words are converted to lower case. The start and the end of a caption are treated as full stops.
    """
    before = "."
    run: list[str] = []
    for word in caption.lower().split():
        for token, is_content in _tokenize(word):
            if is_content:
                run.append(token)
                continue
            if run:
                yield before, run, token
                run = []
            before = token
    if run:
        yield before, run, "."


@lru_cache(maxsize=1 << 16)
def _tokenize(word: str) -> tuple[tuple[str, bool], ...]:
    """Split a string without whitespace into tokens. Return each token with a flag that is True for content words."""
    tokens = _TOKEN.findall(word)
    return tuple((token, token[0].isalpha() and token not in _BOUNDARIES) for token in tokens)


def find_lone_nouns(caption: str) -> Iterator[str]:
    """Yield the words that occur alone between an article and either a function word or the end of a sentence."""
    for before, run, after in split_into_content_word_runs(caption):
        if len(run) == 1 and before in ARTICLES and after in _AFTER_NOUN:
            yield run[0]


def find_noun_phrases(caption: str, nouns: Collection[str]) -> Iterator[str]:
    """Yield each phrase in a caption, followed by the phrase's last noun. The same text can be yielded several times.

    A phrase ends with a noun and starts after a determiner, a number or a connective, or at the start of a sentence.
    """
    for before, run, _ in split_into_content_word_runs(caption):
        if before not in _BEFORE_PHRASE and not before.isdigit():
            continue
        stop = 0
        while stop < len(run) and run[stop] not in nouns:
            stop += 1
        if stop == len(run):  # the run contains no noun
            continue
        while stop < len(run) and run[stop] in nouns:
            stop += 1
        if run[stop - 1] in VAGUE_NOUNS:
            continue
        words = run[max(0, stop - MAX_WORDS) : stop]
        yield " ".join(words)
        yield words[-1]


# ---- extraction ------------------------------------------------------------------------------------------------------


def add_noun_phrases(records: RecordTable) -> RecordTable:
    """Return the records with phrases extracted from their captions. The phrases are saved in the table's folder.

    The records are returned unchanged if they already have phrases, or if no phrases are found, for example because the
    captions are not in English. Extraction takes about 60 microseconds of CPU time per image, 200 bytes of memory per
    distinct phrase and 4 bytes of memory per record.
    """
    from llm2clip.runs.ranks import print_once  # imports PyTorch, which worker processes do not need

    if records.count_texts("phrases").any():
        return records
    if records.folder is None:
        phrases = list(_extract_phrases(records))
    else:
        file = records.folder / f"phrases-{_hash_phrase_inputs(records)}.arrow"
        with hold_folder_lock(records.folder, "phrases.lock", timeout=-1):
            if not file.exists() or not has_valid_checksum(file):
                _write_phrase_file(file, _extract_phrases(records))
        phrases = [batch.column(0) for batch in map_batches(str(file))]
    if not any(len(lists.values) for lists in phrases):
        print_once(
            "No short phrases are used, because the captions are not in English or no phrase occurs in the captions of "
            f"{MIN_IMAGES} or more images. To use your own phrases, add a `phrases` column to the data"
        )
        return records
    return records.with_phrases(pa.chunked_array(phrases, TEXTS))


def _hash_phrase_inputs(records: RecordTable) -> str:
    """Return a hash of the rows, the caption column and the version of the extraction rules."""
    digest = hashlib.sha256(f"{RULES_VERSION} {records.resolve_field('captions')} {records.rows.dtype}".encode())
    digest.update(np.ascontiguousarray(records.rows).data)
    return digest.hexdigest()[:32]


def _write_phrase_file(file: Path, phrases: Iterator[pa.ListArray]) -> None:
    schema = pa.schema([("phrases", TEXTS)])
    with atomic_path(file) as temporary:
        with pa.OSFile(str(temporary), "wb") as stream, pa.ipc.new_file(stream, schema) as writer:
            for lists in phrases:
                writer.write_batch(pa.RecordBatch.from_arrays([lists], schema=schema))
        append_checksum(temporary)


def _extract_phrases(records: RecordTable) -> Iterator[pa.ListArray]:
    """Yield the phrases of all records, in chunks. Yield nothing if the captions are not in English."""
    if not is_english(_sample_captions(records)):
        return
    parts = records.split(PART_IMAGES)
    is_parallel = len(records) >= MIN_PARALLEL_IMAGES and records.folder is not None
    with ProgressBar(total=3 * len(parts), desc="extracting phrases", unit="part", disable=not is_parallel) as bar:

        def process_parts(function: Callable[[RecordTable], T]) -> Iterator[T]:
            for result in map_in_processes(function, parts, None if is_parallel else 1):
                yield result
                bar.update()

        with tempfile.TemporaryDirectory() as folder:
            nouns, frequent = Path(folder) / "nouns.txt", Path(folder) / "phrases.txt"
            _save_frequent_texts(nouns, process_parts(partial(_count_texts, nouns_file=None)))
            _save_frequent_texts(frequent, process_parts(partial(_count_texts, nouns_file=nouns)))
            yield from process_parts(partial(_find_frequent_phrases, nouns_file=nouns, frequent_file=frequent))


def _save_frequent_texts(file: Path, counters: Iterator[Counter[str]]) -> None:
    total = Counter[str]()
    for counter in counters:
        total.update(counter)
    file.write_text("\n".join(text for text, count in total.items() if count >= MIN_IMAGES), encoding="utf-8")


@lru_cache(maxsize=2)
def _load_frequent_texts(file: Path) -> frozenset[str]:
    return frozenset(file.read_text(encoding="utf-8").split("\n"))


def _sample_captions(records: RecordTable) -> list[str]:
    positions = np.arange(0, len(records), len(records) // LANGUAGE_SAMPLES + 1)
    return list(records.select(positions).iterate_texts(CAPTION_FIELDS))


# ---- functions called in worker processes ----------------------------------------------------------------------------


def _count_texts(records: RecordTable, nouns_file: Path | None) -> Counter[str]:
    """Count the images per phrase or, if `nouns_file` is None, per noun that occurs alone."""
    find = find_lone_nouns if nouns_file is None else partial(find_noun_phrases, nouns=_load_frequent_texts(nouns_file))
    counts = Counter[str]()
    for captions in _iterate_captions(records):
        counts.update({text for caption in captions for text in find(caption)})
    return counts


def _find_frequent_phrases(records: RecordTable, nouns_file: Path, frequent_file: Path) -> pa.ListArray:
    nouns, frequent = _load_frequent_texts(nouns_file), _load_frequent_texts(frequent_file)
    texts: list[str] = []
    offsets = [0]
    for captions in _iterate_captions(records):
        phrases = dict.fromkeys(phrase for caption in captions for phrase in find_noun_phrases(caption, nouns))
        texts += [phrase for phrase in phrases if phrase in frequent]
        offsets.append(len(texts))
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(texts, pa.string()))


def _iterate_captions(records: RecordTable) -> Iterator[list[str]]:
    for batch in records.iterate_batches(CAPTION_FIELDS):
        for fields in zip(*(column.to_pylist() for column in batch.columns), strict=True):
            yield [caption for captions in fields for caption in captions]
