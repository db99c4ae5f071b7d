"""Tests of the server's limits on memory and connections, with clients that behave badly on real sockets."""

import asyncio
import http.client
import io
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.responses import Response, StreamingResponse
from pydantic import ValidationError
from starlette.testclient import TestClient

from conftest import HANG_TIMEOUT
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.middleware import (
    ALWAYS_ACCEPTED,
    MAX_JSON_VALUES,
    ByteAllocation,
    ByteBudget,
    identify_client,
    make_connection_class,
)
from llm2clip.search.queues import FairThreadPool, QueueFull, current_client
from llm2clip.search.schemas import EmbedRequest, SearchRequest
from llm2clip.search.server import make_server_config
from search_fixtures import create_patient_app, running_server

BASE_URL = "http://localhost"
HALF_HEADERS = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
REQUEST_WITHOUT_BODY = b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n\r\n"
SHORT_TIMEOUT = 0.05  # seconds


@contextmanager
def limited_server(model: DualEncoder, **limits: Any) -> Iterator[tuple[str, int]]:
    """Serve a model with the connection class of `serve`, and yield the address."""
    app = create_patient_app(model, **{"idle_timeout": HANG_TIMEOUT, **limits})
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


def get_status(address: tuple[str, int], source: str = "127.0.0.1") -> int:
    """Request /health on a new connection, and return the status code."""
    connection = http.client.HTTPConnection(*address, timeout=HANG_TIMEOUT, source_address=(source, 0))
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status
    finally:
        connection.close()


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
    for model, field in ((EmbedRequest, "input"), (SearchRequest, "texts"), (SearchRequest, "templates")):
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
        files = [("files", ("a.png", b"," * (MAX_JSON_VALUES + 1)))]
        assert client.post("/embed/upload", files=files).status_code == 422  # not JSON


def test_byte_budget_limits_each_client_and_the_total() -> None:
    budget = ByteBudget(1 << 20)
    allocations: list[ByteAllocation] = []

    def allocate(client: str, size: int) -> None:
        allocations.append(ByteAllocation(budget, client))
        allocations[-1].add(size)

    quarter = 256 << 10
    allocate("a", quarter)
    with pytest.raises(QueueFull):
        allocate("a", ALWAYS_ACCEPTED + 1)
    allocations.pop().release()
    allocate("a", ALWAYS_ACCEPTED)  # small bodies are always accepted
    allocate("b", quarter)
    allocate("c", quarter)
    with pytest.raises(QueueFull):
        allocate("d", quarter)  # the client's part is free, but the total is not
    assert budget.total == 4 * quarter + ALWAYS_ACCEPTED
    for allocation in allocations:
        allocation.release()
    assert budget.total == 0 and not budget.by_client


def test_identify_client_ignores_ports_and_the_host_part_of_ipv6_addresses() -> None:
    assert identify_client(("10.0.0.1", 1)) == identify_client(("10.0.0.1", 2)) != identify_client(("10.0.0.2", 1))
    assert (
        identify_client(("2001:db8::1", 1))
        == identify_client(("2001:db8::ffff:1", 1))
        != identify_client(("2001:db8:0:1::1", 1))
    )
    assert identify_client(("fe80::1%eth0", 1)) == identify_client(("fe80::2", 1))
    assert identify_client(("host:unknown", 1)) == "host:unknown"
    assert identify_client(None) == ""


@pytest.mark.parametrize(("behind_proxy", "client"), [(False, "127.0.0.1"), (True, "9.9.9.9")])
def test_forwarded_addresses_are_ignored_without_a_proxy(
    behind_proxy: bool, client: str, dual_encoder: DualEncoder
) -> None:
    app = create_patient_app(dual_encoder)

    async def get_client() -> str:
        return current_client.get()

    app.add_api_route("/client", get_client)
    config = make_server_config(app, "127.0.0.1", 0, behind_proxy)
    config.load()
    with TestClient(config.loaded_app, base_url=BASE_URL, client=("127.0.0.1", 50000)) as test_client:  # type: ignore[arg-type]
        assert test_client.get("/client", headers={"X-Forwarded-For": "9.9.9.9"}).json() == client


def test_thread_pool_runs_the_jobs_of_other_clients_first() -> None:
    names: list[str] = []
    started, resumed = threading.Semaphore(0), threading.Semaphore(0)

    def job(name: str) -> str:
        names.append(name)
        started.release()
        assert resumed.acquire(timeout=HANG_TIMEOUT)
        return name

    async def run() -> None:
        pool = FairThreadPool(1, "jobs", 10)

        def start(client: str, name: str) -> asyncio.Task[list[str]]:
            current_client.set(client)
            return asyncio.create_task(pool.map(job, [name]))

        tasks = [start("a", f"a{n}") for n in range(4)]
        await asyncio.sleep(0)  # one step of the event loop: the first job is in the queue
        assert started.acquire(timeout=HANG_TIMEOUT)
        tasks[0].cancel()  # as the server does after the timeout; the thread remains in use
        tasks[1].cancel()  # this job has not started
        tasks.append(start("b", "b"))
        await asyncio.gather(*tasks[:2], return_exceptions=True)
        resumed.release(4)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert results[2:] == [["a2"], ["a3"], ["b"]]
        pool.shutdown()

    try:
        asyncio.run(run())
    finally:
        resumed.release(5)
    assert names[0] == "a0" and names[1] == "b" and sorted(names[2:]) == ["a2", "a3"]


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
    monkeypatch.setattr("llm2clip.search.inference.open_original", lambda backend, hit_id: (next(opened), "image/bmp"))
    monkeypatch.setattr("llm2clip.search.inference.InferenceService.require_backend", lambda self: None)
    request = b"GET /image/1 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    with limited_server(dual_encoder) as address, connect(address, request) as reader:
        assert len(read_all(reader).partition(b"\r\n\r\n")[2]) == streams[0].count == size
    with limited_server(dual_encoder, idle_timeout=SHORT_TIMEOUT) as address, connect(address, request) as slow_reader:
        assert streams[1].was_closed.wait(HANG_TIMEOUT)
        assert streams[1].count < size / 2
        assert len(read_all(slow_reader)) <= streams[1].count  # the connection was aborted


def test_large_responses_are_sent_in_pieces_and_counted(dual_encoder: DualEncoder) -> None:
    app = create_patient_app(dual_encoder, max_bytes_in_flight=4 << 20)
    size = [300 << 10]

    app.add_api_route("/large", lambda: Response(bytes(size[0])))
    with TestClient(app, base_url=BASE_URL) as client:
        assert client.get("/large").content == bytes(size[0])
        size[0] = 2 << 20  # more than a quarter of max_bytes_in_flight
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
        assert get_status(address) == 200
        assert read_all(idle[0]) == b""  # the oldest idle connection was aborted
        busy.sendall(b"123456789")
        assert busy.recv(1000).startswith(b"HTTP/1.1 422")


def test_one_client_cannot_use_all_connections(dual_encoder: DualEncoder) -> None:
    with limited_server(dual_encoder, max_connections=3) as address, ExitStack() as stack:
        busy = [stack.enter_context(start_request(address)) for _ in range(3)]
        refused = stack.enter_context(connect(address, b""))
        assert read_all(refused) == b""
        assert get_status(address, source="127.0.0.2") == 200
        assert read_all(busy[0]) == b""  # the oldest connection was aborted
        busy[1].sendall(b"123456789")
        assert busy[1].recv(1000).startswith(b"HTTP/1.1 422")


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
