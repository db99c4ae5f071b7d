"""Original CLIP model of a vision tower, whose text space a new model can inherit (see `train/proclip.py`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.models.hub.pretrained import resolve_pretrained
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.pretrained_logits import find_file, hub_id_or_folder
from llm2clip.models.text.clip_text_encoder import (
    OPEN_CLIP_PREFIX,
    ClipTextEncoder,
    has_text_tower,
    load_clip_text_encoder,
    pooled_output,
)
from llm2clip.models.vision.vision_tower import VisionTower

MIN_SIMILARITY = 0.99  # between two implementations of the same image tower


def load_inherited_clip(tower: str, inherit: bool | str, device: torch.device) -> ClipTextEncoder:
    """Load the CLIP model to inherit from.

    Args:
        tower: vision tower, as in `VisionTower.from_pretrained`.
        inherit: name of the CLIP model, as in `load_clip_text_encoder`, or True for the model from which the tower was
            taken.
        device: device on which to load the model.

    Raises:
        ValueError: the tower's checkpoint contains no text tower.
        ImportError, OSError: see `load_clip_text_encoder`.
    """
    return load_clip_text_encoder(inherit if isinstance(inherit, str) else _clip_of_tower(tower), device)


def _clip_of_tower(tower: str) -> str:
    """Return the name of a tower's original CLIP model, as in `load_clip_text_encoder`.

    For timm towers, the same repository also contains the open_clip model with the text tower.
    """
    source = hub_id_or_folder(resolve_pretrained(tower))
    if has_text_tower(source):
        return source
    if (config := find_file(source, "open_clip_config.json")) is not None:
        is_folder = str(config.parent) == source
        return f"{OPEN_CLIP_PREFIX}{source}" if is_folder else f"{OPEN_CLIP_PREFIX}hf-hub:{source}"
    raise ValueError(
        f"--align.inherit true: the checkpoint of {tower} has no text tower. Name the CLIP model that the tower comes "
        "from (--align.inherit NAME or open_clip:NAME/PRETRAINED), or remove --align.inherit"
    )


def visual_projection(clip: Any) -> nn.Linear | None:
    """Return the linear layer that maps a CLIP model's image features to its image embeddings.

    Args:
        clip: transformers or open_clip model.

    Returns:
        The layer, or None if the features are the embeddings, as in SigLIP.

    Raises:
        ValueError: the mapping from features to embeddings is not a linear layer.
    """
    if hasattr(clip, "get_image_features"):  # transformers
        return getattr(clip, "visual_projection", None)
    visual = clip.visual
    if isinstance(weight := getattr(visual, "proj", None), Tensor):  # open_clip's own ViT, (features, embeddings)
        feature_dim, embed_dim = weight.shape
        projection = nn.Linear(feature_dim, embed_dim, bias=False)
        projection.weight = nn.Parameter(weight.detach().T.contiguous())
        return projection
    if (trunk := getattr(visual, "trunk", None)) is not None:  # a timm model: its classifier or open_clip's head
        head = [module for module in visual.head if not isinstance(module, nn.Dropout)]
        layers = [layer for layer in (trunk.get_classifier(), *head) if not isinstance(layer, nn.Identity)]
        if not layers:
            return None
        if len(layers) == 1 and isinstance(layers[0], nn.Linear):
            return layers[0]
    raise ValueError(
        "--align.inherit: the image projection of this CLIP model is not a linear layer. Remove --align.inherit"
    )


def model_in_clip_space(config: LLM2CLIPConfig, tower: VisionTower, clip: ClipTextEncoder) -> LLM2CLIP:
    """Build a model that shares a CLIP model's image embeddings and device. Its adapter is randomly initialised.

    Args:
        config: model config. Its `embed_dim` and projection are replaced with those of the CLIP model.
        tower: the image tower of the CLIP model, as loaded for training.
        clip: the CLIP model, as loaded for its text tower.

    Raises:
        ValueError: the vision tower is not the image tower of the CLIP model. See also `visual_projection`.
    """
    projection = visual_projection(clip.model)
    feature_dim = clip.embed_dim if projection is None else projection.in_features
    if feature_dim != tower.feature_dim:
        raise ValueError(
            f"--align.inherit: the image features of this CLIP model have {feature_dim} dimensions, but those of the "
            f"vision tower have {tower.feature_dim}. Name the CLIP model that --align.tower is from"
        )
    config = dataclasses.replace(
        config,
        embed_dim=clip.embed_dim,
        projection=projection is not None,
        projection_bias=projection is not None and projection.bias is not None,
    )
    model = LLM2CLIP(config, tower).to(next(clip.model.parameters()).device)
    if projection is not None:
        model.projection.load_state_dict(projection.state_dict())
    _check_image_space(model, clip.model)
    return model


@torch.no_grad()
def _check_image_space(model: LLM2CLIP, clip: Any) -> None:
    """Check that `model` has the same image embeddings as the CLIP model.

    The embeddings of one random image are compared. Towers with a different image size are not checked.

    Raises:
        ValueError: the vision tower is not the image tower of the CLIP model.
    """
    tower = model.tower
    if _image_size(clip) != tower.preprocess.size:
        return
    size = tower.preprocess.size
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    normalized = (pixels - tower.mean) / tower.std
    if hasattr(clip, "get_image_features"):
        expected = pooled_output(clip.get_image_features(pixel_values=normalized))
    else:
        expected = clip.encode_image(normalized)
    image = model(pixels=pixels)[0]
    similarity = F.cosine_similarity(image, expected.float()).item()
    if similarity < MIN_SIMILARITY:
        raise ValueError(
            "--align.inherit: the vision tower is not the image tower of this CLIP model: the cosine similarity "
            f"between their embeddings of an image is {similarity:.2f}. Name the CLIP model that --align.tower is from"
        )


def _image_size(clip: Any) -> int | None:
    if hasattr(clip, "get_image_features"):
        return getattr(clip.config.vision_config, "image_size", None)
    size = clip.visual.image_size
    return int(size[0] if isinstance(size, tuple) else size)
