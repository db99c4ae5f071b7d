"""Heads first: the projection and the adapter learn on the vectors of the tower as it is, before the tower moves.

Heads drawn at random send a pretrained tower noise until they fit it; heads that fit it already send it only what it
lacks (linear probing, then fine-tuning: arXiv 2202.10054). Each image goes through the tower once, so that the
many epochs of the heads cost seconds.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.captions import epoch_order
from llm2clip.data.images import EvalTransform
from llm2clip.data.skips import SkipLog
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.recipes import AlignRecipe
from llm2clip.train.engine import MetricsLog, cosine_schedule
from llm2clip.train.losses import info_nce_over_captions
from llm2clip.train.rates import parameter_groups
from llm2clip.train.steps import Steps, decoded


def train_heads(
    data: Steps,
    store: EmbeddingStore,
    model: LLM2CLIP,
    recipe: AlignRecipe,
    folder: Path,
    log: SkipLog,
    accelerator: Accelerator,
) -> None:
    """Train the projection, the adapter and the logit scale in place; the tower stays as it is.

    All processes run the tower, each on its share of the images; the main process then trains the heads, and the
    others get them from it when the model is distributed.

    Args:
        data: the images and which captions they get in an epoch.
        store: the captions' embeddings.
        model: on its device, not yet distributed.
        recipe: `head_epochs` and `head_batch`; rates and schedule are those of the whole training.
        folder: keeps the tower's vectors, features-R-of-W.safetensors, and heads.jsonl.
        log: where unreadable images are counted and listed.
        accelerator: for precision, and the other processes.
    """
    rank, world = accelerator.process_index, accelerator.num_processes
    part = folder / f"features-{rank}-of-{world}.safetensors"
    made_of = {"images": data.digest, "tower": json.dumps([model.config.tower, recipe.pretrained])}
    if not part.exists() or _metadata(part) != made_of:
        index, features = _features(data, range(rank, data.count, world), model, recipe, log, accelerator)
        folder.mkdir(parents=True, exist_ok=True)
        tmp = part.with_suffix(".tmp")
        save_file({"index": index, "features": features}, tmp, made_of)
        os.replace(tmp, part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        parts = [load_file(folder / f"features-{r}-of-{world}.safetensors") for r in range(world)]
        index, features = (torch.cat([p[name] for p in parts]) for name in ("index", "features"))
        order = index.argsort()  # the same for any number of processes
        _train(index[order].tolist(), features[order], data, store, model, recipe, MetricsLog(folder / "heads.jsonl"))
    accelerator.wait_for_everyone()


@torch.no_grad()
def _features(
    data: Steps, indices: range, model: LLM2CLIP, recipe: AlignRecipe, log: SkipLog, accelerator: Accelerator
) -> tuple[Tensor, Tensor]:
    """Which images could be decoded, int64 (N,), and the tower's vectors of them, float16 (N, tower width)."""
    images = _Whole(data, indices, EvalTransform(model.tower.preprocess))
    loader = DataLoader(
        images,
        batch_size=64,
        num_workers=recipe.workers,
        collate_fn=list,
        multiprocessing_context="spawn" if recipe.workers else None,
    )
    model.eval()
    kept: list[int] = []
    vectors = [torch.empty(0, model.tower.width)]
    with tqdm(total=len(images), desc="features", unit="image", disable=not accelerator.is_main_process) as bar:
        for items in loader:
            for n, found in items:
                if isinstance(found, str):
                    log.skip(str(data.images.refs[n]), 0, "undecodable image", found)
            good = [(n, found) for n, found in items if not isinstance(found, str)]
            if good:
                with accelerator.autocast():
                    vectors.append(model.tower(torch.stack([p for _, p in good]).to(model.device)).float().cpu())
                kept += [n for n, _ in good]
            bar.update(len(items))
    log.check()
    return torch.tensor(kept, dtype=torch.int64), torch.cat(vectors).half()


def _train(
    index: list[int],
    features: Tensor,
    data: Steps,
    store: EmbeddingStore,
    model: LLM2CLIP,
    recipe: AlignRecipe,
    metrics: MetricsLog,
) -> None:
    batch = min(recipe.head_batch, len(index))
    per_epoch = len(index) // batch
    steps = per_epoch * recipe.head_epochs
    groups = parameter_groups(model, dataclasses.replace(recipe, tower_lr=0.0))
    heads = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine_schedule(steps, recipe.warmup))
    model.train()
    with tqdm(total=steps, desc="heads", unit="step") as bar:
        for step in range(steps):
            epoch, at = divmod(step, per_epoch)
            if at == 0:
                order = epoch_order(len(index), recipe.seed, epoch)
            members = order[at * batch : (at + 1) * batch]
            rows = np.array([data.rows(epoch, index[m]) for m in members]).T
            image = F.normalize(model.projection(features[torch.from_numpy(members)].float().to(model.device)), dim=-1)
            _, text, scale = model(embeddings=torch.from_numpy(store.take(rows.ravel())).to(model.device))
            ids = torch.from_numpy(rows).to(model.device)
            loss = info_nce_over_captions(image, text, scale, ids, gather=False)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(heads, recipe.max_grad_norm)
            optimizer.step()
            schedule.step()
            model.clamp_scale()
            value = loss.item()
            metrics.write(step + 1, loss=value, scale=scale.item())
            bar.update()
            bar.set_postfix(loss=f"{value:.3f}")


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as f:
        return dict(f.metadata() or {})


class _Whole(Dataset):
    """Images as evaluation sees them: (index, pixels), or (index, why not)."""

    def __init__(self, data: Steps, indices: range, transform: EvalTransform) -> None:
        self.refs = data.images.refs
        self.indices, self.transform = indices, transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, n: int) -> tuple[int, Tensor | str]:
        index = self.indices[n]
        return index, decoded(self.refs[index], self.transform)
