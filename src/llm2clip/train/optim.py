"""Which part of the model learns, and at which rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from llm2clip.config import AlignConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.tower_lora import add_tower_lora


def set_trainable(model: LLM2CLIP, config: AlignConfig) -> None:
    """Let those parameters ask for gradients that the recipe trains; put LoRA on the tower if it asks for it.

    Raises:
        ValueError: the tower has not what the recipe asks for.
    """
    tower = model.tower
    frozen = config.tower_lr <= 0
    tower.requires_grad_(not frozen)
    if config.lora_r:
        add_tower_lora(tower, config.lora_r, config.lora_alpha)
    elif not frozen and config.train_layers is not None:
        depth = tower.parameter_depths()
        blocks = sorted({depth[name] for name in depth if tower.is_in_block(name)})
        if not blocks:
            raise ValueError("--align.train_layers finds no blocks in this tower: train all of it, or LoRA")
        first = blocks[-min(config.train_layers, len(blocks))]
        for name, p in tower.named_parameters():
            p.requires_grad_(depth[name] >= first)
    for name, p in tower.named_parameters():
        if name.endswith("mask_token"):  # no gradient ever reaches it
            p.requires_grad_(False)
    model.logit_scale.requires_grad_(config.loss != "cosine")


def parameter_groups(model: LLM2CLIP, config: AlignConfig) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained: the logit scale and bias, the tower by layer with its decay, the projection
    and the adapter.

    Vectors (biases, norms, the scale) get no weight decay, as in CLIP.
    """
    tower = model.tower
    depth, top = tower.parameter_depths(), tower.num_layers - 1
    if config.layer_decay < 1 and top == 0:
        raise ValueError(
            "--align.layer_decay: timm does not say which layers of this tower are above which; leave it out"
        )
    scale_lr = config.lr if config.scale_lr is None else config.scale_lr
    projection_lr = config.lr if config.projection_lr is None else config.projection_lr
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        if not p.requires_grad:
            continue
        lr = {"projection": projection_lr, "adapter": config.lr}.get(part, scale_lr)
        if part == "tower":
            lr = config.tower_lr * config.layer_decay ** (top - depth[name.removeprefix("tower.")])
        decay = config.weight_decay if p.ndim > 1 else 0.0
        groups.setdefault((part, lr, decay), []).append(p)
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (_, lr, decay), ps in groups.items()]


def cosine_schedule(steps: int, warmup: float) -> Callable[[int], float]:
    """Factor on the learning rate at a step: linear up over `warmup` of the steps, then a cosine to zero."""
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))

    return factor
