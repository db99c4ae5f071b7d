"""Which part of the model learns at which rate."""

from __future__ import annotations

from typing import Any

from torch import nn

from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.recipes import AlignRecipe


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
