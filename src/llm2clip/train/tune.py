"""Stage 1, tune: a decoder LLM learns to tell captions apart (caption-contrastive fine-tuning, "CC").

Two captions of one image are a positive pair, the captions of the other images of the batch its negatives. The loop is
sentence-transformers' trainer; what is ours is which pairs a step sees, forward passes over captions of similar length
(a caption has 12 tokens or 200: padding a whole batch to its longest wastes half the compute), and checkpoints that
hold only what is trained.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from llm2clip.data.pairs import mixed_pairs
from llm2clip.models.text import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS, CaptionEncoder, length_batches
from llm2clip.processes import processes
from llm2clip.recipes import TuneRecipe
from llm2clip.train.engine import (
    MetricsLog,
    chosen_precision,
    digest,
    latest_checkpoint,
    mark_complete,
    resumable,
    reuse_memory,
    step_of,
    use_precision,
)
from llm2clip.train.losses import info_nce

TRAINED = "trained.safetensors"


def tune(sources: Sequence[Sequence[Sequence[str]]], encoder: CaptionEncoder, recipe: TuneRecipe, folder: Path) -> Path:
    """Tune `encoder` on the captions of images and save it to `folder/encoder`; a killed run goes on.

    Args:
        sources: all captions of each image, source by source: one, or as many as `recipe.weights`.
        encoder: the raw caption encoder; changed in place.
        recipe: the settings.
        folder: keeps checkpoints and metrics.jsonl; `folder/encoder` appears when the work is done.

    Returns:
        The folder of the tuned encoder, in sentence-transformers layout.

    Raises:
        ValueError: a source has too few images with two captions for the batch.
    """
    done, state = folder / "encoder", processes()
    if recipe.steps > 0 and not done.exists():
        _train(sources, encoder, recipe, folder)
    if state.is_main_process and not done.exists():
        part = folder / ".encoder.part"
        shutil.rmtree(part, ignore_errors=True)
        encoder.save_pretrained(part)
        part.replace(done)
    state.wait_for_everyone()
    return done


def _train(
    sources: Sequence[Sequence[Sequence[str]]], encoder: CaptionEncoder, recipe: TuneRecipe, folder: Path
) -> None:
    torch.manual_seed(recipe.seed)
    state = processes()
    precision = chosen_precision(recipe.precision, state.device)
    use_precision(precision)
    if recipe.lora_r:
        lora = LoraConfig(
            r=recipe.lora_r,
            lora_alpha=recipe.lora_alpha,
            lora_dropout=recipe.lora_dropout,
            target_modules="all-linear",
        )
        encoder.st[0].model = get_peft_model(encoder.llm, lora)
    else:  # the table is large, and captions read few rows of it
        encoder.llm.get_input_embeddings().requires_grad_(False)
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(recipe.warmup * recipe.steps)),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=state.device.type == "cpu",
        seed=recipe.seed,
        batch_sampler=cast(Any, _sequential),
        save_steps=recipe.checkpoint_every,
        save_total_limit=2,
        logging_steps=1,
        report_to="none",
        dataloader_drop_last=True,
        logging_nan_inf_filter=False,
        # Ranks make different numbers of forward passes, by the lengths of their captions: none may be a collective.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        disable_tqdm=False,
    )
    reuse_memory(args.device)
    args._n_gpu = 1  # one process a device, under a launcher: never torch.nn.DataParallel
    world = args.world_size
    batches = mixed_pairs(sources, recipe.weights, recipe.batch * world, recipe.steps, recipe.seed, recipe.alike)
    pairs = [pair for batch in batches for pair in batch]
    plan = {"steps": recipe.steps, "pairs": recipe.batch * world, "captions": digest(t for pair in pairs for t in pair)}
    with state.main_process_first():
        resume = resumable(latest_checkpoint(folder / "checkpoints", "checkpoint-"), plan)
    budget = recipe.batch_tokens or (GPU_BATCH_TOKENS if args.device.type == "cuda" else CPU_BATCH_TOKENS)
    trainer = TuneTrainer(
        model=encoder.st,
        args=args,
        train_dataset=Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [p for _, p in pairs]}),
        loss=CaptionContrastiveLoss(encoder, recipe.temperature, budget),
        data_collator=TokenCollator(preprocess_fn=encoder.tokenize),
        callbacks=[TuneLog(folder / "metrics.jsonl", step_of(resume) if resume else 0, plan)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(LossBar)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    if recipe.lora_r:
        encoder.st[0].model = encoder.llm.merge_and_unload()
    encoder.eval()


class CaptionContrastiveLoss(nn.Module):
    """InfoNCE between the two captions of each image, over forward passes of captions of similar length."""

    def __init__(self, encoder: CaptionEncoder, temperature: float, batch_tokens: int) -> None:
        super().__init__()
        self.model = encoder.st  # the trainer puts the distributed wrapper here
        self._encoder = [encoder]
        self.scale = 1 / temperature
        self.batch_tokens = batch_tokens

    def forward(self, features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        ids: list[list[int]] = next(iter(features))["ids"]
        order: list[int] = []
        vectors = []
        with _attention(self._encoder[0].device):
            for rows in length_batches([len(i) for i in ids], self.batch_tokens):
                batch = self._encoder[0].features([ids[r] for r in rows])
                vectors.append(self.model(batch)["sentence_embedding"].float())
                order += rows
        vector = F.normalize(torch.cat(vectors)[torch.tensor(order).argsort()], dim=-1)
        half = len(ids) // 2
        return info_nce(vector[:half], vector[half:], self.scale)


def _attention(device: torch.device) -> AbstractContextManager[None]:
    """On a CPU, plain products in place of PyTorch's fused attention, whose backward pass takes ten times as long for
    short captions in bf16 (`benchmarks/tune.py`)."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


@dataclass
class TokenCollator(SentenceTransformerDataCollator):
    """Pairs to token ids: all first captions, then all second ones, not padded."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        texts = [f["anchor"] for f in features] + [f["positive"] for f in features]
        return {"ids": self.preprocess_fn(texts).ids}


class TuneTrainer(SentenceTransformerTrainer):
    """sentence-transformers' trainer whose checkpoints hold the trained weights only, in safetensors."""

    def collect_features(self, inputs: dict[str, Any]) -> tuple[list[dict[str, Any]], None]:
        return [inputs], None

    def _trained(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None  # the folder of a checkpoint: nothing else is saved by the trainer
        folder = Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.cpu().contiguous() for name, p in self._trained().items()}, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state, trained = load_file(Path(resume_from_checkpoint) / TRAINED), self._trained()
        if state.keys() != trained.keys():
            raise ValueError(
                f"{resume_from_checkpoint} holds other weights than this run trains; delete it to begin again"
            )
        for name, p in trained.items():
            p.copy_(state[name])


class TuneLog(TrainerCallback):
    """Metrics to JSONL, and the mark on whole checkpoints."""

    def __init__(self, path: Path, resume_step: int, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.log = MetricsLog(path, resume_step) if processes().is_main_process else None

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
        processes().wait_for_everyone()  # each writes a part
        if state.is_world_process_zero:
            mark_complete(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.plan)


class LossBar(ProgressCallback):
    """A progress bar that carries the loss, in place of a line of text every few steps."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("tune")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def _sequential(dataset: Dataset, batch_size: int, drop_last: bool, **_: Any) -> BatchSampler:
    """Batches in the order in which the pairs were drawn."""
    return BatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)
