"""Tests of the example queries and newest images for the first screen of the search page."""

import os
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.backends import Backend
from llm2clip.search.server import MAX_NEWEST, MAX_QUERIES, Access, ExampleCache, choose_queries, create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from search_fixtures import BACKENDS, create_backend, create_patient_app, index_sources, make_index

BASE_URL = "http://localhost"


@pytest.mark.parametrize("kind", BACKENDS)
def test_newest_ids_are_distinct_and_sorted_by_time(
    kind: str, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, root = create_backend(kind, tmp_path / "index"), tmp_path / "photos"
    root.mkdir()
    for n in range(5):
        shutil.copy(image_folder / f"{n}.png", root / f"{n}.png")
        os.utime(root / f"{n}.png", (100 * n, 100 * n))
    for n in range(3):  # the newest files have the content of the second oldest image
        shutil.copy(image_folder / "1.png", root / f"copy{n}.png")
        os.utime(root / f"copy{n}.png", (900, 900))
    index_sources([root], dual_encoder, backend)

    def newest(count: int) -> list[str]:
        images = [backend.images(hit_id) for hit_id in backend.newest_ids(count)]
        return [min(Path(image.name).name for image in locations) for locations in images]

    assert newest(9) == ["1.png", "4.png", "3.png", "2.png", "0.png"]
    assert newest(3) == ["1.png", "4.png", "3.png"]


@pytest.mark.parametrize("kind", BACKENDS)
def test_example_queries_are_short_captions(
    kind: str, image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    backend, root = create_backend(kind, tmp_path / "index"), tmp_path / "photos"
    root.mkdir()
    short = [f"short  caption {n}" for n in range(8)]
    captions = [*short, *(f"a much longer caption of image number {n}" for n in range(8)), "x", "y" * 1000, "", ""]
    for n, caption in enumerate(captions):
        shutil.copy(image_folder / f"{n}.png", root / f"{n}.png")
        if caption:
            (root / f"{n}.txt").write_text(f"{caption}\n")
    index_sources([root], dual_encoder, backend)
    queries = choose_queries(backend)
    assert len(set(queries)) == MAX_QUERIES
    assert set(queries) <= {" ".join(caption.split()) for caption in short}


def test_examples_are_computed_once_per_interval(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend: Backend = make_index(tmp_path / "index", image_folder, dual_encoder)
    cache = ExampleCache()
    first = cache.get(backend)
    assert len(first.queries) == MAX_QUERIES and len(first.newest) == MAX_NEWEST
    assert cache.get(backend) is first
    monkeypatch.setattr("llm2clip.search.server.MAX_AGE", -1.0)
    assert cache.get(backend) is not first


def test_examples_require_the_token_and_an_index(dual_encoder: DualEncoder, photos: Path, tmp_path: Path) -> None:
    index = make_index(tmp_path / "index", photos, dual_encoder)
    with TestClient(create_app(dual_encoder, index, access=Access(token="secret")), base_url=BASE_URL) as client:
        assert client.get("/examples").status_code == 401
        response = client.get("/examples", headers={"authorization": "Bearer secret"})
        assert response.json()["queries"] == ["Ein roter Ärmel"]
        names = [image["file_name"] for image in response.json()["newest"]]
        assert len(names) == 6 and names[-1] == "old.jpg"  # taken in 2001
    with TestClient(create_patient_app(dual_encoder), base_url=BASE_URL) as client:
        assert client.get("/examples").status_code == 404


def test_index_without_captions_has_no_example_queries(
    image_folder: Path, dual_encoder: DualEncoder, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    shutil.copy(image_folder / "1.png", tmp_path / "photos")
    backend = SqliteBackend(tmp_path / "index", write=True)
    index_sources([tmp_path / "photos"], dual_encoder, backend)
    assert choose_queries(backend) == []
