"""Text adapter and image projection, which map caption embeddings and image features to the shared embedding space.

The adapter follows the LLM2CLIP paper (arXiv 2411.04997, section 3.3). Exported models contain a copy of this file, so
it must not import llm2clip.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
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
# Layers of a residual block: name in this package -> name in official checkpoints.
_OFFICIAL_NAMES = {"norm": "ln", "up": "fn.0", "down": "fn.3"}


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

    # In official checkpoints, the adapter is an nn.Sequential of residual blocks, a LayerNorm and a linear layer, so
    # the tensor names start with an index.

    @classmethod
    def from_official(
        cls, names: Collection[str], get_shape: Callable[[str], tuple[int, ...]], normalize_input: bool
    ) -> tuple[AdapterConfig, int, int]:
        """Infer the architecture from an official checkpoint. Return it with the input and output sizes.

        Args:
            names: names of the adapter's tensors, without the prefix of the adapter.
            get_shape: function that returns the shape of the tensor with such a name, or raises an error if there is no
                such tensor.
        """
        depth = len({name.partition(".")[0] for name in names if ".ln." in name})
        text_dim = get_shape(f"{depth}.weight")[0]
        hidden = get_shape("0.fn.0.weight")[0] if depth else 2 * text_dim
        embed_dim = get_shape(f"{depth + 1}.weight")[0]
        return cls(depth, hidden // text_dim, normalize_input), text_dim, embed_dim

    def get_official_name(self, name: str) -> str:
        """Return the name in official checkpoints of the adapter's tensor `name`."""
        *block, layer, kind = name.split(".")  # blocks.N.LAYER.weight, norm.weight, out.weight, ...
        if block:
            return f"{block[1]}.{_OFFICIAL_NAMES[layer]}.{kind}"
        return f"{self.depth + ('norm', 'out').index(layer)}.{kind}"

    def find_official_problem(self) -> str | None:
        """Return why official checkpoints cannot contain this adapter, or None if they can."""
        if self.depth == 0:
            return "there is no adapter"
        if not self.normalize_input:
            return "the adapter does not normalise its input, but the official adapter does"
        return None


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

    def rotate(self, rotation: Tensor) -> None:
        """Multiply the text embeddings by a matrix of shape (embed_dim, embed_dim), float64. Requires `depth` > 0."""
        rotate_outputs(self.out, rotation)

    def truncate(self, dim: int) -> None:
        """Compute only the first `dim` dimensions of the text embeddings. Requires `depth` > 0."""
        truncate_outputs(self.out, dim)


def rotate_outputs(layer: nn.Linear, rotation: Tensor) -> None:
    """Multiply a linear layer's outputs by a float64 CPU matrix, by changing the layer's weights in place."""
    layer.weight.copy_(rotation @ layer.weight.cpu().double())  # on the CPU, because Apple GPUs do not support float64
    if layer.bias is not None:
        layer.bias.copy_(rotation @ layer.bias.cpu().double())


def truncate_outputs(layer: nn.Linear, dim: int) -> None:
    """Keep only the first `dim` outputs of a linear layer, in place."""
    layer.out_features = dim
    layer.weight = nn.Parameter(layer.weight[:dim].clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[:dim].clone())


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
