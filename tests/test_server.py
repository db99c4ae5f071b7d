"""Tests of the HTTP server: correct responses, invalid and hostile requests, and concurrency."""

import base64
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import struct
import tarfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import uvicorn
from fastapi import Request, Response
from PIL import Image
from pyarrow import parquet
from starlette.testclient import TestClient

from conftest import HANG_TIMEOUT, start_command
from llm2clip.cli import main
from llm2clip.cli.serve import resolve_access_token
from llm2clip.data.image_refs import FileImage
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import QueryTemplates
from llm2clip.search import inference
from llm2clip.search import server as server_module
from llm2clip.search.backends import open_backend
from llm2clip.search.index import Index
from llm2clip.search.inference import DECODERS, SCANS, InferenceBatcher, InferenceService, QueueFullError, ServerLimits
from llm2clip.search.metadata import Filter
from llm2clip.search.middleware import CHUNK_SIZE, SESSION_SECONDS, Authenticator
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.schemas import MAX_IMAGES, MAX_TEMPLATES, MAX_TEXT_LENGTH, MAX_TEXTS
from llm2clip.search.server import AccessPolicy, create_app, make_server_config
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import Deadline, DeadlineExceededError, current_deadline
from search_fixtures import (
    create_backend,
    create_patient_app,
    get_location,
    index_sources,
    make_index,
    read_until,
    reject_all_texts,
    wait_until,
)

BASE_URL = "http://localhost"
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, dual_encoder: DualEncoder) -> SqliteBackend:
    return make_index(tmp_path_factory.mktemp("index"), image_folder, dual_encoder)


@pytest.fixture(scope="module")
def client(dual_encoder: DualEncoder, backend: SqliteBackend) -> Iterator[TestClient]:
    app = create_patient_app(dual_encoder, backend, max_body_bytes=1 << 20, max_pixels=1_000_000)
    with TestClient(app, base_url=BASE_URL, raise_server_exceptions=False) as client:
        yield client


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


# ---- correct responses ----------------------------------------------------------------------------------------------


def test_search_response_has_all_fields(client: TestClient) -> None:
    assert client.post("/search", json={"texts": ["x"], "filter": {"path": "/nowhere"}}).json() == {
        "hits": [],
        "nothing_close": False,
        "total": 0,
        "next_offset": None,
    }
    (hit,) = client.post("/search", json={"texts": ["red"], "top": 1}).json()["hits"]
    newest, filtered = (client.post("/search", json=body).json() for body in ({}, {"filter": {"min_side": 1}}))
    assert newest == filtered and (len(newest["hits"]), newest["total"]) == (36, 36)
    (similar,) = client.post("/search", json={"like": [hit["id"]], "top": 1}).json()["hits"]
    assert similar["id"] == hit["id"] and similar["images"][0]["captions"]
    assert similar["score"] == pytest.approx(1, abs=2e-3)


def test_search_hides_weak_hits_unless_the_request_shows_them(
    dual_encoder: DualEncoder, image_folder: Path, tmp_path: Path
) -> None:
    index = make_index(tmp_path / "index", image_folder, dual_encoder)
    reject_all_texts(index, dual_encoder)
    with TestClient(create_patient_app(dual_encoder, index), base_url=BASE_URL) as client:

        def search(**request: Any) -> dict[str, Any]:
            response = client.post("/search", json=request)
            assert response.status_code == 200, response.text
            return response.json()

        hidden = search(texts=["unicorn"])
        assert (hidden["hits"], hidden["nothing_close"], hidden["total"]) == ([], True, 36)
        assert hidden["next_offset"] is None
        weak = search(texts=["unicorn"], show_weak=True, top=5)
        assert weak["nothing_close"] and len(weak["hits"]) == 5
        assert all(hit["relevance"] < 0.01 for hit in weak["hits"])
        filtered = search(texts=["unicorn"], filter={"min_side": 1}, top=5)
        assert filtered == weak  # with a filter, weak hits are shown
        similar = search(like=[weak["hits"][0]["id"]], negative_texts=["unicorn"], top=5)
        assert not similar["nothing_close"] and all(hit["relevance"] > 0.99 for hit in similar["hits"])
        for request in ({"negative_texts": ["red"]}, {"filter": {"path": "*.png"}}):
            answer = search(**request)
            assert not answer["nothing_close"] and {hit["relevance"] for hit in answer["hits"]} == {None}


def test_unreadable_images_are_named_in_the_error(client: TestClient, image_folder: Path) -> None:
    """The search page removes the image from the query."""
    image = data_uri((image_folder / "9.png").read_bytes())
    for broken, code in ((data_uri(b"GIF89a"), 422), (data_uri(decompression_bomb(2000)), 413), ("data:image/a,", 422)):
        for field in ("images", "negative_images"):
            response = client.post("/search", json={"texts": ["a"], field: [image, broken]})
            assert (response.status_code, response.json()["error"]["param"]) == (code, f"{field}.1")


def test_search_averages_short_texts_with_the_templates_of_the_model(
    dual_encoder: DualEncoder, backend: SqliteBackend
) -> None:
    templates = QueryTemplates(("a photo of a {}", *(f"{{}} number {n}" for n in range(MAX_TEMPLATES - 1))))
    model = dataclasses.replace(dual_encoder, query_templates=templates)
    query = SearchQuery(["red"], negative_texts=["a dog"], templates=templates)
    hits = backend.search(QueryEncoder(dual_encoder).embed(query).combined, 5, Filter())
    request = {"texts": ["red"], "negative_texts": ["a dog"], "words": False, "top": 5}
    with TestClient(create_patient_app(model, backend), base_url=BASE_URL) as client:
        found = [(hit["id"], hit["score"]) for hit in client.post("/search", json=request).json()["hits"]]
        assert found == [(hit.id, pytest.approx(hit.score, abs=1e-6)) for hit in hits]
        texts = [f"a{n}" for n in range(MAX_IMAGES)]  # the largest number of texts is accepted
        assert client.post("/search", json={"texts": texts, "negative_texts": texts}).status_code == 200
    too_many = QueryTemplates((*templates.templates, "{}"))
    with pytest.raises(ValueError, match=r"8 prompt templates, .* limit is 7.*`query_templates` in .*config\.json"):
        create_app(dataclasses.replace(dual_encoder, query_templates=too_many), backend)


def test_embed_returns_the_vectors_of_the_model(
    client: TestClient, dual_encoder: DualEncoder, image_folder: Path
) -> None:
    image = (image_folder / "3.png").read_bytes()
    inputs = ["red", data_uri(image), "eine lange Beschreibung. " * 50]
    response = client.post("/v1/embeddings", json={"input": inputs, "model": "any"}).json()
    first_text, last_text = dual_encoder.encode_texts([inputs[0], inputs[2]]).numpy()
    image_vector = QueryEncoder(dual_encoder).embed_images([image])[0]
    vectors = np.array([item["embedding"] for item in response["data"]])
    np.testing.assert_allclose(vectors, [first_text, image_vector, last_text], atol=1e-5)
    assert [item["index"] for item in response["data"]] == [0, 1, 2]
    assert response["object"] == "list"

    response = client.post("/embed", json={"input": "red", "encoding_format": "base64", "dimensions": 16}).json()
    decoded = np.frombuffer(base64.b64decode(response["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(decoded, first_text, atol=1e-5)


def test_server_returns_images_page_health_and_metrics(
    client: TestClient, backend: SqliteBackend, image_folder: Path
) -> None:
    hit = client.post("/search", json={"texts": ["red"], "top": 1}).json()["hits"][0]
    assert client.get(f"/image/{hit['id']}").content == Path(hit["images"][0]["name"]).read_bytes()
    thumbnail = client.get(f"/thumbnail/{hit['id']}")
    assert thumbnail.headers["content-type"] == "image/jpeg"
    assert Image.open(io.BytesIO(thumbnail.content)).size == (48, 40)
    if_changed = {"if-none-match": thumbnail.headers["etag"]}
    assert client.get(f"/thumbnail/{hit['id']}", headers=if_changed).status_code == 304
    assert client.get("/health").json() == {"status": "ok", "model": "model", "dimensions": 16, "images": 36}
    page = client.get("/")
    assert "<textarea" in page.text
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for name in ("page.js", "page.css"):
        response = client.get(f"/static/{name}")
        assert (response.status_code, response.headers["cache-control"]) == (200, "no-cache")
    metrics = client.get("/metrics").text
    assert 'llm2clip_http_requests_total{method="POST",path="/search",status="200"}' in metrics
    assert 'llm2clip_http_request_duration_seconds_count{path="/search"}' in metrics
    assert 'llm2clip_batch_size_count{kind="text"}' in metrics
    assert 'llm2clip_queue_size{kind="image"} 0.0' in metrics
    assert "llm2clip_index_images 36.0" in metrics
    assert client.get("/openapi.json").json()["paths"].keys() >= {"/search", "/embed", "/health", "/metrics"}


def test_image_is_only_served_if_its_file_is_unchanged(
    dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, other, original = tmp_path / "photos", tmp_path / "private.png", tmp_path / "original.png"
    photos.mkdir()
    file = photos / "a.png"
    Image.new("RGB", (8, 8)).save(file)
    shutil.copy2(file, original)
    Image.new("RGB", (9, 9)).save(other)
    app = create_patient_app(dual_encoder, make_index(tmp_path / "index", photos, dual_encoder))
    with TestClient(app, base_url=BASE_URL) as client:
        response = client.get("/image/1")
        assert response.content == file.read_bytes()
        assert response.headers["content-type"] == "image/png"
        assert response.headers["content-length"] == str(file.stat().st_size)
        file.unlink()
        assert client.get("/image/1").status_code == 404
        file.symlink_to(other)
        assert client.get("/image/1").status_code == 404
        file.unlink()
        os.mkfifo(file)
        assert client.get("/image/1").status_code == 404
        assert client.get("/thumbnail/1").status_code == 200
        file.unlink()
        shutil.copy2(original, file)
        assert client.get("/image/1").status_code == 200
        # The file is replaced after the check of the path.
        monkeypatch.setattr(FileImage, "open", lambda _: other.open("rb"))
        assert client.get("/image/1").status_code == 404


def test_images_in_tars_and_tables_are_served(dual_encoder: DualEncoder, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)).save(stream, "PNG")
    data = stream.getvalue()
    assert len(data) > CHUNK_SIZE
    sources = tmp_path / "sources"
    sources.mkdir()
    (tmp_path / "image.png").write_bytes(data)
    (tmp_path / "first.txt").write_text("abc")
    with tarfile.open(sources / "a.tar", "w") as tar:
        tar.add(tmp_path / "first.txt", "first.txt")
        tar.add(tmp_path / "image.png", "image.png")
    parquet.write_table(pa.table({"image": [data]}), sources / "b.parquet")
    for name in ("a.tar", "b.parquet"):
        app = create_patient_app(dual_encoder, make_index(tmp_path / f"index-{name}", sources / name, dual_encoder))
        with TestClient(app, base_url=BASE_URL) as client:
            response = client.get("/image/1")
            assert (response.status_code, response.content) == (200, data)


def test_health_and_metrics_count_images_at_most_once_per_interval(
    dual_encoder: DualEncoder, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.search.index.COUNT_SECONDS", HANG_TIMEOUT)
    calls: list[int] = []

    class CountingBackend(SqliteBackend):
        def count_images(self) -> tuple[int, int]:
            calls.append(1)
            return super().count_images()

    app = create_patient_app(dual_encoder, CountingBackend(backend.folder))
    with TestClient(app, base_url=BASE_URL) as client:
        for _ in range(5):
            assert client.get("/health").json()["images"] == 36
            assert "llm2clip_index_images 36.0" in client.get("/metrics").text
    assert len(calls) == 1


def test_server_without_an_index_only_embeds(dual_encoder: DualEncoder) -> None:
    with TestClient(create_patient_app(dual_encoder), base_url=BASE_URL) as client:
        assert client.post("/embed", json={"input": "a"}).status_code == 200
        response = client.post("/search", json={"texts": ["a"]})
        assert response.status_code == 404
        assert "serve INDEX" in response.json()["error"]["message"]


# ---- invalid and hostile requests -----------------------------------------------------------------------------------


def decompression_bomb(side: int) -> bytes:
    """Return a PNG of a few bytes whose header declares side x side pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("path", "body", "code", "message"),
    [
        ("/search", {"texts": ["a"], "top": 10**9}, 422, "less than or equal"),
        ("/search", {"text": "a"}, 422, "unknown field 'text'; valid fields are texts, images"),
        ("/search", {"texts": ["a" * (MAX_TEXT_LENGTH + 1)]}, 422, "at most 20000"),
        ("/search", {"images": ["http://169.254.169.254/latest"]}, 422, "URLs are not downloaded"),
        ("/search", {"images": ["data:image/png;base64,%%%"]}, 422, "invalid base64"),
        ("/search", {"images": ["data:image/png,abc"]}, 422, ";base64"),
        ("/search", {"images": ["data:image/svg+xml;base64,PHN2Zz4="]}, 422, "SVG is not supported"),
        ("/search", {"images": [data_uri(b"")]}, 422, "not an image"),
        ("/search", {"images": [data_uri(decompression_bomb(2000))]}, 413, "too many pixels: 2000 x 2000"),
        ("/search", {"images": [data_uri(decompression_bomb(100_000))]}, 413, "exceeds limit"),
        ("/search", {"like": ["../../etc/passwd"]}, 404, "the index contains no image"),
        ("/search", {"like": ["999999"]}, 404, "the index contains no image"),
        ("/search", {"texts": ["a"], "filter": {"after": 1e300}}, 422, "less than or equal"),
        ("/search", {"texts": [" \n"], "filter": {"path": "a"}}, 422, "the text is empty"),
        ("/search", {"texts": ["a"], "offset": 10**6}, 422, "less than or equal to 10000"),
        ("/embed", {"input": ["a"] * (MAX_TEXTS + 1)}, 422, "at most 256"),
        ("/embed", {"input": [[1, 2]]}, 422, "body.input.0: Input should be a valid string"),
        ("/embed", ["a"], 422, "the body must be a JSON object, sent with the header Content-Type: application/json"),
        ("/embed", {"input": "a", "dimensions": 17}, 422, "cannot be truncated to 17"),
        ("/embed", {"input": [data_uri(b"x")] * 33}, 422, "the request contains 33 images, but the limit is 32"),
        ("/embed", {"input": ["a"] * 10_000}, 422, "body.input: List should have at most 256 items"),
        ("/embed", {"input": "https://example.com/a.png", "modality": "image"}, 422, "URLs are not downloaded"),
        ("/embed", {"input": data_uri(b"x"), "modality": "text"}, 422, "'text': it is a data URI of an image"),
        ("/embed", {"model": "a"}, 422, "either `input` or `messages`"),
        ("/embed", {"input": "a", "messages": [user("a")]}, 422, "either `input` or `messages`"),
        ("/embed", {"messages": []}, 422, "body.messages: List should have at least 1 item"),
        ("/embed", {"messages": [[]]}, 422, "body.messages.0: List should have at least 1 item"),
        ("/embed", {"messages": [user("a"), user("b")]}, 422, "body.messages: List should have at most 1 item"),
        ("/embed", {"messages": [[{"role": "user"}]]}, 422, "body.messages.0.0.content: Field required"),
        ("/embed", {"messages": [[user([])]]}, 422, "content: List should have at least 1 item"),
        ("/embed", {"messages": [[user(" ")]]}, 422, "body.messages.0.0.content: Value error, the text is empty"),
        ("/embed", {"messages": [user(" ")]}, 422, "body.messages.0.content: Value error, the text is empty"),
        ("/embed", {"messages": [{"role": "system", "content": "a"}]}, 422, "body.messages.0.role: Input should be 'u"),
        ("/embed", {"messages": [[user([image_part("https://example.com/a.png")])]]}, 422, "URLs are not downloaded"),
        ("/embed", {"messages": [[user([{"type": "audio_url"}])]]}, 422, "expected tags: 'text', 'image_url'"),
        ("/embed", {"messages": [[user([image_part("data:image/png;base64,%%%")])]]}, 422, "invalid base64"),
        ("/embed", {"messages": [[user("a")]] * 10_000}, 422, "at most 256"),
        ("/embed", {"messages": [[user([image_part(data_uri(b"x"))])]] * 33}, 422, "the limit is 32"),
        ("/embed", {"messages": [[user([{"type": "text", "text": "a"}] * 2)]] * 256}, 422, "512 texts, but the limit"),
    ],
)
def test_invalid_requests_are_explained(client: TestClient, path: str, body: Any, code: int, message: str) -> None:
    response = client.post(path, json=body)
    assert response.status_code == code, response.text
    error = response.json()["error"]["message"]
    assert message in error and "function-after" not in error


@pytest.mark.parametrize(
    ("body", "content_type"), [("{", "application/json"), ('{"input": "a"}', "text/plain"), ("", "")]
)
def test_requests_without_json_are_explained(client: TestClient, body: str, content_type: str) -> None:
    response = client.post("/embed", content=body, headers={"content-type": content_type})
    assert response.status_code == 422
    assert response.json()["error"]["message"].startswith("the body must be a JSON object, sent with the header")


@pytest.mark.parametrize(
    ("query", "has_hits"),
    [
        ({"texts": ["a" * MAX_TEXT_LENGTH]}, True),
        ({"texts": ["word " * (MAX_TEXT_LENGTH // 5)]}, True),
        ({"texts": ["🐕🏽‍🦺👩‍👩‍👧🇫🇷"]}, True),
        ({"texts": ["\u202e\u0000\ufffe"]}, True),
        ({"texts": ["red"], "filter": {"after": 2e9, "before": 1e9}}, False),
        ({"texts": ["red"], "filter": {"path": "/x", "caption": "🐕" * 500, "min_side": 1_000_000}}, False),
    ],
)
def test_unusual_queries_are_answered(client: TestClient, query: dict[str, Any], has_hits: bool) -> None:
    response = client.post("/search", json={"show_weak": True, **query})
    assert response.status_code == 200, response.text
    assert bool(response.json()["hits"]) == has_hits


def test_server_returns_503_while_a_table_of_the_index_cannot_be_read(
    tmp_path: Path,
    image_folder: Path,
    dual_encoder: DualEncoder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """For PostgreSQL, see test_postgres_backend.py."""
    monkeypatch.setattr("llm2clip.search.schemas.LOG_SECONDS", 1e9)
    begin_write = make_index(tmp_path / "index", image_folder, dual_encoder)._db.open_transaction
    backend = SqliteBackend(tmp_path / "index")
    request = {"texts": ["red"], "show_weak": True}
    with TestClient(create_patient_app(dual_encoder, backend), base_url=BASE_URL) as client:
        expected = client.post("/search", json=request).json()
        assert expected["hits"]
        with begin_write() as connection:
            connection.execute("ALTER TABLE contents RENAME TO hidden")
        for response in (client.post("/search", json=request), client.post("/search", json={"like": ["1"]})):
            assert response.status_code == 503 and response.headers["retry-after"] == "1"
            assert response.json()["error"]["message"] == "the index is temporarily unavailable; try again later"
        client.post("/search", json=request)
        assert sum("no such table: contents" in message for message in caplog.messages) == 1  # of three equal ones
        with begin_write() as connection:
            connection.execute("ALTER TABLE hidden RENAME TO contents")
        assert client.post("/search", json=request).json() == expected


def test_malformed_and_oversized_bodies_are_rejected(client: TestClient) -> None:
    def post(path: str, content: Any) -> int:
        return client.post(path, content=content, headers=JSON).status_code

    assert post("/search", b"{") == 422
    assert post("/search", b'{"texts": ["\\ud800"]}') == 422
    assert post("/search", b'{"texts": ["a"], "filter": {"after": NaN}}') == 422
    assert post("/search", b"[" * 100_000) in (400, 422)
    response = client.post("/embed", json={"input": "a" * (1 << 20)})
    assert response.status_code == 413
    assert "1,048,576" in response.json()["error"]["message"]
    chunks_without_content_length = (b" " * (1 << 15) for _ in range(40))
    assert post("/embed", chunks_without_content_length) == 413


def test_bodies_without_content_type_are_not_parsed(client: TestClient) -> None:
    """The limit on the number of JSON values applies only to bodies whose content type is JSON."""
    response = client.post("/search", content=b'{"texts": ["red"]}')
    assert response.status_code == 422
    assert "content-type" not in response.request.headers


def test_paths_hosts_and_sites_are_checked(client: TestClient) -> None:
    for path in ("/thumbnail/..%2f..%2fetc%2fpasswd", "/static/..%2fserver.py", "/static/server.py", "/image/-1"):
        assert client.get(path).status_code == 404
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    cross_site = {"sec-fetch-site": "cross-site"}
    assert client.get("/thumbnail/1", headers=cross_site).status_code == 403
    assert client.get("/thumbnail/1", headers={"sec-fetch-site": "same-site"}).status_code == 403
    assert client.get("/thumbnail/1", headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert client.get("/", headers=cross_site).is_success


def test_unusual_and_damaged_images_never_fail_the_server(client: TestClient, image_folder: Path) -> None:
    image = Image.open(image_folder / "2.png").convert("RGB")

    def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
        stream = io.BytesIO()
        image.save(stream, image_format, **options)
        return stream.getvalue()

    def embed(data: bytes) -> int:
        return client.post("/embed", json={"input": data_uri(data)}).status_code

    valid = {
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "animated": encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "16 bits": encode(Image.fromarray(np.full((9, 9), 40_000, np.uint16)), "PNG"),
        "alpha": encode(image.convert("RGBA"), "WEBP"),
        "one pixel": encode(Image.new("1", (1, 1)), "PNG"),
        "palette": encode(image.convert("P"), "PNG"),
        "extreme aspect ratio": encode(Image.new("RGB", (60_000, 1)), "PNG"),
    }
    for name, data in valid.items():
        assert embed(data) == 200, name

    rng = np.random.default_rng(0)
    originals = [encode(image, image_format) for image_format in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")]
    codes = []
    for n in range(60):
        damaged = bytearray(originals[n % len(originals)])
        if n % 2:
            damaged = damaged[: rng.integers(1, len(damaged))]
        else:
            damaged[rng.integers(len(damaged))] ^= 255
        codes.append(embed(bytes(damaged)))
    assert set(codes) <= {200, 413, 422}
    assert codes.count(422) > 10


def test_token_is_required(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    app = create_app(
        dual_encoder, backend, ServerLimits(timeout=HANG_TIMEOUT), access=AccessPolicy(token="secret", hosts=None)
    )
    with TestClient(app, base_url="http://example.org") as client:

        def thumbnail(**headers: str) -> int:
            return client.get("/thumbnail/1", headers=headers).status_code

        assert client.get("/health").json() == {"status": "ok"}
        response = client.post("/embed", json={"input": "a"})
        assert response.status_code == 401
        assert "Bearer" in response.headers["www-authenticate"]
        assert client.get("/").status_code == thumbnail() == 401
        page = client.get("/", headers={"accept": "text/html"})
        assert page.status_code == 401 and "A token is required" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert client.get("/?token=wrong").status_code == client.get("/?token=sécret").status_code == 401
        for host in ("x/health?", "localhost:1/health?", "x/health#"):  # must not change the path that is checked
            assert thumbnail(host=host) == 401
        for wrong in ("Bearer wrong", "Basic secret", "Bearer"):
            assert thumbnail(authorization=wrong) == 401
        not_ascii = client.get("/thumbnail/1", headers={b"authorization": b"Bearer s\xe9cret"})
        assert not_ascii.status_code == 401
        assert thumbnail(authorization="Bearer secret") == 200
        assert client.get("/health", headers={"authorization": "Bearer secret"}).json()["images"] == 36


def test_model_name_is_public_only_if_its_path_is(dual_encoder: DualEncoder) -> None:
    expected = {"id": "model", "object": "model", "created": 0, "owned_by": "llm2clip"}
    for access, code in (
        (AccessPolicy("secret"), 401),
        (AccessPolicy("secret", public_paths=("/health", "/v1/models")), 200),
    ):
        app = create_app(dual_encoder, None, ServerLimits(timeout=HANG_TIMEOUT), access=access)
        with TestClient(app, base_url=BASE_URL) as client:
            response = client.get("/v1/models")
            assert response.status_code == code
            assert code == 401 or response.json() == {"object": "list", "data": [expected]}
            assert client.get("/v1/models", headers={"sec-fetch-site": "cross-site"}).status_code in (401, 403)
            assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 401
            assert client.get("/v1/models/").status_code == client.get("/v1/models/x").status_code == 401
            assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200


def test_model_in_the_working_directory_has_the_name_of_the_directory(
    dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = create_app(dataclasses.replace(dual_encoder, name="."), None, ServerLimits(timeout=HANG_TIMEOUT))
    with TestClient(app, base_url=BASE_URL) as client:
        assert (
            client.get("/v1/models").json()["data"][0]["id"] == client.get("/health").json()["model"] == tmp_path.name
        )


def test_images_in_messages_are_named_in_the_error(client: TestClient, image_folder: Path) -> None:
    valid, broken = image_part(data_uri((image_folder / "9.png").read_bytes())), image_part(data_uri(b"GIF89a"))
    message = user([valid, broken])
    for messages, param in (
        ([[user([valid])], [message]], "messages.1.0.content.1"),
        ([message], "messages.0.content.1"),
    ):
        response = client.post("/embed", json={"messages": messages})
        assert (response.status_code, response.json()["error"]["param"]) == (422, param)


def test_traces_contain_routes_but_no_private_data(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    """With the excluded URLs that the documentation recommends, since the address of the page contains the token."""
    instrumentation = pytest.importorskip("opentelemetry.instrumentation.fastapi")
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")
    documentation = (Path(__file__).parents[1] / "docs/howto/operations.md").read_text()
    [excluded] = re.findall(r"OTEL_PYTHON_FASTAPI_EXCLUDED_URLS='(.+)'", documentation)
    exporter, provider = memory.InMemorySpanExporter(), trace.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(exporter))
    app = create_app(dual_encoder, backend, ServerLimits(timeout=HANG_TIMEOUT), access=AccessPolicy(token="secret"))
    instrumentation.FastAPIInstrumentor.instrument_app(app, tracer_provider=provider, excluded_urls=excluded)
    with TestClient(app, base_url=BASE_URL) as client:
        assert client.get("/?token=secret").status_code == 200
        assert client.post("/search", json={"texts": ["private"]}).status_code == 200
        assert client.get("/image/1").status_code == 200
    spans = exporter.get_finished_spans()
    routes = {span.attributes.get("http.route") for span in spans if span.kind.name == "SERVER"}
    assert routes == {"/search"}
    assert not any(word in span.to_json() for span in spans for word in ("secret", "private"))


def test_session_cookie_does_not_contain_the_token(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    app = create_app(
        dual_encoder, backend, ServerLimits(timeout=HANG_TIMEOUT), access=AccessPolicy(token="secret", hosts=None)
    )
    with TestClient(app, base_url="http://example.org", follow_redirects=False) as client:
        response = client.get("/?token=secret")
        assert response.status_code == 303 and response.headers["location"] == "/"
        cookie = response.headers["set-cookie"]
        assert cookie.startswith("llm2clip_session_") and "secret" not in cookie
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secure" not in cookie
        assert client.get("/thumbnail/1").status_code == 200
    with TestClient(app, base_url="https://example.org", follow_redirects=False) as other_browser:
        assert other_browser.get("/thumbnail/1").status_code == 401
        assert "Secure" in other_browser.get("/?token=secret").headers["set-cookie"]


def test_sessions_expire_and_cannot_be_forged(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("llm2clip.search.middleware.time.time", lambda: now[0])
    scope = {"type": "http", "scheme": "http", "headers": []}
    auth, same_token, other_token = Authenticator("secret"), Authenticator("secret"), Authenticator("other")
    response = Response()
    auth.start_session(Request(scope), response)
    cookie = response.headers["set-cookie"].partition(";")[0]

    def is_authorized(auth: Authenticator, cookie: str) -> bool:
        return auth.is_authorized(Request({**scope, "headers": [(b"cookie", cookie.encode())]}))

    assert is_authorized(auth, cookie) and is_authorized(same_token, cookie)  # another process with the same token
    name, _, value = cookie.partition("=")
    end, _, signature = value.partition(".")
    other_name = other_token._cookie_name
    assert other_name != name and not is_authorized(other_token, f"{other_name}={value}")
    later = int(end) + 1
    for forged in (f"{later}.{signature}", f"{end}.", end, "", f".{signature}", f"x.{signature}", "é.é", f"{end}.é"):
        assert not is_authorized(auth, f"{name}={forged}")
    now[0] += SESSION_SECONDS
    assert not is_authorized(auth, cookie)


@pytest.mark.parametrize("token", ["", "sécret", "two words", "line\n"])
def test_unusable_tokens_are_rejected(dual_encoder: DualEncoder, token: str) -> None:
    with pytest.raises(ValueError, match="printable ASCII"):
        create_app(dual_encoder, access=AccessPolicy(token=token))


# ---- concurrency ----------------------------------------------------------------------------------------------------


class PausedModel:
    """A model that encodes no text until `resume()` is called, and records the size of each batch of texts."""

    def __init__(self, model: DualEncoder) -> None:
        self.batch_sizes: list[int] = []
        self.started, self._resumed = threading.Event(), threading.Event()

        def encode_texts_raw(texts: Sequence[str], progress: bool) -> Any:
            self.batch_sizes.append(len(texts))
            self.started.set()
            assert self._resumed.wait(HANG_TIMEOUT)
            return model.encode_texts_raw(texts, progress)

        self.model = dataclasses.replace(model, encode_texts_raw=encode_texts_raw)

    def resume(self) -> None:
        self._resumed.set()


@contextmanager
def paused_server(model: DualEncoder, **limits: Any) -> Iterator[tuple[PausedModel, Callable[..., Any], Any]]:
    """Yield a paused model, a function that posts to /embed in the background, and the service that runs the model.

    The first text that is posted occupies the model; all later texts wait in the queue.
    """
    paused = PausedModel(model)
    app = create_patient_app(paused.model, **limits)
    with TestClient(app, base_url=BASE_URL) as client, ThreadPoolExecutor(64) as clients:

        def post(text: str | list[str]) -> Future[Any]:
            return clients.submit(client.post, "/embed", json={"input": text})

        try:
            yield paused, post, app.state.service
        finally:
            paused.resume()  # a test that fails must not wait for the requests in progress


def wait_for_queue(service: InferenceService, size: int) -> None:
    """Wait until a number of texts are in the queue."""
    wait_until(lambda: service.registry.get_sample_value("llm2clip_queue_size", {"kind": "text"}) == size)


def test_concurrent_requests_are_batched(dual_encoder: DualEncoder) -> None:
    texts = [f"text {n}" for n in range(48)]
    with paused_server(dual_encoder) as (model, post, service):
        responses = [post(texts[0])]
        assert model.started.wait(HANG_TIMEOUT)
        responses += [post(text) for text in texts[1:]]
        wait_for_queue(service, 47)
        model.resume()
        vectors = [response.result().json()["data"][0]["embedding"] for response in responses]
    np.testing.assert_allclose(vectors, dual_encoder.encode_texts(texts).numpy(), atol=1e-5)
    assert model.batch_sizes == [1, 32, 15]


def test_server_returns_429_when_the_queue_is_full(dual_encoder: DualEncoder) -> None:
    with paused_server(dual_encoder, max_queue=4, batch_size=1) as (model, post, service):
        accepted = [post(f"{n}") for n in range(4)]
        assert model.started.wait(HANG_TIMEOUT)
        wait_until(lambda: service.embedders.waiting == 4)
        rejected = post("4").result()
        assert rejected.status_code == 429 and rejected.headers["retry-after"]
        model.resume()
        assert [response.result().status_code for response in accepted] == [200] * 4
        assert post("after").result().status_code == 200


def test_server_returns_429_when_requests_have_too_many_bytes(dual_encoder: DualEncoder) -> None:
    large, small = ["0" * 20_000] * 4, "0" * 20_000
    with paused_server(dual_encoder, max_bytes_in_flight=100_000) as (model, post, service):
        accepted = [post(large)]
        assert model.started.wait(HANG_TIMEOUT)
        rejected = post(large).result()
        assert rejected.status_code == 429 and rejected.headers["retry-after"]
        accepted.append(post(small))
        wait_for_queue(service, 1)
        model.resume()
        assert [response.result().status_code for response in accepted] == [200, 200]
        assert post(large).result().status_code == 200  # the bytes have been released


def test_server_returns_504_after_the_timeout(dual_encoder: DualEncoder) -> None:
    with paused_server(dual_encoder, timeout=0.1) as (_, post, _):
        response = post("a").result()  # the model is paused, so the request cannot succeed before the timeout
    assert response.status_code == 504
    assert "longer than 0.1 seconds" in response.json()["error"]["message"]


def test_searches_that_timed_out_do_not_pile_up(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    """A search that has not started never starts, and one that waits for the index stops waiting."""
    resumed, scans = threading.Event(), threading.Semaphore(0)

    class PausedBackend(SqliteBackend):
        def search(self, *args: Any) -> list[Any]:
            scans.release()
            assert resumed.wait(HANG_TIMEOUT)
            return []

    app = create_patient_app(dual_encoder, PausedBackend(backend.folder), timeout=0.5, max_queue=6, batch_size=2)
    searchers = app.state.service.searchers
    with TestClient(app, base_url=BASE_URL) as client, ThreadPoolExecutor(6) as clients:

        def post(number: int) -> Any:
            return client.post("/search", json={"texts": [f"{number}"]})

        try:
            assert [response.status_code for response in clients.map(post, range(6))] == [504] * 6
            assert searchers.waiting == 0
            for _ in range(SCANS):
                assert scans.acquire(timeout=HANG_TIMEOUT)
            assert not scans.acquire(blocking=False)
        finally:
            resumed.set()
        wait_until(lambda: post(7).status_code == 200)


class Panic(BaseException):
    """As an exception of the tokenizers' Rust code, not a subclass of Exception."""


@pytest.mark.parametrize("error", [ValueError("three"), Panic("three"), SystemExit(3)])
def test_batcher_isolates_failing_items(error: BaseException) -> None:
    calls: list[list[int]] = []
    released = threading.Event()

    def double(items: list[int]) -> list[int]:
        calls.append(items)
        if items == [-1]:
            assert released.wait(HANG_TIMEOUT)
        if 3 in items:
            raise error
        return [2 * item for item in items]

    with ThreadPoolExecutor(1) as executor, ThreadPoolExecutor(8) as clients:
        batcher = InferenceBatcher(double, executor, max_batch_size=8, max_queue=10)
        try:
            first = clients.submit(batcher.submit, [-1])
            wait_until(lambda: calls == [[-1]])
            results = [clients.submit(batcher.submit, [n]) for n in range(6)]
            wait_until(lambda: len(batcher) == 6)
            with pytest.raises(ValueError, match="the limit is 10"):
                batcher.submit(list(range(11)))
            with pytest.raises(QueueFullError):
                batcher.submit([7] * 5)
        finally:
            released.set()
        assert first.result() == [-2]
        failed = results.pop(3).exception()
        assert isinstance(failed, ValueError if isinstance(error, ValueError) else RuntimeError)
        assert [result.result() for result in results] == [[0], [2], [4], [8], [10]]
        assert sorted(calls[1]) == list(range(6))
        assert batcher.submit([5, 6]) == [10, 12]  # the batcher continues after every exception


def test_batcher_removes_the_items_of_requests_that_have_timed_out() -> None:
    calls: list[list[int]] = []
    released = threading.Event()

    def work(items: list[int]) -> list[int]:
        calls.append(items)
        assert released.wait(HANG_TIMEOUT)
        return items

    with ThreadPoolExecutor(1) as executor, ThreadPoolExecutor(1) as clients:
        batcher = InferenceBatcher(work, executor)
        try:
            running = clients.submit(batcher.submit, [1])
            wait_until(lambda: calls == [[1]])
            token = current_deadline.set(Deadline(time.monotonic() + 0.01, 0.01))
            with pytest.raises(DeadlineExceededError, match="the request took longer"):
                batcher.submit([2, 3])
            current_deadline.reset(token)
            assert len(batcher) == 0
        finally:
            released.set()
        assert running.result() == [1] and batcher.submit([4]) == [4]
    assert calls == [[1], [4]]


def test_closed_batcher_wakes_its_callers_and_rejects_items() -> None:
    released = threading.Event()

    def work(items: list[int]) -> list[int]:
        assert released.wait(HANG_TIMEOUT)
        return items

    with ThreadPoolExecutor(1) as executor, ThreadPoolExecutor(2) as clients:
        batcher = InferenceBatcher(work, executor, max_batch_size=1)
        try:
            running, waiting = clients.submit(batcher.submit, [1]), None
            wait_until(lambda: batcher._is_scheduled and len(batcher) == 0)
            waiting = clients.submit(batcher.submit, [2])
            wait_until(lambda: len(batcher) == 1)
            batcher.close()
            with pytest.raises(CancelledError):
                waiting.result(HANG_TIMEOUT)
            with pytest.raises(QueueFullError, match="the server is stopping"):
                batcher.submit([3])
        finally:
            released.set()
        assert running.result() == [1]


def test_waiting_for_shared_values_of_an_index_ends_at_the_deadline(
    dual_encoder: DualEncoder, backend: SqliteBackend
) -> None:
    index = Index(backend, dual_encoder)
    expected = index.count()
    token = current_deadline.set(Deadline(time.monotonic() + 0.01, 0.01))
    try:
        with index._calibration_slot:
            assert index.count() == expected
            with pytest.raises(DeadlineExceededError):
                assert index.calibration
        with index._count_slot, pytest.raises(DeadlineExceededError):
            index.count()
    finally:
        current_deadline.reset(token)


def test_image_files_share_the_decoding_limit(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    app = create_patient_app(dual_encoder, backend, timeout=0.5)
    with TestClient(app, base_url=BASE_URL) as client, ExitStack() as stack:
        assert client.get("/image/1").status_code == 200
        for _ in range(DECODERS):
            stack.enter_context(app.state.service._decoding)
        assert client.get("/image/1").status_code == 504


# ---- the command `serve` --------------------------------------------------------------------------------------------


def test_serve_completes_requests_after_sigterm(dual_encoder: DualEncoder) -> None:
    """uvicorn sets `should_exit` when it receives the signal."""
    model = PausedModel(dual_encoder)
    config = make_server_config(create_patient_app(model.model), "127.0.0.1", 0, behind_proxy=False)
    config.timeout_graceful_shutdown = HANG_TIMEOUT
    server = uvicorn.Server(config)
    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(server.run)
        try:
            wait_until(lambda: server.started)
            port = server.servers[0].sockets[0].getsockname()[1]
            response = threads.submit(post_json, f"http://127.0.0.1:{port}/embed", {"input": ["a", "b"]})
            assert model.started.wait(HANG_TIMEOUT)
            server.should_exit = True
            wait_until(lambda: not is_listening(port))  # the server is stopping, and accepts no new requests
            assert not response.done()
            model.resume()
            assert len(response.result()["data"]) == 2
            running.result(HANG_TIMEOUT)
        finally:
            model.resume()
            server.should_exit = True


def test_serve_stops_after_sigterm_although_a_decoder_never_returns(model_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "output"
    command = ["serve", "--model", str(model_folder), "--port", "0", "--token", "secret"]
    options = ["--timeout", str(HANG_TIMEOUT), "--precision", "fp32"]
    process = start_command([*command, *options], output, prepare=_decode_endlessly)
    try:
        port = int(read_until(process, output, r"Serving at http://127.0.0.1:(\d+)/")[1])
        with pytest.raises(urllib.error.HTTPError, match="401"):  # without --list_models_without_token
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=HANG_TIMEOUT)
        body = json.dumps({"input": data_uri(b"x")})
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = "POST /embed HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
            head += "Content-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            read_until(process, output, "Decoding\n")
            process.terminate()
            process.join(HANG_TIMEOUT)
            assert process.exitcode in (0, -signal.SIGTERM)
    finally:
        process.kill()


def _decode_endlessly() -> None:
    def decode(image: Any, max_pixels: int) -> None:
        print("Decoding", flush=True)
        time.sleep(1_000_000)

    inference.load_query_image = decode  # type: ignore[assignment]
    server_module.SHUTDOWN_TIMEOUT = 0.1  # type: ignore[assignment]


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_servers_share_an_index_and_sessions(
    kind: str, tmp_path: Path, image_folder: Path, dual_encoder: DualEncoder
) -> None:
    """Two servers with the same token answer in turn, as behind a proxy, while another program changes the index."""
    index = create_backend(kind, tmp_path / "index")
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copy(image_folder / "0.png", photos)
    index_sources([photos], dual_encoder, index)
    limits, access = ServerLimits(timeout=HANG_TIMEOUT), AccessPolicy(token="secret")
    with ExitStack() as stack:
        clients = []
        for _ in range(2):
            app = create_app(dual_encoder, open_backend(get_location(kind, tmp_path / "index")), limits, access)
            clients.append(stack.enter_context(TestClient(app, base_url=BASE_URL, follow_redirects=False)))
        assert clients[0].get("/?token=secret").status_code == 303
        clients[1].cookies = clients[0].cookies

        def find_images() -> list[set[str]]:
            found = []
            for client in clients:
                response = client.post("/search", json={"texts": ["red"], "show_weak": True, "group_similar": False})
                assert response.status_code == 200
                found.append({Path(hit["images"][0]["name"]).name for hit in response.json()["hits"]})
            return found

        assert find_images() == [{"0.png"}] * 2
        shutil.copy(image_folder / "1.png", photos)
        index_sources([photos], dual_encoder, index)
        assert find_images() == [{"0.png", "1.png"}] * 2
        (photos / "0.png").unlink()
        index_sources([photos], dual_encoder, index, prune=True)
        assert find_images() == [{"1.png"}] * 2


@pytest.mark.parametrize(
    ("token", "no_token", "host", "environment", "expected"),
    [
        (None, False, "127.0.0.1", None, r"[\w-]{32}"),
        (None, False, "127.0.0.1", "", r"[\w-]{32}"),
        (None, False, "0.0.0.0", "from-environment", "from-environment"),
        ("a", False, "127.0.0.1", "from-environment", "a"),
        (None, True, "127.0.0.1", "from-environment", None),
        (None, True, "::1", None, None),
    ],
)
def test_serve_chooses_a_token(
    token: str | None,
    no_token: bool,
    host: str,
    environment: str | None,
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LLM2CLIP_TOKEN", raising=False)
    if environment is not None:
        monkeypatch.setenv("LLM2CLIP_TOKEN", environment)
    chosen = resolve_access_token(token, no_token, host)
    assert chosen is None if expected is None else re.fullmatch(expected, chosen or "")


@pytest.mark.parametrize(
    ("options", "environment", "query"),
    [
        ([], None, r"\?token=[\w-]{32}"),
        ([], "from-environment", ""),
        (["--token", "a/b"], "from-environment", r"\?token=a%2Fb"),
        (["--no_token"], "from-environment", ""),
    ],
)
def test_serve_prints_the_token_unless_it_comes_from_the_environment(
    options: list[str],
    environment: str | None,
    query: str,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("LLM2CLIP_TOKEN", raising=False)
    if environment is not None:
        monkeypatch.setenv("LLM2CLIP_TOKEN", environment)
    monkeypatch.setattr(server_module, "serve", lambda *_, on_start, behind_proxy: on_start(7860))
    assert main(["serve", "--model", str(model_folder), "--port", "0", "--precision", "fp32", *options]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"^Serving at http://127\.0\.0\.1:7860/{query}$", output, re.MULTILINE)
    assert "from-environment" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--token", ""], "--token is empty"),
        (["--no_token", "--host", "0.0.0.0"], "--no_token is not allowed with --host 0.0.0.0"),
        (["--no_token", "--token", "a"], "cannot be used together"),
    ],
)
def test_serve_explains_wrong_token_options(
    options: list[str], message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--model", str(model_folder), "--port", "0", *options]) == 1
    assert message in capsys.readouterr().err


def test_serve_rejects_a_port_in_use_before_it_loads_the_model(
    model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other_server:
        port = str(other_server.getsockname()[1])
        assert main(["serve", "--model", str(model_folder), "--port", port]) == 1
    output = capsys.readouterr()
    assert "Serving at" not in output.out
    assert f"cannot listen on port {port} of 127.0.0.1: " in output.err and "--port" in output.err


def post_json(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), JSON)
    with urllib.request.urlopen(request, timeout=HANG_TIMEOUT) as response:
        return json.load(response)


def is_listening(port: int) -> bool:
    """Check whether a server accepts connections on a port of this machine."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
