"""Limits of the server on memory and connections, with clients that behave badly on real sockets."""

import asyncio
import io
import json
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import urlsplit

import pyarrow as pa
import pytest
from fastapi.responses import Response, StreamingResponse
from PIL import Image
from pyarrow import parquet
from pydantic import ValidationError
from starlette.testclient import TestClient

from conftest import HANG_TIMEOUT
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.inference import QueueFullError
from llm2clip.search.middleware import (
    ALWAYS_ACCEPTED,
    MAX_JSON_VALUES,
    ByteAllocation,
    ByteBudget,
    make_connection_class,
)
from llm2clip.search.schemas import EmbedRequest, SearchRequest
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import Deadline, DeadlineExceededError, FairSemaphore, current_deadline
from search_fixtures import create_patient_app, make_index, running_server, wait_until

BASE_URL = "http://localhost"
HALF_HEADERS = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
REQUEST_WITHOUT_BODY = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
SHORT_TIMEOUT = 0.05  # seconds
needs_loopback_addresses = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is not a loopback address")


@contextmanager
def limited_server(
    model: DualEncoder, backend: SqliteBackend | None = None, **limits: Any
) -> Iterator[tuple[str, int]]:
    """Serve a model with the connection class of `serve`, and yield the address."""
    app = create_patient_app(model, backend, **{"idle_timeout": HANG_TIMEOUT, **limits})
    with running_server(app, http=make_connection_class(app.state.service.limits), ws="none") as url:
        address = urlsplit(url)
        yield str(address.hostname), int(address.port or 0)


def connect(address: tuple[str, int], data: bytes, source: str = "127.0.0.1") -> socket.socket:
    """Connect to a server from a loopback address, and send data."""
    client = socket.create_connection(address, timeout=HANG_TIMEOUT, source_address=(source, 0))
    client.sendall(data)
    return client


def start_request(address: tuple[str, int]) -> socket.socket:
    """Connect and send the headers of a request. Wait until the server waits for the body."""
    client = connect(address, REQUEST_WITHOUT_BODY)
    assert client.recv(1000).startswith(b"HTTP/1.1 100")
    return client


def read_all(client: socket.socket) -> bytes:
    """Read until the server closes or aborts the connection. If it does neither, the test fails with a timeout."""
    pieces = []
    try:
        while piece := client.recv(1 << 16):
            pieces.append(piece)
    except ConnectionError:
        pass
    return b"".join(pieces)


def count_open(clients: list[socket.socket]) -> int:
    """Return the number of connections that the server has neither closed nor aborted. No response may be unread."""
    return len(clients) - len(select.select(clients, [], [], 0)[0])


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_unknown_fields_create_a_single_error() -> None:
    """The error does not repeat long names."""
    request = {f"{n:x}": 0 for n in range(1000)}
    for body in (request, {"texts": ["a"], "filter": request}, {"x" * 1_000_000: 0}):
        with pytest.raises(ValidationError) as error:
            SearchRequest.model_validate(body)
        [problem] = error.value.errors()
        assert len(problem["msg"]) < 500


@pytest.mark.parametrize("item", [[], {}, None, 1, "", "\ud800"])
def test_lists_with_many_invalid_items_create_few_errors(item: Any) -> None:
    """Validation runs in the event loop, where it delays all other requests."""
    for model, field in ((EmbedRequest, "input"), (SearchRequest, "texts")):
        with pytest.raises(ValidationError) as error:
            model.model_validate({"texts": ["a"], field: [item] * 1000})
        assert error.value.error_count() <= 2


def test_json_with_too_many_values_is_rejected_before_it_is_parsed(
    dual_encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[int] = []
    loads = json.loads

    def count_and_parse(text: Any, **options: Any) -> Any:
        parsed.append(len(text))
        return loads(text, **options)

    headers = {"content-type": "application/json"}
    with TestClient(create_patient_app(dual_encoder), base_url=BASE_URL) as client:
        monkeypatch.setattr(json, "loads", count_and_parse)
        for body in (b"[" * MAX_JSON_VALUES, b'{"a":0' + b',"a":0' * MAX_JSON_VALUES + b"}", b"[{" * MAX_JSON_VALUES):
            response = client.post("/search", content=body + b" ", headers=headers)
            message = loads(response.content)["error"]["message"] if response.status_code == 413 else response.text
            assert "too many values" in message or len(body) == MAX_JSON_VALUES, message
        assert all(size <= MAX_JSON_VALUES + 1 for size in parsed)


def test_byte_budget_limits_the_total() -> None:
    budget = ByteBudget(1 << 20)
    allocations: list[ByteAllocation] = []

    def allocate(size: int) -> None:
        allocations.append(ByteAllocation(budget))
        allocations[-1].reserve(size)

    for _ in range(4):
        allocate(256 << 10)
    with pytest.raises(QueueFullError):
        allocate(ALWAYS_ACCEPTED + 1)
    allocations.pop().release()
    allocate(ALWAYS_ACCEPTED)  # small bodies are always accepted
    assert budget.total == (1 << 20) + ALWAYS_ACCEPTED
    allocations.pop(0).release()
    allocate(128 << 10)
    for allocation in allocations:
        allocation.release()
    allocations[1].release()  # nothing is left
    assert budget.total == 0


class CountingStream(io.RawIOBase):
    """A stream of zeros that counts the bytes that are read from it."""

    def __init__(self, size: int) -> None:
        self.size, self.count, self.was_closed = size, 0, threading.Event()

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.size if whence else offset

    def read(self, size: int = -1) -> bytes:
        self.count += size
        return bytes(size)

    def close(self) -> None:
        self.was_closed.set()


def test_image_is_read_only_as_fast_as_the_client_reads_it(
    dual_encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 64 << 20  # much more than the buffers of two sockets
    streams = [CountingStream(size), CountingStream(size)]
    opened = iter(streams)
    monkeypatch.setattr(
        "llm2clip.search.inference.open_original_image", lambda backend, hit_id: (next(opened), "image/bmp")
    )
    monkeypatch.setattr("llm2clip.search.inference.InferenceService.require_index", lambda self: Mock())
    request = b"GET /image/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with limited_server(dual_encoder) as address, connect(address, request) as reader:
        assert len(read_all(reader).partition(b"\r\n\r\n")[2]) == streams[0].count == size
    with limited_server(dual_encoder, idle_timeout=SHORT_TIMEOUT) as address, connect(address, request) as slow_reader:
        assert streams[1].was_closed.wait(HANG_TIMEOUT)
        assert streams[1].count < size / 2
        assert len(read_all(slow_reader)) <= streams[1].count  # the connection was aborted


def test_downloads_of_table_cells_count_towards_the_byte_budget(dual_encoder: DualEncoder, tmp_path: Path) -> None:
    """A cell stays in memory until the client has read it, however slowly."""
    stream = io.BytesIO()
    Image.effect_noise((4000, 4000), 100).save(stream, "PNG", compress_level=0)
    size = len(stream.getvalue())  # 16 MB, more than the buffers of two sockets
    parquet.write_table(pa.table({"image": [stream.getvalue()]}), tmp_path / "table.parquet")
    backend = make_index(tmp_path / "index", tmp_path / "table.parquet", dual_encoder)
    request = b"GET /image/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    limits = {"max_bytes_in_flight": round(1.5 * size), "max_body_bytes": 2 * size}
    with limited_server(dual_encoder, backend, **limits) as address, ExitStack() as stack:
        slow = stack.enter_context(connect(address, request))
        start = slow.recv(1000)
        assert start.startswith(b"HTTP/1.1 200")
        refused = read_all(stack.enter_context(connect(address, request)))
        assert refused.startswith(b"HTTP/1.1 429") and b"retry-after" in refused
        assert len(start + read_all(slow)) > size
        assert read_all(stack.enter_context(connect(address, request))).startswith(b"HTTP/1.1 200")


def test_large_responses_are_sent_in_pieces_and_counted(dual_encoder: DualEncoder) -> None:
    app = create_patient_app(dual_encoder, max_bytes_in_flight=4 << 20)
    size = [300 << 10]

    app.add_api_route("/large", lambda: Response(bytes(size[0])))
    with TestClient(app, base_url=BASE_URL) as client:
        assert client.get("/large").content == bytes(size[0])
        size[0] = 5 << 20  # more than max_bytes_in_flight
        response = client.get("/large")
        assert response.status_code == 429 and response.headers["x-content-type-options"] == "nosniff"
        size[0] = 300 << 10
        assert client.get("/large").status_code == 200  # the bytes have been released


# ---- connections ----------------------------------------------------------------------------------------------------


def test_connections_without_complete_headers_are_aborted(dual_encoder: DualEncoder) -> None:
    with limited_server(dual_encoder, idle_timeout=SHORT_TIMEOUT) as address, ExitStack() as stack:
        clients = [stack.enter_context(connect(address, data)) for data in (b"", HALF_HEADERS, HALF_HEADERS)]
        assert [read_all(client) for client in clients] == [b""] * 3


def test_connection_is_aborted_if_the_body_continues_after_the_response(dual_encoder: DualEncoder) -> None:
    request = b"POST /embed HTTP/1.1\r\nHost: other.example\r\nContent-Length: 1000000\r\n\r\n"
    with limited_server(dual_encoder, idle_timeout=SHORT_TIMEOUT) as address, connect(address, request) as client:
        assert read_all(client).startswith(b"HTTP/1.1 400")


def test_a_new_connection_replaces_an_idle_one(dual_encoder: DualEncoder) -> None:
    with limited_server(dual_encoder, max_connections=3) as address, ExitStack() as stack:
        busy = stack.enter_context(start_request(address))
        idle = [stack.enter_context(connect(address, HALF_HEADERS)) for _ in range(2)]
        new = stack.enter_context(start_request(address))
        assert read_all(idle[0]) == b""  # the oldest idle connection was aborted
        for client in (busy, new):
            client.sendall(b"123456789")
            assert client.recv(1000).startswith(b"HTTP/1.1 422")


@pytest.mark.parametrize("data", [b"", REQUEST_WITHOUT_BODY])
def test_a_new_connection_does_not_replace_a_busy_one(dual_encoder: DualEncoder, data: bytes) -> None:
    with limited_server(dual_encoder, max_connections=3) as address, ExitStack() as stack:
        busy = [stack.enter_context(start_request(address)) for _ in range(3)]
        new = stack.enter_context(connect(address, data))
        read_all(new)  # until the new connection is aborted
        for client in busy:
            client.sendall(b"123456789")
            assert client.recv(1000).startswith(b"HTTP/1.1 422")


@needs_loopback_addresses
def test_idle_connections_are_aborted_at_the_address_with_the_most(dual_encoder: DualEncoder) -> None:
    attackers = ["127.0.0.2", "127.0.0.3", "127.0.0.4"]
    with limited_server(dual_encoder, max_connections=8) as address, ExitStack() as stack:
        honest = [stack.enter_context(connect(address, HALF_HEADERS)) for _ in range(2)]  # the oldest connections
        silent = [stack.enter_context(connect(address, b"", source)) for source in attackers for _ in range(10)]
        wait_until(lambda: count_open(honest + silent) == 8)
        assert [count_open(silent[start : start + 10]) for start in (0, 10, 20)] == [2, 2, 2]
        for client in honest:
            client.sendall(b"\r\n")
            assert client.recv(1000).startswith(b"HTTP/1.1 200")


def test_requests_among_many_silent_connections_of_the_same_address_are_answered(dual_encoder: DualEncoder) -> None:
    """While the event loop is busy, more connections arrive than the server keeps open."""
    app = create_patient_app(dual_encoder, idle_timeout=HANG_TIMEOUT, max_connections=8)
    is_blocked, resume = threading.Event(), threading.Event()

    async def block() -> None:
        is_blocked.set()
        resume.wait(HANG_TIMEOUT)

    app.add_api_route("/block", block)
    connection_class = make_connection_class(app.state.service.limits)
    with running_server(app, http=connection_class, ws="none") as url, ExitStack() as stack:
        address = (str(urlsplit(url).hostname), int(urlsplit(url).port or 0))
        blocking = stack.enter_context(connect(address, b"GET /block HTTP/1.1\r\nHost: localhost\r\n\r\n"))
        assert is_blocked.wait(HANG_TIMEOUT)
        clients = []
        for n in range(50):
            data = HALF_HEADERS + b"\r\n" if n % 10 == 0 else b""
            clients.append(stack.enter_context(connect(address, data)))
        resume.set()
        for client in (blocking, *clients[::10]):
            assert client.recv(1000).startswith(b"HTTP/1.1 200")
        silent = [client for n, client in enumerate(clients) if n % 10]
        wait_until(lambda: count_open(silent) == 8 - 5)  # the connections of the five requests are still open


def test_transfer_encoding_with_content_length_is_rejected(dual_encoder: DualEncoder) -> None:
    head = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n"
    smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with limited_server(dual_encoder) as address, connect(address, head + smuggled) as client:
        response = read_all(client)  # until the server closes the connection
    assert response.startswith(b"HTTP/1.1 400") and response.count(b"HTTP/1.1") == 1
    assert b"both Transfer-Encoding and Content-Length" in response


def test_time_limit_ends_when_the_response_starts(dual_encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The duration of a download depends on the client, so it may exceed the time limit of requests."""
    timers: list[asyncio.Timeout] = []
    create_timer = asyncio.timeout

    def record_timer(seconds: float) -> asyncio.Timeout:
        timers.append(create_timer(seconds))
        return timers[-1]

    async def pieces() -> Any:
        deadlines.append(timers[0].when())
        yield b"first"
        deadlines.append(timers[0].when())
        yield b"last"

    deadlines: list[float | None] = []
    monkeypatch.setattr("llm2clip.search.middleware.asyncio.timeout", record_timer)
    app = create_patient_app(dual_encoder)
    app.add_api_route("/download", lambda: StreamingResponse(pieces()))
    with TestClient(app, base_url=BASE_URL) as client:
        assert client.get("/download").content == b"firstlast"
    assert deadlines[0] is not None and deadlines[1] is None


def test_fair_semaphore_is_acquired_in_the_order_of_arrival() -> None:
    slots, order = FairSemaphore(1), []

    def enter() -> None:
        with slots:
            order.append("waiting thread")

    thread = threading.Thread(target=enter)
    with slots:
        thread.start()
        while not slots._waiting:
            time.sleep(0.001)
    with slots:  # entered at once, as a request with many images does
        order.append("main thread")
    thread.join()
    assert order == ["waiting thread", "main thread"]
    with slots:
        token = current_deadline.set(Deadline(time.monotonic() + 0.01, 0.01))
        with pytest.raises(DeadlineExceededError, match=r"longer than 0\.01 seconds"), slots:
            pass
        current_deadline.reset(token)
    with slots:
        assert not slots._waiting
