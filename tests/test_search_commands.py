"""Tests of the commands `index` and `search`. `serve` is tested in test_server.py."""

import functools
import json
import os
import shutil
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from llm2clip.cli import main
from llm2clip.cli.search import NOTHING_CLOSE, parse_time, resolve_path_filter
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.models.model_folder import save_query_templates
from llm2clip.models.prompts import QueryTemplates
from llm2clip.search.metadata import Filter
from llm2clip.search.query import QueryEncoder, SearchQuery
from llm2clip.search.relevance import NOT_CALIBRATED
from llm2clip.search.sqlite_backend import SqliteBackend
from search_fixtures import reject_all_texts


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
    assert "Unreadable images: 2, listed in" in output
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
    assert main(["search", index, *words, "--sheet", str(tmp_path / "sheet")]) == 0
    output = capsys.readouterr().out
    assert "Results: " in output and "cosine" not in output
    page = (tmp_path / "sheet/results.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 3
    assert all(f'<a href="{Path(path).as_uri()}">' in page for path in paths)
    assert "a red one" in page and "without a dog" in page

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
    with sqlite3.connect(Path(index) / "index.sqlite") as db:
        db.execute("DELETE FROM calibration")
    db.close()
    assert main(["search", index, "red"]) == 0
    output = capsys.readouterr()
    assert "cosine" in output.out and NOT_CALIBRATED in output.err
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
    assert main(["search", index, "--path", "*ub", "--sheet", str(tmp_path / "newest")]) == 0
    assert "1 images, newest first" in (tmp_path / "newest/results.html").read_text()

    assert main(["search", index, "x", "--after", "2100-01-01"]) == 0
    assert capsys.readouterr().out.endswith("No results: the index is empty, or no image matches the filters.\n")


def test_index_and_search_explain_mistakes(
    photos: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, model = str(tmp_path / "index"), str(model_folder)
    assert main(["index", str(photos), "--model", model, "--out", index]) == 0
    for command, message in (
        (["search", str(tmp_path / "none"), "x"], "is not an index"),
        (["search", index], "pass text or images to search for, or a filter"),
        (["search", index, "--path", "x", "--open", "--heatmaps"], "pass text or images to search for"),
        (["search", index, "x", "--templates", "photo"], "--templates: template 0 ('photo') has no {}"),
        (["serve", "--index", index, "--templates", "photo"], "--templates: template 0 ('photo') has no {}"),
        (["serve", "--index", index, "--templates", *(["{}"] * 8)], "too many templates: 8; the limit is 7"),
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
        (["search", index, "x", "--json", "--sheet", "s"], "cannot be combined"),
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
    assert SqliteBackend(index).count() == (8, 7)


def test_parse_time_accepts_dates_and_times() -> None:
    midnight = datetime(2024, 5, 31).timestamp()
    for text in ("2024-05-31", "20240531"):
        assert parse_time(text, "--after") == midnight
        end = parse_time(text, "--before", end_of_day=True)
        assert end is not None and midnight + 86399 < end < midnight + 86400
    for option, end_of_day in (("--after", False), ("--before", True)):
        assert parse_time("2024-05-31T12:00", option, end_of_day) == midnight + 43200


def test_canonical_path_resolves_only_existing_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other relative paths match in every folder."""
    monkeypatch.chdir(tmp_path)
    Path("trip").mkdir()
    Path("link").symlink_to("trip")
    assert resolve_path_filter("link") == resolve_path_filter(f"{tmp_path}/link/") == str((tmp_path / "trip").resolve())
    assert resolve_path_filter("2024/*.jpg") == "2024/*.jpg"
    assert resolve_path_filter(os.fsdecode(b"/x/\xff.png")) == "/x/\\udcff.png"  # as index backends store it
