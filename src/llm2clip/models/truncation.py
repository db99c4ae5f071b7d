"""Truncation of embeddings to their first dimensions.

`align` rotates the embedding space so that the first dimensions are the principal components of the training captions
(see `rotate_to_principal_components`). Models trained with `--align.matryoshka_dims` (Matryoshka representation
learning, arXiv 2205.13147), without an adapter, or with `--align.inherit` are not rotated.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.models.heads import rotate_outputs, truncate_outputs

if TYPE_CHECKING:
    from llm2clip.models.llm2clip import LLM2CLIP


def truncate_and_normalize(embeddings: Tensor, dim: int) -> Tensor:
    """Keep the first `dim` of D dimensions. Return L2-normalised embeddings of shape (N, dim), given shape (N, D)."""
    return F.normalize(embeddings[..., :dim], dim=-1)


def check_dim(dim: int, embed_dim: int, name: str) -> None:
    """Raise ValueError if the embeddings of the named model cannot be truncated to `dim` dimensions."""
    if not 1 <= dim <= embed_dim:
        raise ValueError(
            f"the embeddings of {name} have {embed_dim} dimensions, so they cannot be truncated to {dim}. Choose a "
            f"number from 1 to {embed_dim}"
        )


@torch.no_grad()
def rotate_to_principal_components(model: LLM2CLIP, captions: Tensor) -> None:
    """Rotate a model's embedding space, so that the first dimensions are those in which captions differ most.

    The rotation is applied to the weights of the last layers of both towers, which are linear. Cosine similarities do
    not change, except for rounding. The rows of the rotation are the principal components of the text embeddings
    without centring: the eigenvectors of their second-moment matrix, largest eigenvalue first.

    Args:
        model: Model with an image projection and an adapter. The model is modified in place.
        captions: Caption embeddings from the encoder, unnormalised, float32 of shape (N, text_dim).

    Raises:
        ValueError: The model has no image projection or no adapter.
    """
    if not isinstance(model.projection, nn.Linear) or model.config.adapter.depth == 0:
        raise ValueError("the embedding space can be rotated only in a model with an image projection and an adapter")
    texts = model.project_text_embeddings(captions).double()  # (N, D)
    eigenvectors = torch.linalg.eigh(texts.T @ texts).eigenvectors  # columns, smallest eigenvalue first
    rotation = eigenvectors.flip(1).T  # (D, D)
    rotate_outputs(model.projection, rotation)
    model.adapter.rotate(rotation)


@torch.no_grad()
def truncate_model(model: LLM2CLIP, dim: int) -> LLM2CLIP:
    """Return a copy of a model that computes only the first `dim` dimensions of its embeddings.

    The last layers of both towers are linear, so only their first `dim` rows are kept. A tower without a projection
    gets one that selects the first `dim` features. Without an adapter, the caption encoder is truncated.

    Raises:
        ValueError: `dim` is less than 1 or greater than the model's `embed_dim`, or the model has neither an adapter
            nor a caption encoder.
    """
    from llm2clip.models.text.sentence_transformer import truncate_embeddings

    check_dim(dim, model.config.embed_dim, "the model")
    if dim == model.config.embed_dim:
        return model
    config = dataclasses.replace(model.config, embed_dim=dim, projection=True)
    config.matryoshka_dims = [size for size in config.matryoshka_dims if size < dim]
    if config.adapter.depth == 0:
        if not model.has_encoder:
            raise ValueError("a model without an adapter can be truncated only with its caption encoder: add --text")
        encoder = copy.deepcopy(model.encoder)
        truncate_embeddings(encoder.st, dim)
        config.text_dim, config.encoder = dim, encoder.identity()
    truncated = copy.deepcopy(model)
    truncated.config = config
    if isinstance(truncated.projection, nn.Linear):
        truncate_outputs(truncated.projection, dim)
    else:
        features = model.tower.feature_dim
        truncated.projection = nn.Linear(features, dim, bias=False, device=model.device)
        truncated.projection.weight.copy_(torch.eye(dim, features))
    if config.adapter.depth == 0:
        truncated._encoder[:] = [encoder]
    else:
        truncated.adapter.truncate(dim)
    return truncated
