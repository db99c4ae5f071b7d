"""Initial model for the `align` stage: a pretrained vision tower with new heads or with a CLIP model's heads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.config import AlignConfig
from llm2clip.cpu_tuning import free_memory
from llm2clip.data.records import Record
from llm2clip.models.heads import AdapterConfig, needs_projection_bias
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.precision import resolve_precision
from llm2clip.models.pretrained_clip import build_model_in_clip_space, load_inherited_clip, read_pretrained_logits
from llm2clip.models.text.clip_text_encoder import ClipTextEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.runs.ranks import process_state
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.losses import get_loss
from llm2clip.train.proclip import inherit_text_space


@dataclass
class PretrainedParts:
    """Pretrained parts of a model, on the CPU.

    Attributes:
        clip: CLIP model whose text space is inherited, or None without `--align.inherit`.
        logits: Logit scale and bias of the tower's CLIP model, or None if they are not inherited.
        random_state: State of PyTorch's random number generator after the parts were loaded, which may consume random
            numbers. This state is restored before new weights are initialised.
    """

    tower: VisionTower
    clip: ClipTextEncoder | None
    logits: tuple[float, float | None] | None
    random_state: Tensor


@torch.random.fork_rng(devices=[])
def load_pretrained_parts(config: AlignConfig) -> PretrainedParts:
    """Load everything that `create_initial_model` needs. Call this before tuning, so that errors occur early.

    Raises:
        OSError: A model does not exist, or cannot be downloaded.
        ValueError: A model does not support the settings.
        ImportError: A required package is not installed.
    """
    torch.manual_seed(config.seed)
    tower = VisionTower.from_pretrained(config.tower, image_size=config.image_size)
    clip = load_inherited_clip(config.tower, config.inherit, torch.device("cpu")) if config.inherit else None
    random_state = torch.get_rng_state()
    _check_tower(tower, config)
    logits = read_pretrained_logits(config.tower) if config.logit_scale == "inherit" else None
    return PretrainedParts(tower, clip, logits, random_state)


@torch.no_grad()
def _check_tower(tower: VisionTower, config: AlignConfig) -> None:
    """Raise ValueError if a tower does not support the image size or gradient checkpointing."""
    if config.image_size is not None:
        try:
            tower(torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8))
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"--align.image_size: {config.tower} cannot encode images at {config.image_size} pixels ({error})"
            ) from error
    if config.gradient_checkpointing:
        tower.set_grad_checkpointing()
        tower.set_grad_checkpointing(False)


def create_initial_model(
    config: AlignConfig,
    store: EmbeddingStore,
    train: Sequence[Record] = (),
    out: Path | None = None,
    parts: PretrainedParts | None = None,
) -> LLM2CLIP:
    """Create a model from a pretrained tower and heads that are randomly initialised with the config's seed.

    With `config.inherit`, the heads come from a CLIP model instead (see `proclip.py`).

    Args:
        train: Training records whose texts the adapter is trained on. Used only with `config.inherit`.
        out: Folder for the adapter's weights and the cached CLIP text embeddings. Required with `config.inherit`.
        parts: Pretrained parts, which become part of the model. Default: loaded with `load_pretrained_parts`.
    """
    parts = parts or load_pretrained_parts(config)
    device = process_state().device
    torch.manual_seed(config.seed)  # seeds all devices
    torch.set_rng_state(parts.random_state)
    parts.tower.freeze_norm = True  # keep the pretrained batch-norm statistics
    model_config = make_model_config(config, parts.tower, store.embed_dim, store.manifest["identity"])
    if parts.clip is not None:
        assert out is not None
        parts.clip.model.to(device)
        model = build_model_in_clip_space(model_config, parts.tower, parts.clip)
        precision = resolve_precision("align", config.precision, device)
        inherit_text_space(model, parts.clip, train, store, config.seed, precision, out)
        parts.clip = None  # free the CLIP model's memory, even if the caller keeps `parts`
        free_memory()
    else:
        model = LLM2CLIP(model_config, parts.tower)
    if parts.logits is not None:
        model.set_logits(*parts.logits)
    elif config.logit_scale is not None:
        assert not isinstance(config.logit_scale, str)
        model.set_logits(config.logit_scale)
    return model.to(device)


def make_model_config(
    config: AlignConfig, tower: VisionTower, text_dim: int, encoder: dict[str, Any] | None = None
) -> LLM2CLIPConfig:
    """Return the config of the model that the `align` stage trains.

    `text_dim` is the caption encoder's embedding dimension, and `encoder` is its identity, or None if unknown.
    """
    embed_dim = config.embed_dim or tower.feature_dim
    if config.adapter_depth == 0:  # caption embeddings are text embeddings
        embed_dim = text_dim
    return LLM2CLIPConfig(
        tower=tower.config,
        text_dim=text_dim,
        embed_dim=embed_dim,
        adapter=AdapterConfig(depth=config.adapter_depth, normalize_input=config.normalize_input),
        projection=config.embed_dim > 0,
        projection_bias=config.embed_dim > 0 and needs_projection_bias(tower.config),
        logit_bias=get_loss(config.loss).needs_bias,
        matryoshka_dims=config.matryoshka_dims,
        encoder=encoder or {},
    )
