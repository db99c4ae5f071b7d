"""Transformers export of the vision tower alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llm2clip.models.hub.loading import build_config
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.vision.vision_tower import VisionTower


def export_vision(model: LLM2CLIP, folder: Path) -> None:
    """Write the vision tower, without the projection, to an existing folder.

    `AutoModel.from_pretrained` can load the folder without remote code. The folder is intended for models that use the
    tower's patch features, such as LLaVA.

    Raises:
        ValueError: transformers has no model class for the tower.
    """
    build_vision_model(model.tower).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))


def build_vision_model(tower: VisionTower) -> Any:
    """Build a transformers model with a copy of a vision tower's weights, in float32 and eval mode, on the CPU.

    A timm tower becomes a `TimmWrapperModel`. A transformers tower keeps its model class, such as `CLIPVisionModel`.
    """
    from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel, TimmWrapperConfig, TimmWrapperModel

    architecture = tower.config["architecture"]
    tensors = {name: tensor.detach().cpu() for name, tensor in tower.backbone.state_dict().items()}
    if tower.config["library"] == "timm":
        args = {name: value for name, value in tower.config["args"].items() if name != "num_classes"}
        timm_config: Any = TimmWrapperConfig(architecture=architecture, model_args=args)
        timm_config.num_labels = 0
        timm_model: Any = TimmWrapperModel(timm_config)
        timm_model.timm_model.load_state_dict(tensors)
        return timm_model.float().eval()

    config = build_config(architecture)
    classes: dict[str, Any] = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
    model_class = classes.get(config.model_type)
    model = model_class(config) if model_class else AutoModel.from_config(config)
    # Before transformers 5.3, the CLIP and SigLIP classes stored the vision model in the attribute `vision_model`.
    getattr(model, "vision_model", model).load_state_dict(tensors)
    return model.float().eval()
