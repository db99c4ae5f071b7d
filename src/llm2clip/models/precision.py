"""Choice of the numerical precision for each stage and device, and calibration of the encoding precision.

If a stage's precision setting is `auto`, the device determines the precision:

stage      GPU with bf16   CPU with bf16   all other devices
tune       bf16            bf16            fp32
embed      calibrated      calibrated      fp32
align      bf16            fp32            fp32
evaluate   calibrated      fp32            fp32
serve      calibrated      calibrated      fp32

"With bf16" means that the hardware multiplies bf16 matrices: NVIDIA GPUs of the Ampere generation and later, and CPUs
with AMX or AVX-512 bf16 instructions. `align` and `evaluate` run in fp32 on all CPUs, so that their results do not
depend on the CPU. `serve` is the search server.

"Calibrated" means the fastest precision in which the caption encoder is accurate enough. In some layers of an LLM, the
MLP's output for a few tokens is a thousand times larger than for all other tokens (massive activations, arXiv
2402.17762). This happens to tokens whose hidden state exceeds a threshold. In an untuned LLM with bidirectional
attention, many tokens are close to the threshold, so such a layer amplifies the rounding errors of all earlier layers.
Layer 11 of untuned SmolLM2-135M is an example. The minimum cosine similarity between the bf16 and fp32 embeddings of 48
captions is

- 0.984 with all 30 layers in bf16;
- 0.984 with layers 0 to 11 in bf16 and layers 12 to 29 in fp32;
- 0.9999 with layers 0 to 11 in fp32 and layers 12 to 29 in bf16;
- 0.9999 with all layers in bf16 if the model has causal attention or has been tuned.

The number of first layers that must stay in fp32 is therefore measured once per encoder, on a fixed set of captions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from llm2clip.config import Stage
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.llm_layers import get_layers, set_layers

CALIBRATED = "calibrated"
# Precision of each stage on GPUs and CPUs that support bf16.
AUTO_PRECISION: dict[Stage, dict[str, str]] = {
    "tune": {"cuda": "bf16", "cpu": "bf16"},
    "embed": {"cuda": CALIBRATED, "cpu": CALIBRATED},
    "align": {"cuda": "bf16", "cpu": "fp32"},
    "evaluate": {"cuda": CALIBRATED, "cpu": "fp32"},
    "serve": {"cuda": CALIBRATED, "cpu": CALIBRATED},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_COSINE = 0.999
# Do not change these captions. They determine the calibrated precision, which is part of a store's fingerprint.
CALIBRATION_CAPTIONS = tuple(
    Path(__file__).with_name("calibration_captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
)


def resolve_precision(stage: Stage, setting: str, device: torch.device) -> str:
    """Return the precision of a stage, without measuring anything.

    Args:
        stage: row of the table at the top of this module. Multimodal LLMs use the row of `tune`.
        setting: the user's setting. Any value except `auto` is returned unchanged.
        device: device on which the stage runs.

    Returns:
        For `auto`, the entry of the table: fp32, bf16, or `CALIBRATED`, which `resolve_encoder_precision` replaces with
        the measured precision.
    """
    if setting != "auto":
        return setting
    return auto_precision(stage, device.type, has_bf16_hardware(device))


def auto_precision(stage: Stage, device_type: str, has_bf16: bool) -> str:
    """Look up a stage and a device type (cuda, cpu, ...) in the table at the top of this module."""
    return AUTO_PRECISION[stage].get(device_type, "fp32") if has_bf16 else "fp32"


def has_bf16_hardware(device: torch.device) -> bool:
    """Return True for GPUs with native bf16 support, and for CPUs with AMX or AVX-512 bf16 instructions."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    get_capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return device.type == "cpu" and any(get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def resolve_encoder_precision(
    stage: Stage, setting: str, encoder: CaptionEncoder, device: torch.device | None = None
) -> str:
    """Return the precision in which a stage runs a caption encoder: fp32, bf16 or bf16+N. Calibrate it if necessary.

    Args:
        stage: row of the table at the top of this module.
        setting: the user's setting. Any value except `auto` is returned unchanged.
        encoder: encoder with fp32 weights.
        device: device on which the encoder will run. Default: the encoder's device.
    """
    device = device or encoder.device
    precision = resolve_precision(stage, setting, device)
    return calibrate_for_device(encoder, device) if precision == CALIBRATED else precision


def load_for_evaluation(path: str | Path, device: torch.device, **options: Any) -> CaptionEncoder:
    """Load a caption encoder on a device, with only the weights required for encoding in the precision of `evaluate`.

    See `CaptionEncoder.move_for_encoding`. `options` are passed to `CaptionEncoder.from_pretrained`.
    """
    encoder = CaptionEncoder.from_pretrained(path, device="cpu", **options)
    encoder.move_for_encoding(device, resolve_encoder_precision("evaluate", "auto", encoder, device))
    return encoder


def calibrate_for_device(encoder: CaptionEncoder, device: torch.device) -> str:
    """Measure the fastest precision that is accurate enough on a device. See `calibrate_precision`.

    If the encoder is on the CPU and the device is a GPU, layers are moved to the GPU one at a time, because the fp32
    weights may not fit in GPU memory.
    """
    if device.type == encoder.device.type:
        return calibrate_precision(encoder)
    with layers_offloaded(encoder, device):
        return calibrate_precision(encoder)


def calibrate_precision(encoder: CaptionEncoder) -> str:
    """Measure the fastest precision that is accurate enough on the encoder's device.

    Return `bf16` if it is accurate enough, otherwise `bf16+N` with the smallest sufficient N, or `fp32` if no N is
    sufficient. A precision is accurate enough if the embedding of every calibration caption has a cosine similarity of
    at least 0.999 to its fp32 embedding.
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


@contextmanager
def layers_offloaded(encoder: CaptionEncoder, device: torch.device) -> Iterator[None]:
    """Inside the `with` block, run an encoder on `device` with at most one of the LLM's layers on it at a time.

    The encoder must be on the CPU. It is moved back to the CPU on exit.
    """
    layers = get_layers(encoder.llm)
    set_layers(encoder.llm, nn.ModuleList())
    encoder.to(device)  # all modules except the layers
    set_layers(encoder.llm, layers)
    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda layer, args: _move_layer(layer, device)))
        hooks.append(layer.register_forward_hook(lambda layer, args, output: _move_layer(layer, "cpu")))
    caches_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # otherwise, a bf16 copy of every layer would stay on the device
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(caches_casts)
        for hook in hooks:
            hook.remove()
        encoder.to("cpu")


def _move_layer(layer: nn.Module, device: torch.device | str) -> None:
    """Move a layer. As a forward hook, this function returns None so that inputs and outputs are not changed."""
    layer.to(device)


@contextmanager
def tf32_matmul() -> Iterator[None]:
    """Use TF32 for float32 matmuls on NVIDIA GPUs inside the `with` block. Without a GPU, nothing changes.

    TF32 rounds the inputs of a matmul to the precision of float16 and accumulates the products in float32, which is
    several times faster. PyTorch uses TF32 for convolutions by default. Losses and similarities need full precision,
    because the differences between similarities are small.
    """
    if not torch.cuda.is_available():
        yield
        return
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(previous)
