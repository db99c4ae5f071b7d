"""Dynamic batching: requests from different clients are batched together.

A forward pass over 32 texts takes little longer than a forward pass over a single text.
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
MAX_WAIT = 0.03  # maximum wait for a batch to fill, in seconds


class QueueFull(Exception):
    """Raised when too many items are waiting; the caller should try again later."""


@dataclass
class _Pending(Generic[Item, Result]):
    """An item waiting to be processed, with a future for its result."""

    item: Item
    result: asyncio.Future[Result]


class Batcher(Generic[Item, Result]):
    """Combines items from several callers into batches, and processes each batch with one call of `work`.

    While one batch is processed, the next batch fills. If the next batch is smaller than the previous one, it waits
    for up to a tenth of the time that the previous batch took. The callers of the previous batch are about to submit
    their next items, and processing the first of these items alone would delay all the others. A single client never
    waits, because all its batches contain one item.
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
            work: Function that returns one result per item. It is called in the executor.
            executor: Executor that runs `work`. It must have a single thread if calls of `work` must not overlap.
            max_batch_size: Maximum number of items per batch.
            max_queue: Maximum number of waiting items.
            on_batch: Callback that receives the size of each batch.
        """
        self.work, self.executor = work, executor
        self.max_batch_size, self.max_queue, self.on_batch = max_batch_size, max_queue, on_batch
        self._queue: asyncio.Queue[_Pending[Item, Result]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._last_size, self._last_seconds = 0, 0.0  # number of items and duration of the last batch

    def __len__(self) -> int:
        """Return the number of waiting items."""
        return self._queue.qsize()

    async def submit(self, items: Sequence[Item]) -> list[Result]:
        """Process items and return their results, in the same order.

        Raises:
            ValueError: There are more than `max_queue` items.
            QueueFull: Too many items are already waiting.
            Exception: `work` failed for a single item; its exception is passed on.
        """
        if len(items) > self.max_queue:
            raise ValueError(f"too many items in one request: {len(items):,}; the limit is {self.max_queue:,}")
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
            # After a timeout or an error in one item, the other results are no longer needed.
            _cancel(pending)

    async def close(self) -> None:
        """Stop processing and cancel all waiting items."""
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
                _cancel(batch)  # so that callers do not wait forever if this task was cancelled
            self._last_seconds = time.perf_counter() - start

    async def _next_batch(self) -> list[_Pending[Item, Result]]:
        """Wait for items, and return those that have not been cancelled (possibly none)."""
        batch = [await self._queue.get()]
        if len(self) + 1 < self._last_size:
            await asyncio.sleep(min(MAX_WAIT, self._last_seconds / 10))
        while len(batch) < self.max_batch_size and not self._queue.empty():
            batch.append(self._queue.get_nowait())
        return [entry for entry in batch if not entry.result.done()]

    async def _process(self, batch: list[_Pending[Item, Result]]) -> None:
        """Process a batch and set its results. If it fails, retry each item alone, so that only invalid items fail."""
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
    """Cancel all futures that have no result yet."""
    for entry in entries:
        entry.result.cancel()
