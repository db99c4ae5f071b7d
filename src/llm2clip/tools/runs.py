"""The command `runs`, which lists runs. The command acquires no run locks, because a held lock would block new runs."""

import os
import re
from datetime import datetime
from pathlib import Path

from llm2clip.io_utils import describe_error, format_duration, open_regular_file, read_json, to_valid_unicode
from llm2clip.reports import Table, render_plain_text
from llm2clip.runs import output_folder

COLUMNS = ("run", "command", "state", "stage", "step", "loss", "time left", "result", "last change")
# Stages of each command, and the file or folder that marks a stage as complete. Earlier stages can be skipped.
STAGES = {
    "fit": {"tune": "tune/encoder", "embed": "evaluate/untrained.json", "align": "model", "evaluate": "report.html"},
    "distill": {"embed": "metrics.jsonl", "distill": "model", "evaluate": "report.html"},
    "align": {"align": "model"},
    "tune": {"tune": "encoder"},
    "llava": {"pretrain": "instruct/metrics.jsonl", "instruct": "model"},
}
LOCKS_FILE = Path("/proc/locks")  # all held file locks; exists only on Linux


def format_run_table(folder: Path) -> list[str]:
    """Return a table of the runs in a folder and its subfolders, followed by a line for each unreadable run file."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    rows, skipped = list[dict[str, str | None]](), list[str]()
    for parent, subfolders, names in os.walk(folder, onerror=lambda error: skipped.append(f"Skipped: {error}")):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            # A store without a run lock belongs to a training run, which has its own row.
            is_store = name == "manifest.json" and output_folder.RUN_LOCK in names
            if is_store or name in (output_folder.CONFIG_FILE, "index.sqlite") or name.endswith(".jsonl.sqlite"):
                try:
                    rows.append(_make_run_table_row(Path(parent, name)))
                except (OSError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
                    skipped.append(f"Skipped {Path(parent, name)}: not a valid run file ({describe_error(error)})")
    rows.sort(key=lambda row: row["last change"] or "")
    table = Table(COLUMNS, [[row.get(column) for column in COLUMNS] for row in rows])
    lines = [render_plain_text([table], width=160) if rows else f"No runs in {folder}", *skipped]
    return list(map(to_valid_unicode, lines))


def _make_run_table_row(file: Path) -> dict[str, str | None]:
    """Return the values of a run's table row, keyed by column name. Unknown values are omitted."""
    folder, is_caption = file.parent, file.name.endswith(".jsonl.sqlite")
    locks = (f".{file.stem}.lock",) if is_caption else (output_folder.RUN_LOCK, ".lock")
    inodes = [file.with_name(name).stat().st_ino for name in locks if file.with_name(name).exists()]
    # Read the locks before the run files: a run that ends between the two reads would otherwise look interrupted.
    held = LOCKS_FILE.read_text() if LOCKS_FILE.exists() else ""
    is_running = any(re.search(rf"FLOCK .*:{inode} \d+ EOF", held) for inode in inodes)  # st_dev can differ
    if file.name == output_folder.CONFIG_FILE:
        row = _read_training_state(file)
    elif file.name == "manifest.json":
        row = {"command": "embed", "result": f"{read_json(file)['captions']:,} captions"}
        row["stage"] = "embed" if file.with_name(".incoming").exists() else None
    else:
        row = {"command": "caption" if is_caption else "index"}
    changed = [file, Path(f"{file}-wal")]
    if file.suffix != ".sqlite":
        stopped = "interrupted" if LOCKS_FILE.exists() else "unfinished"
        row["state"] = stopped if row["stage"] else "finished"
        changed += [folder, folder / "store", folder / "metrics.jsonl", *folder.glob("*/metrics.jsonl")]
    row |= {"state": "running"} if is_running else {"time left": None}
    time = datetime.fromtimestamp(max(path.stat().st_mtime for path in changed if path.exists()))
    row["last change"] = f"{time:%Y-%m-%d %H:%M:%S}"
    return row | {"run": str(file.with_suffix("") if is_caption else folder)}


def _read_training_state(file: Path) -> dict[str, str | None]:
    with open_regular_file(file) as stream:  # a regular expression is much faster than a YAML parser
        sections = re.findall(r"^(\w+):", stream.read().decode(errors="replace"), re.MULTILINE)
    command = next((name for section, name in output_folder.RUN_COMMANDS.items() if section in sections), None)
    if command is None:
        raise ValueError("not the config of a training run")
    stages = STAGES[command]
    unfinished = [name for name, output in stages.items() if not (file.parent / output).exists()]
    stage = unfinished[0] if list(stages)[-1] in unfinished else None
    log_folder = file.parent
    if command == "fit":
        log_folder /= "tune" if stage == "tune" else "align"
    elif command == "llava":
        log_folder /= "pretrain" if stage == "pretrain" else "instruct"
    return {"command": command, "stage": stage, **_read_training_progress(log_folder, file.stat().st_mtime)}


def _read_training_progress(folder: Path, started: float) -> dict[str, str | None]:
    """Return the progress columns of a stage. `started` is the Unix time at which the run was started or resumed."""
    log = folder / "metrics.jsonl"
    metrics = output_folder.read_latest_metrics(log)
    if not metrics:
        return {}
    step, loss = metrics["step"], metrics.get("loss")  # `llava train` does not log the loss at every step
    row = {"step": f"{step:,}", "loss": None if loss is None else f"{loss:.3f}"}
    find_latest = output_folder.find_latest_checkpoint
    checkpoint = find_latest(folder / "checkpoints") or find_latest(folder)
    if checkpoint is not None:
        marker = checkpoint / output_folder.COMPLETE_MARKER
        done = step - output_folder.parse_checkpoint_step(checkpoint)
        signature = read_json(marker)["signature"]  # `llava train` does not save `steps` in its signature
        steps = signature.get("steps") or read_json(checkpoint / "trainer_state.json")["max_steps"]
        row["step"] = f"{step:,} of {steps:,}"
        seconds = log.stat().st_mtime - max(started, marker.stat().st_mtime)
        if done > 0 and seconds > 0:  # a resumed run may not have written its log yet
            row["time left"] = format_duration(seconds / done * (steps - step))
    evaluation = output_folder.read_latest_metrics(folder / "evaluations.jsonl")
    recalls = [f"{value:.1f}" for name, value in evaluation.items() if name.endswith(" R@1")]
    return row | {"result": f"R@1: I2T {recalls[0]}, T2I {recalls[1]}" if recalls else None}
