"""Adding phrases to a record table. They are extracted once, by several processes, and saved with the table."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from filelock import FileLock

from llm2clip.data.blocks import TEXTS
from llm2clip.data.columns import CAPTION_FIELDS
from llm2clip.data.image_refs import map_batches
from llm2clip.data.noun_phrases import (
    MIN_IMAGES,
    RULES_VERSION,
    CaptionBatch,
    PhraseCounts,
    count_lone_nouns,
    count_phrases,
    find_phrases,
    is_english,
)
from llm2clip.data.parallel import map_in_processes
from llm2clip.data.table import RecordTable
from llm2clip.io_utils import atomic_path
from llm2clip.progress import ProgressBar

BATCH_IMAGES = 1 << 13  # images whose captions are tokenized at once
PART_IMAGES = 1 << 17  # images that a worker process is given at once
MIN_PARALLEL_IMAGES = 200_000  # smaller tables are processed by this process, because starting others takes seconds
LANGUAGE_SAMPLES = 10_000  # maximum number of captions whose language is checked
T = TypeVar("T")


def add_phrases(records: RecordTable) -> RecordTable:
    """Return the records with phrases extracted from their captions. Print a message if there are none.

    The records are returned unchanged if any record already has phrases from a data column, or if the captions are not
    in English. The phrases are saved in the table's folder, and mapped into memory when they are needed again.

    Time: about 20 microseconds of CPU per image. Memory: about 300 MB per process. In this process, 100 more bytes
    per distinct phrase while phrases are counted, and 4 bytes per record.
    """
    from llm2clip.runs.ranks import print_once  # imports PyTorch, which worker processes do not need

    if records.folder is None:
        if _has_phrases(records):
            return records
        phrases = list(_extract_phrases(records))
    else:
        file = records.folder / f"phrases-{_hash_view(records)}.arrow"
        with FileLock(records.folder / "phrases.lock"):
            if not file.exists():
                if _has_phrases(records):
                    return records
                _write_phrases(file, _extract_phrases(records))
        phrases = [batch.column(0) for batch in map_batches(str(file))]
    if not any(len(lists.values) for lists in phrases):
        print_once(
            "No short phrases are used: the captions are not in English, or no phrase occurs in the captions of "
            f"{MIN_IMAGES} or more images. To use your own phrases, add a `phrases` column to the data"
        )
        return records
    return records.with_phrases(pa.chunked_array(phrases, TEXTS))


def _has_phrases(records: RecordTable) -> bool:
    """Return True if any record has phrases."""
    return any(len(batch.column(0).flatten()) for batch in records.iterate_batches(["phrases"]))


def _hash_view(records: RecordTable) -> str:
    """Return a hash of what determines the phrases of a table in a folder: the rows, the caption column and the rules.

    The contents of the rows do not need to be hashed, because the name of the folder identifies them.
    """
    digest = hashlib.sha256(f"{RULES_VERSION} {records.resolve_field('captions')} {records.rows.dtype}".encode())
    digest.update(np.ascontiguousarray(records.rows).data)
    return digest.hexdigest()[:32]


def _write_phrases(file: Path, phrases: Iterator[pa.ListArray]) -> None:
    with atomic_path(file) as temporary, pa.OSFile(str(temporary), "wb") as stream:
        schema = pa.schema([("phrases", TEXTS)])
        with pa.ipc.new_file(stream, schema) as writer:
            for lists in phrases:
                writer.write_batch(pa.RecordBatch.from_arrays([lists], schema=schema))


def _extract_phrases(records: RecordTable) -> Iterator[pa.ListArray]:
    """Yield the phrases of all records, in chunks. Yield nothing if the captions are not in English."""
    if not is_english(_sample_captions(records)):
        return
    parts = records.split(PART_IMAGES)
    is_parallel = len(records) >= MIN_PARALLEL_IMAGES and records.folder is not None
    with ProgressBar(total=3 * len(parts), desc="extracting phrases", unit="part", disable=not is_parallel) as bar:

        def process(function: Callable[[RecordTable], T]) -> Iterator[T]:
            for result in map_in_processes(function, parts, None if is_parallel else 1):
                yield result
                bar.update()

        noun_counts = Counter[str]()
        for counts in process(_count_part_nouns):
            noun_counts.update(counts)
        nouns = sorted(noun for noun, count in noun_counts.items() if count >= MIN_IMAGES)
        frequent = PhraseCounts.merge(process(partial(_count_part_phrases, nouns=nouns))).select_frequent()
        yield from process(partial(_find_part_phrases, nouns=nouns, frequent=frequent))


def _sample_captions(records: RecordTable) -> list[str]:
    """Return evenly spaced captions."""
    counts = np.zeros(len(records), np.int64)
    for field in CAPTION_FIELDS:
        counts += records.count_texts(field)
    stops = np.cumsum(counts)  # number of captions of the records up to and including each record
    total = int(counts.sum())
    numbers = np.arange(0, total, total // LANGUAGE_SAMPLES + 1)
    positions, record_of_number = np.unique(np.searchsorted(stops, numbers, side="right"), return_inverse=True)
    texts = list(records.select(positions).iterate_texts(CAPTION_FIELDS))
    num_skipped = stops[positions] - np.cumsum(counts[positions])  # captions of earlier records that are not in `texts`
    return [texts[index] for index in (numbers - num_skipped[record_of_number]).tolist()]


# ---- functions of worker processes -----------------------------------------------------------------------------------


def _count_part_nouns(records: RecordTable) -> Counter[str]:
    return count_lone_nouns(_read_captions(records))


def _count_part_phrases(records: RecordTable, nouns: Sequence[str]) -> PhraseCounts:
    return count_phrases(_read_captions(records), nouns)


def _find_part_phrases(records: RecordTable, nouns: Sequence[str], frequent: np.ndarray) -> pa.ListArray:
    return pa.concat_arrays(list(find_phrases(_read_captions(records), nouns, frequent)))


def _read_captions(records: RecordTable) -> Iterator[CaptionBatch]:
    for batch in records.iterate_batches(CAPTION_FIELDS, BATCH_IMAGES):
        yield CaptionBatch.from_columns(batch.columns)
