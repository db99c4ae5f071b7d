"""Formats in, raw rows out: which files of which format a path stands for, and the reader of each format.

The readers are small functions, one a format: `texts`, `archives` and `tables`.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterator, Sequence

from braceexpand import braceexpand

from llm2clip.data.raw_rows import ColumnChooser, RawRow
from llm2clip.data.readers.tables import read_huggingface, read_parquet
from llm2clip.data.readers.tar import list_files, list_images, read_images, read_tar
from llm2clip.data.readers.text import read_captions_txt, read_csv, read_json, read_jsonl

FORMATS = {  # what a name ends with -> the format's name in `read`
    ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".tar": "tar", ".txt": "captions.txt",
}  # fmt: skip
CAPTION_FILES = (
    "captions.jsonl", "captions.jsonl.gz", "captions.csv", "captions.tsv", "metadata.jsonl", "metadata.csv",
    "captions.txt",
)  # fmt: skip
READABLE_FORMATS = (
    f"files ending in {', '.join(FORMATS)} (.txt: lines of 'name.jpg,caption' or 'name.jpg#0<TAB>caption'; tars "
    "uncompressed), globs and {000..010} patterns of them, a folder of tars, of parquet files, of images with x.txt or "
    "x.json beside each x.jpg, or with captions.jsonl or metadata.csv, a folder written by save_to_disk, and "
    "hf:NAME[:CONFIG]"
)


def find_source(path: str, whole: bool = False) -> list[tuple[str, str]]:
    """The `(format, file)` pairs a path stands for, in order. A path that exists is itself, whatever its characters.

    whole: of a folder all that is in it, and not the first of its forms: captions, images, tars and parquet files, in
    its folders too.
    """
    if path.startswith("hf:"):
        return [("hf", path[3:])]
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        return _find_all(path) if whole else _find_in_folder(path)
    if os.path.exists(path):
        suffixes = [suffix for suffix in FORMATS if path.lower().endswith(suffix)]
        if not suffixes:
            raise ValueError(f"{path}: unknown format; these can be read: {READABLE_FORMATS}")
        return [(FORMATS[suffixes[0]], path)]
    names = _braces(path) if "{" in path else [path]
    found: list[tuple[str, str]] = []
    for name in names:
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name] * os.path.exists(name)
        if not matches:
            raise FileNotFoundError(_absent(name))
        for match in matches:
            found += find_source(match, whole)
    return found


def _find_in_folder(folder: str) -> list[tuple[str, str]]:
    names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        return [("saved", folder)]
    for name in CAPTION_FILES:
        if name in names:
            return find_source(os.path.join(folder, name))
    for suffix in (".tar", ".parquet"):
        files = [os.path.join(folder, name) for name in names if name.lower().endswith(suffix)]
        if files:
            return [(FORMATS[suffix], file) for file in files]
    if next(list_images(folder), None) is None:
        raise ValueError(
            f"{folder}: a folder without images, tars, parquet or captions; these can be read: {READABLE_FORMATS}"
        )
    return [("images", folder)]


def _find_all(folder: str) -> list[tuple[str, str]]:
    names = os.listdir(folder)
    if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= set(names):
        return [("saved", folder)]
    found = [pair for name in CAPTION_FILES if name in names for pair in find_source(os.path.join(folder, name))]
    if next(list_images(folder), None) is not None:
        found.append(("images", folder))
    for suffix in ("tar", "parquet"):
        found += [(suffix, path) for path in list_files(folder, frozenset({suffix}))]
    if not found:
        raise FileNotFoundError(f"{folder}: a folder without images, tars or parquet")
    return found


def _braces(pattern: str) -> list[str]:
    return list(braceexpand(pattern))


def _absent(path: str) -> str:
    """The message for a path that is not there: how far it exists, and what there looks like it."""
    parent, name = os.path.split(os.path.abspath(path))
    while not os.path.isdir(parent):
        parent, name = os.path.split(parent)
    near = [os.path.join(parent, match) for match in difflib.get_close_matches(name, os.listdir(parent), n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else f"{parent} has no '{name}'"
    return f"{path}: no such file or folder; {hint}"


def read_source(
    kind: str, path: str, choose: ColumnChooser, image_bytes: bool = True, splits: Sequence[str] | None = ()
) -> Iterator[RawRow]:
    """The raw rows of one file or folder of a format named by `find`.

    choose: from a table's column names, those wanted; the others are not read. image_bytes: whether images embedded in
    parquet are read while scanning. splits: which of a Hugging Face data set's splits (empty: all), whose name becomes
    the rows' `split`; None: all, and the rows keep their own.
    """
    if kind == "parquet":
        return read_parquet(path, choose, image_bytes)
    if kind in ("hf", "saved"):
        return read_huggingface(path, kind == "saved", choose, splits)
    if kind in ("csv", "tsv"):
        return read_csv(path, "\t" if kind == "tsv" else ",")
    readers = {"jsonl": read_jsonl, "json": read_json, "captions.txt": read_captions_txt, "tar": read_tar}
    return readers.get(kind, read_images)(path)
