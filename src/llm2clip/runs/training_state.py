"""Training state in a checkpoint: weights, optimizer state and learning rate schedule.

The files do not depend on the number of ranks or on FSDP: tensors are unsharded and stored under their parameter names.
A run can therefore resume on any number of ranks. Checkpoints use safetensors and JSON because, unlike pickle, these
formats cannot execute code when they are loaded.

    state-1.safetensors, ...    trained weights and buffers (model/WEIGHT), and the optimizer's state for each trained
                                weight (optimizer/WEIGHT/KEY)
    state.json                  learning rate schedule and gradient scaler
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llm2clip.io_utils import atomic_write_text, explain_write_errors
from llm2clip.runs.fsdp import distribute_like, full_tensor
from llm2clip.runs.ranks import process_state

TENSOR_FILE, JSON_FILE = "state-{}.safetensors", "state.json"
MAX_FILE_BYTES = 4 * 2**30  # maximum file size; also limits the unsharded tensors in the main process's memory


def save_training_state(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any = None) -> None:
    """Save the state of a training run in a checkpoint folder. Must be called by all ranks.

    Args:
        folder: Checkpoint folder. Created if needed.
        model: Model without its DDP wrapper. Frozen parameters are not saved.
        optimizer: Optimizer of the trained parameters.
        schedule: Learning rate schedule. Its `state_dict()` must be JSON-serialisable.
        scaler: Gradient scaler, or None if the run has none.
    """
    is_main = process_state().is_main_process
    part: dict[str, Tensor] = {}
    part_bytes, part_number = 0, 1
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in _iterate_state_tensors(model, optimizer):
        tensor = full_tensor(shard.detach())  # must be called by all ranks
        if not is_main:
            continue
        if part and part_bytes + tensor.nbytes > MAX_FILE_BYTES:
            _save_part(part, folder / TENSOR_FILE.format(part_number))
            part, part_bytes, part_number = {}, 0, part_number + 1
        part[name] = tensor.cpu().contiguous()
        part_bytes += tensor.nbytes
    if is_main:
        _save_part(part, folder / TENSOR_FILE.format(part_number))
        state = {"schedule": schedule.state_dict(), "scaler": None if scaler is None else scaler.state_dict()}
        atomic_write_text(folder / JSON_FILE, json.dumps(state))


def _save_part(tensors: dict[str, Tensor], file: Path) -> None:
    with explain_write_errors(file):
        save_file(tensors, file)


@torch.no_grad()
def load_training_state(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any = None) -> None:
    """Load a state saved by `save_training_state`. The number of ranks may differ. Must be called by all ranks.

    Raises:
        ValueError: The saved weights do not match the weights that this run trains.
    """
    file_of: dict[str, Any] = {}  # name of each saved tensor -> the file that contains it
    for path in folder.glob(TENSOR_FILE.format("*")):
        file = safe_open(path, framework="pt")
        file_of.update(dict.fromkeys(file.keys(), file))
    weights = {f"model/{name}": weight for name, weight in _iterate_trained_tensors(model)}
    if {name for name in file_of if name.startswith("model/")} != weights.keys():
        raise ValueError(
            f"{folder} does not contain exactly the weights that this run trains. Use the same settings, or delete "
            f"{folder.parent} to start this stage over"
        )
    for name, weight in weights.items():
        weight.copy_(distribute_like(weight, file_of[name].get_tensor(name)))

    # In the optimizer's state dict, parameters are numbered in the order of the parameter groups.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(parameters):
        prefix = f"optimizer/{names[id(parameter)]}/"
        values: dict[str, Tensor] = {}
        for name in sorted(name for name in file_of if name.startswith(prefix)):  # same order on all ranks
            value, key = file_of[name].get_tensor(name), name.removeprefix(prefix)
            # All values except the step have the parameter's shape and are sharded in the same way.
            values[key] = value if key == "step" else distribute_like(parameter, value)
        if values:  # a parameter without a gradient has no state
            states[number] = values
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    state = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    schedule.load_state_dict(state["schedule"])
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])


class TrainingStateMixin:
    """Mixin for transformers' Trainer that saves the training state in the files described above.

    Without this mixin, the Trainer would also save frozen weights and would pickle the state of sharded models. All
    other checkpoint files are still written by the Trainer, which loads them as JSON or with `weights_only`.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do nothing. `_save_optimizer_and_scheduler` also saves the weights."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing. `_load_optimizer_and_scheduler` also loads the weights."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_training_state(Path(output_dir), self.model, self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_training_state(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)


def _iterate_state_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each tensor to save, in the same order on all ranks."""
    for name, weight in _iterate_trained_tensors(model):
        yield f"model/{name}", weight
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer/{name}/{key}", value


def _iterate_trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of each trained parameter and of each buffer in the model's state dict."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state:
            yield name, buffer
