"""What one caption and one image cost: parameters, products, and what the backward pass must keep.

One multiplication with its addition is 2 FLOP, and only products of matrices and convolutions count, as is usual. The
model of align is built without numbers and run: its products are counted as they happen, and so is what autograd keeps.
The language model, the same block many times over, is counted by formula (`CaptionWork.forward`); what it keeps is
counted on two and three of its blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llm2clip.config import AlignConfig, EncoderConfig, TuneConfig
from llm2clip.models.llm_layers import get_layers
from llm2clip.tools.plan.activations import kept_by_llm, kept_by_model, saved_by_model
from llm2clip.tools.plan.model_configs import build_llm, build_model, get_llm_config
from llm2clip.train.optim import set_trainable


@dataclass(frozen=True)
class TextCosts:
    """The language model and what tune does to it.

    Args:
        width: of the vectors that go into the store.
        parameters: all of them, without a head.
        linear: weights of the linear layers of its blocks, which do nearly all the work.
        largest_linear: those of one block.
        layers: blocks.
        heads_width: heads times their width.
        trained: parameters that tune changes.
        kept_per_token: bytes that autograd keeps of a token for a block.
        input_per_token: bytes of a token that go into a block.
        kept_outside: bytes that it keeps of a token apart from the blocks.
    """

    width: int
    parameters: int
    linear: int
    largest_linear: int
    layers: int
    heads_width: int
    trained: int
    kept_per_token: float
    input_per_token: float
    kept_outside: float

    def _attention(self, tokens: float) -> float:
        return 4 * tokens**2 * self.heads_width * self.layers  # QK^T and PV, every token with every token

    def forward(self, tokens: float) -> float:
        """FLOP of one forward pass over a caption of so many tokens, template included."""
        return 2 * self.linear * tokens + self._attention(tokens)

    def backward(self, tokens: float, lora: bool) -> float:
        """FLOP of the backward pass: gradients of what goes into each layer, and of the weights, all or LoRA's."""
        weights = 4 * self.trained * tokens if lora else 2 * self.linear * tokens
        return 2 * self.linear * tokens + 2 * self._attention(tokens) + weights

    def step(self, tokens: float, recipe: TuneConfig) -> float:
        """FLOP of a caption in a step of tune, LoRA's own, recomputed and cached passes included."""
        lora = recipe.lora_r > 0
        forward = self.forward(tokens) + (2 * self.trained * tokens if lora else 0)
        return forward * (1 + recipe.gradient_checkpointing + recipe.grad_cache) + self.backward(tokens, lora)


@dataclass(frozen=True)
class ImageCosts:
    """The model of align and what its training does.

    Args:
        tower, projection, adapter: parameters of each.
        trained: parameters that learn.
        feature: width of what the tower gives.
        shared: width of the shared space.
        tower_forward: FLOP of an image through the tower.
        heads_forward: FLOP of an image and its captions of a step through projection and adapter.
        backward: FLOP of the backward pass for an image and its captions.
        kept: bytes that autograd keeps for an image and its captions.
        block_kept: of those, one block's of the tower.
        block_input: bytes of an image that go into each of the tower's blocks, all together.
        copies: bytes of the weights' copies in half precision that a pass keeps.
    """

    tower: int
    projection: int
    adapter: int
    trained: int
    feature: int
    shared: int
    tower_forward: float
    heads_forward: float
    backward: float
    kept: float
    block_kept: float
    block_input: float
    copies: float


def text_costs(encoder: EncoderConfig, tune: TuneConfig, precision: str) -> TextCosts:
    """Count the language model of a recipe, tuned in `precision` (fp32, bf16, fp16)."""
    config = get_llm_config(encoder)
    llm = build_llm(config)
    blocks = get_layers(llm)
    linear = _linear(blocks)
    heads = config.num_attention_heads
    trained = _lora(blocks, tune.lora_r) if tune.lora_r else _count(llm) - _table(llm)
    two, three = (kept_by_llm(config, tune, precision, n) for n in (2, 3))
    return TextCosts(
        width=encoder.truncate_dim or config.hidden_size,
        parameters=_count(llm),
        linear=linear,
        largest_linear=max(_linear(block) for block in blocks),
        layers=len(blocks),
        heads_width=heads * (getattr(config, "head_dim", None) or config.hidden_size // heads),
        trained=trained,
        kept_per_token=three[0] - two[0],
        input_per_token=three[1] - two[1],
        kept_outside=max(0.0, 3 * two[0] - 2 * three[0]),
    )


def image_costs(recipe: AlignConfig, text_width: int, captions: float) -> ImageCosts:
    """Count the model of align for `captions` captions of each image in a step.

    Raises:
        ValueError: the recipe asks for what does not go together, or for an unknown tower.
    """
    model = build_model(recipe, text_width)
    tower = model.tower
    parts = (_count(model.tower), _count(model.projection), _count(model.adapter))
    with torch.device("meta"):
        set_trainable(model, recipe)  # with LoRA, if there is to be some
    size = tower.preprocess.size
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    features = torch.zeros(1, tower.feature_dim, device="meta")
    given = {"features": features} if recipe.tower_lr == 0 else {"pixels": pixels}
    with saved_by_model(model, False):
        tower_forward = count_flops(lambda: model.tower(pixels))
        of_image = count_flops(lambda: model(features=features))

    def counts(n: int) -> np.ndarray:
        """With n captions: FLOP of the heads and backwards, and what is kept of one image and of two."""
        texts = torch.zeros(n, text_width, device="meta")
        with saved_by_model(model, False):
            heads = of_image + count_flops(lambda: model(embeddings=texts))
        image, text, *_ = model(embeddings=texts, **given)
        learned = [x.sum() for x in (image, text) if x.requires_grad]
        backward = count_flops(lambda: torch.stack(learned).sum().backward()) if learned else 0.0
        return np.array([heads, backward, *chain(*kept_by_model(recipe, text_width, n))])

    few = max(1, math.floor(captions))  # whole captions go through; between two numbers of them lies what is asked for
    found = counts(few)
    if captions > few:
        found = found + (captions - few) * (counts(few + 1) - found)
    heads, backward, *kept = found.tolist()
    one, two = kept[:3], kept[3:]
    return ImageCosts(
        *parts,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        feature=tower.feature_dim,
        shared=model.config.embed_dim,
        tower_forward=tower_forward,
        heads_forward=heads,
        backward=backward,
        kept=two[0] - one[0],
        block_kept=two[1] - one[1],
        block_input=two[2] - one[2],
        copies=2 * one[0] - two[0],
    )


def count_flops(run: Callable[[], Any]) -> float:
    """FLOP of the products in a call."""
    mode = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})
    with mode:
        run()
    return float(mode.get_total_flops())


def _convolution_backward(
    grad: Any, _input: Any, weight: Any, _bias: Any, *settings: Any, out_shape: Any = None, **_: Any
) -> int:
    """For each of the gradients asked for, by input and by weight, what the forward pass took. PyTorch's own formula
    counts a convolution in groups as if it had one, dozens of times too much for those of EfficientNet."""
    mask = settings[-1]
    return int(2 * math.prod(grad) * math.prod(weight[1:]) * (bool(mask[0]) + bool(mask[1])))


# ---- parameters -----------------------------------------------------------------------------------------------------


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _lora(module: nn.Module, rank: int) -> int:
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(rank * (m.in_features + m.out_features) for m in linear)


def _table(llm: Any) -> int:
    return int(llm.get_input_embeddings().weight.numel())
