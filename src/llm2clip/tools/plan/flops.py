"""Costs per caption and per image: parameters, FLOPs, and bytes of activations saved for the backward pass.

A multiply-add counts as 2 FLOPs. As usual, only matmuls and convolutions are counted. To count FLOPs and saved bytes,
the model of the `align` stage is built without weights, on the meta device, and executed. The LLM is a stack of
identical layers, so its FLOPs are computed by a formula (`TextCosts.forward`), and its saved bytes are extrapolated
from models with two and three layers.
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
from llm2clip.models.text.batching import GPU_BATCH_TOKENS
from llm2clip.models.text.llm_layers import get_layers
from llm2clip.tools.plan.activations import requires_grad_as, saved_by_align_model, saved_by_llm
from llm2clip.tools.plan.model_configs import build_llm, build_model, get_llm_config
from llm2clip.train.optim import set_trainable


@dataclass(frozen=True)
class TextCosts:
    """Costs of running and fine-tuning the language model.

    Attributes:
        embed_dim: dimension of the stored embeddings.
        parameters: number of parameters, excluding the language modelling head.
        linear: number of weights in all linear layers, which account for most FLOPs.
        largest_linear: number of linear weights in the largest transformer layer.
        largest_matrix: number of weights in the largest linear layer.
        layers: number of transformer layers.
        attention_dim: number of attention heads times the dimension per head.
        trained: number of parameters that the `tune` stage trains.
        saved_per_token: bytes of activations that autograd saves per token in each transformer layer.
        input_per_token: size of a transformer layer's input per token, in bytes.
        saved_outside: bytes of activations that autograd saves per token outside the transformer layers.
    """

    embed_dim: int
    parameters: int
    linear: int
    largest_linear: int
    largest_matrix: int
    layers: int
    attention_dim: int
    trained: int
    saved_per_token: float
    input_per_token: float
    saved_outside: float

    def forward(self, tokens: float) -> float:
        """Return the FLOPs of a forward pass over a caption, including the template."""
        return 2 * self.linear * tokens + self._attention(tokens)

    def backward(self, tokens: float, lora: bool) -> float:
        """Return the FLOPs of the backward pass. With LoRA, weight gradients are computed only for the LoRA weights."""
        weights = 4 * self.trained * tokens if lora else 2 * self.linear * tokens
        return 2 * self.linear * tokens + 2 * self._attention(tokens) + weights

    def step(self, tokens: float, config: TuneConfig) -> float:
        """Return the FLOPs per caption in a `tune` step, including LoRA and repeated forward passes."""
        lora = config.lora_r > 0
        forward = self.forward(tokens) + (2 * self.trained * tokens if lora else 0)
        tokens_per_batch = 2 * config.batch_size * tokens  # two texts per pair
        several_passes = tokens_per_batch > (config.batch_tokens or GPU_BATCH_TOKENS)
        num_forwards = 1 + config.gradient_checkpointing + (config.grad_cache and several_passes)
        return forward * num_forwards + self.backward(tokens, lora)

    def _attention(self, tokens: float) -> float:
        return 4 * tokens**2 * self.attention_dim * self.layers  # QK^T and PV over all pairs of tokens


@dataclass(frozen=True)
class ImageCosts:
    """Costs of running and training the model of the `align` stage.

    Attributes:
        tower, projection, adapter: number of parameters in each component.
        trained: number of parameters that the `align` stage trains.
        feature_dim: dimension of the tower's image features.
        embed_dim: dimension of the shared embedding space.
        tower_forward: FLOPs of the tower's forward pass for one image.
        heads_forward: FLOPs of a forward pass through the projection and the adapter, for one image and its captions.
        backward: FLOPs of the backward pass for one image and its captions.
        saved: bytes of activations that autograd saves for one image and its captions.
        saved_per_layer: bytes of activations that autograd saves for one image in each tower layer.
        layer_inputs: total size of the inputs to all tower layers for one image, in bytes.
        copies: size of the half-precision copies of weights that autograd saves, in bytes.
    """

    tower: int
    projection: int
    adapter: int
    trained: int
    feature_dim: int
    embed_dim: int
    tower_forward: float
    heads_forward: float
    backward: float
    saved: float
    saved_per_layer: float
    layer_inputs: float
    copies: float


def text_costs(encoder: EncoderConfig, tune: TuneConfig, precision: str, tokens_on_cpu: int | None = None) -> TextCosts:
    """Compute the costs of a caption encoder that is tuned in `precision` (fp32, bf16 or fp16).

    If the encoder is tuned on a CPU, where attention is not fused, `tokens_on_cpu` is the number of tokens per caption.
    """
    config = get_llm_config(encoder)
    llm = build_llm(config)
    layers = get_layers(llm)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if tune.lora_r:
        trained = _count_lora(layers, tune.lora_r)
    else:
        trained = _count(llm) - int(llm.get_input_embeddings().weight.numel())
    two_layers, three_layers = (saved_by_llm(config, tune, precision, n, tokens_on_cpu) for n in (2, 3))
    return TextCosts(
        embed_dim=encoder.truncate_dim or config.hidden_size,
        parameters=_count(llm),
        linear=_count_linear(layers),
        largest_linear=max(_count_linear(layer) for layer in layers),
        largest_matrix=max(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear)),
        layers=len(layers),
        attention_dim=heads * head_dim,
        trained=trained,
        saved_per_token=three_layers[0] - two_layers[0],
        input_per_token=three_layers[1] - two_layers[1],
        saved_outside=max(0.0, 3 * two_layers[0] - 2 * three_layers[0]),
    )


def image_costs(config: AlignConfig, text_dim: int, captions: float) -> ImageCosts:
    """Compute the costs of the `align` stage's model with `captions` captions per image and step.

    Raises:
        ValueError: the settings contradict each other, or the tower is unknown.
    """
    model = build_model(config, text_dim)
    tower = model.tower
    parameters = (_count(tower), _count(model.projection), _count(model.adapter))
    with torch.device("meta"):
        set_trainable(model, config)  # adds LoRA layers if configured
    size = tower.preprocess.size
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8, device="meta")
    features = torch.zeros(1, tower.feature_dim, device="meta")
    image_input = {"features": features} if config.tower_lr == 0 else {"pixels": pixels}
    with requires_grad_as(model, False):
        tower_forward = count_flops(lambda: tower(pixels))
        projection_forward = count_flops(lambda: model(features=features))

    def count_with(num_captions: int) -> np.ndarray:
        """Return the FLOPs of the heads, the FLOPs of the backward pass, and the bytes saved at batch sizes 1 and 2."""
        texts = torch.zeros(num_captions, text_dim, device="meta")
        with requires_grad_as(model, False):
            heads = projection_forward + count_flops(lambda: model(embeddings=texts))
        image, text, *_ = model(embeddings=texts, **image_input)
        outputs = [output.sum() for output in (image, text) if output.requires_grad]
        backward = count_flops(lambda: torch.stack(outputs).sum().backward()) if outputs else 0.0
        return np.array([heads, backward, *chain(*saved_by_align_model(config, text_dim, num_captions))])

    # The model runs only with integer numbers of captions, so interpolate costs linearly.
    lower = max(1, math.floor(captions))
    counts = count_with(lower)
    if captions > lower:
        counts = counts + (captions - lower) * (count_with(lower + 1) - counts)
    heads, backward, *saved = counts.tolist()
    one_image, two_images = saved[:3], saved[3:]
    return ImageCosts(
        *parameters,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        feature_dim=tower.feature_dim,
        embed_dim=model.config.embed_dim,
        tower_forward=tower_forward,
        heads_forward=heads,
        backward=backward,
        saved=two_images[0] - one_image[0],
        saved_per_layer=two_images[1] - one_image[1],
        layer_inputs=two_images[2] - one_image[2],
        copies=2 * one_image[0] - two_images[0],
    )


def count_flops(run: Callable[[], Any]) -> float:
    """Call `run` and return the FLOPs of its matmuls and convolutions."""
    mode = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})
    with mode:
        run()
    return float(mode.get_total_flops())


def _convolution_backward(
    grad: Any, _input: Any, weight: Any, _bias: Any, *settings: Any, out_shape: Any = None, **_: Any
) -> int:
    """Return the forward FLOPs times the number of requested gradients (input, weight).

    PyTorch's own formula ignores groups and therefore greatly overestimates the FLOPs of EfficientNet.
    """
    output_mask = settings[-1]
    return int(2 * math.prod(grad) * math.prod(weight[1:]) * (bool(output_mask[0]) + bool(output_mask[1])))


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _count_lora(module: nn.Module, rank: int) -> int:
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return sum(rank * (m.in_features + m.out_features) for m in linear)
