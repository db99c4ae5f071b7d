"""`llm2clip runs`: states, progress and results of runs, read from their files."""

import json
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from llm2clip.cli import main
from llm2clip.reports import Table
from llm2clip.runs.output_folder import (
    RUN_LOCK,
    MetricsLog,
    hold_folder_lock,
    read_latest_metrics,
    save_or_check_config,
)
from llm2clip.tools import runs
from test_output_folder import RUN_CONFIGS

needs_lock_list = pytest.mark.skipif(not runs.LOCKS_FILE.exists(), reason="needs /proc/locks")


def make_run(folder: Path, command: str, outputs: tuple[str, ...] = ()) -> Path:
    """Create a run directory with a config, a lock that is not held, and empty outputs."""
    with hold_folder_lock(folder, RUN_LOCK):
        save_or_check_config(RUN_CONFIGS[command], folder)
    for output in outputs:
        (folder / output).parent.mkdir(parents=True, exist_ok=True)
        (folder / output).touch()
    return folder


def add_training(folder: Path, step: int, checkpoint: int = 0, steps: int = 100, seconds: float = 0.0) -> None:
    """Write metrics of a step, and a checkpoint that was saved this number of seconds earlier."""
    folder.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(folder / "metrics.jsonl")
    log.write(step - 1, loss=9.0)
    log.write(step, loss=0.1234)
    if checkpoint:
        marker = folder / f"checkpoints/checkpoint-{checkpoint}/complete"
        marker.parent.mkdir(parents=True)
        marker.write_text(json.dumps({"format_version": 1, "signature": {"steps": steps}}))
        now = time.time()
        os.utime(marker, (now, now))
        os.utime(folder / "metrics.jsonl", (now + seconds, now + seconds))


def list_rows(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the cells of each run, keyed by its path in the folder, and the lines below the table."""
    tables: list[Table] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "render_plain_text", lambda blocks, width: tables.extend(blocks) or "")
        skipped = runs.format_run_table(folder)[1:]
    rows = [dict(zip(runs.COLUMNS, row, strict=True)) for row in tables[0].rows]
    return {os.path.relpath(row["run"], folder): row for row in rows}, skipped


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a short path, so that its paths fit into the table."""
    monkeypatch.chdir(tmp_path)
    return Path("r")


@needs_lock_list
def test_runs_shows_the_progress_of_a_running_stage(folder: Path) -> None:
    run = make_run(folder / "a", "fit", ("tune/encoder", "evaluate/untrained.json"))
    add_training(run / "align", step=60, checkpoint=50, seconds=30)
    MetricsLog(run / "align/evaluations.jsonl").write(
        50, **{"captions I2T R@1": 41.26, "captions T2I R@1": 38.0, "long_captions I2T R@1": 1.0}
    )
    with hold_folder_lock(run, RUN_LOCK):
        row = list_rows(folder)[0]["a"]
    date = row.pop("last change")
    assert time.mktime(time.strptime(date, "%Y-%m-%d %H:%M:%S")) == pytest.approx(time.time() + 30, abs=60)
    assert row == {
        "run": "r/a",
        "command": "fit",
        "state": "running",
        "stage": "align",
        "step": "60 of 100",
        "loss": "0.123",
        "time left": "2 min 0 s",  # 40 steps of 3 s
        "result": "R@1: I2T 41.3, T2I 38.0",
    }
    row = list_rows(folder)[0]["a"]
    assert (row["state"], row["time left"], row["step"]) == ("interrupted", None, "60 of 100")


@needs_lock_list
def test_runs_shows_the_progress_of_llava(folder: Path) -> None:
    run = make_run(folder / "a", "llava", ("pretrain/metrics.jsonl",))
    assert list_rows(folder)[0]["a"]["step"] is None
    stage = run / "instruct"
    add_training(stage, step=60)
    marker = stage / "checkpoint-50/complete"
    marker.parent.mkdir()
    marker.write_text(json.dumps({"format_version": 1, "signature": {"batch_size": 8}}))
    (marker.parent / "trainer_state.json").write_text('{"max_steps": 64}')
    now = time.time()
    os.utime(marker, (now, now))
    os.utime(stage / "metrics.jsonl", (now + 30, now + 30))
    with hold_folder_lock(run, RUN_LOCK):
        row = list_rows(folder)[0]["a"]
    assert [row[name] for name in ("stage", "step", "loss", "time left")] == ["instruct", "60 of 64", "0.123", "12 s"]
    assert time.mktime(time.strptime(row["last change"], "%Y-%m-%d %H:%M:%S")) == pytest.approx(now + 30, abs=2)
    with (stage / "metrics.jsonl").open("a") as file:
        file.write('{"step": 64, "train_loss": 0.5}\n')  # the Trainer's summary
    row = list_rows(folder)[0]["a"]
    assert [row[name] for name in ("state", "step", "loss")] == ["interrupted", "64 of 64", "0.123"]
    (stage / "metrics.jsonl").write_text('{"step": 4, "train_loss": 0.5}\n')
    assert list_rows(folder)[0]["a"]["loss"] is None


@needs_lock_list
def test_runs_estimates_the_time_left_from_the_start_of_a_resumed_run(folder: Path) -> None:
    run = make_run(folder / "a", "align")
    add_training(run, step=60, checkpoint=50)
    now = time.time()
    os.utime(run / "checkpoints/checkpoint-50/complete", (now - 1e6, now - 1e6))  # saved before the interruption
    os.utime(run / "config.yaml", (now - 20, now - 20))
    os.utime(run / "metrics.jsonl", (now, now))
    with hold_folder_lock(run, RUN_LOCK):
        assert list_rows(folder)[0]["a"]["time left"] == "1 min 20 s"
        os.utime(run / "metrics.jsonl", (now - 60, now - 60))  # not written since the run was resumed
        assert list_rows(folder)[0]["a"]["time left"] is None
        add_training(run / "none", step=50)
        (run / "none/metrics.jsonl").replace(run / "metrics.jsonl")  # no step since the checkpoint
        assert list_rows(folder)[0]["a"]["time left"] is None


@needs_lock_list
@pytest.mark.parametrize(
    ("command", "outputs", "stage"),
    [
        ("fit", (), "tune"),
        ("fit", ("tune/encoder",), "embed"),
        ("fit", ("tune/encoder", "evaluate/untrained.json"), "align"),
        ("fit", ("tune/encoder", "evaluate/untrained.json", "model"), "evaluate"),
        ("fit", ("tune/encoder", "evaluate/untrained.json", "model", "report.html"), None),
        ("tune", (), "tune"),
        ("tune", ("encoder",), None),
        ("align", (), "align"),
        ("align", ("model",), None),
        ("distill", (), "embed"),
        ("distill", ("metrics.jsonl",), "distill"),
        ("distill", ("metrics.jsonl", "model"), "evaluate"),
        ("distill", ("metrics.jsonl", "model", "report.html"), None),
        ("fit", ("tune/encoder", "model", "report.html"), None),
        ("llava", (), "pretrain"),
        ("llava", ("pretrain/metrics.jsonl",), "pretrain"),
        ("llava", ("pretrain/metrics.jsonl", "instruct/metrics.jsonl"), "instruct"),
        ("llava", ("instruct/metrics.jsonl",), "instruct"),
        ("llava", ("pretrain/metrics.jsonl", "instruct/metrics.jsonl", "model"), None),
        ("llava", ("pretrain/metrics.jsonl", "model"), None),
    ],
)
def test_runs_finds_the_stage_of_a_run(command: str, outputs: tuple[str, ...], stage: str | None, folder: Path) -> None:
    make_run(folder / "a", command, outputs)
    row = list_rows(folder)[0]["a"]
    assert (row["command"], row["stage"]) == (command, stage)
    assert row["state"] == ("interrupted" if stage else "finished")


@needs_lock_list
def test_runs_lists_stores_indexes_and_captions(folder: Path) -> None:
    run = make_run(folder / "run", "fit")
    for store in (folder / "store", run / "store"):
        store.mkdir(parents=True)
        (store / "manifest.json").write_text('{"captions": 1234}')
    (folder / "store" / RUN_LOCK).touch()  # `embed` has a lock of its own
    for file in ("index/index.sqlite", "captions.jsonl.sqlite", ".venv/index.sqlite"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    (folder / "store/.incoming").mkdir()
    rows, skipped = list_rows(folder)
    assert not skipped
    assert {name: (row["command"], row["state"]) for name, row in rows.items()} == {
        "run": ("fit", "interrupted"),
        "store": ("embed", "interrupted"),
        "index": ("index", None),
        "captions.jsonl": ("caption", None),
    }
    assert rows["store"]["result"] == "1,234 captions"
    (folder / "store/.incoming").rmdir()
    with hold_folder_lock(folder / "index"), hold_folder_lock(folder, ".captions.jsonl.lock"):
        rows = list_rows(folder)[0]
    assert {name: row["state"] for name, row in rows.items()} == {
        "run": "interrupted", "store": "finished", "index": "running", "captions.jsonl": "running"
    }  # fmt: skip


def test_runs_without_a_list_of_locks_does_not_claim_that_a_run_was_interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "LOCKS_FILE", Path("none"))
    make_run(folder / "a", "tune")
    make_run(folder / "b", "tune", ("encoder",))
    rows, _ = list_rows(folder)
    assert (rows["a"]["state"], rows["b"]["state"]) == ("unfinished", "finished")


@needs_lock_list
def test_runs_shows_the_latest_change_last_and_changes_nothing(folder: Path) -> None:
    for number, name in enumerate("bca"):
        run = make_run(folder / name, "tune")
        for path in (run / "config.yaml", run):
            os.utime(path, (1e9 + 100 * number, 1e9 + 100 * number))
    (folder / "captions.jsonl.sqlite").touch()

    def describe_files() -> dict[Path, tuple[float, int]]:
        return {path: (path.stat().st_mtime, path.stat().st_size) for path in folder.rglob("*")}

    before = describe_files()
    assert list(list_rows(folder)[0]) == ["b", "c", "a", "captions.jsonl"]
    assert describe_files() == before


@needs_lock_list
def test_runs_names_damaged_and_foreign_files_and_lists_the_others(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(folder / "good", "tune")
    add_training(run, step=7)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the run was killed while it was writing
    (folder / "good/config.yaml").with_name("manifest.json").write_text("{")
    files = {
        "foreign/config.yaml": b"model: x\nlr: 1",
        "binary/config.yaml": bytes(range(256)),
        "store/manifest.json": b'{"shards": [',
        "list/manifest.json": b"[]",
        "nested/manifest.json": b"[" * 100_000,
    }
    for name, content in files.items():
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(content)
        (folder / name).with_name(RUN_LOCK).touch()
    wrong = make_run(folder / "wrong", "align")
    add_training(wrong, step=7, checkpoint=5)
    (wrong / "checkpoints/checkpoint-5/complete").write_text("[1]")
    (folder / "folder/config.yaml").mkdir(parents=True)
    os.mkfifo(make_run(folder / "pipe", "tune") / "metrics.jsonl")
    (folder / "fifo").mkdir()
    os.mkfifo(folder / "fifo/config.yaml")
    assert main(["runs", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "r/good" in output and " 7 " in output and "r/pipe" in output
    skipped = [line for line in output.splitlines() if line.startswith("Skipped ")]
    for name in (*files, "good/manifest.json", "wrong/config.yaml", "fifo/config.yaml"):
        assert sum(f"r/{name}:" in line for line in skipped) == 1, name
    assert len(skipped) == len(files) + 3


def test_runs_of_an_empty_or_missing_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"No runs in {tmp_path}\n"
    assert main(["runs", str(tmp_path / "none")]) == 1
    assert "no such folder" in capsys.readouterr().err


def test_runs_prints_names_that_are_not_unicode(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = os.fsdecode(b"\xff\x1b[31m")
    make_run(folder / name, "tune")
    (folder / f"{name}2").mkdir()
    (folder / f"{name}2/config.yaml").touch()
    assert main(["runs", str(folder)]) == 0
    assert capsys.readouterr().out.count("\\udcff\\x1b[31m") == 2


def test_read_latest_metrics_reads_only_the_end_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}, "loss": 0.{step % 10}}}\n' for step in range(100_000)]
    file.write_text("".join(lines) + '{"step": 100000, "train_loss": 0.5}\n{"step": ')
    tracemalloc.start()
    metrics = read_latest_metrics(file)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert metrics == {"step": 100_000, "loss": 0.9, "train_loss": 0.5}
    assert peak < 1_000_000 < file.stat().st_size
    file.write_text("")
    assert read_latest_metrics(file) == read_latest_metrics(tmp_path / "none") == {}
