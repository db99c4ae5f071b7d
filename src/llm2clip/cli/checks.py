"""Checks of paths, model names and output folders. The module has no slow imports, so errors are reported early."""

import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace

from llm2clip.config import AUTO
from llm2clip.io_utils import require_extra
from llm2clip.models.loading import check_model_source, is_hub_id, split_revision
from llm2clip.runs.output_folder import CONFIG_FILE, RUN_COMMANDS

# Prefixes of model names (see `models/dual_encoder.py` and `models/vision/vision_tower.py`).
PREFIXES = ("open_clip:", "timm:", "st:", "hf:")
ENCODERS = ("smollm2-135m", "all-minilm-l6-v2", "gemma3-270m")  # caption encoders in `models/pretrained.py`


def check_sources_exist(*groups: Iterable[str] | None) -> None:
    """Raise FileNotFoundError if a source does not exist, or if its pattern matches no file."""
    from llm2clip.data.formats import find_source_files
    from llm2clip.data.records import Source

    for source in (source for group in groups for source in group or []):
        path = Source.parse(source).path
        if not path.startswith("hf:") and not os.path.exists(os.path.expanduser(path)):
            find_source_files(path)  # raises an error if no file matches a pattern


def check_data_sources(
    args: Namespace, *others: Iterable[str] | None, image_check: Any = "header", require_captions: bool = True
) -> None:
    """Check that all sources exist, and read the first rows of small local files in `args.data`.

    Reading a few rows reveals unknown formats, missing columns and unusable images before the slow imports.
    """
    from llm2clip.data.formats import find_source_files
    from llm2clip.data.records import EARLY_CHECK_ROWS, RecordReader, Source
    from llm2clip.data.skip_log import SkipLog

    check_sources_exist(args.data, *others)
    log = SkipLog(max_skipped=max(args.max_skipped, 0.9))  # fails only if almost all rows are unusable
    for text in args.data:
        source = Source.parse(text, args.columns)
        path = os.path.expanduser(source.path)
        files = find_source_files(path, all_files=not require_captions) if os.path.exists(path) else []
        if files and sum(os.path.getsize(file.path) for file in files if os.path.exists(file.path)) < 1 << 22:
            reader = RecordReader(source, log, image_check, require_captions)
            for _ in islice(reader.read(files), EARLY_CHECK_ROWS):
                pass


def check_index_exists(location: str | None, words: Sequence[str] = ()) -> None:
    """Raise FileNotFoundError if a local folder is not an index, or ImportError if a required package is missing.

    If one of the query's `words` is an index, the error message suggests the correct order of the arguments. PostgreSQL
    servers are not contacted.
    """
    from llm2clip.search.backends import INDEX_FILE, check_backend_packages, format_missing_index_message

    if location is not None and "://" not in location and not (Path(location) / INDEX_FILE).is_file():
        for word in words:
            if (Path(word) / INDEX_FILE).is_file():
                command = shlex.join(["llm2clip", "search", word, location])
                raise FileNotFoundError(f"{location} is not an index, but {word} is. Pass the index first: {command}")
        raise FileNotFoundError(format_missing_index_message(location))
    if location is not None:
        check_backend_packages(location)


def check_stores_exist(*folders: str) -> None:
    """Raise FileNotFoundError if a folder does not exist or is not an embedding store."""
    for folder in folders:
        if detect_folder_kind(folder) != "store":
            from llm2clip.data.formats import suggest_similar_paths

            reason = (
                "it has no manifest.json"
                if os.path.isdir(folder)
                else f"no such folder; {suggest_similar_paths(folder)}"
            )
            raise FileNotFoundError(f"{folder} is not a store: {reason}. To create a store, run `llm2clip embed`")


def check_port_is_available(host: str, port: int) -> None:
    """Raise OSError if a server cannot listen on a port, for example because the port is in use."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise OSError(
            f"cannot listen on port {port} of {host}: {error.strerror}. Stop the program that is using the port, or "
            "choose another port with --port (0 means any free port)"
        ) from error


def resolve_model_name(name: str, allow_revision: bool = True) -> str:
    """Return the model folder if `name` is a run directory. Return other paths and valid model names unchanged."""
    hub_id, revision = split_revision(name) if allow_revision else (name, None)
    folder = _resolve_name_or_subfolder(hub_id, "config.json", ("model",), ())
    return folder if revision is None else name


def resolve_encoder_path(path: str) -> str:
    """Return the encoder folder of a run directory or llm2clip model. Return other valid paths and names unchanged."""
    if path == AUTO:
        raise ValueError("only `fit` and `plan` support --encoder.path auto. Pass an encoder, such as RUN/tune/encoder")
    return _resolve_name_or_subfolder(path, "modules.json", ("encoder", "tune/encoder", "text"), ENCODERS)


def check_pretrained_names(*names: str) -> None:
    """Raise FileNotFoundError if the name of a vision tower or LLM looks like a path that does not exist."""
    for name in names:
        if "/" in name or "\\" in name:  # names without slashes refer to timm models and built-in models
            _resolve_name_or_subfolder(name, "config.json", (), ())


def _resolve_name_or_subfolder(name: str, config_file: str, subfolders: tuple[str, ...], known: tuple[str, ...]) -> str:
    """Return `name` or, for a folder without `config_file`, the first of its `subfolders` that contains the file.

    Raises:
        FileNotFoundError: The name is neither an existing path nor a valid name.
        ValueError: The folder is an index, a store or a run directory without a model, or the name contains a revision.
        ImportError: The model requires open_clip, which is not installed.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not (path / config_file).exists():
        for subfolder in subfolders:
            if (path / subfolder / config_file).is_file():
                if os.environ.get("RANK", "0") == "0":
                    print(f"{name}: using {path / subfolder}", file=sys.stderr)
                return str(path / subfolder)
        kind = detect_folder_kind(path)
        if kind not in (None, "evaluation", "model"):
            raise ValueError(f"{name} is {KINDS[kind]}, not a model. Pass a model folder, such as RUN/model")
    if split_revision(name.removeprefix("hf:"))[1] is not None:
        raise ValueError(f"{name}: this model cannot be loaded by revision. Download the revision, and pass its folder")
    if name.startswith("open_clip:"):
        require_extra("open-clip", name)
    if name in known or name.startswith(PREFIXES) or path.exists():
        return name
    from llm2clip.cli.commands import read_builtin_configs
    from llm2clip.data.formats import suggest_similar_paths

    if name.endswith((".npz", ".gguf")):
        raise FileNotFoundError(f"{name}: no such file; {suggest_similar_paths(name)}")
    if not is_hub_id(name):
        if name in read_builtin_configs():
            raise FileNotFoundError(
                f"{name} is a config, not a model. To train a model with it, run `llm2clip fit DATA --config {name}`"
            )
        names = f", nor one of {', '.join(known)}" if known else ""
        raise FileNotFoundError(
            f"{name} is neither a folder nor a hub id (OWNER/NAME){names}; {suggest_similar_paths(name)}"
        )
    check_model_source(name)
    return name


def list_local_sources(sources: Sequence[str]) -> list[str]:
    """Return the sources that `index` can read or, if there are none, a placeholder for the suggested command."""
    from llm2clip.data.storage import is_remote

    return [source for source in sources if not is_remote(source)] or ["PHOTOS"]


# ---- output folders --------------------------------------------------------------------------------------------------

KINDS = {
    **{command: f"a run directory of `llm2clip {command}`" for command in ("fit", "tune", "align", "distill")},
    "llava": "a run directory of `llm2clip llava train`",
    "store": "an embedding store",
    "index": "an index",
    "evaluation": "an output folder of `llm2clip evaluate`",
    "model": "a model folder",
}
# Glob patterns that identify each kind of folder. A single match is sufficient.
_CONTENTS = {
    "index": ("index.sqlite",),
    "store": ("manifest.json", "keys-*.parquet"),
    "evaluation": ("results.json", "vectors", "skipped"),
    "model": ("config.json", "open_clip_config.json", "text.onnx"),
}
_OWN_FILES = ("skipped.jsonl", "metrics.jsonl")  # output files of llm2clip, which are not data
_DATA_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl"),
}
_MAX_ENTRIES = 1000  # maximum number of files and subfolders that are checked per folder


def check_output_folder(path: str | Path, kind: str) -> None:
    """Check that `--out` is a new folder, a folder of the given kind (a key of `KINDS`), or a folder without data.

    Raises:
        ValueError: The folder is of a different kind, or its kind is unknown and it contains data files.
        OSError: The path is a file, or the folder cannot be created.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"--out {path} is a file. Pass a new or empty folder")
        check_path_can_be_created(path)
        return
    actual = detect_folder_kind(folder)
    if actual not in (None, kind):
        raise ValueError(f"--out {path} is {KINDS[actual]}, not {KINDS[kind]}. Pass a new or empty folder")
    data_file = _find_data_file(folder) if actual is None else None
    if data_file is not None:
        raise ValueError(f"--out {path} already contains data, such as {data_file}. Pass a new or empty folder")


def check_path_can_be_created(path: str | Path, option: str = "--out") -> None:
    """Raise OSError if no file or folder can be created in the nearest existing ancestor of `path`."""
    parent = next(parent for parent in Path(path).expanduser().absolute().parents if parent.exists())
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".llm2clip-", dir=parent))
    except OSError as error:
        raise OSError(f"{option} {path}: nothing can be created in {parent} ({error.strerror})") from error


def detect_folder_kind(folder: str | Path) -> str | None:
    """Return the kind of a folder (a key of `KINDS`), or None if the kind is unknown."""
    folder = Path(folder)
    if (folder / CONFIG_FILE).is_file():
        try:
            config = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            config = None
        for section, command in RUN_COMMANDS.items():
            if isinstance(config, dict) and section in config:
                return command
    for kind, names in _CONTENTS.items():
        if any(any(folder.glob(name)) for name in names):
            return kind
    return None


def _find_data_file(folder: Path) -> Path | None:
    """Return the relative path of a data file in a folder or its direct subfolders, or None if there is none."""
    entries = list(islice(folder.iterdir(), _MAX_ENTRIES))
    for entry in list(entries):
        with suppress(OSError):  # raised by iterdir for files and for unreadable folders
            entries += islice(entry.iterdir(), _MAX_ENTRIES)
    for entry in entries:
        is_own = entry.name.startswith(".") or entry.name in _OWN_FILES
        if entry.suffix.lower() in _DATA_SUFFIXES and not is_own and entry.is_file():
            return entry.relative_to(folder)
    return None
