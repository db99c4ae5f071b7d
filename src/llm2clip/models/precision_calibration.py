"""Search for the fastest encoding precision that is accurate enough for a caption encoder.

In some layers of an LLM, the MLP's output for a few tokens is a thousand times larger than for all other tokens
(massive activations, arXiv 2402.17762). Tokens that exceed a threshold have such an output. In an untuned LLM with
bidirectional attention, many tokens are close to the threshold, so the layer amplifies the small rounding errors of all
earlier layers. Layer 11 of untuned SmolLM2-135M is an example. The minimum cosine similarity between the bf16 and fp32
embeddings of 48 captions is

- 0.984 with all 30 layers in bf16;
- 0.984 with layers 0 to 11 in bf16 and layers 12 to 29 in fp32;
- 0.9999 with layers 0 to 11 in fp32 and layers 12 to 29 in bf16;
- 0.9999 with all layers in bf16 if the model has causal attention or has been tuned.

The number of first layers that must stay in fp32 is therefore measured once per encoder, on a fixed set of captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm2clip.models.precision import default_encoding_precision, resolve_device_precision
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.llm_layers import get_layers, set_layers

MIN_COSINE = 0.999
# Do not change these captions: they determine the selected precision, which is part of an embedding store's
# fingerprint.
CALIBRATION_CAPTIONS = tuple(
    Path(__file__).with_name("calibration_captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
)


def load_for_encoding(path: str | Path, device: torch.device, **options: Any) -> CaptionEncoder:
    """Load a caption encoder on a device, with only the weights required for encoding in the default precision.

    See `default_encoding_precision` and `CaptionEncoder.move_for_encoding`. `options` are passed to
    `CaptionEncoder.from_pretrained`.
    """
    encoder = CaptionEncoder.from_pretrained(path, device="cpu", **options)
    precision = default_encoding_precision(device)
    if precision == "auto":
        precision = fastest_precision(encoder, device)
    encoder.move_for_encoding(device, precision)
    return encoder


def fastest_precision(encoder: CaptionEncoder, device: torch.device | None = None) -> str:
    """Return the precision that is used for `auto`.

    This is fp32 if the device has no bf16 hardware. Otherwise, it is the result of `calibrate_precision`.

    Args:
        encoder: encoder with fp32 weights.
        device: device on which the encoder will run. Default: the encoder's device. If the encoder is on the CPU and
            the device is a GPU, layers are moved to the GPU one at a time, because the fp32 weights may not all fit.
    """
    device = device or encoder.device
    if resolve_device_precision("auto", device) == "fp32":
        return "fp32"
    if device.type == encoder.device.type:
        return calibrate_precision(encoder)
    with layers_offloaded(encoder, device):
        return calibrate_precision(encoder)


@contextmanager
def layers_offloaded(encoder: CaptionEncoder, device: torch.device) -> Iterator[None]:
    """Run an encoder on `device` inside the `with` block, with at most one of the LLM's layers on the device at a time.

    The encoder must be on the CPU. It is moved back to the CPU on exit.
    """

    layers = get_layers(encoder.llm)
    set_layers(encoder.llm, nn.ModuleList())
    encoder.to(device)  # all modules except the layers
    set_layers(encoder.llm, layers)
    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda layer, args: _move(layer, device)))
        hooks.append(layer.register_forward_hook(lambda layer, args, output: _move(layer, "cpu")))
    caches_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # otherwise, a bf16 copy of every layer would stay on the device
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches_casts)
        for hook in hooks:
            hook.remove()
        encoder.to("cpu")


def _move(layer: nn.Module, device: torch.device | str) -> None:
    """Forward hook that moves a layer. It returns None, so the layer's inputs and outputs are not changed."""
    layer.to(device)


def calibrate_precision(encoder: CaptionEncoder) -> str:
    """Return the fastest precision that is accurate enough.

    This is `bf16` if possible, otherwise `bf16+N` with the smallest sufficient N, or `fp32` if no N is sufficient. A
    precision is accurate enough if the embedding of every calibration caption has a cosine similarity of at least 0.999
    to its fp32 embedding.
    """
    exact = encoder.encode(CALIBRATION_CAPTIONS)

    def is_accurate_enough(precision: str) -> bool:
        embeddings = encoder.encode(CALIBRATION_CAPTIONS, precision=precision)
        return bool(F.cosine_similarity(embeddings, exact).min() >= MIN_COSINE)

    if is_accurate_enough("bf16"):
        return "bf16"
    depth = len(get_layers(encoder.llm))
    # Binary search: `low` fp32 layers are not enough, and `high` fp32 layers are.
    low, high = 0, depth
    while high - low > 1:
        middle = (low + high) // 2
        if is_accurate_enough(f"bf16+{middle}"):
            high = middle
        else:
            low = middle
    return f"bf16+{high}" if high < depth else "fp32"
