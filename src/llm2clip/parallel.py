"""Helpers for background threads and worker processes."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import TYPE_CHECKING, Generic, TypeVar

from joblib import Parallel, delayed

if TYPE_CHECKING:
    import torch  # not imported in worker processes, because the import is slow

S = TypeVar("S")
T = TypeVar("T")


def count_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_processes(function: Callable[[S], T], items: Sequence[S], workers: int | None = None) -> Iterator[T]:
    """Apply a function to each item in worker processes. Yield the results in the order of the items.

    By default, there is one worker per CPU core. With a single worker or item, the function runs in the calling
    process. Workers do not import the main script.
    """
    workers = min(workers or count_cores(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # Without max_nbytes=None, large arrays would be written to temporary files.
    options = {"max_nbytes": None, "pre_dispatch": 2 * workers, "backend": "loky", "idle_worker_timeout": 10}
    run = Parallel(n_jobs=workers, return_as="generator", **options)
    yield from run(delayed(function)(item) for item in items)


def prefetch_on_accelerator(items: Generator[T], device: torch.device) -> Generator[T] | Prefetcher[T]:
    """Return an iterator that prepares items in a background thread. The caller must close the iterator.

    On the CPU, return `items` unchanged, because a background thread would compete with training for CPU cores.
    """
    return items if device.type == "cpu" else Prefetcher(items)


class Prefetcher(Iterator[T], Generic[T]):
    """Iterator that runs a generator in a background thread and preserves the order of its items.

    An exception raised by the generator is re-raised after all preceding items have been returned. `depth` is the
    number of items to prepare in advance.
    """

    def __init__(self, items: Generator[T], depth: int = 2) -> None:
        self._items = items
        self._results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._free = Semaphore(depth)
        self._closed = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._prefetch_items, name="prefetch", daemon=True)
        self._thread.start()
        # The process aborts if the interpreter exits while the thread runs C++ code, so the thread is stopped at exit.
        atexit.register(self.close)

    def __next__(self) -> T:
        if self._error is None:
            item, self._error = self._results.get()
            self._free.release()
        if self._error is not None:
            raise self._error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop the thread after its current item, and close the generator."""
        self._closed = True
        self._free.release()
        self._thread.join()
        atexit.unregister(self.close)

    def _prefetch_items(self) -> None:
        try:
            while True:
                self._free.acquire()
                if self._closed:
                    break
                self._results.put((next(self._items), None))
        except BaseException as error:  # including StopIteration at the end of the generator
            self._results.put((None, error))
        finally:
            self._items.close()
