"""Time and memory of benchmarks, on Linux."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any


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
        with suppress(FileNotFoundError, ProcessLookupError):  # the process has just ended
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


def memory_mb(name: str, pid: int | str = "self") -> float:
    """Return the memory of a process in MB: current memory for VmRSS, or peak memory for VmHWM."""
    with open(f"/proc/{pid}/status") as file:
        return next(float(line.split()[1]) for line in file if line.startswith(name)) / 1e3


def reset_peak_memory() -> float:
    """Reset the recorded peak memory of this process, and return its current memory in MB."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory_mb("VmRSS")


def run_in_new_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, so that earlier calls do not affect the measurement. Return its result."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as executor:
        return executor.submit(function, *args).result()
