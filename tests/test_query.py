"""Queries: their embeddings, and re-ranking: the order of hits, pages, the cache, missing files, and `--rerank`."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.search.inference import Limits
from llm2clip.search.query import NEGATIVE_WEIGHT, QueryEncoder, Reranker, SearchQuery, combine_embeddings
from llm2clip.search.server import create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import DeadlineExceeded, Hit, IndexedImage
from search_fixtures import HANG_TIMEOUT, make_colour_model, make_index

BASE_URL = "http://localhost"
RED = {"texts": ["red"], "words": False, "group_similar": False}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of one colour, from black to red."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (20, 20), (20 * number, 30, 40)).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def encoded() -> list[int]:
    """Sizes of the batches of images that the re-ranking model has encoded."""
    return []


@pytest.fixture
def rerank_model(dual_encoder: DualEncoder, encoded: list[int]) -> DualEncoder:
    return make_colour_model(dual_encoder, "colours", encoded)


@pytest.fixture
def backend(photos: Path, tmp_path: Path, dual_encoder: DualEncoder) -> SqliteBackend:
    return make_index(tmp_path / "index", photos, dual_encoder)


@pytest.fixture(autouse=True)
def few_reranked_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("index", "query"):
        monkeypatch.setattr(f"llm2clip.search.{module}.RERANKED", 8)
    monkeypatch.setattr("llm2clip.search.query.IMAGES_PER_BATCH", 3)


def make_client(
    model: DualEncoder, backend: SqliteBackend, rerank_model: DualEncoder | None, **limits: Any
) -> TestClient:
    app = create_app(model, backend, Limits(**{"timeout": HANG_TIMEOUT, **limits}), rerank_model=rerank_model)
    return TestClient(app, base_url=BASE_URL)


def test_page_knows_whether_results_can_be_re_ranked(
    dual_encoder: DualEncoder, backend: SqliteBackend, rerank_model: DualEncoder
) -> None:
    for model in (None, rerank_model):
        page = make_client(dual_encoder, backend, model).get("/").text
        assert ('data-rerank-count="50"' in page) == (model is not None)


def search(client: TestClient, **request: Any) -> dict[str, Any]:
    response = client.post("/search", json=request)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def get_numbers(result: dict[str, Any]) -> list[int]:
    return [int(Path(hit["images"][0]["name"]).stem) for hit in result["hits"]]


def test_first_hits_are_sorted_by_the_similarity_of_the_rerank_model(
    dual_encoder: DualEncoder, backend: SqliteBackend, rerank_model: DualEncoder, encoded: list[int]
) -> None:
    with make_client(dual_encoder, backend, rerank_model) as client:
        plain, reranked = search(client, **RED), search(client, **RED, rerank=True)
        numbers = get_numbers(plain)
        assert get_numbers(reranked) == [*sorted(numbers[:8], reverse=True), *numbers[8:]] != numbers
        assert plain["rerank_seconds"] is None and plain["rerank_missing"] is None
        assert reranked["rerank_seconds"] > 0 and reranked["rerank_missing"] == 0
        assert encoded == [3, 3, 2]
        scores = {hit["id"]: hit["score"] for hit in plain["hits"]}
        assert {hit["id"]: hit["score"] for hit in reranked["hits"]} == scores

        again = search(client, **RED, rerank=True)
        assert again["hits"] == reranked["hits"] and encoded == [3, 3, 2]  # the embeddings are cached

        unlike = search(client, negative_texts=["red"], group_similar=False, rerank=True)
        assert get_numbers(unlike)[:8] == sorted(get_numbers(unlike)[:8])
        assert search(client, filter={"min_side": 1}, rerank=True)["rerank_seconds"] is None


def test_network_timeouts_are_missing_files_but_deadlines_are_errors(rerank_model: DualEncoder) -> None:
    errors: dict[str, Exception] = {"1": TimeoutError(110, "Connection timed out"), "2": DeadlineExceeded("late")}

    def read(hit_id: str) -> bytes:
        raise errors[hit_id]

    reranker = Reranker(QueryEncoder(rerank_model), read)
    hits = [Hit(hit_id, 0.5, (), 1) for hit_id in errors]
    assert reranker.sort(SearchQuery(["red"]), hits[:1]).missing == 1
    with pytest.raises(DeadlineExceeded):
        reranker.sort(SearchQuery(["red"]), hits)


def test_missing_and_oversized_files_follow_the_reranked_hits(
    dual_encoder: DualEncoder, photos: Path, backend: SqliteBackend, rerank_model: DualEncoder
) -> None:
    with make_client(dual_encoder, backend, rerank_model) as client:
        numbers = get_numbers(search(client, **RED))
        missing = [numbers[1], numbers[5]]
        for number in missing:
            (photos / f"{number}.png").unlink()
        result = search(client, **RED, rerank=True)
        rated = sorted(set(numbers[:8]) - set(missing), reverse=True)
        assert get_numbers(result) == [*rated, *missing, *numbers[8:]]
        assert result["rerank_missing"] == 2
    with make_client(dual_encoder, backend, rerank_model, max_pixels=100) as client:
        result = search(client, **RED, rerank=True)
        assert get_numbers(result) == numbers and result["rerank_missing"] == 8


def test_hits_and_images_in_a_query_are_embedded_by_the_rerank_model(
    dual_encoder: DualEncoder, photos: Path, backend: SqliteBackend, rerank_model: DualEncoder
) -> None:
    with make_client(dual_encoder, backend, rerank_model) as client:
        hits = search(client, **RED)["hits"]
        example = next(hit for hit in hits if hit["images"][0]["name"].endswith("/0.png"))
        result = search(client, like=[example["id"]], group_similar=False, rerank=True)
        numbers = get_numbers(result)
        assert numbers[:8] == sorted(numbers[:8]) and numbers[0] == 0
        (photos / "0.png").unlink()
        response = client.post("/search", json={"like": [example["id"]], "rerank": True})
        assert response.status_code == 404
        assert f"needs the image file of hit {example['id']}" in response.json()["error"]["message"]


def test_server_without_a_rerank_model_rejects_requests_for_it(
    dual_encoder: DualEncoder, backend: SqliteBackend
) -> None:
    with make_client(dual_encoder, backend, None) as client:
        response = client.post("/search", json={**RED, "rerank": True})
    assert response.status_code == 400
    assert "llm2clip serve --rerank MODEL" in response.json()["error"]["message"]


def test_cache_removes_the_least_recently_used_embedding(
    rerank_model: DualEncoder, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.search.query.MAX_CACHED", 2)
    decoded: list[bytes] = []

    def decode(data: bytes) -> Tensor:
        decoded.append(data)
        return torch.zeros(3, 1, 1)

    reranker = Reranker(QueryEncoder(rerank_model, decode), str.encode)
    image = IndexedImage("a", FileImage("a"), "", "")
    for name in ("a", "b", "a", "c", "a", "b"):
        reranker.sort(SearchQuery(["red"]), [Hit(name, 1.0, (image,), 1, width=1, height=1)])
    assert decoded == [b"a", b"b", b"c", b"b"] and encoded == [1] * 4


def test_commands_rerank_results(
    dual_encoder: DualEncoder,
    photos: Path,
    backend: SqliteBackend,
    rerank_model: DualEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    models = {str(tmp_path): rerank_model}
    monkeypatch.setattr("llm2clip.search.index.open_dual_encoder", lambda name, **_: models.get(name, dual_encoder))
    monkeypatch.setattr("llm2clip.cli.search.resolve_model", lambda name: name)
    folder = str(backend.folder)

    def list_numbers(*flags: str) -> list[int]:
        assert main(["search", folder, "red", "--no_words", "--no_group", "--paths", "--top", "12", *flags]) == 0
        return [int(Path(path).stem) for path in capsys.readouterr().out.splitlines()]

    plain = list_numbers()
    assert list_numbers("--rerank", str(tmp_path)) == [*sorted(plain[:8], reverse=True), *plain[8:]] != plain
    best = max(plain[:8])
    assert list_numbers("--rerank", str(tmp_path), "--top", "1") == [best]
    shutil.move(photos / f"{best}.png", tmp_path / "moved.png")
    assert main(["search", folder, "red", "--no_words", "--no_group", "--rerank", str(tmp_path)]) == 0
    assert "could not be re-ranked" in capsys.readouterr().err
    for command, message in (
        (["search", folder, "--min_side", "1", "--rerank", str(tmp_path)], "--rerank requires a text or an image"),
        (["serve", "--model", "m", "--rerank", str(tmp_path)], "--rerank requires an index"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err


# ---- embeddings of queries -------------------------------------------------------------------------------------------


def test_embed_query_averages_positives_and_subtracts_negatives(dual_encoder: DualEncoder) -> None:
    black = torch.zeros(3, 9, 9).byte()
    red, dog = dual_encoder.encode_texts(["red", "dog"])
    image = F.normalize(dual_encoder.encode_images([dual_encoder.transform(black)]), dim=1)[0]
    assert combine_embeddings([red.numpy()]) == pytest.approx(red.numpy(), abs=1e-6)
    text_and_image = QueryEncoder(dual_encoder).embed(SearchQuery(["red"], [black])).combined
    assert text_and_image == pytest.approx(F.normalize(red + image, dim=0).numpy(), abs=1e-6)
    with_negative = QueryEncoder(dual_encoder).embed(SearchQuery(["red"], negative_texts=["dog"])).combined
    expected = F.normalize(red - NEGATIVE_WEIGHT * dog, dim=0).numpy()
    assert with_negative == pytest.approx(expected, abs=1e-6)


def test_embed_query_averages_short_texts_with_templates(dual_encoder: DualEncoder) -> None:
    """Only texts of up to three words are averaged, and the text itself counts like a template."""
    templates, long = QueryTemplates(("a photo of a {}", "{} on grey")), "a red one on grey"
    prompts = dual_encoder.encode_texts(["red", "a photo of a red", "red on grey"]).double()
    short = F.normalize(prompts.mean(0), dim=0)
    query = QueryEncoder(dual_encoder).embed(SearchQuery(["red"], templates=templates)).combined
    assert query == pytest.approx(short.numpy(), abs=1e-6)
    assert query != pytest.approx(QueryEncoder(dual_encoder).embed(SearchQuery(["red"])).combined, abs=1e-3)
    unchanged = QueryEncoder(dual_encoder).embed(SearchQuery([long], templates=templates)).combined
    assert unchanged == pytest.approx(dual_encoder.encode_texts([long])[0].numpy(), abs=1e-6)
    negative = (
        QueryEncoder(dual_encoder).embed(SearchQuery([long], negative_texts=["red"], templates=templates)).combined
    )
    expected = F.normalize(dual_encoder.encode_texts([long])[0] - NEGATIVE_WEIGHT * short, dim=0)
    assert negative == pytest.approx(expected.numpy(), abs=1e-6)
    with_default = dataclasses.replace(dual_encoder, query_templates=templates)
    assert QueryEncoder(with_default).embed(SearchQuery(["red"])).combined == pytest.approx(short.numpy(), abs=1e-6)
    literal = QueryEncoder(with_default).embed(SearchQuery(["red"], templates=NO_TEMPLATES)).combined
    assert literal == pytest.approx(dual_encoder.encode_texts(["red"])[0].numpy(), abs=1e-6)


def test_embed_query_of_only_negatives_is_their_opposite(dual_encoder: DualEncoder) -> None:
    dog = dual_encoder.encode_texts(["dog"])[0]
    assert QueryEncoder(dual_encoder).embed(SearchQuery(negative_texts=["dog"])).combined == pytest.approx(
        -dog.numpy(), abs=1e-6
    )
    with pytest.raises(ValueError, match="the query is empty"):
        QueryEncoder(dual_encoder).embed(SearchQuery())
