"""Servers for tests of remote files: a web server with ranges that can misbehave, and an S3 server."""

import hashlib
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from llm2clip.data import storage

START_S3_SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


class WebServer:
    """Web server on the loopback interface, whose files are a dict {path: bytes}.

    Attributes:
        faults: Faults of the next GET requests: "reset", "truncate", "slow", "other range", or a status such as "503".
        broken: Paths for which all GET requests fail with the status 503.
        headers: Additional headers of responses with an error status or a redirect.
        requests: (method, path, range, authorization) of each request so far.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.broken: set[str] = set()
        self.headers: dict[str, str] = {}
        self.requests: list[tuple[str, str, str, str]] = []
        self.has_ranges = True
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _create_handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def add_folder(self, folder: Path, root: str = "") -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.files[f"{root}/{file.relative_to(folder)}"] = file.read_bytes()

    def count(self, method: str) -> int:
        return sum(request[0] == method for request in self.requests)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _create_handler(server: WebServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.respond("HEAD")

        def do_GET(self) -> None:
            self.respond("GET")

        def respond(self, method: str) -> None:
            path = self.path.partition("?")[0]
            byte_range = self.headers.get("Range", "")
            server.requests.append((method, self.path, byte_range, self.headers.get("Authorization", "")))
            if method == "GET" and path in server.broken:
                self.send_empty(503)
                return
            fault = server.faults.pop(0) if method == "GET" and server.faults else ""
            data = server.files.get(path)
            if path.endswith("/") and data is None:
                data = self.list_links(path)
            if fault.isdecimal() or data is None:
                self.send_empty(int(fault or 404))
                return
            if fault == "reset":
                self.connection.close()
                return
            start, end = 0, len(data)
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", byte_range) if server.has_ranges else None
            if match:
                start, end = int(match[1]), min(len(data), int(match[2]) + 1)
            self.send_response(206 if match else 200)
            if match:
                shift = 8 if fault == "other range" else 0
                self.send_header("Content-Range", f"bytes {start + shift}-{end - 1 + shift}/{len(data)}")
            self.send_header("Content-Length", str(end - start))
            self.send_header("ETag", f'"{hashlib.md5(data).hexdigest()}"')
            self.end_headers()
            if method == "GET":
                self.send_body(data[start:end], fault)

        def list_links(self, path: str) -> bytes | None:
            names = {name.removeprefix(path).partition("/") for name in server.files if name.startswith(path)}
            links = "".join(f'<a href="{name}{slash}">{name}</a>\n' for name, slash, _ in sorted(names))
            return links.encode() or None

        def send_empty(self, status: int) -> None:
            self.send_response(status)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_body(self, body: bytes, fault: str) -> None:
            if fault in ("truncate", "slow"):
                body = body[: len(body) // 2]
                self.close_connection = True
            self.wfile.write(body)
            if fault == "slow":
                self.wfile.flush()
                time.sleep(3 * storage.READ_TIMEOUT)

    return Handler


def upload_folder(folder: Path, bucket: str) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    storage.get_filesystem("s3").pipe(
        {f"{bucket}/{os.path.relpath(file, folder)}": file.read_bytes() for file in files}
    )
