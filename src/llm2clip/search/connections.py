"""HTTP connections, with limits on their number and on how long they may wait for the client."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from llm2clip.search.clients import client_key
from llm2clip.search.schemas import Limits


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
        self._client_key = client_key(self.client)
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

        Since this connection is itself idle, it is aborted if all other connections of the same client are in use.
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


def limited_connection(limits: Limits) -> type[LimitedConnection]:
    """Return a connection class with the given limits, to use as uvicorn's setting `http`."""
    return type("LimitedConnection", (LimitedConnection,), {"limits": limits, "by_client": {}})
