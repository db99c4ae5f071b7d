"""Size of the activations that autograd saves for the backward pass, counted with fake tensors.

Fake tensors run the model's code without allocating memory. They are on a fake CPU, which results in the same counts as
a GPU: CPU attention kernels save just as little for the backward pass, and CPU autocast lowers the precision in the
same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from llm2clip.config import AlignConfig, TuneConfig
from llm2clip.models.precision import DTYPES
from llm2clip.models.text.llm_layers import get_layers
from llm2clip.models.text.lora import cast_frozen_linear
from llm2clip.models.text.packing import PACKED, can_pack, pack_captions
from llm2clip.tools.plan.model_configs import build_llm, build_model
from llm2clip.train.optim import set_trainable


class SavedTensorBytes:
    """Counter of the bytes that autograd saves within `hooks`. Each storage is counted once; weights are excluded."""

    def __init__(self, *modules: nn.Module) -> None:
        weights = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        self._excluded = {tensor.untyped_storage()._cdata for tensor in weights}
        self._sizes: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._record, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        return sum(self._sizes.values())

    def _record(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._excluded:
            self._sizes[storage._cdata] = storage.nbytes()
        return tensor


def saved_by_llm(
    config: Any, tune: TuneConfig, precision: str, num_layers: int, tokens_on_cpu: int | None = None
) -> tuple[float, float]:
    """Return the sizes in bytes of saved activations and of layer inputs, per token, for `num_layers` LLM layers.

    If `tokens_on_cpu` (the number of tokens per caption) is set, decoders use packed attention as on CPUs, which is not
    fused. Otherwise, attention is fused, as on GPUs.
    """
    short_config = type(config).from_dict(config.to_dict())
    short_config.num_hidden_layers, short_config.is_causal = num_layers, False
    if getattr(short_config, "layer_types", None):
        short_config.layer_types = (config.layer_types * num_layers)[:num_layers]
    llm = build_llm(short_config).train()
    layers, net = get_layers(llm), llm
    llm.get_input_embeddings().requires_grad_(False)
    if tune.lora_r:
        lora = LoraConfig(r=tune.lora_r, lora_dropout=tune.lora_dropout, target_modules="all-linear")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft uses a deprecated transformers API
            net = get_peft_model(llm, lora)
        cast_frozen_linear(net, DTYPES[precision])

    is_packed, tokens, saved_bytes = tokens_on_cpu is not None and can_pack(llm), tokens_on_cpu or 128, []
    if is_packed:
        llm.set_attn_implementation(PACKED)
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast(precision):
        net.to_empty(device="cpu")
        input_sizes = _record_input_sizes(layers)
        for captions in (1, 2):
            if is_packed:
                inputs = pack_captions([[0] * tokens] * captions, PACKED, torch.device("cpu"))
            else:
                inputs = {"input_ids": torch.zeros(1, tokens * captions, dtype=torch.long)}
            saved = SavedTensorBytes(net)
            with saved.hooks:
                output = net(**inputs)  # keeps the saved tensors alive
            saved_bytes.append(saved.bytes)
            del output
    # The difference excludes half-precision copies of trained weights, which do not grow with the number of tokens.
    return (saved_bytes[1] - saved_bytes[0]) / tokens, sum(input_sizes.values()) / (2 * tokens)


def saved_by_align_model(config: AlignConfig, text_dim: int, captions: int) -> list[tuple[float, float, float]]:
    """Count the bytes that autograd saves at batch sizes 1 and 2, with `captions` captions per image.

    Returns:
        Three values for each batch size: the bytes saved by the model, the bytes that one tower layer saves when it is
        trained, and the bytes of the inputs to all tower layers.
    """
    model = build_model(config, text_dim)
    with torch.device("meta"):
        set_trainable(model, config)
    tower_is_frozen = config.tower_lr == 0
    size, layers, counts = model.tower.preprocess.size, model.tower.blocks(), []
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast(config.precision):
        model.to_empty(device="cpu")
        for images in (1, 2):
            inputs: dict[str, Tensor] = {"embeddings": torch.zeros(images * captions, text_dim)}
            pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8)
            if tower_is_frozen:
                inputs["features"] = torch.zeros(images, model.tower.feature_dim)
            else:
                inputs["pixels"] = pixels
            saved = SavedTensorBytes(model)
            with saved.hooks:
                output = model(**inputs)  # keeps the saved tensors alive
            total, input_sizes = saved.bytes, _record_input_sizes(layers)
            del output
            saved = SavedTensorBytes(model)
            if not tower_is_frozen:
                with requires_grad_as(model.tower, True), saved.hooks:
                    output = model.tower(pixels)
                del output
            counts.append((float(total), saved.bytes / max(1, len(layers)), float(sum(input_sizes.values()))))
    return counts


@contextmanager
def requires_grad_as(module: nn.Module, value: bool) -> Iterator[None]:
    """Temporarily set the `requires_grad` attribute of all parameters to `value`."""
    before = [p.requires_grad for p in module.parameters()]
    module.requires_grad_(value)
    try:
        yield
    finally:
        for p, required in zip(module.parameters(), before, strict=True):
            p.requires_grad_(required)


def _record_input_sizes(layers: Any) -> dict[int, int]:
    """Return a dict that the next forward pass fills with the size of each layer's input, in bytes."""
    sizes: dict[int, int] = {}

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        if first is not None:
            sizes[id(module)] = first.numel() * first.element_size()

    for layer in layers:
        layer.register_forward_pre_hook(record, with_kwargs=True)
    return sizes


def _autocast(precision: str) -> torch.autocast:
    """Return CPU autocast for the fake tensors. bf16 is also used for fp16, which has the same size."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
