"""Evaluation during training, and the checkpoint with the best evaluation score."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from llm2clip.io_utils import atomic_path, atomic_write_text, fsync_folder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.runs.checkpoint import MetricsLog
from llm2clip.runs.ranks import fsdp_enabled, wait_for_everyone
from llm2clip.runs.training_state import full_tensor

WEIGHTS, METRICS = "model.safetensors", "metrics.json"

Validate = Callable[[LLM2CLIP], dict[str, float]]
"""Function that evaluates a model on held-out images and returns its metrics. The model must be in eval mode. The
metrics must include `score`; a higher score is better."""


class BestCheckpoint:
    """Evaluates the model during training, and saves the weights with the best score to `run_dir/best`."""

    def __init__(self, run_dir: Path, resume_step: int, validate: Validate | None, accelerator: Accelerator) -> None:
        """
        Args:
            run_dir: Run directory. Evaluations are appended to its file evaluations.jsonl.
            resume_step: Step from which training resumes. Saved evaluations of later steps are dropped, because
                training repeats these steps.
            validate: Function that evaluates a model. None disables evaluation.
            accelerator: The Accelerator of the training run.
        """
        self.folder, self.validate, self.accelerator = run_dir / "best", validate, accelerator
        self.log: MetricsLog | None = None
        self.best_score = float("-inf")
        if accelerator.is_main_process:
            if self._saved_step() > resume_step:
                shutil.rmtree(self.folder, ignore_errors=True)
            if validate is not None:
                self.log = MetricsLog(run_dir / "evaluations.jsonl", resume_step)
                if self._saved_step() >= 0:
                    self.best_score = json.loads((self.folder / METRICS).read_text())["score"]
        wait_for_everyone()

    def evaluate(self, model: LLM2CLIP, step: int) -> dict[str, float]:
        """Evaluate the model and save its weights if they are the best so far. Must be called by all ranks.

        Only the main process evaluates the model, unless the model is sharded, in which case all ranks do. On these
        ranks, the model is left in eval mode.

        Returns:
            The metrics, or an empty dict on ranks that did not evaluate the model.
        """
        if self.validate is None:
            return {}
        metrics: dict[str, float] = {}
        if self.accelerator.is_main_process or fsdp_enabled():  # a sharded model must run on all ranks
            model.eval()
            metrics = self.validate(model)
        is_best = self.log is not None and metrics["score"] > self.best_score
        if is_best or fsdp_enabled():
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

    def _saved_step(self) -> int:
        """Return the step of the saved weights, -1 if there are none, or sys.maxsize if they are incomplete."""
        if not self.folder.exists():
            return -1
        try:
            return int(json.loads((self.folder / METRICS).read_text())["step"])
        except (OSError, ValueError, KeyError):
            return sys.maxsize
