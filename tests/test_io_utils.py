"""Atomic writes, and readers whose errors name the file and line."""

import errno
import json
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from llm2clip import io_utils
from llm2clip.io_utils import (
    DataFormatError,
    MissingFileError,
    atomic_dir,
    atomic_path,
    atomic_write_text,
    find_first_existing,
    read_json,
    read_jsonl,
    read_lines,
)
from llm2clip.runs.checkpoint import CheckpointManager, TrainingStateMixin, save_training_state
from llm2clip.runs.output_folder import MetricsLog


def test_read_jsonl_splits_at_newlines_only(tmp_path: Path) -> None:
    caption = "one\u2028two\x85three\x0cfour"  # str.splitlines would split here
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"caption": caption}, ensure_ascii=False) + "\n\n" + '{"caption": "last"}', "utf-8")
    assert list(read_jsonl(file)) == [(1, {"caption": caption}), (3, {"caption": "last"})]
    assert len(read_lines(file)) == 2


@pytest.mark.parametrize(("line", "message"), [("{", "line 2: not JSON"), ("[1]", "line 2: not a JSON object")])
def test_readers_name_the_invalid_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + line, encoding="utf-8")
    with pytest.raises(DataFormatError, match=message):
        list(read_jsonl(file))
    with pytest.raises(DataFormatError, match=r"a\.jsonl: not JSON"):
        read_json(file)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_read_lines_detects_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("a dog\n\n犬\n".encode(encoding))
    assert read_lines(tmp_path / "a.txt") == ["a dog", "犬"]


def test_read_lines_rejects_binary_files(tmp_path: Path) -> None:
    for data, message in ((b"a dog\nb\0", "line 2: not text"), ("犬".encode("utf-16")[:-1], "not UTF-16 ")):
        (tmp_path / "a.txt").write_bytes(data)
        with pytest.raises(DataFormatError, match=rf"a\.txt.*{message}"):
            read_lines(tmp_path / "a.txt")


def test_readers_reject_files_that_are_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xff\xfe\xff")
    for read in (read_lines, read_json, lambda f: list(read_jsonl(f))):
        with pytest.raises(DataFormatError, match=r"a\.jsonl"):
            read(file)


def test_files_and_folders_appear_complete_or_not_at_all(tmp_path: Path) -> None:
    file, folder = tmp_path / "new" / "a.npy", tmp_path / "new" / "model"
    atomic_write_text(file, "größer")
    assert file.read_bytes() == "größer".encode()
    with pytest.raises(UnicodeEncodeError):
        atomic_write_text(file, "half\ud800")
    with pytest.raises(RuntimeError), atomic_dir(folder) as temporary:
        (temporary / "part").touch()
        raise RuntimeError
    assert list(file.parent.iterdir()) == [file] and file.read_bytes() == "größer".encode()
    with atomic_dir(folder) as temporary, atomic_path(file) as temporary_file:
        (temporary / "part").write_text("x")
        temporary_file.write_text("new")
        assert not folder.exists() and file.read_text() == "größer" and temporary_file.suffix == ".npy"
    assert [path.name for path in folder.iterdir()] == ["part"] and file.read_text() == "new"
    assert find_first_existing(file.parent, "b", "model") == folder
    with pytest.raises(MissingFileError, match="has no b or c"):
        find_first_existing(file.parent, "b", "c")


def test_leftovers_of_killed_processes_are_removed(tmp_path: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from llm2clip.io_utils import atomic_dir, atomic_path
with atomic_dir(sys.argv[1] + "/model") as folder, atomic_path(sys.argv[1] + "/a [1].txt") as file:
    (folder / "weights").write_text("half")
    file.write_text("half")
    print("ready", flush=True)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), 9)
    sys.stdin.read()
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(io_utils.__file__).parents[1])}

    def start(mode: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", script, str(tmp_path), mode]
        process = subprocess.Popen(command, env=environment, stdin=PIPE, stdout=PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    running = start("running")
    in_use = {path.name for path in tmp_path.iterdir()}
    start("killed").wait()
    (tmp_path / ".model.part").touch()  # not the name of a temporary folder
    assert len(list(tmp_path.iterdir())) == 5
    with atomic_dir(tmp_path / "model"), atomic_path(tmp_path / "a [1].txt") as file:
        file.touch()
    assert {path.name for path in tmp_path.iterdir()} == {*in_use, ".model.part", "model", "a [1].txt"}
    running.communicate()
    assert running.returncode == 0  # its temporary files were not removed


def test_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    """safetensors creates files that only the current user can read."""
    old = os.umask(0o027)
    try:
        with atomic_dir(tmp_path / "model") as folder:
            (folder / "text").mkdir()
            for file in (folder / "model.safetensors", folder / "text/model.safetensors"):
                save_file({"a": torch.zeros(1)}, file)
        with atomic_path(tmp_path / "model/best.safetensors") as file:
            save_file({"a": torch.zeros(1)}, file)
        checkpoints = CheckpointManager(tmp_path / "checkpoints")
        checkpoints.get_checkpoint_path(1).mkdir(parents=True)
        save_file({"a": torch.zeros(1)}, checkpoints.get_checkpoint_path(1) / "state.safetensors")
        checkpoints.commit(1)
    finally:
        os.umask(old)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_full_disk_during_training_is_an_error_with_the_path(tmp_path: Path) -> None:
    class FailingTrainer:
        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Trainer(TrainingStateMixin, FailingTrainer):
        args, state = SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=3)

    with pytest.raises(OSError, match=r"cannot write .*/checkpoint-3: No space left on device \(free space: "):
        Trainer()._save_checkpoint(None, None)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*/metrics.jsonl: No space left on device \(free space: "):
        log.write(1, loss=0.5)


@pytest.mark.parametrize("writer", ["file", "folder", "checkpoint"])
def test_full_disk_is_an_error_with_path_and_free_space(writer: str, tmp_path: Path) -> None:
    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*/out.*: File too large \(free space: [\d.]+ GB\)"):
            if writer == "file":
                with atomic_path(tmp_path / "out") as path:
                    save_file(model.state_dict(), path)
            elif writer == "folder":
                with atomic_dir(tmp_path / "out") as path:
                    save_file(model.state_dict(), path / "model.safetensors")
            else:
                save_training_state(tmp_path / "out", model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_files_and_folders_are_flushed_before_they_are_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a folder or file could be empty or incomplete after a power failure although it has its final name."""
    events: list[tuple[str, int]] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def record_replace(path: Path, target: Path) -> Path:
        events.append(("rename", path.stat().st_ino))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    with atomic_dir(tmp_path / "model") as folder:
        (folder / "text" / "tokenizer").mkdir(parents=True)
        (folder / "text" / "tokenizer" / "vocabulary").write_text("x")
    with atomic_path(tmp_path / "file") as file:
        file.write_text("x")
    model, parent = tmp_path / "model", ("fsync", tmp_path.stat().st_ino)
    written = [model, model / "text", model / "text/tokenizer", model / "text/tokenizer/vocabulary"]
    assert sorted(events[:4]) == sorted(("fsync", path.stat().st_ino) for path in written)
    assert events[4:6] == [("rename", model.stat().st_ino), parent]
    inode = (tmp_path / "file").stat().st_ino
    assert events[6:] == [("fsync", inode), ("rename", inode), parent]
