"""Measure how a server responds to an honest client while eight hostile clients attack it.

    python benchmarks/hostile_clients.py [--minutes 10] [--only scan_bomb key_bomb ...]

The honest client first sends 50 requests of each kind, one after the other. Then it sends 5 requests per second, for 20
seconds alone, and then together with the hostile clients. Latencies are measured from the time at which a request was
due, so delays caused by a hanging server are counted in full. Each hostile client is a process with its own loopback
address. It knows the token and runs all attacks at the same time. The hostile processes have low priority, because
clients usually run on other machines and do not compete with the server for its CPU. At the end, the server is stopped
with SIGTERM while the attacks continue.

The model is the tiny random model of the tests, and the index contains 20,000 images with 5 captions each. One of the
image files is 23 MB in size.

    python benchmarks/hostile_clients.py --immich [--model MODEL]

does the same for the routes of `llm2clip serve --immich`. The honest client then sends texts, images and health checks.
The service of `--immich_upstream` never answers.
"""

import asyncio
import base64
import http.client
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import repeat
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from measurements import memory_mb
from shared import make_parser, print_header, print_row, start_server

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from hostile_fixtures import refinement_scans

TOKEN = "benchmark"
FLAGS = ("--precision", "fp32", "--mcp", "--list_models_without_token")
PAUSE = 0.1  # seconds until an attack is repeated
HOSTILE_CLIENTS = 8
RATE = 5  # requests per second of the honest client
BASELINE_SECONDS = 20
IMAGES, CAPTIONS = 20_000, 5
WORDS = "a red dog and an old man play in the snow behind a small blue house near the street"
HEAD = f"Host: localhost\r\nAuthorization: Bearer {TOKEN}\r\n"
JSON = "Content-Type: application/json\r\n"
MCP_HEADERS = f"{JSON}Accept: application/json, text/event-stream\r\n"
BOUNDARY = b"----formdata-undici-012345678901"
MULTIPART = f"Content-Type: multipart/form-data; boundary={BOUNDARY.decode()}\r\n"
VISUAL = {"clip": {"visual": {"modelName": "ViT-B-16__openai"}}}
FACES = {"facial-recognition": {"detection": {"modelName": "buffalo_l"}, "recognition": {"modelName": "buffalo_l"}}}
TEXTUAL = {"clip": {"textual": {"modelName": "ViT-B-16__openai", "options": {"language": "en"}}}}


# ---- hostile clients ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """A request, and whether the client reads the response."""

    head: str
    body: bytes = b""
    read: bool = True

    async def send(self, port: int, address: str) -> None:
        """Send the request on a new connection, and wait until the server has responded or closed the connection.

        If `read` is False, do not read the response, but wait until the server resets the connection.
        """
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0), limit=1 << 12)
        try:
            writer.write(self.head.encode() + self.body)
            await writer.drain()
            while self.read and await reader.read(1 << 16):
                pass
            while not self.read and not writer.transport.is_closing():
                await asyncio.sleep(0.1)
        finally:
            writer.transport.abort()


def post(path: str, body: bytes, headers: str = JSON, framing: str | None = None, read: bool = True) -> Request:
    """Make a POST request. `framing` are the headers that state the length of the body."""
    if framing is None:
        framing = f"Content-Length: {len(body)}\r\nConnection: close\r\n"
    return Request(f"POST {path} HTTP/1.1\r\n{HEAD}{headers}{framing}\r\n", body, read)


def post_too_large(path: str, headers: str = JSON) -> Request:
    """Make a request whose body is larger than the limit, without a Content-Length header."""
    return post(path, TOO_LARGE_BODY, headers, "Transfer-Encoding: chunked\r\n")


def post_unfinished(path: str, body: bytes, headers: str = JSON) -> Request:
    """Make a request without the last byte of its body."""
    return post(path, body, headers, f"Content-Length: {len(body) + 1}\r\n")


def call_tool(tool: str, arguments: dict[str, str | int], read: bool) -> Request:
    """Make an MCP request that calls a tool."""
    params = {"name": tool, "arguments": arguments}
    body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}).encode()
    return post("/mcp", body, MCP_HEADERS, None if read else f"Content-Length: {len(body)}\r\n", read)


def data_uri(data: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(data).decode()


def make_message_bodies() -> list[bytes]:
    """Return requests in the form of vLLM: too many messages, no content, a URL, unknown fields, and large images."""

    def make_body(count: int, content: object) -> bytes:
        return json.dumps({"messages": [[{"role": "user", "content": content}]] * count}).encode()

    stream = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(stream, "PNG")
    images = [stream.getvalue(), refinement_scans(4000, 7000)]
    parts = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return [
        make_body(10_000, "a"),
        make_body(256, []),
        make_body(1, [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest"}}]),
        make_body(1, [{"type": "text", "text": "a", **{f"field{n}": n for n in range(90_000)}}]),
        make_body(32, parts[:1]),
        make_body(16, parts),
        make_body(33, parts[:1]),
        b'{"messages": ' + b"[" * 100_000,
    ]


def make_form(entries: Any, image: bytes | None = None, text: str | None = None) -> bytes:
    """Return a request of Immich as multipart form data."""
    parts = [b'"entries"\r\n\r\n' + json.dumps(entries).encode()]
    if image is not None:
        parts.append(b'"image"; filename="blob"\r\n\r\n' + image)
    if text is not None:
        parts.append(b'"text"\r\n\r\n' + text.encode())
    body = b"".join(b"--%s\r\nContent-Disposition: form-data; name=%s\r\n" % (BOUNDARY, part) for part in parts)
    return body + b"--%s--\r\n" % BOUNDARY


SCAN_BOMBS = [refinement_scans(scans, side=7000) for scans in (4000, 38)]  # the server accepts 40 scans at this size
LARGEST_BODY = b'{"input": "' + b"a" * ((32 << 20) - 1000)
# A parser finds many beginnings of the boundary in this form.
LARGEST_FORM = make_form(VISUAL, (b"\r\n--" + BOUNDARY[:-1]) * ((31 << 20) // (len(BOUNDARY) + 3)))
TOO_LARGE_BODY = (b"%x\r\n" % (1 << 20) + bytes(1 << 20) + b"\r\n") * 40  # chunked transfer encoding
LONG_FILTER = {"caption": "ß" * 500, "path": "/" + "x/" * 2000}
PUNYCODE = MULTIPART.strip() + "; charset=punycode\r\n"
# Number of connections of each hostile client, and the requests that it repeats on each of them.
ATTACKS: dict[str, tuple[int, Sequence[Request]]] = {
    # JPEGs with more scans than the server accepts, and with the largest number that it accepts
    "scan_bomb": (2, [post("/embed", json.dumps({"input": data_uri(bomb)}).encode()) for bomb in SCAN_BOMBS]),
    # 4.8 MB of unknown fields
    "key_bomb": (1, [post("/search", b"{" + b",".join([b'"1f":0'] * 700_000) + b"}")]),
    # invalid and large messages, and the names of the models with and without a token
    "messages": (
        2,
        [
            *(post("/v1/embeddings", body) for body in make_message_bodies()),
            Request(f"GET /v1/models HTTP/1.1\r\n{HEAD}Connection: close\r\n\r\n"),
            Request("GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"),
        ],
    ),
    # the longest caption filter that the server accepts (slow to match), and a longer one
    "caption_filter": (
        2,
        [
            post("/search", json.dumps({"texts": ["a"], "top": 200, "filter": LONG_FILTER}).encode()),
            post("/search", json.dumps({"texts": ["a"], "filter": {"caption": "ß" * 20_000}}).encode()),
        ],
    ),
    # the largest body that the server accepts, and a larger one
    "oversized_body": (1, [post("/embed", LARGEST_BODY), post_too_large("/embed")]),
    "unfinished_body": (2, [post_unfinished("/embed", LARGEST_BODY)]),
    # the largest image
    "slow_reader": (20, [Request(f"GET /image/1 HTTP/1.1\r\n{HEAD}\r\n", read=False)]),
    # a photo whose name is the longest pattern that the server accepts
    "mcp_name": (2, [call_tool("show_photo", {"photo": "?" * 4094}, read=True)]),
    # as many thumbnails as the tool returns
    "mcp_slow_reader": (20, [call_tool("search_photos", {"top": 50}, read=False)]),
    "slow_headers": (100, [Request(f"GET /health HTTP/1.1\r\n{HEAD}")]),
}
IMMICH_ATTACKS: dict[str, tuple[int, Sequence[Request]]] = {
    "immich_bomb": (2, [post("/predict", make_form(VISUAL, bomb), MULTIPART) for bomb in SCAN_BOMBS]),
    # entries of 1 MB with unknown tasks, and a body with too many parts
    "immich_entries": (
        1,
        [
            post("/predict", make_form({f"{n:x}": 0 for n in range(80_000)}, text="a"), MULTIPART),
            post("/predict", make_form(VISUAL)[: -len(BOUNDARY) - 6] * 100_000, MULTIPART),
        ],
    ),
    # a text in an encoding that takes minutes to decode
    "immich_charset": (1, [post("/predict", make_form(TEXTUAL, text="a" * 1_000_000), PUNYCODE)]),
    # an image for facial recognition, which the upstream never answers
    "immich_faces": (4, [post("/predict", make_form(FACES, bytes(1 << 20)), MULTIPART)]),
    "immich_body": (
        1,
        [
            post("/predict", LARGEST_FORM, MULTIPART),
            post("/predict", b"&" * (32 << 20), "Content-Type: application/x-www-form-urlencoded\r\n"),
            post_too_large("/predict", MULTIPART),
        ],
    ),
    "immich_unfinished": (2, [post_unfinished("/predict", LARGEST_FORM, MULTIPART)]),
    # 10,000 requests at once
    "immich_reader": (20, [Request(f"GET /ping HTTP/1.1\r\n{HEAD}\r\n" * 10_000, read=False)]),
    "slow_headers": ATTACKS["slow_headers"],
}


def run_attacker(port: int, number: int, names: list[str]) -> None:
    """Run the attacks of one hostile client, which has its own loopback address, until the process is terminated."""
    address = f"127.0.0.{number + 2}"  # the honest client uses 127.0.0.1

    async def repeat_requests(requests: Sequence[Request]) -> None:
        while True:
            with suppress(OSError):  # the server may refuse or abort the connection
                for request in requests:
                    await request.send(port, address)
            await asyncio.sleep(PAUSE)

    async def run() -> None:
        loops = []
        for name in names:
            connections, requests = (ATTACKS | IMMICH_ATTACKS)[name]
            loops += [repeat_requests(requests) for _ in range(connections)]
        await asyncio.gather(*loops)

    os.nice(19)
    asyncio.run(run())


# ---- honest client --------------------------------------------------------------------------------------------------


class HonestClient:
    """A client that sends RATE requests per second, and records latencies in seconds and errors."""

    def __init__(self, port: int, immich: bool) -> None:
        self.port = port
        self.headers = {"authorization": f"Bearer {TOKEN}", "content-type": "application/json"}
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()
        stream = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)).save(stream, "JPEG")
        if immich:
            self.headers = dict([MULTIPART.strip().split(": ")])
            self.requests: list[tuple[str, str, str, bytes | str | None]] = [
                ("text", "POST", "/predict", make_form(TEXTUAL, text="a red dog")),
                ("image", "POST", "/predict", make_form(VISUAL, stream.getvalue())),
                ("health check", "GET", "/ping", None),
            ]
            return
        image = json.dumps({"input": data_uri(stream.getvalue())})
        search, filtered = {"texts": ["a red dog"]}, {"texts": ["a red dog"], "filter": {"caption": "dog"}}
        self.requests = [
            ("search", "POST", "/search", json.dumps(search)),
            ("filtered search", "POST", "/search", json.dumps(filtered)),
            ("image", "POST", "/embed", image),
            ("thumbnail", "GET", "/thumbnail/2", None),
        ]

    def run(self, seconds: float) -> None:
        """Send requests for `seconds` seconds, and wait for all responses."""
        with ThreadPoolExecutor(200) as pool:
            start = time.perf_counter()
            for n in range(round(seconds * RATE)):
                due = start + n / RATE
                time.sleep(max(0.0, due - time.perf_counter()))
                pool.submit(self.request, due, *self.requests[n % len(self.requests)][1:])

    def request(self, due: float, method: str, path: str, body: bytes | str | None) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, self.headers)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                self.errors[str(response.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            self.errors[type(error).__name__] += 1
        finally:
            connection.close()
        self.latencies.append(time.perf_counter() - due)

    def summarize(self) -> list[str]:
        """Return the table cells: number of requests, latencies and errors."""
        milliseconds = [1000 * latency for latency in self.latencies]
        median = statistics.median(milliseconds)
        p95 = statistics.quantiles(milliseconds, n=20, method="inclusive")[-1]
        errors = ", ".join(f"{kind}: {count}" for kind, count in self.errors.items()) or "none"
        return [str(len(milliseconds)), *(f"{value:.0f}" for value in (median, p95, max(milliseconds))), errors]


# ---- server ---------------------------------------------------------------------------------------------------------


def create_index(folder: Path) -> Path:
    """Create a tiny model and an index with random vectors, and return the index folder."""
    from llm2clip.models.dual_encoder import open_dual_encoder
    from search_fixtures import make_index, make_model
    from vectors import add_images

    model = open_dual_encoder(str(make_model(folder)))
    photos = folder / "photos"
    photos.mkdir()
    Image.new("RGB", (3200, 2400), "red").save(photos / "large.bmp")
    index = make_index(folder / "index", photos, model)
    thumbnail = index.read_thumbnail("1")
    assert thumbnail is not None
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((IMAGES, model.embed_dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = [f"/photos/{n}.jpg" for n in range(IMAGES)]
    captions = [tuple(" ".join(rng.choice(WORDS.split(), 12)) for _ in range(CAPTIONS)) for _ in names]
    add_images(index, names, vectors, captions, repeat(thumbnail))
    return folder / "index"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="duration of the attacks")
    parser.add_argument("--immich", action="store_true", help="attack `llm2clip serve --immich`")
    parser.add_argument("--model", help="model folder for --immich (default: a tiny model)")
    parser.add_argument("--only", nargs="+", choices=sorted(ATTACKS | IMMICH_ATTACKS), help="attacks to run")
    args = parser.parse_args()
    attacks = args.only or list(IMMICH_ATTACKS if args.immich else ATTACKS)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if args.immich:
            from search_fixtures import make_model

            model = args.model or str(make_model(Path(folder)))
            upstream = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            address = f"http://127.0.0.1:{upstream.getsockname()[1]}"
            flags = ("--model", model, "--precision", "fp32", "--immich", "--immich_upstream", address)
            server, port = start_server(None, TOKEN, flags=flags)
        else:
            server, port = start_server(str(create_index(Path(folder))), TOKEN, flags=FLAGS)
        context = SpawnContext()
        attackers = [
            context.Process(target=run_attacker, args=(port, number, attacks), daemon=True)
            for number in range(HOSTILE_CLIENTS)
        ]
        try:
            measure(server, attackers, 60 * args.minutes, lambda: HonestClient(port, args.immich))
        finally:
            server.kill()
            for attacker in attackers:
                if attacker.pid is not None:
                    attacker.kill()


def measure(
    server: subprocess.Popen[str],
    attackers: list[SpawnProcess],
    seconds: float,
    create_client: Callable[[], HonestClient],
) -> None:
    """Print latencies without and with the attacks, the server's peak memory, and how long it takes to stop."""
    print_header("attacks", "requests", "median, ms", "p95, ms", "maximum, ms", "errors")
    alone, attacked = create_client(), create_client()
    for name, method, path, body in alone.requests:
        client = create_client()
        for _ in range(50):
            client.request(time.perf_counter(), method, path, body)
        print_row(f"no, only {name}", *client.summarize())
    alone.run(BASELINE_SECONDS)
    print_row("no", *alone.summarize())
    memory_before = memory_mb("VmHWM", server.pid)
    for attacker in attackers:
        attacker.start()
    attacked.run(seconds)
    print_row("yes", *attacked.summarize())
    print(f"\npeak memory of the server: {memory_before:.0f} MB before, {memory_mb('VmHWM', server.pid):.0f} MB after")
    start = time.perf_counter()
    server.send_signal(signal.SIGTERM)
    server.wait(600)
    print(f"the server stopped {time.perf_counter() - start:.1f} seconds after SIGTERM")


if __name__ == "__main__":
    main()
