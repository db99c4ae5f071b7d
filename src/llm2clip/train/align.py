"""Stage 2, align: the vision tower, its projection and the adapter learn from the store.

Each step takes a batch of images and some cached captions of each, and lowers the symmetric InfoNCE between them. Which
images, captions and crops a step sees is a function of (seed, step) alone, so a killed run that starts again from its
last checkpoint sees what it would have seen. The LLM is not here: its embeddings are rows of the store.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.captions import epoch_order
from llm2clip.data.images import ImageError, TrainTransform, load
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
    reuse_memory,
    step_of,
)
from llm2clip.train.losses import info_nce


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
        FloatingPointError: the loss is not finite; the message names the step and the last good checkpoint.
    """
    processes()
    accelerator = Accelerator(mixed_precision={"fp32": "no"}.get(recipe.precision, recipe.precision))
    set_seed(recipe.seed)
    reuse_memory(accelerator.device)
    data = Steps(records, store, model, recipe, accelerator.num_processes, accelerator.process_index)
    steps = len(data)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, recipe.warmup))
    net, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(schedule)

    checkpoints = folder / "checkpoints"
    resume = latest_checkpoint(checkpoints) if accelerator.is_main_process else None
    accelerator.wait_for_everyone()
    resume = resume or latest_checkpoint(checkpoints)
    first = 0
    if resume is not None:
        accelerator.load_state(str(resume))
        first = step_of(resume)
    metrics = MetricsLog(folder / "metrics.jsonl", first) if accelerator.is_main_process else None

    model.train()
    reported: set[str] = set()
    clock = time.perf_counter()
    with tqdm(total=steps, initial=first, desc="align", unit="step", disable=not accelerator.is_main_process) as bar:
        for step, (pixels, rows, failures) in enumerate(data.batches(first), start=first + 1):
            for name, reason in failures.items():
                if name not in reported:  # an image fails once an epoch
                    reported.add(name)
                    log.skip(name, 0, "undecodable image", reason)
                    log.check()
            embeddings = torch.from_numpy(store.take(rows.ravel())).to(accelerator.device)
            with accelerator.autocast():
                image, text, scale = net(pixels=pixels.to(accelerator.device), embeddings=embeddings)
            ids = torch.from_numpy(rows).to(accelerator.device)
            losses = [info_nce(image, t, scale, i) for t, i in zip(text.split(len(image)), ids, strict=True)]
            loss = torch.stack(losses).mean()
            value = accelerator.reduce(loss.detach(), "mean").item()  # of the whole batch, the same on every process
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at step {step}; last good checkpoint: "
                    f"{latest_checkpoint(checkpoints) or 'none'}. Lower --align.lr or --align.tower_lr, or use fp32"
                )
            optimizer.zero_grad()
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
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
                    grad_norm=float(norm),
                    scale=scale.item(),
                    lr=schedule.get_last_lr()[-1],
                    images_per_second=len(image) * accelerator.num_processes / (now - clock),
                )
                clock = now
            if step % recipe.checkpoint_every == 0 or step == steps:
                accelerator.save_state(str(checkpoints / f"step-{step}"))
                accelerator.wait_for_everyone()
                if accelerator.is_main_process:
                    mark_complete(checkpoints / f"step-{step}")
                    prune_checkpoints(checkpoints)
    return model.eval()


def parameter_groups(model: LLM2CLIP, recipe: AlignRecipe) -> list[dict[str, Any]]:
    """AdamW's groups: the tower by layer with its decay, the projection and the adapter, the logit scale last.

    Vectors (biases, norms, the scale) get no weight decay, as in CLIP. A tower rate of 0 freezes the tower.
    """
    tower = model.tower
    tower.requires_grad_(recipe.tower_lr > 0)
    depth = tower.layer_of()
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad or name == "logit_scale":
            continue
        lr = recipe.lr
        if name.startswith("tower."):
            above = tower.num_layers - 1 - depth[name.removeprefix("tower.")]
            lr = recipe.tower_lr * recipe.layer_decay**above
        decay = recipe.weight_decay if p.ndim > 1 else 0.0
        groups.setdefault((lr, decay), []).append(p)
    scale_lr = recipe.lr if recipe.scale_lr is None else recipe.scale_lr
    out: list[dict[str, Any]] = [{"params": ps, "lr": lr, "weight_decay": wd} for (lr, wd), ps in groups.items()]
    return [*out, {"params": [model.logit_scale], "lr": scale_lr, "weight_decay": 0.0}]


class Steps:
    """The batches of a run, from any step on."""

    def __init__(
        self,
        records: Sequence[Record],
        store: EmbeddingStore,
        model: LLM2CLIP,
        recipe: AlignRecipe,
        world: int = 1,
        rank: int = 0,
    ) -> None:
        usable = [r for r in records if r.image is not None]
        self.batch = recipe.batch * world
        self.per_epoch = len(usable) // self.batch
        if self.per_epoch == 0:
            raise ValueError(
                f"{len(usable)} images are fewer than a batch of {self.batch}; lower --align.batch or add images"
            )
        self.recipe, self.world, self.rank = recipe, world, rank
        self.count = len(usable)
        self.short = [store.rows(r.captions) for r in usable]
        self.long = [store.rows(r.long_captions) for r in usable]
        self.images = _Images(
            usable, TrainTransform(model.tower.preprocess, (recipe.crop, 1.0), recipe.hflip), recipe.seed
        )

    def __len__(self) -> int:
        return self.per_epoch * self.recipe.epochs

    def rows(self, epoch: int, index: int) -> list[int]:
        """The store's rows of the captions that image `index` gets in this epoch: one for each of the step's losses.

        Each is a long one with the recipe's probability; none comes again before all of its kind have come.
        """
        rng = np.random.default_rng([self.recipe.seed, epoch, index])
        short, long = rng.permutation(self.short[index]), rng.permutation(self.long[index])
        share = self.recipe.long_share if len(short) and len(long) else float(len(long) > 0)
        kinds = rng.random(self.recipe.captions) < share
        nth = np.where(kinds, np.cumsum(kinds), np.cumsum(~kinds)) - 1
        return [int((long if k else short)[n % len(long if k else short)]) for k, n in zip(kinds, nth, strict=True)]

    def batches(self, first: int) -> Iterator[tuple[Tensor, np.ndarray, dict[str, str]]]:
        """From step `first`: pixels (B, 3, S, S) uint8, store rows (captions, B), and images that failed, with why."""
        loader = DataLoader(
            self.images,
            batch_sampler=_Lazily(self, first),
            num_workers=self.recipe.workers,
            collate_fn=list,
            persistent_workers=False,
            multiprocessing_context="spawn" if self.recipe.workers else None,
            generator=torch.Generator(),
        )
        for items in loader:
            failures = {name: found for name, found, _, _ in items if isinstance(found, str)}
            good = [(found, epoch, i) for _, found, epoch, i in items if not isinstance(found, str)]
            if not good:
                raise ValueError(f"no image of a batch could be decoded, {next(iter(failures))} for one")
            # An image that fails is replaced by another of its batch; equal captions are no negatives in the loss.
            good += [good[n % len(good)] for n in range(len(items) - len(good))]
            rows = np.array([self.rows(epoch, i) for _, epoch, i in good]).T
            yield torch.stack([found for found, _, _ in good]), rows, failures

    def members(self, first: int) -> Iterator[list[tuple[int, int]]]:
        """(epoch, image) of this process's part of each step from `first` on."""
        order, drawn = np.empty(0, np.int64), -1
        for step in range(first, len(self)):
            epoch, at = divmod(step, self.per_epoch)
            if epoch != drawn:
                order, drawn = epoch_order(self.count, self.recipe.seed, epoch), epoch
            whole = order[at * self.batch : (at + 1) * self.batch]
            yield [(epoch, int(i)) for i in whole[self.rank :: self.world]]


class _Lazily(Sampler[list[tuple[int, int]]]):
    """The steps' members as a batch sampler that is worked out as it is read."""

    def __init__(self, steps: Steps, first: int) -> None:
        self.steps, self.first = steps, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self.steps.members(self.first)

    def __len__(self) -> int:
        return len(self.steps) - self.first


class _Images(Dataset):
    """(epoch, index) to the decoded and cropped image, the same in any worker."""

    def __init__(self, records: Sequence[Record], transform: TrainTransform, seed: int) -> None:
        self.refs = [r.image for r in records if r.image is not None]
        self.transform, self.seed = transform, seed

    def __getitem__(self, at: tuple[int, int]) -> tuple[str, Tensor | str, int, int]:
        epoch, index = at
        ref = self.refs[index]
        seed = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)[0])
        try:
            return str(ref), self.transform(load(ref), torch.Generator().manual_seed(seed)), epoch, index
        except (ImageError, OSError) as error:
            return str(ref), str(error), epoch, index
