"""Durations of the stages of a run."""

from __future__ import annotations

import json
import time
from pathlib import Path

from llm2clip.io_utils import atomic_write_text
from llm2clip.runs.ranks import print_once, process_state

DURATIONS_FILE = "durations.json"


class StageClock:
    """Announces the stages of `fit`, and adds the time that each of them takes to RUN/durations.json."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / DURATIONS_FILE
        self._stage, self._start = "", 0.0

    def start(self, title: str) -> None:
        """Stop the previous stage, and start a stage with a title such as "1/4 tune: training on captions"."""
        self.stop()
        print_once(title)
        self._stage, self._start = title.split()[1].rstrip(":"), time.time()

    def stop(self) -> None:
        """Stop the current stage, if there is one."""
        if self._stage and process_state().is_main_process:
            durations = json.loads(self._file.read_text()) if self._file.exists() else {}
            durations[self._stage] = durations.get(self._stage, 0.0) + time.time() - self._start
            atomic_write_text(self._file, json.dumps(durations))
        self._stage = ""
