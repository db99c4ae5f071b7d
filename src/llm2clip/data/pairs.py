"""Positive text pairs for the `tune` stage: data sources and batch sampling.

A pair consists of two captions of the same image, or is read from a text-pair dataset in the format of E5's training
data (arXiv 2212.03533): `{"query": ..., "positive": ..., "negatives": [...], "instruction": ...}`. The fields
`negatives` and `instruction` are optional.

The batches depend only on the data, the settings and the seed, and not on the number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer

from llm2clip.config import TuneConfig
from llm2clip.data.build_table import build_record_table, find_training_records, load_source_indices
from llm2clip.data.formats import BadRow, ReadOptions, find_source_files, read_rows
from llm2clip.data.image_facts import find_matching_images
from llm2clip.data.records import CAPTION_FIELDS, EARLY_CHECK_ROWS, NO_SPLIT, Source, guess_columns, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable, decode_file_name
from llm2clip.io_utils import DataFormatError, format_count, is_valid_unicode
from llm2clip.runs.ranks import print_once, process_state

PAIR_COLUMN_NAMES = {  # pair field -> common column names, in order of preference
    "query": ("query", "anchor", "question", "title"),
    "positive": ("positive", "pos", "positives", "document", "answer", "passage", "text"),
    "negatives": ("negatives", "negative", "neg", "hard_negatives"),
    "instruction": ("instruction", "instruct", "task"),
    "split": ("split",),
}
ITEMS_PER_READ = 1024  # number of images whose captions are read at once
MAX_VECTOR_DIM = 64  # maximum dimension of the vectors used to group similar captions


@dataclass(frozen=True, slots=True)
class Pair:
    """Positive pair of texts, with optional hard negatives."""

    anchor: str  # query
    positive: str  # text with the same meaning as the anchor, or an answer to the anchor
    negatives: tuple[str, ...] = ()  # known hard negatives
    instruction: str = ""  # text prepended to the anchor and excluded from pooling

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.anchor, self.positive)


@dataclass(frozen=True, slots=True)
class ImageCaptions:
    short: tuple[str, ...]
    long: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        return self.short + self.long


class CaptionItems:
    """Captions of the images in a record table, read from disk on demand."""

    def __init__(self, records: RecordTable) -> None:
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[ImageCaptions]:
        for batch in self.records.iterate_batches(CAPTION_FIELDS, ITEMS_PER_READ):
            columns = [column.to_pylist() for column in batch.columns]
            for captions, short, long in zip(*columns, strict=True):
                yield ImageCaptions(short=(*captions, *short), long=tuple(long))

    @cached_property
    def pairable_items(self) -> CaptionItems:
        """Images with at least two different captions."""
        is_pairable = np.fromiter(map(has_caption_pair, self), bool, len(self))
        return CaptionItems(self.records.select(is_pairable))


TuningItem = ImageCaptions | Pair
TuningItems = CaptionItems | Sequence[TuningItem]


# ---- sources ---------------------------------------------------------------------------------------------------------


def read_tuning_sources(
    train: RecordTable | None,
    held_out: Sequence[RecordTable],
    config: TuneConfig,
    columns: dict[str, str],
    log: SkipLog,
    training_sources: Sequence[str] = (),
    folder: Path | None = None,
) -> list[TuningItems]:
    """Read the training data for `tune`. Return the caption sources, followed by the text-pair sources.

    All caption sources except `train` are merged into one source. If no splits are selected for a source, only records
    with a training split or without a split are used. Held-out images are identified by their paths and contents
    and, in `config.data`, also by their ids; see `extract_comparable_id`.

    Args:
        train: Training records that have already been read. If not empty, they form the first caption source.
        held_out: Tables of records whose images must not be used for tuning.
        training_sources: Sources of the training captions. The sources can also contain the held-out images.

    Raises:
        ValueError: A source has too few pairs, or the data has neither text pairs nor images with two captions.
    """
    excluded_ids = _read_comparable_ids(config.exclude, columns, log)
    num_read = len(train or ())
    captions: list[CaptionItems] = []
    if train:
        captions.append(CaptionItems(train.select(~_find_records_by_id(train, excluded_ids))))
    if training_sources or config.data:
        records = build_record_table([*training_sources, *config.data], columns, log, "unchecked", folder)
        num_read += len(records)
        is_usable = _find_usable_records(records, held_out, training_sources, config)
        is_usable &= ~_find_records_by_id(records, excluded_ids)
        captions.append(CaptionItems(records.select(is_usable)))
    num_removed = num_read - sum(len(items) for items in captions)
    if config.exclude and not num_removed:
        print_once("--tune.exclude has no effect: the tuning data contains none of the excluded images")
    if config.steps and not config.text_pairs:
        require_caption_pairs(chain.from_iterable(captions))
    pairs = [list(read_text_pairs(path, log)) for path in config.text_pairs]
    if config.steps:
        resolve_pairs_per_step([*captions, *pairs], config.batch_size, process_state().num_processes)
    counts = [f"the captions of {format_count(len(items), 'image')}" for items in captions]
    counts += [format_count(len(items), "text pair") for items in pairs]
    removed = f"; {format_count(num_removed, 'image')} excluded" if num_removed else ""
    print_once(f"tuning on {' + '.join(counts)}{removed}")
    return [*captions, *pairs]


def require_caption_pairs(captions: Iterable[ImageCaptions]) -> None:
    if not any(map(has_caption_pair, captions)):
        raise ValueError(
            "no image has two different captions, which tuning needs as positive pairs. Use --tune.steps 0 to leave "
            "the LLM unchanged, or --tune.data to tune on a dataset with several captions per image"
        )


def _find_usable_records(
    records: RecordTable, held_out: Sequence[RecordTable], training_sources: Sequence[str], config: TuneConfig
) -> np.ndarray:
    """Return a boolean mask of shape (N,) that selects the records in selected splits that are not held out."""
    source_of_record = load_source_indices(records)
    training = [Source.parse(source) for source in training_sources]
    sources = [*training, *map(Source.parse, config.data)]
    is_usable = find_training_records(records) | np.array([bool(s.splits) for s in sources])[source_of_record]
    for table in held_out:
        is_usable &= ~find_matching_images(table, records)
    training_paths = {(source.path, source.splits) for source in training}
    is_training_source = np.array([(source.path, source.splits) in training_paths for source in sources])
    others = np.flatnonzero(is_usable & ~is_training_source[source_of_record])
    held_out_ids = {name for table in held_out for name in _list_ids_for_comparison(table)}
    is_usable[others] = ~_find_records_by_id(records.select(others), held_out_ids)
    return is_usable


def _read_comparable_ids(sources: Sequence[str], columns: dict[str, str], log: SkipLog) -> set[str]:
    ids: set[str] = set()
    for name in sources:
        records = open_records(Source.parse(name, columns), log, "ignore")
        ids.update(extract_comparable_id(record.id) for record in records)
    return ids


def _list_ids_for_comparison(records: RecordTable) -> Iterator[str]:
    for batch in records.iterate_batches(["id"]):
        for name in batch.column(0).to_pylist():
            yield extract_comparable_id(decode_file_name(name))


def _find_records_by_id(records: RecordTable, comparable_ids: Collection[str]) -> np.ndarray:
    if not comparable_ids:
        return np.zeros(len(records), bool)
    return np.fromiter((name in comparable_ids for name in _list_ids_for_comparison(records)), bool, len(records))


def extract_comparable_id(record_id: str) -> str:
    """Convert an image id to a form that is the same in all datasets that contain the image.

    Leading zeros are removed from numeric ids, because COCO uses them in its file names but not in its ids. If a
    non-numeric id starts with at least five digits, only these digits are returned. All other ids are unchanged.
    """
    if record_id.isdecimal():
        return record_id.lstrip("0") or "0"
    number = re.match(r"\d{5,}", record_id)
    return number[0] if number else record_id


def read_text_pairs(path: str, log: SkipLog | None = None) -> Iterator[Pair]:
    """Yield the pairs in a source (`PATH` or `PATH@SPLIT`) in order. Use only the first positive of each row.

    Raises:
        ValueError: The source has no query column, no positive column, or no pairs.
        TooManySkippedError: Too many rows were skipped.
    """
    log, source = SkipLog() if log is None else log, Source.parse(path)
    num_pairs, columns_known = 0, False
    options = ReadOptions(_choose_pair_columns, image_bytes=False, splits=source.splits, log=log)
    rows = chain.from_iterable(read_rows(file, options) for file in find_source_files(source.path))
    for row_file, number, fields in rows:
        if isinstance(fields, BadRow):
            log.count_rows(fields.rows)
            log.skip(row_file, number, fields.reason, fields.value, fields.rows)
            continue
        if source.splits and (_get_first_text(fields.get("split")) or NO_SPLIT) not in source.splits:
            continue
        log.count_rows(1)
        try:
            columns = _choose_pair_columns(row_file, list(fields))
            columns_known = True
        except DataFormatError:
            if not columns_known:  # the first row lacks the columns, so the file does not contain pairs
                raise
            columns = {}  # this JSON object lacks the required keys
        pair = _parse_pair_row(fields, columns)
        if pair.anchor == pair.positive or not pair.anchor or not pair.positive:
            log.skip(row_file, number, "missing or identical texts", f"{pair.anchor[:80]!r}, {pair.positive[:80]!r}")
            if log.rows_seen >= EARLY_CHECK_ROWS:
                log.check()
        elif not is_valid_unicode("".join([*pair.texts, *pair.negatives, pair.instruction])):
            log.skip(row_file, number, "not valid Unicode", pair)
        else:
            num_pairs += 1
            yield pair
    log.check()
    if not num_pairs:
        raise ValueError(f"{path}: no text pairs; {log.summary()}")


def _choose_pair_columns(file: str, columns: Sequence[str]) -> dict[str, str]:
    """Return a dict {pair field: column}. Raise `DataFormatError` if the query or positive column is missing."""
    chosen = guess_columns(PAIR_COLUMN_NAMES, columns)
    for field in ("query", "positive"):
        if field not in chosen:
            names = ", ".join(PAIR_COLUMN_NAMES[field])
            raise DataFormatError(
                f"{file}: no {field} column (expected one of {names}); the columns are {', '.join(columns)}"
            )
    return chosen


def _parse_pair_row(fields: Mapping[str, Any], columns: Mapping[str, str]) -> Pair:
    query = _get_first_text(fields.get(columns.get("query", "")))
    positive = _get_first_text(fields.get(columns.get("positive", "")))
    negatives = _list_cell_texts(fields.get(columns.get("negatives", "")))
    instruction = _get_first_text(fields.get(columns.get("instruction", "")))
    return Pair(
        anchor=query,
        positive=positive,
        negatives=tuple(text for text in negatives if text not in (query, positive)),
        # The instruction ends with a newline, because tokenizers would merge a space with the following word.
        instruction=f"{instruction}\n" if instruction else "",
    )


def _get_first_text(value: Any) -> str:
    return next(iter(_list_cell_texts(value)), "")


def _list_cell_texts(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


# ---- batches ---------------------------------------------------------------------------------------------------------


def iter_pair_batches(
    sources: Sequence[TuningItems], batch_size: int, steps: int, seed: int, hard_negative_group_size: int = 1
) -> Iterator[list[Pair]]:
    """Yield `steps` batches of `batch_size` pairs. Images without two different captions are ignored.

    Each batch comes from a single source, sampled in proportion to its number of items. No image or text occurs twice
    in a batch, so another caption of the anchor's image is never used as a negative. Items that would repeat an image
    or text are deferred to the source's next batch. Each pass over a source uses a new order and new pairs.

    `hard_negative_group_size` is the number of items per group of similar captions; see `draw_grouped_permutation`.

    Raises:
        ValueError: A source does not have enough usable items for a batch.
    """
    if any(not items for items in sources):
        raise ValueError("a source has no captions or pairs to tune on")
    batches = [
        _draw_pair_batches(items, batch_size, steps, seed + index, hard_negative_group_size)
        for index, items in enumerate(sources)
    ]
    num_items = np.array([float(len(items)) for items in sources])
    probabilities = num_items / np.sum(num_items)
    for index in np.random.default_rng([seed, len(sources)]).choice(len(sources), steps, p=probabilities):
        yield next(batches[index])


def resolve_pairs_per_step(sources: Sequence[TuningItems], batch_size: int, world_size: int) -> int:
    """Return the number of pairs per step across all ranks, which is `batch_size` per rank if there is enough data.

    If no source has that many items, the number is reduced until every source can fill a step with pairs that have no
    text in common. The number is then rounded down to a multiple of the number of ranks.

    Raises:
        ValueError: Only some of the sources have enough items, or a source is too small to fill a step.
    """
    pairs_per_step = batch_size * world_size
    usable = [select_pairable_items(items, 1) for items in sources]
    if max(map(len, usable)) < pairs_per_step:
        pairs_per_step = min(map(_count_unrelated_groups, usable)) // world_size * world_size
        if pairs_per_step < 2:
            raise ValueError(
                f"not enough texts for tuning on {format_count(world_size, 'rank')}: each step needs at least "
                f"{max(2, world_size)} pairs that have no text in common. Add data, or use --tune.steps 0 to leave "
                "the LLM unchanged"
            )
    for items in sources:
        select_pairable_items(items, pairs_per_step)
    return pairs_per_step


def select_pairable_items(items: TuningItems, batch_size: int) -> TuningItems:
    """Return the items that can form a pair: text pairs, and images with two different captions.

    Raises:
        ValueError: Fewer than `batch_size` items can form a pair.
    """
    usable: TuningItems
    if isinstance(items, CaptionItems):
        usable = items.pairable_items
    else:
        usable = [item for item in items if isinstance(item, Pair) or has_caption_pair(item)]
    if len(usable) < batch_size:
        available = format_count(len(usable), "text pair")
        if not any(isinstance(item, Pair) for item in items):
            available = f"{format_count(len(usable), 'image')} with two different captions"
        raise ValueError(
            f"a source has only {available}, but a batch needs {batch_size:,}. Lower --tune.batch_size, add data or "
            "remove the source"
        )
    return usable


def has_caption_pair(captions: ImageCaptions) -> bool:
    return len(set(captions.texts)) > 1


def draw_caption_pair(captions: ImageCaptions, rng: np.random.Generator) -> Pair:
    """Draw two different captions of an image.

    The kind of pair (short and short, short and long, or long and long) is drawn first, with equal probabilities.
    """
    kinds = _list_pair_kinds(captions)
    chosen = 0
    if len(kinds) > 1:
        chosen = int(rng.choice(len(kinds), p=np.full(len(kinds), 1 / len(kinds))))
    captions_a, captions_b = kinds[chosen]
    if captions_a is captions_b:
        first, second = rng.choice(len(captions_a), 2, replace=False)
        return Pair(captions_a[first], captions_a[second])
    texts = str(rng.choice(captions_a)), str(rng.choice(captions_b))
    anchor, positive = texts if rng.random() < 0.5 else texts[::-1]
    return Pair(anchor, positive)


def _count_unrelated_groups(items: TuningItems) -> int:
    """Count the groups of items that are connected by shared texts.

    Items in different groups share no text, so a batch can always contain one pair from each group.
    """
    parents = list(range(len(items)))  # union-find: each item's chain of parents ends at the root of its group

    def find_group_root(n: int) -> int:
        while parents[n] != n:
            parents[n] = parents[parents[n]]  # path halving
            n = parents[n]
        return n

    first_items: dict[str, int] = {}  # text -> first item that contains the text
    for n, item in enumerate(items):
        for text in item.texts:
            parents[find_group_root(n)] = find_group_root(first_items.setdefault(text, n))
    return sum(n == parent for n, parent in enumerate(parents))


def _list_pair_kinds(captions: ImageCaptions) -> list[tuple[list[str], list[str]]]:
    """Return (candidates for the first text, candidates for the second text) for each possible kind of pair."""
    short = list(dict.fromkeys(captions.short))
    long = [caption for caption in dict.fromkeys(captions.long) if caption not in short]
    kinds = []
    if len(short) > 1:
        kinds.append((short, short))
    if short and long:
        kinds.append((short, long))
    if len(long) > 1:
        kinds.append((long, long))
    return kinds


def _draw_pair_batches(
    items: TuningItems, batch_size: int, steps: int, seed: int, group_size: int
) -> Iterator[list[Pair]]:
    usable = select_pairable_items(items, batch_size)
    rng = np.random.default_rng(seed)
    vectors = np.empty((len(usable), 0))
    if group_size > 1:
        vectors = compute_caption_vectors(item.texts for item in usable)
    upcoming: Iterator[tuple[int, TuningItem]] = iter(())  # (index, item) of each remaining item in this pass
    waiting: list[tuple[int, TuningItem]] = []  # items deferred by earlier batches, in reverse order
    for _ in range(steps):
        pairs: list[Pair] = []
        used_texts: set[str] = set()
        used_items: set[int] = set()
        deferred: list[tuple[int, TuningItem]] = []
        num_conflicts = 0
        while len(pairs) < batch_size:
            entry = waiting.pop() if waiting else next(upcoming, None)
            if entry is None:  # start a new pass that excludes the deferred items
                order = draw_grouped_permutation(vectors, group_size, rng)[::-1]
                upcoming = _read_items(usable, order[~np.isin(order, [index for index, _ in deferred])])
                entry = next(upcoming, None)
            if entry is None:  # only deferred items remain, so draw other captions from these items
                waiting, deferred = deferred, []
                entry = waiting.pop()
            index, item = entry
            pair = item if isinstance(item, Pair) else draw_caption_pair(item, rng)
            if index in used_items or pair.anchor in used_texts or pair.positive in used_texts:
                deferred.append(entry)
                num_conflicts += 1
                if num_conflicts > 10 * len(usable):
                    raise ValueError(
                        f"cannot fill a batch: a source has fewer than {batch_size} pairs that share no text. Lower "
                        "--tune.batch_size"
                    )
                continue
            num_conflicts = 0
            used_items.add(index)
            used_texts.update(pair.texts)
            pairs.append(pair)
        waiting.extend(reversed(deferred))  # the earliest deferred items are used first
        yield pairs


def _read_items(items: TuningItems, order: np.ndarray) -> Iterator[tuple[int, TuningItem]]:
    """Yield (index, item) for each index in `order`. Items in a record table are read in batches."""
    for start in range(0, len(order), ITEMS_PER_READ):
        indices = order[start : start + ITEMS_PER_READ]
        if isinstance(items, CaptionItems):
            yield from zip(indices.tolist(), CaptionItems(items.records.select(indices)), strict=True)
        else:
            yield from ((index, items[index]) for index in indices.tolist())


# ---- groups of similar captions --------------------------------------------------------------------------------------

# In a random batch, most negatives describe a different subject and soon become too easy.
# Each pass over the data therefore groups similar captions with a random projection tree.
# Similarity is based on TF-IDF, which is fast to compute and reproduces the same groups when a run is resumed.


def compute_caption_vectors(captions: Iterable[Sequence[str]]) -> np.ndarray:
    """Compute an L2-normalised vector from each item's captions. Return shape (N, D), float32, with D at most 64.

    The vectors are computed with latent semantic analysis (TF-IDF followed by truncated SVD). Each item takes about
    3 KB of memory.
    """
    documents = (" ".join(texts) for texts in captions)
    tfidf = TfidfVectorizer(analyzer=_split_words, sublinear_tf=True).fit_transform(documents)
    dimension = min(MAX_VECTOR_DIM, min(tfidf.shape) - 1)
    if dimension < 1:
        return np.zeros((tfidf.shape[0], 1), np.float32)
    vectors = TruncatedSVD(dimension, random_state=0).fit_transform(tfidf)
    vectors = vectors - vectors.mean(0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.maximum(norms, 1e-12)).astype(np.float32)


def draw_grouped_permutation(vectors: np.ndarray, group_size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random permutation of N items, as int64 indices, in which groups of similar items stay together.

    `vectors` has shape (N, D); see `compute_caption_vectors`. Each call forms new groups of at most `group_size` items.
    """
    if group_size <= 1:
        return rng.permutation(len(vectors))
    groups = _split_into_similar_groups(vectors, rng.permutation(len(vectors)), group_size, rng)
    if not groups:
        return np.empty(0, np.int64)
    return np.concatenate([groups[i] for i in rng.permutation(len(groups))])


def _split_into_similar_groups(
    vectors: np.ndarray, items: np.ndarray, group_size: int, rng: np.random.Generator
) -> list[np.ndarray]:
    """Recursively halve the items along random directions until each group has at most `group_size` items."""
    if len(items) <= group_size:
        return [items] if len(items) else []
    direction = rng.standard_normal(vectors.shape[1], dtype=np.float32)
    ordered = items[np.argsort(vectors[items] @ direction, kind="stable")]
    half = max(1, len(items) // group_size // 2) * group_size
    return _split_into_similar_groups(vectors, ordered[:half], group_size, rng) + _split_into_similar_groups(
        vectors, ordered[half:], group_size, rng
    )


def _split_words(text: str) -> list[str]:
    """Split a text into words or, in scripts without spaces such as Thai and Chinese, into characters."""
    return re.findall(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|\w+", text.lower()) or [text]
