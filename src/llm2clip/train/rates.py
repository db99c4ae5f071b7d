"""Which part of the model learns, and at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.tower_lora import add_lora
from llm2clip.recipes import AlignRecipe


def choose_trained(model: LLM2CLIP, recipe: AlignRecipe) -> None:
    """Let those parameters ask for gradients that the recipe trains; put LoRA on the tower if it asks for it.

    Raises:
        ValueError: the recipe asks for what does not go together.
    """
    tower = model.tower
    frozen = recipe.tower_lr <= 0
    if recipe.lora_r and (frozen or recipe.train_layers is not None):
        raise ValueError("--align.lora_r is for the tower: it needs --align.tower_lr, and no --align.train_layers")
    if recipe.cache_features and not frozen:
        raise ValueError("--align.cache_features keeps the tower as it is: it needs --align.tower_lr 0")
    if recipe.loss == "cosine" and recipe.adapter != "none":
        # With a text side that learns, too, all vectors could become one, which has no loss at all.
        raise ValueError("--align.loss cosine has no negatives: it needs texts that stay, --align.adapter none")
    tower.requires_grad_(not frozen)
    if recipe.lora_r:
        add_lora(tower, recipe.lora_r, recipe.lora_alpha)
    elif not frozen and recipe.train_layers is not None:
        depth = tower.layer_of()
        blocks = sorted({depth[name] for name in depth if tower.in_blocks(name)})
        first = blocks[-min(recipe.train_layers, len(blocks))] if recipe.train_layers else blocks[-1] + 1
        for name, p in tower.named_parameters():
            p.requires_grad_(depth[name] >= first)
    for name, p in tower.named_parameters():
        if name.endswith("mask_token"):  # no gradient ever reaches it
            p.requires_grad_(False)
    model.logit_scale.requires_grad_(recipe.loss != "cosine")


def parameter_groups(model: LLM2CLIP, recipe: AlignRecipe) -> list[dict[str, Any]]:
    """AdamW's groups of what is trained: the tower by layer with its decay, the projection, the adapter, and last the
    logit scale and bias.

    Vectors (biases, norms, the scale) get no weight decay, as in CLIP.
    """
    tower = model.tower
    depth = tower.layer_of()
    scale_lr = recipe.lr if recipe.scale_lr is None else recipe.scale_lr
    projection_lr = recipe.lr if recipe.projection_lr is None else recipe.projection_lr
    groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        if not p.requires_grad:
            continue
        lr = {"projection": projection_lr, "adapter": recipe.lr}.get(part, scale_lr)
        if part == "tower":
            above = tower.num_layers - 1 - depth[name.removeprefix("tower.")]
            lr = recipe.tower_lr * recipe.layer_decay**above
        decay = recipe.weight_decay if p.ndim > 1 else 0.0
        groups.setdefault((part, lr, decay), []).append(p)
    return [{"params": ps, "lr": lr, "weight_decay": decay} for (_, lr, decay), ps in groups.items()]
