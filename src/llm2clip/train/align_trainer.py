"""The loop of align: from a config and a model to a trained model, one step after another, each exactly once.

Which images, captions and crops a step sees is a function of (seed, step) alone, so a killed run that starts again from
its last checkpoint sees what it would have seen.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list, gather_object, set_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from llm2clip.checkpoint import (
    COMPLETE_MARKER,
    MetricsLog,
    checkpoint_step,
    latest_checkpoint,
    mark_complete,
    prune_checkpoints,
    validate_resume,
)
from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import keep_freed_memory
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.distributed import fsdp_enabled, process_state, set_fsdp_wrap_policy, set_mixed_precision
from llm2clip.models.fingerprint import fingerprint
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.tower_lora import merge_tower_lora
from llm2clip.run_config import RESUME_SAFE
from llm2clip.store.image_features import TowerEncoder, store_image_features
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.align_data import AlignBatches, Batch
from llm2clip.train.best_checkpoint import BestCheckpoint
from llm2clip.train.ema import Ema
from llm2clip.train.fsdp import empty_copy, full_tensor, gather_to_cpu
from llm2clip.train.grad_cache import cached_backward
from llm2clip.train.losses import cosine_loss, info_nce, sigmoid_loss
from llm2clip.train.optim import cosine_schedule, parameter_groups, set_trainable
from llm2clip.train.trackers import trackers

Validate = Callable[[LLM2CLIP], dict[str, float]]
MAX_SKIPPED_STEPS = (
    20  # in a row: fp16's scaler halves its factor with each, so more of them are no matter of the factor
)


def latest_checkpoint_all_ranks(checkpoints: Path) -> Path | None:
    """The newest whole checkpoint, the main process's on all of them.

    Raises:
        ValueError: this process does not see it.
    """
    state = process_state()
    named = latest_checkpoint(checkpoints) if state.is_main_process else None
    if state.num_processes > 1:
        named = broadcast_object_list([named])[0]
    if named is not None and not (named / COMPLETE_MARKER).exists():
        raise ValueError(f"{named} is not seen by all processes: the run's folder must be on a disk that they share")
    return named


class AlignTrainer:
    """One training with one set of settings, from its beginning or its last checkpoint to its end."""

    def __init__(
        self,
        records: Sequence[Record],
        store: EmbeddingStore,
        model: LLM2CLIP,
        config: AlignConfig,
        folder: Path,
        features: Path | None,
        log: SkipLog,
        validate: Validate | None = None,
        heads: bool = False,
    ) -> None:
        """
        Args:
            records, store, model, config, log, validate: as of `align`.
            folder: keeps checkpoints, logs and the best weights.
            features: store of the tower's features; None is one beside or in `folder`.
            heads: this comes before another training, and takes seconds: it is begun again if its settings are others.
        """
        self.heads = heads
        self.store, self.model, self.config, self.folder, self.log = store, model, config, folder, log
        set_seed(config.seed)
        set_trainable(model, config)
        set_fsdp_wrap_policy(model.tower.blocks())
        options = trackers(config.report_to, folder)
        self.accelerator = Accelerator(
            mixed_precision=set_mixed_precision(config.precision),
            log_with=list(options) or None,
            project_config=ProjectConfiguration(str(folder), str(folder / "logs")),
        )
        if config.precision == "fp16" and self.accelerator.scaler is None:
            raise ValueError(f"--align.precision fp16 is for GPUs; on {self.accelerator.device} take bf16 or fp32")
        keep_freed_memory(self.accelerator.device)
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        vectors = None
        if config.cache_features:
            refs = [r.image for r in records if r.image is not None]
            tower = TowerEncoder(model.tower, config.precision)
            identity = tower.identity()
            if features is None:  # of just this tower: settings may have been mended since
                features = (folder.parent if heads else folder) / f"features-{fingerprint(identity)[:8]}"
            vectors = store_image_features(refs, tower, identity, features, log, workers=config.workers)
        self.data = AlignBatches(records, store, model, config, world, rank, vectors)
        self.steps = len(self.data)
        self.plan = {
            "steps": self.steps,
            "images in a step": self.data.step_size,
            "images": self.data.digest,
            "captions": self.data.captions,
            "caption encoder": store.manifest["fingerprint"],
            **{
                f"--align.{name}": value
                for name, value in vars(config).items()
                if name not in (*RESUME_SAFE, "head_batch")
            },
        }
        self.checkpoints = folder / "checkpoints"
        self.resume = self._resumable()
        self.first = checkpoint_step(self.resume) if self.resume else 0
        every = config.eval_steps
        self.evaluate_every = max(1, round(self.data.per_epoch)) if every is None else every
        self.best = BestCheckpoint(folder, self.first, validate if self.evaluate_every else None, self.accelerator)
        self._start_trackers(options)

    def _resumable(self) -> Path | None:
        """The checkpoint to go on from."""
        if self.accelerator.is_main_process and self.heads:
            try:
                validate_resume(latest_checkpoint(self.checkpoints), self.plan)
            except ValueError:
                shutil.rmtree(self.folder)
        return validate_resume(latest_checkpoint_all_ranks(self.checkpoints), self.plan)

    def run(self) -> LLM2CLIP:
        """Train; the model, in eval mode."""
        config, accelerator, model = self.config, self.accelerator, self.model
        groups = parameter_groups(model, config)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(self.steps, config.warmup_ratio))
        bare = empty_copy(model) if fsdp_enabled() else None
        if config.gradient_checkpointing:
            model.tower.set_grad_checkpointing()
        if config.compile:
            model.tower.backbone.compile()
        net, optimizer = accelerator.prepare(model, optimizer)
        accelerator.register_for_checkpointing(schedule)
        ema = Ema(model, config.ema) if config.ema else None
        loading: dict[str, Any] = {}
        if bare is None:  # what stays as it is need not be written again and again
            loading["strict"] = False
            frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
            accelerator.register_save_state_pre_hook(partial(_leave_out, frozen))
        set_seed(config.seed, device_specific=True)  # dropout is each process's own
        if self.resume is not None:
            accelerator.load_state(str(self.resume), **loading)
            if ema is not None:
                ema.load(self.resume, accelerator.process_index)

        metrics = MetricsLog(self.folder / "metrics.jsonl", self.first) if accelerator.is_main_process else None
        batches = self.data.batches(self.first)
        self._train_mode()
        skipped = 0  # steps in a row that fp16's scaler left out
        clock = time.perf_counter()
        bar = tqdm(
            total=self.steps,
            initial=self.first,
            desc="heads" if self.heads else "align",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        for step in range(self.first + 1, self.steps + 1):
            parts = list(islice(batches, config.accumulate))
            waited = time.perf_counter() - clock
            value, scale = self._gradients(net, parts, step)
            norm = float(full_tensor(accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)))
            if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler leaves such a step out
                self._stop(f"the gradients' norm is {norm}", step, parts)
            rate = config.lr * schedule.lr_lambdas[0](step - 1)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            model.clamp_logit_scale()
            skipped = skipped + 1 if accelerator.optimizer_step_was_skipped else 0
            if skipped >= MAX_SKIPPED_STEPS:
                self._stop(f"{skipped} steps in a row had gradients that are not finite", step, parts)
            if ema is not None and not skipped:
                ema.update(step)
            now = time.perf_counter()
            images = sum(len(part.images) for part in parts) * accelerator.num_processes
            line = {
                "loss": value,
                "grad_norm": norm if math.isfinite(norm) else None,
                "scale": scale,
                "lr": rate,
                "images_per_second": images / (now - clock),
                "waited": waited / (now - clock),  # share of the step's time that went by without a batch
            }
            clock = now
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}")
            if metrics is not None:
                metrics.write(step, **line)
            accelerator.log({name: value for name, value in line.items() if value is not None}, step)
            if self.best.validate and (step % self.evaluate_every == 0 or step == self.steps):
                with ema.instead() if ema is not None else nullcontext():
                    accelerator.log(self.best.measure(model, step), step)
                self._train_mode()
                clock = time.perf_counter()
            if step % config.save_steps == 0 or step == self.steps:
                self._save(step, ema)
                clock = time.perf_counter()
        bar.close()
        batches.close()
        for tracker in accelerator.trackers:
            tracker.finish()  # and not end_training, which parts the processes for good
        if ema is not None:
            ema.exchange()
        accelerator.unwrap_model(net, keep_fp32_wrapper=False)
        if bare is not None:
            model = gather_to_cpu(bare, model).to(accelerator.device)  # type: ignore[assignment]
        if config.load_best_at_end == "best":
            self.best.put(model)
        if config.gradient_checkpointing:
            model.tower.set_grad_checkpointing(False)
        merge_tower_lora(model.tower)
        return model.requires_grad_(True).eval()

    def _train_mode(self) -> None:
        self.model.train()
        if self.config.tower_lr <= 0:
            self.model.tower.eval()  # no dropout, no drop path: it stays as it is

    def _gradients(self, net: nn.Module, parts: Sequence[Batch], step: int) -> tuple[float, float]:
        """Add up the gradients of a step; the loss of the whole batch and the logit scale, the same everywhere."""
        accelerator, values, scale = self.accelerator, [], torch.zeros(())
        failures = [failure for part in parts for failure in part.failures.items()]
        if accelerator.num_processes > 1:  # the main process lists those of all, and all judge alike
            failures = gather_object(failures)
        for name, reason in failures:
            self.log.skip(name, 0, "undecodable image", reason)
            self.log.check()
        for n, part in enumerate(parts):
            with accelerator.no_sync(net) if n < len(parts) - 1 else nullcontext():
                loss, scale = self._loss(net, part)
                values.append(accelerator.reduce(loss.detach(), "mean").item())
                if not math.isfinite(values[-1]):
                    self._stop(f"the loss is {values[-1]}", step, parts)
                accelerator.backward(loss / len(parts))
        return sum(values) / len(values), scale.item()

    def _loss(self, net: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a batch, in one pass or in several with gradient caching; and the logit scale."""
        device, seen = self.accelerator.device, {}
        owner, ids = (torch.from_numpy(x).to(device) for x in (batch.owner, batch.rows))
        embeddings = torch.from_numpy(self.store.take(batch.rows))
        size = self.config.micro_batch_size or len(batch.images)
        cuts = [*range(0, len(batch.images), size), len(batch.images)]
        at = np.searchsorted(batch.owner, cuts).tolist()
        images_are = "pixels" if self.data.features is None else "features"

        def run(n: int) -> tuple[Tensor, ...]:
            images, texts = batch.images[cuts[n] : cuts[n + 1]], embeddings[at[n] : at[n + 1]]
            with self.accelerator.autocast():
                image, text, scale, bias = net(**{images_are: images.to(device), "embeddings": texts.to(device)})
            return image, text, scale[None], bias[None]

        def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            seen["scale"] = scale.detach().mean()
            if self.config.loss == "sigmoid":
                return sigmoid_loss(image, text, scale.mean(), bias.mean(), owner, ids)
            if self.config.loss == "cosine":
                return cosine_loss(image, text, owner)
            return info_nce(image, text, scale.mean(), owner, ids)

        if len(cuts) == 2:
            value = loss(*run(0))
        else:
            value = cached_backward([partial(run, n) for n in range(len(cuts) - 1)], loss, net, device)
        return value, seen["scale"]

    def _save(self, step: int, ema: Ema | None) -> None:
        checkpoint = self.checkpoints / f"step-{step}"
        self.accelerator.save_state(str(checkpoint))
        if ema is not None:
            ema.save(checkpoint, self.accelerator.process_index)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            mark_complete(checkpoint, self.plan)
            prune_checkpoints(self.checkpoints)

    def _stop(self, what: str, step: int, parts: Sequence[Batch]) -> None:
        """Raise FloatingPointError, with the step, its images and the last good checkpoint."""
        names = [name for part in parts for name in part.names]
        file = self.folder / f"not-finite-{step}-{self.accelerator.process_index}.json"
        file.write_text(json.dumps({"step": step, "images": names}, indent=1))
        last = latest_checkpoint(self.checkpoints)
        raise FloatingPointError(
            f"{what} at step {step}, of the images {', '.join(names[:3])} ... (all of this process: {file}); last good "
            f"checkpoint: {last or 'none'}. Lower --align.lr or --align.tower_lr, or use fp32"
        )

    def _start_trackers(self, options: dict[str, Any]) -> None:
        if not options:
            return
        if "tensorboard" in options and self.resume is not None:
            options["tensorboard"]["purge_step"] = self.first + 1  # what will be done again
        settings = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in vars(self.config).items()}
        self.accelerator.init_trackers("llm2clip", settings, options)


def _leave_out(frozen: set[str], models: list[nn.Module], weights: list[dict[str, Tensor]], _folder: str) -> None:
    """Before a checkpoint is written: take out the weights that are not trained."""
    for state in weights:
        for name in [name for name in state if name.removeprefix("module.") in frozen]:
            del state[name]
