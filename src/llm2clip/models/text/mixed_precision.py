"""Inference of an LLM in bf16, with the first layers in fp32 if necessary.

Autocast casts the fp32 weights of the linear layers to bf16 before every matmul. To save memory, `cast_linear_weights`
stores these weights in bf16 instead. The embeddings are bit-identical in both cases.

Some layers of an LLM are not accurate enough in bf16. `models/precision.py` determines how many of the first layers
must stay in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm2clip.models.text.llm_layers import get_layers


def parse_precision(precision: str) -> tuple[bool, int]:
    """Parse `fp32`, `bf16` or `bf16+N`.

    Returns:
        (is_bf16, N): is_bf16 is False for `fp32` and True otherwise. N is the number of first layers that stay in fp32,
        and 0 without `+N`.

    Raises:
        ValueError: `precision` has another form.
    """
    match = re.fullmatch(r"fp32|bf16(?:\+(\d+))?", precision)
    if match is None:
        raise ValueError(f"precision must be fp32, bf16, or bf16+N with the first N layers in fp32 (got {precision!r})")
    return precision != "fp32", int(match[1] or 0)


def cast_linear_weights(llm: nn.Module, precision: str) -> None:
    """Cast the weights of a transformers model that are used only in bf16 matmuls to bf16, in place.

    Norms and token embeddings stay in fp32, as do the first N layers with bf16+N, and weights that linear layers share
    with other types of layers, such as tied token embeddings. The rounding cannot be undone.
    """
    is_bf16, fp32_layer_count = parse_precision(precision)
    if not is_bf16:
        return
    fp32_parameters = {parameter for layer in get_layers(llm)[:fp32_layer_count] for parameter in layer.parameters()}
    # Skip subclasses of Linear, which may use their weights for something other than a matmul.
    linear_layers = [module for module in llm.modules() if type(module) is nn.Linear]
    for module in llm.modules():
        if type(module) is not nn.Linear:
            fp32_parameters.update(module.parameters(recurse=False))
    for layer in linear_layers:
        if fp32_parameters.isdisjoint(layer.parameters()):
            layer.to(torch.bfloat16)


@contextmanager
def autocast_precision(llm: Any, device: torch.device, precision: str) -> Iterator[None]:
    """Run a transformers model in `precision` (see `parse_precision`) inside the `with` block."""
    is_bf16, fp32_layer_count = parse_precision(precision)
    if not is_bf16:
        yield
        return
    fp32_layers = get_layers(llm)[:fp32_layer_count]
    for layer in fp32_layers:
        layer.forward = _disable_autocast(layer.forward, device)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            yield
    finally:
        for layer in fp32_layers:
            del layer.forward


def _disable_autocast(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return forward(*args, **kwargs)

    return run
