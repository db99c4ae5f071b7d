"""Numerical precision of each stage on each device, and calibration of the number of LLM layers that need fp32.

LLMs have massive activations (arXiv 2402.17762): for a few tokens, the output of some MLPs is a thousand times larger
than for all other tokens. A token gets a massive activation if its hidden state crosses a threshold. In an untuned LLM
with bidirectional attention, many hidden states are close to the threshold, so rounding errors in earlier layers decide
which tokens get a massive activation.

For untuned SmolLM2-135M, the minimum cosine similarity between the bf16 and fp32 embeddings of 48 captions is 0.984.
With layers 0 to 11 in fp32, with causal attention, or after tuning, the minimum is 0.9999. Therefore, the number of
initial layers that must stay in fp32 is measured once per encoder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from llm2clip.config import Stage
from llm2clip.cpu_tuning import use_float32_matmul_precision

if TYPE_CHECKING:
    from llm2clip.models.text.caption_encoder import CaptionEncoder

CALIBRATED = "calibrated"  # placeholder for the result of `calibrate_precision`
# Precision that `auto` selects for each stage on devices with bf16 matmul hardware (fp32 on other devices).
# On CPUs, `align`, `distill` and `evaluate` always run in fp32, so that their results do not depend on the CPU.
AUTO_PRECISION: dict[Stage, dict[str, str]] = {
    "caption": {"cuda": "bf16", "cpu": "bf16"},
    "tune": {"cuda": "bf16", "cpu": "bf16"},
    "embed": {"cuda": CALIBRATED, "cpu": CALIBRATED},
    "align": {"cuda": "bf16", "cpu": "fp32"},
    "distill": {"cuda": "bf16", "cpu": "fp32"},
    "llava": {"cuda": "bf16", "cpu": "bf16"},
    "evaluate": {"cuda": CALIBRATED, "cpu": "fp32"},
    "serve": {"cuda": CALIBRATED, "cpu": CALIBRATED},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_COSINE = 0.999
# The captions must not change: they determine the calibrated precision, which is part of a store's fingerprint.
CALIBRATION_CAPTIONS = tuple(
    Path(__file__).with_name("calibration_captions.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
)


class Precision(str):
    """Precision of a model: fp32, bf16, fp16, or bf16+N, which is bf16 with the first N layers of the LLM in fp32."""

    def __new__(cls, name: str) -> Precision:
        if re.fullmatch(r"fp32|fp16|bf16(\+\d+)?", name) is None:
            raise ValueError(f"precision must be fp32, fp16, bf16, or bf16+N with N initial fp32 layers (got {name!r})")
        return super().__new__(cls, name)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matmuls."""
        return DTYPES[self.partition("+")[0]]

    @property
    def num_fp32_layers(self) -> int:
        """Number of initial LLM layers in fp32 for bf16+N, or 0 for other precisions."""
        return int(self.partition("+")[2] or 0)

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is torch.float32 else torch.autocast(device.type, self.dtype)


FP32 = Precision("fp32")


def resolve_precision(
    stage: Stage, setting: str, device: torch.device, calibrate: Callable[[], str] = lambda: "bf16"
) -> Precision:
    """Return `setting` as a `Precision`. For `auto`, look up the stage and the device in `AUTO_PRECISION`.

    `calibrate` is called if the stage's precision is calibrated. The default returns bf16, which is suitable for vision
    towers and for models without a caption encoder.
    """
    if setting != "auto":
        return Precision(setting)
    auto = choose_auto_precision(stage, device.type, has_native_bf16(device))
    return Precision(calibrate() if auto == CALIBRATED else auto)


def choose_auto_precision(stage: Stage, device_type: str, has_bf16: bool) -> str:
    return AUTO_PRECISION[stage].get(device_type, "fp32") if has_bf16 else "fp32"


def has_native_bf16(device: torch.device) -> bool:
    """Return True for NVIDIA GPUs since the Ampere generation, and for CPUs with AMX or AVX-512 support for bf16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    get_capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    return device.type == "cpu" and any(get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def calibrate_precision(encoder: CaptionEncoder, device: torch.device | None = None) -> str:
    """Return the fastest sufficiently accurate precision: `bf16`, `bf16+N` with the smallest possible N, or `fp32`.

    A precision is sufficiently accurate if the embeddings of all calibration captions have a cosine similarity of at
    least 0.999 to the fp32 embeddings.

    Args:
        encoder: Caption encoder with fp32 weights.
        device: Device that runs the encoder. Default: the encoder's device. If the encoder is on the CPU and the device
            is a GPU, layers are moved to the GPU one at a time.
    """
    if device is not None and device.type != encoder.device.type:
        with offload_llm_layers(encoder, device):
            return calibrate_precision(encoder)
    exact = encoder.encode(CALIBRATION_CAPTIONS)

    def is_accurate_enough(precision: str) -> bool:
        embeddings = encoder.encode(CALIBRATION_CAPTIONS, precision=precision)
        return bool(F.cosine_similarity(embeddings, exact).min() >= MIN_COSINE)

    if is_accurate_enough("bf16"):
        return "bf16"
    depth = len(get_llm_layers(encoder.llm))
    # Binary search: `low` fp32 layers are too few, and `high` fp32 layers are enough.
    low, high = 0, depth
    while high - low > 1:
        middle = (low + high) // 2
        if is_accurate_enough(f"bf16+{middle}"):
            high = middle
        else:
            low = middle
    return f"bf16+{high}" if high < depth else "fp32"


def get_llm_layers(llm: Any) -> nn.ModuleList:
    """Return the layers of a transformers model without a language-modelling head. Static embeddings have no layers."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # takes seconds to import

    if isinstance(llm, StaticEmbedding):
        return nn.ModuleList()
    layers: nn.ModuleList = llm.layers if hasattr(llm, "layers") else llm.encoder.layer
    return layers


def set_llm_layers(llm: Any, layers: nn.ModuleList) -> None:
    if hasattr(llm, "layers"):
        llm.layers = layers
    else:
        llm.encoder.layer = layers


@contextmanager
def offload_llm_layers(encoder: CaptionEncoder, device: torch.device) -> Iterator[None]:
    """Run a CPU encoder on `device` inside the `with` block, with only one LLM layer on the device at a time."""
    layers = get_llm_layers(encoder.llm)
    set_llm_layers(encoder.llm, nn.ModuleList())
    encoder.to(device)  # all modules except the LLM layers
    set_llm_layers(encoder.llm, layers)
    hooks = []
    for layer in layers:
        hooks.append(layer.register_forward_pre_hook(lambda layer, args: _move_layer(layer, device)))
        hooks.append(layer.register_forward_hook(lambda layer, args, output: _move_layer(layer, "cpu")))
    cache_was_enabled = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # otherwise, a bf16 copy of every layer would stay on the device
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cache_was_enabled)
        for hook in hooks:
            hook.remove()
        encoder.to("cpu")


def _move_layer(layer: nn.Module, device: torch.device | str) -> None:
    layer.to(device)  # the layer is not returned, because a hook's return value would replace the inputs or outputs


def use_tf32_matmul() -> AbstractContextManager[None]:
    """Use TF32 for float32 matmuls on NVIDIA GPUs inside the `with` block. Do not use TF32 for cosine similarities."""
    return use_float32_matmul_precision("high") if torch.cuda.is_available() else nullcontext()


def cast_linear_weights(llm: nn.Module, precision: Precision) -> None:
    """Cast the weights of a transformers model that are used only in bf16 matmuls to bf16, in place.

    Autocast would cast the same weights before every matmul, so the embeddings are bit-identical. Norms, token
    embeddings, weights tied to token embeddings and, with bf16+N, the first N layers stay in fp32.
    """
    if precision == "fp32":
        return
    fp32_layers = get_llm_layers(llm)[: precision.num_fp32_layers]
    fp32_parameters = {parameter for layer in fp32_layers for parameter in layer.parameters()}
    # Subclasses of Linear are excluded because they may use their weights outside of matmuls.
    linear_layers = [module for module in llm.modules() if type(module) is nn.Linear]
    for module in llm.modules():
        if type(module) is not nn.Linear:
            fp32_parameters.update(module.parameters(recurse=False))
    for layer in linear_layers:
        if fp32_parameters.isdisjoint(layer.parameters()):
            layer.to(torch.bfloat16)


@contextmanager
def autocast_llm(llm: Any, device: torch.device, precision: Precision) -> Iterator[None]:
    """Run a transformers model in fp32, bf16 or bf16+N inside the `with` block."""
    count = precision.num_fp32_layers
    # `get_llm_layers` is called only for bf16+N because it does not support all models.
    fp32_layers: Sequence[nn.Module] = list(get_llm_layers(llm))[:count] if count else []
    for layer in fp32_layers:
        layer.forward = torch.autocast(device.type, enabled=False)(layer.forward)
    try:
        with precision.autocast(device):
            yield
    finally:
        for layer in fp32_layers:
            del layer.forward
