"""Tests of heat maps: the similarity of each cell to a query, the drawing, `POST /heatmap` and `search --heatmaps`."""

import base64
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from torch import nn

from llm2clip.cli import main
from llm2clip.data.images import decode_image, load_image
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.vision.dense import build_dense_encoder
from llm2clip.search.explain import DARKEST, compute_heatmap, draw_heatmap
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryEncoder, SearchQuery
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


def test_drawing_darkens_the_least_similar_cells() -> None:
    image = torch.full((3, 200, 400), 250, dtype=torch.uint8)
    drawn = decode_image(draw_heatmap(image, np.array([[0.3, 0.1], [0.3, 0.2]], np.float32))).float()
    assert drawn.shape == (3, 192, 384)
    corners = [drawn[:, y, x].mean().item() for y, x in ((5, 5), (5, 378), (186, 5), (186, 378))]
    middle = DARKEST + (1 - DARKEST) / 2
    assert corners == pytest.approx([250, 250 * DARKEST, 250, 250 * middle], abs=3)
    uniform = decode_image(draw_heatmap(image[:, :9, :3], np.array([[0.3]], np.float32)))
    assert uniform.shape == (3, 9, 3) and uniform.float().mean() == pytest.approx(250, abs=2)


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
        vector = backend.vector(left_green)
        assert vector is not None
        texts = model.encode_texts(["x", "a dog", RED]).numpy()
        positive = (vector + texts[0]) / np.linalg.norm(vector + texts[0])
        expected = positive - 0.5 * texts[1]
        cosine = float(expected @ texts[2] / np.linalg.norm(expected))
        np.testing.assert_allclose(rows[:, 0], cosine, atol=1e-3)
        assert 'llm2clip_batch_size_count{kind="heatmap"} 4.0' in client.get("/metrics").text


def test_server_returns_where_the_query_is_in_an_uploaded_image(model: DualEncoder, image_folder: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode((image_folder / "0.png").read_bytes()).decode()
    with TestClient(create_patient_app(model), base_url=BASE_URL) as client:  # a server without an index
        dense, query = model.dense, model.encode_texts([RED])[0].numpy()
        assert dense is not None
        for options, size in (({}, dense.localization_size), ({"variant": "plain", "image_size": 24}, 24)):
            rows = client.post("/heatmap", json={"image": uri, "texts": [RED], **options}).json()["rows"]
            expected = compute_heatmap(dense, dense.resize(load_image(image_folder / "0.png"), size), query, "plain")
            np.testing.assert_allclose(rows, expected, atol=1e-5)
        code, message = error(client.post("/heatmap", json={"image": uri, "texts": [RED], "variant": "sclip"}))
        assert code == 422 and "this model does not support the variant sclip: use plain" in message


HIT = {"id": "1", "texts": ["a"]}
UPLOAD = {"image": "data:image/png;base64,AAAA", "texts": ["a"]}
INVALID_REQUESTS = (
    ({"texts": ["a"]}, 422, "a heat map requires either a hit id or an image"),
    (HIT | UPLOAD, 422, "a heat map requires either a hit id or an image"),
    ({"id": "1"}, 422, "the query is empty: provide at least one text or image to search for"),
    (HIT | {"top": 3}, 422, "unknown field 'top'"),
    (UPLOAD, 422, "image"),
    (HIT | {"variant": "slip"}, 422, "variant"),
    (HIT | {"image_size": 0}, 422, "image_size"),
    (HIT | {"image_size": 4000}, 422, "image_size 4000 results in 500 x 600 cells; the limit is 4,096 cells"),
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
    assert code == 422 and "heat maps are not available for this model" in message


@pytest.fixture
def index(tmp_path: Path, photos: Path, model: DualEncoder, monkeypatch: pytest.MonkeyPatch) -> str:
    make_index(tmp_path / "index", photos, model)
    monkeypatch.setattr("llm2clip.search.index.open_dual_encoder", lambda name, **_: model)
    return str(tmp_path / "index")


def test_changed_and_removed_files_have_no_heatmap(
    model: DualEncoder, index: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "0.png").unlink()
    Image.new("RGB", (9, 9)).save(photos / "1.png")
    with TestClient(create_patient_app(model, SqliteBackend(Path(index))), base_url=BASE_URL) as client:
        for name in ("0.png", "1.png"):
            code, message = error(client.post("/heatmap", json={"id": find(client, name), "texts": ["a"]}))
            assert code == 404 and "has been changed or removed since it was indexed" in message
    assert main(["search", index, RED, "--sheet", str(tmp_path / "sheet"), "--heatmaps"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "No heat map for 2 of 6 images. Their files were changed or removed" in output
    assert (tmp_path / "sheet/results.html").read_text().count("data:image/jpeg;base64,") == 6


def test_search_command_writes_heatmaps(
    model: DualEncoder, index: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["search", index, RED, "--images", str(photos / "0.png"), "--top", "1", "--heatmaps"]
    assert main([*arguments, "--sheet", str(tmp_path / "sheet")]) == 0
    assert "No heat map" not in capsys.readouterr().out
    page = (tmp_path / "sheet/results.html").read_text()
    assert "Bright parts of an image are the most similar to the query" in page
    vector = QueryEncoder(model).embed(SearchQuery([RED], [photos / "0.png"])).combined
    [hit] = SqliteBackend(Path(index)).search(vector, 1, Filter())
    image = load_image(hit.images[0].name)
    assert model.dense is not None
    pixels = model.dense.resize(image, model.dense.localization_size)
    expected = draw_heatmap(image, compute_heatmap(model.dense, pixels, vector))
    assert page.split("data:image/jpeg;base64,")[1].split('"')[0] == base64.b64encode(expected).decode()
    assert main(arguments) == 1
    assert "--heatmaps requires an HTML page: add --open or --sheet FOLDER" in capsys.readouterr().err


def test_search_command_needs_dense_features_for_heatmaps(
    model: DualEncoder, index: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without = dataclasses.replace(model, dense=None)
    monkeypatch.setattr("llm2clip.search.index.open_dual_encoder", lambda name, **_: without)
    assert main(["search", index, RED, "--sheet", "sheet", "--heatmaps"]) == 1
    assert "heat maps are not available for this model" in capsys.readouterr().err
