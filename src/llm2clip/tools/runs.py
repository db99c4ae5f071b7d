"""The `runs` command. It reads files that runs write, and takes no locks, because a lock would block a new run."""

import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from llm2clip.io_utils import describe_error, format_duration, open_regular_file, read_json, to_valid_unicode
from llm2clip.reports import Table, render_text
from llm2clip.runs import output_folder

COLUMNS = ("run", "command", "state", "stage", "step", "loss", "time left", "result", "last change")
# Stages of each command, and the file after which a stage is complete. `fit` is first: its config has all sections.
STAGES = {
    "fit": {"tune": "tune/encoder", "embed": "evaluate/untrained.json", "align": "model", "evaluate": "report.html"},
    "distill": {"embed": "metrics.jsonl", "distill": "model", "evaluate": "report.html"},
    "align": {"align": "model"},
    "tune": {"tune": "encoder"},
    "llava": {"llava": "model"},
}
LOCKS_FILE = Path("/proc/locks")  # lists the locks that are held on this machine; exists only on Linux


def list_runs(folder: Path) -> list[str]:
    """Return a table of the runs in a folder and its subfolders, and a line for each file that cannot be read."""
    os.listdir(folder)  # raises an error if the folder does not exist
    rows, skipped = list[dict[str, Any]](), list[str]()
    for parent, subfolders, names in os.walk(folder, onerror=lambda error: skipped.append(f"Skipped: {error}")):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            is_store = name == "manifest.json" and output_folder.RUN_LOCK in names  # other stores are parts of runs
            if is_store or name in (output_folder.CONFIG_FILE, "index.sqlite") or name.endswith(".jsonl.sqlite"):
                try:
                    rows.append(_describe_run(Path(parent, name)))
                except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
                    skipped.append(f"Skipped {Path(parent, name)}: not a valid run file ({describe_error(error)})")
    rows.sort(key=lambda row: row["last change"])
    table = Table(COLUMNS, [[row.get(column) for column in COLUMNS] for row in rows])
    lines = [render_text([table], width=160) if rows else f"No runs in {folder}", *skipped]
    return list(map(to_valid_unicode, lines))


def _describe_run(file: Path) -> dict[str, Any]:
    """Return the values of a run's columns. Unknown values are omitted."""
    is_caption = file.name.endswith(".jsonl.sqlite")
    locks = (f".{file.stem}.lock",) if is_caption else (output_folder.RUN_LOCK, ".lock")
    inodes = [file.with_name(name).stat().st_ino for name in locks if file.with_name(name).exists()]
    # The locks are read before the outputs, because the run may end meanwhile. Device numbers can differ from `stat`.
    held = LOCKS_FILE.read_text() if LOCKS_FILE.exists() else ""
    is_running = any(re.search(rf"FLOCK .*:{inode} \d+ EOF", held) for inode in inodes)
    if file.name == output_folder.CONFIG_FILE:
        row = _read_training(file)
    elif file.name == "manifest.json":
        row = {"command": "embed", "result": f"{read_json(file)['captions']:,} captions"}
        row |= {"stage": "embed" if file.with_name(".incoming").exists() else None, "changed": [file.parent]}
    else:
        row = {"command": "caption" if is_caption else "index"}
    if is_running:
        row["state"] = "running"
    elif "stage" in row:
        stopped = "interrupted" if LOCKS_FILE.exists() else "unfinished"
        row |= {"state": stopped if row["stage"] else "finished", "time left": None}
    changed = [file, Path(f"{file}-wal"), *row.get("changed", ())]
    time = datetime.fromtimestamp(max(path.stat().st_mtime for path in changed if path.exists()))
    row["last change"] = f"{time:%Y-%m-%d %H:%M:%S}"
    return row | {"run": str(file.with_suffix("") if is_caption else file.parent)}


def _read_training(file: Path) -> dict[str, Any]:
    folder, started = file.parent, file.stat().st_mtime  # a resumed run saves its config again
    with open_regular_file(file) as stream:  # parsing the YAML would take most of the time
        sections = re.findall(r"^(\w+):", stream.read().decode(errors="replace"), re.MULTILINE)
    command = next((name for name in STAGES if name.replace("fit", "embed") in sections), None)
    if command is None:
        raise ValueError("not the config of a run")
    stage = next((name for name, output in STAGES[command].items() if not (folder / output).exists()), None)
    log = folder / ("" if command != "fit" else "tune" if stage == "tune" else "align") / "metrics.jsonl"
    row: dict[str, Any] = {"command": command, "stage": stage, "changed": [folder, folder / "store", log]}
    for line in output_folder.read_metrics(log, last_only=True):
        step, row["loss"] = line["step"], f"{line['loss']:.3f}"
        row["step"] = f"{step:,}"
        checkpoint = output_folder.latest_checkpoint(log.with_name("checkpoints"))
        if checkpoint is not None:
            marker, done = checkpoint / output_folder.COMPLETE_MARKER, step - output_folder.parse_step(checkpoint)
            steps = read_json(marker)["signature"]["steps"]
            row["step"] += f" of {steps:,}"  # metrics have no times, so those of the files are used
            seconds = log.stat().st_mtime - max(started, marker.stat().st_mtime)
            if done > 0 and seconds > 0:  # a run that has just been resumed has not written its log yet
                row["time left"] = format_duration(seconds / done * (steps - step))
    for line in output_folder.read_metrics(log.with_name("evaluations.jsonl"), last_only=True):
        recalls = [f"{value:.1f}" for name, value in line.items() if name.endswith(" R@1")]
        row["result"] = f"R@1: I2T {recalls[0]}, T2I {recalls[1]}"
    return row
