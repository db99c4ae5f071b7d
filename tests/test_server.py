"""The server by its own API: right answers, many clients, hostile ones."""

from __future__ import annotations

import asyncio
import base64
import io
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.search.batching import Batcher, QueueFull
from llm2clip.search.query_embedding import Query, embed_query, embed_texts
from llm2clip.search.schemas import TEXT, TEXTS, Limits
from llm2clip.search.server import create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import Filter
from search_fixtures import make_index, make_model

HOST = "http://localhost"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    return open_dual_encoder(str(make_model(tmp_path_factory.mktemp("model"))))


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory, pictures: Path, model: DualEncoder) -> SqliteBackend:
    return make_index(tmp_path_factory.mktemp("index"), pictures, model)


@pytest.fixture(scope="module")
def client(model: DualEncoder, engine: SqliteBackend) -> Iterator[TestClient]:
    app = create_app(model, engine, Limits(max_body_bytes=1 << 20, max_pixels=1_000_000))
    with TestClient(app, base_url=HOST, raise_server_exceptions=False) as client:
        yield client


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


# ---- what it answers ------------------------------------------------------------------------------------------------


def test_search_finds_what_the_index_finds(
    client: TestClient, model: DualEncoder, engine: SqliteBackend, pictures: Path
) -> None:
    picture = (pictures / "9.png").read_bytes()
    body = {"texts": ["red"], "images": [uri(picture)], "without_texts": ["a dog"], "top": 4, "only": {"larger": 40}}
    answer = client.post("/search", json=body)
    assert answer.status_code == 200
    query = embed_query(model, Query(["red"], [picture], ["a dog"]))
    expected = engine.search(query, 4, Filter(larger=40))
    assert [hit["id"] for hit in answer.json()["hits"]] == [hit.id for hit in expected]
    assert answer.json()["hits"][0]["pictures"][0]["captions"]
    like = client.post("/search", json={"like": [expected[0].id], "top": 1}).json()["hits"]
    assert like[0]["id"] == expected[0].id and like[0]["score"] == pytest.approx(1, abs=2e-3)
    assert client.post("/search", json={"texts": ["x"], "only": {"under": "/nowhere"}}).json() == {"hits": []}


def test_embeddings_are_the_models(client: TestClient, model: DualEncoder, pictures: Path) -> None:
    picture = (pictures / "3.png").read_bytes()
    inputs = ["red", uri(picture), "eine lange Beschreibung. " * 50]
    answer = client.post("/v1/embeddings", json={"input": inputs, "model": "any"}).json()
    texts, image = model.encode_texts([inputs[0], inputs[2]]).numpy(), embed_texts(model, [picture]).numpy()
    vectors = np.array([row["embedding"] for row in answer["data"]])
    np.testing.assert_allclose(vectors, [texts[0], image[0], texts[1]], atol=1e-5)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2] and answer["object"] == "list"
    coded = client.post("/embed", json={"input": "red", "encoding_format": "base64", "dimensions": 16}).json()
    np.testing.assert_allclose(
        np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4"), texts[0], atol=1e-5
    )
    uploaded = client.post("/embed/upload", files=[("files", ("a.png", picture))]).json()
    np.testing.assert_allclose(uploaded["data"][0]["embedding"], image[0], atol=1e-5)


def test_pictures_page_health_and_metrics(client: TestClient, engine: SqliteBackend, pictures: Path) -> None:
    hit = client.post("/search", json={"texts": ["red"], "top": 1}).json()["hits"][0]
    assert client.get(f"/picture/{hit['id']}").content == Path(hit["pictures"][0]["name"]).read_bytes()
    small = client.get(f"/thumbnail/{hit['id']}")
    same = {"if-none-match": small.headers["etag"]}
    assert client.get(f"/thumbnail/{hit['id']}", headers=same).status_code == 304
    assert small.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(small.content)).size == (48, 40)
    assert client.get("/health").json() == {"status": "ok", "model": "model", "width": 16, "pictures": 36}
    page = client.get("/")
    assert "<textarea" in page.text and "default-src 'self'" in page.headers["content-security-policy"]
    assert client.get("/static/page.js").status_code == client.get("/static/page.css").status_code == 200
    metrics = client.get("/metrics").text
    assert 'llm2clip_requests_total{method="POST",path="/search",status="200"}' in metrics
    assert "llm2clip_pictures 36.0" in metrics and 'llm2clip_batch_size_count{kind="text"}' in metrics
    assert client.get("/openapi.json").json()["paths"].keys() >= {"/search", "/embed", "/health", "/metrics"}


def test_a_picture_that_is_gone_or_became_something_else(model: DualEncoder, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    file = tmp_path / "photos/a.png"
    Image.new("RGB", (8, 8)).save(file)
    app = create_app(model, make_index(tmp_path / "index", tmp_path / "photos", model))
    with TestClient(app, base_url=HOST) as client:
        assert client.get("/picture/1").status_code == 200
        file.write_text("a secret")
        assert client.get("/picture/1").status_code == 404
        file.unlink()
        file.symlink_to("/etc/passwd")
        assert client.get("/picture/1").status_code == 404 and client.get("/thumbnail/1").status_code == 200


def test_without_an_index_it_embeds(model: DualEncoder) -> None:
    with TestClient(create_app(model), base_url=HOST) as client:
        assert client.post("/embed", json={"input": "a"}).status_code == 200
        refused = client.post("/search", json={"texts": ["a"]})
        assert refused.status_code == 404 and "--index" in refused.json()["error"]["message"]


# ---- what it refuses ------------------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A PNG of a few bytes that claims side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("path", "body", "code", "message"),
    [
        ("/search", {"texts": []}, 422, "nothing to look for"),
        ("/search", {"texts": ["a"], "top": 0}, 422, "greater than or equal to 1"),
        ("/search", {"texts": ["a"], "top": 10**9}, 422, "less than or equal"),
        ("/search", {"text": "a"}, 422, "Extra inputs"),
        ("/search", {"texts": ["a" * (TEXT + 1)]}, 422, "at most 20000"),
        ("/search", {"images": ["http://169.254.169.254/latest"]}, 422, "nothing is fetched"),
        ("/search", {"images": ["file:///etc/passwd"]}, 422, "nothing is fetched"),
        ("/search", {"images": ["data:image/png;base64,%%%"]}, 422, "not base64"),
        ("/search", {"images": ["data:image/png,abc"]}, 422, ";base64"),
        ("/search", {"images": ["data:image/svg+xml;base64,PHN2Zz4="]}, 422, "not a picture"),
        ("/search", {"images": [uri(b"")]}, 422, "not a picture"),
        ("/search", {"images": [uri(bomb(2000))]}, 413, "2000 x 2000 is more than"),
        ("/search", {"images": [uri(bomb(100_000))]}, 413, "exceeds limit"),
        ("/search", {"like": ["../../etc/passwd"]}, 404, "there is no picture"),
        ("/search", {"like": ["999999"]}, 404, "there is no picture"),
        ("/search", {"texts": ["a"], "only": {"after": 1e300}}, 422, "less than or equal"),
        ("/embed", {"input": []}, 422, "at least 1"),
        ("/embed", {"input": ["a", " "]}, 422, "an empty text"),
        ("/search", {"texts": [""]}, 422, "an empty text"),
        ("/embed", {"input": ["a"] * (TEXTS + 1)}, 422, "at most 256"),
        ("/embed", {"input": [[1, 2]]}, 422, "valid string"),
        ("/embed", {"input": "a", "dimensions": 8}, 422, "the model's vectors have 16"),
        ("/embed", {"input": [uri(b"x")] * 17}, 422, "16 at most"),
    ],
)
def test_refused_with_the_reason(client: TestClient, path: str, body: dict[str, Any], code: int, message: str) -> None:
    answer = client.post(path, json=body)
    assert answer.status_code == code and message in answer.json()["error"]["message"], answer.text


def test_refused_bodies(client: TestClient, pictures: Path) -> None:
    kind = {"content-type": "application/json"}
    assert client.post("/search", content=b"{", headers=kind).status_code == 422
    assert client.post("/search", content=b'{"texts": ["\\ud800"]}', headers=kind).status_code == 422
    assert client.post("/search", content=b'{"texts": ["a"], "only": {"after": NaN}}', headers=kind).status_code == 422
    assert client.post("/search", content=b"[" * 100_000, headers=kind).status_code in (400, 422)
    large = client.post("/embed", json={"input": "a" * (1 << 20)})
    assert large.status_code == 413 and "1,048,576" in large.json()["error"]["message"]

    def pieces() -> Iterator[bytes]:  # no Content-Length to believe
        for _ in range(40):
            yield b" " * (1 << 15)

    assert client.post("/embed", content=pieces(), headers=kind).status_code == 413
    assert client.post("/embed/upload", files=[("files", ("a.png", b"GIF89a"))]).status_code == 422
    for path in ("/thumbnail/..%2f..%2fetc%2fpasswd", "/static/..%2fserver.py", "/static/server.py", "/picture/-1"):
        assert client.get(path).status_code == 404
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    from_elsewhere = client.get("/thumbnail/1", headers={"sec-fetch-site": "cross-site"})
    assert from_elsewhere.status_code == 403 and client.get("/", headers={"sec-fetch-site": "cross-site"}).is_success


def test_odd_pictures_are_read_or_refused(client: TestClient, pictures: Path) -> None:
    whole = Image.open(pictures / "2.png").convert("RGB")

    def saved(image: Image.Image, form: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, form, **options)
        return stream.getvalue()

    fine = {
        "cmyk": saved(whole.convert("CMYK"), "JPEG"),
        "animated": saved(whole, "GIF", save_all=True, append_images=[whole.rotate(90)]),
        "16 bits": saved(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
        "alpha": saved(whole.convert("RGBA"), "WEBP"),
        "one pixel": saved(Image.new("1", (1, 1)), "PNG"),
        "palette": saved(whole.convert("P"), "PNG"),
        "ribbon": saved(Image.new("RGB", (60_000, 1)), "PNG"),
    }
    for name, data in fine.items():
        assert client.post("/embed", json={"input": uri(data)}).status_code == 200, name
    rng = np.random.default_rng(0)
    sources = [saved(whole, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    codes: dict[int, int] = {}
    for n in range(120):  # cut, and with bytes changed
        data = bytearray(sources[n % len(sources)])
        if n % 2:
            data = data[: rng.integers(1, len(data))]
        else:
            data[rng.integers(len(data))] ^= 255
        code = client.post("/embed", json={"input": uri(bytes(data))}).status_code
        codes[code] = codes.get(code, 0) + 1
    assert set(codes) <= {200, 413, 422} and codes[422] > 20


def test_a_token_is_asked_for(model: DualEncoder, engine: SqliteBackend) -> None:
    with TestClient(create_app(model, engine, token="secret", hosts=None), base_url="http://example.org") as client:
        assert client.get("/health").status_code == 200
        refused = client.post("/embed", json={"input": "a"})
        assert refused.status_code == 401 and "Bearer" in refused.headers["www-authenticate"]
        assert client.get("/").status_code == client.get("/thumbnail/1").status_code == 401
        assert client.get("/?token=wrong").status_code == client.get("/?token=sécret").status_code == 401
        for host in ("x/health?", "localhost:1/health?", "x/health#"):  # what is in it must not open a door
            assert client.get("/thumbnail/1", headers={"host": host}).status_code == 401
        for wrong in ("Bearer wrong", "Basic secret", "Bearer"):
            assert client.get("/thumbnail/1", headers={"authorization": wrong}).status_code == 401
        assert client.get("/thumbnail/1", headers={"authorization": "Bearer secret"}).status_code == 200
        page = client.get("/?token=secret")
        assert page.status_code == 200 and "token" not in str(page.url)
        assert client.get("/thumbnail/1").status_code == 200  # by the cookie


# ---- many at once ---------------------------------------------------------------------------------------------------


def slow(model: DualEncoder, seconds: float, sizes: list[int]) -> DualEncoder:
    """The same model, with a text side that takes its time a batch."""
    import dataclasses

    def read(texts: Sequence[str], progress: bool) -> Any:
        sizes.append(len(texts))
        time.sleep(seconds)
        return model.encode_texts_raw(texts, progress)

    return dataclasses.replace(model, encode_texts_raw=read)


def test_requests_of_many_clients_go_together(model: DualEncoder) -> None:
    sizes: list[int] = []
    with TestClient(create_app(slow(model, 0.05, sizes)), base_url=HOST) as client, ThreadPoolExecutor(24) as clients:
        texts = [f"text {n}" for n in range(48)]
        answers = list(clients.map(lambda text: client.post("/embed", json={"input": text}).json(), texts))
    expected = model.encode_texts(texts).numpy()
    np.testing.assert_allclose([a["data"][0]["embedding"] for a in answers], expected, atol=1e-5)
    assert sum(sizes) == 48 and max(sizes) > 4 and len(sizes) < 24


def test_too_many_are_sent_away_and_late_ones_told(model: DualEncoder) -> None:
    app = create_app(slow(model, 0.3, []), None, Limits(max_queue=3, batch_size=1))
    with TestClient(app, base_url=HOST) as client, ThreadPoolExecutor(12) as clients:
        answers = list(clients.map(lambda n: client.post("/embed", json={"input": f"{n}"}), range(12)))
        assert {a.status_code for a in answers} == {200, 429}
        assert all(a.headers["retry-after"] for a in answers if a.status_code == 429)
        assert client.post("/embed", json={"input": "after"}).status_code == 200
    app = create_app(slow(model, 0.3, []), None, Limits(max_bytes_in_flight=3000))
    with TestClient(app, base_url=HOST) as client, ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda n: client.post("/embed", json={"input": f"{n}" * 2000}), range(6)))
        assert {a.status_code for a in answers} == {200, 429}
        assert client.post("/embed", json={"input": "1" * 2000}).status_code == 200  # what was held is given back
    app = create_app(slow(model, 0.5, []), None, Limits(timeout=0.1))
    with TestClient(app, base_url=HOST) as client:
        late = client.post("/embed", json={"input": "a"})
        assert late.status_code == 504 and "longer than 0.1 seconds" in late.json()["error"]["message"]


def test_searches_that_nobody_waits_for_do_not_pile_up(model: DualEncoder, engine: SqliteBackend) -> None:
    beside, most, lock = 0, 0, threading.Lock()

    class Slow(SqliteBackend):
        def search(self, *_: Any) -> list[Any]:
            nonlocal beside, most
            with lock:
                beside += 1
                most = max(most, beside)
            time.sleep(0.6)
            with lock:
                beside -= 1
            return []

    app = create_app(model, Slow(engine.folder), Limits(timeout=0.1))
    with TestClient(app, base_url=HOST) as client:
        for _ in range(6):
            assert client.post("/search", json={"texts": ["x"]}).status_code == 504
    assert most == 2


def test_one_bad_item_does_not_spoil_its_batch() -> None:
    calls: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        calls.append(items)
        time.sleep(0.02)
        if 3 in items:
            raise ValueError("three")
        return [2 * item for item in items]

    async def run() -> list[Any]:
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(work, executor, most=8, waiting=10)
            found = await asyncio.gather(*(batcher.ask([n]) for n in range(6)), return_exceptions=True)
            with pytest.raises(ValueError, match="10 at most"):
                await batcher.ask(list(range(11)))
            waiting = asyncio.create_task(batcher.ask([5, 6, 7, 8]))
            await asyncio.sleep(0)
            with pytest.raises(QueueFull):
                await batcher.ask(list(range(9)))
            assert await waiting == [10, 12, 14, 16]
            cancelled = asyncio.create_task(batcher.ask([9]))
            await asyncio.sleep(0)
            cancelled.cancel()
            await asyncio.gather(cancelled, return_exceptions=True)
            assert await batcher.ask([4, 5]) == [8, 10]
            await batcher.close()
            return found

    found = asyncio.run(run())
    assert isinstance(found[3], ValueError) and [f for n, f in enumerate(found) if n != 3] == [[0], [2], [4], [8], [10]]
    assert not any(9 in call for call in calls)


def test_it_stops_when_told_and_answers_first(model: DualEncoder, tmp_path: Path) -> None:
    """A real server in a process of its own: SIGTERM while a request is under way."""
    import json
    import signal
    import socket
    import subprocess
    import sys
    import urllib.request

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "llm2clip", "serve", "--model", model.name, "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as server:
        assert server.stdout is not None
        address = f"http://127.0.0.1:{port}"
        for line in server.stdout:
            if "Serving at" in line:
                break
        for _ in range(200):
            try:
                urllib.request.urlopen(f"{address}/health").read()
                break
            except OSError:
                time.sleep(0.1)
        answers: list[int] = []

        def ask() -> None:
            body = json.dumps({"input": [f"{n} " + "long " * 3000 for n in range(64)]}).encode()
            request = urllib.request.Request(f"{address}/embed", body, {"content-type": "application/json"})
            answers.append(len(json.load(urllib.request.urlopen(request))["data"]))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        asking.join(120)
        assert answers == [64]
        assert server.wait(60) in (0, -signal.SIGTERM)
