"""Searches return the same hits from Python (`Index`), from the command `search` and over HTTP (`POST /search`)."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from llm2clip import Index
from llm2clip.cli import main
from llm2clip.models.dual_encoder import DualEncoder
from llm2clip.models.prompts import QueryTemplates
from llm2clip.search.backends import Filter
from llm2clip.search.index import SearchOptions
from llm2clip.search.query import SearchQuery
from llm2clip.search.relevance import update_calibration
from llm2clip.search.server import create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import NotFound, UnsupportedQuery
from search_fixtures import add_red_detector, make_colour_model, make_index

# Each query: its fields as in `SearchQuery`, the other fields of a request, and the flags of the command.
QUERIES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "text": ({"texts": ["the middle is red"]}, {}, []),
    "several texts": ({"texts": ["red", "a dog"]}, {"words": False}, ["--no_words"]),
    "image": ({"images": ["9.png"]}, {}, ["--images", "9.png"]),
    "negative parts": (
        {"texts": ["red"], "negative_texts": ["a dog"], "negative_images": ["3.png"]},
        {},
        ["--negative", "a dog", "--negative_images", "3.png"],
    ),
    "only negative": ({"negative_texts": ["red"]}, {}, ["--negative", "red"]),
    "templates": ({"texts": ["red"], "templates": ["a photo of a {}"]}, {}, ["--templates", "a photo of a {}"]),
    "filter": ({"texts": ["red"]}, {"filter": {"caption": "left half"}}, ["--caption", "left half"]),
    "no query": ({}, {"filter": {"path": "*.png"}}, ["--path", "*.png"]),
    "weak hits": ({"texts": ["x"]}, {"show_weak": True, "group_similar": False}, ["--show_weak", "--no_group"]),
    "re-ranking": ({"texts": ["red"]}, {"rerank": True}, ["--rerank", "colours"]),
}


@pytest.fixture(scope="module")
def model(dual_encoder: DualEncoder) -> DualEncoder:
    return add_red_detector(dual_encoder, "red")


@pytest.fixture(scope="module")
def rerank_model(dual_encoder: DualEncoder) -> DualEncoder:
    return make_colour_model(dual_encoder, "colours", [])


@pytest.fixture(scope="module")
def backend(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, model: DualEncoder
) -> Iterator[SqliteBackend]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llm2clip.search.relevance.MIN_IMAGES", 30)
        backend = make_index(tmp_path_factory.mktemp("index"), image_folder, model)
        update_calibration(backend, model)
        yield backend


@pytest.fixture(scope="module")
def index(backend: SqliteBackend, model: DualEncoder, rerank_model: DualEncoder) -> Index:
    return Index.open(backend.folder, model, rerank_model)


@pytest.fixture(scope="module")
def client(backend: SqliteBackend, model: DualEncoder, rerank_model: DualEncoder) -> Iterator[TestClient]:
    app = create_app(model, SqliteBackend(backend.folder), rerank_model=rerank_model)
    with TestClient(app, base_url="http://localhost") as client:
        yield client


def encode_images(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replace file names of images with data URIs."""
    values = dict(fields)
    for name in ("images", "negative_images"):
        if name in fields:
            contents = [(folder / file).read_bytes() for file in fields[name]]
            values[name] = ["data:image/png;base64," + base64.b64encode(data).decode() for data in contents]
    return values


@pytest.mark.parametrize("name", QUERIES)
def test_python_command_and_server_return_the_same_hits(
    name: str,
    index: Index,
    client: TestClient,
    model: DualEncoder,
    rerank_model: DualEncoder,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields, others, flags = QUERIES[name]
    values = dict(fields)
    for key in ("images", "negative_images"):
        values[key] = [image_folder / file for file in fields.get(key, [])]
    if "templates" in fields:
        values["templates"] = QueryTemplates(tuple(fields["templates"]))
    options = SearchOptions(**{key: value for key, value in others.items() if key != "filter"})
    page = index.search(SearchQuery(**values), top=5, filter=Filter(**others.get("filter", {})), options=options)
    assert page.hits and index.calibration is not None
    expected = [(hit.id, hit.score, hit.relevance) for hit in page.hits]

    response = client.post("/search", json={**encode_images(fields, image_folder), **others, "top": 5})
    assert response.status_code == 200, response.text
    result = response.json()
    assert [(hit["id"], hit["score"], hit["relevance"]) for hit in result["hits"]] == expected
    for key in ("nothing_close", "total", "next_offset", "rerank_missing"):
        assert result[key] == getattr(page, key)

    monkeypatch.chdir(image_folder)
    monkeypatch.setattr("llm2clip.cli.search.resolve_model", lambda name: name)
    models = {"colours": rerank_model}
    monkeypatch.setattr("llm2clip.search.index.open_dual_encoder", lambda name, **_: models.get(name, model))
    assert main(["search", str(index.backend.folder), *fields.get("texts", []), *flags, "--top", "5", "--json"]) == 0  # type: ignore[attr-defined]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    printed = [(line["path"], line["score"], line["relevance"]) for line in lines]
    rounded = [(score and round(score, 4), relevance and round(relevance, 4)) for _, score, relevance in expected]
    assert printed == [(hit.images[0].name, *values) for hit, values in zip(page.hits, rounded, strict=True)]


def test_python_and_server_return_the_same_explanations_and_heatmaps(index: Index, client: TestClient) -> None:
    [first, second] = index.search("red", top=2).hits
    query = {"texts": ["a red dog"], "like": [second.id]}
    explanation = index.explain(SearchQuery(**query), first.id)
    result = client.post("/explain", json={**query, "id": first.id}).json()
    assert result["score"] == explanation.score
    assert [(word["text"], word["effect"]) for word in result["words"]] == [
        (word.text, word.effect) for word in explanation.words
    ]
    heatmap = index.compute_heatmap(SearchQuery(**query), first.id)
    assert client.post("/heatmap", json={**query, "id": first.id}).json()["rows"] == heatmap.tolist()
    page = index.search("red", top=2)
    assert index.draw_heatmaps(page).keys() == {hit.id for hit in page.hits}


def test_pages_of_an_index_follow_each_other(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.search.query.IMAGES_PER_BATCH", 5)
    for options in (SearchOptions(), SearchOptions(group_similar=False), SearchOptions(rerank=True)):
        names: list[str] = []
        offset: int | None = 0
        while offset is not None:
            page = index.search("red", top=7, offset=offset, options=options)
            for hit in page.hits:
                names += [hit.images[0].name, *(other.name for other in hit.similar)]
            offset = page.next_offset
        assert len(names) == len(set(names)) == page.total == 36


def test_index_explains_mistakes(index: Index, backend: SqliteBackend, dual_encoder: DualEncoder) -> None:
    with pytest.raises(ValueError, match="the query is empty"):
        index.search()
    with pytest.raises(NotFound, match="no image with id 999"):
        index.search(SearchQuery(like=["999"]))
    with pytest.raises(UnsupportedQuery, match="at least one text"):
        index.explain(SearchQuery(like=["1"]), "1")
    without_rerank_model = Index.open(backend.folder, dual_encoder)
    with pytest.raises(UnsupportedQuery, match="re-ranking model"):
        without_rerank_model.search("red", options=SearchOptions(rerank=True))
    with pytest.raises(FileNotFoundError, match="is not an index"):
        Index.open(backend.folder / "none")
