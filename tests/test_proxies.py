"""Tests of the proxy configurations in deploy/: they are valid, pass on requests, and limit clients."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from conftest import HANG_TIMEOUT
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.inference import ServerLimits
from llm2clip.search.server import AccessPolicy, create_app, make_server_config
from search_fixtures import running_server, wait_until

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture(scope="module")
def server(dual_encoder: DualEncoder) -> Iterator[str]:
    """Address of a server behind a proxy, such as `127.0.0.1:7860`."""
    app = create_app(dual_encoder, limits=ServerLimits(timeout=HANG_TIMEOUT), access=AccessPolicy(token="secret"))
    config = make_server_config(app, "127.0.0.1", 0, behind_proxy=True)
    with running_server(app, http=config.http, proxy_headers=True, ws="none") as url:
        yield urlsplit(url).netloc


def find_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running_proxy(command: list[str], port: int) -> Iterator[None]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            with socket.socket() as client:
                wait_until(lambda: process.poll() is not None or client.connect_ex(("127.0.0.1", port)) == 0)
            assert process.poll() is None
            yield
        finally:
            process.terminate()


def check_requests(client: httpx.Client) -> None:
    """Check that a proxy passes on requests, and the client's scheme, and rejects large bodies."""
    assert client.get("/health").json() == {"status": "ok"}
    assert client.post("/embed", json={"input": "a"}).status_code == 401
    headers = {"authorization": "Bearer secret", "content-type": "application/json"}
    assert len(client.post("/embed", json={"input": "a"}, headers=headers).json()["data"]) == 1
    assert client.post("/embed", content=bytes(34_000_000), headers=headers).status_code == 413


def test_nginx_passes_on_requests_and_limits_clients(server: str, tmp_path: Path) -> None:
    nginx = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if nginx is None or shutil.which("openssl") is None:
        pytest.skip("nginx or openssl is not installed")
    key, certificate, port = tmp_path / "key.pem", tmp_path / "certificate.pem", find_port()
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1"]
    subprocess.run([*request, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    text = (DEPLOY / "nginx.conf").read_text()
    for old, new in (
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/search.example.org.pem", str(certificate)),
        ("/etc/ssl/search.example.org.key", str(key)),
        ("127.0.0.1:7860", server),
        ("/var/log/nginx/llm2clip.log", f"{tmp_path}/requests.log"),
        ("/var/log/nginx/llm2clip-error.log", f"{tmp_path}/site-error.log"),
        ("rate=50r/s", "rate=1r/m"),  # so that a slow machine reaches the limit too
        ("burst=300", "burst=20"),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "site.conf").write_text(text)
    folders = "".join(
        f"{name}_temp_path {tmp_path}/{name};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    user = "user root;" if os.geteuid() == 0 else ""  # its workers must be able to write to the test folder
    main = f"{user} daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}"
    (tmp_path / "nginx.conf").write_text(f"{main} http {{ {folders} include {tmp_path}/site.conf; }}")
    command = [nginx, "-c", str(tmp_path / "nginx.conf"), "-p", str(tmp_path), "-e", str(tmp_path / "error.log")]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    with (
        running_proxy(command, port),
        httpx.Client(base_url=f"https://localhost:{port}", verify=False, timeout=HANG_TIMEOUT) as client,
    ):
        check_requests(client)
        assert "Secure" in client.get("/?token=secret").headers["set-cookie"]  # the server knows the client's scheme
        assert 429 in {client.get("/health?token=secret").status_code for _ in range(30)}
    logs = [file.read_text() for file in tmp_path.glob("*.log")]
    assert any("/health" in log for log in logs) and not any("secret" in log for log in logs)


def test_caddy_passes_on_requests(server: str, tmp_path: Path) -> None:
    caddy = shutil.which("caddy")
    if caddy is None:
        pytest.skip("Caddy is not installed")
    port, text = find_port(), (DEPLOY / "Caddyfile").read_text()
    for old, new in (
        ("{\n\tservers", "{\n\tadmin off\n\tstorage file_system " + str(tmp_path) + "\n\tservers"),
        ("\nsearch.example.org {", f"\nhttp://127.0.0.1:{port} {{"),  # without a certificate from the internet
        ("127.0.0.1:7860", server),
    ):
        assert old in text
        text = text.replace(old, new)
    config = tmp_path / "Caddyfile"
    config.write_text(text)
    options = ["--config", str(config), "--adapter", "caddyfile"]
    subprocess.run([caddy, "validate", *options], check=True, capture_output=True)
    with (
        running_proxy([caddy, "run", *options], port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_TIMEOUT) as client,
    ):
        check_requests(client)
