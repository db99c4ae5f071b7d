"""Tests of the MCP tools of the server, with the client of the MCP SDK."""

import asyncio
import base64
import io
import json
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llm2clip.cli import main
from llm2clip.data.images import encode_thumbnail, load_image
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.backends import IndexBackend
from llm2clip.search.index import Index
from llm2clip.search.inference import ServerLimits
from llm2clip.search.metadata import Filter
from llm2clip.search.schemas import MAX_TEXT_LENGTH
from llm2clip.search.server import AccessPolicy, create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexUnavailableError
from search_fixtures import (
    BACKENDS,
    create_backend,
    create_patient_app,
    index_sources,
    make_index,
    reject_all_texts,
    running_server,
)

mcp = pytest.importorskip("mcp", reason="requires the package of the extra `mcp`")
httpx2 = pytest.importorskip("httpx2")  # a dependency of mcp

from llm2clip.search.mcp_tools import add_mcp_route  # noqa: E402

TOKEN = "secret"
MODES = ("auto", "legacy")  # of the client: the current protocol and the one with a handshake


POST_HEADERS = {
    "Authorization": f"Bearer {TOKEN}",
    "Accept": "application/json, text/event-stream",
    "Content-Type": "application/json",
}


def call(address: str, tool: str, mode: str = "auto", token: str = TOKEN, **arguments: Any) -> Any:
    """Call a tool with the client of the SDK, and return its result."""
    from mcp.client.streamable_http import streamable_http_client

    async def run() -> Any:
        headers = {"Authorization": f"Bearer {token}"}
        async with httpx2.AsyncClient(headers=headers, timeout=None) as http:
            transport = streamable_http_client(f"{address}mcp", http_client=http)
            async with mcp.Client(transport, mode=mode) as client:
                return await client.call_tool(tool, arguments)

    return asyncio.run(run())


def read_texts(result: Any) -> list[str]:
    assert not result.is_error, result.content
    return [block.text for block in result.content if block.type == "text"]


def read_images(result: Any) -> list[bytes]:
    assert {block.mime_type for block in result.content if block.type == "image"} <= {"image/jpeg"}
    return [base64.b64decode(block.data) for block in result.content if block.type == "image"]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, dual_encoder: DualEncoder) -> SqliteBackend:
    return make_index(tmp_path_factory.mktemp("index"), image_folder, dual_encoder)


@contextmanager
def mcp_server(model: DualEncoder, backend: IndexBackend) -> Iterator[str]:
    app = create_patient_app(model, backend, access=AccessPolicy(TOKEN))
    add_mcp_route(app)
    with running_server(app) as address:
        yield address


@pytest.fixture(scope="module")
def address(dual_encoder: DualEncoder, backend: SqliteBackend) -> Iterator[str]:
    with mcp_server(dual_encoder, backend) as address:
        yield address


@pytest.mark.parametrize("mode", MODES)
def test_search_photos_returns_the_hits_of_the_index_with_thumbnails(
    mode: str, address: str, backend: SqliteBackend, dual_encoder: DualEncoder
) -> None:
    result = call(address, "search_photos", mode, text="red", top=3)
    summary, *hits = read_texts(result)
    expected = Index(backend, dual_encoder).search("red", top=3).hits
    assert summary.startswith("3 photos of 36. ") and "not calibrated" in summary
    assert [json.loads(hit) for hit in hits] == [
        {
            "id": hit.id,
            "name": hit.images[0].name,
            "relevance": hit.relevance,
            "similar": [item.name for item in hit.similar],
        }
        for hit in expected
    ]
    assert read_images(result) == [backend.read_thumbnail(hit.id) for hit in expected]


def test_search_photos_with_filters_only_returns_the_newest(address: str, backend: SqliteBackend) -> None:
    (newest,) = backend.search(None, 1, Filter(path="*1.png"))
    _, hit = read_texts(call(address, "search_photos", top=1, filters={"path": "*1.png"}))
    assert json.loads(hit) == {"id": newest.id, "name": newest.images[0].name, "relevance": None, "similar": []}
    (summary,) = read_texts(call(address, "search_photos", filters={"path": "/nowhere"}))
    assert summary == "0 photos of 0 that match the filters."


def test_search_photos_continues_at_the_offset_of_the_last_result(address: str, backend: SqliteBackend) -> None:
    summary, *first = read_texts(call(address, "search_photos", top=3))
    assert summary == "3 photos of 36. For more photos, use offset 3."
    _, *second = read_texts(call(address, "search_photos", top=3, offset=3))
    expected = [hit.id for hit in backend.search(None, 6, Filter())]
    assert [json.loads(hit)["id"] for hit in first + second] == expected
    summary, *_ = read_texts(call(address, "search_photos", top=36))
    assert summary == "36 photos of 36."


def test_photos_without_thumbnails_are_skipped(
    address: str, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "read_thumbnail", lambda hit_id: None)  # as if another process had removed the photos
    result = call(address, "search_photos", top=3)
    assert len(read_texts(result)) == 1 and read_images(result) == []
    monkeypatch.setattr("llm2clip.search.mcp_tools.read_original_image", lambda *_: b"not an image")
    result = call(address, "show_photo", photo="7.png")
    assert result.is_error and "7.png has just been removed" in result.content[0].text


def test_search_photos_says_when_nothing_is_close(
    dual_encoder: DualEncoder, image_folder: Path, tmp_path: Path
) -> None:
    index = make_index(tmp_path / "index", image_folder, dual_encoder)
    reject_all_texts(index, dual_encoder)
    with mcp_server(dual_encoder, index) as address:
        (message,) = read_texts(call(address, "search_photos", text="unicorn"))
        assert message == "Nothing is close: no photo shows what the text describes."
        message, *hits = read_texts(call(address, "search_photos", text="unicorn", top=2, filters={"min_side": 1}))
        assert "The following photos only match the filters." in message and len(hits) == 2
        assert all(json.loads(hit)["relevance"] < 0.01 for hit in hits)


def test_show_photo_finds_ids_names_and_file_names(address: str, backend: SqliteBackend, image_folder: Path) -> None:
    (hit,) = backend.search(None, 1, Filter(path=str(image_folder / "7.png")))
    for photo in (hit.id, hit.images[0].name, "7.png"):
        result = call(address, "show_photo", photo=photo)
        (text,) = read_texts(result)
        assert json.loads(text) == {
            "id": hit.id,
            "name": hit.images[0].name,
            "captions": list(hit.images[0].captions),
            "text": "",
            "details": [detail.text for detail in hit.details],
            "others": [],
        }
        assert read_images(result) == [encode_thumbnail(load_image(image_folder / "7.png"), 1024)]


@pytest.mark.parametrize("kind", BACKENDS)
def test_show_photo_finds_repeated_and_unusual_names(kind: str, dual_encoder: DualEncoder, tmp_path: Path) -> None:
    photos, tar = tmp_path / "photos", tmp_path / "more.tar"
    names = ["a/x.png", "b/x.png", "a/what*?.png", "a/what12.png", "a/new.avif", "member.png", "x.png/y.png"]
    for number, name in enumerate(names):
        file = photos / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (1200, 300), (30 * number, 0, 0)).save(file)
        os.utime(file, (1e9 + number, 1e9 + number))
    with tarfile.open(tar, "w") as archive:
        archive.add(photos / "member.png", "member.png")
    (photos / "member.png").unlink()
    backend = create_backend(kind, tmp_path / "index")
    index_sources([photos, tar], dual_encoder, backend)
    full_names = {name: str(photos / name) for name in names} | {"member.png": f"{tar}!member.png"}
    with mcp_server(dual_encoder, backend) as address:
        for photo, name, others in (
            ("x.png", "b/x.png", ["a/x.png"]),  # not x.png/y.png, which is newer
            ("a/x.png", "a/x.png", []),
            (full_names["a/x.png"], "a/x.png", []),
            ("what*?.png", "a/what*?.png", []),
            (full_names["a/what*?.png"], "a/what*?.png", []),
            ("new.avif", "a/new.avif", []),
            ("member.png", "member.png", []),
            (full_names["member.png"], "member.png", []),
        ):
            result = call(address, "show_photo", photo=photo)
            (text,) = read_texts(result)  # no text says that this is only a thumbnail
            assert json.loads(text)["name"] == full_names[name]
            assert json.loads(text)["others"] == [full_names[other] for other in others]
            (jpeg,) = read_images(result)
            assert Image.open(io.BytesIO(jpeg)).size == (1024, 256)
        for photo in ("what*.png", "photos", "*", "ember.png"):
            assert call(address, "show_photo", photo=photo).is_error


def test_show_photo_shows_the_thumbnail_of_a_missing_file(dual_encoder: DualEncoder, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for name, size in (("a.png", (2000, 1000)), ("b.png", (300, 300))):
        Image.new("RGB", size).save(photos / name)
    index = make_index(tmp_path / "index", photos, dual_encoder)
    (photos / "b.png").unlink()
    with mcp_server(dual_encoder, index) as address:
        (shown,) = read_images(call(address, "show_photo", photo="a.png"))
        assert Image.open(io.BytesIO(shown)).size == (1024, 512)
        result = call(address, "show_photo", photo="b.png")
        assert "The photo cannot be shown: the index contains" in read_texts(result)[1]
        assert read_images(result) == [index.read_thumbnail(index.search(None, 1, Filter(path="b.png"))[0].id)]


@pytest.mark.parametrize(
    ("tool", "arguments", "message"),
    [
        ("search_photos", {"text": "a", "top": 51}, "top: Input should be less than or equal to 50"),
        ("search_photos", {"query": "dog"}, "unknown field 'query'; valid fields are text, top, offset, filters"),
        ("show_photo", {"photo": "7.png", "id": "7"}, "unknown field 'id'; valid fields are photo"),
        ("show_photo", {}, "photo: Field required"),
        ("search_photos", {"text": "a", "top": 0}, "greater than or equal to 1"),
        ("search_photos", {"text": "a" * (MAX_TEXT_LENGTH + 1)}, "at most 20000 characters"),
        ("search_photos", {"filters": {"colour": "red"}}, "unknown field 'colour'; valid fields are caption, path"),
        ("search_photos", {"filters": {"min_side": -1}}, "greater than or equal to 0"),
        ("show_photo", {"photo": "missing.png"}, "the index contains no photo with the id or name missing.png"),
        ("show_photo", {"photo": "99999"}, "the index contains no photo with the id or name 99999"),
        ("show_photo", {"photo": "/"}, "the index contains no photo"),
        ("show_photo", {"photo": " "}, "the text is empty"),
        ("show_photo", {"photo": "a" * 4095}, "photo: String should have at most 4094 characters"),
        ("show_photo", {"photo": "a" * 4094}, "the index contains no photo with the id or name aaa"),
        ("delete_photo", {}, "unknown tool 'delete_photo'; valid tools are search_photos, show_photo"),
    ],
)
def test_invalid_arguments_are_explained(address: str, tool: str, arguments: dict[str, Any], message: str) -> None:
    result = call(address, tool, **arguments)
    assert result.is_error and message in result.content[0].text
    assert "pydantic" not in result.content[0].text


def test_schemas_of_the_tools_allow_no_other_arguments(address: str) -> None:
    response = httpx2.post(
        f"{address}mcp", json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"}, headers=POST_HEADERS
    )
    search, show = response.json()["result"]["tools"]
    assert (search["name"], show["name"]) == ("search_photos", "show_photo")
    assert search["inputSchema"]["additionalProperties"] is show["inputSchema"]["additionalProperties"] is False
    assert "Show a photo at up to 1024 pixels" in show["description"] and show["annotations"]["readOnlyHint"]
    metrics = httpx2.get(f"{address}metrics", headers=POST_HEADERS).text
    assert 'llm2clip_http_requests_total{method="POST",path="/mcp",status="200"}' in metrics


def test_mcp_route_leaves_the_log_handlers_unchanged(
    dual_encoder: DualEncoder, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    add_mcp_route(create_app(dual_encoder, backend))
    assert logging.root.handlers == []


@pytest.mark.parametrize("mode", MODES)
def test_wrong_token_is_rejected(address: str, mode: str) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        call(address, "search_photos", mode, token="wrong", text="red")
    assert caught.group_contains(mcp.MCPError, match="Server returned an error response", depth=2)
    response = httpx2.post(f"{address}mcp", json={}, headers={"Authorization": "Bearer wrong"})
    assert (response.status_code, response.json()["error"]["type"]) == (401, "missing or invalid token")


def test_mcp_route_has_no_streams_and_limits_bodies(address: str) -> None:
    for method in ("GET", "DELETE"):
        assert httpx2.request(method, f"{address}mcp", headers=POST_HEADERS).status_code == 405
    response = httpx2.post(f"{address}mcp", content=b'"' + b"a" * (5 << 20), headers=POST_HEADERS)
    assert response.status_code == 413
    response = httpx2.post(f"{address}mcp", content=b"[" + b"1," * 200_001, headers=POST_HEADERS)
    assert (response.status_code, response.json()["error"]["type"]) == (413, "request too large")


def test_slow_and_failing_searches_are_reported(
    dual_encoder: DualEncoder, backend: SqliteBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(dual_encoder, backend, ServerLimits(timeout=0.2), AccessPolicy(TOKEN, hosts=None))
    add_mcp_route(app)
    index = app.state.service.index
    with running_server(app) as address:
        for tool, arguments in (("search_photos", {}), ("show_photo", {"photo": "missing.png"})):
            request = {"jsonrpc": "2.0", "id": 1, "method": "tools/call"}
            request["params"] = {"name": tool, "arguments": arguments}
            headers = {**POST_HEADERS, "Host": "photos.example"}
            with index.resources.scanning, index.resources.scanning:
                response = httpx2.post(f"{address}mcp", json=request, headers=headers)
            assert (response.status_code, response.json()["error"]["type"]) == (504, "timeout")
        for error, message in (
            (IndexUnavailableError("cannot reach db.internal"), "the index is temporarily unavailable"),
            (RuntimeError("private detail"), "internal error; see the server's log"),
        ):
            monkeypatch.setattr(index, "search", lambda *_, error=error: (_ for _ in ()).throw(error))
            with caplog.at_level(logging.ERROR):
                result = call(address, "search_photos")
            assert result.is_error and message in result.content[0].text
            assert "db.internal" not in result.content[0].text and "private" not in result.content[0].text


def test_serve_mcp_requires_an_index(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", str(model_folder), "--mcp", "--port", "0"]) != 0
    assert "--mcp requires an index: llm2clip serve INDEX --mcp" in capsys.readouterr().err
