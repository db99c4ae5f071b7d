"""What several benchmarks need: the memory of this process, rows in files, and the command with a log."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def memory(name: str) -> float:
    """MB of this process: VmRSS, what it has now; VmHWM, the most that it had."""
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(name)) / 1e3


def peak_from_here() -> float:
    """Begin the peak anew; MB that are held now."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory("VmRSS")


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    with file.open(encoding="utf-8") as rows:
        yield from map(json.loads, rows)


def write(file: Path, rows: Iterator[dict[str, Any]]) -> Path:
    """The rows as JSON lines, unless they are there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        part.replace(file)
    return file


def run(command: Sequence[str], log: Path) -> None:
    """`llm2clip` with a command, its output in a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        done = subprocess.run([sys.executable, "-m", "llm2clip", *command], stdout=out, stderr=out)
    if done.returncode:
        raise SystemExit(f"failed, see {log}: llm2clip {shlex.join(command)}")
