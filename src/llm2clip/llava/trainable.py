"""Functions that select, save and load the parameters trained in each stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm2clip.config import LlavaConfig
from llm2clip.io_utils import atomic_path

TRAINED_WEIGHTS = "learned.safetensors"  # file name within each stage's folder


def set_trainable(model: Any, stage: str, config: LlavaConfig, out: Path) -> Any:
    """Freeze all parameters that a stage does not train. Return the model, wrapped in a PEFT model if LoRA is used.

    The `pretrain` stage trains the projector. The `instruct` stage starts from the result of `pretrain`, if there is
    one. It trains the projector and either all weights of the LLM or LoRA adapters. The projector and LoRA weights are
    converted to float32.

    Args:
        model: LLaVA model; modified in place.
        stage: `pretrain` or `instruct`.
        config: training settings.
        out: run directory.
    """
    model.requires_grad_(False)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if stage == "pretrain":
        return model
    pretrained = out / "pretrain" / TRAINED_WEIGHTS
    if pretrained.is_file():
        load_trained(model, pretrained)
    if config.lora_r:
        return _add_lora(model, config)
    model.model.language_model.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    return model


def select_trainable(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict entries that belong to trainable parameters, on the CPU."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: state[name].detach().cpu().contiguous() for name in sorted(names)}


def save_trained(tensors: dict[str, Tensor], file: Path) -> None:
    """Atomically write trained weights to a safetensors file."""
    with atomic_path(file) as temporary:
        save_file(tensors, temporary)


def load_trained(model: nn.Module, file: Path) -> None:
    """Copy trained weights into the parameters of a model.

    Raises:
        ValueError: the names or shapes in the file do not match the model's parameters.
    """
    parameters = dict(model.named_parameters())
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name not in parameters or parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{file} does not match this model: the name or shape of {name} differs. "
                "Use another --out to start over"
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)


def _add_lora(model: Any, config: LlavaConfig) -> Any:
    """Add float32 LoRA adapters to all linear layers of the LLM. All weights of the projector are trained."""
    from peft import LoraConfig, get_peft_model

    linear_layers = [
        re.escape(f"model.language_model.{name}")
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    lora_config = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        target_modules=f"({'|'.join(linear_layers)})",
        modules_to_save=["multi_modal_projector"],
    )
    torch.manual_seed(config.seed)
    peft_model: Any = get_peft_model(model, lora_config)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model
