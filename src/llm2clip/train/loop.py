"""Training loop shared by `align` and `distill`.

The stages provide the model, the optimizer, the batches and a function that computes the gradients of a batch.
`TrainingLoop` provides mixed precision, gradient clipping, the learning rate schedule, metrics, evaluation on held-out
images, checkpoints, experiment trackers and exact resumption.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from llm2clip.config import RESUME_SAFE, AlignConfig, DistillConfig
from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.data.skip_log import SkipLog
from llm2clip.models.precision import resolve_precision
from llm2clip.progress import ProgressBar
from llm2clip.runs.checkpoint import (
    CheckpointManager,
    hash_texts,
    load_training_state,
    raise_if_not_finite,
    save_training_state,
)
from llm2clip.runs.output_folder import MetricsLog
from llm2clip.runs.ranks import (
    enable_fp32_gradient_reduction,
    full_tensor,
    is_fsdp_enabled,
    process_state,
    set_mixed_precision,
    wait_for_everyone,
)
from llm2clip.train.optim import MAX_GRAD_NORM, make_cosine_schedule

# Maximum number of consecutive fp16 steps with non-finite gradients. Each of these steps halves the loss scale.
MAX_SKIPPED_STEPS = 20

Validator = Callable[[Any], dict[str, float]]
"""Function that evaluates a model in eval mode on held-out images and returns the metrics."""


@dataclass(frozen=True)
class StepResult:
    """Result of one rank's forward and backward pass in a training step. Tensors are on the training device.

    Attributes:
        loss: Loss of this rank's items, a scalar without gradients.
        num_items: Number of items on this rank.
        metrics: Additional scalars to log.
        refs: References to this rank's items, which are listed in a file if the loss is not finite.
        failures: Error messages for undecodable items of this rank, keyed by item name.
    """

    loss: Tensor
    num_items: int
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    refs: Sequence[Any] = ()
    failures: Mapping[str, str] = field(default_factory=dict)


class TrainingLoop:
    """Training loop of one stage. All methods must be called by all ranks, in the order in which they are defined.

    Attributes:
        precision: Training precision: fp32, bf16 or fp16.
        items_per_step: Total number of items per step of the run to resume, or None for a new run.
        net: The model with its distributed wrapper, available after `start`.
    """

    def __init__(
        self,
        stage: Literal["align", "distill"],
        items: str,
        config: AlignConfig | DistillConfig,
        run_dir: Path,
        report_to: Sequence[str] = (),
    ) -> None:
        """Set up mixed precision and find the checkpoint to resume from.

        Args:
            items: Plural noun for the training items, such as "images", for metric names and messages.
        """
        state = process_state()  # must precede Accelerator(), which would initialise the ranks with different options
        self.stage, self.items, self.config, self.run_dir = stage, items, config, run_dir
        self.precision = resolve_precision(stage, config.precision, state.device)
        self._trackers = make_tracker_options(report_to, run_dir)
        self.accelerator = Accelerator(
            mixed_precision=set_mixed_precision(self.precision),
            log_with=list(self._trackers) or None,
            project_config=ProjectConfiguration(str(run_dir), str(run_dir / "logs")),
        )
        self.device = self.accelerator.device
        if self.precision == "fp16" and self.accelerator.scaler is None:
            raise ValueError(f"--{stage}.precision fp16 requires a GPU: use bf16 or fp32 on {self.device}")
        enable_fp32_gradient_reduction(self.accelerator)
        keep_freed_memory(self.device)
        self.checkpoints = CheckpointManager(run_dir / "checkpoints")
        self.items_per_step = self.checkpoints.get_saved_items_per_step(f"{items} per step")

    def check_signature(self, steps: int, items_per_step: int, data: Mapping[str, Any]) -> None:
        """Raise ValueError if a resumed run has a different number of steps, different settings or different data.

        `data` contains properties of the data and the models, such as hashes, that a resumed run must not change.
        """
        self.steps = steps
        settings = {**vars(self.config), "precision": self.precision}
        signature = {"steps": steps, f"{self.items} per step": items_per_step, **data}
        signature |= {f"--{self.stage}.{name}": v for name, v in settings.items() if name not in RESUME_SAFE}
        self.checkpoints.check_signature(signature)

    def start(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        lr: float,
        validate: Validator | None = None,
        eval_steps: int = 0,
    ) -> None:
        """Prepare the model and the optimizer, and load the latest checkpoint, if any.

        Args:
            lr: Peak learning rate, used only for logging.
            eval_steps: Number of steps between evaluations. 0 disables evaluation.
        """
        self.model, self.lr, self.eval_steps = model, lr, eval_steps
        is_main, resume_step = self.accelerator.is_main_process, self.checkpoints.step
        self.validate = validate if eval_steps else None
        self.metrics = self.evaluations = None
        if is_main:
            self.metrics = MetricsLog(self.run_dir / "metrics.jsonl", resume_step)
            if self.validate is not None:
                self.evaluations = MetricsLog(self.run_dir / "evaluations.jsonl", resume_step)
        if self._trackers:
            if "tensorboard" in self._trackers and resume_step:
                self._trackers["tensorboard"]["purge_step"] = resume_step + 1  # hides steps that this run will repeat
            plain = int, float, str, bool
            settings = {k: v if isinstance(v, plain) else str(v) for k, v in vars(self.config).items()}
            self.accelerator.init_trackers("llm2clip", settings, self._trackers)
        self._lr_factor = make_cosine_schedule(self.steps, self.config.warmup_ratio)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._lr_factor)
        self.net, self.optimizer = self.accelerator.prepare(model, optimizer)
        if self.checkpoints.latest is not None:
            load_training_state(self.checkpoints.latest, model, self.optimizer, self.schedule, self.accelerator.scaler)

    def run(
        self,
        batches: Iterator[Any],
        compute_gradients: Callable[[int, Any], StepResult],
        log: SkipLog | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Train for the remaining steps.

        Args:
            batches: This rank's batch for each remaining step.
            compute_gradients: Function that runs the forward and backward pass, given the step number (from 1) and the
                batch.
            log: Log of undecodable items, which raises TooManySkippedError if too many items cannot be decoded.
            after_step: Function to call after each optimizer step.

        Raises:
            FloatingPointError: The loss or a gradient is not finite.
        """
        is_hidden, start = self.metrics is None, self.checkpoints.step
        with ProgressBar(total=self.steps, initial=start, desc=self.stage, unit="step", disable=is_hidden) as progress:
            logger = StepLogger(self, log, progress)
            clock = time.perf_counter()
            for step in range(start + 1, self.steps + 1):
                data_start = time.perf_counter()
                batch = next(batches)
                data_seconds = time.perf_counter() - data_start
                result = compute_gradients(step, batch)
                loss, grad_norm = self._update_weights(result)
                after_step()

                # On a GPU, `logger.add_step` waits for the previous step, so `step_seconds` is the time between steps.
                now = time.perf_counter()
                step_seconds, clock = now - clock, now
                items_per_second = result.num_items * self.accelerator.num_processes / step_seconds
                step_metrics = {
                    "lr": self.lr * self._lr_factor(step - 1),
                    f"{self.items}_per_second": items_per_second,
                    "data_wait": data_seconds / step_seconds,  # fraction of the step time spent waiting for the batch
                }
                logger.add_step(step, result, loss, grad_norm, step_metrics)
                progress.update()
                if self._evaluate_and_save(step, logger):
                    clock = time.perf_counter()
        for tracker in self.accelerator.trackers:
            tracker.finish()  # accelerator.end_training() would also destroy the process group
        self.accelerator.unwrap_model(self.net, keep_fp32_wrapper=False)  # removes the autocast wrapper
        vars(self.model).pop("_is_accelerate_prepared", None)  # a later call to prepare() must add autocast again

    def _update_weights(self, result: StepResult) -> tuple[Tensor, Tensor]:
        loss = self.accelerator.reduce(result.loss, "mean")
        grad_norm = full_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return loss, grad_norm

    def _evaluate_and_save(self, step: int, logger: "StepLogger") -> bool:
        """Evaluate the model and save a checkpoint, each only if due at this step. Return True if either was done."""
        is_last = step == self.steps
        evaluates = self.validate is not None and (step % self.eval_steps == 0 or is_last)
        saves = step % self.config.save_steps == 0 or is_last
        if evaluates or saves:
            logger.flush()  # raises an error if a loss or gradient was not finite
        if evaluates:
            self._evaluate(step)
        if saves:
            folder = self.checkpoints.get_checkpoint_path(step)
            save_training_state(folder, self.model, self.optimizer, self.schedule, self.accelerator.scaler)
            self.checkpoints.commit(step)
        return evaluates or saves

    def _evaluate(self, step: int) -> None:
        assert self.validate is not None
        if self.accelerator.is_main_process or is_fsdp_enabled():
            self.model.eval()
            metrics = self.validate(self.model)
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # without this call, FSDP keeps gathered weights until the next backward pass
            self.accelerator.log(metrics, step)
            if self.evaluations is not None:
                self.evaluations.write(step, **metrics)
        self.model.train()
        wait_for_everyone()


class StepLogger:
    """Logger of each training step's metrics, which raises an error if the loss or gradient norm is not finite.

    Reading a value from a GPU waits until the GPU has computed the value. On a GPU, the values of a step are therefore
    read when the next step is added, by which time they have usually been computed. Call `flush` before evaluating or
    saving weights, so that the values of all previous steps are checked.
    """

    def __init__(self, loop: TrainingLoop, log: SkipLog | None, progress: ProgressBar) -> None:
        self.loop, self.log, self.progress = loop, log, progress
        self.skipped_steps = 0  # number of consecutive steps with non-finite gradients
        self._pending: list[tuple[int, StepResult, dict[str, float], AsyncScalars]] = []

    def add_step(
        self, step: int, result: StepResult, loss: Tensor, grad_norm: Tensor, step_metrics: dict[str, float]
    ) -> None:
        """Add a completed step. Must be called by all ranks. Raises the same errors as `TrainingLoop.run`."""
        accelerator = self.loop.accelerator
        values = [loss, grad_norm, *result.metrics.values()]
        if accelerator.num_processes > 1:
            failures = torch.full((), len(result.failures), dtype=torch.float32, device=loss.device)
            values.append(accelerator.reduce(failures, "sum"))
        self._pending.append((step, result, step_metrics, AsyncScalars(values)))
        self._log_pending_steps(pending=1 if loss.device.type == "cuda" else 0)

    def flush(self) -> None:
        """Log all pending steps. Must be called by all ranks. Raises the same errors as `add_step`."""
        self._log_pending_steps(pending=0)

    def _log_pending_steps(self, pending: int) -> None:
        while len(self._pending) > pending:
            step, result, step_metrics, values = self._pending.pop(0)
            loss, grad_norm, *others = values.read()
            self._log_undecodable_items(result, others[len(result.metrics) :])
            self._check_finite("loss", loss, step, result)
            self.skipped_steps = 0 if math.isfinite(grad_norm) else self.skipped_steps + 1
            if self.loop.accelerator.scaler is None or self.skipped_steps >= MAX_SKIPPED_STEPS:
                self._check_finite("grad_norm", grad_norm, step, result)
            line: dict[str, Any] = {
                "loss": loss,
                "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
                **dict(zip(result.metrics, others, strict=False)),
                **step_metrics,
            }
            if self.loop.metrics is not None:
                self.loop.metrics.write(step, **line)
            self.loop.accelerator.log({name: value for name, value in line.items() if value is not None}, step)
            self.progress.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def _log_undecodable_items(self, result: StepResult, total_failures: list[float]) -> None:
        """Log undecodable items. All ranks log the items of all ranks, so that all ranks stop at the same step.

        `total_failures` contains the number of failures on all ranks, or is empty in a single-process run.
        """
        failures = list(result.failures.items())
        if any(total_failures):
            failures = gather_object(failures)
        for name, reason in failures:
            assert self.log is not None
            self.log.skip(name, 0, "undecodable image", reason)
            self.log.check()

    def _check_finite(self, name: str, value: float, step: int, result: StepResult) -> None:
        """If a value is not finite, list the step's items in a file and raise FloatingPointError."""
        if math.isfinite(value):
            return
        stage, items = self.loop.stage, self.loop.items
        rates = [f"--{stage}.{setting}" for setting in vars(self.loop.config) if setting.endswith("lr")]
        advice = f"Lower {' or '.join(rates)}, or use --{stage}.precision fp32"
        if result.refs:
            file = self.loop.run_dir / f"not-finite-{step}-{self.loop.accelerator.process_index}.json"
            file.write_text(json.dumps({"step": step, items: list(map(str, result.refs))}, indent=1))
            advice = f"The {items} of this step are listed in {file}. {advice}"
        raise_if_not_finite(name, value, step, self.loop.checkpoints, advice)


class AsyncScalars:
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
        """Wait until the device has computed the values, then return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._values.tolist()
        return values


# ---- trackers --------------------------------------------------------------------------------------------------------


def make_tracker_options(names: Sequence[str], run_dir: Path) -> dict[str, Any]:
    """Return Accelerate's options for each tracker, keyed by tracker name. A resumed run continues its tracker run.

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
