"""Checkpoints that are whole or as good as absent, and the log of a run that goes on from one.

At the bottom of the house: whatever trains is killed and gone on with by the same rules.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_write_jsonl, atomic_write_text

COMPLETE_MARKER = "complete"


def mark_complete(checkpoint: Path, plan: dict[str, Any]) -> None:
    """Declare a checkpoint whole: all its files were written. One without the mark is as good as absent.

    Args:
        checkpoint: its folder.
        plan: what a run must have in common with this one to go on from here, such as steps, batch and a hash of the
            data.
    """
    atomic_write_text(checkpoint / COMPLETE_MARKER, json.dumps(plan))


def validate_resume(checkpoint: Path | None, plan: dict[str, Any]) -> Path | None:
    """The checkpoint, if a run of this plan can go on from it.

    Raises:
        ValueError: the checkpoint is of another plan; the message names what differs.
    """
    if checkpoint is None:
        return None
    there = json.loads((checkpoint / COMPLETE_MARKER).read_text())
    differs = "; ".join(f"{k}: {there.get(k)} there, {v} now" for k, v in plan.items() if there.get(k) != v)
    if differs:
        raise ValueError(
            f"{checkpoint} cannot be gone on from: {differs}. Give the run the data and the number of processes that "
            f"it was begun with, or delete {checkpoint.parent} to begin the stage again"
        )
    return checkpoint


def latest_checkpoint(folder: Path, prefix: str = "step-") -> Path | None:
    """The newest whole checkpoint `folder/PREFIXn`; half-written ones, left by a kill, are removed."""
    found: list[tuple[int, Path]] = []
    for path in folder.glob(f"{prefix}*") if folder.is_dir() else ():
        if not (number := re.fullmatch(re.escape(prefix) + r"(\d+)", path.name)):
            continue
        if (path / COMPLETE_MARKER).exists():
            found.append((int(number[1]), path))
        else:
            shutil.rmtree(path)
    return max(found)[1] if found else None


def checkpoint_step(checkpoint: Path) -> int:
    """The number in a checkpoint's name."""
    return int(checkpoint.name.rsplit("-", 1)[1])


def prune_checkpoints(folder: Path, keep: int = 2, prefix: str = "step-") -> None:
    """Remove all but the newest `keep` checkpoints."""
    numbered = re.compile(re.escape(prefix) + r"\d+")
    paths = sorted((p for p in folder.glob(f"{prefix}*") if numbered.fullmatch(p.name)), key=checkpoint_step)
    for path in paths[:-keep]:
        shutil.rmtree(path)


def hash_texts(texts: Iterable[str]) -> str:
    """A hash of texts in their order."""
    whole = hashlib.sha256()
    for text in texts:
        whole.update(hashlib.sha256(text.encode(errors="surrogateescape")).digest())
    return whole.hexdigest()[:16]


class MetricsLog:
    """A JSONL file of metrics, one object a line, each with its `step`."""

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        """Open `path` for appending; lines after `resume_step` are of steps that will be done again and are dropped."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if resume_step else []
        atomic_write_jsonl(path, kept)

    def write(self, step: int, **values: Any) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
