"""Tests of heat maps: the similarity of each cell to a query, and `POST /heatmap`."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import nn

from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import build_dense_encoder
from llm2clip.search.explain import compute_heatmap
from llm2clip.search.sqlite_backend import SqliteBackend
from search_fixtures import add_red_detector, create_patient_app, make_index
from test_dense import BUILDERS

BASE_URL = "http://localhost"
RED = "a red one"


@pytest.fixture(scope="module")
def model(dual_encoder: DualEncoder) -> DualEncoder:
    return add_red_detector(dual_encoder, RED)


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, model: DualEncoder) -> SqliteBackend:
    return make_index(tmp_path_factory.mktemp("index"), image_folder, model)


def find(client: TestClient, name: str) -> str:
    """Return the id of the hit with a file name."""
    hits = client.post("/search", json={"texts": ["x"]}).json()["hits"]
    return next(hit["id"] for hit in hits if Path(hit["images"][0]["name"]).name == name)


def error(response: Any) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("family", "variant"),
    [("vit", "naclip"), ("eva02", "naclip"), ("clip", "naclip"), ("siglip", "plain"), ("vit_siglip", "plain")],
)
def test_heatmap_is_the_cosine_of_each_cell_in_the_variant_of_the_tower(family: str, variant: str) -> None:
    torch.manual_seed(0)
    tower = BUILDERS[family]()
    dense = build_dense_encoder(tower, nn.Linear(tower.feature_dim, 16))
    assert dense.localization_variant == variant
    query = torch.nn.functional.normalize(torch.randn(16), dim=0)
    image = torch.randint(256, (3, 60, 90), dtype=torch.uint8)
    heatmap = compute_heatmap(dense, dense.resize(image), query.numpy())
    cells = dense.encode(dense.resize(image)[None], variant)[0]
    assert heatmap.shape == (4, 6) and heatmap.dtype == np.float32
    for row in range(4):
        for column in range(6):
            assert heatmap[row, column] == pytest.approx(float(torch.dot(cells[row, column], query)), abs=1e-6)


def test_server_returns_where_the_query_is(model: DualEncoder, backend: SqliteBackend) -> None:
    with TestClient(create_patient_app(model, backend), base_url=BASE_URL) as client:
        left_red, right_red, left_green = (find(client, f"{n}.png") for n in (0, 1, 6))
        rows = np.array(client.post("/heatmap", json={"id": left_red, "texts": [RED]}).json()["rows"])
        assert rows.shape == (8, 10)  # 48 x 40 pixels, resized to 80 x 64, and cells of 8 x 8 pixels
        np.testing.assert_allclose(rows[:, :4], 1, atol=1e-5)
        np.testing.assert_allclose(rows[:, 6:], -1, atol=1e-5)
        opposite = np.array(client.post("/heatmap", json={"id": right_red, "texts": [RED]}).json()["rows"])
        np.testing.assert_allclose(opposite, rows[:, ::-1], atol=1e-5)
        assert np.max(client.post("/heatmap", json={"id": left_green, "texts": [RED]}).json()["rows"]) < -0.99

        query = {"texts": ["x"], "like": [left_green], "negative_texts": ["a dog"]}
        rows = np.array(client.post("/heatmap", json={"id": left_red, **query}).json()["rows"])
        vector = backend.read_vector(left_green)
        assert vector is not None
        texts = model.encode_texts(["x", "a dog", RED]).numpy()
        positive = (vector + texts[0]) / np.linalg.norm(vector + texts[0])
        expected = positive - 0.5 * texts[1]
        cosine = float(expected @ texts[2] / np.linalg.norm(expected))
        np.testing.assert_allclose(rows[:, 0], cosine, atol=1e-3)
        assert 'llm2clip_batch_size_count{kind="heatmap"} 4.0' in client.get("/metrics").text


HIT = {"id": "1", "texts": ["a"]}
INVALID_REQUESTS = (
    ({"texts": ["a"]}, 422, "Field required"),
    ({"id": "1"}, 422, "the query is empty: provide at least one text or image to search for"),
    (HIT | {"top": 3}, 422, "unknown field 'top'"),
    (HIT | {"id": "../x"}, 404, "the index contains no image with id ../x"),
)


def test_server_rejects_invalid_heatmap_requests(
    model: DualEncoder, dual_encoder: DualEncoder, backend: SqliteBackend
) -> None:
    def post(app: Any, request: dict[str, Any]) -> tuple[int, str]:
        with TestClient(app, base_url=BASE_URL) as client:
            return error(client.post("/heatmap", json=request))

    for request, expected_code, expected_message in INVALID_REQUESTS:
        code, message = post(create_patient_app(model, backend), request)
        assert code == expected_code and expected_message in message
    code, message = post(create_patient_app(model, backend, max_pixels=1000), HIT)
    assert code == 413 and "48 x 40; the limit is 1,000" in message
    too_large = 413, "the image file is too large; the limit is 500 bytes"
    assert post(create_patient_app(model, backend, max_body_bytes=500), HIT) == too_large
    assert post(create_patient_app(model), HIT)[0] == 404
    code, message = post(create_patient_app(dataclasses.replace(dual_encoder, dense=None), backend), HIT)
    assert code == 422 and "this model does not support heat maps" in message


def test_changed_and_removed_files_have_no_heatmap(model: DualEncoder, photos: Path, tmp_path: Path) -> None:
    backend = make_index(tmp_path / "index", photos, model)
    (photos / "0.png").unlink()
    Image.new("RGB", (9, 9)).save(photos / "1.png")
    with TestClient(create_patient_app(model, backend), base_url=BASE_URL) as client:
        for name in ("0.png", "1.png"):
            code, message = error(client.post("/heatmap", json={"id": find(client, name), "texts": ["a"]}))
            assert code == 404 and "has been changed or removed since it was indexed" in message
