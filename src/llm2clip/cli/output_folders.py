"""Kinds of output folders. A command does not write to an output folder of a different kind."""

from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from llm2clip.runs.output_folder import CONFIG_FILE

KINDS = {
    "fit": "a run directory of `llm2clip fit`",
    "tune": "a run directory of `llm2clip tune`",
    "align": "a run directory of `llm2clip align`",
    "distill": "a run directory of `llm2clip distill`",
    "llava": "a run directory of `llm2clip llava train`",
    "store": "an embedding store",
    "index": "an index",
    "evaluation": "an output folder of `llm2clip evaluate`",
    "model": "a model folder",
}
# Kind -> glob patterns. A folder of this kind contains a match for at least one pattern.
_CONTENTS = {
    "index": ("index.sqlite",),
    "store": ("manifest.json", "keys-*.parquet"),
    "evaluation": ("results.json", "vectors", "skipped"),
    "model": ("config.json", "open_clip_config.json", "text.onnx"),
}
# Sections of a run's config. The first of these that a config contains determines the kind of its run directory.
_RUN_SECTIONS = ("llava", "distill", "embed", "align", "tune")
_OWN_FILES = ("skipped.jsonl", "metrics.jsonl")  # files that llm2clip writes, which do not count as data
_DATA_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl"),
}
_MAX_ENTRIES = 1000  # maximum number of files and folders to check per folder


def check_output_folder(path: str | Path, kind: str) -> None:
    """Check that a command may write to an output folder. The folder need not exist.

    Args:
        path: Value of `--out`.
        kind: Kind of folder that the command writes, a key of `KINDS`.

    Raises:
        ValueError: The folder is of a different kind, or is of unknown kind and contains data files.
        NotADirectoryError: The path is a file.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"--out {path} is a file. Pass a new or empty folder")
        return
    actual = detect_folder_kind(folder)
    if actual not in (None, kind):
        raise ValueError(f"--out {path} is {KINDS[actual]}, not {KINDS[kind]}. Pass a new or empty folder")
    data_file = _find_data_file(folder) if actual is None else None
    if data_file is not None:
        raise ValueError(f"--out {path} already contains data, such as {data_file}. Pass a new or empty folder")


def detect_folder_kind(folder: str | Path) -> str | None:
    """Return the kind of an output folder (a key of `KINDS`), or None if it is unknown."""
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


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _find_data_file(folder: Path) -> Path | None:
    """Return the relative path of a data file in `folder` or a direct subfolder, or None if there are no data files."""
    entries = list(islice(folder.iterdir(), _MAX_ENTRIES))
    for entry in list(entries):
        with suppress(OSError):  # not a folder, or not readable
            entries += islice(entry.iterdir(), _MAX_ENTRIES)
    for entry in entries:
        is_own = entry.name.startswith(".") or entry.name in _OWN_FILES
        if entry.suffix.lower() in _DATA_SUFFIXES and not is_own and entry.is_file():
            return entry.relative_to(folder)
    return None
