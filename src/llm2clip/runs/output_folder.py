"""Output folders: format versions, locks, and a run's config, metrics and list of checkpoints.

Folders with an unsupported format version are rejected. Only one command can write to a folder at a time. A resumed run
must use the settings that are saved in its run directory.
"""

import dataclasses
import errno
import fnmatch
import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from llm2clip.config import RESUME_SAFE
from llm2clip.io_utils import atomic_write_jsonl, atomic_write_text, explain_write_errors, hide_url_secrets

CONFIG_FILE = "config.yaml"
CHECKPOINT_PREFIX = "checkpoint-"  # the prefix that transformers' Trainer uses
COMPLETE_MARKER = "complete"  # file that marks a checkpoint as complete
TAIL_BYTES = 1 << 14  # bytes read from the end of a metrics file to find the latest metrics
MAX_CHECKPOINTS = 2  # number of checkpoints to keep; older checkpoints are removed
ENCODER_CHOICE_FILE = "encoder_choice.json"  # written by `fit --encoder.path auto`
RUN_LOCK = ".run.lock"  # held during all stages of a run; embedding stores have an additional lock

# Output folders that could be mistaken for data -> file name patterns that all have matches in such a folder.
_NOT_DATA = {
    "a run directory": (CONFIG_FILE, "skipped.jsonl"),
    "an embedding store": ("manifest.json", "keys-*.parquet"),
}


class FormatVersionError(ValueError):
    """Raised when a file was written by a version of llm2clip that uses a different file format."""


def check_format_version(path: str | Path, version: Any, supported: int, advice: str) -> None:
    """Raise FormatVersionError if the format version of the file at `path` is not `supported`.

    `advice` is appended to the error message and explains how to replace an outdated file.
    """
    is_number = isinstance(version, int)
    if is_number and version == supported:
        return
    actual = "no format version" if version is None else f"format version {version}"
    if is_number and version > supported:
        advice = "Update llm2clip: pip install --upgrade llm2clip"
    raise FormatVersionError(
        f"{path} has {actual}, but this version of llm2clip reads only format version {supported}. {advice}"
    )


def describe_output_folder(names: Collection[str]) -> str | None:
    """Describe the llm2clip output folder that contains these files. Return None if the folder may be input data."""
    for description, patterns in _NOT_DATA.items():
        if all(fnmatch.filter(names, pattern) for pattern in patterns):
            return description
    return None


# ---- locks -----------------------------------------------------------------------------------------------------------


class FolderInUseError(ValueError):
    """Raised when another run is writing to a folder."""


@contextmanager
def hold_folder_lock(folder: Path, name: str = ".lock", timeout: float = 0) -> Iterator[None]:
    """Hold a lock on a folder. The operating system releases the lock when the process ends, even if it is killed.

    The folder is created if needed. If another run holds the lock, wait up to `timeout` seconds, or indefinitely if
    `timeout` is negative. On file systems that do not support locks, no lock is acquired.

    Raises:
        FolderInUseError: Another run holds the lock.
        OSError: The lock file cannot be opened, for example because it is a folder or a symbolic link.
    """
    lock = FileLock(folder / name, timeout=timeout)
    try:
        lock.acquire()
    except Timeout:
        raise FolderInUseError(
            f"another run is writing to {folder}. Wait for that run to finish, or use a different folder"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            advice = "Check the folder's permissions. If the lock file is not a regular file, delete it"
            message = f"cannot lock {folder / name} ({error.strerror}). {advice}"
            raise OSError(error.errno, message) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def hold_run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the lock of a run directory on the main process. Acquire the lock before the run writes any files.

    Raises:
        FolderInUseError: Another run holds the lock.
    """
    from llm2clip.runs.ranks import process_state  # imports torch, which takes seconds

    with hold_folder_lock(run_dir, RUN_LOCK) if process_state().is_main_process else nullcontext():
        yield


# ---- config of a run -------------------------------------------------------------------------------------------------

# Config section -> command. The first of these sections that a run's config contains determines the command.
RUN_COMMANDS = {"llava": "llava", "distill": "distill", "embed": "fit", "align": "align", "tune": "tune"}
# `align` settings may be changed until the run directory contains one of these files or folders.
ALIGN_OUTPUTS = ("align/checkpoints", "checkpoints", "model")
# Name patterns of files and folders in a run directory that do not count as outputs.
_NOT_OUTPUTS = (CONFIG_FILE, "skipped*.jsonl", "data", "captions.jsonl*", "captions_*", ".*")


class ConfigChangedError(ValueError):
    """Raised when the run directory was created with a different config."""


def save_or_check_config(config: dict[str, Any], run_dir: Path) -> None:
    """Save the config of a run in its run directory. If the run is resumed, check the config first.

    If the run directory already contains outputs, the config must match the saved config, except that `align` settings
    may be changed until the `align` stage has written outputs. Dataclasses in `config` are converted to dicts.

    Raises:
        ConfigChangedError: The config differs from the saved config. The message lists the differences.
    """
    file = run_dir / CONFIG_FILE
    new = convert_to_plain_types(config)
    if has_outputs(run_dir):
        saved = yaml.safe_load(file.read_text(encoding="utf-8"))
        changes = _find_changed_settings(saved, new)
        changes = [change for change in changes if change[0].split(".")[-1] not in RESUME_SAFE]
        if not any((run_dir / output).exists() for output in ALIGN_OUTPUTS):
            changes = [change for change in changes if not change[0].startswith("align.")]
        if changes:
            details = "; ".join(f"{name}: {old!r} saved, {value!r} now" for name, old, value in changes)
            raise ConfigChangedError(
                f"{file} has different settings ({details}). Use the saved settings, choose a different --out, or "
                f"delete {run_dir} to start over"
            )
    atomic_write_text(file, yaml.safe_dump(new, sort_keys=False, allow_unicode=True))


def has_outputs(run_dir: Path) -> bool:
    """Return True if a run directory has a config and outputs. Captions and record tables are not outputs."""
    if not (run_dir / CONFIG_FILE).exists():
        return False
    names = (path.name for path in run_dir.iterdir())
    return not all(any(fnmatch.fnmatch(name, pattern) for pattern in _NOT_OUTPUTS) for name in names)


def convert_to_plain_types(value: Any) -> Any:
    """Convert dataclasses, tuples, paths and the command line's restricted number types to plain types for YAML.

    Credentials in URLs are removed, so that no credentials are saved with the settings.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return convert_to_plain_types(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(name): convert_to_plain_types(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [convert_to_plain_types(item) for item in value]
    for number_type in (bool, int, float):
        if isinstance(value, number_type):
            return number_type(value)
    return hide_url_secrets(str(value)) if isinstance(value, str | Path) else value


def _find_changed_settings(saved: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Return (dotted name, saved value, new value) for each setting whose value has changed."""
    if not (isinstance(saved, dict) and isinstance(new, dict)):
        return [] if saved == new else [(name, saved, new)]
    differences = []
    for key in [*saved, *(key for key in new if key not in saved)]:
        dotted = f"{name}.{key}" if name else key
        differences += _find_changed_settings(saved.get(key), new.get(key), dotted)
    return differences


# ---- checkpoints and metrics -----------------------------------------------------------------------------------------


def find_latest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step, or None if there are no complete checkpoints."""
    complete = [path for path in list_checkpoints(folder) if (path / COMPLETE_MARKER).exists()]
    return complete[-1] if complete else None


def list_checkpoints(folder: Path) -> list[Path]:
    """List all checkpoints in a folder, including incomplete checkpoints, sorted by step."""
    paths = folder.glob(f"{CHECKPOINT_PREFIX}*")
    checkpoints = [path for path in paths if re.fullmatch(rf"{CHECKPOINT_PREFIX}\d+", path.name)]
    return sorted(checkpoints, key=parse_checkpoint_step)


def parse_checkpoint_step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(CHECKPOINT_PREFIX))


class MetricsLog:
    """JSONL file of metrics, with one object per line. Each object has a `step` field."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Prepare the file for appending. Delete the lines of steps after `resume_step`, which training will repeat."""
        self.path = path
        lines = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        atomic_write_jsonl(path, lines)

    def write(self, step: int, **values: Any) -> None:
        with explain_write_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Read a metrics file, or only its last `tail_bytes` bytes. Ignore lines truncated by a killed process."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(0 if tail_bytes is None else max(0, path.stat().st_size - tail_bytes))
        text = file.read().decode(errors="replace")
    lines = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            values = json.loads(line)
            if isinstance(values, dict) and "step" in values:
                lines.append(values)
    return lines


def read_latest_metrics(path: Path) -> dict[str, Any]:
    """Return the latest value of each metric at the end of a metrics file, or {} if the file has no metrics."""
    return {name: value for line in read_metrics(path, TAIL_BYTES) for name, value in line.items()}
