"""The heads: what takes a caption's embedding, and an image's feature, to the shared space.

The paper's (arXiv 2411.04997, section 3.3) are a residual adapter for texts and a linear projection for images. A gated
layer in place of either is SAIL's (arXiv 2412.04616).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), the hidden layer `expansion` times as wide."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Adapter(nn.Module):
    """L2-normalise (optional) -> `depth` residual blocks -> LayerNorm -> Linear. (N, text_width) to (N, width).

    The paper's has depth 4 and expansion 2: 273.8 M parameters from 4096 to 1280. Its published checkpoints normalise
    their input when embeddings are cached and do not when the LLM runs online: `normalize_input` says which.
    """

    def __init__(
        self, text_width: int, width: int, depth: int = 4, expansion: int = 2, normalize_input: bool = True
    ) -> None:
        super().__init__()
        self.normalize_input = normalize_input
        self.blocks = nn.Sequential(*(Block(text_width, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(text_width)
        self.out = nn.Linear(text_width, width)

    def forward(self, embeddings: Tensor) -> Tensor:
        x = F.normalize(embeddings, dim=-1) if self.normalize_input else embeddings
        return self.out(self.norm(self.blocks(x)))
