"""Background preparation of the next items, such as training batches, while the caller uses the current one."""

from __future__ import annotations

import atexit
from collections.abc import Generator, Iterator
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
PREFETCH_DEPTH = 2  # default number of items to prepare in advance


def prefetch(items: Generator[T], device: torch.device) -> Generator[T] | Prefetcher[T]:
    """Return an iterator that prepares items in a background thread. The caller must close it.

    On the CPU, return `items` unchanged, because a background thread would compete with training for the cores.
    """
    return items if device.type == "cpu" else Prefetcher(items)


class Prefetcher(Iterator[T], Generic[T]):
    """Iterator that runs a generator in a background thread and preserves the order of its items.

    An exception in the generator is raised after all preceding items have been returned. `close` closes the generator.
    """

    def __init__(self, items: Generator[T], depth: int = PREFETCH_DEPTH) -> None:
        self._items = items
        self._results: SimpleQueue[tuple[T | None, BaseException | None]] = SimpleQueue()
        self._free = Semaphore(depth)
        self._closed = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()
        # If the interpreter exits while the thread is running C++ code, the process is aborted ("terminate called
        # without an active exception"). Stop the thread at exit if `close` was not called or was interrupted.
        atexit.register(self.close)

    def __next__(self) -> T:
        if self._error is None:
            item, self._error = self._results.get()
            self._free.release()
        if self._error is not None:
            raise self._error
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Wait until the thread has prepared its current item. Then stop it and close the generator."""
        self._closed = True
        self._free.release()
        self._thread.join()
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            while True:
                self._free.acquire()
                if self._closed:
                    break
                self._results.put((next(self._items), None))
        except BaseException as error:  # includes the StopIteration at the end of the generator
            self._results.put((None, error))
        finally:
            self._items.close()
