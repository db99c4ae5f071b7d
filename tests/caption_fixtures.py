"""A server of OpenAI's chat form that fails in many ways, for the tests and the benchmark of `llm2clip caption`.

To run it in a process of its own, which prints its URL: python tests/caption_fixtures.py [--fault_rate 0.3]
[--delay 0.3]. GET /counts returns what the server has answered.
"""

import argparse
import base64
import hashlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from torch import Tensor

from llm2clip.caption import captioners
from llm2clip.caption.answers import Answer, CaptionRequest
from llm2clip.cli import build_parser

FAULTS = ("500", "503", "429", "nonsense", "wrong json", "disconnect", "truncated", "large", "slow")
LARGE_BYTES = 10_000_000
USAGE = {"prompt_tokens": 1000, "completion_tokens": 20}


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from llava_fixtures import build_tiny_llava  # imports the LLaVA models of transformers

    return build_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def accept_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the meaningless answers of random models."""

    def accept(text: str, truncated: bool, *tokens: int) -> Answer:
        return Answer(f"A dog next to {text.encode().hex()}.", None, *tokens)

    monkeypatch.setattr(captioners, "convert_output_to_answer", accept)


class CaptionServer(ThreadingHTTPServer):
    """Server whose captions contain a number that identifies the image and the prompt.

    Attributes:
        faults: Fault of each of the first requests, or "" for a normal answer. Then, faults are chosen at random.
        fault_rate: Fraction of the later requests that fail.
        delay: Seconds until a normal answer.
        answers: Maps words to answers. Prompts that contain the word get this answer.
        answered: Number of normal answers for each pair of an image and a prompt.
        bodies: The first requests that were answered.
        keys: Authorization headers.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, faults: Sequence[str] = (), fault_rate: float = 0.0, delay: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.fault_rate, self.delay = list(faults), fault_rate, delay
        self.rejected_field = ""  # requests with this field are rejected
        self.answers: dict[str, Any] = {}
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.num_requests = self.num_parallel = self.max_parallel = 0
        self.lock = threading.Lock()
        self.random = random.Random(0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def next_fault(self) -> str:
        with self.lock:
            self.num_requests += 1
            if self.faults:
                return self.faults.pop(0)
            return self.random.choice(FAULTS) if self.random.random() < self.fault_rate else ""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that have disconnected."""


class _Handler(BaseHTTPRequestHandler):
    server: CaptionServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        with self.server.lock:
            counts = {"answered": self.server.answered, "requests": self.server.num_requests}
            self._send(200, json.dumps(counts).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.num_parallel += 1
            self.server.max_parallel = max(self.server.max_parallel, self.server.num_parallel)
            self.server.keys.add(self.headers.get("Authorization"))
        try:
            self._answer(body)
        finally:
            with self.server.lock:
                self.server.num_parallel -= 1

    def _answer(self, body: dict[str, Any]) -> None:
        fault = self.server.next_fault()
        if self.path != "/v1/chat/completions":
            self._send_error(404, "no such route")
        elif self.server.rejected_field in body:
            self._send_error(400, "use 'max_completion_tokens' instead")
        elif fault == "nonsense":
            self._send(200, b"<html>\x1b[31mwelcome</html>")
        elif fault == "wrong json":
            self._send(200, json.dumps({"choices": []}).encode())
        elif fault == "disconnect":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "truncated":
            self._send(200, b'{"choices": [', length=1000)
            self.close_connection = True
        elif fault == "large":
            self._send(200, b'{"choices": "' + b"x" * LARGE_BYTES)
        elif fault in ("slow headers", "slow body"):
            self._send_slowly(fault)
        elif fault == "redirect":
            self._send(302, b"", {"Location": "http://other.example/v1/chat/completions"})
        elif fault.startswith("429"):
            self._send_error(429, "too many requests", {"Retry-After": fault.partition(":")[2] or "0.2"})
        elif fault and fault != "slow":
            status, _, message = fault.partition(":")
            self._send_error(int(status), message or f"broken\x1b[31m, {self.headers.get('Authorization')}")
        else:
            time.sleep(self.server.delay + 0.5 * (fault == "slow"))
            self._send_caption(body)

    def _send_caption(self, body: dict[str, Any]) -> None:
        image, text = body["messages"][0]["content"]
        pixels = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
        key = hashlib.sha256(pixels + text["text"].encode()).hexdigest()[:16]
        caption: Any = f"A dog number {key} runs over a meadow."
        for word, answer in self.server.answers.items():
            if word in text["text"]:
                caption = answer
        choice = {"message": {"role": "assistant", "content": caption}, "finish_reason": "stop"}
        with self.server.lock:
            self.server.answered[key] += 1
            if len(self.server.bodies) < 100:
                self.server.bodies.append(body)
        self._send(200, json.dumps({"choices": [choice], "usage": USAGE}).encode())

    def _send_slowly(self, part: str) -> None:
        """Send a byte of the headers or of the body every 50 ms until the client disconnects, for at most 20 s."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if part == "slow body" else b""))
        for _ in range(400):
            self.wfile.write(b"x")
            time.sleep(0.05)

    def _send_error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def run_server(faults: Sequence[str] = (), fault_rate: float = 0.0, delay: float = 0.0) -> Iterator[CaptionServer]:
    """Run a server in a thread."""
    server = CaptionServer(faults, fault_rate, delay)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def make_photos(folder: Path, count: int, side: int = 24) -> Path:
    """Write PNG images of random colours, each different from the others."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        pixels = generator.integers(0, 255, (2, 3, 3), dtype=np.uint8).repeat(side // 2, 0).repeat(side // 3, 1)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
    return folder


def run_command(*words: object) -> str:
    """Run a command as `main` does, but without handling errors. Return the lines that it prints at the end."""
    parser, run = build_parser()
    settings = parser.instantiate(parser.parse_args(list(map(str, words))))
    return "\n".join(run[settings.subcommand](settings[settings.subcommand]))


def caption(server: CaptionServer, source: Path, out: Path, *flags: object) -> str:
    """Caption images with a server. Return the lines that the command prints at the end."""
    return run_command("caption", source, "--out", out, "--endpoint", server.url, "--model", "tiny", *flags)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_prompts(file: Path, **prompts: Any) -> Path:
    file.write_text(yaml.safe_dump(prompts))
    return file


class FixedCaptioner:
    """Captioner whose answers depend only on the image or, with texts per prompt, only on the prompt."""

    name, batch_size, workers, worked_before = "tiny", 2, 1, False

    def __init__(self, texts: dict[str, str] | None = None) -> None:
        self.texts, self.num_answers = texts, 0

    def prepare_image(self, image: Tensor) -> Tensor:
        return image

    def generate_answers(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        self.num_answers += len(requests)
        if self.texts is not None:
            return [Answer(self.texts[request.prompt.name]) for request in requests]
        return [Answer(f"A dog runs over meadow {int(request.image.sum())}.") for request in requests]

    def stop(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault_rate", type=float, default=0.3)
    parser.add_argument("--delay", type=float, default=0.0)
    args = parser.parse_args()
    server = CaptionServer(fault_rate=args.fault_rate, delay=args.delay)
    print(server.url, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
