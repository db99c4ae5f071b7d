"""LoRA (arXiv 2106.09685) for training a vision tower. After merging, the tower has its original architecture."""

from __future__ import annotations

from typing import Any, cast

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llm2clip.models.vision.vision_tower import VisionTower


def add_tower_lora(tower: VisionTower, rank: int, alpha: int) -> None:
    """Add LoRA to the linear layers and 1 x 1 convolutions in the tower's blocks, and freeze all original weights.

    Raises:
        ValueError: the tower has no layer to which LoRA can be added.
    """
    targets = find_lora_targets(tower)
    if not targets:
        raise ValueError("--align.lora_r: this tower has no linear layer for LoRA. Use --align.lora_r 0")
    _set_qkv_module_call(tower, True)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), tower.backbone)
    for name, parameter in tower.backbone.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def find_lora_targets(tower: VisionTower) -> list[str]:
    """List the names of the backbone layers to which LoRA is added."""
    modules = list(tower.backbone.named_modules())
    # nn.MultiheadAttention uses the weights of its sublayers without calling them, so LoRA would have no effect.
    attention_prefixes = tuple(f"{name}." for name, m in modules if isinstance(m, nn.MultiheadAttention))
    return [
        name
        for name, module in modules
        if (isinstance(module, nn.Linear) or _is_pointwise_conv(module))
        and tower.is_in_block(name)
        and not name.startswith(attention_prefixes)
    ]


def merge_tower_lora(tower: VisionTower) -> None:
    """Merge all LoRA layers into the original weights, and make all weights of the tower trainable."""
    lora_layers = {name: m for name, m in tower.backbone.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in lora_layers.items():
        layer.merge(safe_merge=True)
        tower.backbone.set_submodule(name, layer.get_base_layer())
    _set_qkv_module_call(tower, False)
    if hasattr(tower.backbone, "peft_config"):
        del tower.backbone.peft_config
    tower.requires_grad_(True)


def _is_pointwise_conv(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1


def _set_qkv_module_call(tower: VisionTower, enable: bool) -> None:
    """Select whether timm's EVA models call their fused qkv layer.

    By default, they use the layer's weight without calling the layer, so LoRA would have no effect.
    """
    for module in tower.backbone.modules():
        if hasattr(module, "qkv_bias_separate"):
            cast(Any, module).qkv_bias_separate = enable
