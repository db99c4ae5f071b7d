"""Tests of `llm2clip caption`: images that are read, records that are written, resuming, ranks, and `fit --caption`."""

import hashlib
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from caption_fixtures import (
    FAULTS,
    FixedCaptioner,
    caption,
    make_photos,
    read_rows,
    run_command,
    run_server,
    write_prompts,
)
from conftest import run_distributed, start_process
from llm2clip.caption import captioners
from llm2clip.caption import files as caption_files
from llm2clip.caption import run as caption_run
from llm2clip.caption.answers import Answer, CaptioningStoppedError, CaptionRequest
from llm2clip.caption.database import CaptionDatabase, ImageRow, StoredAnswer
from llm2clip.caption.options import CaptionOptions, Prompt
from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage, ImageRef
from llm2clip.data.images import load_image
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import TooManySkippedError
from llm2clip.runs import ranks
from llm2clip.runs.output_folder import FolderInUseError
from llm2clip.runs.ranks import process_state

KEY = "sk-very-secret"
CAPTIONS_PER_IMAGE = 3


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captioners, "FIRST_DELAY", 0.01)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 6)


def caption_photos(photos: Path, open_encoder: Any = None, max_skipped: float = 0.05) -> list[str]:
    """Write short captions to out.jsonl next to a folder of photos."""
    prompts, options = [Prompt("one", "short", "Describe it.")], CaptionOptions(max_skipped=max_skipped)
    out = photos.with_name("out.jsonl")
    return caption_run.caption_images([str(photos)], out, FixedCaptioner(), prompts, options, open_encoder)


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


def test_copies_of_images_never_follow_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_files.secrets, "token_hex", lambda size: "0" * 2 * size)
    data = (make_photos(tmp_path / "photos", 1) / "0000.png").read_bytes()
    output, target = caption_files.CaptionOutputPaths(tmp_path / "out.jsonl"), tmp_path / "target"
    output.images.mkdir()
    (output.images / f".{'0' * 16}.part").symlink_to(target)  # its real name cannot be guessed
    with pytest.raises(FileExistsError):
        caption_files._copy_image(data, output)
    assert not target.exists()


def test_unreadable_images_are_skipped_and_listed(tmp_path: Path, photos: Path) -> None:
    data = (photos / "0000.png").read_bytes()
    (photos / "bad.png").write_bytes(data[:60] + bytes(20) + data[80:])  # the header is valid, but not the pixels
    (photos / "worse.png").write_bytes(b"text")
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        with pytest.raises(TooManySkippedError, match=r"1 of 8 rows skipped .unreadable image"):
            caption(server, photos, out, "--max_skipped", "0.1")
        assert server.num_requests == 0
        with pytest.raises(TooManySkippedError, match=r"no caption for 1 of 7 images .* 3 requests: unreadable image"):
            caption(server, photos, out, "--max_skipped", "0.13")
        caption(server, photos, out, "--max_skipped", "0.15")
    assert server.num_requests == 6 * CAPTIONS_PER_IMAGE
    assert len(read_rows(out)) == 6
    assert [Path(row["file"]).name for row in read_rows(tmp_path / "out_skipped.jsonl")] == ["worse.png"]
    assert [row["image"] for row in read_rows(tmp_path / "out_failures.jsonl")] == ["photos/bad.png"] * 3


def test_each_rank_captions_its_share_and_a_stopped_rank_leaves_the_run_incomplete(tmp_path: Path) -> None:
    shared, stopped = tmp_path / "shared", tmp_path / "stopped"
    make_photos(stopped / "photos", 12)
    for file in sorted(make_photos(shared / "photos", 10).iterdir())[6:]:  # rank 0 gets one of these corrupt images
        data = file.read_bytes()
        file.with_name(f"bad{file.name}").write_bytes(data[:60] + bytes(20) + data[80:])
    run_distributed(2, _caption_on_two_ranks, shared, stopped)
    assert len(read_rows(shared / "out.jsonl")) == 10
    failures = read_rows(shared / "out_failures.jsonl")
    assert [row["image"] for row in failures] == [f"photos/bad{number:04}.png" for number in range(6, 10)]
    assert sorted(file.name for file in shared.glob("opened*")) == ["opened0"]
    num_requests = [int((shared / f"requests{rank}").read_text()) for rank in range(2)]
    assert sum(num_requests) == 10 and all(num_requests)

    num_records = len(read_rows(stopped / "out.jsonl"))
    message = (stopped / "error").read_text()
    assert 0 < num_records < 12 and f"not been requested: {12 - num_records}." in message
    assert "run the same command again" in message
    assert not list(stopped.glob("opened*"))  # captions are compared when all of them have been requested
    _caption_on_rank(stopped)  # a single process requests the missing captions of both ranks
    assert len(read_rows(stopped / "out.jsonl")) == 12


def _caption_on_two_ranks(shared: Path, stopped: Path) -> None:
    _caption_on_rank(shared)
    _stop_second_rank(stopped)


def _caption_on_rank(folder: Path) -> None:
    def open_encoder() -> Any:
        (folder / f"opened{process_state().process_index}").touch()
        return SimpleNamespace(name="encoder")

    num_requests = 0
    generate_answers = FixedCaptioner.generate_answers

    def count(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        nonlocal num_requests
        num_requests += len(requests)
        return generate_answers(self, requests)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(caption_run, "score_captions", lambda *_: None)
        patch.setattr(FixedCaptioner, "generate_answers", count)
        caption_photos(folder / "photos", open_encoder=open_encoder, max_skipped=0.5)
    (folder / f"requests{process_state().process_index}").write_text(str(num_requests))


def _stop_second_rank(folder: Path) -> None:
    """Caption images on two ranks, of which only the second one receives a signal to stop."""
    if process_state().is_main_process:
        with pytest.raises(ValueError, match="another process was stopped") as error:
            _caption_on_rank(folder)
        (folder / "error").write_text(str(error.value))
        ranks.wait_for_everyone()
        return

    def stop(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
        raise CaptioningStoppedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FixedCaptioner, "generate_answers", stop)
        _caption_on_rank(folder)


def test_failed_requests_of_too_many_images_end_the_run_with_an_error(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    with run_server(faults=["", *["500:no memory"] * 16, "503"]) as server:
        words = ["caption", photos, "--out", out, "--endpoint", server.url, "--model", "tiny"]
        words += ["--concurrency", 1, "--retries", 0]
        assert main(list(map(str, words))) == 1
        message = capsys.readouterr().err
        assert "no caption for 5 of 6 images because requests failed, over the limit of 5.0%" in message
        assert "Most common reason, for 16 requests: HTTP 500: no memory" in message
        assert "run the same command again" in message
        assert len(read_rows(out)) == 1 and len(read_rows(tmp_path / "out_failures.jsonl")) == 17
        assert main(list(map(str, words))) == 0
    assert len(read_rows(out)) == 6


def test_run_without_any_accepted_caption_ends_with_an_error(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"
    with run_server() as server:
        server.answers = {"": "Dog."}  # too short
        with pytest.raises(ValueError, match=r"no image has an accepted caption.* quality control: 6") as error:
            caption(server, photos, out, "--max_skipped", 1)
    assert str(tmp_path / "out_report.html") in str(error.value)


def test_images_with_only_rejected_captions_are_reported(tmp_path: Path, photos: Path) -> None:
    def generate_answers(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        numbers = [int(request.image.sum()) for request in requests]
        return [Answer("Dog." if number in rejected else f"A dog runs over meadow {number}.") for number in numbers]

    images = [FileImage(str(file)) for file in sorted(photos.iterdir())]
    rejected = [int(load_image(image).sum()) for image in images[:2]]
    warning = "Warning: no caption for 2 of 6 images, because quality control"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedCaptioner, "generate_answers", generate_answers)
        for max_skipped in (0.3, 0.35):
            lines = caption_photos(photos, max_skipped=max_skipped)
            assert (warning in "\n".join(lines)) == (max_skipped < 2 / 6)
            assert len(read_rows(tmp_path / "out.jsonl")) == 4


def test_answers_beyond_the_number_of_samples_do_not_count(tmp_path: Path) -> None:
    prompt = Prompt("one", "short", "Describe it.", samples=1)

    def make_answer(image: str, sample: int, text: str | None) -> StoredAnswer:
        error = None if text else f"error of {image}"
        return StoredAnswer(image, prompt.key, sample, "tiny", text, error, temperature=0.7, date="2026-11-29")

    with closing(CaptionDatabase(tmp_path / "out.jsonl.sqlite")) as database:
        database.replace_image_rows(ImageRow(number, name, name, {}) for number, name in enumerate("ab"))
        database.add_answers([make_answer("a", 0, None), make_answer("a", 1, "A dog runs.")])
        database.add_answers([make_answer("b", 0, "A dog runs."), make_answer("b", 1, None)])
        for samples, num_failed, num_errors in ((1, 1, 1), (2, 0, 2)):
            prompts = [replace(prompt, samples=samples)]
            assert database.count_images_without_caption("tiny", prompts) == (num_failed, 0)
            assert [number for _, number, _ in database.count_errors_by_reason("tiny", prompts, limit=9)] == [
                1
            ] * num_errors


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
        with pytest.raises(ValueError, match="is also the source"):  # a run never reads its own output
            caption(server, first, first)
        with pytest.raises(ValueError, match=r"there are no images to caption: .*captions_images: not read \(written"):
            caption(server, photos / "captions_images", tmp_path / "d.jsonl")
    assert f"{first} and 1 more: not read (written by `llm2clip caption`)" in lines
    rows = read_rows(second)
    assert len(rows) == len(read_rows(first)) == 8
    assert all(len(row["captions"]) == 2 and "short_captions" not in row for row in rows)
    assert all(len(row["captions"]) == len(row["short_captions"]) == 2 for row in read_rows(tmp_path / "c.jsonl"))


def test_photos_in_the_folder_of_copied_images_are_captioned(tmp_path: Path) -> None:
    photos = make_photos(tmp_path / "out_images", 6)
    with run_server() as server:
        caption(server, photos, tmp_path / "out.jsonl")
    assert [row["image"] for row in read_rows(tmp_path / "out.jsonl")] == [f"out_images/000{n}.png" for n in range(6)]


def test_photos_named_by_their_hashes_are_captioned(tmp_path: Path) -> None:
    photos, out = make_photos(tmp_path / "train_images", 2), tmp_path / "captions.jsonl"
    for file in photos.glob("*.png"):
        file.rename(file.with_stem(hashlib.sha256(file.read_bytes()).hexdigest()))
    with run_server() as server:
        lines = caption(server, photos, out)
    assert len(read_rows(out)) == 2 and "not read" not in lines


def test_each_record_without_an_image_counts_as_skipped(tmp_path: Path, photos: Path) -> None:
    source, out = tmp_path / "source.jsonl", tmp_path / "out.jsonl"
    rows = [{"image": f"photos/000{n}.png", "captions": ["a dog"]} for n in range(6)]
    rows += [{"captions": [f"text {n}"]} for n in range(4)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with run_server() as server:
        with pytest.raises(TooManySkippedError, match=r"4 of 10 rows skipped .no image: 4"):
            caption(server, source, out, "--max_skipped", "0.39")
        assert server.num_requests == 0
        assert "4 of 10 rows skipped (no image: 4)" in caption(server, source, out, "--max_skipped", "0.4")
    assert [row["row"] for row in read_rows(tmp_path / "out_skipped.jsonl")] == [6, 7, 8, 9]


def test_captions_are_written_before_the_model_of_check_is_opened(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"

    def open_encoder() -> Any:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError):
        caption_photos(photos, open_encoder=open_encoder)
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
    with pytest.raises(ValueError, match=r"has format version 2, but.* version 4\. Use another --out, or delete this"):
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
        lines = caption(server, photos, out, *flags)
    assert re.search(r"input tokens +24,000", lines)  # also those of the refusals
    assert not (tmp_path / "out_failures.jsonl").exists()
    assert sum(len(row["long_captions"]) for row in read_rows(out)) == 6


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
    photos: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    # Programs that a shell has started in the background ignore this signal.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, previous))
    started, finish, numbers = threading.Event(), threading.Event(), itertools.count()

    def generate_answers(self: FixedCaptioner, requests: Sequence[CaptionRequest]) -> list[Answer]:
        started.set()
        finish.wait(20)
        raise CaptioningStoppedError

    def prepare_image(self: FixedCaptioner, image: torch.Tensor) -> torch.Tensor:
        if next(numbers) == FixedCaptioner.batch_size:  # the earlier images fill the first batch
            assert started.wait(20)
            signal.raise_signal(signal.SIGINT)
            while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # the run handles the first signal
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)
        return image

    monkeypatch.setattr(FixedCaptioner, "generate_answers", generate_answers)
    monkeypatch.setattr(FixedCaptioner, "prepare_image", prepare_image)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        caption_photos(photos)
    assert time.monotonic() - start < 10
    finish.set()


def test_killed_run_repeats_only_requests_in_flight(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out.jsonl"
    with run_server(delay=0.1) as server:
        words = ["caption", photos, "--out", out, "--endpoint", server.url, "--model", "tiny", "--concurrency", "2"]
        process = start_process(run_command, *words)
        while server.answered.total() < 6 and process.is_alive():
            time.sleep(0.01)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
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


@pytest.mark.parametrize("package", ["httpx", "py3langid"])
def test_run_captioning_without_the_extra_names_it_before_the_first_request(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "llm2clip.caption.captioners", None)  # it cannot be imported without httpx
    spec = importlib.util.find_spec("llm2clip.caption.run")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(ModuleNotFoundError, match=rf"\({package}\)\. Run pip install 'llm2clip\[caption\]'"):
        module.run_captioning([str(tmp_path)], tmp_path / "c.jsonl", "m", CaptionOptions())
