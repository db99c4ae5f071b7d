"""Data source formats: common interface, registry of all formats, and resolution of paths to files.

To add a format, write a subclass of `SourceFormat` in this package and register it in `load_source_formats`.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

from braceexpand import braceexpand

from llm2clip.data.remote import (
    find_remote_files,
    get_file_size,
    get_local_path,
    get_remote_version,
    list_folder,
    pin_current_versions,
    walk_folder,
)
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.storage import RemoteError, get_file_name, is_remote
from llm2clip.io_utils import DataFormatError, FatalDataError, describe_error, hide_url_secrets
from llm2clip.runs.output_folder import describe_output_folder

UNREADABLE_FILE = "unreadable file"  # reason for skipping the rest of a file
NOT_UTF8 = "not UTF-8"  # reason for skipping a row that cannot be decoded
IMAGE_SUFFIXES = frozenset(
    {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "avif", "jp2", "heic", "heif", "hif"}
)
# Suffixes of unsupported image formats. Files with these suffixes are recorded in the skip log.
UNSUPPORTED_SUFFIXES = frozenset({"dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raw", "psd", "svg", "jxl"})
CAPTION_FILES = (
    "captions.jsonl", "captions.jsonl.gz", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv",
    "captions.txt",
)  # fmt: skip


# ---- interface -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BadRow:
    """Row that cannot be read. Skipped rows are counted by `reason`."""

    reason: str
    value: str  # details of the problem, for the skip log
    rows: int = 1  # number of rows that cannot be read, including this row


# (file, row number starting at 1, {column name: raw value}). In text files, the row number is the line number.
RawRow = tuple[str, int, dict[str, Any] | BadRow]
ColumnChooser = Callable[[str, Sequence[str]], dict[str, str]]  # (file, column names) -> {field: column}


def select_all_columns(file: str, names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names}


@dataclass(frozen=True)
class ReadOptions:
    choose_columns: ColumnChooser = select_all_columns  # selects the columns to read from a table
    image_bytes: bool = True  # if True, read images embedded in tables and tar files
    # Splits of a Hugging Face dataset to read; empty for all splits. If None, rows get no `split` field.
    splits: Sequence[str] | None = ()
    log: SkipLog | None = None  # receives notes about files, for example that a file has an unusual encoding


@dataclass(frozen=True)
class FilePart:
    """Part of a source file, or an entire file or folder."""

    format: SourceFormat
    path: str
    start: int = 0  # byte offset of a row, or index of a row group in a Parquet file
    stop: int | None = None  # `start` of the next part, or None for the end of the file
    first_row: int = 1  # row number of the first row in the part; see `RawRow`


class SourceFormat(ABC):
    """Base class of all source formats."""

    name: str
    suffixes: tuple[str, ...] = ()  # lower-case suffixes of file names
    text_share = 1.0  # approximate fraction of a file that is text
    is_folder = False  # True if a source is a folder whose files are downloaded individually
    is_shard = False  # True if a folder of files in this format is read as one dataset
    has_caption_columns = True  # False if captions are in files next to the images
    is_table = False  # True if all rows of a file have the same columns
    is_plain_text = False  # True if each caption has its own row and missing values can be words such as "nan"
    has_lists_as_text = False  # True if a cell can contain a JSON or Python list of captions, stored as text

    @abstractmethod
    def read(self, part: FilePart, options: ReadOptions) -> Iterator[RawRow]:
        """Yield the rows in a part; see `read_rows`. Raise `DataFormatError` if the entire file cannot be read."""

    def find_part_starts(self, path: str, target_bytes: int) -> Iterator[tuple[int, int]]:
        """Yield (`start`, `first_row`) of consecutive parts of about `target_bytes` bytes each; see `FilePart`.

        Corrupt files can cause any type of exception.
        """
        yield 0, 1

    def compute_version(self, path: str) -> str:
        """Return a string that changes whenever the file, or a file in the folder, changes."""
        if is_remote(path):
            return get_remote_version(path)
        files = [path]
        if os.path.isdir(path):
            files = sorted(os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names)
        digest = hashlib.sha256()
        for file in files:
            digest.update(os.fsencode(file))
            with suppress(OSError):  # for example, a broken or circular symbolic link
                status = os.stat(file)
                digest.update(f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()


def split_file_into_parts(file: FilePart, target_bytes: int) -> list[FilePart]:
    """Divide a file into parts of about `target_bytes` bytes each. Smaller files are not divided."""
    with suppress(Exception):  # errors such as corrupt Parquet metadata are reported by `read_rows`
        if get_file_size(file.path) > target_bytes:
            positions, rows = zip(*file.format.find_part_starts(file.path, target_bytes), strict=True)
            stops = [*positions[1:], None]
            return [FilePart(file.format, file.path, *bounds) for bounds in zip(positions, stops, rows, strict=True)]
    return [file]


def read_rows(part: FilePart, options: ReadOptions = ReadOptions()) -> Iterator[RawRow]:
    """Yield the raw rows in a part of a file.

    If the part cannot be downloaded, or a library fails because the file is corrupt, the last row is a `BadRow`.

    Raises:
        DataFormatError: The entire file is unreadable. The message contains the reason.
        OSError: The file does not exist, or the disk cannot be read.
    """
    number = part.first_row - 1
    if is_remote(part.path) and not part.format.is_folder:
        try:
            get_local_path(part.path)
        except RemoteError as error:
            yield part.path, part.first_row, BadRow(UNREADABLE_FILE, str(error))
            return
    try:
        for row in part.format.read(part, options):
            number = row[1]
            yield row
    except (DataFormatError, FatalDataError, OSError):
        raise
    except Exception as error:
        yield part.path, number + 1, BadRow(UNREADABLE_FILE, describe_error(error))


# ---- registry --------------------------------------------------------------------------------------------------------


@cache
def load_source_formats() -> Mapping[str, SourceFormat]:
    """Return all formats by name, in order of preference."""
    # imported here to avoid a circular import
    from llm2clip.data.formats.csv_files import DelimitedTextFormat, FlickrCaptionsFormat
    from llm2clip.data.formats.image_files import ImageFolderFormat, WebdatasetTarFormat
    from llm2clip.data.formats.tables import HubDatasetFormat, ParquetFormat
    from llm2clip.data.formats.text_files import JsonFileFormat, JsonLinesFormat

    formats: list[SourceFormat] = [
        JsonLinesFormat(),
        JsonFileFormat(),
        DelimitedTextFormat("csv", ","),
        DelimitedTextFormat("tsv", "\t"),
        WebdatasetTarFormat(),
        ParquetFormat(),
        FlickrCaptionsFormat(),
        HubDatasetFormat(),
        ImageFolderFormat(),
    ]
    return {source_format.name: source_format for source_format in formats}


def describe_supported_formats() -> str:
    suffixes = ", ".join(
        suffix for source_format in load_source_formats().values() for suffix in source_format.suffixes
    )
    return f"files ending in {suffixes}, and folders that contain these files or images (see docs/howto/data.md)"


def find_source_files(path: str, all_files: bool = False, log: SkipLog | None = None) -> list[FilePart]:
    """Resolve the path of a `Source` to files and folders with their formats, in reading order.

    A path that exists is never treated as a pattern, even if it contains glob or brace characters.

    In a folder, the first available kind of data is used: a caption file (see `CAPTION_FILES`), tar files, Parquet
    files, or images. Subfolders are searched only for images. If `all_files` is True, all kinds of data are used,
    including tar and Parquet files in subfolders. Subfolders written by llm2clip are skipped and recorded in `log`.

    Raises:
        FileNotFoundError: No file matches the path. The message suggests similar names.
        ValueError: The format is not supported.
    """
    if is_remote(path):
        files: list[FilePart] = []
        for url in find_remote_files(path):
            files += (
                _find_files_in_folder(url.rstrip("/"), all_files, log) if url.endswith("/") else [build_file_part(url)]
            )
        pin_current_versions([file.path for file in files if not file.format.is_folder])
        return files
    if path.startswith("hf:"):
        return [FilePart(load_source_formats()["hf"], path.removeprefix("hf:"))]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _find_files_in_folder(path, all_files, log)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ValueError(f"{path} is a device or a named pipe, not a regular file. Save the data to a file first")
        return [build_file_part(path)]
    files = []
    for pattern in braceexpand(path) if "{" in path else [path]:
        if glob.has_magic(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
        else:
            matches = [pattern] if os.path.exists(pattern) else []
        if not matches:
            raise FileNotFoundError(f"{pattern}: no such file or folder; {suggest_similar_paths(pattern)}")
        for match in matches:
            files += find_source_files(match, all_files, log)
    return files


def build_file_part(path: str) -> FilePart:
    """Return a `FilePart` for an entire file. Raise ValueError if no format has the suffix of the file."""
    name = get_file_name(path)
    for source_format in load_source_formats().values():
        if source_format.suffixes and name.lower().endswith(source_format.suffixes):
            return FilePart(source_format, path)
    advice = _suggest_conversion(name) or f"supported formats: {describe_supported_formats()}"
    raise ValueError(f"{hide_url_secrets(path)}: unknown format; {advice}")


def list_files_with_suffixes(folder: str, suffixes: frozenset[str], log: SkipLog | None = None) -> Iterator[str]:
    """Yield the paths of all files with the given suffixes in a folder and its subfolders, sorted within each folder.

    Hidden files and folders are skipped. Subfolders written by llm2clip, such as run directories and embedding stores,
    are also skipped, and recorded in `log`.

    Raises:
        OSError: A folder cannot be listed. Skipping the folder would make its files look deleted.
    """
    for parent, folders, names in walk_folder(folder):
        kind = describe_output_folder(names) if parent != folder else None
        if kind is not None:
            folders.clear()
            if log is not None:
                log.add_note(f"not read, because it is {kind} written by llm2clip", parent)
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.rpartition(".")[2].lower() in suffixes and not name.startswith("."):
                yield os.path.join(parent, name)


def suggest_similar_paths(path: str) -> str:
    """Return a hint for a missing path: the most similar paths in its nearest existing ancestor."""
    parent, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    while not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    similar = [os.path.join(parent, match) for match in difflib.get_close_matches(name, os.listdir(parent), n=3)]
    return f"did you mean {' or '.join(similar)}?" if similar else f"{parent} does not contain '{name}'"


def _find_files_in_folder(folder: str, all_files: bool, log: SkipLog | None) -> list[FilePart]:
    """List the source files in a folder; see `find_source_files`. Names of caption files are case-insensitive."""
    names = list_folder(folder)
    formats = load_source_formats()
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        raise ValueError(
            f"{folder} was written by save_to_disk. Load the dataset with datasets.load_from_disk(...), and save each "
            "split with to_parquet(...)"
        )
    lower_names = {name.lower(): name for name in names}
    files: list[FilePart] = []
    for name in CAPTION_FILES:
        if name in lower_names and (all_files or not files):
            files += find_source_files(os.path.join(folder, lower_names[name]))
    if files and not all_files:
        return files
    images = [FilePart(formats["images"], folder)]
    shard_formats = [source_format for source_format in formats.values() if source_format.is_shard]
    if all_files:
        files += images if _has_images(folder) else []
        for shards in shard_formats:
            suffixes = frozenset(suffix.lstrip(".") for suffix in shards.suffixes)
            files += [FilePart(shards, path) for path in list_files_with_suffixes(folder, suffixes, log)]
        if not files:
            raise FileNotFoundError(_describe_unreadable_folder(folder, names))
        return files
    for shards in shard_formats:
        paths = [os.path.join(folder, name) for name in names if name.lower().endswith(shards.suffixes)]
        if paths:
            return [FilePart(shards, path) for path in paths]
    if not _has_images(folder):
        raise ValueError(
            f"{_describe_unreadable_folder(folder, names)}; supported formats: {describe_supported_formats()}"
        )
    return images


def _has_images(folder: str) -> bool:
    return next(list_files_with_suffixes(folder, IMAGE_SUFFIXES), None) is not None


def _describe_unreadable_folder(folder: str, names: Sequence[str]) -> str:
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in names if "." in name.strip("."))
    listed = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(3))
    advice = "".join(dict.fromkeys(f"; {_suggest_conversion(suffix)}" for suffix in suffixes))
    return (
        f"{folder}: the folder contains no images, tar files, Parquet files or caption files"
        f"{f' (files: {listed}){advice}' if listed else ''}"
    ).rstrip("; ")


def _suggest_conversion(path: str) -> str:
    """Return advice on how to convert a file in a common unsupported format, or "" for other formats."""
    suffix = path.lower().rpartition(".")[2]
    if suffix in ("zip", "7z", "rar", "tgz", "gz", "bz2", "xz", "zst"):
        return "unpack the archive, and pass the extracted folder or file"
    if suffix in UNSUPPORTED_SUFFIXES:
        return "convert the images to JPEG, PNG or WebP, and pass their folder"
    if suffix in ("mp4", "mov", "avi", "mkv", "webm"):
        return "videos are not supported: save their frames as images, and pass their folder"
    if suffix in IMAGE_SUFFIXES:
        return "this is a single image: pass the folder that contains the images"
    return ""
