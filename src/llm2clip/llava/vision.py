"""Conversion of vision towers to the form that transformers' LLaVA classes accept."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llm2clip.llava import modeling_patches
from llm2clip.models.export.transformers import build_vision_model
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import is_model_folder
from llm2clip.models.vision.vision_tower import VisionTower


def load_tower(name: str, image_size: int | None = None) -> VisionTower:
    """Load a vision tower, either from an LLM2CLIP model folder or with `VisionTower.from_pretrained`.

    Args:
        name: path of an LLM2CLIP model folder, or name of a pretrained tower.
        image_size: input size in pixels. Default: the tower's training resolution.

    Raises:
        ValueError: `image_size` differs from the training resolution of the LLM2CLIP model.
    """
    if not is_model_folder(name):
        return VisionTower.from_pretrained(name, image_size=image_size)
    tower = LLM2CLIP.from_pretrained(name, device="cpu").tower
    trained_size = tower.preprocess.size
    if image_size not in (None, trained_size):
        raise ValueError(f"{name} was trained at {trained_size} pixels: --image_size must be {trained_size} or unset")
    return tower


def to_llava_tower(tower: VisionTower) -> Any:
    """Convert a tower to a transformers model on the CPU, in float32 and eval mode. The weights are copied.

    A vision transformer from timm becomes a `PatchTower`. Position embeddings are interpolated to the tower's input
    size, because transformers' LLaVA classes do not interpolate them.
    """
    backbone: Any = tower.backbone
    if tower.config["library"] == "timm" and hasattr(getattr(backbone, "patch_embed", None), "num_patches"):
        return _to_patch_tower(tower)
    vision = build_vision_model(tower)
    size = tower.preprocess.size
    kind = vision.config.model_type
    if kind in ("clip_vision_model", "siglip_vision_model") and vision.config.image_size != size:
        _resize_position_embeddings(vision, size)
    return vision


def count_image_tokens(vision: Any, size: int) -> tuple[int, int]:
    """Return the number of patch tokens that the LLM receives per image, and the number of additional register tokens.

    Args:
        vision: tower returned by `to_llava_tower`.
        size: input size in pixels.

    Raises:
        ValueError: the tower does not return features of a shape that transformers' LLaVA classes support.
    """
    kind = vision.config.model_type
    pixels = torch.zeros(1, 3, size, size)
    if isinstance(vision, modeling_patches.PatchTower):
        try:
            with torch.inference_mode():
                features = vision(pixels).hidden_states[-2]  # (1, patches, width)
        except (AssertionError, TypeError, RuntimeError) as error:
            raise ValueError(
                f"{vision.config.architecture} does not return patch features for each block: {error}"
            ) from error
        return int(features.shape[1]), 0
    if kind == "timm_wrapper":
        with torch.inference_mode():
            features = vision(pixels).last_hidden_state  # (1, channels, rows, columns)
        if features.ndim != 4 or features.shape[1] != vision.timm_model.num_features:
            raise ValueError(
                f"{vision.config.architecture} does not return a channels-first feature map. Use a convolutional net "
                "or a vision transformer from timm, or a CLIP, SigLIP or DINO tower from transformers"
            )
        return features.shape[2] * features.shape[3], 0
    return (size // vision.config.patch_size) ** 2, getattr(vision.config, "num_register_tokens", 0)


def has_class_token(vision: Any) -> bool:
    """Return True if the hidden states of a tower from `to_llava_tower` start with a class token."""
    return vision.config.model_type not in ("timm_wrapper", "siglip_vision_model", "llm2clip_patches")


def _to_patch_tower(tower: VisionTower) -> modeling_patches.PatchTower:
    backbone: Any = tower.backbone
    config = modeling_patches.PatchTowerConfig(
        architecture=tower.config["architecture"],
        model_args={name: value for name, value in tower.config["args"].items() if name != "num_classes"},
        hidden_size=backbone.embed_dim,
    )
    vision = modeling_patches.PatchTower(config)
    weights = {name: tensor.detach().cpu() for name, tensor in backbone.state_dict().items()}
    vision.timm_model.load_state_dict(weights)
    return vision.float().eval()


def _resize_position_embeddings(vision: Any, size: int) -> None:
    """Interpolate the position embeddings of a CLIP or SigLIP tower to a different image size."""
    embeddings = getattr(vision, "vision_model", vision).embeddings
    old = embeddings.position_embedding.weight  # (class token and patches, width)
    patch_size = vision.config.patch_size
    patches = (size // patch_size) ** 2
    class_tokens = len(old) - (vision.config.image_size // patch_size) ** 2
    dummy = torch.zeros(1, patches + class_tokens, old.shape[1])
    with torch.no_grad():
        new = embeddings.interpolate_pos_encoding(dummy, size, size)[0]
    embeddings.position_embedding = nn.Embedding.from_pretrained(new.contiguous(), freeze=False)
    embeddings.image_size = vision.config.image_size = size
    embeddings.num_patches = patches
    embeddings.num_positions = len(new)
    embeddings.register_buffer("position_ids", torch.arange(len(new)).expand((1, -1)), persistent=False)
