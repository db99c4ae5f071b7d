"""Model with which the `align` stage starts."""

from __future__ import annotations

from typing import Any

from llm2clip.config import AlignConfig
from llm2clip.models.heads import AdapterConfig, has_projection_bias
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.vision.vision_tower import VisionTower


def new_model_config(
    config: AlignConfig, tower: VisionTower, text_dim: int, encoder: dict[str, Any] | None = None
) -> LLM2CLIPConfig:
    """Return the config of the model that the `align` stage trains.

    Args:
        config: Settings of the `align` stage.
        tower: Vision tower of the model.
        text_dim: Dimension of the caption encoder's embeddings.
        encoder: Identity of the caption encoder. None if unknown.
    """
    return LLM2CLIPConfig(
        tower=tower.config,
        text_dim=text_dim,
        embed_dim=config.embed_dim or tower.feature_dim,
        adapter=AdapterConfig(depth=config.adapter_depth, normalize_input=config.normalize_input),
        projection=config.embed_dim > 0,
        projection_bias=config.embed_dim > 0 and has_projection_bias(tower.config),
        logit_bias=config.loss == "sigmoid",
        encoder=encoder or {},
    )
