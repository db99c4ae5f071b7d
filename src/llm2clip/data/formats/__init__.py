"""Source formats, and the files that a path stands for.

To add a format, write a subclass of `SourceFormat` in this package, and add it to `FORMATS`.
"""

import difflib
import glob
import os
from collections import Counter
from collections.abc import Sequence

from braceexpand import braceexpand

from llm2clip.data.formats.base import FilePart, SourceFormat
from llm2clip.data.formats.csv_files import CaptionsTxt, DelimitedText
from llm2clip.data.formats.image_folder import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, ImageFolder, list_files
from llm2clip.data.formats.json_files import JsonFile, JsonLines
from llm2clip.data.formats.tables import HubDataset, Parquet, SavedDataset
from llm2clip.data.formats.tar import TarFile
from llm2clip.data.remote import find_remote_files, get_file_name, is_remote, list_folder, look_up_versions
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import hide_url_secrets

# The first format whose suffix matches is used. A folder without caption files is read in the first shard format of
# which it contains files.
FORMATS: tuple[SourceFormat, ...] = (
    JsonLines(),
    JsonFile(),
    DelimitedText("csv", ","),
    DelimitedText("tsv", "\t"),
    TarFile(),
    Parquet(),
    CaptionsTxt(),
)
HUB_DATASET, SAVED_DATASET, IMAGE_FOLDER = HubDataset(), SavedDataset(), ImageFolder()  # formats without a suffix
CAPTION_FILES = (
    "captions.jsonl", "captions.jsonl.gz", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv",
    "captions.txt",
)  # fmt: skip
SUFFIXES = ", ".join(suffix for source_format in FORMATS for suffix in source_format.suffixes)
READABLE_FORMATS = (
    f"files ending in {SUFFIXES} (.txt: lines of 'name.jpg,caption' or 'name.jpg#0<TAB>caption'; tar files "
    "must be uncompressed); globs and {000..010} patterns that match such files; a folder that contains captions.jsonl,"
    " metadata.csv, tar files, Parquet files, or images (each x.jpg with an x.txt or x.json next to it); a folder "
    "written by save_to_disk; hf:NAME[:CONFIG] (a data set on the Hugging Face Hub). Files and folders can also be in "
    "object storage or on a web server (s3://, gs://, hf://, https://)"
)


def find_files(path: str, all_files: bool = False, log: SkipLog | None = None) -> list[FilePart]:
    """Resolve a path to a list of files and folders with their formats, in the order in which they are read.

    An existing path is never treated as a pattern, even if it contains glob or brace characters.

    Args:
        path: File, folder, glob or brace pattern, which can be a URL, or `hf:NAME` for a Hugging Face data set.
        all_files: If True, use all caption files, images, tar files and Parquet files in a folder and its subfolders.
            If False, use only the first of these kinds that the folder contains.
        log: Skip log. It records folders that are not read, because they were written by llm2clip.

    Raises:
        FileNotFoundError: No file matches the path. The message suggests similar names.
        ValueError: The format is not supported.
    """
    if is_remote(path):
        files: list[FilePart] = []
        for url in find_remote_files(path):
            files += _find_in_folder(url.rstrip("/"), all_files, log) if url.endswith("/") else [find_format(url)]
        look_up_versions([file.path for file in files if not file.format.is_folder])
        return files
    if path.startswith("hf:"):
        return [FilePart(HUB_DATASET, path.removeprefix("hf:"))]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _find_in_folder(path, all_files, log)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: not a regular file, but a device or a named pipe. Save the data to a file first")
        return [find_format(path)]
    files = []
    for pattern in braceexpand(path) if "{" in path else [path]:
        if glob.has_magic(pattern):
            matches = sorted(glob.glob(pattern, recursive=True))
        else:
            matches = [pattern] if os.path.exists(pattern) else []
        if not matches:
            raise FileNotFoundError(f"{pattern}: no such file or folder; {suggest_paths(pattern)}")
        for match in matches:
            files += find_files(match, all_files, log)
    return files


def find_format(path: str) -> FilePart:
    """Return a file with the format that its suffix stands for. Raise ValueError if no format has this suffix."""
    name = get_file_name(path)
    for source_format in FORMATS:
        if name.lower().endswith(source_format.suffixes):
            return FilePart(source_format, path)
    advice = _suggest_conversion(name) or f"supported formats: {READABLE_FORMATS}"
    raise ValueError(f"{hide_url_secrets(path)}: unknown format; {advice}")


def _find_in_folder(folder: str, all_files: bool, log: SkipLog | None) -> list[FilePart]:
    """List the files in a folder; see `find_files`. The names of caption files are case-insensitive."""
    names = list_folder(folder)
    if SavedDataset.is_saved(names):
        if is_remote(folder):
            raise ValueError(f"{folder}: a folder written by save_to_disk must be on a local disk. Copy it first")
        return [FilePart(SAVED_DATASET, folder)]
    lower_names = {name.lower(): name for name in names}
    files: list[FilePart] = []
    for name in CAPTION_FILES:
        if name in lower_names and (all_files or not files):
            files += find_files(os.path.join(folder, lower_names[name]))
    shard_formats = [source_format for source_format in FORMATS if source_format.is_shard]
    if all_files:
        if next(list_files(folder, IMAGE_SUFFIXES), None) is not None:
            files.append(FilePart(IMAGE_FOLDER, folder))
        for shards in shard_formats:
            suffixes = frozenset(suffix.lstrip(".") for suffix in shards.suffixes)
            files += [FilePart(shards, path) for path in list_files(folder, suffixes, log)]
        if not files:
            raise FileNotFoundError(_describe_unreadable_folder(folder, names))
        return files
    for shards in shard_formats:
        if not files:
            paths = [os.path.join(folder, name) for name in names if name.lower().endswith(shards.suffixes)]
            files = [FilePart(shards, path) for path in paths]
    if not files and next(list_files(folder, IMAGE_SUFFIXES), None) is None:
        raise ValueError(f"{_describe_unreadable_folder(folder, names)}; supported formats: {READABLE_FORMATS}")
    return files or [FilePart(IMAGE_FOLDER, folder)]


def _describe_unreadable_folder(folder: str, names: Sequence[str]) -> str:
    suffixes = Counter(os.path.splitext(name)[1].lower() for name in names if "." in name.strip("."))
    listed = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes.most_common(3))
    advice = "".join(dict.fromkeys(f"; {_suggest_conversion(suffix)}" for suffix in suffixes))
    return (
        f"{folder}: the folder contains no images, tar files, Parquet files or caption files"
        f"{f' (files: {listed}){advice}' if listed else ''}"
    ).rstrip("; ")


def _suggest_conversion(path: str) -> str:
    """Return advice on how to convert a file in a common but unsupported format, or an empty string."""
    suffix = path.lower().rpartition(".")[2]
    if suffix in ("zip", "7z", "rar", "tgz", "gz", "bz2", "xz", "zst"):
        return "unpack the archive, and pass the folder or the uncompressed file"
    if suffix in UNSUPPORTED_SUFFIXES:
        return "convert the images to JPEG, PNG or WebP, and pass their folder"
    if suffix in IMAGE_SUFFIXES:
        return "this is a single image: pass the folder that contains the images"
    return ""


def suggest_paths(path: str) -> str:
    """Return a hint for a missing path: the most similar paths in its deepest existing parent folder."""
    parent, name = os.path.split(os.path.abspath(os.path.expanduser(path)))
    while not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    similar = [os.path.join(parent, match) for match in difflib.get_close_matches(name, os.listdir(parent), n=3)]
    return f"did you mean {' or '.join(similar)}?" if similar else f"{parent} does not contain '{name}'"
