"""Building and opening record tables.

Sources are read in parts, a part being a file or a range of a large file. The rows of each part are saved in an Arrow
file whose name is a hash of everything that affects them. A table lists its parts, the rows that it uses, and the rows
that result from merging several rows with the same image:

    FOLDER/
      parts/HASH.arrow         rows of one part, and what was skipped
      tables/HASH/             rows.npy, merged.arrow, sources.npy, copies.npy; files derived from the table

So reading continues after an interruption, and if a source file changes, only this file is read again. None of this
depends on the number of processes.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from llm2clip.data.columns import TEXT_FIELDS
from llm2clip.data.formats import find_files
from llm2clip.data.formats.base import FilePart, split_file
from llm2clip.data.image_facts import ImageFacts
from llm2clip.data.image_hashes import hash_contents
from llm2clip.data.image_refs import IMAGE_KINDS
from llm2clip.data.parallel import count_cores, map_in_processes
from llm2clip.data.records import ImageCheck, ReadSummary, Record, RecordReader, Source
from llm2clip.data.remote import get_file_size, is_remote, pin_versions, prefetch
from llm2clip.data.skip_log import EventLog, SkipLog
from llm2clip.data.table import Blocks, RecordTable, read_metadata, write_rows
from llm2clip.data.texts import deduplicate_captions
from llm2clip.io_utils import atomic_dir, atomic_path, get_cache_dir
from llm2clip.progress import ProgressBar

FORMAT_VERSION = 3  # increase it if the columns, their contents or the rules for merging change
PART_BYTES = 16 << 20  # approximate size of a part of a large file
MIN_PARALLEL_BYTES = 8 << 20  # smaller sources are read in this process, because starting processes takes a second
START_TIME = time.time_ns()  # approximate start of this process
BATCH_IMAGES = 1 << 14  # number of images whose references are in memory at a time
PREFETCH_FILES = 8  # number of remote files to download ahead
UNUSED_DAYS = 30  # parts and tables that have not been opened for this long are deleted


class NoImagesError(ValueError):
    """Images are checked, but no record has an image."""


def open_table(
    sources: Sequence[str | Source],
    columns: dict[str, str],
    log: SkipLog,
    image_check: ImageCheck = "header",
    folder: Path | None = None,
    workers: int | None = None,
) -> RecordTable:
    """Read all records from several sources, and merge records with the same image.

    Sources that were read before are not read again, unless their files have changed. Of the image files that a caption
    file lists, only those that could not be used are checked again.

    Rows with the same image are merged into one record with all their distinct captions, even if the sources differ.
    The merged record keeps the id, split and source of the first row. Image files with the same bytes are treated as
    the same image. Rows without an image are merged if they have the same id, source path and split.

    The time grows with the number of rows that were not read before, divided by the number of processes. The memory
    does not grow while rows are read. While they are merged, it is about 60 bytes per row.

    Args:
        columns: Column mapping that extends or overrides each source's own mapping.
        log: Skip log. It records skipped rows and counts duplicate images.
        image_check: How to check images; see `open_records`. If "ignore", the bytes of image files are not compared.
        folder: Folder for the table. Default: a folder in the user's cache.
        workers: Number of processes. Default: one per core, or this process for small sources.

    Returns:
        A table with one record per image, in order of first appearance. See `load_source_indices`.

    Raises:
        NoImagesError: Images are checked, but no record has an image.
        ValueError: See `open_records`.
    """
    folder = folder or get_cache_dir() / "records"
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    parsed = []
    for name in sources:
        source = Source.parse(name)
        parsed.append(dataclasses.replace(source, columns={**source.columns, **columns}))
    with FileLock(folder / "lock"):
        _delete_unused(folder)
        tasks = _list_parts(parsed, log, image_check, folder)
        _read_parts(parsed, tasks, log, image_check, workers)
        table_folder = _merge_parts(parsed, tasks, image_check, folder)
    return _open_merged(tasks, table_folder, parsed, log, image_check)


def load_source_indices(table: RecordTable) -> np.ndarray:
    """Return the index of each record's source, of shape (N,), int16, for a table that `open_table` returned."""
    assert table.folder is not None
    return np.load(table.folder / "sources.npy")


def mask_same_images(records: RecordTable, candidates: RecordTable) -> np.ndarray:
    """Return a boolean mask of the candidates that have the same image as one of the records, of shape (candidates,).

    Image files with the same bytes are treated as the same image.
    """
    keys = [table.numbers("key_high") for table in (records, candidates)]
    is_same = candidates.has_image & np.isin(keys[1], keys[0][records.has_image])
    known_hashes, candidate_hashes = _read_copy_hashes(records), _read_copy_hashes(candidates)
    shared = np.intersect1d(known_hashes, candidate_hashes)
    shared = shared[shared > 0]
    positions = np.flatnonzero(np.isin(candidate_hashes, shared))
    known = _hash_contents(records, np.flatnonzero(np.isin(known_hashes, shared)))
    first = _find_first_rows(*np.concatenate([known, _hash_contents(candidates, positions)], axis=1))
    num_known = known.shape[1]
    is_same[positions[first[num_known:] < num_known]] = True
    return is_same


# ---- parts -----------------------------------------------------------------------------------------------------------


@dataclass
class _PartTask:
    """A part of a source, the file in which its rows are saved, and the file's summary once the part has been read."""

    source_index: int
    source: Source
    part: FilePart
    image_check: ImageCheck
    file: Path
    version: str | None = None  # pinned version of a remote file
    summary: ReadSummary | None = None

    def estimate_work(self) -> float:
        """Return the size of the text or of the download of the part, in bytes."""
        if self.version is not None:
            return get_file_size(self.part.path)
        return self.part.format.estimate_text_bytes(self.part) if os.path.isfile(self.part.path) else 0


def _list_parts(sources: Sequence[Source], log: SkipLog, image_check: ImageCheck, folder: Path) -> list[_PartTask]:
    """List the parts of all sources in order. The name of a part's file is a hash of all that affects its rows."""
    tasks = []
    for index, source in enumerate(sources):
        for source_file in find_files(source.path, log=log):
            path, source_format = source_file.path, source_file.format
            version = source_format.compute_version(path)
            absolute_path = path if is_remote(path) else os.path.abspath(path)
            settings = [FORMAT_VERSION, source_format.name, path, absolute_path, version, source.path]
            settings += [source.splits, sorted(source.columns.items()), image_check]
            pinned = version if is_remote(path) and not source_format.is_folder else None
            for part in split_file(source_file, PART_BYTES):
                file = folder / "parts" / f"{_hash_json([*settings, part.start, part.stop])}.arrow"
                summary = _read_summary(file) if file.exists() else None
                if summary is not None and _must_read_again(part, summary):
                    file.unlink()
                    summary = None
                tasks.append(_PartTask(index, source, part, image_check, file, pinned, summary))
    return tasks


def _must_read_again(part: FilePart, summary: ReadSummary) -> bool:
    """Return True if reading a part again can give other rows, although its file has not changed."""
    # Another run tries again to download a file, but all processes of a run must use the same rows.
    is_earlier_run = summary.read_at < START_TIME
    return summary.has_repaired_images() or (is_remote(part.path) and is_earlier_run and summary.has_unreadable_files())


def _read_parts(
    sources: Sequence[Source], tasks: Sequence[_PartTask], log: SkipLog, image_check: ImageCheck, workers: int | None
) -> None:
    """Read the parts that have not been read before, and check each source when all of its parts are complete."""
    missing = {task.file: task for task in tasks if task.summary is None}
    work = sum(task.estimate_work() for task in missing.values())
    if workers is None:
        workers = count_cores() if work >= MIN_PARALLEL_BYTES else 1
    new_parts = iter(map_in_processes(_write_part, list(missing.values()), workers))
    files = [task.part.path for task in missing.values()]
    hide = work < MIN_PARALLEL_BYTES or not missing
    num_rows = 0
    with ProgressBar(total=len(tasks), desc="reading data", unit="part", disable=hide) as bar:
        for index, source in enumerate(sources):
            reader = RecordReader(source, log, image_check, require_captions=True)
            for task in [task for task in tasks if task.source_index == index]:
                prefetch(files[len(files) - len(missing) :][:PREFETCH_FILES])
                if missing.pop(task.file, None) is not None and (error := next(new_parts)) is not None:
                    raise error
                os.utime(task.file)
                task.summary = task.summary or _read_summary(task.file)
                reader.add_summary(task.summary)
                num_rows += task.summary.num_records
                bar.set_postfix_str(f"{num_rows:,} rows", refresh=False)
                bar.update()
            reader.finish()


def _write_part(task: _PartTask) -> Exception | None:
    """Read a part and save its rows. Return an error that must be raised when all earlier parts are complete."""
    if task.version is not None:
        pin_versions({task.part.path: task.version})
    log = EventLog()
    reader = RecordReader(task.source, log, task.image_check, require_captions=True)
    rows = ((record, task.source.path, facts) for record, facts in reader.read_part(task.part, hash_images=True))
    try:
        with atomic_path(task.file) as file:
            write_rows(file, rows, lambda: vars(reader.summarize(log)))
    except (ValueError, OSError) as error:
        return error
    return None


def _read_summary(file: Path) -> ReadSummary:
    return ReadSummary(**read_metadata(str(file), "summary"))


# ---- merging ---------------------------------------------------------------------------------------------------------


def _merge_parts(sources: Sequence[Source], tasks: Sequence[_PartTask], image_check: ImageCheck, folder: Path) -> Path:
    """Merge rows with the same image, unless this table already exists. Return the table's folder."""
    summaries = [task.summary for task in tasks if task.summary is not None]
    # A part that was read again may have other rows.
    names = [(task.source_index, task.file.name, part.read_at) for task, part in zip(tasks, summaries, strict=True)]
    table_folder = folder / "tables" / _hash_json([FORMAT_VERSION, names, [source.path for source in sources]])
    if table_folder.exists():
        os.utime(table_folder)
        return table_folder
    blocks = Blocks.open([str(task.file) for task in tasks])
    table = RecordTable(blocks, np.arange(blocks.num_rows))
    num_rows = [summary.num_records for summary in summaries]
    source_of_row = np.repeat(np.array([task.source_index for task in tasks], np.int16), num_rows)
    first = _find_first_rows(table.numbers("key_high"), table.numbers("key_low"))
    copies, originals = _find_copies(table, first) if image_check != "ignore" else np.empty((2, 0), np.int64)
    final = first.copy()  # for each row, the first row with the same image
    final[copies] = originals
    final = final[first]
    num_members = np.bincount(final, minlength=len(final))
    kept = np.flatnonzero(final == np.arange(len(final)))
    origins = kept[num_members[kept] > 1]  # first row of each merged record
    rows = kept.copy()
    rows[num_members[kept] > 1] = len(final) + np.arange(len(origins))
    members = np.flatnonzero(num_members[final] > 1)
    members = members[np.lexsort((members, first[members], final[members]))]
    small = np.int32 if len(final) + len(origins) < 2**31 else np.int64
    with atomic_dir(table_folder) as temporary:
        np.save(temporary / "rows.npy", rows.astype(small))
        np.save(temporary / "sources.npy", source_of_row[kept])
        np.save(temporary / "copies.npy", table.select(copies).numbers("key_high"))
        if len(origins):
            paths = [sources[index].path for index in source_of_row[origins].tolist()]
            write_rows(
                temporary / "merged.arrow", _build_merged_records(table, members, final[members], paths), lambda: None
            )
    return table_folder


def _open_merged(
    tasks: Sequence[_PartTask], folder: Path, sources: Sequence[Source], log: SkipLog, image_check: ImageCheck
) -> RecordTable:
    files = [str(task.file) for task in tasks]
    if (folder / "merged.arrow").exists():
        files.append(str(folder / "merged.arrow"))
    table = RecordTable(Blocks.open(files), np.load(folder / "rows.npy", mmap_mode="r"), folder)
    log.count_copies(np.load(folder / "copies.npy"))
    if image_check in ("header", "exists") and len(table) and not table.has_image.any():
        names = ", ".join(str(source) for source in sources)
        message = (
            f"{names}: none of the {len(table):,} records has an image. Only `tune` and `embed` accept text-only data"
        )
        raise NoImagesError("\n".join([message, *log.list_notes()]))
    return table


def _find_first_rows(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return, for each row, the first row with the same key, of shape (N,), int64. Rows with key 0 are all different.

    `high` and `low` are the upper and lower 64 bits of each key, uint64.
    """
    order = np.argsort(high, kind="stable")
    is_same = high[order[1:]] == high[order[:-1]]
    is_equal = is_same & (low[order[1:]] == low[order[:-1]])
    if not np.array_equal(is_same, is_equal):  # different keys share their upper 64 bits
        order = np.lexsort((low, high))
        is_equal = (high[order[1:]] == high[order[:-1]]) & (low[order[1:]] == low[order[:-1]])
    is_equal &= (high[order[1:]] > 0) | (low[order[1:]] > 0)
    is_first = np.concatenate([np.ones(min(1, len(high)), bool), ~is_equal])
    first = np.empty(len(high), np.int64)
    first[order] = order[is_first][np.cumsum(is_first) - 1]
    return first


def _find_copies(table: RecordTable, first: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the first row of each image that is a copy, and the first row of the image of which it is a copy."""
    hashes = _read_copy_hashes(table)
    hashes[first != np.arange(len(first))] = 0
    values, counts = np.unique(hashes[hashes > 0], return_counts=True)
    rows = np.flatnonzero(np.isin(hashes, values[counts > 1]))
    originals = rows[_find_first_rows(*_hash_contents(table, rows))]
    is_copy = originals != rows
    return rows[is_copy], originals[is_copy]


def _hash_contents(table: RecordTable, positions: np.ndarray) -> np.ndarray:
    """Return the first 128 bits of `image_hashes.hash_contents`, or 0, as a uint64 array of shape (2, N).

    Only images whose bytes were not hashed when the table was built are read.
    """
    hashes = np.empty((2, len(positions)), np.uint64)
    for start in range(0, len(positions), BATCH_IMAGES):
        records = table.select(positions[start : start + BATCH_IMAGES])
        digests = records.column("digest").to_pylist()
        unknown = [n for n, digest in enumerate(digests) if digest is None]
        images = list(records.select(np.array(unknown, int)).get_images())
        for n, digest in zip(unknown, hash_contents(images), strict=True):
            digests[n] = digest
        data = b"".join(digest[:16].ljust(16, b"\0") for digest in digests)
        hashes[:, start : start + len(digests)] = np.frombuffer(data, ">u8").reshape(-1, 2).T
    return hashes


def _read_copy_hashes(table: RecordTable) -> np.ndarray:
    """Return the hash of each record's image file or tar member, and 0 for other images, of shape (N,), uint64."""
    hashes, kinds = table.numbers("image_hash"), table.numbers("image_kind")
    kinds_with_hash = [number for number, kind in enumerate(IMAGE_KINDS) if kind.has_file_name]
    hashes[~np.isin(kinds, kinds_with_hash)] = 0
    return hashes


def _build_merged_records(
    table: RecordTable, members: np.ndarray, groups: np.ndarray, source_paths: Sequence[str]
) -> Iterator[tuple[Record, str, ImageFacts]]:
    """Yield one record per group of rows.

    `members` are row numbers sorted by group, and `groups` their groups. `source_paths` has a path for each group.
    """
    starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]]))
    selected = table.select(members)
    first_members = table.select(members[starts])
    facts = [first_members.column(name).to_pylist() for name in ("width", "height", "image_hash", "digest")]
    is_start = np.zeros(len(members) + 1, bool)
    is_start[starts] = is_start[-1] = True
    merged: Record | None = None
    group = -1
    for position, record in enumerate(selected):
        merged = record if is_start[position] or merged is None else _merge_records(merged, record)
        group += int(is_start[position])
        if is_start[position + 1]:
            yield merged, source_paths[group], ImageFacts(*(values[group] for values in facts))


def _merge_records(first: Record, second: Record) -> Record:
    texts: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        texts[name] = tuple(deduplicate_captions([*getattr(first, name), *getattr(second, name)]))
    return dataclasses.replace(first, **texts)


def _delete_unused(folder: Path) -> None:
    oldest = time.time() - UNUSED_DAYS * 86_400
    for path in [*(folder / "parts").iterdir(), *(folder / "tables").iterdir()]:
        if path.stat().st_mtime < oldest:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]
