"""State of a training run in a checkpoint: exact, complete, and without pickle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from llm2clip.runs import checkpoint
from llm2clip.runs.checkpoint import load_training_state, save_training_state


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
    monkeypatch.setattr(checkpoint, "MAX_FILE_BYTES", max_file_bytes)
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
    with pytest.raises(ValueError, match="does not contain exactly the weights"):
        load_training_state(tmp_path, *other.parts())
