"""Settings that limit requests, and limits on the memory and connections of each client."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from dataclasses import dataclass

from uvicorn.protocols.http.h11_impl import H11Protocol

from llm2clip.search.queues import QueueFull

ALWAYS_ACCEPTED = 64 << 10  # bytes; requests up to this size are accepted even if the budget is exhausted


@dataclass(frozen=True)
class Limits:
    """Limits on the resources that requests to a server may use.

    Args:
        max_body_bytes: Maximum size of a request body in bytes. Larger requests are rejected with status 413.
        max_bytes_in_flight: Maximum total size in bytes of the request and response bodies in memory. A single client
            address may use a quarter of it. Requests that would exceed this size are rejected with status 429, unless
            they are smaller than 64 KB.
        max_pixels: Maximum number of pixels in an image. Larger images are rejected with status 413.
        max_queue: Maximum length of each of the four queues (texts, images, heat maps and searches). Requests that need
            a full queue are rejected with status 429.
        timeout: Maximum duration of a request in seconds. Requests that take longer fail with status 504.
        batch_size: Maximum number of texts or images per forward pass.
        max_connections: Maximum number of connections. If there are more, the server aborts a connection of the client
            with the most connections.
        idle_timeout: Maximum time in seconds that a connection waits for the client to send the headers of a request or
            to read more of a response. After this time, the connection is aborted.
    """

    max_body_bytes: int = 32 << 20
    max_bytes_in_flight: int = 512 << 20
    max_pixels: int = 50_000_000
    max_queue: int = 512
    timeout: float = 30.0
    batch_size: int = 32
    max_connections: int = 512
    idle_timeout: float = 10.0


def identify_client(address: tuple[str, int] | None) -> str:
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
    """Limit on the total size of the request and response bodies in memory, overall and per client."""

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


class LimitedConnection(H11Protocol):
    """A uvicorn connection that is aborted if it waits for the client too long or if there are too many connections.

    A timer runs while the server waits for complete request headers, and while a response cannot be sent because the
    client does not read it. `RequestMiddleware` limits the wait for the body of a request. Connections are aborted
    rather than closed, because a transport closes only after the client has read all buffered data.
    """

    limits: Limits
    by_client: dict[str, dict[LimitedConnection, None]]  # open connections of each client, oldest first

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer: asyncio.TimerHandle | None = None
        self._client_key = identify_client(self.client)
        self.by_client.setdefault(self._client_key, {})[self] = None
        self._update_timer()
        if len(self.connections) > self.limits.max_connections:
            self._abort_one_connection()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_timer()
        self._unregister()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_timer()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._update_timer()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._update_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._update_timer()

    def _is_idle(self) -> bool:
        """Return True if no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def _update_timer(self) -> None:
        """Start the timer when the server begins to wait for the client, and stop it when the wait is over."""
        if not (self._is_idle() or self.flow.write_paused):
            self._stop_timer()
        elif self._timer is None:
            self._timer = self.loop.call_later(self.limits.idle_timeout, self.transport.abort)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort_one_connection(self) -> None:
        """Abort the oldest connection, preferably an idle one, of the client with the most connections.

        A new connection counts as idle, so it is aborted if all other connections of its client are busy.
        """
        largest = max(self.by_client.values(), key=len)
        oldest = next(iter(largest))
        connection = next((connection for connection in largest if connection._is_idle()), oldest)
        connection._unregister()  # connection_lost is called later, and another connection may be made before then
        connection.transport.abort()

    def _unregister(self) -> None:
        """Remove this connection from the list of open connections."""
        self.connections.discard(self)
        connections = self.by_client.get(self._client_key, {})
        connections.pop(self, None)
        if not connections:
            self.by_client.pop(self._client_key, None)


def make_connection_class(limits: Limits) -> type[LimitedConnection]:
    """Return a connection class with the given limits, for uvicorn's setting `http`."""
    return type("LimitedConnection", (LimitedConnection,), {"limits": limits, "by_client": {}})
