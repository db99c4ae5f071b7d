"""Helpers shared by several benchmarks: process memory, JSONL files, llm2clip commands and search servers."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_write_jsonl


def memory_mb(name: str) -> float:
    """Return the memory of this process in MB: current memory for VmRSS, or peak memory for VmHWM."""
    with open("/proc/self/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(name)) / 1e3


def reset_peak_memory() -> float:
    """Reset the recorded peak memory of this process, and return its current memory in MB."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory_mb("VmRSS")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file."""
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write_rows_once(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write rows to a JSONL file unless the file already exists. Return its path."""
    if not file.exists():
        atomic_write_jsonl(file, rows)
    return file


def run_llm2clip(command: Sequence[str], log: Path) -> None:
    """Run an `llm2clip` command and append its output to a log file. Exit with a message if the command fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        process = subprocess.run([sys.executable, "-m", "llm2clip", *command], stdout=output, stderr=output)
    if process.returncode:
        raise SystemExit(f"command failed (see {log}): llm2clip {shlex.join(command)}")


def start_server(
    index: str, token: str, port: int = 0, options: Sequence[str] = ()
) -> tuple[subprocess.Popen[str], int]:
    """Start `llm2clip serve` on a port (0 means any free port), and return its process and port.

    `index` is an index, or the model if `options` contains `--immich`.
    """
    source = ["--model", index] if "--immich" in options else [index]
    command = [sys.executable, "-m", "llm2clip", "serve", *source, "--port", str(port), "--precision", "fp32", *options]
    environment = {**os.environ, "LLM2CLIP_TOKEN": token}
    # The server's error messages are discarded, because a full pipe that is never read would block the server.
    server = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert server.stdout is not None
    for line in server.stdout:
        if match := re.match(r"Serving at http://127.0.0.1:(\d+)/", line):
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return server, int(match[1])
    raise SystemExit(f"the server stopped with exit status {server.wait()}")
