"""Identification of clients, and limits on the memory and threads that each client may use."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from llm2clip.search.batching import QueueFull

Result = TypeVar("Result")
current_client: ContextVar[str] = ContextVar("current_client", default="")  # key of the client of the current request
ALWAYS_ACCEPTED = 64 << 10  # bytes; smaller bodies are accepted even if the budget is exhausted


def client_key(address: tuple[str, int] | None) -> str:
    """Return a string that identifies a client: its IPv4 address without the port, or its IPv6 /64 network.

    IPv6 clients usually have a /64 network, so they could send each request from a different address.
    """
    if address is None:
        return ""
    host = address[0]
    if ":" not in host:
        return host
    try:
        return str(ipaddress.IPv6Network((host.partition("%")[0], 64), strict=False))
    except ValueError:
        return host


class ByteBudget:
    """Limit on the total size of the bodies in memory, overall and for each client."""

    def __init__(self, max_bytes: int) -> None:
        """
        Args:
            max_bytes: Maximum total number of bytes. Each client may use a quarter of it.
        """
        self.max_bytes, self.max_bytes_per_client = max_bytes, max_bytes // 4
        self.total = 0
        self.by_client: Counter[str] = Counter()


class ByteAllocation:
    """A request's share of a byte budget."""

    def __init__(self, budget: ByteBudget, client: str) -> None:
        self._budget, self._client = budget, client
        self.size = 0

    def add(self, size: int) -> None:
        """Allocate additional bytes.

        Raises:
            QueueFull: The budget is exhausted, or the client has exceeded its share.
        """
        budget = self._budget
        self.size += size
        budget.total += size
        budget.by_client[self._client] += size
        is_exhausted = budget.total > budget.max_bytes or budget.by_client[self._client] > budget.max_bytes_per_client
        if is_exhausted and self.size > ALWAYS_ACCEPTED:
            raise QueueFull("the server is busy: the requests in progress are too large; try again later")

    def release(self) -> None:
        """Return all bytes to the budget."""
        self._budget.total -= self.size
        self._budget.by_client[self._client] -= self.size
        if not self._budget.by_client[self._client]:
            del self._budget.by_client[self._client]
        self.size = 0


class FairThreadPool:
    """Thread pool in which a client with many jobs delays other clients by only a few of them.

    Each client may have as many jobs in the pool's queue as there are threads. Its remaining jobs wait outside the
    queue.
    """

    def __init__(self, threads: int, name: str, initializer: Callable[[], Any] | None = None) -> None:
        """
        Args:
            threads: Number of threads.
            name: Prefix of the threads' names.
            initializer: Function that each thread calls when it starts.
        """
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, name, initializer)
        self._slots: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """Call a function in a thread and return its result. If the caller is cancelled, a running call continues."""
        loop = asyncio.get_running_loop()
        client = current_client.get()
        slots = self._slots.get(client) or self._slots.setdefault(client, asyncio.Semaphore(self._threads))
        await slots.acquire()
        future = self._pool.submit(function, *args)

        def release(_: Any) -> None:
            with suppress(RuntimeError):  # the event loop has been closed
                loop.call_soon_threadsafe(slots.release)

        future.add_done_callback(release)  # not when the caller is cancelled, because the thread is then still in use
        return await asyncio.wrap_future(future)

    def shutdown(self) -> None:
        """Cancel all jobs that have not started, without waiting for the others."""
        self._pool.shutdown(wait=False, cancel_futures=True)
