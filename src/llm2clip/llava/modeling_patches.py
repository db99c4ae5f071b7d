"""A vision transformer of timm inside LLaVA, for transformers: the one file of code in a folder that has such a tower.

transformers wraps timm's models, but gives their features as maps, which LLaVA's class does not read. Opened without
llm2clip by `AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)`.
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
    """Of `PatchTower`: timm's architecture and its arguments, and the width of a patch's feature."""

    model_type = "llm2clip_patches"
    architecture: str = ""
    model_args: dict | None = None
    hidden_size: int = 0


class PatchTower(PreTrainedModel):
    """Patch features of each of timm's blocks."""

    config_class = PatchTowerConfig
    main_input_name = "pixel_values"

    def __init__(self, config: PatchTowerConfig) -> None:
        super().__init__(config)
        self.timm_model: Any = timm.create_model(
            config.architecture, pretrained=False, num_classes=0, **(config.model_args or {})
        )
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """timm has done it."""

    def forward(self, pixel_values: Any, **_: Any) -> Any:
        """(N, 3, S, S) to the output of every block, each (N, patches, width), before the last norm."""
        states = self.timm_model.forward_intermediates(
            pixel_values.to(self.dtype), norm=False, output_fmt="NLC", intermediates_only=True
        )
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states))


class PatchLlavaConfig(LlavaConfig):
    """LLaVA's, with such a tower."""

    model_type = "llm2clip_llava"


class PatchLlava(LlavaForConditionalGeneration):
    """LLaVA's, with such a tower."""

    config_class = PatchLlavaConfig


AutoConfig.register(PatchTowerConfig.model_type, PatchTowerConfig, exist_ok=True)
AutoModel.register(PatchTowerConfig, PatchTower, exist_ok=True)
AutoConfig.register(PatchLlavaConfig.model_type, PatchLlavaConfig, exist_ok=True)
AutoModelForImageTextToText.register(PatchLlavaConfig, PatchLlava, exist_ok=True)
