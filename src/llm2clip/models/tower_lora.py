"""LoRA (arXiv 2106.09685) on a vision tower while it trains; at the end it is the same tower with other weights."""

from __future__ import annotations

from typing import Any, cast

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm2clip.models.vision_tower import VisionTower


def add_tower_lora(tower: VisionTower, rank: int, alpha: int) -> None:
    """Put LoRA on the linear layers and the 1 x 1 convolutions of the tower's blocks; only it is to be trained.

    Raises:
        ValueError: there is no such layer.
    """
    names = lora_targets(tower)
    if not names:
        raise ValueError("--align.lora_r finds no linear layer in this tower; train its weights instead")
    _call_the_layer(tower, True)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), tower.backbone)
    for name, parameter in tower.backbone.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def lora_targets(tower: VisionTower) -> list[str]:
    """Names in the backbone of the layers that get LoRA."""
    inside = [name for name, m in tower.backbone.named_modules() if isinstance(m, nn.MultiheadAttention)]
    return [
        name
        for name, module in tower.backbone.named_modules()
        if (isinstance(module, nn.Linear) or _pointwise(module))
        and tower.is_in_block(name)
        and not any(name.startswith(f"{parent}.") for parent in inside)  # it reads their weights past them
    ]


def _pointwise(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1


def merge_tower_lora(tower: VisionTower) -> None:
    """Add LoRA's changes to the weights, and leave the layers as they were before; nothing happens without LoRA."""
    layers = {name: m for name, m in tower.backbone.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        tower.backbone.set_submodule(name, layer.get_base_layer())
    _call_the_layer(tower, False)
    if hasattr(tower.backbone, "peft_config"):
        del tower.backbone.peft_config
    tower.requires_grad_(True)


def _call_the_layer(tower: VisionTower, yes: bool) -> None:
    """timm's EVA multiplies by the weight of a fused layer, past what stands in its place, unless told to call it."""
    for module in tower.backbone.modules():
        if hasattr(module, "qkv_bias_separate"):
            cast(Any, module).qkv_bias_separate = yes
