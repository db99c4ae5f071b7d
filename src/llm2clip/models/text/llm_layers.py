"""Access to the transformer layers of decoders and BERT-like encoders."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_encoder_only(llm: Any) -> bool:
    """Return True for BERT-like models, whose attention is bidirectional and cannot be made causal."""
    return not hasattr(llm, "layers") and hasattr(llm, "encoder")


def get_layers(llm: Any) -> nn.ModuleList:
    """Return the transformer layers of a model, which must not have a language-modelling head."""
    layers: nn.ModuleList = llm.layers if hasattr(llm, "layers") else llm.encoder.layer
    return layers


def set_layers(llm: Any, layers: nn.ModuleList) -> None:
    """Replace the transformer layers of a model."""
    if hasattr(llm, "layers"):
        llm.layers = layers
    else:
        llm.encoder.layer = layers


def truncate_layers(llm: Any, count: int) -> None:
    """Keep only the first `count` layers of a model, and update the model's config accordingly."""
    layers = get_layers(llm)
    if not 1 <= count <= len(layers):
        raise ValueError(f"layers must be between 1 and {len(layers)}, the depth of this model (got {count})")
    set_layers(llm, layers[:count])
    llm.config.num_hidden_layers = count
    if getattr(llm.config, "layer_types", None):
        llm.config.layer_types = llm.config.layer_types[:count]


def set_bidirectional(llm: Any, bidirectional: bool) -> None:
    """Make a model's attention bidirectional (True) or causal (False).

    transformers >= 5.2 reads `config.is_causal` in every forward pass, for every attention implementation, and saves
    it with the model.
    """
    if is_encoder_only(llm):
        if not bidirectional:
            raise ValueError(f"{type(llm).__name__} is a bidirectional encoder: it cannot be made causal")
        return
    llm.config.is_causal = not bidirectional
    llm.config.use_cache = False
