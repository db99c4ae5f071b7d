"""Measurements in new processes: CPU and wall seconds, and memory. See `data.py`."""

import gc
import json
import os
import resource
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Measurement = Callable[..., tuple[Any, Any]]  # (timer, options) -> (results for JSON, objects to keep in memory)


class Timer:
    """CPU and wall seconds of a `with` block. CPU seconds include all processes started within the block."""

    seconds = cpu = 0.0

    def __enter__(self) -> None:
        self._start, self._start_cpu = time.perf_counter(), measure_cpu()

    def __exit__(self, *error: object) -> None:
        self.seconds, self.cpu = time.perf_counter() - self._start, measure_cpu() - self._start_cpu


def measure_cpu() -> float:
    """Return the CPU seconds of this process and its descendants, running or finished."""
    ticks = 0
    for pid in list_processes(os.getpid()):
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    finished = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ticks / os.sysconf("SC_CLK_TCK") + finished.ru_utime + finished.ru_stime


def list_processes(pid: int) -> list[int]:
    """List a process and its running descendants."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [pid, *(descendant for child in children for descendant in list_processes(int(child)))]


def read_memory(pid: int) -> dict[str, float]:
    """Return the memory of a process in MB: RSS, PSS, and the part of the PSS that no file backs."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:  # the process has ended
        return dict.fromkeys(("rss", "pss", "anonymous"), 0.0)
    values = {line.split(":")[0]: int(line.split()[1]) * 1024 / 1e6 for line in lines}
    return {"rss": values["Rss"], "pss": values["Pss"], "anonymous": values["Pss_Anon"] + values["Pss_Shmem"]}


def measure(name: str, processes: int = 1, checkout: Path | None = None, cores: int = 0, **options: Any) -> Any:
    """Run a measurement of this script in new processes at once. Return a dict of the results of the first process.

    The memory is measured when all processes have finished and none has ended. "peak" is the maximum of the memory that
    no file backs, of all processes and their workers.

    Args:
        checkout: Checkout of the code to measure. Default: the code that this process uses.
        cores: Number of CPU cores that the processes may use. 0 means all.
    """
    python_path = [*([str(checkout / "src")] if checkout else []), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, sys.argv[0], ".", "make", "--run", json.dumps([name, options])]
    if cores:
        command = ["taskset", "--cpu-list", f"0-{cores - 1}", *command]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path)}
    children = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
    peak, lines = 0.0, []
    for child in children:
        while not select.select([child.stdout], [], [], 0.5)[0]:
            peak = max(peak, sum(read_memory(pid)["anonymous"] for pid in list_processes(child.pid)))
        lines.append(child.stdout.readline())
    memory = read_memory(children[0].pid)
    for child, line in zip(children, lines, strict=True):
        child.communicate("\n")
        if not line:
            raise SystemExit(f"the measurement {name} failed: {options}")
    return {**json.loads(lines[0]), **memory, "peak": max(peak, memory["anonymous"])}


def run_measurement(function: Measurement, options: dict[str, Any]) -> None:
    """Run a measurement, print its results, and wait for a line of input before freeing its memory. Do not return."""
    output = os.dup(1)
    os.dup2(2, 1)  # other messages must not be mixed with the results
    timer = Timer()
    results, _objects = function(timer, **options)
    gc.collect()
    line = json.dumps({"seconds": timer.seconds, "cpu": timer.cpu, "results": results})
    os.write(output, line.encode() + b"\n")
    sys.stdin.readline()
    os._exit(0)
