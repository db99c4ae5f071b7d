"""Parallel processing of data in worker processes."""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from joblib import Parallel, delayed

S = TypeVar("S")
T = TypeVar("T")


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[S], T], items: Sequence[S], workers: int | None = None) -> Iterator[T]:
    """Apply a function to each item, and yield the results in the order of the items.

    Workers are separate processes that do not import the main script. The default number of workers is one per core. If
    there is one worker or one item, the work is done in this process.
    """
    workers = min(workers or count_cores(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # Without max_nbytes=None, large arrays would be written to temporary files. Idle workers exit after 10 seconds.
    options = {"max_nbytes": None, "pre_dispatch": 2 * workers, "backend": "loky", "idle_worker_timeout": 10}
    run = Parallel(n_jobs=workers, return_as="generator", **options)
    yield from run(delayed(function)(item) for item in items)
