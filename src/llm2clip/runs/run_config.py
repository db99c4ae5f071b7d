"""The config file of a run, which is saved in the run directory and checked when the run is resumed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml

from llm2clip.config import RESUME_SAFE
from llm2clip.io_utils import atomic_write_text
from llm2clip.runs.lock import RUN_LOCK

CONFIG_FILE = "config.yaml"

# First line of the file if the config contains settings of the `tune` stage, whose batch size is per process.
PROCESSES_LINE = "# Number of processes in the tune stage: {}\n"

# Settings of the `align` stage may be changed until the run directory contains one of these files or folders.
ALIGN_OUTPUTS = ("align/checkpoints", "checkpoints", "model")


class ConfigChangedError(ValueError):
    """The run directory was created with a different config."""


def save_or_check_config(config: dict[str, Any], run_dir: Path, processes: int | None = None) -> None:
    """Save the config of a run in its run directory. If the run is resumed, check the config first.

    If the run directory already contains outputs, the config must match the saved config. The `align` settings may
    still be changed until the `align` stage has written outputs. A run may be resumed with a different number of
    processes, either with the same settings or with a `tune.batch_size` that keeps the product of the two constant.

    Args:
        config: Settings, keyed by name. Dataclasses are converted to dicts.
        run_dir: Run directory, in which the config is saved as `config.yaml`.
        processes: Number of processes of the run, which is also saved. None if unknown.

    Raises:
        ConfigChangedError: The saved config is different. The message lists the settings that differ.
    """
    file = run_dir / CONFIG_FILE
    new = to_plain_types(config)
    if file.exists() and _has_outputs(run_dir):
        text = file.read_text(encoding="utf-8")
        saved = yaml.safe_load(text)
        changes = [change for change in _find_differences(saved, new) if not _is_resume_safe(change[0])]
        if _compute_pairs_per_step(saved, _parse_processes(text)) == _compute_pairs_per_step(new, processes):
            changes = [change for change in changes if change[0] != "tune.batch_size"]
        else:
            processes = _parse_processes(text)  # a resumed `tune` stage keeps its number of pairs per step
        if not any((run_dir / output).exists() for output in ALIGN_OUTPUTS):
            changes = [change for change in changes if not change[0].startswith("align.")]
        if changes:
            listed = "; ".join(f"{name}: {old!r} saved, {value!r} now" for name, old, value in changes)
            raise ConfigChangedError(
                f"{file} has different settings ({listed}). Use the saved settings, choose a different --out, or "
                f"delete {run_dir} to start over"
            )
    first_line = PROCESSES_LINE.format(processes) if processes is not None and "tune" in new else ""
    atomic_write_text(file, first_line + yaml.safe_dump(new, sort_keys=False, allow_unicode=True))


def _parse_processes(text: str) -> int | None:
    """Parse the number of processes from the text of a config file. Return None if it does not contain this number."""
    line = re.match(PROCESSES_LINE.format(r"(\d+)"), text)
    return int(line[1]) if line else None


def _compute_pairs_per_step(config: dict[str, Any], processes: int | None) -> int | None:
    """Return the total batch size of the `tune` stage over all processes, or None if it is unknown."""
    batch_size = config.get("tune", {}).get("batch_size")
    return None if batch_size is None or processes is None else batch_size * processes


def _has_outputs(run_dir: Path) -> bool:
    ignored = (CONFIG_FILE, "skipped.jsonl", "skipped_tune.jsonl", ".lock", RUN_LOCK)
    return any(path.name not in ignored for path in run_dir.iterdir())


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
