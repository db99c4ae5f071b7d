"""Checkpointing code that all training loops share.

A run saves `checkpoints/checkpoint-N` every few steps. A checkpoint without a marker file is incomplete and is ignored.
The marker file contains the run's signature: a hash of the data and, for `align` and `distill`, the settings. For
`tune` and `llava`, the signature contains few settings, because the commands compare the complete config (see
`save_or_check_config`). Training resumes only from a checkpoint with the same signature. The number of ranks may
change, except for `llava`: the resumed run still processes the same number of images or pairs per step.

    complete                    marker file: signature, and sizes of the other files
    state-1.safetensors, ...    trained weights and buffers (model/WEIGHT), and the optimizer's state for each trained
                                weight (optimizer/WEIGHT/KEY)
    state.json                  learning rate schedule and gradient scaler

The files do not depend on FSDP: tensors are unsharded and stored under their parameter names. Checkpoints use
safetensors and JSON because, unlike pickle, these formats cannot execute code when they are loaded.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llm2clip.io_utils import atomic_write_text, explain_write_errors, fsync_file, fsync_folder, restore_file_mode
from llm2clip.progress import ProgressBar
from llm2clip.runs.output_folder import (
    CHECKPOINT_PREFIX,
    COMPLETE_MARKER,
    MAX_CHECKPOINTS,
    MetricsLog,
    check_format_version,
    find_latest_checkpoint,
    list_checkpoints,
    parse_checkpoint_step,
)
from llm2clip.runs.ranks import distribute_like, full_tensor, print_once, process_state, wait_for_everyone

FORMAT_VERSION = 1
TENSOR_FILE, JSON_FILE = "state-{}.safetensors", "state.json"
MAX_FILE_BYTES = 4 * 2**30  # maximum file size, and maximum size of the unsharded tensors in the main process's memory


class CheckpointManager:
    """Checkpoints of one training run. The constructor and `commit` must be called by all ranks.

    Attributes:
        latest: Checkpoint to resume from, or None if training starts from scratch.
        step: Step of the checkpoint to resume from, or 0 if training starts from scratch.
    """

    def __init__(self, folder: Path) -> None:
        """Find the checkpoint to resume from and remove incomplete checkpoints.

        If a complete checkpoint is corrupt, for example after a power failure, it is renamed to checkpoint-N.damaged,
        and training resumes from the previous checkpoint.

        Raises:
            ValueError: The latest checkpoint has an unsupported format version or is not visible on this rank, or all
                checkpoints are corrupt.
        """
        self.folder = folder
        state = process_state()
        latest, error = _find_intact_checkpoint(folder) if state.is_main_process else (None, "")
        if state.num_processes > 1:
            latest, error = broadcast_object_list([latest, error])
        if error:
            raise ValueError(error)
        self._marker: dict[str, Any] = {}
        self._signature: dict[str, Any] = {}
        if latest is not None:
            if not (latest / COMPLETE_MARKER).exists():
                raise ValueError(f"{latest} is not visible on all ranks. Put the run directory on a shared disk")
            self._marker = json.loads((latest / COMPLETE_MARKER).read_text())
            advice = f"Delete {folder} to start this stage over"
            check_format_version(latest / COMPLETE_MARKER, self._marker.get("format_version"), FORMAT_VERSION, advice)
        self.latest: Path | None = latest
        self.step = 0 if latest is None else parse_checkpoint_step(latest)

    def get_saved_items_per_step(self, name: str) -> int | None:
        """Return the total number of items per step of the run to resume, or None for a new run.

        The number is stored in the signature under the key `name`. If the number of ranks has changed, print a message.

        Raises:
            ValueError: The number of items per step is not divisible by the number of ranks.
        """
        ranks = process_state().num_processes
        if self.latest is None:
            return None
        total, saved_ranks = int(self._marker["signature"][name]), self._marker["ranks"]
        if total % ranks:
            divisors = ", ".join(str(n) for n in range(1, total + 1) if total % n == 0)
            raise ValueError(
                f"Cannot resume from {self.latest} with {ranks} processes: the run uses {total} {name}, which is not "
                f"divisible by {ranks}. Use a number of processes that divides {total}: {divisors}"
            )
        if ranks != saved_ranks:
            print_once(
                f"Number of processes: {ranks} (was {saved_ranks}). Resuming from step {self.step} with {total} "
                f"{name}, as before ({total // ranks} per process)"
            )
        return total

    def get_saved_property(self, name: str) -> Any:
        """Return a property from the saved signature of the run to resume, or None for a new run."""
        return None if self.latest is None else self._marker["signature"].get(name)

    def check_signature(self, signature: Mapping[str, Any]) -> None:
        """Raise ValueError if the latest checkpoint has a different signature. Save `signature` in later checkpoints.

        The signature consists of properties that must not change when the run is resumed, such as the learning rate and
        a hash of the data. The values must be JSON-serialisable.
        """
        self._signature = dict(signature)
        if self.latest is None:
            return
        saved = self._marker["signature"]
        changes = [
            f"{name}: {saved.get(name)} saved, {value} now"
            for name, value in signature.items()
            if saved.get(name) != value
        ]
        if changes:
            raise ValueError(
                f"Cannot resume from {self.latest}: {'; '.join(changes)}. Use the same data and settings, or delete "
                f"{self.folder} to start this stage over"
            )

    def get_checkpoint_path(self, step: int) -> Path:
        return self.folder / f"{CHECKPOINT_PREFIX}{step}"

    def commit(self, step: int) -> None:
        """Wait for all ranks, mark the checkpoint for a step as complete, and remove old checkpoints."""
        state = process_state()
        wait_for_everyone()
        if state.is_main_process:
            _mark_complete(self.get_checkpoint_path(step), {"signature": self._signature, "ranks": state.num_processes})
            for path in list_checkpoints(self.folder)[:-MAX_CHECKPOINTS]:
                shutil.rmtree(path)


class TrainingLogCallback(TrainerCallback):
    """Callback for transformers' Trainer that logs metrics, marks complete checkpoints and shows a progress bar.

    Training stops if the loss or gradient norm is not finite. `add_to_trainer` removes the Trainer's own callbacks,
    which print a dict every few steps.
    """

    def __init__(
        self, metrics: Path, checkpoints: CheckpointManager, description: str, advice: str, log_summary: bool = False
    ) -> None:
        """
        Args:
            metrics: JSONL file to which the main process writes metrics.
            advice: Text to append to the error message if the loss or gradient norm is not finite.
            log_summary: Also write the Trainer's final summary (run time, mean loss).
        """
        self.checkpoints, self.description = checkpoints, description
        self.advice, self.log_summary = advice, log_summary
        self.log = MetricsLog(metrics, checkpoints.step) if process_state().is_main_process else None

    def add_to_trainer(self, trainer: Any) -> None:
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        is_hidden, start = not state.is_world_process_zero, state.global_step
        self.bar = ProgressBar(
            total=state.max_steps, initial=start, desc=self.description, unit="step", disable=is_hidden
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        logs = logs or {}
        # In fp16, a non-finite gradient norm is not an error: the gradient scaler skips such steps.
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            raise_if_not_finite(name, logs.get(name, 0.0), state.global_step, self.checkpoints, self.advice)
        if self.log is not None and ("loss" in logs or self.log_summary):
            self.log.write(state.global_step, **logs)
        if "loss" in logs:  # the Trainer's final summary has no loss
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.checkpoints.commit(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        self.bar.close()


def raise_if_not_finite(name: str, value: float, step: int, checkpoints: CheckpointManager, advice: str = "") -> None:
    """Raise FloatingPointError if `value` is not finite. The message names the latest complete checkpoint."""
    if math.isfinite(value):
        return
    last = find_latest_checkpoint(checkpoints.folder)
    raise FloatingPointError(f"{name} is {value} at step {step}. Last complete checkpoint: {last}. {advice}".rstrip())


def hash_texts(texts: Iterable[str]) -> str:
    """Return an order-dependent hash of the texts as 16 hexadecimal digits."""
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode(errors="surrogateescape")).digest())
    return total.hexdigest()[:16]


def _mark_complete(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Flush a checkpoint's files to disk, then write its marker file, which lists the file sizes."""
    sizes = {}
    for name in sorted(path.name for path in checkpoint.iterdir()):
        restore_file_mode(checkpoint / name, checkpoint.stat().st_mode)
        fsync_file(checkpoint / name)
        sizes[name] = (checkpoint / name).stat().st_size
    fsync_folder(checkpoint)
    fsync_folder(checkpoint.parent)
    marker = {"format_version": FORMAT_VERSION, "files": sizes, **run}
    atomic_write_text(checkpoint / COMPLETE_MARKER, json.dumps(marker))


def _find_intact_checkpoint(folder: Path) -> tuple[Path | None, str]:
    """Return the latest intact checkpoint, and an error message if all checkpoints are corrupt.

    Remove incomplete checkpoints. Rename corrupt checkpoints that are newer than the returned checkpoint.
    """
    damages: dict[Path, str] = {}
    latest = None
    for checkpoint in reversed(list_checkpoints(folder)):
        if not (checkpoint / COMPLETE_MARKER).exists():
            shutil.rmtree(checkpoint)
        elif latest is None:
            if damage := _describe_corruption(checkpoint):
                damages[checkpoint] = damage
            else:
                latest = checkpoint
    if damages and latest is None:
        details = "; ".join(f"{checkpoint.name}: {damage}" for checkpoint, damage in damages.items())
        return None, (
            f"All checkpoints in {folder} are corrupt ({details}). Restore a checkpoint from a backup, or delete "
            f"{folder} to start this stage over"
        )
    for checkpoint, damage in damages.items():
        new_path = checkpoint.with_name(f"{checkpoint.name}.damaged")
        shutil.rmtree(new_path, ignore_errors=True)
        checkpoint.rename(new_path)
        print_once(
            f"{checkpoint} is corrupt ({damage}) and has been renamed to {new_path.name}. Resuming from {latest} "
            "instead"
        )
    return latest, ""


def _describe_corruption(checkpoint: Path) -> str:
    """Describe the first corrupt file of a complete checkpoint. Return "" if all files are intact."""
    try:
        marker = json.loads((checkpoint / COMPLETE_MARKER).read_text())
    except ValueError:
        return f"{COMPLETE_MARKER} is not valid JSON"
    if marker.get("format_version") != FORMAT_VERSION:
        return ""  # unknown format; `CheckpointManager` raises FormatVersionError
    for name, size in marker.get("files", {}).items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return ""


# ---- training state --------------------------------------------------------------------------------------------------


def save_training_state(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any = None) -> None:
    """Save the state of a training run in a checkpoint folder. Must be called by all ranks.

    `model` must not have a DDP wrapper. Frozen parameters are not saved.
    """
    is_main = process_state().is_main_process
    part: dict[str, Tensor] = {}
    part_bytes, part_number = 0, 1
    folder.mkdir(parents=True, exist_ok=True)
    for name, shard in _iterate_state_tensors(model, optimizer):
        tensor = full_tensor(shard.detach())  # all ranks must call `full_tensor`
        if not is_main:
            continue
        if part and part_bytes + tensor.nbytes > MAX_FILE_BYTES:
            _save_state_shard(part, folder / TENSOR_FILE.format(part_number))
            part, part_bytes, part_number = {}, 0, part_number + 1
        part[name] = tensor.cpu().contiguous()
        part_bytes += tensor.nbytes
    if is_main:
        _save_state_shard(part, folder / TENSOR_FILE.format(part_number))
        state = {"schedule": schedule.state_dict(), "scaler": None if scaler is None else scaler.state_dict()}
        atomic_write_text(folder / JSON_FILE, json.dumps(state))


def _save_state_shard(tensors: dict[str, Tensor], file: Path) -> None:
    with explain_write_errors(file):
        save_file(tensors, file)


@torch.no_grad()
def load_training_state(folder: Path, model: nn.Module, optimizer: Any, schedule: Any, scaler: Any = None) -> None:
    """Load a state that `save_training_state` saved with any number of ranks. Must be called by all ranks.

    Raises:
        ValueError: The checkpoint does not contain exactly the weights that this run trains.
    """
    file_of: dict[str, Any] = {}  # tensor name -> file that contains the tensor
    for path in folder.glob(TENSOR_FILE.format("*")):
        file = safe_open(path, framework="pt")
        file_of.update(dict.fromkeys(file.keys(), file))
    weights = {f"model/{name}": weight for name, weight in _iterate_trained_tensors(model)}
    if {name for name in file_of if name.startswith("model/")} != weights.keys():
        raise ValueError(
            f"the weights in {folder} are not the weights that this run trains. Use the same settings, or delete "
            f"{folder.parent} to start this stage over"
        )
    for name, weight in weights.items():
        weight.copy_(distribute_like(weight, file_of[name].get_tensor(name)))

    # The optimizer's state dict numbers parameters in the order of the parameter groups.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for number, parameter in enumerate(parameters):
        prefix = f"optimizer/{names[id(parameter)]}/"
        values: dict[str, Tensor] = {}
        for name in sorted(name for name in file_of if name.startswith(prefix)):  # the same order on all ranks
            value, key = file_of[name].get_tensor(name), name.removeprefix(prefix)
            # All values except the step have the parameter's shape and sharding.
            values[key] = value if key == "step" else distribute_like(parameter, value)
        if values:  # parameters without gradients have no optimizer state
            states[number] = values
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})

    state = json.loads((folder / JSON_FILE).read_text(encoding="utf-8"))
    schedule.load_state_dict(state["schedule"])
    for group, lr in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
        group["lr"] = lr
    if scaler is not None:
        scaler.load_state_dict(state["scaler"])


class TrainingStateMixin:
    """Mixin for transformers' Trainer that saves the training state with `save_training_state`.

    Without this mixin, the Trainer would also save frozen weights, and would pickle the state of sharded models. The
    Trainer still writes all other checkpoint files, and loads these files as JSON or with `weights_only`.
    """

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with explain_write_errors(Path(self.args.output_dir) / f"{CHECKPOINT_PREFIX}{self.state.global_step}"):
            super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Do nothing: `_save_optimizer_and_scheduler` also saves the weights."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Do nothing: `_load_optimizer_and_scheduler` also loads the weights."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        save_training_state(Path(output_dir), self.model, self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_training_state(Path(checkpoint), self.model, self.optimizer, self.lr_scheduler)


def _iterate_state_tensors(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor]]:
    for name, weight in _iterate_trained_tensors(model):
        yield f"model/{name}", weight
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            yield f"optimizer/{name}/{key}", value


def _iterate_trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter
    state = model.state_dict()
    for name, buffer in model.named_buffers():
        if name in state:
            yield name, buffer
