"""Evaluation while training, and the best weights so far."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from llm2clip.checkpoint import MetricsLog
from llm2clip.distributed import fsdp_enabled
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.train.fsdp import full_tensor

WEIGHTS, FIGURES = "model.safetensors", "figures.json"


class BestCheckpoint:
    """Measures the model now and then, and keeps the weights that scored highest in `folder/best`."""

    def __init__(
        self,
        folder: Path,
        resume_step: int,
        validate: Callable[[LLM2CLIP], dict[str, float]] | None,
        accelerator: Accelerator,
    ) -> None:
        """
        Args:
            folder: of the run.
            resume_step: what was measured after it will be measured again.
            validate: figures of a model, `score` among them, higher is better; None measures nothing.
            accelerator: for the other processes.
        """
        self.folder, self.validate, self.accelerator = folder / "best", validate, accelerator
        self.log: MetricsLog | None = None
        self.highest = float("-inf")
        if (
            accelerator.is_main_process and self._step() > resume_step
        ):  # of steps that will be done again, or another run
            shutil.rmtree(self.folder, ignore_errors=True)
        if validate is not None and accelerator.is_main_process:
            self.log = MetricsLog(folder / "evaluations.jsonl", resume_step)
            if self._step() >= 0:
                self.highest = json.loads((self.folder / FIGURES).read_text())["score"]
        accelerator.wait_for_everyone()

    def _step(self) -> int:
        """The step of the weights that are kept; -1 where there are none."""
        try:
            return int(json.loads((self.folder / FIGURES).read_text())["step"])
        except (OSError, ValueError, KeyError):
            return -1 if not self.folder.exists() else sys.maxsize

    def measure(self, model: LLM2CLIP, step: int) -> dict[str, float]:
        """Figures of the model at a step; on the main process, but where weights are shared out, which all must do."""
        if self.validate is None:
            return {}
        figures: dict[str, float] = {}
        if self.accelerator.is_main_process or fsdp_enabled():
            model.eval()
            figures = self.validate(model)
        better = self.log is not None and figures["score"] > self.highest
        if fsdp_enabled() or better:
            state = {name: full_tensor(t).detach().cpu().contiguous() for name, t in model.state_dict().items()}
        if better:
            self.highest = figures["score"]
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / FIGURES).unlink(missing_ok=True)  # weights without figures are as good as absent
            tmp = self.folder / f".{WEIGHTS}.tmp"
            save_file(state, tmp, {"step": str(step)})
            tmp.replace(self.folder / WEIGHTS)
            (self.folder / FIGURES).write_text(json.dumps({"step": step, **figures}, indent=1))
        if self.log is not None:
            self.log.write(step, **figures)
        self.accelerator.wait_for_everyone()
        return figures

    def put(self, model: LLM2CLIP) -> None:
        """Give the model the best weights."""
        model.load_state_dict(load_file(self.folder / WEIGHTS))
