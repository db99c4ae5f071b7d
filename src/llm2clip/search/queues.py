"""Work queues: a batcher that combines items from several clients, and a thread pool that is fair to all clients.

Batching increases throughput, because encoding 32 texts takes little longer than encoding one.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

Item = TypeVar("Item")
Result = TypeVar("Result")
current_client: ContextVar[str] = ContextVar("current_client", default="")  # client key of the current request
MAX_WAIT = 0.03  # maximum time to wait for more items before processing a batch, in seconds


class QueueFull(Exception):
    """Raised when too many items are waiting. The caller should try again later."""


@dataclass
class _Pending(Generic[Item, Result]):
    """A queued item and the future for its result."""

    item: Item
    result: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Combines items from several callers into batches and processes each batch with a single call to `work`.

    While a batch is being processed, new items are collected for the next batch. If the next batch would be smaller
    than the previous one, the batcher waits for up to a tenth of the previous batch's duration, which gives callers
    time to submit their next items. Without this wait, the first new item would form a batch of its own and delay the
    others. With a single client that submits one item at a time, the batcher never waits.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Result]],
        executor: Executor,
        max_batch_size: int = 32,
        max_queue: int = 256,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        """
        Args:
            work: Function that takes a list of items and returns one result per item.
            executor: Executor that runs `work`. If calls must not overlap, use a single-threaded executor.
            max_batch_size: Maximum number of items per batch.
            max_queue: Maximum number of waiting items.
            on_batch: Callback that receives the size of each batch.
        """
        self.work, self.executor = work, executor
        self.max_batch_size, self.max_queue, self.on_batch = max_batch_size, max_queue, on_batch
        self._queue: asyncio.Queue[_Pending[Item, Result]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._last_size, self._last_seconds = 0, 0.0  # number of items in the last batch, and its duration

    def __len__(self) -> int:
        """Return the number of waiting items."""
        return self._queue.qsize()

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Process items and return their results in the same order.

        Raises:
            ValueError: There are more than `max_queue` items.
            QueueFull: The queue does not have enough space for the items.
            Exception: Any exception that `work` raises for one of the items.
        """
        _check_capacity(len(items), len(self), self.max_queue, "items")
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._process_batches())
        pending: list[_Pending[Item, Result]] = [_Pending(item, loop.create_future()) for item in items]
        for entry in pending:
            self._queue.put_nowait(entry)
        try:
            return list(await asyncio.gather(*(entry.result for entry in pending)))
        finally:
            # If the caller has timed out or an item has failed, the remaining results are not needed.
            _cancel_pending(pending)

    async def close(self) -> None:
        """Stop processing and cancel all waiting items."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        while not self._queue.empty():
            self._queue.get_nowait().result.cancel()

    async def _process_batches(self) -> None:
        """Process batches until the task is cancelled."""
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            self.on_batch(len(batch))
            self._last_size, start = len(batch), time.perf_counter()
            try:
                await self._process_batch(batch)
            finally:
                _cancel_pending(batch)  # if this task is cancelled, callers must not wait for their results forever
            self._last_seconds = time.perf_counter() - start

    async def _next_batch(self) -> list[_Pending[Item, Result]]:
        """Wait for items and return the next batch. The batch is empty if all of its items were cancelled."""
        batch = [await self._queue.get()]
        if len(self) + 1 < self._last_size:
            await asyncio.sleep(min(MAX_WAIT, self._last_seconds / 10))
        while len(batch) < self.max_batch_size and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return [entry for entry in batch if not entry.result.done()]

    async def _process_batch(self, batch: list[_Pending[Item, Result]]) -> None:
        """Process a batch and set the results of its items.

        If `work` fails for the batch, it is called again for each item, so that only invalid items fail.
        """
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.executor, self.work, [entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"work returned {len(results)} results for {len(batch)} items")
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._process_batch([entry])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)


def _check_capacity(count: int, waiting: int, limit: int, unit: str) -> None:
    """Raise ValueError if a request has more items than a queue can hold, or QueueFull if they do not fit now."""
    if count > limit:
        raise ValueError(f"too many {unit} in one request: {count:,}; the limit is {limit:,}")
    if waiting + count > limit:
        raise QueueFull(f"the server is busy: {waiting:,} {unit} are waiting; try again later")


def _cancel_pending(entries: Sequence[_Pending[Item, Result]]) -> None:
    """Cancel the futures of all entries without a result."""
    for entry in entries:
        entry.result.cancel()


class FairThreadPool:
    """Thread pool in which a client with many jobs delays other clients only by a few jobs.

    Each client may have at most one job per thread in the pool's queue. Its other jobs wait outside the queue.
    """

    def __init__(self, threads: int, unit: str, max_waiting: int, initializer: Callable[[], Any] | None = None) -> None:
        """
        Args:
            unit: Plural noun for what the jobs process, such as "images". Used in error messages and thread names.
            max_waiting: Maximum number of waiting and running jobs.
            initializer: Function that each thread calls when it starts.
        """
        self.waiting = 0  # number of waiting and running jobs
        self._threads, self._unit, self._max_waiting = threads, unit, max_waiting
        self._pool = ThreadPoolExecutor(threads, unit, initializer)
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Call a function for each item, one after another, and return the results.

        If the caller is cancelled, the current function call still runs to completion.

        Raises:
            ValueError: There are more than `max_waiting` items.
            QueueFull: Too many jobs are waiting.
            Exception: Any exception that the function raises.
        """
        _check_capacity(len(items), self.waiting, self._max_waiting, self._unit)
        self.waiting += len(items)
        try:
            return [await self._run_job(function, item) for item in items]
        finally:
            self.waiting -= len(items)

    async def _run_job(self, function: Callable[[Item], Result], item: Item) -> Result:
        loop = asyncio.get_running_loop()
        client = current_client.get()
        slots = self._slots.get(client) or self._slots.setdefault(client, asyncio.Semaphore(self._threads))
        await slots.acquire()
        future = self._pool.submit(function, item)

        def release(_: Any) -> None:
            with suppress(RuntimeError):  # the event loop has been closed
                loop.call_soon_threadsafe(slots.release)

        future.add_done_callback(release)  # a cancelled job keeps its slot while its thread is busy
        return await asyncio.wrap_future(future)

    def shutdown(self) -> None:
        """Cancel all jobs that have not started, without waiting for running jobs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
