"""An LLM2CLIP model (arXiv 2411.04997) for transformers, in one file.

    from transformers import AutoModel, AutoProcessor
    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(FOLDER)
    texts = model.get_text_features(**processor(text=["a long description ..."], padding=True, return_tensors="pt"))
    images = model.get_image_features(**processor(images=[image], return_tensors="pt"))
    scores = texts.pooler_output @ images.pooler_output.T

Needs torch, transformers >= 5.2 and, for towers of timm, timm.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, CLIPVisionModel, PretrainedConfig, PreTrainedModel, SiglipVisionModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPOutput

from llm2clip.models.heads import Adapter


class LLM2CLIPExportConfig(PretrainedConfig):
    """What the model is made of.

    Args:
        tower: `library` (timm or transformers), `architecture` and `args` of the vision tower; its `image_size`.
        text: configuration of the language model.
        text_width, width: of a caption's embedding, of the shared space.
        adapter_depth, adapter_expansion, normalize_input: arguments of `Adapter`.
        projection_bias: whether the image projection has a bias.
        pooling: mean, lasttoken or cls.
        logit_bias: the logits have one, as the sigmoid loss wants.
        header_tokens: at the start of every text, which are not pooled.
    """

    model_type = "llm2clip_export"

    def __init__(
        self,
        tower: dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        text_width: int = 0,
        width: int = 0,
        adapter_depth: int = 4,
        adapter_expansion: int = 2,
        normalize_input: bool = True,
        projection_bias: bool = False,
        pooling: str = "mean",
        header_tokens: int = 0,
        logit_bias: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        self.tower, self.text, self.text_width, self.width = tower or {}, text or {}, text_width, width
        self.adapter_depth, self.adapter_expansion = adapter_depth, adapter_expansion
        self.normalize_input, self.projection_bias = normalize_input, projection_bias
        self.pooling, self.header_tokens, self.logit_bias = pooling, header_tokens, logit_bias


class LLM2CLIPExport(PreTrainedModel):
    """Vision tower + projection, language model + adapter, in one space."""

    config_class = LLM2CLIPExportConfig
    base_model_prefix = "llm2clip"
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: LLM2CLIPExportConfig) -> None:
        super().__init__(config)
        self.vision = _tower(config.tower)
        self.llm = AutoModel.from_config(AutoConfig.for_model(**config.text))
        c = config
        self.projection = nn.Linear(c.tower["width"], c.width, bias=c.projection_bias)
        self.adapter = Adapter(c.text_width, c.width, c.adapter_depth, c.adapter_expansion, c.normalize_input)
        self.logit_scale = nn.Parameter(torch.zeros(()))
        self.logit_bias = nn.Parameter(torch.zeros(())) if c.logit_bias else None
        self.post_init()

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """Token ids (N, T) to `pooler_output` (N, width), L2-normalised."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.llm(input_ids=input_ids, attention_mask=mask).last_hidden_state
        place = mask.cumsum(1)  # of a token among those of its text, from 1, whichever side is padded
        if self.config.pooling == "mean":
            pooled = mask * (place > self.config.header_tokens)
        elif self.config.pooling == "lasttoken":
            pooled = mask * (place == place[:, -1:])
        else:
            pooled = mask * (place == 1)
        weights = pooled.unsqueeze(-1).to(states.dtype)
        mean = (states * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
        text = F.normalize(self.adapter(mean[:, : self.config.text_width]).float(), dim=-1)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=text)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Pixels (N, 3, S, S), normalised by the processor, to `pooler_output` (N, width), L2-normalised."""
        tower = self.config.tower
        if tower["library"] == "timm":
            feature = self.vision(pixel_values)
        elif tower["interpolates"]:
            feature = self.vision(pixel_values=pixel_values, interpolate_pos_encoding=True).pooler_output
        else:
            feature = self.vision(pixel_values=pixel_values).pooler_output
        return BaseModelOutputWithPooling(pooler_output=F.normalize(self.projection(feature).float(), dim=-1))

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> CLIPOutput:
        """Either side or both; with both, the cosines times the logit scale, and the bias if there is one."""
        text = None if input_ids is None else self.get_text_features(input_ids, attention_mask).pooler_output
        image = None if pixel_values is None else self.get_image_features(pixel_values).pooler_output
        logits = None if text is None or image is None else text @ image.T * self.logit_scale.exp()
        if logits is not None and self.logit_bias is not None:
            logits = logits + self.logit_bias
        return CLIPOutput(
            text_embeds=text,
            image_embeds=image,
            logits_per_text=logits,
            logits_per_image=None if logits is None else logits.T,
        )


def _tower(config: dict[str, Any]) -> nn.Module:
    if config["library"] == "timm":
        import timm

        return timm.create_model(config["architecture"], pretrained=False, **config["args"])
    own = AutoConfig.for_model(**config["architecture"])
    classes = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
    made = classes[own.model_type](own) if own.model_type in classes else AutoModel.from_config(own)
    return getattr(made, "vision_model", made)
