"""The same results from Python, the commands and HTTP, and the output of the commands `index` and `search`."""

import base64
import functools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from conftest import HANG_TIMEOUT
from llm2clip import Index
from llm2clip.cli import main
from llm2clip.cli.search import NOT_CALIBRATED, NOTHING_CLOSE, parse_iso_timestamp, resolve_path_filter
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.model_folder import save_query_templates
from llm2clip.models.prompts import QueryTemplates
from llm2clip.search.index import SearchOptions
from llm2clip.search.inference import ServerLimits
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.relevance import update_calibration
from llm2clip.search.server import AccessPolicy, create_app
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.search.types import NotFoundError, UnsupportedQueryError
from search_fixtures import add_red_detector, make_index, reject_all_texts, running_server

INVALID_ADDRESSES = (
    "file:///etc/passwd?token=x",
    "localhost:7860",
    "http://[::1",
    "http://a:99999",
    "http://u:secret@a",
)
# Each query: its fields as in `SearchQuery`, the other fields of a request, and the flags of the command.
QUERIES: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "text": ({"texts": ["the middle is red"]}, {}, []),
    "several texts": ({"texts": ["red", "a dog"]}, {"words": False}, ["--text", "a dog", "--no_words"]),
    "image": ({"images": ["9.png"]}, {}, ["--images", "9.png"]),
    "negative parts": (
        {"texts": ["red"], "negative_texts": ["a dog"], "negative_images": ["3.png"]},
        {},
        ["--negative", "a dog", "--negative_images", "3.png"],
    ),
    "only negative": ({"negative_texts": ["red"]}, {}, ["--negative", "red"]),
    "filter": ({"texts": ["red"]}, {"filter": {"caption": "left half"}}, ["--caption", "left half"]),
    "no query": ({}, {"filter": {"path": "*.png"}}, ["--path", "*.png"]),
    "weak hits": ({"texts": ["x"]}, {"show_weak": True, "group_similar": False}, ["--show_weak", "--no_group"]),
}


@pytest.fixture(scope="module")
def model(dual_encoder: DualEncoder) -> DualEncoder:
    return add_red_detector(dual_encoder, "red")


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
def index(backend: SqliteBackend, model: DualEncoder) -> Index:
    return Index.open(backend.folder, model)


@pytest.fixture(scope="module")
def client(backend: SqliteBackend, model: DualEncoder) -> Iterator[TestClient]:
    app = create_app(model, SqliteBackend(backend.folder))
    with TestClient(app, base_url="http://localhost") as client:
        yield client


@pytest.fixture(scope="module")
def address(backend: SqliteBackend, model: DualEncoder) -> Iterator[str]:
    """Return the address of a running server, with its token, as `serve` prints it."""
    app = create_app(
        model, SqliteBackend(backend.folder), ServerLimits(timeout=HANG_TIMEOUT), AccessPolicy(token="secret")
    )
    with running_server(app) as address:
        yield f"{address}?token=secret"


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
    backend: SqliteBackend,
    client: TestClient,
    address: str,
    model: DualEncoder,
    image_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fields, others, flags = QUERIES[name]
    values = dict(fields)
    for key in ("images", "negative_images"):
        values[key] = [image_folder / file for file in fields.get(key, [])]
    options = SearchOptions(**{key: value for key, value in others.items() if key != "filter"})
    page = index.search(SearchQuery(**values), top=5, filter=Filter(**others.get("filter", {})), options=options)
    assert page.hits and index.calibration is not None
    expected = [(hit.id, hit.score, hit.relevance) for hit in page.hits]

    response = client.post("/search", json={**encode_images(fields, image_folder), **others, "top": 5})
    assert response.status_code == 200, response.text
    result = response.json()
    assert [(hit["id"], hit["score"], hit["relevance"]) for hit in result["hits"]] == expected
    for key in ("nothing_close", "total", "next_offset"):
        assert result[key] == getattr(page, key)

    monkeypatch.chdir(image_folder)
    monkeypatch.setattr("llm2clip.models.dual_encoder.open_dual_encoder", lambda name, **_: model)
    words = fields["texts"][0].split() if fields.get("texts") else []  # unquoted: all words form one text
    assert main(["search", str(backend.folder), *words, *flags, "--top", "5", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    printed = [(line["path"], line["score"], line["relevance"]) for line in lines]
    rounded = [(score and round(score, 4), relevance and round(relevance, 4)) for _, score, relevance in expected]
    assert printed == [(hit.images[0].name, *values) for hit, values in zip(page.hits, rounded, strict=True)]
    assert main(["search", "--server", address, *words, *flags, "--top", "5", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == lines


@pytest.mark.parametrize("flags", [["--explain"], ["--paths"], ["--camera", "no such camera"]])
def test_search_prints_the_same_for_a_server_as_for_an_index(
    flags: list[str],
    backend: SqliteBackend,
    address: str,
    model: DualEncoder,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("llm2clip.models.dual_encoder.open_dual_encoder", lambda name, **_: model)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # unencrypted requests must not use a proxy
    outputs = []
    for arguments in ([str(backend.folder)], ["--server", address]):
        assert main(["search", *arguments, "a", "red", "dog", *flags]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].split("no image")[0] == outputs[1].split("the index is empty, or no image")[0]


def test_search_explains_problems_with_a_server(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            authorizations.append(self.headers["Authorization"])
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(307 if "moved" in self.path else 200)
            self.send_header("Location", f"{plain}/target?token=t")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = address.partition("?")[0]
    authorizations: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as other:
        plain = f"http://127.0.0.1:{other.server_port}"
        threading.Thread(target=other.serve_forever).start()
        for url, flags, message in (
            (server, [], "the token is missing or wrong"),
            (server, ["--token", "wrong"], "the token is missing or wrong"),
            (f"{server}?token=se%0Acret", [], "must contain only printable ASCII characters"),
            (address, ["--top", "1000"], "less than or equal to 200"),
            (f"{server}none", ["--token", "secret"], "Not Found"),
            (f"{plain}/moved", ["--token", "secret"], f"redirects to {plain}/target. Pass the new address"),
            (plain, [], "is not the address of a server started with `llm2clip serve`"),
            ("http://127.0.0.1:9", [], "cannot reach the server http://127.0.0.1:9 .*Connection refused.*serve INDEX"),
            (server.replace("http", "https"), [], "cannot reach the server https"),
            *((url, [], "must be of the form http://HOST:PORT or https://HOST") for url in INVALID_ADDRESSES),
            (address, ["--model", "x"], "--model cannot be used with --server"),
        ):
            assert main(["search", "--server", url, "red", *flags]) == 1
            error = capsys.readouterr().err
            assert re.search(message, error) and "secret" not in error and "\n" not in error.strip()
        other.shutdown()
    assert authorizations == ["Bearer secret", None], "the redirect must not be followed"
    assert main(["search"]) == 1
    assert "pass an index, or the address of a running server with --server" in capsys.readouterr().err


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


def test_pages_of_an_index_follow_each_other(index: Index) -> None:
    for options in (SearchOptions(), SearchOptions(group_similar=False)):
        names: list[str] = []
        offset: int | None = 0
        while offset is not None:
            page = index.search("red", top=7, offset=offset, options=options)
            for hit in page.hits:
                names += [hit.images[0].name, *(other.name for other in hit.similar)]
            offset = page.next_offset
        assert len(names) == len(set(names)) == page.total == 36


def test_index_explains_mistakes(index: Index, backend: SqliteBackend) -> None:
    with pytest.raises(ValueError, match="the query is empty"):
        index.embed(SearchQuery())
    with pytest.raises(NotFoundError, match="no image with id 999"):
        index.search(SearchQuery(like=["999"]))
    with pytest.raises(UnsupportedQueryError, match="at least one text"):
        index.explain(SearchQuery(like=["1"]), "1")
    with pytest.raises(FileNotFoundError, match="is not an index"):
        Index.open(backend.folder / "none")


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def open_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Make all commands of a test share the loaded model."""
    open_once = functools.cache(open_dual_encoder)
    monkeypatch.setattr("llm2clip.models.dual_encoder.open_dual_encoder", open_once)
    return open_once


def test_index_and_search_print_their_results(
    photos: Path, model_folder: Path, open_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = str(tmp_path / "index")
    assert main(["index", str(photos), "--model", str(model_folder), "--out", index]) == 0
    output = capsys.readouterr().out
    assert "Images: 7 added" in output
    assert "(7 images, 6 distinct)" in output
    assert "Duplicates: " in output and "copy.png" in output
    assert "Skipped images: 2, listed in" in output
    assert "Next: llm2clip search" in output

    words = ["a red one", "--images", str(photos / "1.png"), "--negative", "a dog", "--top", "3"]
    assert main(["search", index, *words]) == 0
    output = capsys.readouterr().out
    assert output.count("cosine") == 1 and ".png" in output
    assert main(["search", index, *words, "--json"]) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [result["rank"] for result in results] == [1, 2, 3]
    assert all(Path(result["path"]).is_file() and f"{result['score']:.3f}" in output for result in results)
    assert main(["search", index, *words, "--paths"]) == 0
    paths = capsys.readouterr().out.splitlines()
    assert paths == [result["path"] for result in results]

    model, backend, templates = open_model(str(model_folder)), SqliteBackend(Path(index)), ("a photo of a {}", "{}!")
    query = SearchQuery(["red"], templates=QueryTemplates(templates))
    literal, with_templates = (
        [f"{hit.score:.3f}" for hit in backend.search(QueryEncoder(model).embed(q).combined, 10, Filter())]
        for q in (SearchQuery(["red"]), query)
    )

    def search(*flags: str) -> str:
        assert main(["search", index, "red", *flags]) == 0
        return capsys.readouterr().out

    output = search("--templates", *templates)
    assert all(score in output for score in with_templates)

    reject_all_texts(SqliteBackend(Path(index), write=True), model)
    assert search() == NOTHING_CLOSE + "\n"
    output = search("--show_weak")
    assert "cosine" in output and "None of these images is close to the query." in output
    assert main(["search", index, "red", "--json"]) == 0
    output = capsys.readouterr()
    assert output.out == "" and NOTHING_CLOSE in output.err
    assert main(["search", index, "red", "--json", "--show_weak"]) == 0
    assert all(json.loads(line)["relevance"] < 0.01 for line in capsys.readouterr().out.splitlines())
    SqliteBackend(Path(index), write=True).save_calibration(b"")
    output = search()
    assert "cosine" in output and output.endswith(NOT_CALIBRATED + "\n")
    saved = (model_folder / "config.json").read_text()
    try:
        save_query_templates(model_folder, query.templates)  # the model's identity stays the same
        open_model.cache_clear()
        outputs = search(), search("--templates")
        assert all(score in outputs[0] for score in with_templates)
        assert all(score in outputs[1] for score in literal)
    finally:
        (model_folder / "config.json").write_text(saved)

    assert main(["search", index, "--path", "*ub"]) == 0
    output = capsys.readouterr().out
    assert "date" in output and "cosine" not in output and "5.png" in output.replace("\n", "")

    assert main(["search", index, "x", "--after", "2100-01-01"]) == 0
    assert capsys.readouterr().out.endswith("No results: no image matches --after 2100-01-01.\n")
    filters = ["--path", "*.png", "--after", "2100-01-01", "--camera", "Canon"]
    assert main(["search", index, "x", *filters]) == 0
    assert capsys.readouterr().out.endswith("no image matches --after 2100-01-01 and --camera Canon.\n")


def test_index_and_search_explain_mistakes(
    photos: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, model = str(tmp_path / "index"), str(model_folder)
    assert main(["index", str(photos), "--model", model, "--out", index]) == 0
    for command, message in (
        (["search", str(tmp_path / "none"), "x"], "is not an index"),
        (["search", index], "pass text or images to search for, or a filter"),
        (["search", index, "x", "--templates", "photo"], "--templates: template 0 ('photo') has no {}"),
        (["index", str(photos), "--model", str(tmp_path / "typo"), "--out", str(tmp_path / "new")], "typo"),
        (["search", index, "x", "--images", "no.jpg"], "No such file"),
        (["search", index, " "], "text 0 is empty"),
        (["search", index, "x", "--negative", "a", ""], "text 1 is empty"),
        (
            ["search", index, "x", "--after", "yesterday"],
            "--after must be a date or a date and time, such as 2024-05-31",
        ),
        (["search", index, "x", "--before", "2020-02-30"], "--before must be a date or a date and time"),
        (["search", index, "x", "--after", "2030-01-01", "--before", "2020-01-01"], "--after 2030-01-01 is later than"),
        (["search", index, "x", "--json", "--paths"], "cannot be combined"),
        (["index", str(tmp_path / "gone"), "--model", model, "--out", index], "no such file or folder"),
        (["index", "hf:a", "--model", model, "--out", "mysql://x"], "unknown index backend 'mysql'"),
    ):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert message in error and "--prune" not in error


def test_index_watch_updates_until_interrupted(
    photos: Path,
    image_folder: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    intervals: list[float] = []

    def sleep(seconds: float) -> None:
        intervals.append(seconds)
        if len(intervals) == 2:
            shutil.copy(image_folder / "9.png", photos / "9.png")
        if len(intervals) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("llm2clip.cli.search.time.sleep", sleep)
    index = tmp_path / "index"
    assert main(["index", str(photos), "--model", str(model_folder), "--out", str(index), "--watch", "3"]) == 130
    output = capsys.readouterr().out
    assert intervals == [3.0] * 4
    assert "Watching" in output
    assert output.count("Images: ") == 2 and "Images: 1 added" in output  # nothing is printed without changes
    assert SqliteBackend(index).count_images() == (8, 7)


def test_parse_iso_timestamp_accepts_dates_and_times() -> None:
    midnight = datetime(2024, 5, 31).timestamp()
    for text in ("2024-05-31", "20240531"):
        assert parse_iso_timestamp(text, "--after") == midnight
        end = parse_iso_timestamp(text, "--before", end_of_day=True)
        assert end is not None and midnight + 86399 < end < midnight + 86400
    for option, end_of_day in (("--after", False), ("--before", True)):
        assert parse_iso_timestamp("2024-05-31T12:00", option, end_of_day) == midnight + 43200


def test_canonical_path_resolves_only_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other relative paths match in every folder."""
    monkeypatch.chdir(tmp_path)
    Path("trip").mkdir()
    Path("link").symlink_to("trip")
    assert resolve_path_filter("link") == resolve_path_filter(f"{tmp_path}/link/") == str((tmp_path / "trip").resolve())
    assert resolve_path_filter("2024/*.jpg") == "2024/*.jpg"
    assert resolve_path_filter(os.fsdecode(b"/x/\xff.png")) == "/x/\\udcff.png"  # as index backends store it
