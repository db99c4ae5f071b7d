"""Kinds of output folders, and the versions of their file formats.

A command does not write into an output folder of another kind, and does not read output folders as data. It rejects
folders with an unsupported format version.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from llm2clip.runs.run_config import CONFIG_FILE

INDEX_FILE, MANIFEST = "index.sqlite", "manifest.json"  # files of an index and of an embedding store

KINDS = {
    "fit": "a run directory of `llm2clip fit`",
    "tune": "a run directory of `llm2clip tune`",
    "align": "a run directory of `llm2clip align`",
    "reproduce": "a run directory of `llm2clip reproduce`",
    "store": "an embedding store",
    "index": "an index",
    "evaluation": "an output folder of `llm2clip evaluate`",
    "model": "a model folder",
}
# Kind -> glob patterns, at least one of which matches in a folder of this kind.
_CONTENTS = {
    "index": (INDEX_FILE,),
    "store": (MANIFEST, "keys-*.parquet"),
    "evaluation": ("results.json", "vectors", "skipped"),
    "model": ("config.json", "open_clip_config.json", "text.onnx"),
}
# Kinds of folders whose files look like data -> glob patterns, all of which match in a folder of this kind.
_NOT_DATA = {
    "a run directory": (CONFIG_FILE, "skipped.jsonl"),
    "an embedding store": (MANIFEST, "keys-*.parquet"),
}
_RUN_SECTIONS = ["reproduce", "embed", "align", "tune"]  # the first of these in a run's config determines the kind
_OWN_FILES = ("skipped.jsonl", "metrics.jsonl")
_DATA_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl"),
}
_MAX_ENTRIES = 1000  # maximum number of files and folders to check per folder


def register_run(section: str, description: str) -> None:
    """Add a kind of run directory. Its config contains a section with the name of the kind."""
    KINDS[section] = description
    _RUN_SECTIONS.insert(0, section)


class FormatVersionError(ValueError):
    """A file was written by a version of llm2clip that uses a different file format."""


def check_format_version(path: str | Path, version: object, supported: int, advice: str) -> None:
    """Check that a file or folder has the format version that this version of llm2clip reads.

    Args:
        path: File or folder, for the error message.
        version: Format version in the file, or None if the file does not contain one.
        advice: How to create the file again, for the error message.

    Raises:
        FormatVersionError: The versions differ.
    """
    if version != supported:
        actual = "no format version" if version is None else f"format version {version}"
        raise FormatVersionError(
            f"{path} has {actual}, but this version of llm2clip reads only format version {supported}. {advice}"
        )


def check_output_folder(path: str | Path, kind: str) -> None:
    """Check that a command may write to an output folder, which does not have to exist.

    Args:
        path: Value of `--out`.
        kind: Kind of folder that the command writes, a key of `KINDS`.

    Raises:
        ValueError: The folder is of another kind, or it is of unknown kind and contains data files.
        NotADirectoryError: The path is a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"--out {path} is a file. Pass a new or empty folder")
        return
    actual = folder_kind(folder)
    if actual not in (None, kind):
        raise ValueError(f"--out {path} is {KINDS[actual]}, not {KINDS[kind]}. Pass a new or empty folder")
    data_file = _find_data_file(folder) if actual is None else None
    if data_file is not None:
        raise ValueError(f"--out {path} already contains data, such as {data_file}. Pass a new or empty folder")


def folder_kind(folder: str | Path) -> str | None:
    """Return the kind of folder that a command wrote, a key of `KINDS`, or None if it is unknown."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        config = _read_yaml(folder / CONFIG_FILE)
        for section in _RUN_SECTIONS:
            if section in config:
                return "fit" if section == "embed" else section
    for kind, names in _CONTENTS.items():
        if any(any(folder.glob(name)) for name in names):
            return kind
    return None


def describe_output(names: Collection[str]) -> str | None:
    """Describe a folder inside a data set if llm2clip has written it, given the names of its files. Otherwise None.

    Unlike `folder_kind`, return None in case of doubt, so that no data is ignored.
    """
    for description, patterns in _NOT_DATA.items():
        if all(fnmatch.filter(names, pattern) for pattern in patterns):
            return description
    return None


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _find_data_file(folder: Path) -> Path | None:
    """Return the path, relative to `folder`, of a data file in it or in one of its subfolders, or None."""
    entries = list(islice(folder.iterdir(), _MAX_ENTRIES))
    for entry in list(entries):
        with suppress(OSError):  # not a folder, or not readable
            entries += islice(entry.iterdir(), _MAX_ENTRIES)
    for entry in entries:
        is_own = entry.name.startswith(".") or entry.name in _OWN_FILES
        if entry.suffix.lower() in _DATA_SUFFIXES and not is_own and entry.is_file():
            return entry.relative_to(folder)
    return None
