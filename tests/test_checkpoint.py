"""Checkpoints: complete or ignored, exact training state without pickle, and the metrics log of a resumed run."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm2clip.runs import checkpoint as checkpoint_module
from llm2clip.runs.checkpoint import CheckpointManager, load_training_state, save_training_state
from llm2clip.runs.output_folder import FormatVersionError, MetricsLog, find_latest_checkpoint, read_metrics


def make_checkpoints(folder: Path, complete: tuple[int, ...], incomplete: tuple[int, ...] = ()) -> None:
    """Save checkpoints that contain a file of their step."""
    checkpoints = CheckpointManager(folder)
    checkpoints.check_signature({"steps": 20, "images per step": 6})
    for step in (*complete, *incomplete):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "weights").write_text(f"weights of step {step}")
    for step in complete:
        checkpoints.commit(step)


def test_checkpoints_resume_from_the_latest_complete_one(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, complete=(5, 10), incomplete=(15,))
    (tmp_path / "checkpoint-note").mkdir()
    checkpoints = CheckpointManager(tmp_path)
    assert checkpoints.latest == tmp_path / "checkpoint-10" and checkpoints.step == 10
    assert not (tmp_path / "checkpoint-15").exists() and (tmp_path / "checkpoint-note").exists()
    new_run = CheckpointManager(tmp_path / "new run")
    assert new_run.latest is None and new_run.step == 0


def test_checkpoints_reject_another_signature(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, complete=(10,))
    with pytest.raises(ValueError, match=r"Cannot resume from .*checkpoint-10: steps: 20 saved, 5 now"):
        CheckpointManager(tmp_path).check_signature({"steps": 5})


def test_checkpoints_commit_marks_and_prunes(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path)
    for step in (2, 4, 10):
        checkpoints.get_checkpoint_path(step).mkdir()
        assert find_latest_checkpoint(tmp_path) != checkpoints.get_checkpoint_path(step)
        checkpoints.commit(step)
        assert find_latest_checkpoint(tmp_path) == checkpoints.get_checkpoint_path(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-4"]


@pytest.mark.parametrize("ranks", [1, 2, 6])
def test_resumed_run_keeps_its_items_per_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    make_checkpoints(tmp_path, complete=(5,))
    set_ranks(monkeypatch, ranks)
    assert CheckpointManager(tmp_path).get_saved_items_per_step("images per step") == 6
    line = f"Number of processes: {ranks} (was 1). Resuming from step 5 with 6 images per step, as before"
    assert (line in capsys.readouterr().out) == (ranks > 1)
    assert CheckpointManager(tmp_path / "new run").get_saved_items_per_step("images per step") is None


def test_items_per_step_must_be_divisible_by_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoints(tmp_path, complete=(5,))
    set_ranks(monkeypatch, 4)
    message = r"checkpoint-5 with 4 processes: .* 6 images per step, .* not divisible by 4\. Use .* 6: 1, 2, 3, 6$"
    with pytest.raises(ValueError, match=message):
        CheckpointManager(tmp_path).get_saved_items_per_step("images per step")


def set_ranks(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Make this process the main process of several ranks."""
    state = SimpleNamespace(num_processes=ranks, is_main_process=True)
    monkeypatch.setattr(checkpoint_module, "process_state", lambda: state)
    monkeypatch.setattr(checkpoint_module, "broadcast_object_list", lambda objects: objects)


@pytest.mark.parametrize("marker", [{}, {"format_version": 9}])
def test_checkpoints_of_another_format_version_are_rejected(marker: dict[str, int], tmp_path: Path) -> None:
    make_checkpoints(tmp_path, complete=(5,))
    (tmp_path / "checkpoint-5/complete").write_text(json.dumps(marker))
    with pytest.raises(
        FormatVersionError, match=r"checkpoint-5/complete has .*format version.*, but.* version 1\. (Delete|Update) "
    ):
        CheckpointManager(tmp_path)


def test_commit_does_not_mark_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CheckpointManager(tmp_path).commit(5)
    assert not (tmp_path / "checkpoint-5").exists()


@pytest.mark.parametrize(
    ("file", "content", "damage"),
    [
        ("weights", "weights of", "weights has 10 bytes instead of 18"),
        ("weights", None, "weights is missing"),
        ("complete", "", "complete is not valid JSON"),
    ],
)
def test_checkpoints_resume_before_a_damaged_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, content: str | None, damage: str
) -> None:
    make_checkpoints(tmp_path, complete=(5, 10))

    def damage_checkpoint(step: int) -> None:
        (tmp_path / f"checkpoint-{step}" / file).unlink()
        if content is not None:
            (tmp_path / f"checkpoint-{step}" / file).write_text(content)

    damage_checkpoint(10)
    checkpoints = CheckpointManager(tmp_path)
    assert checkpoints.latest == tmp_path / "checkpoint-5" and checkpoints.step == 5
    assert (tmp_path / "checkpoint-10.damaged").is_dir() and not (tmp_path / "checkpoint-10").exists()
    assert f"checkpoint-10 is corrupt ({damage})" in capsys.readouterr().out
    damage_checkpoint(5)
    for _ in range(2):  # nothing is renamed, so the damage may be temporary
        with pytest.raises(ValueError, match=r"All checkpoints in .* are corrupt \(checkpoint-5: .* delete .* start"):
            CheckpointManager(tmp_path)
    assert (tmp_path / "checkpoint-5").is_dir()


def test_metrics_log_drops_repeated_steps_and_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(1, 4):
        log.write(step, loss=float(step))
    with path.open("ab") as file:
        file.write(b'\0\0\0\xff\n{"step": 4, "lo\n[4]\n{"step": 5, "loss": 5.0}\n{"step": 6, "lo')  # cut off by a kill
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 5]
    MetricsLog(path, resume_step=2).write(3, loss=0.0)
    assert [line["loss"] for line in read_metrics(path)] == [1.0, 2.0, 0.0]


# ---- training state --------------------------------------------------------------------------------------------------


class Run:
    """A training run of a small model with a frozen layer, batch norm, a gradient scaler and a schedule."""

    def __init__(self, hidden: int = 5) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 1))
        self.model[0].requires_grad_(False)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW([{"params": trained[:1]}, {"params": trained[1:], "lr": 0.1}], lr=0.3)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)

    def train(self, first_step: int, last_step: int) -> None:
        for step in range(first_step, last_step):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            self.scaler.scale((self.model(x) - x.sum(-1, keepdim=True)).square().mean()).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.schedule.step()

    def parts(self) -> tuple[Any, ...]:
        return self.model, self.optimizer, self.schedule, self.scaler


@pytest.mark.parametrize("max_file_bytes", [2**30, 40])
def test_loaded_state_continues_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_file_bytes: int) -> None:
    monkeypatch.setattr(checkpoint_module, "MAX_FILE_BYTES", max_file_bytes)
    uninterrupted, interrupted, resumed = Run(), Run(), Run()
    uninterrupted.train(0, 8)
    interrupted.train(0, 4)
    save_training_state(tmp_path / "state", *interrupted.parts())
    assert (len(list((tmp_path / "state").glob("*.safetensors"))) > 3) == (max_file_bytes == 40)
    load_training_state(tmp_path / "state", *resumed.parts())
    assert resumed.scaler.state_dict() == interrupted.scaler.state_dict()
    resumed.train(4, 8)
    for (name, expected), tensor in zip(
        uninterrupted.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(expected, tensor), name
    assert uninterrupted.schedule.get_last_lr() == resumed.schedule.get_last_lr()
    assert uninterrupted.scaler.get_scale() == resumed.scaler.get_scale() == 2.0 * 2**2  # grown in steps 3 and 6


def test_frozen_weights_are_not_saved(tmp_path: Path) -> None:
    run = Run()
    run.train(0, 1)
    save_training_state(tmp_path, *run.parts())
    names = load_file(tmp_path / "state-1.safetensors").keys()
    trained = ["1.weight", "1.bias", "2.weight", "2.bias"]
    weights = {f"model/{name}" for name in [*trained, "1.running_mean", "1.running_var", "1.num_batches_tracked"]}
    assert names == weights | {
        f"optimizer/{name}/{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")
    }


def test_state_of_other_weights_is_rejected(tmp_path: Path) -> None:
    run, other = Run(), Run()
    save_training_state(tmp_path, *run.parts())
    other.model[0].requires_grad_(True)
    with pytest.raises(ValueError, match="are not the weights that this run trains"):
        load_training_state(tmp_path, *other.parts())
