"""Tests of similar hits: edited copies, bursts, capture times, pages, `POST /search` and the command `search`."""

import dataclasses
import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.search.backends import IndexBackend
from llm2clip.search.metadata import Filter
from llm2clip.search.query import (
    BURST_SECONDS,
    COPY_SIMILARITY,
    UNCENTRED_BURST_SIMILARITY,
    UNCENTRED_COPY_SIMILARITY,
    group_similar_hits,
)
from llm2clip.search.relevance import Calibration, RelevanceScale
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import IndexedContent, IndexedImage
from search_fixtures import BACKENDS, create_backend, create_patient_app, make_index

BASE_URL = "http://localhost"
DIM = 16
QUERY = np.eye(DIM, dtype=np.float32)[0]
NOON = 1_717_149_600.0
COPY = (UNCENTRED_COPY_SIMILARITY + 1) / 2
BURST = (UNCENTRED_COPY_SIMILARITY + UNCENTRED_BURST_SIMILARITY) / 2
DISTINCT = UNCENTRED_BURST_SIMILARITY - 0.05


def make_vectors(similarity: float, count: int) -> np.ndarray:
    """Return unit vectors with about the given cosine similarity to each other."""
    common = np.ones(DIM) / np.sqrt(DIM)
    vectors = []
    for number in range(count):
        own = np.eye(DIM)[number + 1]
        direction = own - (own @ common) * common
        vectors.append(np.sqrt(similarity) * common + np.sqrt(1 - similarity) * direction / np.linalg.norm(direction))
    return np.stack(vectors).astype(np.float32)


def add_images(
    backend: IndexBackend, vectors: Sequence[np.ndarray], times: Sequence[float], modified: float = NOON - 1e6
) -> None:
    """Add images 0.png, 1.png, ... with the given vectors and capture times, all with the same modification time."""
    backend.initialize({"model": "m", "fingerprint": "f", "embed_dim": DIM})
    version = f"100 {int(modified * 1e9)}"
    contents, images = [], []
    for number, (vector, taken) in enumerate(zip(vectors, times, strict=True)):
        digest, path = number.to_bytes(32), f"/photos/{number}.png"
        contents.append(IndexedContent(digest, vector.astype(np.float16), b"jpeg", width=1, height=1))
        images.append((IndexedImage(path, FileImage(path), "/photos", version, taken=taken), digest))
    backend.add_images(contents, images)
    backend.finish_indexing()


def group_names(backend: IndexBackend, count: int = 10) -> list[set[str]]:
    """Search the index, and return the file names of each group."""
    page = group_similar_hits(backend.search(QUERY, 100, Filter()), backend, count)
    groups = []
    for hit in page.hits:
        groups.append({Path(hit.images[0].name).name, *(Path(other.name).name for other in hit.similar)})
    return groups


@pytest.mark.parametrize("kind", BACKENDS)
def test_edited_copies_are_grouped_whenever_they_were_taken(kind: str, tmp_path: Path) -> None:
    backend = create_backend(kind, tmp_path)
    add_images(backend, make_vectors(COPY, 3), [NOON, NOON + 1e6, NOON + 2e6])
    assert group_names(backend) == [{"0.png", "1.png", "2.png"}]


def test_bursts_are_grouped_only_within_a_few_seconds(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    add_images(backend, make_vectors(BURST, 3), [NOON, NOON + BURST_SECONDS, NOON + 1e6])
    assert sorted(map(sorted, group_names(backend))) == [["0.png", "1.png"], ["2.png"]]


def test_different_images_of_the_same_second_are_not_grouped(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    add_images(backend, make_vectors(DISTINCT, 3), [NOON, NOON, NOON])
    assert sorted(map(sorted, group_names(backend))) == [["0.png"], ["1.png"], ["2.png"]]


def test_modification_times_do_not_make_a_burst(tmp_path: Path) -> None:
    """Files that were copied together have nearly equal modification times."""
    backend = SqliteBackend(tmp_path, write=True)
    add_images(backend, make_vectors(BURST, 3), [NOON, NOON, NOON], modified=NOON)
    assert len(group_names(backend)) == 3


def test_index_distinguishes_exif_times_from_modification_times(dual_encoder: DualEncoder, tmp_path: Path) -> None:
    """Cameras set the modification time to the capture time, so the two can be equal."""
    photos = tmp_path / "photos"
    photos.mkdir()
    exif = Image.Exif()
    exif[0x0132] = "2024:05:31 12:00:00"
    Image.new("RGB", (40, 40), "red").save(photos / "exif.jpg", exif=exif)
    Image.new("RGB", (40, 40), "blue").save(photos / "plain.jpg")
    Image.new("RGB", (40, 40), "green").save(photos / "other.jpg", exif=exif)
    taken = datetime(2024, 5, 31, 12).timestamp()
    for name in ("exif.jpg", "plain.jpg"):
        os.utime(photos / name, (taken, taken))
    backend = make_index(tmp_path / "index", photos, dual_encoder)
    images = [image for hit in backend.search(None, 9, Filter()) for image in hit.images]
    assert {Path(image.name).name: image.has_exif_time for image in images} == {
        "exif.jpg": True,
        "plain.jpg": False,
        "other.jpg": True,
    }
    assert [image.taken for image in images] == pytest.approx([taken] * 3, abs=1e-3)
    in_data_set = dataclasses.replace(images[0], file_version="0f" * 16)
    assert not in_data_set.has_exif_time


def test_page_ends_before_the_first_hit_that_needs_another_group(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    copies = make_vectors(COPY, 4)
    others = make_vectors(DISTINCT, 6)[4:]
    add_images(backend, [*copies, *others], [NOON + 1e6 * number for number in range(6)])
    hits = backend.search(QUERY, 100, Filter())
    is_copy = {hit.id: int(Path(hit.images[0].name).stem) < 4 for hit in hits}
    groups: list[list[str]] = []
    start = 0
    while start < len(hits):
        page = group_similar_hits(hits[start:], backend, 1)
        members = [page.hits[0].id, *(other.id for other in page.hits[0].similar)]
        assert members == [hit.id for hit in hits[start : start + page.size]]  # no hit is lost or repeated
        groups.append(members)
        start += page.size
    for group in groups:
        assert len({is_copy[hit_id] for hit_id in group}) == 1
    assert len(groups) < len(hits)


def test_only_the_first_hits_of_a_long_page_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.search.query.MAX_COMPARED", 3)
    backend = SqliteBackend(tmp_path, write=True)
    add_images(backend, make_vectors(COPY, 5), [NOON] * 5)
    assert [len(group) for group in group_names(backend)] == [3, 1, 1]


def test_mean_embedding_is_subtracted_if_the_index_is_calibrated(tmp_path: Path) -> None:
    """In some models, all embeddings are similar."""
    backend = SqliteBackend(tmp_path, write=True)
    vectors = make_vectors(COPY, 3)
    near = vectors[0] + 0.05 * (vectors[1] - vectors[0])
    vectors = np.stack([*vectors, near / np.linalg.norm(near)])
    add_images(backend, vectors, [NOON + 1e6 * number for number in range(4)])
    centred = vectors - make_vectors(COPY, 15).mean(axis=0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    assert centred[0] @ centred[3] > COPY_SIMILARITY > centred[0] @ centred[1]
    scale = RelevanceScale(0, 1, 1, 0)
    calibration = Calibration(make_vectors(COPY, 15).mean(axis=0), QUERY[None], [], 4, 0, "f", scale, scale, scale)
    hits = backend.search(QUERY, 100, Filter())
    assert [len(hit.similar) for hit in group_similar_hits(hits, backend, 10).hits] == [3]
    grouped = group_similar_hits(hits, backend, 10, calibration.sample_mean).hits
    assert sorted(len(hit.similar) for hit in grouped) == [0, 0, 1]


def test_removed_hits_are_similar_to_no_other_hit(tmp_path: Path) -> None:
    backend = SqliteBackend(tmp_path, write=True)
    add_images(backend, make_vectors(COPY, 3), [NOON] * 3)
    hits = backend.search(QUERY, 100, Filter())
    backend.remove_images([hits[0].images[0].name])
    assert [len(hit.similar) for hit in group_similar_hits(hits, backend, 10).hits] == [0, 1]
    backend.remove_images([hit.images[0].name for hit in hits[1:]])
    assert len(group_similar_hits(hits, backend, 10).hits) == 3
    assert group_similar_hits([], backend, 10).hits == []


# ---- search and serve -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(dual_encoder: DualEncoder) -> DualEncoder:
    """A model that embeds an image by the colours of its corners, so that different images are not similar."""

    def encode_images(images: list[Tensor]) -> Tensor:
        pixels = torch.stack(images).float()
        corners = [pixels[:, :, y, x] for y in (2, -3) for x in (2, -3)]
        embeddings = torch.zeros(len(images), 16)
        embeddings[:, :12] = torch.cat(corners, dim=1)
        return embeddings

    return dataclasses.replace(dual_encoder, encode_images_raw=encode_images, part_identities=lambda: None)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five different images. The first two have two edited copies each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (2, 2, 3), np.uint8)
        image = Image.fromarray(pixels).resize((48, 48), Image.Resampling.NEAREST)
        image.save(folder / f"{number}.png")
        if number < 2:
            image.save(folder / f"{number}-copy.jpg", quality=60)
            image.resize((40, 40), Image.Resampling.NEAREST).save(folder / f"{number}-small.png")
    return folder


def read_number(name: str) -> str:
    return Path(name).name[0]


def test_server_returns_similar_hits_as_one_hit(model: DualEncoder, photos: Path, tmp_path: Path) -> None:
    app = create_patient_app(model, make_index(tmp_path / "index", photos, model))
    with TestClient(app, base_url=BASE_URL) as client:

        def search(**request: Any) -> dict[str, Any]:
            response = client.post("/search", json=request)
            assert response.status_code == 200, response.text
            return response.json()

        grouped = search(texts=["red"], words=False)
        assert len(grouped["hits"]) == 5 and grouped["total"] == 9 and grouped["next_offset"] is None
        for hit in grouped["hits"]:
            number = read_number(hit["images"][0]["name"])
            assert [read_number(other["name"]) for other in hit["similar"]] == [number] * (2 if number in "01" else 0)

        single = search(texts=["red"], words=False, group_similar=False)
        assert [hit["similar"] for hit in single["hits"]] == [[]] * 9 and single["next_offset"] is None

        seen, offset = [], 0
        while offset is not None:
            page = search(texts=["red"], words=False, top=2, offset=offset)
            for hit in page["hits"]:
                seen += [hit["id"], *(other["id"] for other in hit["similar"])]
            offset = page["next_offset"]
        assert sorted(seen) == sorted(hit["id"] for hit in single["hits"])

        pages = [search(texts=["red"], group_similar=False, top=4, offset=offset) for offset in (0, 4, 8)]
        assert [page["next_offset"] for page in pages] == [4, 8, None]
        newest = search(filter={"min_side": 1}, top=9)
        assert len(newest["hits"]) == 9 and newest["next_offset"] is None


def test_search_prints_the_number_of_similar_images(
    model: DualEncoder,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    index = str(tmp_path / "index")
    make_index(Path(index), photos, model)
    monkeypatch.setattr("llm2clip.models.dual_encoder.open_dual_encoder", lambda name, **_: model)

    def search(*flags: str) -> str:
        assert main(["search", index, "red", "--no_words", *flags]) == 0
        return capsys.readouterr().out

    assert search().count("+2 similar") == 2
    assert "similar" not in search("--no_group")
    assert len(search("--paths").splitlines()) == 5 and len(search("--paths", "--no_group").splitlines()) == 9
    results = [json.loads(line) for line in search("--json").splitlines()]
    assert sorted(len(result["similar"]) for result in results) == [0, 0, 0, 2, 2]
