"""Latent attention pooling, the pooling layer of NV-Embed (arXiv 2405.17428).

The final hidden state of each token attends to an array of trained vectors (the latents) and then passes through an
MLP. The outputs are averaged over the tokens. Tokens do not attend to each other in the pooling layer, so packed and
padded batches result in the same embeddings.

The pooling layer is saved in the sentence-transformers format. Because `modules.json` contains an llm2clip class path,
sentence-transformers can load the encoder only if llm2clip is installed and `trust_remote_code=True` is set.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import Tensor, nn
from torch.nn import functional as F

# The MLP's hidden layer is eight times as wide as the LLM's hidden states.
# Tokens are processed in chunks to limit the MLP's activations to about 2 GB in fp32.
TOKENS_PER_CHUNK = 4096
MLP_EXPANSION = 4


class LatentAttentionPooling(Pooling):
    """sentence-transformers module that applies latent attention and an MLP to each token before mean pooling."""

    config_keys = ["embedding_dimension", "include_prompt", "num_latents", "num_heads", "head_dim"]  # noqa: RUF012

    def __init__(
        self, embedding_dimension: int, num_latents: int, num_heads: int, head_dim: int, include_prompt: bool = True
    ) -> None:
        """Create a randomly initialised layer. `embedding_dimension` is the hidden size of the LLM."""
        super().__init__(embedding_dimension, "mean", include_prompt)
        self.num_latents, self.num_heads, self.head_dim = num_latents, num_heads, head_dim
        inner_dim = num_heads * head_dim
        self.latents = nn.Parameter(torch.randn(num_latents, embedding_dimension))
        self.norm = nn.LayerNorm(embedding_dimension)
        self.norm_latents = nn.LayerNorm(embedding_dimension)
        self.to_q = nn.Linear(embedding_dimension, inner_dim, bias=False)
        self.to_kv = nn.Linear(embedding_dimension, 2 * inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, embedding_dimension, bias=False)
        self.norm_mlp = nn.LayerNorm(embedding_dimension)
        self.mlp_in = nn.Linear(embedding_dimension, 2 * MLP_EXPANSION * embedding_dimension)
        self.mlp_out = nn.Linear(MLP_EXPANSION * embedding_dimension, embedding_dimension)

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Transform `token_embeddings` in `features`, and add `sentence_embedding` of shape (B, D)."""
        features["token_embeddings"] = self.transform_tokens(features["token_embeddings"])
        pooled: dict[str, Any] = super().forward(features, **kwargs)
        return pooled

    def transform_tokens(self, states: Tensor) -> Tensor:
        """Apply latent attention and the MLP to final hidden states of shape (..., D). The shape does not change."""
        tokens = states.flatten(0, -2)  # (T, D)
        # Keys and values have shape (heads, latents, head_dim) and do not depend on the batch.
        keys, values = (self._split_heads(x) for x in self.to_kv(self.norm_latents(self.latents)).chunk(2, dim=-1))
        chunks = [self._transform_chunk(chunk, keys, values) for chunk in tokens.split(TOKENS_PER_CHUNK)]
        return torch.cat(chunks).view_as(states)

    def _transform_chunk(self, tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries = self._split_heads(self.to_q(self.norm(tokens)))  # (heads, T, head_dim)
        attended = F.scaled_dot_product_attention(queries, keys, values)
        tokens = tokens + self.to_out(attended.transpose(0, 1).flatten(1))
        hidden, gate = self.mlp_in(self.norm_mlp(tokens)).chunk(2, dim=-1)
        update: Tensor = self.mlp_out(hidden * F.gelu(gate))
        return tokens + update

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(0, 1)

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **kwargs: Any) -> None:
        self.save_config(output_path)
        self.save_torch_weights(output_path, safe_serialization=safe_serialization)

    @classmethod
    def load(cls, model_name_or_path: str, *args: Any, **kwargs: Any) -> LatentAttentionPooling:
        """Load the module from a subfolder of a local folder or hub repository."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        source = {name: kwargs[name] for name in names if name in kwargs}
        module = cls(**cls.load_config(model_name_or_path, **source))
        loaded: LatentAttentionPooling = cls.load_torch_weights(model_name_or_path, model=module, **source)
        return loaded


MODULE_TYPE = f"{LatentAttentionPooling.__module__}.{LatentAttentionPooling.__name__}"  # class path in modules.json
