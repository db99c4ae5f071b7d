"""Tests of zip archives of original images: their contents, names, limits and errors."""

import asyncio
import io
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.testclient import TestClient

from llm2clip.data.image_refs import FileImage, ImageRef, ParquetImage, TarImage
from llm2clip.io_utils import to_valid_unicode
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search import inference, middleware, zip_download
from llm2clip.search.inference import QueueFull
from llm2clip.search.middleware import CHUNK_SIZE, ByteBudget
from llm2clip.search.server import Access, create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedImage, IndexUnavailableError
from llm2clip.search.zip_download import (
    MAX_NAME_BYTES,
    MAX_ZIP_IMAGES,
    MISSING_FILE,
    make_date,
    make_unique,
    make_valid_file_name,
)
from search_fixtures import HANG_TIMEOUT, create_patient_app, make_index

BASE_URL = "http://localhost"


@pytest.fixture
def index(image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path) -> SqliteBackend:
    """Index of `a.png`, `sub/A.png` and `large.bmp`, with the ids 1 to 3 in this order."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    shutil.copy(image_folder / "0.png", folder / "a.png")
    shutil.copy(image_folder / "1.png", folder / "sub/A.png")
    Image.new("RGB", (300, 300)).save(folder / "large.bmp")  # larger than a chunk
    os.utime(folder / "a.png", (1_600_000_000, 1_600_000_000))
    return make_index(tmp_path / "index", folder, dual_encoder)


@pytest.fixture
def client(index: SqliteBackend, dual_encoder: DualEncoder) -> Iterator[TestClient]:
    with TestClient(create_patient_app(dual_encoder, index), base_url=BASE_URL) as client:
        yield client


def download(client: TestClient, ids: str) -> dict[str, bytes]:
    """Download an archive, check its checksums, and return the contents of its files by name."""
    response = client.get("/zip", params={"ids": ids})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/zip"
    assert response.headers["content-disposition"] == 'attachment; filename="images.zip"'
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        assert archive.testzip() is None
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        return {info.filename: archive.read(info) for info in archive.infolist()}


def find_ids(index: SqliteBackend) -> dict[str, str]:
    """Return the id of each file by its path relative to the folder."""
    return {Path(index.images(str(n))[0].name).name: str(n) for n in (1, 2, 3)}


def test_zip_contains_the_original_files_with_distinct_names_and_their_dates(
    client: TestClient, index: SqliteBackend, tmp_path: Path
) -> None:
    ids, photos = find_ids(index), tmp_path / "photos"
    files = download(client, ",".join([ids["a.png"], ids["A.png"], ids["large.bmp"], ids["a.png"]]))
    assert list(files) == ["a.png", "A (2).png", "large.bmp"]
    assert files["a.png"] == (photos / "a.png").read_bytes()
    assert files["A (2).png"] == (photos / "sub/A.png").read_bytes()
    assert files["large.bmp"] == (photos / "large.bmp").read_bytes() and len(files["large.bmp"]) > CHUNK_SIZE
    content = client.get("/zip", params={"ids": ids["a.png"]}).content
    (info,) = zipfile.ZipFile(io.BytesIO(content)).infolist()
    assert info.date_time[:2] == (2020, 9)


def test_zip_lists_files_that_it_cannot_contain(client: TestClient, index: SqliteBackend, tmp_path: Path) -> None:
    ids, photos = find_ids(index), tmp_path / "photos"
    (photos / "a.png").write_bytes(b"changed")
    (photos / "sub/A.png").unlink()
    files = download(client, f"{ids['a.png']},{ids['A.png']},99,{ids['large.bmp']},x")
    assert list(files) == ["large.bmp", MISSING_FILE]
    lines = files[MISSING_FILE].decode().splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        str(photos / "a.png"),
        str(photos / "sub/A.png"),
        "99",
        "x",
    ]
    assert all("changed or removed" in line for line in lines)


def test_zip_is_limited_in_size_and_number(
    client: TestClient, index: SqliteBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, photos = find_ids(index), tmp_path / "photos"
    small = (photos / "a.png").stat().st_size
    monkeypatch.setattr(zip_download, "MAX_ZIP_BYTES", small + (photos / "sub/A.png").stat().st_size)
    files = download(client, f"{ids['a.png']},{ids['large.bmp']},{ids['A.png']}")
    assert list(files) == ["a.png", "A (2).png", MISSING_FILE]
    assert (
        files[MISSING_FILE]
        .decode()
        .startswith(f"{photos / 'large.bmp'}: the file is not included because of the limit")
    )
    too_many = client.get("/zip", params={"ids": ",".join(map(str, range(MAX_ZIP_IMAGES + 1)))})
    assert too_many.status_code == 422 and f"the limit is {MAX_ZIP_IMAGES}" in too_many.json()["error"]["message"]
    for query in ("", "?ids=", "?ids=,,"):
        assert client.get(f"/zip{query}").status_code == 422


def test_zip_lists_files_that_cannot_be_opened_because_the_queue_is_full(
    client: TestClient, index: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, service = find_ids(index), client.app.state.service  # type: ignore[attr-defined]
    open_original = service.open_original

    async def open_small(hit_id: str) -> Any:
        if hit_id == ids["large.bmp"]:
            raise QueueFull("the server is busy")
        return await open_original(hit_id)

    monkeypatch.setattr(service, "open_original", open_small)
    files = download(client, f"{ids['a.png']},{ids['large.bmp']}")
    assert list(files) == ["a.png", MISSING_FILE]
    response = client.get("/zip", params={"ids": f"{ids['large.bmp']},{ids['a.png']}"})
    assert response.status_code == 429  # nothing has been sent yet
    assert files[MISSING_FILE].decode().endswith("large.bmp: the server is busy\n")


def test_cancelled_download_closes_its_files_and_releases_its_bytes(
    dual_encoder: DualEncoder, index: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = ByteBudget(1 << 30)
    monkeypatch.setattr(middleware, "ByteBudget", lambda _: budget)
    app, hit_id = create_patient_app(dual_encoder, index), find_ids(index)["large.bmp"]
    service = app.state.service
    open_original, streams, sizes = service.open_original, [], []

    async def record_stream(hit_id: str) -> Any:
        stream, media_type = await open_original(hit_id)
        streams.append(stream)
        return stream, media_type

    monkeypatch.setattr(service, "open_original", record_stream)

    async def run() -> None:
        cancelled, never = asyncio.Event(), asyncio.Event()
        messages = [{"type": "http.request", "body": b"x" * 1000}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await cancelled.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                sizes.append(len(message["body"]))
                assert streams and not streams[0].closed
                cancelled.set()
                await never.wait()  # the client does not read any further

        scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
        scope |= {"method": "GET", "scheme": "http", "path": "/zip", "raw_path": b"/zip", "root_path": ""}
        scope |= {"query_string": f"ids={hit_id}".encode(), "headers": [(b"host", b"localhost")], "client": ("c", 1)}
        async with asyncio.timeout(HANG_TIMEOUT):
            await app({**scope, "server": ("localhost", 80)}, receive, send)
            assert streams[0].closed
            service.close()

    asyncio.run(run())
    assert len(sizes) == 1
    assert budget.total == 0


def test_zip_lists_files_while_the_index_is_down(
    client: TestClient, index: SqliteBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise IndexUnavailableError("db.example.org is down")

    monkeypatch.setattr(inference, "open_original", fail)
    files = download(client, "1")
    name = index.images("1")[0].name
    assert files == {MISSING_FILE: f"{name}: the index is temporarily unavailable\n".encode()}


def test_zip_requires_the_token_and_an_index(dual_encoder: DualEncoder, index: SqliteBackend) -> None:
    with TestClient(create_app(dual_encoder, index, access=Access(token="secret")), base_url=BASE_URL) as client:
        assert client.get("/zip?ids=1").status_code == 401
        assert client.get("/zip?ids=1", headers={"authorization": "Bearer secret"}).status_code == 200
    with TestClient(create_patient_app(dual_encoder), base_url=BASE_URL) as client:
        response = client.get("/zip?ids=1")
        assert response.status_code == 404 and "serve INDEX" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/photos/2024/market.jpg", "market.jpg"),
        ("/photos/no suffix", "no suffix.png"),
        ("/photos/Hello!World.jpg", "Hello!World.jpg"),
        ("/photos/photo[1].jpg", "photo[1].jpg"),
        ("/photos/..\\evil\\x.png", "x.png"),
        ('/photos/a:b*?"<>|.png', "a_b______.png"),
        ("/photos/line\nbreak.png", "line_break.png"),
        ("/photos/gnp.\u202egpj.png", "gnp.gpj.png"),
        ("/photos/...", "image.png"),
        ("/photos/CON.png", "_CON.png"),
        ("/photos/ ünïcode 图.png ", "ünïcode 图.png"),
        ("/photos/" + "图" * 100 + ".png", "图" * ((MAX_NAME_BYTES - 4) // 3) + ".png"),
        ("/photos/a." + "b" * 300, "a." + "b" * (MAX_NAME_BYTES - 6) + ".png"),
    ],
)
def test_file_names_are_valid_on_all_systems(name: str, expected: str) -> None:
    image = IndexedImage(name, FileImage(name), "/photos", "1")
    assert make_valid_file_name(image, "image/png") == expected


@pytest.mark.parametrize(
    ("ref", "expected", "expected_in_zip"),
    [
        (FileImage("/photos/Hello!World.jpg"), "Hello!World.jpg", "Hello!World.jpg"),
        (TarImage("/photos/a.tar", 512, 9, "dir/b.png"), "b.png", "b.png"),
        (TarImage("/photos/a.tar", 512, 9, "b.png"), "b.png", "b.png"),
        (TarImage("/photos/a.tar", 512, 9, "dir/Hello!World.jpg"), "Hello!World.jpg", "Hello!World.jpg"),
        (ParquetImage("/photos/t.parquet", 7, "image"), "t.parquet[7].image", "t.parquet[7].image.png"),
        (FileImage("/photos/café\udcff.png"), "café\\udcff.png", "udcff.png"),
    ],
)
def test_file_names_do_not_contain_folders(ref: ImageRef, expected: str, expected_in_zip: str) -> None:
    for suffix in ("", "@512") if isinstance(ref, TarImage) else ("",):
        image = IndexedImage(to_valid_unicode(ref.canonical_path) + suffix, ref, "/photos", "1")
        assert image.file_name == expected
        assert make_valid_file_name(image, "image/png") == expected_in_zip


def test_equal_file_names_are_numbered() -> None:
    names: set[str] = set()
    assert [make_unique(name, names) for name in ("a.png", "A.PNG", "a.png", "a (2).png", "b")] == [
        "a.png",
        "A (2).PNG",
        "a (3).png",
        "a (2) (2).png",
        "b",
    ]


@pytest.mark.parametrize(("taken", "year"), [(-1e12, 1980), (0.0, 1980), (1.6e9, 2020), (1e11, 2107), (1e300, 1980)])
def test_dates_outside_the_range_of_zip_archives_are_clamped(taken: float, year: int) -> None:
    date = make_date(IndexedImage("/a.png", FileImage("/a.png"), "/", "1", taken=taken))
    assert date[0] == year
    assert zipfile.ZipInfo("a.png", date).date_time == date
