"""Entry points for reading data: `find_files` resolves a path to files, and `read_source` reads the raw rows in a file.

The reader for each format is a function in `json_files`, `csv_files`, `tables` or `tar`.
"""

import difflib
import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from braceexpand import braceexpand

from llm2clip.data.columns import BadRow, ColumnChooser, RawRow
from llm2clip.data.readers.csv_files import read_captions_txt, read_csv
from llm2clip.data.readers.json_files import read_json_lines, read_json_list
from llm2clip.data.readers.tables import read_huggingface, read_parquet
from llm2clip.data.readers.tar import IMAGE_SUFFIXES, UNSUPPORTED_SUFFIXES, list_files, read_image_folder, read_tar
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import DataFormatError, describe_error

FORMATS = {  # file suffix -> format name for `read_source`
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".tar": "tar", ".txt": "captions.txt",
}  # fmt: skip
CAPTION_FILES = (
    "captions.jsonl", "captions.jsonl.gz", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv",
    "captions.txt",
)  # fmt: skip
READABLE_FORMATS = (
    f"files ending in {', '.join(FORMATS)} (.txt: lines of 'name.jpg,caption' or 'name.jpg#0<TAB>caption'; tar files "
    "must be uncompressed); globs and {000..010} patterns that match such files; a folder that contains captions.jsonl,"
    " metadata.csv, tar files, Parquet files, or images (each x.jpg with an x.txt or x.json next to it); a folder "
    "written by save_to_disk; hf:NAME[:CONFIG] (a data set on the Hugging Face Hub)"
)


def find_files(path: str, all_files: bool = False, log: SkipLog | None = None) -> list[tuple[str, str]]:
    """Resolve a path to a list of `(format, file)` pairs, in the order in which the files are read.

    An existing path is never treated as a pattern, even if it contains glob or brace characters.

    Args:
        path: File, folder, glob or brace pattern, or `hf:NAME` for a Hugging Face data set.
        all_files: If True, use all caption files, images, tar files and Parquet files in a folder and its subfolders.
            If False, use only the first of these kinds that the folder contains.
        log: Skip log. It records folders that are not read, because they were written by llm2clip.

    Raises:
        FileNotFoundError: No file matches the path. The message suggests similar names.
        ValueError: The format is not supported.
    """
    if path.startswith("hf:"):
        return [("hf", path.removeprefix("hf:"))]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _find_in_folder(path, all_files, log)
    if os.path.exists(path):
        if not os.path.isfile(path):
            raise ValueError(f"{path}: not a regular file, but a device or a named pipe. Save the data to a file first")
        for suffix, name in FORMATS.items():
            if path.lower().endswith(suffix):
                return [(name, path)]
        advice = _suggest_conversion(path) or f"supported formats: {READABLE_FORMATS}"
        raise ValueError(f"{path}: unknown format; {advice}")
    files: list[tuple[str, str]] = []
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


def read_source(
    kind: str,
    path: str,
    choose: ColumnChooser,
    image_bytes: bool = True,
    splits: Sequence[str] | None = (),
    log: SkipLog | None = None,
) -> Iterator[RawRow]:
    """Yield the raw rows in a file or folder.

    A corrupt file can make a library raise any type of exception. In this case, the last row is a `BadRow`, so a single
    corrupt file does not stop a run.

    Args:
        kind: Format name returned by `find_files`.
        path: File or folder to read.
        choose: Function that selects which columns of a table to read.
        image_bytes: Whether to read images embedded in Parquet files.
        splits: Splits of a Hugging Face data set to read. If empty or None, all splits are read. Each row's `split`
            field is set to the name of its split, unless `splits` is None, in which case rows keep their own values.
        log: Skip log. It records notes about files, such as unusual encodings.

    Raises:
        DataFormatError: No part of the file can be read. The message contains the reason.
        OSError: The file does not exist, or the disk cannot be read.
    """
    number = 0
    try:
        for row in _open_reader(kind, path, choose, image_bytes, splits, log):
            number = row[1]
            yield row
    except (DataFormatError, OSError):
        raise
    except Exception as error:
        yield path, number + 1, BadRow("unreadable file", describe_error(error))


def _open_reader(
    kind: str, path: str, choose: ColumnChooser, image_bytes: bool, splits: Sequence[str] | None, log: SkipLog | None
) -> Iterator[RawRow]:
    if kind == "parquet":
        return read_parquet(path, choose, image_bytes)
    if kind in ("hf", "saved"):
        return read_huggingface(path, kind == "saved", choose, splits)
    if kind in ("csv", "tsv"):
        return read_csv(path, "\t" if kind == "tsv" else ",", log)
    if kind == "jsonl":
        return read_json_lines(path, log)
    if kind == "captions.txt":
        return read_captions_txt(path, log)
    if kind == "images":
        return read_image_folder(path, log)
    return read_tar(path) if kind == "tar" else read_json_list(path, log)


def _find_in_folder(folder: str, all_files: bool, log: SkipLog | None) -> list[tuple[str, str]]:
    """List the `(format, file)` pairs in a folder; see `find_files`. Caption file names are case-insensitive."""
    names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        return [("saved", folder)]
    lower_names = {name.lower(): name for name in names}
    files: list[tuple[str, str]] = []
    for name in CAPTION_FILES:
        if name in lower_names and (all_files or not files):
            files += find_files(os.path.join(folder, lower_names[name]))
    if all_files:
        if next(list_files(folder, IMAGE_SUFFIXES), None) is not None:
            files.append(("images", folder))
        for kind in ("tar", "parquet"):
            files += [(kind, path) for path in list_files(folder, frozenset({kind}), log)]
        if not files:
            raise FileNotFoundError(_describe_unreadable_folder(folder, names))
        return files
    for kind in ("tar", "parquet"):
        if not files:
            files = [(kind, os.path.join(folder, name)) for name in names if name.lower().endswith(f".{kind}")]
    if not files and next(list_files(folder, IMAGE_SUFFIXES), None) is None:
        raise ValueError(f"{_describe_unreadable_folder(folder, names)}; supported formats: {READABLE_FORMATS}")
    return files or [("images", folder)]


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
