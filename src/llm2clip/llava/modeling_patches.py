"""Self-contained transformers modeling code for LLaVA with a vision transformer from timm.

In transformers, the wrapper for timm models returns feature maps of shape (N, channels, rows, columns), but the LLaVA
class requires patch features of shape (N, patches, width). `PatchLlava.save_pretrained` copies this file to the model
folder. To load such a model without llm2clip, use
`AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)`.
"""

from typing import Any

import timm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput


class PatchTowerConfig(PretrainedConfig):
    """Config of a `PatchTower`: name and arguments of the timm model, and dimension of the patch features."""

    model_type = "llm2clip_patches"
    architecture: str = ""
    model_args: dict | None = None
    hidden_size: int = 0


class PatchTower(PreTrainedModel):
    """Vision transformer from timm that returns the patch features of each block."""

    config_class = PatchTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PatchTowerConfig) -> None:
        super().__init__(config)
        self.timm_model: Any = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, **(config.model_args or {})
        )
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """Do nothing, because timm has already initialised the weights."""

    def forward(self, pixel_values: Any, **_: Any) -> Any:
        """Return the outputs of all blocks before the final norm, of shape (N, patches, width)."""
        states = self.timm_model.forward_intermediates(
            pixel_values.to(self.dtype), norm=False, output_fmt="NLC", intermediates_only=True
        )
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


class PatchLlavaConfig(LlavaConfig):
    """Config of a `PatchLlava`."""

    model_type = "llm2clip_llava"


class PatchLlava(LlavaForConditionalGeneration):
    """LLaVA with a `PatchTower` as its vision tower."""

    config_class = PatchLlavaConfig


def register_llava_classes() -> None:
    """Register the config and model classes with transformers' auto classes."""
    AutoConfig.register(PatchTowerConfig.model_type, PatchTowerConfig, exist_ok=True)
    AutoModel.register(PatchTowerConfig, PatchTower, exist_ok=True)
    AutoConfig.register(PatchLlavaConfig.model_type, PatchLlavaConfig, exist_ok=True)
    AutoModelForImageTextToText.register(PatchLlavaConfig, PatchLlava, exist_ok=True)
    PatchLlavaConfig.register_for_auto_class()
    PatchLlava.register_for_auto_class("AutoModelForImageTextToText")


if not __name__.startswith("llm2clip."):
    register_llava_classes()  # this copy was imported from a model folder
