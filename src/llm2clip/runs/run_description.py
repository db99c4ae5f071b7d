"""Description of a run for reports: command, date, version, machine and stage durations."""

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llm2clip.io_utils import atomic_write_text, format_count, format_duration, hide_url_secrets
from llm2clip.reports import Block, CodeBlock, CollapsibleSection, Heading, Paragraph
from llm2clip.runs.ranks import print_once, process_state

DURATIONS_FILE = "durations.json"


def describe_device(device: torch.device) -> str:
    """Describe this machine's GPUs or, if `device` is not a GPU, its processor."""
    if device.type == "cuda":
        gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        return ", ".join(f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus)
    if device.type != "cpu":
        return device.type
    cpu_info = Path("/proc/cpuinfo")
    name = None
    if cpu_info.is_file():
        name = re.search(r"^model name\s*:\s*(.+)$", cpu_info.read_text(errors="replace"), re.MULTILINE)
    processor = name[1] if name else platform.processor() or "CPU"
    threads, cores = format_count(torch.get_num_threads(), "thread"), format_count(os.cpu_count() or 1, "logical core")
    return f"{processor}, {threads} on {cores}"


def describe_run(seconds: float) -> dict[str, Any]:
    """Return this run's command, date, version, machine and duration, for JSON files and reports."""
    state = process_state()
    processes = f"{state.num_processes} processes, each on " if state.num_processes > 1 else ""
    return {
        "command": shlex.join(["llm2clip", *map(hide_url_secrets, sys.argv[1:])]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": metadata.version("llm2clip"),
        "machine": processes + describe_device(state.device),
        "seconds": round(seconds, 1),
    }


def build_run_section(
    run: Mapping[str, Any], note: str = "", settings: str = "", code: str | None = None
) -> list[Block]:
    """Return the last section of a report, which describes the run. `code` replaces the command in this section."""
    date = datetime.fromisoformat(run["date"])
    text = f"llm2clip {run['version']}, {date.day} {date:%B %Y, %H:%M} UTC, {format_duration(run['seconds'])} on "
    text = f"{text}{run['machine']}. {note}".rstrip()
    blocks: list[Block] = [Heading("Run"), Paragraph(text), CodeBlock(run["command"] if code is None else code)]
    if settings:
        blocks.append(CollapsibleSection("Settings", settings))
    return blocks


class StageTimer:
    """Timer that prints the title of each `fit` stage and saves its duration in RUN/durations.json."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / DURATIONS_FILE
        self._stage, self._start = "", 0.0

    def start(self, title: str) -> None:
        """Stop the current stage and start a new stage. `title` has the form "1/4 tune: training on captions"."""
        self.stop()
        print_once(title)
        self._stage, self._start = title.split()[1].rstrip(":"), time.time()

    def stop(self) -> None:
        if self._stage and process_state().is_main_process:
            durations = json.loads(self._file.read_text()) if self._file.exists() else {}
            durations[self._stage] = durations.get(self._stage, 0.0) + time.time() - self._start
            atomic_write_text(self._file, json.dumps(durations))
        self._stage = ""
