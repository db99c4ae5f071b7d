"""Functions to reuse the logit scale, logit bias and embedding space of a vision tower's original CLIP model.

The LLM2CLIP authors' code starts training with the pretrained CLIP model's logit scale, which is close to the maximum
of 100. A CLIP model trained from scratch starts with 1 / 0.07 instead. For training in the inherited embedding space,
see `train/initial_model.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from llm2clip.models.convert.checkpoint_io import read_weight_map
from llm2clip.models.hub.loading import find_file
from llm2clip.models.hub.pretrained import resolve_pretrained
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.text.clip_text_encoder import (
    OPEN_CLIP_PREFIX,
    ClipTextEncoder,
    get_pooled_output,
    has_text_tower,
    load_clip_text_encoder,
)
from llm2clip.models.vision.vision_tower import VisionTower

# Weight files that may contain the logit scale. In timm's hub repositories, only the open_clip file contains it.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
MIN_SIMILARITY = 0.99  # minimum cosine similarity between two implementations of the same image tower


def read_pretrained_logits(tower: str) -> tuple[float, float | None]:
    """Read a pretrained CLIP model's logit scale and logit bias.

    Args:
        tower: vision tower, as in `VisionTower.from_pretrained`.

    Returns:
        The logit scale (the factor, not its logarithm), and the logit bias, or None if the checkpoint has no bias.

    Raises:
        ValueError: the tower's checkpoint has no logit scale because it contains only a vision tower.
    """
    source = find_hub_id_or_folder(resolve_pretrained(tower))
    for name in _WEIGHT_FILES:
        file = find_file(source, name)
        tensors = _read_tensors(file, ("logit_scale", "logit_bias")) if file is not None else {}
        if "logit_scale" in tensors:
            bias = tensors.get("logit_bias")
            return tensors["logit_scale"].double().exp().item(), None if bias is None else bias.item()
    raise ValueError(
        f"--align.logit_scale inherit: the checkpoint of {tower} contains no logit scale. Set --align.logit_scale to a "
        "number. Most CLIP models finish training with a logit scale of 100"
    )


def _read_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the named tensors from a weight file or from the shards listed in an index file. Skip missing tensors."""
    if file.name.endswith(".index.json"):
        shard_of = read_weight_map(file)
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in shard_of:
                shard = find_file(str(file.parent), Path(shard_of[name]).name)
                if shard is not None:
                    tensors |= _read_tensors(shard, (name,))
        return tensors
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as weights:
            return {name: weights.get_tensor(name) for name in names if name in weights.keys()}  # noqa: SIM118
    state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: state_dict[name] for name in names if name in state_dict}


def load_inherited_clip(tower: str, inherit: bool | str, device: torch.device) -> ClipTextEncoder:
    """Load the CLIP model whose embedding space is inherited.

    Args:
        tower: vision tower, as in `VisionTower.from_pretrained`.
        inherit: CLIP model name, as in `load_clip_text_encoder`, or True for the tower's original CLIP model.

    Raises:
        ValueError: the tower's checkpoint contains no text tower.
        ImportError, OSError: see `load_clip_text_encoder`.
    """
    if isinstance(inherit, str):
        return load_clip_text_encoder(inherit, device)
    source = find_hub_id_or_folder(resolve_pretrained(tower))
    if has_text_tower(source):
        return load_clip_text_encoder(source, device)
    # The hub repositories of timm towers also contain the open_clip model, including its text tower.
    if (config := find_file(source, "open_clip_config.json")) is not None:
        is_folder = str(config.parent) == source
        return load_clip_text_encoder(f"{OPEN_CLIP_PREFIX}{'' if is_folder else 'hf-hub:'}{source}", device)
    raise ValueError(
        f"--align.inherit true: the checkpoint of {tower} has no text tower. Specify the CLIP model that the tower "
        "comes from (--align.inherit NAME or --align.inherit open_clip:NAME/PRETRAINED), or remove --align.inherit"
    )


def find_visual_projection(clip: Any) -> nn.Linear | None:
    """Return the linear layer that maps image features to embeddings in a transformers or open_clip model.

    Return None if the features are already the embeddings, as in SigLIP.

    Raises:
        ValueError: the mapping from features to embeddings is not a linear layer.
    """
    if hasattr(clip, "get_image_features"):  # transformers
        return getattr(clip, "visual_projection", None)
    visual = clip.visual
    if isinstance(weight := getattr(visual, "proj", None), Tensor):  # open_clip's ViT; shape (features, embeddings)
        feature_dim, embed_dim = weight.shape
        projection = nn.Linear(feature_dim, embed_dim, bias=False)
        projection.weight = nn.Parameter(weight.detach().T.contiguous())
        return projection
    if (trunk := getattr(visual, "trunk", None)) is not None:  # timm model; the projection is in timm or open_clip
        head = [module for module in visual.head if not isinstance(module, nn.Dropout)]
        layers = [layer for layer in (trunk.get_classifier(), *head) if not isinstance(layer, nn.Identity)]
        if not layers:
            return None
        if len(layers) == 1 and isinstance(layers[0], nn.Linear):
            return layers[0]
    raise ValueError(
        "--align.inherit: the image projection of this CLIP model is not a linear layer. Remove --align.inherit"
    )


def build_model_in_clip_space(config: LLM2CLIPConfig, tower: VisionTower, clip: ClipTextEncoder) -> LLM2CLIP:
    """Build a model that has the same image embeddings as a CLIP model, and a randomly initialised text adapter.

    The CLIP model determines the device and the config's `embed_dim`, `projection` and `projection_bias`. `tower` is
    the CLIP model's image tower, loaded for training.

    Raises:
        ValueError: the vision tower is not the image tower of the CLIP model. See also `find_visual_projection`.
    """
    projection = find_visual_projection(clip.model)
    feature_dim = clip.embed_dim if projection is None else projection.in_features
    if feature_dim != tower.feature_dim:
        raise ValueError(
            f"--align.inherit: the image features of this CLIP model have {feature_dim} dimensions, but the vision "
            f"tower's features have {tower.feature_dim}. Specify the CLIP model that --align.tower comes from"
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
    _check_image_embeddings(model, clip.model)
    return model


@torch.no_grad()
def _check_image_embeddings(model: LLM2CLIP, clip: Any) -> None:
    """Raise ValueError if the models encode a random image differently. Skip the check if their image sizes differ."""
    tower = model.tower
    if _get_image_size(clip) != tower.preprocess.size:
        return
    size = tower.preprocess.size
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    normalized = (pixels - tower.mean) / tower.std
    if hasattr(clip, "get_image_features"):
        expected = get_pooled_output(clip.get_image_features(pixel_values=normalized))
    else:
        expected = clip.encode_image(normalized)
    image = model(pixels=pixels)[0]
    similarity = F.cosine_similarity(image, expected.float()).item()
    if similarity < MIN_SIMILARITY:
        raise ValueError(
            "--align.inherit: the vision tower is not the image tower of this CLIP model (cosine similarity between "
            f"their image embeddings: {similarity:.2f}). Specify the CLIP model that --align.tower comes from"
        )


def _get_image_size(clip: Any) -> int | None:
    if hasattr(clip, "get_image_features"):
        return getattr(clip.config.vision_config, "image_size", None)
    size = clip.visual.image_size
    return int(size[0] if isinstance(size, tuple) else size)


def find_hub_id_or_folder(tower: str) -> str:
    """Return the folder or hub id of a tower's weights.

    For a timm model, the hub id is taken from timm's pretrained config. If the model has no weights on the hub, its
    name is returned unchanged.
    """
    prefix, colon, rest = tower.partition(":")
    name = rest if colon and prefix in ("timm", "hf") else tower
    if "/" in name or Path(name).is_dir():
        return name
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:
        return name
    return config.hf_hub_id if config is not None and config.hf_hub_id else name
