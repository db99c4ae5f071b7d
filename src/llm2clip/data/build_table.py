"""Construction of record tables from data sources, and the split into training records and held-out records.

A data source is read in parts. Each part is a file or a section of a large file. The rows of a part are saved in a file
whose name is a hash of everything that affects the rows. An interrupted run resumes with the parts that have not been
saved, and only changed files are read again. Saved files end with a checksum. Corrupt files are rebuilt.

    FOLDER/
      parts/HASH.arrow    rows of one part, and the log of its skipped rows
      tables/HASH/        rows.npy, merged.arrow, sources.npy, copies.npy, and files derived from the table
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from llm2clip.config import EvaluateConfig
from llm2clip.data.formats import UNREADABLE_FILE, FilePart, find_source_files, split_file_into_parts
from llm2clip.data.image_facts import (
    MISSING_IMAGE,
    TOO_LARGE_IMAGE,
    UNREADABLE_IMAGE,
    ImageFacts,
    find_duplicate_images,
    find_first_occurrences,
    find_matching_images,
)
from llm2clip.data.records import (
    CAPTION_FIELDS,
    NO_SPLIT,
    ImageCheck,
    ReadSummary,
    Record,
    RecordReader,
    Source,
    merge_records,
)
from llm2clip.data.remote import get_file_size, pin_versions, prefetch_remote_files
from llm2clip.data.skip_log import RecordingSkipLog, SkipLog
from llm2clip.data.storage import is_remote
from llm2clip.data.table import RecordBatches, RecordTable, decode_file_name, read_arrow_metadata, write_record_rows
from llm2clip.io_utils import (
    append_checksum,
    atomic_dir,
    atomic_path,
    format_count,
    get_cache_dir,
    has_valid_checksum,
    remove_path,
)
from llm2clip.parallel import count_cores, map_in_processes
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import hold_folder_lock

FORMAT_VERSION = 5  # increment when the file formats or the merge rules change
PART_BYTES = 16 << 20  # approximate size of each part of a large file
MIN_PARALLEL_BYTES = 8 << 20  # smaller sources are read in the main process, because starting workers takes about 1 s
START_TIME = time.time_ns()  # approximate start time of this process, in nanoseconds since the epoch
PREFETCH_FILES = 8  # number of remote files to download in advance
MAX_VERIFIED_BYTES = 1 << 30  # to save time, parts beyond this total size are not verified
UNUSED_DAYS = 30  # saved files that have not been used for this number of days are deleted

ARRAY_FILES = ("rows.npy", "sources.npy", "copies.npy")
CORRUPT_FILE = "corrupt, and therefore rebuilt"
TRAIN_SPLITS = (NO_SPLIT, "train", "training", "restval")
HELD_OUT_SPLITS = ("val", "validation", "valid", "dev", "test")  # the first of these splits that exists is held out
HELD_OUT_DIVISOR = 10  # if the data has no held-out split, 1 in 10 images is held out
MAX_HELD_OUT = 1000  # maximum number of held-out images if the data has no held-out split


class NoImagesError(ValueError):
    """Raised when images are required but no record has an image."""


def build_record_table(
    sources: Sequence[str | Source],
    columns: dict[str, str],
    log: SkipLog,
    image_check: ImageCheck = "header",
    folder: Path | None = None,
    workers: int | None = None,
    require_captions: bool = True,
) -> RecordTable:
    """Read data sources into a table with one record per image, in order of first appearance.

    Rows with the same image are merged, even across sources. The merged record contains all distinct captions, and the
    id, split and source of the first row. Image files with identical bytes are treated as the same image. Rows without
    an image are merged if they have the same id, source path and split. Merging takes about 60 bytes of memory per row.

    The saved rows of an unchanged caption file are reused, unless an image that was missing or invalid has since been
    added or modified.

    Args:
        columns: Mapping from record fields to column names. Takes precedence over the mapping of a `Source`.
        image_check: See `open_records`. With "ignore", image files are not compared by content.
        folder: Folder in which the table is saved. Default: a folder in the user's cache directory.
        workers: Number of worker processes. Default: one per CPU core, or none for small sources.
        require_captions: See `open_records`.

    Raises:
        NoImagesError: No record has an image, and `image_check` is "header".
        ValueError: See `open_records`.
    """
    folder = folder or get_cache_dir() / "records"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # private folder, because image URLs can contain credentials
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    parsed = [Source.parse(source, columns) for source in sources]
    with hold_folder_lock(folder, "lock", timeout=-1):
        _delete_unused_table_files(folder)
        tasks = _list_part_tasks(parsed, log, image_check, require_captions, folder)
        _read_unsaved_parts(tasks, log, workers)
        table_folder = _build_merged_table(tasks, log, image_check, folder)
    log.count_duplicate_images(np.load(table_folder / "copies.npy"))
    files = [*(task.file for task in tasks), *table_folder.glob("merged.arrow")]
    rows = np.load(table_folder / "rows.npy", mmap_mode="r")
    table = RecordTable(RecordBatches.open(list(map(str, files))), rows, table_folder)
    if image_check == "header" and len(table) and not table.has_image.any():
        message = (
            f"{', '.join(map(str, parsed))}: no record has an image ({format_count(len(table), 'record')}). Only "
            "`tune` and `embed` accept text-only data"
        )
        raise NoImagesError("\n".join([message, *log.list_notes()]))
    return table


def load_source_indices(table: RecordTable) -> np.ndarray:
    """Return the source index of each record in a table from `build_record_table`, of shape (N,), int16."""
    assert table.folder is not None
    return np.load(table.folder / "sources.npy")


# ---- parts -----------------------------------------------------------------------------------------------------------


@dataclass
class _PartTask:
    """Task that reads one part of a source and saves the rows in `file`."""

    source_index: int
    source: Source
    part: FilePart
    image_check: ImageCheck
    require_captions: bool
    file: Path
    version: str | None = None  # pinned version of a remote file
    summary: ReadSummary | None = None  # None until the part has been read

    def open_reader(self, log: SkipLog) -> RecordReader:
        return RecordReader(self.source, log, self.image_check, self.require_captions)


def _list_part_tasks(
    sources: Sequence[Source], log: SkipLog, image_check: ImageCheck, require_captions: bool, folder: Path
) -> list[_PartTask]:
    tasks = []
    num_bytes = 0
    for index, source in enumerate(sources):
        for source_file in find_source_files(source.path, log=log):
            path, source_format = source_file.path, source_file.format
            version = source_format.compute_version(path)
            absolute_path = path if is_remote(path) else os.path.abspath(path)
            settings = [FORMAT_VERSION, source_format.name, path, absolute_path, version, source.path]
            settings += [source.splits, sorted(source.columns.items()), image_check, require_captions]
            pinned = version if is_remote(path) and not source_format.is_folder else None
            for part in split_file_into_parts(source_file, PART_BYTES):
                file = folder / "parts" / f"{_hash_json([*settings, part.start, part.stop])}.arrow"
                summary = None
                if file.exists():
                    num_bytes += file.stat().st_size
                    summary = _load_table_part_summary(file, verify=num_bytes <= MAX_VERIFIED_BYTES)
                    if summary is None:
                        log.add_note(CORRUPT_FILE, str(file))
                if summary is None or _should_reread_part(part, summary):
                    remove_path(file)
                    summary = None
                tasks.append(_PartTask(index, source, part, image_check, require_captions, file, pinned, summary))
    return tasks


def _load_table_part_summary(file: Path, verify: bool) -> ReadSummary | None:
    """Return the summary of a saved part, or None if the file is corrupt. If `verify` is True, check its checksum."""
    with suppress(OSError, ValueError, LookupError, TypeError, pa.ArrowException):
        if not verify or has_valid_checksum(file):
            return ReadSummary(**read_arrow_metadata(str(file), "summary"))
    return None


def _should_reread_part(part: FilePart, summary: ReadSummary) -> bool:
    """Return True if an unchanged file must be read again because a download failed or a skipped image has changed."""
    skipped = [event for event in summary.events if event[0] == "skip"]  # see `SkipLog.skip`
    # A new run retries failed downloads, but all processes of one run must use the same rows.
    if is_remote(part.path) and summary.read_at < START_TIME and any(e[3] == UNREADABLE_FILE for e in skipped):
        return True
    for _, _, _, reason, value, _ in skipped:
        if reason in (MISSING_IMAGE, UNREADABLE_IMAGE, TOO_LARGE_IMAGE):
            path = value if reason == MISSING_IMAGE else value.split(": ")[0]
            with suppress(OSError, ValueError):
                changed_at = os.stat(path).st_mtime_ns
                if reason == MISSING_IMAGE or changed_at > summary.read_at:
                    return True
    return False


def _read_unsaved_parts(tasks: Sequence[_PartTask], log: SkipLog, workers: int | None) -> None:
    """Read all parts that have no saved summary. Check each source as soon as all of its parts have been read."""
    missing = {task.file: task for task in tasks if task.summary is None}
    work = _estimate_read_bytes([task.part for task in missing.values()])
    if workers is None:
        workers = count_cores() if work >= MIN_PARALLEL_BYTES else 1
    new_parts = iter(map_in_processes(_read_and_save_part, list(missing.values()), workers))
    files = [task.part.path for task in missing.values()]
    hide = work < MIN_PARALLEL_BYTES or not missing
    num_rows = 0
    with ProgressBar(total=len(tasks), desc="reading data", unit="part", disable=hide) as bar:
        for _, parts in groupby(tasks, key=attrgetter("source_index")):
            source_tasks = list(parts)
            reader = source_tasks[0].open_reader(log)
            for task in source_tasks:
                prefetch_remote_files(files[len(files) - len(missing) :][:PREFETCH_FILES])
                if missing.pop(task.file, None) is not None and (error := next(new_parts)) is not None:
                    raise error
                os.utime(task.file)
                task.summary = task.summary or ReadSummary(**read_arrow_metadata(str(task.file), "summary"))
                reader.add_summary(task.summary)
                num_rows += task.summary.num_records
                bar.set_postfix_str(f"{num_rows:,} rows", refresh=False)
                bar.update()
            reader.check_complete_source()


def _estimate_read_bytes(parts: Sequence[FilePart]) -> float:
    """Estimate the number of bytes to read: the text in local files, and all bytes of remote files."""
    formats = {part.path: part.format for part in parts}
    work = 0.0
    for path, source_format in formats.items():
        if is_remote(path) and not source_format.is_folder:
            work += get_file_size(path)
        elif os.path.isfile(path):
            work += get_file_size(path) * source_format.text_share
    return work


def _read_and_save_part(task: _PartTask) -> Exception | None:
    """Save the rows of a part. Return an exception instead of raising it, so that exceptions are raised in order."""
    if task.version is not None:
        pin_versions({task.part.path: task.version})
    log = RecordingSkipLog()
    reader = task.open_reader(log)
    rows = ((record, task.source.path, facts) for record, facts in reader.read_part(task.part, hash_images=True))
    try:
        with atomic_path(task.file) as file:
            write_record_rows(file, rows, lambda: vars(reader.build_read_summary(log)))
    except (ValueError, OSError) as error:
        return error
    return None


# ---- merging ---------------------------------------------------------------------------------------------------------


def _build_merged_table(tasks: Sequence[_PartTask], log: SkipLog, image_check: ImageCheck, folder: Path) -> Path:
    """Build and save the merged table unless a valid copy exists. Return the folder of the table."""
    summaries = [task.summary for task in tasks if task.summary is not None]
    source_paths = {task.source_index: task.source.path for task in tasks}
    # Reading a part again can yield different rows, so the hash includes the time at which each part was read.
    names = [(task.source_index, task.file.name, part.read_at) for task, part in zip(tasks, summaries, strict=True)]
    table_folder = folder / "tables" / _hash_json([FORMAT_VERSION, names, list(source_paths.values())])
    if table_folder.exists():
        if _has_valid_checksums(table_folder):
            os.utime(table_folder)
            return table_folder
        log.add_note(CORRUPT_FILE, str(table_folder))
    remove_path(table_folder)
    record_batches = RecordBatches.open([str(task.file) for task in tasks])
    table = RecordTable(record_batches, np.arange(record_batches.num_rows))
    num_rows = [summary.num_records for summary in summaries]
    source_of_row = np.repeat(np.array([task.source_index for task in tasks], np.int16), num_rows)
    first = find_first_occurrences(table.get_numeric_column("key_high"), table.get_numeric_column("key_low"))
    copies, originals = find_duplicate_images(table, first) if image_check != "ignore" else np.empty((2, 0), np.int64)
    final = first.copy()  # for each row, the first row with the same image
    final[copies] = originals
    final = final[first]
    num_members = np.bincount(final, minlength=len(final))
    kept = np.flatnonzero(final == np.arange(len(final)))
    origins = kept[num_members[kept] > 1]  # first row of each group of rows with the same image
    rows = kept.copy()
    rows[num_members[kept] > 1] = len(final) + np.arange(len(origins))
    members = np.flatnonzero(num_members[final] > 1)
    members = members[np.lexsort((members, first[members], final[members]))]
    small = np.int32 if len(final) + len(origins) < 2**31 else np.int64
    with atomic_dir(table_folder) as temporary:
        np.save(temporary / "rows.npy", rows.astype(small))
        np.save(temporary / "sources.npy", source_of_row[kept])
        np.save(temporary / "copies.npy", table.select(copies).get_numeric_column("key_high"))
        for name in ARRAY_FILES:
            append_checksum(temporary / name)
        if len(origins):
            paths = [source_paths[index] for index in source_of_row[origins].tolist()]
            merged = _build_merged_records(table, members, final[members], paths)
            write_record_rows(temporary / "merged.arrow", merged, lambda: None)
    return table_folder


def _has_valid_checksums(table_folder: Path) -> bool:
    files = [table_folder / name for name in ARRAY_FILES]
    merged = table_folder / "merged.arrow"
    if merged.exists() and merged.stat().st_size <= MAX_VERIFIED_BYTES:
        files.append(merged)
    return all(file.is_file() and has_valid_checksum(file) for file in files)


def _build_merged_records(
    table: RecordTable, members: np.ndarray, groups: np.ndarray, source_paths: Sequence[str]
) -> Iterator[tuple[Record, str, ImageFacts]]:
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    first_members = table.select(members[starts])
    facts = [first_members.column(name).to_pylist() for name in ("width", "height", "image_hash", "digest")]
    records_by_group = groupby(zip(groups.tolist(), table.select(members), strict=True), key=itemgetter(0))
    for source_path, *values, (_, rows) in zip(source_paths, *facts, records_by_group, strict=True):
        merged = merge_records([record for _, record in rows], distinct=True)
        yield merged, source_path, ImageFacts(*values)


def _delete_unused_table_files(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86_400
    for path in [*(folder / "parts").iterdir(), *(folder / "tables").iterdir()]:
        if path.lstat().st_mtime < oldest:
            remove_path(path)


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


# ---- splits ----------------------------------------------------------------------------------------------------------


@dataclass
class DataSplits:
    """Training records and held-out records.

    `held_out` contains one table of held-out images per caption field and per column in `EvaluateConfig.fields`. The
    captions in each table come only from that field or column.
    """

    records: RecordTable  # all records, including records in unused splits
    train: RecordTable
    held_out: dict[str, RecordTable]
    summary: str
    rule: str  # message that explains how the held-out images were chosen and how to train on all images


def read_data_splits(
    sources: Sequence[str],
    config: EvaluateConfig,
    columns: dict[str, str],
    log: SkipLog,
    image_check: ImageCheck = "header",
    keep_selected_splits: bool = False,
    folder: Path | None = None,
) -> DataSplits:
    """Read data sources and divide their records into training records and held-out records.

    If splits are selected for a source, as in `PATH@train+none`, all records in the selected splits can be used for
    training. Otherwise, only records with a training split or without a split can be used. The first rule that applies
    determines the held-out records:

    1. If `config.data` lists sources, their records are held out, and their images are removed from the training data.
    2. If a source has a split named val, validation, valid, dev or test, the first of these splits that exists is held
       out.
    3. Otherwise, a tenth of the training images (at most 1,000) is held out, chosen by a hash of each record. No image
       is held out from a source with selected splits, unless all sources have selected splits and
       `keep_selected_splits` is False.
    """
    records = build_record_table(sources, columns, log, image_check, folder)
    parsed = [Source.parse(source) for source in sources]
    source_of_record = load_source_indices(records)
    has_selection = np.array([bool(source.splits) for source in parsed], bool)[source_of_record]
    split_names, split_of_record = _read_split_names(records)
    is_selected = has_selection | _find_records_in_splits(split_names, split_of_record, TRAIN_SPLITS)
    other_splits = {split_names[n].lower() for n in np.unique(split_of_record[~is_selected])}
    held_out_split = next((name for name in HELD_OUT_SPLITS if name in other_splits), None)
    is_held_out = np.zeros(len(records), bool)
    notes: list[str] = []
    if config.data:
        parsed = [Source.parse(source) for source in config.data]
        held_out = build_record_table(config.data, columns, log, image_check, folder)
        source_of_held_out = load_source_indices(held_out)
        is_leaked = is_selected & find_matching_images(held_out, records)
        is_training = is_selected & ~is_leaked
        if is_leaked.any():
            notes.append(f"{format_count(int(is_leaked.sum()), 'held-out image')} removed from training")
    else:
        if held_out_split is not None:
            is_held_out = ~is_selected & _find_records_in_splits(split_names, split_of_record, (held_out_split,))
        elif not (keep_selected_splits and all(source.splits for source in parsed)):
            is_held_out = _choose_held_out_records(records, is_selected, has_selection)
        is_training = is_selected & ~is_held_out
        held_out, source_of_held_out = records.select(is_held_out), source_of_record[is_held_out]
    unused = split_of_record[~is_selected & ~is_held_out]
    if len(unused):
        names = ", ".join(_list_split_names(split_names, unused))
        notes.append(f"{format_count(len(unused), 'record')} from other splits ({names}) not used")
    held_out_sources = [parsed[n] for n in np.unique(source_of_held_out[held_out.has_image])]
    held_out = held_out.select(held_out.has_image)
    train = records.select(is_training)
    pa.default_memory_pool().release_unused()  # returns the memory of temporary columns to the operating system
    return DataSplits(
        records=records,
        train=train,
        held_out=_build_tables_by_caption_field(held_out, held_out_sources, config.fields, columns, folder),
        summary=", ".join(
            [format_count(int(train.has_image.sum()), "training image"), f"{len(held_out):,} held out", *notes]
        ),
        rule=_describe_held_out_rule(len(held_out), held_out_split, split_names, split_of_record[records.has_image]),
    )


def _describe_held_out_rule(
    num_held_out: int, held_out_split: str | None, split_names: Sequence[str], split_of_image: np.ndarray
) -> str:
    reason = f"the {held_out_split} split"
    if held_out_split is None:
        reason = f"one in {HELD_OUT_DIVISOR}, at most {MAX_HELD_OUT:,}, because no split is named {HELD_OUT_SPLITS[0]}"
        reason += f" or {HELD_OUT_SPLITS[-1]}"
    return (
        f"{format_count(num_held_out, 'held-out image')} out of {len(split_of_image):,} ({reason}). To use all images, "
        f"list their splits: PATH@{'+'.join(_list_split_names(split_names, split_of_image))}"
    )


def _list_split_names(split_names: Sequence[str], splits: np.ndarray) -> list[str]:
    return sorted(split_names[n] for n in np.unique(splits))


def find_training_records(records: RecordTable) -> np.ndarray:
    """Return a boolean mask of shape (N,) that selects the records with a training split or without a split."""
    return _find_records_in_splits(*_read_split_names(records), TRAIN_SPLITS)


def _read_split_names(records: RecordTable) -> tuple[list[str], np.ndarray]:
    """Return the split names, and an array of shape (N,) with the index of each record's split."""
    encoded = pc.fill_null(records.column("split"), NO_SPLIT.encode()).dictionary_encode().unify_dictionaries()
    names = encoded.chunk(0).dictionary.to_pylist() if encoded.num_chunks else []
    indices = [chunk.indices.to_numpy() for chunk in encoded.chunks]
    return [decode_file_name(name) for name in names], np.concatenate([np.empty(0, np.int32), *indices])


def _find_records_in_splits(names: Sequence[str], split_of_record: np.ndarray, splits: Sequence[str]) -> np.ndarray:
    is_selected = np.array([name.lower() in splits for name in names], bool)
    return is_selected[split_of_record] if len(names) else np.zeros(len(split_of_record), bool)


def _choose_held_out_records(records: RecordTable, is_training: np.ndarray, has_selection: np.ndarray) -> np.ndarray:
    """Choose the images with the lowest hashes. Return a boolean mask of shape (N,) that selects their records."""
    is_candidate = is_training & ~has_selection
    if not is_candidate.any():
        is_candidate = is_training
    candidates = np.flatnonzero(is_candidate & records.has_image)
    count = min(MAX_HELD_OUT, max(1, len(candidates) // HELD_OUT_DIVISOR))
    hashes = records.select(candidates).get_numeric_column("draw_hash")
    is_held_out = np.zeros(len(records), bool)
    is_held_out[candidates[np.argsort(hashes, kind="stable")[:count]]] = True
    return is_held_out


def _build_tables_by_caption_field(
    held_out: RecordTable,
    sources: Sequence[Source],
    extra_columns: Sequence[str],
    columns: dict[str, str],
    folder: Path | None,
) -> dict[str, RecordTable]:
    """Return one table per caption field. For each extra caption column, the sources are read once more."""
    fields = {"captions": held_out.select(held_out.count_texts("captions") > 0)}
    for name in CAPTION_FIELDS[1:]:
        if held_out.count_texts(name).any():
            fields[name] = held_out.use_field_as_captions(name)
    sources = [Source(path, splits) for path, splits in dict.fromkeys((s.path, s.splits) for s in sources)]
    for name in extra_columns:
        only_this_column = {**columns, **dict.fromkeys(CAPTION_FIELDS, ""), "captions": name}
        quiet = SkipLog(max_skipped=1.0)  # rows without a caption in the extra column are expected
        candidates = build_record_table(sources, only_this_column, quiet, "header", folder)
        fields[name] = candidates.select(find_matching_images(held_out, candidates))
    return fields
