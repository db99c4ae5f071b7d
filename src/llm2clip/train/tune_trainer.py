"""The loop of tune: sentence-transformers' trainer with a log, a bar, and checkpoints of only what is trained."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llm2clip.checkpoint import MetricsLog, checkpoint_step, latest_checkpoint, mark_complete, validate_resume
from llm2clip.config import TuneConfig
from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.distributed import process_state, set_fsdp_wrap_policy, set_mixed_precision
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.train.fsdp import copy_into, empty_copy, full_tensor, gather_to_cpu

TRAINED = "trained.safetensors"


@onednn_matmul()
def train_captions(
    rows: Sequence[Mapping[str, Any]],
    encoder: CaptionEncoder,
    loss: nn.Module,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    config: TuneConfig,
    folder: Path,
    *,
    name: str,
    steps: int,
    precision: str,
    plan: Mapping[str, Any],
) -> None:
    """Train the encoder's weights that ask for gradients; a killed run goes on from its last checkpoint.

    Args:
        rows: of all steps, in the order in which they are seen.
        encoder: trained in place.
        loss: takes [batch] and gives a scalar.
        collator: rows to a batch.
        recipe: rates, batch and checkpoints.
        folder: keeps checkpoints/ and metrics.jsonl.
        name: on the progress bar.
        steps: optimizer steps.
        precision: fp32, bf16 or fp16.
        plan: what a run must have in common with a checkpoint to go on from it.

    Raises:
        ValueError: the checkpoints there are of another plan.
        FloatingPointError: the loss or a gradient is not finite.
    """
    set_mixed_precision(precision)
    llm: Any = encoder.llm
    set_fsdp_wrap_policy(llm.layers if hasattr(llm, "layers") else llm.encoder.layer)
    state = process_state()
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(config.warmup_ratio * steps)),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=state.device.type == "cpu",
        seed=config.seed,
        batch_sampler=cast(Any, _sequential),
        save_steps=config.save_steps,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        dataloader_drop_last=True,
        logging_nan_inf_filter=False,
        # Ranks make different numbers of forward passes, by the lengths of their texts: none may be a collective.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
    )
    keep_freed_memory(args.device)
    args._n_gpu = 1  # one process a device, under a launcher: never torch.nn.DataParallel
    plan = dict(plan)
    with state.main_process_first():
        latest = latest_checkpoint(folder / "checkpoints", "checkpoint-")
    resume = validate_resume(latest, plan)  # outside: who raises within would leave the others waiting
    trainer = TuneTrainer(
        model=encoder.st,
        args=args,
        train_dataset=Dataset.from_list([dict(row) for row in rows]),
        loss=loss,
        data_collator=cast(Any, collator),
        callbacks=[TuneLog(folder / "metrics.jsonl", checkpoint_step(resume) if resume else 0, plan)],
    )
    bare = empty_copy(encoder.st) if trainer.is_fsdp_enabled else None
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar(name))
    with _attention(args.device):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if bare is None:
        trainer.accelerator.unwrap_model(encoder.st, keep_fp32_wrapper=False)  # no autocast from here on
        vars(encoder.st).pop("_is_accelerate_prepared", None)  # or another training would go without
    else:
        encoder.st = gather_to_cpu(bare, encoder.st)


class TuneTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer whose checkpoints hold the trained weights only, in safetensors."""

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], None]:
        return [inputs], None

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        assert output_dir is not None  # the folder of a checkpoint: nothing else is saved by the trainer
        folder = Path(output_dir)
        trained = {name: full_tensor(p).cpu().contiguous() for name, p in self._trained().items()}
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state, trained = load_file(Path(resume_from_checkpoint) / TRAINED), self._trained()
        if state.keys() != trained.keys():
            raise ValueError(
                f"{resume_from_checkpoint} holds other weights than this run trains; delete it to begin again"
            )
        for name, p in trained.items():
            copy_into(p, state[name])


class TuneLog(TrainerCallback):
    """Metrics to JSONL, and the mark on whole checkpoints."""

    def __init__(self, path: Path, resume_step: int, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.log = MetricsLog(path, resume_step) if process_state().is_main_process else None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        # A gradient that is not finite makes the weights so; fp16's scaler is there to leave such steps out.
        for name in ("loss",) if args.fp16 else ("loss", "grad_norm"):
            if logs and name in logs and not math.isfinite(logs[name]):
                raise FloatingPointError(
                    f"{name} is {logs[name]} at step {state.global_step}; checkpoints are in {args.output_dir}. "
                    "Lower --tune.lr, or use fp32"
                )
        if self.log is not None and logs and "loss" in logs:
            keys = ("loss", "grad_norm", "learning_rate")
            self.log.write(state.global_step, **{k: float(logs[k]) for k in keys if k in logs})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        process_state().wait_for_everyone()  # each writes a part
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            for whole in checkpoint.glob("pytorch_model_fsdp*"):  # all weights once more, of which nobody reads any
                shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
            mark_complete(checkpoint, self.plan)


class LossBar(ProgressCallback):
    """A progress bar that carries the loss, in place of a line of text every few steps."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, plain products in place of PyTorch's fused attention, whose backward pass is slow for short captions
    in bf16 (`benchmarks/tune.py`)."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def _sequential(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Batches in the order in which the rows were drawn."""
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)
