"""What autograd keeps of a forward pass for the backward pass, counted in a pass over tensors without numbers.

Fake tensors run the model's own code and say how large everything is. They pretend to be on a CPU, whose kernels for
attention keep as little as a GPU's do; autocast lowers precision there as it would on a GPU.
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
from llm2clip.models.llm_layers import get_layers
from llm2clip.models.lora import cast_frozen_linear
from llm2clip.models.precision import DTYPES
from llm2clip.tools.plan.model_configs import build_llm, build_model
from llm2clip.train.optim import set_trainable


class SavedTensorBytes:
    """Bytes of what autograd keeps while this is open, each storage once, and weights not at all."""

    def __init__(self, *modules: nn.Module) -> None:
        self.apart = {p.untyped_storage()._cdata for m in modules for p in (*m.parameters(), *m.buffers())}
        self.found: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda x: x)

    def _keep(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.apart:
            self.found[storage._cdata] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self.found.values())


def kept_by_llm(config: Any, tune: TuneConfig, precision: str, layers: int) -> tuple[float, float]:
    """Bytes of a token that autograd keeps, and that go into the blocks, for a model of some blocks only."""
    short = type(config).from_dict(config.to_dict())
    short.num_hidden_layers, short.is_causal = layers, False
    if getattr(short, "layer_types", None):
        short.layer_types = (config.layer_types * layers)[:layers]
    llm = build_llm(short).train()
    blocks, net = get_layers(llm), llm
    llm.get_input_embeddings().requires_grad_(False)
    if tune.lora_r:
        lora = LoraConfig(r=tune.lora_r, lora_dropout=tune.lora_dropout, target_modules="all-linear")
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers for something by its old name
            net = get_peft_model(llm, lora)
        cast_frozen_linear(net, DTYPES[precision])
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast(precision):
        net.to_empty(device="cpu")
        sizes = _input_sizes(blocks)
        for tokens in (128, 256):
            kept = SavedTensorBytes(net)
            with kept.hooks:
                out = net(input_ids=torch.zeros(1, tokens, dtype=torch.long))  # held until it is counted
            found.append(kept.bytes)
            del out
    # The difference leaves out what does not grow with the tokens: copies of trained weights in half precision.
    return (found[1] - found[0]) / 128, sum(sizes.values()) / 256


def kept_by_model(recipe: AlignConfig, text_width: int, captions: int) -> list[tuple[float, float, float]]:
    """For one image and for two, with their captions: bytes that autograd keeps; that it would for one block of the
    tower, if that learned; and that go into its blocks."""
    model = build_model(recipe, text_width)
    with torch.device("meta"):
        set_trainable(model, recipe)
    size, blocks, out = model.tower.preprocess.size, model.tower.blocks(), []
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast(recipe.precision):
        model.to_empty(device="cpu")
        for images in (1, 2):
            given: dict[str, Tensor] = {"embeddings": torch.zeros(images * captions, text_width)}
            pixels = torch.zeros(images, 3, size, size, dtype=torch.uint8)
            if recipe.tower_lr == 0:
                given["features"] = torch.zeros(images, model.tower.feature_dim)
            else:
                given["pixels"] = pixels
            kept = SavedTensorBytes(model)
            with kept.hooks:
                held = model(**given)  # until it is counted
            whole, sizes = kept.bytes, _input_sizes(blocks)
            del held
            kept = SavedTensorBytes(model)
            if not recipe.tower_lr == 0:
                with saved_by_model(model.tower, True), kept.hooks:
                    held = model.tower(pixels)
                del held
            out.append((float(whole), kept.bytes / max(1, len(blocks)), float(sum(sizes.values()))))
    return out


@contextmanager
def saved_by_model(module: nn.Module, learn: bool) -> Iterator[None]:
    """Within this, all of it learns, or nothing does."""
    before = [p.requires_grad for p in module.parameters()]
    module.requires_grad_(learn)
    try:
        yield
    finally:
        for p, learned in zip(module.parameters(), before, strict=True):
            p.requires_grad_(learned)


def _input_sizes(blocks: Any) -> dict[int, int]:
    """Filled in the next forward pass: bytes of what goes into each block."""
    sizes: dict[int, int] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is not None:
            sizes[id(module)] = first.numel() * first.element_size()

    for block in blocks:
        block.register_forward_pre_hook(see, with_kwargs=True)
    return sizes


def _autocast(precision: str) -> torch.autocast:
    """As on a GPU; the CPU that these tensors pretend to be on knows bf16, which takes what fp16 takes."""
    return torch.autocast("cpu", torch.bfloat16, enabled=precision != "fp32")
