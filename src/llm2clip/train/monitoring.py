"""Metrics, evaluations and experiment trackers of an `align` run."""

import json
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm2clip.config import AlignConfig
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import atomic_path, atomic_write_text, fsync_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.progress import ProgressBar
from llm2clip.runs.checkpoint import Checkpoints, MetricsLog, hash_texts, raise_if_not_finite
from llm2clip.runs.fsdp import full_tensor, is_fsdp_enabled
from llm2clip.runs.ranks import wait_for_everyone

# In fp16, the gradient scaler skips every step with non-finite gradients and then halves its scale factor. After this
# many consecutive skipped steps, the scale factor cannot be the cause, so training stops with an error.
MAX_SKIPPED_STEPS = 20


@dataclass(frozen=True)
class Step:
    """Properties of a training step that are available without waiting for the device.

    Attributes:
        number: Step number, starting at 1.
        image_names: Names of this rank's images.
        failures: Error message for each of this rank's images that could not be decoded, keyed by image name.
        metrics: Metrics to log in addition to the loss, the gradient norm and the logit scale.
    """

    number: int
    image_names: Sequence[str]
    failures: dict[str, str]
    metrics: dict[str, float]


class StepReport:
    """Logs the metrics of each training step, and stops training if a value is not finite.

    Reading a value from a GPU waits until the GPU has computed it. On a GPU, the values of a step are therefore read
    when the next step is added, by which time they have usually been computed. Call `flush` before evaluating or saving
    weights, so that the values of all previous steps have been checked.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        log: SkipLog,
        metrics: MetricsLog | None,
        checkpoints: Checkpoints,
        run_dir: Path,
        progress: ProgressBar,
    ) -> None:
        """
        Args:
            log: Log of images that could not be decoded.
            metrics: Metrics log, or None on all ranks except the main process.
            checkpoints: Checkpoints of the run, for error messages.
            run_dir: Run directory. If a value is not finite, the step's images are listed in a file in this directory.
            progress: Progress bar that shows the loss.
        """
        self.accelerator, self.log, self.metrics = accelerator, log, metrics
        self.checkpoints, self.run_dir, self.progress = checkpoints, run_dir, progress
        self.skipped_steps = 0  # consecutive steps with non-finite gradients
        self._pending: list[tuple[Step, DeviceValues]] = []

    def add(self, step: Step, loss: Tensor, grad_norm: Tensor, logit_scale: Tensor) -> None:
        """Report a step that has just run. Must be called by all ranks.

        `loss` (the mean over all ranks), `grad_norm` and `logit_scale` are scalars.

        Raises:
            FloatingPointError: The loss or the gradient of this step or the previous step is not finite.
            TooManySkipped: Too many images cannot be decoded.
        """
        values = [loss, grad_norm, logit_scale]
        if self.accelerator.num_processes > 1:
            failures = torch.full((), len(step.failures), dtype=torch.float32, device=loss.device)
            values.append(self.accelerator.reduce(failures, "sum"))
        self._pending.append((step, DeviceValues(values)))
        self._report(pending=1 if loss.device.type == "cuda" else 0)

    def flush(self) -> None:
        """Report all steps added so far. Must be called by all ranks. Can raise the same errors as `add`."""
        self._report(pending=0)

    def _report(self, pending: int) -> None:
        """Report all steps except the last `pending` ones."""
        while len(self._pending) > pending:
            step, values = self._pending.pop(0)
            loss, grad_norm, logit_scale, *failures_of_all_ranks = values.read()
            self._log_failures(step, failures_of_all_ranks)
            self._check_finite("loss", loss, step)
            self.skipped_steps = 0 if math.isfinite(grad_norm) else self.skipped_steps + 1
            if self.accelerator.scaler is None or self.skipped_steps >= MAX_SKIPPED_STEPS:
                self._check_finite("grad_norm", grad_norm, step)
            line: dict[str, Any] = {
                "loss": loss,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                "logit_scale": logit_scale,
                **step.metrics,
            }
            if self.metrics is not None:
                self.metrics.write(step.number, **line)
            self.accelerator.log({name: value for name, value in line.items() if value is not None}, step.number)
            self.progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def _log_failures(self, step: Step, failures_of_all_ranks: list[float]) -> None:
        """Report images that could not be decoded.

        Each rank counts the failures of all ranks, so that all ranks stop at the same step if there are too many.
        `failures_of_all_ranks` contains the total number of failures, or is empty in a single-process run.
        """
        failures = list(step.failures.items())
        if any(failures_of_all_ranks):
            failures = gather_object(failures)
        for name, reason in failures:
            self.log.skip(name, 0, "undecodable image", reason)
            self.log.check()

    def _check_finite(self, name: str, value: float, step: Step) -> None:
        """Raise FloatingPointError if `value` is not finite, after listing the step's images in a file."""
        if math.isfinite(value):
            return
        file = self.run_dir / f"not-finite-{step.number}-{self.accelerator.process_index}.json"
        file.write_text(json.dumps({"step": step.number, "images": list(step.image_names)}, indent=1))
        advice = f"The images of this step are listed in {file}. Lower --align.lr or --align.tower_lr, or use fp32"
        raise_if_not_finite(name, value, step.number, self.checkpoints, advice)


class DeviceValues:
    """Scalars that are copied from the device to the host in the background."""

    def __init__(self, values: list[Tensor]) -> None:
        stacked = torch.stack([value.detach().float().reshape(()) for value in values])
        self._copied: torch.cuda.Event | None = None
        if stacked.device.type != "cuda":
            self._values = stacked
            return
        self._values = torch.empty(len(values), pin_memory=True)
        self._values.copy_(stacked, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record(torch.cuda.current_stream(stacked.device))

    def read(self) -> list[float]:
        """Wait until the device has computed the values, then return them."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values


# ---- evaluation ------------------------------------------------------------------------------------------------------

WEIGHTS, METRICS = "model.safetensors", "metrics.json"

Validator = Callable[[LLM2CLIP], dict[str, float]]
"""Function that evaluates a model on held-out images and returns its metrics. The model must be in eval mode. The
metrics must include `score`; a higher score is better."""


class BestCheckpoint:
    """Evaluates the model during training, and saves the weights with the best score to `run_dir/best`."""

    def __init__(self, run_dir: Path, resume_step: int, validate: Validator | None, accelerator: Accelerator) -> None:
        """
        Args:
            run_dir: Run directory. Evaluations are appended to evaluations.jsonl in this directory.
            resume_step: Step of the checkpoint from which training resumes. Evaluations of later steps are deleted,
                because these steps will be repeated.
            validate: Function that evaluates a model. If None, the model is not evaluated.
        """
        self.folder, self.validate, self.accelerator = run_dir / "best", validate, accelerator
        self.log: MetricsLog | None = None
        self.best_score = float("-inf")
        if accelerator.is_main_process:
            if self._read_saved_step() > resume_step:
                shutil.rmtree(self.folder, ignore_errors=True)
            if validate is not None:
                self.log = MetricsLog(run_dir / "evaluations.jsonl", resume_step)
                if self._read_saved_step() >= 0:
                    self.best_score = json.loads((self.folder / METRICS).read_text())["score"]
        wait_for_everyone()

    def evaluate(self, model: LLM2CLIP, step: int) -> dict[str, float]:
        """Evaluate the model, and save its weights if its score is the best so far. Must be called by all ranks.

        If the model is sharded, all ranks evaluate it; otherwise, only the main process does. Evaluation leaves the
        model in eval mode.

        Returns:
            The metrics, or an empty dict on ranks that did not evaluate the model.
        """
        if self.validate is None:
            return {}
        metrics: dict[str, float] = {}
        if self.accelerator.is_main_process or is_fsdp_enabled():  # a sharded model must run on all ranks
            model.eval()
            metrics = self.validate(model)
        is_best = self.log is not None and metrics["score"] > self.best_score
        if is_best or is_fsdp_enabled():
            state = {name: full_tensor(t).detach().cpu().contiguous() for name, t in model.state_dict().items()}
        if is_best:
            self.best_score = metrics["score"]
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / METRICS).unlink(missing_ok=True)  # marks the weights as incomplete until they are saved
            fsync_folder(self.folder)
            with atomic_path(self.folder / WEIGHTS) as file:
                save_file(state, file, {"step": str(step)})
            atomic_write_text(self.folder / METRICS, json.dumps({"step": step, **metrics}, indent=1))
        if self.log is not None:
            self.log.write(step, **metrics)
        wait_for_everyone()
        return metrics

    def restore(self, model: LLM2CLIP) -> None:
        """Load the best weights into the model."""
        model.load_state_dict(load_file(self.folder / WEIGHTS))

    def _read_saved_step(self) -> int:
        """Return the step of the saved weights, -1 if there are none, or sys.maxsize if they are incomplete."""
        if not self.folder.exists():
            return -1
        try:
            return int(json.loads((self.folder / METRICS).read_text())["step"])
        except (OSError, ValueError, KeyError):
            return sys.maxsize


# ---- trackers --------------------------------------------------------------------------------------------------------


def make_tracker_options(names: list[str], run_dir: Path) -> dict[str, Any]:
    """Return Accelerate's options for each tracker, keyed by tracker name. Resumed runs continue the same tracker run.

    Raises:
        ValueError: A tracker name is unknown.
        ModuleNotFoundError: The package for a tracker is not installed.
    """
    run_id = hash_texts([str(run_dir.resolve())])
    options: dict[str, Any] = {
        "tensorboard": {},
        "wandb": {"id": run_id, "resume": "allow"},
        "trackio": {"name": f"{run_dir.parent.name}-{run_id}", "resume": "allow"},
    }
    for name in names:
        if name not in options:
            raise ValueError(f"--align.report_to must be one of {', '.join(options)} (got {name!r})")
        if find_spec(name) is None:
            raise ModuleNotFoundError(f"--align.report_to {name} requires the package {name}: pip install {name}")
    return {name: options[name] for name in names}


def start_trackers(accelerator: Accelerator, options: dict[str, Any], config: AlignConfig, resume_step: int) -> None:
    if not options:
        return
    if "tensorboard" in options and resume_step:
        options["tensorboard"]["purge_step"] = resume_step + 1  # all steps from this one onwards will be repeated
    settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(config).items()}
    accelerator.init_trackers("llm2clip", settings, options)
