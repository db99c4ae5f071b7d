"""Tensor names of official LLM2CLIP checkpoints, and how they map to this package's tensor names.

Official checkpoints are the checkpoints released by the authors of LLM2CLIP. There are two layouts:

- "hf" is a transformers checkpoint. It contains OpenAI's CLIP vision tower with transformers' tensor names, a
  projection without bias, and an adapter.
- "eva" is a state dict from the EVA-CLIP code. It contains an EVA-02 tower (whose tensor names differ from timm's), a
  projection with bias, and an adapter with the same architecture.

The layout is recognised from the tensor names alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.transforms import Preprocess
from llm2clip.models.llm2clip import LLM2CLIP


@dataclass(frozen=True)
class Layout:
    """Tensor names in one of the official checkpoint layouts.

    Attributes:
        name: "hf" or "eva".
        tower: name prefix of the vision tower's tensors.
        projection: name prefix of the image projection's tensors.
        adapter: name prefix of the text adapter's tensors.
        ignored: pattern for the names of tensors that are ignored, because image and text embeddings do not depend on
            them. These are the tensors of the original CLIP model's text tower and of the LLM.
    """

    name: str
    tower: str
    projection: str
    adapter: str
    ignored: re.Pattern[str]


HF = Layout(
    name="hf",
    tower="vision_model.",
    projection="visual_projection.",
    adapter="text_adapter.adaptor.",
    ignored=re.compile(r"text_model\.|text_projection\.weight$"),
)
EVA = Layout(
    name="eva",
    tower="visual.",
    projection="visual.head.",
    adapter="text.text_adaptor.",
    ignored=re.compile(r"text\.text\."),
)
LAYOUTS = {layout.name: layout for layout in (HF, EVA)}

# Names of the layers in an adapter block: this package's name -> official name.
_ADAPTER_LAYERS = {"norm": "ln", "up": "fn.0", "down": "fn.3"}
# Parts of tensor names in an EVA-02 block that differ: timm's name -> name in the EVA-CLIP code.
_TIMM_TO_EVA = {
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.fc2.": "mlp.w3.",
}
# Prefix of the adapter's tensors if the adapter was trained with the LLM in the training loop.
_ONLINE_ADAPTER = "text.text_proj.text_adaptor."
# Names used by some versions of the LLM2CLIP authors' code -> canonical names. The original EVA-CLIP code stores the
# query and value biases in the attention module, not in the linear layers.
_ALIASES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    _ONLINE_ADAPTER: EVA.adapter,
}


@dataclass
class Checkpoint:
    """An official checkpoint, with canonical tensor names and its configuration.

    Attributes:
        source: file, folder or hub id, for error messages.
        layout: layout of the tensor names.
        tensors: dict from canonical name to tensor.
        online: True if the adapter was trained with the LLM in the training loop, False if it was trained on cached
            embeddings.
        config: content of config.json, or {} if there is no such file.
        preprocess: preprocessing from preprocessor_config.json, or None if there is no such file.
    """

    source: str
    layout: Layout
    tensors: dict[str, Tensor]
    online: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    preprocess: Preprocess | None = None

    @classmethod
    def from_tensors(
        cls,
        source: str,
        tensors: Mapping[str, Any],
        config: dict[str, Any] | None = None,
        preprocess: Preprocess | None = None,
    ) -> Checkpoint:
        """Create a checkpoint from a state dict: replace aliases with canonical names, and recognise the layout.

        Raises:
            ValueError: the tensor names match neither layout.
        """
        if tensors and all(name.startswith("module.") for name in tensors):  # saved from DistributedDataParallel
            tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        online = any(name.startswith(_ONLINE_ADAPTER) for name in tensors)
        renamed = _rename_aliases(source, tensors)
        layout = _recognise_layout(source, renamed)
        return cls(source, layout, renamed, online, config or {}, preprocess)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            ValueError: the checkpoint has no tensor with that name.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.source} has no tensor {name}, which the layout {self.layout.name!r} requires")
        return tuple(self.tensors[name].shape)

    def count_blocks(self, prefix: str, suffix: str = ".") -> int:
        """Return how many different block numbers N occur in tensor names that start with `prefix` + N + `suffix`."""
        pattern = re.compile(rf"{re.escape(prefix)}(\d+){re.escape(suffix)}")
        matches = [pattern.match(name) for name in self.tensors]
        return len({match[1] for match in matches if match})


def official_name(name: str, layout: Layout, adapter_depth: int) -> str:
    """Return the official name of a tensor of `LLM2CLIP`. `adapter_depth` is the number of residual blocks."""
    part, _, rest = name.partition(".")
    if part == "tower":
        return layout.tower + _official_tower_name(rest.removeprefix("backbone."), layout)
    if part == "projection":
        return layout.projection + rest
    if part == "adapter":
        return layout.adapter + _official_adapter_name(rest, adapter_depth)
    return name  # logit_scale


def computed_buffers(model: LLM2CLIP, layout: Layout) -> dict[str, Tensor]:
    """Return the optional buffers of official checkpoints, with values derived from the architecture.

    In "hf" checkpoints, the buffers contain the position ids. In "eva" checkpoints, the buffers contain the rotary
    embedding's cosines and sines. There is one pair of these buffers for the tower and one for each block.
    """
    backbone: Any = model.tower.backbone
    if layout is HF:
        positions = backbone.embeddings.position_embedding.num_embeddings
        return {"vision_model.embeddings.position_ids": torch.arange(positions)[None]}
    sin, cos = backbone.rope.get_embed().chunk(2, dim=-1)
    buffers = {}
    for owner in ("", *(f"blocks.{i}.attn." for i in range(len(backbone.blocks)))):
        buffers[f"visual.{owner}rope.freqs_cos"] = cos
        buffers[f"visual.{owner}rope.freqs_sin"] = sin
    return buffers


def describe_tensors(tensors: Mapping[str, Any], limit: int = 8) -> str:
    """Return a string with the names and shapes of at most `limit` tensors, for error messages."""
    described = []
    for name, value in sorted(tensors.items())[:limit]:
        described.append(f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name)
    more = f" and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return ", ".join(described) + more


def _rename_aliases(source: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} is not a state dict: {name} has type {type(value).__name__}, not Tensor")
        canonical = name
        for alias, replacement in _ALIASES.items():
            canonical = canonical.replace(alias, replacement)
        if canonical in renamed:
            raise ValueError(f"{source} contains the tensor {canonical} twice, the second time under the name {name}")
        renamed[canonical] = value
    return renamed


def _recognise_layout(source: str, tensors: Mapping[str, Tensor]) -> Layout:
    for layout in LAYOUTS.values():
        prefixes = (layout.tower, layout.projection, layout.adapter)
        if all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes):
            return layout
    expected = " or ".join(f"{layout.tower}, {layout.projection} and {layout.adapter}" for layout in LAYOUTS.values())
    raise ValueError(
        f"{source} is not an LLM2CLIP checkpoint: the tensor names must start with {expected}. Tensors in this "
        f"checkpoint: {describe_tensors(tensors)}. Supported checkpoints have a transformers CLIP tower or an "
        "EVA-02 tower"
    )


def _official_tower_name(name: str, layout: Layout) -> str:
    if layout is EVA:
        for timm_name, eva_name in _TIMM_TO_EVA.items():
            name = name.replace(timm_name, eva_name)
    return name


def _official_adapter_name(name: str, depth: int) -> str:
    """Return the official name of an adapter tensor, such as blocks.N.LAYER.weight, norm.weight or out.weight.

    The LLM2CLIP authors' code stores all layers of the adapter in one nn.Sequential, so official names start with an
    index.
    """
    *block, layer, kind = name.split(".")
    if block:
        return f"{block[1]}.{_ADAPTER_LAYERS[layer]}.{kind}"
    return f"{depth + ('norm', 'out').index(layer)}.{kind}"
