"""Dynamic batching: requests of many clients go through the model together.

A forward pass over 32 texts takes little longer than one over a single text.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
MAX_WAIT = 0.03  # seconds to wait for a batch to fill


class QueueFull(Exception):
    """Too many items are waiting; try again later."""


@dataclass
class _Pending(Generic[Item, Result]):
    """An item with the future of its result."""

    item: Item
    result: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Calls `work` with the items of several callers at once.

    While one batch is processed, the next one fills. A batch that is smaller than the previous one waits for up to a
    tenth of the previous one's duration: the callers of that batch are about to send their next items, and starting
    with the first of them alone would delay all others. A single client, whose batches all have one item, never waits.
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
            work: Returns one result per item. Called in the executor.
            executor: Use one with a single thread if calls of `work` must not overlap.
            max_batch_size: Maximum number of items per call.
            max_queue: Maximum number of waiting items.
            on_batch: Called with the size of each batch.
        """
        self.work, self.executor = work, executor
        self.max_batch_size, self.max_queue, self.on_batch = max_batch_size, max_queue, on_batch
        self._queue: asyncio.Queue[_Pending[Item, Result]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._last_size, self._last_seconds = 0, 0.0  # of the last batch

    def __len__(self) -> int:
        """Return the number of waiting items."""
        return self._queue.qsize()

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Process items and return their results, in the same order.

        Raises:
            ValueError: There are more items than may ever wait.
            QueueFull: Too many items are waiting already.
            Exception: What `work` raised for one of the items alone.
        """
        if len(items) > self.max_queue:
            raise ValueError(f"{len(items):,} items in one request, at most {self.max_queue:,} are allowed")
        if len(self) + len(items) > self.max_queue:
            raise QueueFull(f"the server is busy: {len(self):,} items are waiting; try again later")
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._run())
        pending: list[_Pending[Item, Result]] = [_Pending(item, loop.create_future()) for item in items]
        for entry in pending:
            self._queue.put_nowait(entry)
        try:
            return list(await asyncio.gather(*(entry.result for entry in pending)))
        finally:
            # After a timeout, or an error in another item, nothing waits for the remaining results.
            _cancel(pending)

    async def close(self) -> None:
        """Stop, and cancel all waiting items."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        while not self._queue.empty():
            self._queue.get_nowait().result.cancel()

    async def _run(self) -> None:
        """Process batches until the task is cancelled."""
        while True:
            batch = await self._next_batch()
            if not batch:
                continue
            self.on_batch(len(batch))
            self._last_size, start = len(batch), time.perf_counter()
            try:
                await self._process(batch)
            finally:
                _cancel(batch)  # if this task was cancelled, callers must not wait forever
            self._last_seconds = time.perf_counter() - start

    async def _next_batch(self) -> list[_Pending[Item, Result]]:
        """Wait for items, and return those that are still wanted; possibly none."""
        batch = [await self._queue.get()]
        if len(self) + 1 < self._last_size:
            await asyncio.sleep(min(MAX_WAIT, self._last_seconds / 10))
        while len(batch) < self.max_batch_size and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return [entry for entry in batch if not entry.result.done()]

    async def _process(self, batch: list[_Pending[Item, Result]]) -> None:
        """Set the results of a batch. If it fails, process its items one by one, so that only invalid ones fail."""
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self.executor, self.work, [entry.item for entry in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"work returned {len(results)} results for {len(batch)} items")
        except Exception as error:
            if len(batch) > 1:
                for entry in batch:
                    await self._process([entry])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)


def _cancel(entries: Sequence[_Pending[Item, Result]]) -> None:
    """Cancel the futures that have no result yet."""
    for entry in entries:
        entry.result.cancel()
