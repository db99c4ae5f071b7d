"""Tests of explanations: the words of a query, their effects, `POST /explain` and `search --explain`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from llm2clip.cli import main
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import QueryTemplates
from llm2clip.search.explain import MAX_WORDS, explain_hit, find_query_words, remove_query_word
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.sqlite_backend import SqliteBackend
from search_fixtures import create_patient_app, make_index

BASE_URL = "http://localhost"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, image_folder: Path, dual_encoder: DualEncoder) -> SqliteBackend:
    return make_index(tmp_path_factory.mktemp("index"), image_folder, dual_encoder)


@pytest.fixture(scope="module")
def client(dual_encoder: DualEncoder, backend: SqliteBackend) -> Iterator[TestClient]:
    with TestClient(create_patient_app(dual_encoder, backend), base_url=BASE_URL) as client:
        yield client


def compute_score(model: DualEncoder, vector: np.ndarray, *texts: str) -> float:
    """Return the cosine similarity between an image and the mean of the embeddings of texts."""
    mean = model.encode_texts(texts).numpy().mean(axis=0)
    return float(mean @ vector / np.linalg.norm(mean))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog, running!", ["A", "dog", "running"]),
        ("the dog's t-shirt (red)", ["the", "dog's", "t-shirt", "red"]),
        ("कुत्ता दौड़ रहा है", ["कुत्ता", "दौड़", "रहा", "है"]),
        ("一只狗。在iPhone", ["一", "只", "狗", "在", "iPhone"]),
        ("赤いカメラです", ["赤", "い", "カメラ", "です"]),
        ("หมา วิ่ง", ["หมา", "วิ่ง"]),
        ("a 🍕 𝒳 b", ["a", "🍕", "𝒳", "b"]),
        ("?! ...", []),
    ],
)
def test_find_query_words_splits_texts_in_many_scripts(text: str, words: list[str]) -> None:
    found = find_query_words(["x", text])[1:]
    assert [word.text for word in found] == words
    assert all(text[word.start : word.end] == word.text and word.text_index == 1 for word in found)


def test_find_query_words_returns_a_limited_number_of_words() -> None:
    assert [word.text_index for word in find_query_words(["a b"] * MAX_WORDS)] == [n // 2 for n in range(MAX_WORDS)]


def test_remove_query_word_also_removes_a_space() -> None:
    text = "a red dog, asleep"
    without = [remove_query_word(text, word) for word in find_query_words([text])]
    assert without == ["red dog, asleep", "a dog, asleep", "a red , asleep", "a red dog,"]


def test_effects_are_differences_of_scores(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    vector = backend.read_vector("3")
    assert vector is not None
    query = SearchQuery(["a red dog", "snow"])
    explanation = explain_hit(QueryEncoder(dual_encoder), query, vector)
    score = compute_score(dual_encoder, vector, "a red dog", "snow")
    expected = [
        score - compute_score(dual_encoder, vector, "red dog", "snow"),
        score - compute_score(dual_encoder, vector, "a dog", "snow"),
        score - compute_score(dual_encoder, vector, "a red", "snow"),
        score - compute_score(dual_encoder, vector, "a red dog"),
    ]
    assert explanation.score == pytest.approx(score, abs=1e-5)
    assert [word.effect for word in explanation.words] == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, expected)) > 1e-3

    single = explain_hit(QueryEncoder(dual_encoder), SearchQuery(["snow"]), vector)
    assert [word.effect for word in single.words] == [single.score]  # nothing remains without the only word


def test_templates_are_used_without_a_word_only_if_the_complete_text_has_them(
    dual_encoder: DualEncoder, backend: SqliteBackend
) -> None:
    vector = backend.read_vector("3")
    assert vector is not None
    templates = QueryTemplates(("a photo of a {}",), max_words=2)
    short = explain_hit(QueryEncoder(dual_encoder), SearchQuery(["red dog"], templates=templates), vector)
    score = compute_score(dual_encoder, vector, "red dog", "a photo of a red dog")
    assert short.score == pytest.approx(score, abs=1e-5)
    without_red = compute_score(dual_encoder, vector, "dog", "a photo of a dog")
    assert short.words[0].effect == pytest.approx(score - without_red, abs=1e-5)
    long = explain_hit(QueryEncoder(dual_encoder), SearchQuery(["a red dog"], templates=templates), vector)
    without_a = compute_score(dual_encoder, vector, "red dog")
    assert long.words[0].effect == pytest.approx(long.score - without_a, abs=1e-5)


def test_server_explains_a_hit(client: TestClient, dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    query = {"texts": ["a red dog"], "negative_texts": ["blue"], "like": ["5"]}
    hit = client.post("/search", json={**query, "words": False, "top": 1}).json()["hits"][0]
    response = client.post("/explain", json={**query, "id": hit["id"]})
    assert response.status_code == 200, response.text
    explanation = response.json()
    assert explanation["score"] == pytest.approx(hit["score"], abs=2e-3)  # scores of searches are rounded
    assert [(word["text"], word["start"], word["end"]) for word in explanation["words"]] == [
        ("a", 0, 1),
        ("red", 2, 5),
        ("dog", 6, 9),
    ]
    vector, like = backend.read_vector(hit["id"]), backend.read_vector("5")
    assert vector is not None and like is not None
    for text, word in zip(("red dog", "a dog", "a red"), explanation["words"], strict=True):
        texts = dual_encoder.encode_texts([text, "blue"]).numpy()
        without = SearchQuery([text], negative_texts=["blue"], like=["5"]).combine(list(texts), [], [like])
        assert word["effect"] == pytest.approx(explanation["score"] - without.combined @ vector, abs=1e-5)
        assert word["text_index"] == 0


@pytest.mark.parametrize(
    ("request_fields", "code", "message"),
    [
        ({"id": "1"}, 400, "the query has no texts"),
        ({"id": "1", "like": ["2"]}, 400, "the query has no texts"),
        ({"id": "999", "texts": ["a"]}, 404, "the index contains no image with id 999"),
        ({"texts": ["a"]}, 422, "id"),
        ({"id": "1", "texts": ["a"], "top": 3}, 422, "unknown field 'top'"),
    ],
)
def test_invalid_requests_are_explained(
    client: TestClient, request_fields: dict[str, Any], code: int, message: str
) -> None:
    response = client.post("/explain", json=request_fields)
    assert response.status_code == code and message in response.json()["error"]["message"]


def test_long_texts_are_encoded_in_parts(dual_encoder: DualEncoder, backend: SqliteBackend) -> None:
    """A request for an explanation encodes more texts than the queue holds, but only a few at a time."""
    text = " ".join(f"w{number}" for number in range(MAX_WORDS + 5))
    app = create_patient_app(dual_encoder, backend, max_queue=8, batch_size=4)
    with TestClient(app, base_url=BASE_URL) as client:
        response = client.post("/explain", json={"id": "1", "texts": [text]})
    assert response.status_code == 200, response.text
    assert len(response.json()["words"]) == MAX_WORDS


def test_search_prints_the_effect_of_each_word(
    backend: SqliteBackend,
    dual_encoder: DualEncoder,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("llm2clip.models.dual_encoder.open_dual_encoder", lambda name, **_: dual_encoder)
    index = str(backend.folder)
    assert main(["search", index, "a red dog", "--explain", "--top", "2"]) == 0
    output = capsys.readouterr().out
    assert "effect" in output
    table = output[output.index("effect") :].partition("└")[0]
    assert all(word in table for word in ("a", "red", "dog")) and table.count(".") == 3
    for arguments, message in (
        (["--images", str(backend.folder / "index.sqlite"), "--explain"], "--explain requires a query text"),
        (["red", "--explain", "--json"], "cannot be combined with --json"),
    ):
        assert main(["search", index, *arguments]) == 1
        assert message in capsys.readouterr().err
