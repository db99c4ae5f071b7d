"""Text adapter, which maps caption embeddings to the shared embedding space, and its residual block.

The architecture follows the LLM2CLIP paper (arXiv 2411.04997, section 3.3). The image head (the projection) is a single
linear layer, which is created in `LLM2CLIP`. Exported models contain a copy of these classes, which therefore must not
use other modules of this package.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), with a hidden layer of `expansion * dim` units."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, dim) to (N, dim)."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Adapter(nn.Module):
    """Text adapter: L2-normalise (optional) -> `depth` residual blocks -> LayerNorm -> Linear.

    The paper uses depth 4 and expansion 2. With 4096 input and 1280 output dimensions, this adapter has 273.8 M
    parameters. In the checkpoints released with the paper, adapters trained on cached embeddings L2-normalise their
    input (`normalize_input=True`), whereas those trained with the LLM in the training loop do not.
    """

    def __init__(
        self, text_dim: int, embed_dim: int, depth: int = 4, expansion: int = 2, normalize_input: bool = True
    ) -> None:
        super().__init__()
        self.normalize_input = normalize_input
        self.blocks = nn.Sequential(*(ResidualBlock(text_dim, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(text_dim)
        self.out = nn.Linear(text_dim, embed_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map unnormalised caption embeddings (N, text_dim) to unnormalised text embeddings (N, embed_dim)."""
        x = F.normalize(embeddings, dim=-1) if self.normalize_input else embeddings
        return self.out(self.norm(self.blocks(x)))
