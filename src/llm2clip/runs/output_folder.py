"""Output folders: folder kinds, format versions, locks and run configs.

A command does not write to an output folder created by a different kind of command, and does not read output folders as
data. Folders with an unsupported format version are rejected. Only one command can write to a folder at a time.
"""

import dataclasses
import errno
import fnmatch
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from llm2clip.config import RESUME_SAFE
from llm2clip.io_utils import atomic_write_text

CONFIG_FILE = "config.yaml"  # all settings of a run
INDEX_FILE, MANIFEST = "index.sqlite", "manifest.json"  # main files of an index and an embedding store, respectively
CAPTIONS_FILE = "captions.jsonl"  # captions written by `fit --caption`, with their database and other files
CAPTIONS_DATABASE = f"{CAPTIONS_FILE}.sqlite"
RUN_LOCK = ".run.lock"  # held during all stages of a run; an embedding store also has its own lock

KINDS = {
    "fit": "a run directory of `llm2clip fit`",
    "tune": "a run directory of `llm2clip tune`",
    "align": "a run directory of `llm2clip align`",
    "distill": "a run directory of `llm2clip distill`",
    "store": "an embedding store",
    "index": "an index",
    "evaluation": "an output folder of `llm2clip evaluate`",
    "model": "a model folder",
}
# Kind -> glob patterns. A folder of this kind contains a match for at least one pattern.
_CONTENTS = {
    "index": (INDEX_FILE,),
    "store": (MANIFEST, "keys-*.parquet"),
    "evaluation": ("results.json", "vectors", "skipped"),
    "model": ("config.json", "open_clip_config.json", "text.onnx"),
}
# Kind of folder whose files look like data -> glob patterns. A folder of this kind contains matches for all patterns.
_NOT_DATA = {
    "a run directory": (CONFIG_FILE, "skipped.jsonl"),
    "an embedding store": (MANIFEST, "keys-*.parquet"),
}
_RUN_SECTIONS = [
    "distill",
    "embed",
    "align",
    "tune",
]  # the first of these in a run's config determines its kind
_OWN_FILES = ("skipped.jsonl", "metrics.jsonl")  # files that llm2clip writes, which do not count as data
_DATA_SUFFIXES = {
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".tar", ".parquet", ".arrow", ".csv", ".tsv", ".jsonl"),
}
_MAX_ENTRIES = 1000  # maximum number of files and folders to check per folder


def register_run_kind(section: str, description: str) -> None:
    """Register a kind of run directory whose config contains this section. `section` is also the name of the kind."""
    KINDS[section] = description
    _RUN_SECTIONS.insert(0, section)


class FormatVersionError(ValueError):
    """A file was written by a version of llm2clip that uses a different file format."""


def check_format_version(path: str | Path, version: object, supported: int, advice: str) -> None:
    """Check that a file or folder has the format version that this version of llm2clip reads.

    Args:
        path: File or folder, for the error message.
        version: Format version in the file, or None if the file does not contain one.
        advice: Advice on how to recreate the file, for the error message.

    Raises:
        FormatVersionError: The versions differ.
    """
    if version != supported:
        actual = "no format version" if version is None else f"format version {version}"
        raise FormatVersionError(
            f"{path} has {actual}, but this version of llm2clip reads only format version {supported}. {advice}"
        )


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


def describe_output_folder(names: Collection[str]) -> str | None:
    """Describe the llm2clip output folder that has files with these names, for example as "a run directory".

    Return None if in doubt, unlike `detect_folder_kind`, so that no data is ignored.
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
    """Return the relative path of a data file in `folder` or a direct subfolder, or None if there are no data files."""
    entries = list(islice(folder.iterdir(), _MAX_ENTRIES))
    for entry in list(entries):
        with suppress(OSError):  # not a folder, or not readable
            entries += islice(entry.iterdir(), _MAX_ENTRIES)
    has_captions = (folder / CAPTIONS_DATABASE).exists()  # an interrupted run of `fit --caption`
    for entry in entries:
        is_own = entry.name.startswith(".") or entry.name in _OWN_FILES
        is_own |= has_captions and _is_caption_file_name(entry.relative_to(folder).parts[0])
        if entry.suffix.lower() in _DATA_SUFFIXES and not is_own and entry.is_file():
            return entry.relative_to(folder)
    return None


# ---- locks -----------------------------------------------------------------------------------------------------------


class FolderInUseError(ValueError):
    """Another run is writing to a folder."""


@contextmanager
def folder_lock(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a lock on a folder. The operating system releases it when the process ends, even if the process is killed.

    Do nothing on file systems that do not support locks.

    Args:
        folder: Folder to lock. It is created if needed.
        name: Name of the lock file.

    Raises:
        FolderInUseError: Another run holds the lock.
    """
    lock = FileLock(folder / name, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"another run is writing to {folder}. Wait for it to finish, or use a different folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    try:
        yield
    finally:
        lock.release()


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory on the main process. Acquire it before the run writes any files.

    Raises:
        FolderInUseError: Another run holds the lock.
    """
    from llm2clip.runs.ranks import process_state  # imports torch, which would slow down the start of every command

    with folder_lock(run_dir, RUN_LOCK) if process_state().is_main_process else nullcontext():
        yield


# ---- config of a run -------------------------------------------------------------------------------------------------

# Written as the first line if the config contains `tune` settings, because `tune.batch_size` is per process.
PROCESSES_LINE = "# Number of processes in the tune stage: {}\n"

# `align` settings may be changed until the run directory contains one of these files or folders.
ALIGN_OUTPUTS = ("align/checkpoints", "checkpoints", "model")


class ConfigChangedError(ValueError):
    """The run directory was created with a different config."""


def save_or_check_config(config: dict[str, Any], run_dir: Path, processes: int | None = None) -> None:
    """Save the config of a run in its run directory. If the run is resumed, check the config first.

    If the run directory already contains outputs, the config must match the saved one, except that `align` settings may
    be changed until the `align` stage has written outputs. A run may be resumed with a different number of processes,
    either with the same settings or with `tune.batch_size` adjusted to keep the number of pairs per step.

    Args:
        config: Settings, keyed by name. Dataclasses are converted to dicts.
        run_dir: Run directory, in which the config is saved as `config.yaml`.
        processes: Number of processes in the run, also saved in the file. None if unknown.

    Raises:
        ConfigChangedError: The saved config is different. The message lists the differences.
    """
    file = run_dir / CONFIG_FILE
    new = to_plain_types(config)
    if has_outputs(run_dir):
        text = file.read_text(encoding="utf-8")
        saved = yaml.safe_load(text)
        changes = [change for change in _find_differences(saved, new) if not _is_resume_safe(change[0])]
        if _compute_pairs_per_step(saved, _parse_process_count(text)) == _compute_pairs_per_step(new, processes):
            changes = [change for change in changes if change[0] != "tune.batch_size"]
        else:
            processes = _parse_process_count(text)  # a resumed `tune` stage keeps its number of pairs per step
        if not any((run_dir / output).exists() for output in ALIGN_OUTPUTS):
            changes = [change for change in changes if not change[0].startswith("align.")]
        if changes:
            details = "; ".join(f"{name}: {old!r} saved, {value!r} now" for name, old, value in changes)
            raise ConfigChangedError(
                f"{file} has different settings ({details}). Use the saved settings, choose a different --out, or "
                f"delete {run_dir} to start over"
            )
    first_line = PROCESSES_LINE.format(processes) if processes is not None and "tune" in new else ""
    atomic_write_text(file, first_line + yaml.safe_dump(new, sort_keys=False, allow_unicode=True))


def _parse_process_count(text: str) -> int | None:
    """Return the number of processes recorded in a config file's text, or None if it is not recorded."""
    line = re.match(PROCESSES_LINE.format(r"(\d+)"), text)
    return int(line[1]) if line else None


def _compute_pairs_per_step(config: dict[str, Any], processes: int | None) -> int | None:
    """Return the `tune` stage's total batch size over all processes, or None if it is unknown."""
    batch_size = config.get("tune", {}).get("batch_size")
    return None if batch_size is None or processes is None else batch_size * processes


def has_outputs(run_dir: Path) -> bool:
    """Return True if a run directory has a config and outputs. Captions and record tables do not count as outputs."""
    if not (run_dir / CONFIG_FILE).exists():
        return False
    ignored = (CONFIG_FILE, "skipped.jsonl", "skipped_tune.jsonl", "data", ".lock", RUN_LOCK)
    names = [path.name for path in run_dir.iterdir()]
    return any(name not in ignored and not _is_caption_file_name(name) for name in names)


def _is_caption_file_name(name: str) -> bool:
    """Return True if a file or folder in a run directory is named like those that `fit --caption` writes."""
    return name.removeprefix(".").startswith(("captions.jsonl", "captions_"))


def _is_resume_safe(name: str) -> bool:
    return name.rsplit(".", 1)[-1] in RESUME_SAFE


def to_plain_types(value: Any) -> Any:
    """Convert dataclasses, tuples, paths and the command line's restricted number types to plain types for YAML."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain_types(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(name): to_plain_types(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain_types(item) for item in value]
    for number_type in (bool, int, float):
        if isinstance(value, number_type):
            return number_type(value)
    return str(value) if isinstance(value, Path) else value


def _find_differences(saved: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted name, saved value, new value) for each setting whose value has changed."""
    if not (isinstance(saved, dict) and isinstance(new, dict)):
        return [] if saved == new else [(name, saved, new)]
    differences = []
    for key in [*saved, *(key for key in new if key not in saved)]:
        dotted = f"{name}.{key}" if name else key
        differences += _find_differences(saved.get(key), new.get(key), dotted)
    return differences
