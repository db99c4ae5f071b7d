"""Text adapter and image projection, which map caption embeddings and image features to the shared embedding space.

The adapter follows the LLM2CLIP paper (arXiv 2411.04997, section 3.3). Exported models contain a copy of this file, so
it must not import llm2clip.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

# Initial standard deviation of the weights of a projection with bias, as in the LLM2CLIP authors' code
# (eva_vit_model.py: 0.02 times an init_scale of 0.001). The bias starts at zero.
SMALL_PROJECTION_STD = 2e-5
# Name prefixes of timm towers for which a new projection gets a bias. In the authors' code, projections for EVA towers
# have a bias, projections for OpenAI CLIP towers do not, and other towers have no trained projection.
_TOWERS_WITH_PROJECTION_BIAS = ("eva",)


@dataclass(frozen=True)
class AdapterConfig:
    """Architecture of the text adapter, as saved in the model config.

    Attributes:
        depth: number of residual blocks. 0 stands for no adapter: caption embeddings are text embeddings.
        expansion: hidden size of a residual block, as a multiple of its input size.
        normalize_input: if True, L2-normalise the caption embeddings before the first block.
    """

    depth: int = 4  # as in the paper
    expansion: int = 2
    normalize_input: bool = True


class ResidualBlock(nn.Module):
    """x + Linear(GELU(Linear(LayerNorm(x)))), with a hidden layer of `expansion * dim` units."""

    def __init__(self, dim: int, expansion: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map hidden states of shape (N, dim) to hidden states of the same shape."""
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Adapter(nn.Module):
    """Text adapter: L2-normalise (optional) -> `depth` residual blocks -> LayerNorm -> Linear. Depth 0: the identity.

    The paper uses depth 4 and expansion 2. With 4096 input and 1280 output dimensions, this adapter has 273.8 M
    parameters. In the checkpoints released with the paper, adapters trained on cached embeddings L2-normalise their
    input (`normalize_input=True`), whereas adapters trained with the LLM in the training loop do not.
    """

    def __init__(
        self, text_dim: int, embed_dim: int, depth: int = 4, expansion: int = 2, normalize_input: bool = True
    ) -> None:
        super().__init__()
        self.depth, self.normalize_input = depth, normalize_input
        if depth == 0:
            if text_dim != embed_dim:
                raise ValueError(f"without an adapter, embed_dim must be {text_dim} like text_dim (got {embed_dim})")
            return
        self.blocks = nn.Sequential(*(ResidualBlock(text_dim, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(text_dim)
        self.out = nn.Linear(text_dim, embed_dim)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map caption embeddings of shape (N, text_dim) to unnormalised text embeddings of shape (N, embed_dim)."""
        if self.depth == 0:
            return embeddings
        x = F.normalize(embeddings, dim=-1) if self.normalize_input else embeddings
        return self.out(self.norm(self.blocks(x)))


def build_projection(feature_dim: int, embed_dim: int, bias: bool) -> nn.Linear:
    """Build an image projection with random weights, initialised as in the authors' code.

    With a bias, the weights are near zero, as for EVA towers. Without a bias, their standard deviation is
    1 / sqrt(feature_dim), as for OpenAI's CLIP.
    """
    projection = nn.Linear(feature_dim, embed_dim, bias=bias)
    nn.init.normal_(projection.weight, std=SMALL_PROJECTION_STD if bias else feature_dim**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


def needs_projection_bias(tower: dict[str, Any]) -> bool:
    """Return True if a new image projection for this vision tower config should have a bias and near-zero weights."""
    architecture = tower["architecture"]  # a dict for transformers towers
    return isinstance(architecture, str) and architecture.startswith(_TOWERS_WITH_PROJECTION_BIAS)
