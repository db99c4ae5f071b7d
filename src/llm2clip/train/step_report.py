"""Metrics of training steps, which are read from the device, checked for non-finite values, and logged."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from llm2clip.data.skip_log import SkipLog
from llm2clip.progress import ProgressBar
from llm2clip.runs.checkpoint import Checkpoints, MetricsLog, check_finite

# In fp16, the gradient scaler skips every step whose gradients are not finite, and then halves its scale factor. After
# this many consecutive skipped steps, the scale factor cannot be the cause, so training stops with an error.
MAX_SKIPPED_STEPS = 20


@dataclass(frozen=True)
class Step:
    """Properties of a training step that are known without waiting for the device.

    Attributes:
        number: Step number, starting at 1.
        image_names: Names of this rank's images.
        failures: Error message for each image of this rank that could not be decoded, keyed by image name.
        metrics: Metrics to log in addition to the loss, the gradient norm and the logit scale.
    """

    number: int
    image_names: list[str]
    failures: dict[str, str]
    metrics: dict[str, float]


class StepReport:
    """Logs the metrics of each training step, and stops training if a value is not finite.

    Reading a value from a GPU waits until the GPU has computed it. On a GPU, the values of a step are therefore read
    when the next step is added, by which time they have usually been computed. `flush` must be called before weights
    are evaluated or saved, to ensure that they have been checked.
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
            accelerator: The Accelerator of the training run.
            log: Log in which to record images that could not be decoded.
            metrics: Log for the metrics. None on all ranks except the main process.
            checkpoints: Checkpoints of the run, which are mentioned in error messages.
            run_dir: Run directory. If a value is not finite, the step's images are listed in a file in this directory.
            progress: Progress bar that shows the loss.
        """
        self.accelerator, self.log, self.metrics = accelerator, log, metrics
        self.checkpoints, self.run_dir, self.progress = checkpoints, run_dir, progress
        self.skipped_steps = 0  # consecutive steps with non-finite gradients
        self._pending: list[tuple[Step, DeviceValues]] = []

    def add(self, step: Step, loss: Tensor, grad_norm: Tensor, logit_scale: Tensor) -> None:
        """Report a step. Must be called by all ranks.

        Args:
            step: The step.
            loss: Mean loss of all ranks, a scalar.
            grad_norm: Norm of the gradient, a scalar.
            logit_scale: Factor of the cosine similarities, a scalar.

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
        """Report all steps that have been added. Must be called by all ranks. Can raise the same errors as `add`."""
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
        """Log images that could not be decoded.

        Each rank counts the failures of all ranks, so that all ranks stop at the same step if there are too many.

        Args:
            step: The step.
            failures_of_all_ranks: Number of images that could not be decoded, over all ranks. Empty in a single
                process.
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
        file.write_text(json.dumps({"step": step.number, "images": step.image_names}, indent=1))
        advice = f"The images of this step are listed in {file}. Lower --align.lr or --align.tower_lr, or use fp32"
        check_finite(name, value, step.number, self.checkpoints, advice)


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
        """Wait until the device has computed the values; return them."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values
