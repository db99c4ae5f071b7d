"""Stage 2, align: the vision tower, its projection and the adapter learn from the store.

Each step takes a batch of images and some cached captions of each, and lowers the symmetric InfoNCE between them. Which
images, captions and crops a step sees is a function of (seed, step) alone, so a killed run that starts again from its
last checkpoint sees what it would have seen. The LLM is not here: its embeddings are rows of the store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm

from llm2clip.cache.store import EmbeddingStore
from llm2clip.cpu import quick_products, reuse_memory
from llm2clip.data.records import Record
from llm2clip.data.skips import SkipLog
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.processes import processes
from llm2clip.recipes import AlignRecipe
from llm2clip.train.engine import (
    MetricsLog,
    cosine_schedule,
    latest_checkpoint,
    mark_complete,
    prune_checkpoints,
    resumable,
    step_of,
    use_precision,
)
from llm2clip.train.heads import train_heads
from llm2clip.train.losses import info_nce_over_captions
from llm2clip.train.rates import parameter_groups
from llm2clip.train.steps import Steps


@quick_products()
def align(
    records: Sequence[Record], store: EmbeddingStore, model: LLM2CLIP, recipe: AlignRecipe, folder: Path, log: SkipLog
) -> LLM2CLIP:
    """Train `model` in place on `records`; a killed run goes on from its last checkpoint.

    Args:
        records: with images; their captions must be in the store.
        store: the captions' embeddings.
        model: freshly initialised, its tower pretrained.
        recipe: the settings.
        folder: keeps checkpoints/step-N and metrics.jsonl.
        log: where unreadable images are counted and listed.

    Raises:
        ValueError: there are fewer images than a batch.
        TooManySkipped: too many images cannot be decoded.
        FloatingPointError: the loss or a gradient is not finite; the message names the step and the last checkpoint.
    """
    processes()  # before Accelerate decides by itself whether this is one of several
    accelerator = Accelerator(mixed_precision=use_precision(recipe.precision))
    set_seed(recipe.seed)
    reuse_memory(accelerator.device)
    data = Steps(records, store, model, recipe, accelerator.num_processes, accelerator.process_index)
    steps = len(data)
    checkpoints = folder / "checkpoints"
    plan = {"steps": steps, "images in a step": data.batch, "images": data.digest}
    with accelerator.main_process_first():
        resume = resumable(latest_checkpoint(checkpoints), plan)
    if recipe.head_epochs and resume is None:
        train_heads(data, store, model, recipe, folder, log, accelerator)
        set_seed(recipe.seed)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, recipe.warmup))
    net, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)

    first = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        first = step_of(resume)
    metrics = MetricsLog(folder / "metrics.jsonl", first) if accelerator.is_main_process else None

    model.train()
    clock = time.perf_counter()
    with tqdm(total=steps, initial=first, desc="align", unit="step", disable=not accelerator.is_main_process) as bar:
        for step, (pixels, rows, failures) in enumerate(data.batches(first), start=first + 1):
            for name, reason in failures.items():
                log.skip(name, 0, "undecodable image", reason)
                log.check()
            embeddings = torch.from_numpy(store.take(rows.ravel())).to(accelerator.device)
            with accelerator.autocast():
                image, text, scale = net(pixels=pixels.to(accelerator.device), embeddings=embeddings)
            ids = torch.from_numpy(rows).to(accelerator.device)
            loss = info_nce_over_captions(image, text, scale, ids)
            value = accelerator.reduce(loss.detach(), "mean").item()  # of the whole batch, the same on every process
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}; {advice(checkpoints)}")
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = float(accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm))
            if not math.isfinite(norm) and accelerator.scaler is None:  # fp16's scaler leaves such a step out
                raise FloatingPointError(f"the gradients' norm is {norm} at step {step}; {advice(checkpoints)}")
            optimizer.step()
            schedule.step()
            model.clamp_scale()
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}")
            if metrics is not None:
                now = time.perf_counter()
                metrics.write(
                    step,
                    loss=value,
                    grad_norm=norm,
                    scale=scale.item(),
                    lr=schedule.get_last_lr()[-1],
                    images_per_second=len(image) * accelerator.num_processes / (now - clock),
                )
                clock = now
            if step % recipe.checkpoint_every == 0 or step == steps:
                accelerator.save_state(str(checkpoints / f"step-{step}"))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    mark_complete(checkpoints / f"step-{step}", plan)
                    prune_checkpoints(checkpoints)
    return model.eval()


def advice(checkpoints: Path) -> str:
    """What to do about a number that is not finite."""
    return (
        f"last good checkpoint: {latest_checkpoint(checkpoints) or 'none'}. "
        "Lower --align.lr or --align.tower_lr, or use fp32"
    )
