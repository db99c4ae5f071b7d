"""Tests of `fit --caption`."""

import json
from pathlib import Path
from typing import Any

import pytest

from caption_fixtures import make_photos, run_command, run_server
from llm2clip import pipeline
from llm2clip.cli.checks import check_output_folder
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import TooManySkippedError
from llm2clip.tools import plan


class TrainingError(Exception):
    """Raised instead of training."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 6)


@pytest.fixture
def fit_events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace everything in `fit` but captioning. Return a list that will contain the sources and the checks' names."""
    events: list[Any] = []

    def fit(run: pipeline.Run) -> Path:
        events.append(run.sources)
        return run.model_dir

    monkeypatch.setattr(pipeline, "fit", fit)
    for module, name in (
        (pipeline, "load_pretrained_parts"),
        (pipeline, "check_encoder_exists"),
        (plan, "check_resources"),
    ):
        monkeypatch.setattr(module, name, lambda *_, name=name: events.append(name) or [])
    return events


@pytest.fixture
def fit_data(monkeypatch: pytest.MonkeyPatch, fit_events: list[Any]) -> list[tuple[int, int]]:
    """Let `fit` stop before `tune`. Return a list that will contain its numbers of training and held-out images."""
    counts: list[tuple[int, int]] = []

    def stop(run: pipeline.Run) -> None:
        counts.append((len(run.data.train), len(run.data.held_out["captions"])))
        raise TrainingError

    monkeypatch.setattr(pipeline, "fit", stop)
    return counts


def test_fit_captions_the_images_before_training(tmp_path: Path, photos: Path, fit_events: list[Any]) -> None:
    run = tmp_path / "run"
    checks = ["load_pretrained_parts", "check_encoder_exists"]
    with run_server() as server:
        words = ["fit", photos, "--out", run, "--caption", server.url]
        with pytest.raises(ValueError, match="Pass the name of the server's model with --caption_model"):
            run_command(*words)
        with pytest.raises(ValueError, match="--caption_model requires the URL of a server in --caption"):
            run_command("fit", photos, "--out", run, "--caption_model", "tiny")
        words += ["--caption_model", "tiny", "--encoder.path", "smollm2-135m"]
        with pytest.raises(ValueError, match=r"loss .*nonsense"):
            run_command(*words, "--align.loss", "nonsense")
        with pytest.raises(ValueError, match=r"with --caption, --evaluate.fields can contain only .* .got captions_de"):
            run_command(*words, "--evaluate.fields", '["captions_de", "short_captions"]')
        assert server.num_requests == 0 and not run.exists()
        server.answers = {"": "I'm sorry, but I can't."}
        with pytest.raises(TooManySkippedError, match="no caption for 6 of 6 images"):
            run_command(*words)
        server.answers = {}
        run_command(*words)
        check_output_folder(run, "fit")  # the run can be resumed
        (run / "tune").mkdir()
        make_photos(photos, 7)
        run_command(*words)
    data = [str(run / "captions.jsonl")]
    assert fit_events == [
        *[*checks, "check_resources"] * 2, "check_resources", data, *checks, "check_resources", data
    ]  # fmt: skip
    assert server.num_requests == 2 * 6 * 3  # after training has started, the captions do not change
    assert len(list(open_records(data[0]))) == 6


def test_fit_captions_added_images_if_no_stage_has_outputs(tmp_path: Path, fit_data: list[tuple[int, int]]) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    with run_server() as server:
        words = ["fit", photos, "--out", tmp_path / "run", "--caption", server.url, "--caption_model", "tiny"]
        with pytest.raises(ValueError, match="too few images to train on"):
            run_command(*words)
        make_photos(photos, 10)
        with pytest.raises(TrainingError):
            run_command(*words)
    assert fit_data == [(9, 1)]


@pytest.mark.parametrize("selections", ["@train+val", "", "@none", "@train @val"])
def test_fit_selects_the_same_splits_with_and_without_captions(
    tmp_path: Path, selections: str, fit_data: list[tuple[int, int]]
) -> None:
    make_photos(tmp_path / "photos", 15)
    table = tmp_path / "photos.jsonl"
    splits: list[dict[str, str]] = [{"split": "train"}, {"split": "val"}, {}]
    for number in range(15):
        row = {"image": f"photos/{number:04}.png", "captions": ["a photo", "an image"], **splits[number % 3]}
        with table.open("a") as stream:
            stream.write(f"{json.dumps(row)}\n")
    words = ["fit", *(f"{table}{selection}" for selection in selections.split(" "))]
    with run_server() as server:
        for flags in ([], ["--caption", server.url, "--caption_model", "tiny"]):
            with pytest.raises(TrainingError):
                run_command(*words, "--out", tmp_path / f"run{len(flags)}", *flags)
        with pytest.raises(ValueError, match=r"select splits either in all .* or in none of them \(got .*@val, "):
            run_command("fit", f"{table}@val", table, "--out", tmp_path / "run", *flags)
    without_captions, with_captions = fit_data
    assert with_captions == without_captions
    assert server.num_requests > 0 and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("fit_events")
def test_fit_suggests_to_index_all_images_of_the_sources(tmp_path: Path, photos: Path) -> None:
    run, table = tmp_path / "run", photos.with_name("photos.csv")
    table.write_text("file,place\n" + "".join(f"photos/{number:04}.png,Oslo\n" for number in range(6)))
    words = ["fit", table, "--columns", "image=file,captions=place", "--out", run]
    with run_server() as server:
        lines = run_command(*words, "--caption", server.url, "--caption_model", "tiny")
    model = run / "model"
    assert f"Next: llm2clip evaluate {model} {run}/captions.jsonl\n" in lines
    columns = "--columns image=file,captions=place"
    assert f"llm2clip index {table} {columns} --model {model} --out {run}/index" in lines
