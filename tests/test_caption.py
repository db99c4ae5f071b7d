"""Tests of `llm2clip caption`: prompts, endpoint, resuming, local models, and the records that are written."""

import asyncio
import gzip
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
import yaml

from caption_fixtures import FAULTS, CaptionServer, make_photos, run_server
from conftest import run_distributed
from llava_fixtures import build_tiny_llava
from llm2clip import pipeline
from llm2clip.caption import captioners
from llm2clip.caption import run as caption_run
from llm2clip.caption.answers import Answer, CaptionRequest, StoppedError, clean_answer
from llm2clip.caption.captioners import LocalCaptioner
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.options import CaptionOptions, Prompt, load_prompts
from llm2clip.cli import build_parser, main
from llm2clip.cli.checks import check_output_folder
from llm2clip.data.image_refs import FileImage, ImageRef
from llm2clip.data.images import load_image
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import TooManySkipped
from llm2clip.runs import ranks
from llm2clip.runs.output_folder import FolderInUseError
from llm2clip.runs.ranks import process_state
from llm2clip.tools import plan

KEY = "sk-very-secret"
CAPTIONS_PER_IMAGE = 3


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "FIRST_DELAY", 0.01)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 6)


def run_command(*words: object) -> str:
    """Run a command as `main` does, but without handling errors. Return the lines that it prints at the end."""
    parser, run = build_parser()
    settings = parser.instantiate(parser.parse_args(list(map(str, words))))
    return "\n".join(run[settings.subcommand](settings[settings.subcommand]))


def caption(server: CaptionServer, source: Path, out: Path, *flags: object) -> str:
    """Caption images with a server. Return the lines that the command prints at the end."""
    return run_command("caption", source, "--out", out, "--endpoint", server.url, "--model", "tiny", *flags)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_prompts(file: Path, **prompts: Any) -> Path:
    file.write_text(yaml.safe_dump(prompts))
    return file


# ---- endpoint --------------------------------------------------------------------------------------------------------


def test_endpoint_captions_each_image_once_despite_faults(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "captions.jsonl"
    with run_server(faults=FAULTS, fault_rate=0.2) as server:
        caption(server, photos, out)
    rows = read_rows(out)
    assert [row["image"] for row in rows] == [f"photos/{number:04}.png" for number in range(6)]
    assert all(len(row["captions"]) == 2 and len(row["long_captions"]) == 1 for row in rows)
    assert len(server.answered) == 6 * CAPTIONS_PER_IMAGE and set(server.answered.values()) == {1}
    assert server.num_requests > 6 * CAPTIONS_PER_IMAGE + len(FAULTS) - 2  # faults were retried


def test_records_are_read_with_their_captions_and_origin(tmp_path: Path, photos: Path) -> None:
    out = photos / "captions.jsonl"  # a second run must not read it as captions of the source
    for _ in range(2):
        with run_server() as server:
            caption(server, photos, out)
    assert server.num_requests == 0
    records = list(open_records(photos))
    assert len(records) == 6
    assert all(len(record.captions) == 2 and len(record.long_captions) == 1 for record in records)
    origin = read_rows(out)[0]["caption_source"]
    assert origin["model"] == "tiny" and len(origin["image_hash"]) == 64 and origin["temperature"] == [0.7, 0.7, 0.3]
    assert [key.split("-")[0] for key in origin["prompts"]] == ["sentence", "objects", "dense"]


def test_new_images_and_changed_prompts_are_asked_alone(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "captions.jsonl"
    with run_server() as server:
        caption(server, photos, out)
        make_photos(photos, 8)  # two more images
        (photos / "0000.png").rename(photos / "a.png")
        caption(server, photos, out)
        assert server.num_requests == 8 * CAPTIONS_PER_IMAGE
        file = write_prompts(tmp_path / "prompts.yaml", one={"kind": "short", "text": "What is this?", "samples": 2})
        caption(server, photos, out, "--prompts", str(file))
    assert server.num_requests == 8 * CAPTIONS_PER_IMAGE + 8 * 2
    assert all("long_captions" not in row for row in read_rows(out))


def test_captions_of_the_source_are_kept_and_given_to_the_model(tmp_path: Path, photos: Path) -> None:
    source = tmp_path / "source.jsonl"
    row = {"image": "photos/0000.png", "captions": ["Anna's {dog}", "second"], "split": "val", "id": "x"}
    other = {"image": "photos/0001.png", "split": "val"}
    source.write_text(f"{json.dumps(row)}\n{json.dumps(other)}\n")
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        caption(server, source, out, "--use_captions", "--language", "German")
    first, second = read_rows(out)
    assert first["captions"] == ["Anna's {dog}", "second"] and len(first["short_captions"]) == 2
    assert (first["id"], first["split"], len(first["long_captions"])) == ("x", "val", 1)
    assert len(second["captions"]) == 2 and "short_captions" not in second
    texts = [body["messages"][0]["content"][1]["text"] for body in server.bodies]
    assert sum('"Anna\'s {dog}"' in text for text in texts) == CAPTIONS_PER_IMAGE
    assert not any("{caption}" in text for text in texts) and all(text.endswith("in German.") for text in texts)


def test_a_metadata_column_can_be_given_to_the_model_and_left_out_of_training(tmp_path: Path, photos: Path) -> None:
    table = tmp_path / "photos.csv"
    rows = "".join(f"photos/{number:04}.png,Harbour of Oslo {number}\n" for number in range(6))
    table.write_text(f"image,place\n{rows}")
    text = "Describe this photo.\nIt was taken here: {caption}"
    prompts = write_prompts(tmp_path / "prompts.yaml", one={"kind": "short", "text": text})
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        caption(server, table, out, "--columns", "captions=place", "--use_captions", "--prompts", prompts)
    texts = {body["messages"][0]["content"][1]["text"] for body in server.bodies}
    assert texts == {f"Describe this photo.\nIt was taken here: Harbour of Oslo {number}" for number in range(6)}
    assert all(row["captions"][0].startswith("Harbour") and len(row["short_captions"]) == 1 for row in read_rows(out))
    columns = {"captions": "short_captions", "short_captions": ""}
    records = list(open_records({"path": out, "columns": columns}))
    assert len(records) == 6 and all(len(record.texts) == len(record.captions) == 1 for record in records)
    assert all("Harbour" not in text for record in records for text in record.texts)


def test_images_that_a_caption_file_with_splits_names_are_captioned_once(tmp_path: Path, photos: Path) -> None:
    """A folder's images are also listed without their split."""
    rows = [{"image": f"000{number}.png", "captions": ["a person's words"], "split": "val"} for number in range(3)]
    (photos / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    copy = photos / "copy.png"  # has no captions of its own, but shows an image that has
    copy.write_bytes((photos / "0000.png").read_bytes())
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        caption(server, photos, out)
    records = {row["id"]: row for row in read_rows(out)}
    assert len(read_rows(out)) == len(records) == 7
    for number in range(3):
        record = records[f"000{number}"]
        assert (record["captions"], record["split"], len(record["short_captions"])) == (["a person's words"], "val", 2)
    assert records["copy"]["captions"] == [] and len(records["copy"]["short_captions"]) == 2
    assert len(records["0005"]["captions"]) == 2 and "short_captions" not in records["0005"]


def test_tar_members_are_copied_and_duplicates_are_asked_once(tmp_path: Path, photos: Path) -> None:
    (photos / "copy.png").write_bytes((photos / "0000.png").read_bytes())
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        for file in sorted(photos.iterdir()):
            tar.add(file, file.name)
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        caption(server, tmp_path / "photos.tar", out)
    assert len(server.answered) == server.num_requests == 6 * CAPTIONS_PER_IMAGE
    rows = read_rows(out)
    assert len(rows) == 7 and rows[0]["captions"] == rows[-1]["captions"]
    for row in rows:
        assert row["image"] == f"out_images/{row['caption_source']['image_hash']}.png"
        assert (tmp_path / row["image"]).is_file()


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path, photos: Path) -> None:
    data = (photos / "0000.png").read_bytes()
    (photos / "bad.png").write_bytes(data[:60] + bytes(20) + data[80:])  # the header is valid, but not the pixels
    (photos / "worse.png").write_bytes(b"text")
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        with pytest.raises(TooManySkipped, match=r"1 of 8 rows skipped .unreadable image"):
            caption(server, photos, out, "--max_skipped", "0.1")
        assert server.num_requests == 0
        with pytest.raises(TooManySkipped, match=r"1 of 7 images have no caption .* 3 requests: unreadable image: "):
            caption(server, photos, out, "--max_skipped", "0.13")
        caption(server, photos, out, "--max_skipped", "0.15")
    assert server.num_requests == 6 * CAPTIONS_PER_IMAGE
    assert len(read_rows(out)) == 6
    assert [Path(row["file"]).name for row in read_rows(tmp_path / "out_skipped.jsonl")] == ["worse.png"]
    assert [row["image"] for row in read_rows(tmp_path / "out_failures.jsonl")] == ["photos/bad.png"] * 3


class FixedCaptioner:
    """Captioner whose answers depend only on the image."""

    name, batch_size, workers, worked_before = "tiny", 2, 1, False

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def ask(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        return [Answer(f"A dog runs over meadow {int(request.image.sum())}.") for request in requests]

    def stop(self) -> None:
        pass


def test_each_rank_captions_its_share_and_reports_its_failures(tmp_path: Path, photos: Path) -> None:
    for file in sorted(make_photos(photos, 10).iterdir())[6:]:  # rank 0 gets one of these corrupt images
        data = file.read_bytes()
        (photos / f"bad{file.name}").write_bytes(data[:60] + bytes(20) + data[80:])
    run_distributed(2, _caption_on_rank, photos, tmp_path / "out.jsonl")
    assert len(read_rows(tmp_path / "out.jsonl")) == 10
    failures = read_rows(tmp_path / "out_failures.jsonl")
    assert [row["image"] for row in failures] == [f"photos/bad{number:04}.png" for number in range(6, 10)]
    assert sorted(file.name for file in tmp_path.glob("opened*")) == ["opened0"]
    num_requests = [int((tmp_path / f"requests{rank}").read_text()) for rank in range(2)]
    assert sum(num_requests) == 10 and all(num_requests)


def _caption_on_rank(photos: Path, out: Path) -> None:
    def open_encoder() -> Any:
        out.with_name(f"opened{process_state().process_index}").touch()
        return SimpleNamespace(name="encoder")

    num_requests = 0
    ask = FixedCaptioner.ask

    def count(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        nonlocal num_requests
        num_requests += len(requests)
        return ask(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_run, "score_captions", lambda *_: None)
        patch.setattr(FixedCaptioner, "ask", count)
        prompts, settings = [Prompt("one", "short", "Describe it.")], CaptionOptions(max_skipped=0.5)
        caption_run.caption_images([str(photos)], out, FixedCaptioner(), prompts, settings, open_encoder)
    out.with_name(f"requests{process_state().process_index}").write_text(str(num_requests))


def test_run_in_which_one_rank_was_stopped_is_not_complete(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"
    make_photos(photos, 12)
    run_distributed(2, _stop_second_rank, photos, out)
    num_records = len(read_rows(out))
    message = (tmp_path / "error").read_text()
    assert 0 < num_records < 12 and f"{12 - num_records} captions have not been requested" in message
    assert "run the same command again" in message
    assert not list(tmp_path.glob("opened*"))  # captions are compared when all of them have been requested
    _caption_on_rank(photos, out)  # a single process requests the missing captions of both ranks
    assert len(read_rows(out)) == 12


def _stop_second_rank(photos: Path, out: Path) -> None:
    """Caption images on two ranks, of which only the second one receives a signal to stop."""
    if process_state().is_main_process:
        with pytest.raises(ValueError, match="another process was stopped") as error:
            _caption_on_rank(photos, out)
        (out.parent / "error").write_text(str(error.value))
        ranks.wait_for_everyone()
        return

    def stop(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise StoppedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FixedCaptioner, "ask", stop)
        _caption_on_rank(photos, out)


def test_failed_requests_of_too_many_images_end_the_run_with_an_error(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with run_server(faults=["", *["500:no memory"] * 16, "503"]) as server:
        words = ["caption", photos, "--out", out, "--endpoint", server.url, "--model", "tiny"]
        words += ["--concurrency", 1, "--retries", 0]
        assert main(list(map(str, words))) == 1
        message = capsys.readouterr().err
        assert "5 of 6 images have no caption because their requests failed, over the limit of 5.0%" in message
        assert "The most common reason, for 16 requests: HTTP 500: no memory" in message
        assert "run the same command again" in message
        assert len(read_rows(out)) == 1 and len(read_rows(tmp_path / "out_failures.jsonl")) == 17
        assert main(list(map(str, words))) == 0
    assert len(read_rows(out)) == 6


@pytest.mark.parametrize("max_skipped", ["0.05", "1"])
def test_run_without_any_accepted_caption_ends_with_an_error(tmp_path: Path, photos: Path, max_skipped: str) -> None:
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        server.answers = {"": "Dog."}  # too short
        with pytest.raises(ValueError, match=r"none of the 6 images has a caption: .* captions of 6") as error:
            caption(server, photos, out, "--max_skipped", max_skipped)
    assert str(tmp_path / "out_report.html") in str(error.value)


def test_images_with_only_rejected_captions_are_reported(tmp_path: Path, photos: Path) -> None:
    def ask(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        numbers = [int(request.image.sum()) for request in requests]
        return [Answer("Dog." if number in rejected else f"A dog runs over meadow {number}.") for number in numbers]

    images = [FileImage(str(file)) for file in sorted(photos.iterdir())]
    rejected = [int(load_image(image).sum()) for image in images[:2]]
    warning = "Warning: 2 of 6 images have no caption, because quality control"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedCaptioner, "ask", ask)
        for max_skipped in (0.3, 0.35):
            prompts, settings = [Prompt("one", "short", "Describe it.")], CaptionOptions(max_skipped=max_skipped)
            summary = caption_run.caption_images(
                [str(photos)], tmp_path / "out.jsonl", FixedCaptioner(), prompts, settings
            )
            assert (warning in summary.report) == (max_skipped < 2 / 6) and summary.records == 4


def test_answers_beyond_the_number_of_samples_do_not_count(tmp_path: Path) -> None:
    prompt = Prompt("one", "short", "Describe it.", samples=1)

    def make_answer(image: str, sample: int, text: str | None) -> StoredAnswer:
        error = None if text else f"error of {image}"
        return StoredAnswer(image, prompt.key, sample, "tiny", text, error, temperature=0.7, date="2026-11-29")

    with closing(CaptionDatabase(tmp_path / "out.jsonl.sqlite")) as database:
        database.replace_images(ImageRow(number, name, name, {}) for number, name in enumerate("ab"))
        database.add_answers([make_answer("a", 0, None), make_answer("a", 1, "A dog runs.")])
        database.add_answers([make_answer("b", 0, "A dog runs."), make_answer("b", 1, None)])
        for samples, num_failed, num_errors in ((1, 1, 1), (2, 0, 2)):
            prompts = [replace(prompt, samples=samples)]
            assert database.count_images_without_caption("tiny", prompts) == (num_failed, 0)
            assert [number for _, number, _ in database.count_errors("tiny", prompts, limit=9)] == [1] * num_errors


def test_output_of_other_captioning_runs_is_not_read_unless_it_is_named(tmp_path: Path, photos: Path) -> None:
    with tarfile.open(photos / "more.tar", "w") as tar:  # its images are copied to captions_images
        for file in make_photos(tmp_path / "more", 8).glob("000[67].png"):
            tar.add(file, file.name)
    first, second = photos / "captions.jsonl", photos / "b.jsonl"
    with run_server() as server:
        caption(server, photos, first)
        assert len(list((photos / "captions_images").iterdir())) == 2
        lines = caption(server, photos, second, "--model", "other")
        caption(server, first, tmp_path / "c.jsonl", "--model", "third")
        with pytest.raises(ValueError, match="no records"):  # a run never reads its own output
            caption(server, first, first)
    assert f"{first} and 1 more: not read, because `llm2clip caption` has written it" in lines
    rows = read_rows(second)
    assert len(rows) == len(read_rows(first)) == 8
    assert all(len(row["captions"]) == 2 and "short_captions" not in row for row in rows)
    assert all(len(row["captions"]) == len(row["short_captions"]) == 2 for row in read_rows(tmp_path / "c.jsonl"))


def test_changed_caption_in_the_source_is_given_to_the_model_again(tmp_path: Path, photos: Path) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    file = write_prompts(
        tmp_path / "prompts.yaml",
        one={"kind": "short", "text": 'Describe it.\nIts caption is "{caption}".'},
        two={"kind": "short", "text": "What is it?"},
    )
    flags = ["--use_captions", "--prompts", file]

    def write_captions(*captions: str) -> None:
        rows = [{"image": f"photos/000{n}.png", "captions": [text]} for n, text in enumerate(captions)]
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))

    with run_server() as server:
        for captions, num_requests in ((["cat", "dog"], 4), (["cat", "dog"], 4), (["cat", "puppy"], 5)):
            write_captions(*captions)
            caption(server, source, out, *flags)
            assert server.num_requests == num_requests
    assert '"puppy"' in server.bodies[-1]["messages"][0]["content"][1]["text"]
    assert [len(row["short_captions"]) for row in read_rows(out)] == [2, 2]


def test_failed_request_does_not_replace_a_caption(tmp_path: Path, photos: Path) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    text = 'Describe it.\nIts caption is "{caption}".'
    file = write_prompts(tmp_path / "prompts.yaml", one={"kind": "short", "text": text, "temperature": 0.5})
    flags = ["--use_captions", "--prompts", file, "--price", "1000", "0"]  # an answer costs 1
    source.write_text(json.dumps({"image": "photos/0000.png", "captions": ["cat"]}))
    with run_server() as server:
        caption(server, source, out, *flags)
        (first,) = read_rows(out)
        source.write_text(json.dumps({"image": "photos/0000.png", "captions": ["puppy"]}))
        server.answers = {"puppy": "I'm sorry, but I can't help with that."}
        lines = caption(server, source, out, *flags)
        assert read_rows(out) == [first | {"captions": ["puppy"]}]
        assert [row["error"][:7] for row in read_rows(tmp_path / "out_failures.jsonl")] == ["refusal"]
        assert "Failed requests: 1" in lines and re.search(r"cost +2\.00", lines)
        server.answers = {"puppy": "A puppy runs over a meadow."}
        assert "Failed requests" not in caption(server, source, out, *flags)
    assert server.num_requests == 3 and read_rows(out)[0]["short_captions"] == ["A puppy runs over a meadow."]


def test_photos_in_the_folder_of_copied_images_are_captioned(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "out_images", 6)
    with run_server() as server:
        caption(server, photos, tmp_path / "out.jsonl")
    assert [row["image"] for row in read_rows(tmp_path / "out.jsonl")] == [f"out_images/000{n}.png" for n in range(6)]


def test_each_record_without_an_image_counts_as_skipped(tmp_path: Path, photos: Path) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    rows = [{"image": f"photos/000{n}.png", "captions": ["a dog"]} for n in range(6)]
    rows += [{"captions": [f"text {n}"]} for n in range(4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with run_server() as server:
        with pytest.raises(TooManySkipped, match=r"4 of 10 rows skipped .no image: 4"):
            caption(server, source, out, "--max_skipped", "0.39")
        assert server.num_requests == 0
        assert "4 of 10 rows skipped (no image: 4)" in caption(server, source, out, "--max_skipped", "0.4")
    assert [row["row"] for row in read_rows(tmp_path / "out_skipped.jsonl")] == [6, 7, 8, 9]


def test_captions_are_written_before_the_model_of_check_is_opened(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"

    def open_encoder() -> Any:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        prompts = [Prompt("one", "short", "Describe it.")]
        caption_run.caption_images(
            [str(photos)], out, FixedCaptioner(), prompts, CaptionOptions(), open_encoder=open_encoder
        )
    assert len(read_rows(out)) == 6
    assert (tmp_path / "out_report.html").exists()


def test_unchanged_files_are_not_read_again(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    read = ImageRef.read

    def record(self: ImageRef) -> bytes:
        names.append(Path(str(self)).name)
        return read(self)

    with run_server() as server:
        caption(server, photos, tmp_path / "out.jsonl")
        monkeypatch.setattr(caption_run, "write_caption_report", lambda *_: None)  # reads images for its thumbnails
        monkeypatch.setattr(ImageRef, "read", record)
        image = photos / "0001.png"
        image.write_bytes((photos / "0000.png").read_bytes())  # the images have the same size
        os.utime(image, ns=(0, 0))
        caption(server, photos, tmp_path / "out.jsonl")
    assert names == ["0001.png"]
    first, second, *_ = read_rows(tmp_path / "out.jsonl")
    assert first["captions"] == second["captions"]


def test_database_of_another_format_is_rejected(tmp_path: Path) -> None:
    with closing(CaptionDatabase(tmp_path / "out.jsonl.sqlite")) as database:
        database.connection.execute("PRAGMA user_version = 2")
    with pytest.raises(ValueError, match=r"has format 2, not 3\. Use another --out, or delete this file"):
        CaptionDatabase(tmp_path / "out.jsonl.sqlite")


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "missing is neither a folder nor a hub id"), ("damaged", "damaged")],
)
def test_unusable_model_of_check_is_reported_before_captioning(
    tmp_path: Path, photos: Path, name: str, message: str
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/config.json").write_text("{}")
    with run_server() as server, pytest.raises((FileNotFoundError, ValueError), match=message):
        caption(server, photos, tmp_path / "out.jsonl", "--check", tmp_path / name)
    assert server.num_requests == 0


def test_endpoint_requires_a_single_process(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_run, "process_state", lambda: SimpleNamespace(num_processes=2))
    with run_server() as server, pytest.raises(ValueError, match="--endpoint requires a single process"):
        caption(server, photos, tmp_path / "out.jsonl")


def test_refusals_and_rejected_images_are_listed_and_asked_again(tmp_path: Path, photos: Path) -> None:
    out, flags = tmp_path / "out.jsonl", ["--concurrency", "1"]
    with run_server(faults=["", "400:image too large", *[""] * 16]) as server:
        server.answers = {"in detail": "I'm sorry, but I can't help with that."}
        assert "Failed requests: 7" in caption(server, photos, out, *flags)
        failures = read_rows(tmp_path / "out_failures.jsonl")
        assert [row["error"] for row in failures if "refusal" not in row["error"]] == ["HTTP 400: image too large"]
        assert len(failures) == 7
        assert all("long_captions" not in row for row in read_rows(out))
        server.answers = {}
        server.faults = ["400:image too large"]  # an image that is always rejected does not stop later runs
        caption(server, photos, out, *flags)
        assert server.num_requests == 6 * CAPTIONS_PER_IMAGE + 7
        assert len(read_rows(tmp_path / "out_failures.jsonl")) == 1
        caption(server, photos, out, *flags)
    assert not (tmp_path / "out_failures.jsonl").exists()
    assert sum(len(row["long_captions"]) for row in read_rows(out)) == 6


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (f"401:bad\x1b[31m key {KEY}", r"HTTP 401: bad\x1b[31m key [key]. Put the server's key"),
        ("404:no model", "HTTP 404: no model. Check --model"),
        ("redirect", "redirects to http://other.example/v1/chat/completions. Redirects are not followed"),
    ],
)
def test_rejected_first_requests_stop_the_run(
    tmp_path: Path, photos: Path, fault: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    with run_server(faults=[fault] * 99) as server, pytest.raises(captioners.EndpointError) as error:
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "2")
    assert message in str(error.value) and KEY not in str(error.value)
    assert server.num_requests <= 2


def test_rejected_image_does_not_stop_a_first_run(tmp_path: Path, photos: Path) -> None:
    with run_server(faults=["400:too narrow"] * CAPTIONS_PER_IMAGE) as server:
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "1", "--max_skipped", "1")
    assert len(read_rows(tmp_path / "out_failures.jsonl")) == CAPTIONS_PER_IMAGE
    assert server.num_requests == 6 * CAPTIONS_PER_IMAGE


def test_run_stops_if_all_images_are_rejected(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "MAX_FAILURES_IN_A_ROW", 7)
    with (
        run_server(faults=["400:this model takes no images"] * 99) as server,
        pytest.raises(captioners.EndpointError, match=r"the last 7 requests failed.*this model takes no images"),
    ):
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "1")
    assert server.num_requests == 7


def test_proxy_is_used_only_for_encrypted_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    def uses_proxy(url: str) -> bool:
        client = captioners.EndpointCaptioner(url, "tiny")._client
        return any(transport is not None for transport in client._mounts.values())

    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://proxy.example:3128")
    assert uses_proxy("https://server.example/v1")
    assert not uses_proxy("http://server.example/v1") and not uses_proxy("https://localhost/v1")


def test_key_is_sent_but_never_written(
    tmp_path: Path, photos: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(captioners.KEY_VARIABLE, KEY)
    with run_server(faults=["", *["403"] * 5], fault_rate=0.2) as server:  # these errors repeat the key
        flags = ["--retries", "0", "--concurrency", "1", "--max_skipped", "1"]
        caption(server, photos, tmp_path / "out.jsonl", *flags)
    assert server.keys == {f"Bearer {KEY}"}
    assert "[key]" in (tmp_path / "out_failures.jsonl").read_text()
    assert KEY not in "".join(capfd.readouterr())
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_run_stops_when_the_server_is_down(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "MAX_FAILURES_IN_A_ROW", 4)
    with run_server() as server:
        pass  # now, nothing listens on its port
    with pytest.raises(captioners.EndpointError, match=r"the last 4 requests failed. the connection failed"):
        caption(server, photos, tmp_path / "out.jsonl", "--retries", "1")


@pytest.mark.parametrize("fault", ["slow headers", "slow body"])
def test_timeout_limits_the_time_of_the_entire_response(tmp_path: Path, photos: Path, fault: str) -> None:
    """The server sends a byte every 50 ms, so no single read takes long."""
    out, flags = tmp_path / "out.jsonl", ["--concurrency", "1", "--timeout", "1"]
    start = time.monotonic()
    with run_server(faults=["", fault, "", fault]) as server:
        caption(server, photos, out, *flags, "--retries", "0")
        assert time.monotonic() - start < 10
        failures = read_rows(tmp_path / "out_failures.jsonl")
        assert [row["error"] for row in failures] == ["no response within 1 seconds"] * 2
        caption(server, photos, out, *flags)
    assert set(server.answered.values()) == {1} and len(server.answered) == 6 * CAPTIONS_PER_IMAGE


def test_cost_limit_stops_the_run_until_it_is_raised(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"
    flags = ["--concurrency", "1", "--price", "1000", "0"]  # an answer costs 1
    with run_server() as server:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"the captions have cost 4.00, and --max_cost is 4\."):
                caption(server, photos, out, *flags, "--max_cost", "4")
            assert server.num_requests == 4 and len(read_rows(out)) == 2
        assert re.search(r"cost +18\.00", caption(server, photos, out, *flags, "--max_cost", "18"))
        server.usage = None
        with pytest.raises(ValueError, match="does not report the number of tokens"):
            caption(server, photos, out, *flags, "--max_cost", "40", "--language", "German")


def test_schedule_limits_requests_per_minute_and_pauses() -> None:
    schedule, stopped = captioners._Schedule(600), threading.Event()
    start = time.monotonic()
    for _ in range(3):
        schedule.wait(stopped)
    assert 0.19 < time.monotonic() - start < 2
    schedule.wait(stopped)
    waiting = threading.Thread(target=schedule.wait, args=(stopped,))
    waiting.start()
    schedule.pause(0.5)  # also for a request that already waits
    start = time.monotonic()
    waiting.join()
    assert time.monotonic() - start > 0.4
    schedule.pause(60)
    stopped.set()
    with pytest.raises(captioners.StoppedError):
        schedule.wait(stopped)


def test_retry_after_can_be_seconds_or_a_date() -> None:
    def parse(value: str) -> float | None:
        return captioners._parse_retry_after(httpx.Response(429, headers={"Retry-After": value}))

    assert parse("2.5") == 2.5 and parse("99999") == captioners.MAX_RETRY_AFTER and parse("-1") is None
    assert 20 < (parse(formatdate(time.time() + 30, usegmt=True)) or 0) <= 30
    assert parse("soon") is None and parse("") is None


def test_newer_name_of_max_tokens_is_used_if_the_server_needs_it(tmp_path: Path, photos: Path) -> None:
    with run_server(delay=0.05) as server:
        server.rejected_field = "max_tokens"
        caption(server, photos, tmp_path / "out.jsonl", "--concurrency", "8")
    assert len(server.answered) == 6 * CAPTIONS_PER_IMAGE
    assert all("max_completion_tokens" in body and "max_tokens" not in body for body in server.bodies)


def test_refused_filtered_and_compressed_responses_are_not_captions() -> None:
    def parse(message: dict[str, Any], reason: str = "stop") -> Answer:
        choice = {"message": message, "finish_reason": reason}
        return captioners._parse_response(json.dumps({"choices": [choice]}).encode())

    assert parse({"content": "A dog runs."}).text == "A dog runs."
    assert "refusal" in str(parse({"content": None, "refusal": "Our policy is violated."}).error)
    assert "content filter" in str(parse({"content": "A man in a park is about to"}, "content_filter").error)
    response = httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=gzip.compress(b"x"))
    with pytest.raises(captioners._RequestError, match="compressed"):
        asyncio.run(captioners._read_limited(response))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "must be of the form http://HOST"),
        ("http://user:password@host/v1", "must not contain a user name"),
        ("https://host/v1?key=1", "must not contain a user name, a password or a query"),
    ],
)
def test_invalid_endpoints_are_rejected(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        captioners.EndpointCaptioner(url, "tiny")


def test_unencrypted_connections_to_other_machines_are_reported() -> None:
    assert len(captioners.EndpointCaptioner("http://127.0.0.1:1/v1", "tiny").describe()) == 1
    assert len(captioners.EndpointCaptioner("https://example.org/v1", "tiny").describe()) == 1
    first, second = captioners.EndpointCaptioner("http://example.org/v1", "tiny").describe()
    assert first == "Images are sent to http://example.org (model tiny)." and "not encrypted" in second


# ---- interruptions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_stores_answers_and_resumes(
    tmp_path: Path, photos: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with run_server(delay=0.05) as server:

        def interrupt() -> None:
            while server.answered.total() < 7:
                time.sleep(0.01)
            os.kill(os.getpid(), number)

        threading.Thread(target=interrupt).start()
        words = ["caption", photos, "--out", out, "--endpoint", server.url, "--model", "tiny", "--concurrency", 2]
        assert main(list(map(str, words))) == 130
        assert "Run the same command again" in capsys.readouterr().err
        num_answers = server.answered.total()
        assert 7 <= num_answers < 6 * CAPTIONS_PER_IMAGE
        rows = read_rows(out)
        assert sum(len(row["captions"]) + len(row.get("long_captions", [])) for row in rows) == num_answers
        caption(server, photos, out)
    assert server.num_requests == 6 * CAPTIONS_PER_IMAGE and set(server.answered.values()) == {1}
    assert len(read_rows(out)) == 6


def test_second_interrupt_while_an_image_is_read_does_not_wait_for_requests(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, finish = threading.Event(), threading.Event()

    def ask(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        started.set()
        finish.wait(20)
        raise StoppedError

    def prepare(self: FixedCaptioner, image: torch.Tensor) -> torch.Tensor:
        if started.wait(0.2):  # the first images fill the first batch
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return image

    monkeypatch.setattr(FixedCaptioner, "ask", ask)
    monkeypatch.setattr(FixedCaptioner, "prepare", prepare)
    start = time.monotonic()
    prompts = [Prompt("one", "short", "Describe it.")]
    with pytest.raises(KeyboardInterrupt):
        caption_run.caption_images([str(photos)], tmp_path / "out.jsonl", FixedCaptioner(), prompts, CaptionOptions())
    assert time.monotonic() - start < 10
    finish.set()


def test_killed_run_repeats_only_requests_in_flight(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"
    with run_server(delay=0.1) as server:
        words = ["caption", photos, "--out", out, "--endpoint", server.url, "--model", "tiny", "--concurrency", "2"]
        process = subprocess.Popen([sys.executable, "-m", "llm2clip", *map(str, words)])
        while server.answered.total() < 6 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        caption(server, photos, out)
    assert len(server.answered) == 6 * CAPTIONS_PER_IMAGE
    assert server.answered.total() <= 6 * CAPTIONS_PER_IMAGE + 2
    assert sum(len(row["captions"]) for row in read_rows(out)) == 12


def test_output_of_another_program_and_a_second_run_are_rejected(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("{}")
    with run_server(delay=0.2) as server:
        with pytest.raises(ValueError, match="was not written by `llm2clip caption`"):
            caption(server, photos, out)
        assert out.read_text() == "{}"
        out.unlink()
        first = threading.Thread(target=caption, args=(server, photos, out))
        first.start()
        while not server.num_requests:
            time.sleep(0.01)
        with pytest.raises(FolderInUseError, match=f"another run is writing to {tmp_path}"):
            caption(server, photos, out)
        first.join()
    assert server.num_requests == 6 * CAPTIONS_PER_IMAGE


# ---- answers and prompts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('"A dog runs."\n', "A dog runs."),
        ("<think>A dog? A cat?</think>\n\nA dog runs.", "A dog runs."),
        ("A dog? A cat?</think>A dog runs.", "A dog runs."),
        ("**Caption:** A *dog* runs.", "A *dog* runs."),
        ("# Image\n\n- A dog runs.\n- It is `brown`.", "Image A dog runs. It is brown."),
        ("A dog\x00 \x1b[31mruns\u202e.", "A dog [31mruns."),
        ("Ein Hund sagt „Wau“ und rennt.", "Ein Hund sagt „Wau“ und rennt."),
        ('"Stop" is on the "sign"', '"Stop" is on the "sign"'),
        ("A man, sorry for the dog, cannot see.", "A man, sorry for the dog, cannot see."),
    ],
)
def test_answers_are_cleaned(text: str, caption: str) -> None:
    assert clean_answer(text, truncated=False) == Answer(caption)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (" \n", "empty"),
        ("...", "empty"),
        ("I'm sorry, but I can't.", "refusal"),
        ("As an AI language model, I see a dog.", "refusal"),
        ("I cannot identify people.", "refusal"),
        ("<think>A dog? " * 3, "reasoning"),
        ("word " * 5000, "too long"),
    ],
)
def test_refusals_and_useless_answers_become_errors(text: str, error: str) -> None:
    answer = clean_answer(text, truncated=False, input_tokens=3)
    assert answer.text is None and error in str(answer.error) and answer.input_tokens == 3


@pytest.mark.parametrize("part", ["<think>", "</think>", "**a ", "`a `", "\n", " ", "- ", "a.", "#", '"', "sorry "])
def test_cleaning_hostile_answers_takes_linear_time(part: str) -> None:
    start = time.process_time()
    clean_answer(part * (99_000 // len(part)), truncated=True)
    assert time.process_time() - start < 1


def test_truncated_answers_end_with_a_complete_sentence() -> None:
    assert clean_answer("A dog runs. It is bro", truncated=True).text == "A dog runs."
    assert clean_answer("A dog that is bro", truncated=True).text is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "must map the names of prompts to their fields"),
        ("a: [", "not a valid YAML file"),
        ("A B: {kind: short, text: x}", "the name of a prompt must consist of a-z, 0-9 and _ .got 'A B'"),
        ("a: text", "prompt a: must have fields of the form `name: value`"),
        ("a: {kind: short}", "prompt a: the field text is missing"),
        ("a: {kind: short, text: x}\na: {kind: dense, text: x}", "several prompts have the name a"),
        ("a: {kind: short, text: x, tokens: 5}", "prompt a: unknown field 'tokens'; available fields: kind, text"),
        ("a: {kind: long, text: x}", "prompt a: kind must be short or dense .got 'long'"),
        ("a: {kind: short, text: 5}", "prompt a: text must be a text of 1 to 20,000 characters .got 5"),
        ("a: {kind: short, text: x, samples: 0}", "prompt a: samples must be an integer from 1 to 100 .got 0"),
        ("a: {kind: short, text: x, samples: true}", "prompt a: samples must be an integer from 1 to 100 .got True"),
        ("a: {kind: short, text: x, temperature: hot}", "prompt a: temperature must be a number from 0 to 2"),
        ("a: {kind: short, text: x, max_tokens: 1.5}", "prompt a: max_tokens must be an integer from 1 to 8192"),
        ("a: {kind: short, text: 'Say {caption}'}", "prompt a: text must be an instruction with a line without"),
    ],
)
def test_prompt_errors_name_file_prompt_and_field(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_prompts(file)
    assert str(file) in str(error.value)


def test_default_prompts_give_two_short_captions_and_a_dense_one() -> None:
    prompts = load_prompts()
    assert [(prompt.kind, prompt.samples) for prompt in prompts] == [("short", 1), ("short", 1), ("dense", 1)]
    assert {prompt.key for prompt in prompts}.isdisjoint(prompt.key for prompt in load_prompts(language="German"))
    assert {prompt.key for prompt in prompts}.isdisjoint(prompt.key for prompt in load_prompts(use_captions=True))


# ---- local models and fit --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def accept_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept the meaningless answers of random models."""

    def accept(text: str, truncated: bool, *tokens: int) -> Answer:
        return Answer(f"A dog next to {text.encode().hex()}.", None, *tokens)

    monkeypatch.setattr(captioners, "clean_answer", accept)


@pytest.mark.usefixtures("accept_all")
def test_local_captioner_answers_in_batches_as_alone(tiny_llava: Path) -> None:
    captioner = LocalCaptioner(str(tiny_llava), 4, precision="fp32")
    prompt = Prompt("a", "short", "Describe it.\nCaption: {caption}", temperature=0, max_tokens=6)
    images = torch.randint(0, 255, (3, 3, 40, 60), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    captions = ["a long caption with <image> in it", None, "short"]
    requests = [
        CaptionRequest(captioner.prepare(image), prompt, 0, text) for image, text in zip(images, captions, strict=True)
    ]
    alone = [captioner.ask([request])[0] for request in requests]
    assert captioner.ask(requests) == alone
    assert len({answer.text for answer in alone}) == 3 and all(answer.output_tokens <= 6 for answer in alone)


@pytest.mark.usefixtures("accept_all")
def test_local_model_captions_images_and_resumes(
    tmp_path: Path, photos: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_prompts(
        tmp_path / "prompts.yaml",
        one={"kind": "short", "text": "Describe.", "samples": 2, "max_tokens": 5, "temperature": 1.0},
        two={"kind": "dense", "text": "Describe all.", "max_tokens": 9},
    )
    batches = []
    ask = LocalCaptioner.ask

    def record(self: LocalCaptioner, requests: list[CaptionRequest]) -> list[Answer]:
        batches.append([request.prompt.name for request in requests])
        return ask(self, requests)

    monkeypatch.setattr(LocalCaptioner, "ask", record)
    words = ["caption", photos, "--model", tiny_llava, "--prompts", file, "--batch_size", 4]
    for _ in range(2):
        run_command(*words, "--out", tmp_path / "out.jsonl")
    assert sorted(map(tuple, batches)) == [("one",) * 4] * 3 + [("two",) * 2, ("two",) * 4]
    with closing(CaptionDatabase(tmp_path / "out.jsonl.sqlite")) as database:
        query = "SELECT substr(prompt, 1, 3), count(DISTINCT hash) FROM answers WHERE text IS NOT NULL GROUP BY 1"
        assert dict(database.connection.execute(query)) == {"one": 6, "two": 6}


def test_local_model_that_rejects_all_images_ends_the_run_with_an_error(
    tmp_path: Path, photos: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reject(*_: Any) -> None:
        raise ValueError("too narrow")

    monkeypatch.setattr(LocalCaptioner, "_generate", reject)
    with pytest.raises(TooManySkipped, match=r"6 of 6 images .* the model's processor rejects the image: too narrow"):
        run_command("caption", photos, "--model", tiny_llava, "--out", tmp_path / "out.jsonl")


@pytest.fixture
def fit_events(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace everything in `fit` but captioning. Return a list that will contain the sources and the checks' names."""
    events: list[Any] = []

    def fit(run: pipeline.Run) -> Path:
        events.append(run.sources)
        return run.model_dir

    monkeypatch.setattr(pipeline, "fit", fit)
    for module, name in ((pipeline, "load_pretrained_parts"), (pipeline, "check_encoder"), (plan, "check_resources")):
        monkeypatch.setattr(module, name, lambda *_, name=name: events.append(name) or [])
    return events


def test_fit_captions_the_images_before_training(
    tmp_path: Path, photos: Path, model_folder: Path, fit_events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    file = write_prompts(tmp_path / "prompts.yaml", one={"kind": "short", "text": "Describe it."})
    checks = ["load_pretrained_parts", "check_encoder"]
    encoders = []
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "config.json").write_text("{}")
    monkeypatch.setattr(caption_run, "score_captions", lambda *args: encoders.append(args[3].name))
    with run_server() as server:
        words = ["fit", photos, "--out", run, "--caption", server.url]
        with pytest.raises(ValueError, match="Pass the name of its model with --caption_model"):
            run_command(*words)
        words += ["--caption_model", "tiny", "--caption_prompts", file, "--caption_language", "German"]
        words += ["--caption_check", model_folder]
        with pytest.raises(ValueError, match=r"loss .*nonsense"):
            run_command(*words, "--align.loss", "nonsense")
        with pytest.raises(ValueError, match=r"with --caption, the data has only .* .got captions_de"):
            run_command(*words, "--evaluate.fields", '["captions_de", "short_captions"]')
        for flags in (["--caption_prompts", tmp_path / "no.yaml"], ["--caption_check", damaged]):
            with pytest.raises((OSError, ValueError), match=r"no\.yaml|damaged"):
                run_command(*words, *flags)
        assert server.num_requests == 0 and not run.exists()
        server.answers = {"Describe": "I'm sorry, but I can't."}
        with pytest.raises(TooManySkipped, match="6 of 6 images have no caption"):
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
    assert server.num_requests == 2 * 6  # after training has started, the captions do not change
    assert len(list(open_records(data[0]))) == 6
    assert server.bodies[0]["messages"][0]["content"][1]["text"] == "Describe it.\nAnswer in German."
    assert encoders == [str(model_folder)] * 2


@pytest.mark.parametrize("name", ["model", "prompts", "language", "check"])
def test_fit_rejects_settings_of_captions_without_captions(tmp_path: Path, photos: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"--caption_{name} requires --caption MODEL"):
        run_command("fit", photos, "--out", tmp_path / "run", f"--caption_{name}", "x")


class TrainingError(Exception):
    """Raised instead of training."""


@pytest.fixture
def fit_data(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Let `fit` stop before `tune`. Return a list that will contain its numbers of training and held-out images."""
    counts: list[tuple[int, int]] = []

    def stop(run: pipeline.Run) -> None:
        counts.append((len(run.data.train), len(run.data.held_out["captions"])))
        raise TrainingError

    monkeypatch.setattr(pipeline, "fit", stop)
    for module, name in ((pipeline, "load_pretrained_parts"), (pipeline, "check_encoder"), (plan, "check_resources")):
        monkeypatch.setattr(module, name, lambda *_: [])
    return counts


def test_fit_captions_added_images_if_no_stage_has_outputs(tmp_path: Path, fit_data: list[tuple[int, int]]) -> None:
    photos = make_photos(tmp_path / "photos", 1)
    with run_server() as server:
        words = ["fit", photos, "--out", tmp_path / "run", "--caption", server.url, "--caption_model", "tiny"]
        with pytest.raises(ValueError, match="cannot train on 0 images"):
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
        row = {"image": f"photos/{number:04}.png", "captions": ["a photo"], **splits[number % 3]}
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


@pytest.mark.usefixtures("accept_all")
def test_fit_out_of_memory_error_gives_a_command_that_continues_the_captions(
    tmp_path: Path, photos: Path, tiny_llava: Path, fit_events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {name: {"kind": "short", "text": f"Describe {name}.", "max_tokens": 5} for name in ("all", "colours")}
    file = write_prompts(tmp_path / "prompts.yaml", **prompts)
    asked = []
    generate = LocalCaptioner._generate

    def run_out_of_memory(self: LocalCaptioner, requests: list[CaptionRequest]) -> list[Answer]:
        asked.append([request.prompt.name for request in requests])
        if len(asked) == 2:
            raise torch.OutOfMemoryError
        return generate(self, requests)

    monkeypatch.setattr(LocalCaptioner, "_generate", run_out_of_memory)
    fit = ["fit", photos, "--out", tmp_path / "run", "--caption", tiny_llava, "--caption_prompts", file]
    with pytest.raises(ValueError, match="do not fit in the memory") as raised:
        run_command(*fit)
    command = re.search("Run `llm2clip (caption .*? --batch_size 8)`, and then", str(raised.value))
    assert command is not None
    run_command(*shlex.split(command[1]))
    assert asked == [["all"] * 6, ["colours"] * 6, ["colours"] * 6]
    run_command(*fit)
    assert len(asked) == 3 and fit_events[-1] == [str(tmp_path / "run/captions.jsonl")]
