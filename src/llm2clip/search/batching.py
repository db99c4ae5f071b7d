"""Requests of many clients, worked out together: a model takes thirty-two texts in little more time than one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")
LINGER = 0.03  # seconds, at most


class QueueFull(Exception):
    """Too much is waiting: come again."""


@dataclass
class _Asked(Generic[Item, Answer]):
    item: Item
    answer: asyncio.Future[Answer]


class Batcher(Generic[Item, Answer]):
    """Calls `work` with the items of several callers at once.

    While a batch is worked out the next one gathers. One that is smaller than the last waits a tenth of that one's time
    for company: its callers are on their way back with their next items, and a batch of the first of them alone would
    keep the others waiting. Whoever comes alone, again and again, does not wait.
    """

    def __init__(
        self,
        work: Callable[[list[Item]], Sequence[Answer]],
        executor: Executor,
        most: int = 32,
        waiting: int = 256,
        seen: Callable[[int], None] = lambda size: None,
    ) -> None:
        """
        Args:
            work: items to as many answers, called in the executor.
            executor: of one thread, if work must not run beside itself.
            most: items in a batch.
            waiting: items that may wait; one more is refused.
            seen: told the size of each batch.
        """
        self.work, self.executor, self.most, self.waiting, self.seen = work, executor, most, waiting, seen
        self._queue: asyncio.Queue[_Asked[Item, Answer]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._last, self._seconds = 0, 0.0  # the size of the last batch, and its time

    def __len__(self) -> int:
        """How many items wait."""
        return self._queue.qsize()

    async def ask(self, items: Sequence[Item]) -> list[Answer]:
        """The answers to some items, in their order.

        Raises:
            ValueError: there are more than may ever wait.
            Busy: too many wait already.
            Exception: what `work` raised for one of them alone.
        """
        if len(items) > self.waiting:
            raise ValueError(f"{len(items):,} at once; {self.waiting:,} at most")
        if len(self) + len(items) > self.waiting:
            raise QueueFull(f"{len(self):,} requests are waiting")
        loop = asyncio.get_running_loop()
        if self._task is None:
            self._task = loop.create_task(self._run())
        asked = [_Asked(item, loop.create_future()) for item in items]
        for one in asked:
            self._queue.put_nowait(one)
        try:
            return list(await asyncio.gather(*(one.answer for one in asked)))
        finally:
            for one in asked:  # whoever left, by a time-out or a failure beside it, is not worked for
                one.answer.cancel()

    async def close(self) -> None:
        """Stop; what still waits is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        while not self._queue.empty():
            self._queue.get_nowait().answer.cancel()

    async def _run(self) -> None:
        while True:
            batch = [await self._queue.get()]
            if len(self) + 1 < self._last:
                await asyncio.sleep(min(LINGER, self._seconds / 10))
            while len(batch) < self.most and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [one for one in batch if not one.answer.done()]
            if batch:
                self.seen(len(batch))
                self._last, start = len(batch), time.perf_counter()
                try:
                    await self._answer(batch)
                finally:
                    for one in batch:  # whoever was not answered, since all this is ended, must not wait for ever
                        one.answer.cancel()
                self._seconds = time.perf_counter() - start

    async def _answer(self, batch: list[_Asked[Item, Answer]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self.executor, self.work, [one.item for one in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(answers)} answers to {len(batch)} items")
        except Exception as error:
            if len(batch) > 1:  # who is to blame? the others must not suffer
                for one in batch:
                    await self._answer([one])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        for one, answer in zip(batch, answers, strict=True):
            if not one.answer.done():
                one.answer.set_result(answer)
