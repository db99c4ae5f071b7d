"""Tensor names of the official LLM2CLIP checkpoints, and their mapping to ours.

Official checkpoints come in two layouts:

- "hf", a transformers checkpoint: OpenAI's CLIP vision tower under transformers' names, a projection without bias, and
  an adapter.
- "eva", a state dict of the EVA-CLIP code: an EVA-02 tower (which timm has under other names), a projection with bias,
  and the same adapter.

The layout is recognised by tensor names alone.
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
    """Tensor names of one kind of official checkpoint.

    Attributes:
        name: "hf" or "eva".
        tower: prefix of the vision tower's tensors.
        projection: prefix of the image projection.
        adapter: prefix of the text adapter.
        ignored: names of parts that are not needed for image and text embeddings: the text half of the CLIP model that
            the tower comes from, and the LLM.
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

# Our names of the layers in an adapter block, and the official ones.
_ADAPTER_LAYERS = {"norm": "ln", "up": "fn.0", "down": "fn.3"}
# timm's names in an EVA-02 block, and those of the EVA-CLIP code where they differ.
_TIMM_TO_EVA = {
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.fc2.": "mlp.w3.",
}
# An adapter that was trained with the LLM in the training loop is stored under another prefix.
_ONLINE_ADAPTER = "text.text_proj.text_adaptor."
# Names in other versions of the official code. The original EVA-CLIP stores the biases of queries and values
# next to the weights.
_ALIASES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    _ONLINE_ADAPTER: EVA.adapter,
}


@dataclass
class Checkpoint:
    """An official checkpoint: its tensors under canonical names, and its configuration.

    Attributes:
        source: file, folder or hub id, for messages.
        layout: which names the tensors have.
        tensors: by name.
        online: the adapter was trained with the LLM in the training loop, not on cached embeddings.
        config: content of config.json, {} if there is none.
        preprocess: content of preprocessor_config.json, None if there is none.
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
        """Recognise the layout and rename aliases.

        Raises:
            ValueError: the tensors match neither layout.
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
            ValueError: there is no tensor of that name.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.source} lacks {name}, which every checkpoint of layout {self.layout.name!r} has")
        return tuple(self.tensors[name].shape)

    def count_blocks(self, prefix: str, suffix: str = ".") -> int:
        """Count the different numbers N in tensor names that start with prefix + N + suffix."""
        pattern = re.compile(rf"{re.escape(prefix)}(\d+){re.escape(suffix)}")
        matches = [pattern.match(name) for name in self.tensors]
        return len({match[1] for match in matches if match})


def official_name(name: str, layout: Layout, adapter_depth: int) -> str:
    """Return the official name of one of our model's tensors; `adapter_depth` is the number of adapter blocks."""
    part, _, rest = name.partition(".")
    if part == "tower":
        return layout.tower + _official_tower_name(rest.removeprefix("backbone."), layout)
    if part == "projection":
        return layout.projection + rest
    if part == "adapter":
        return layout.adapter + _official_adapter_name(rest, adapter_depth)
    return name  # logit_scale


def computed_buffers(model: LLM2CLIP, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors that official checkpoints may contain although the architecture determines them.

    For "hf" these are the position ids; for "eva" the cosines and sines of the rotary embedding, once for the tower and
    once for each block.
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
    """List names and shapes, at most `limit`."""
    described = []
    for name, value in sorted(tensors.items())[:limit]:
        described.append(f"{name} {tuple(value.shape)}" if isinstance(value, Tensor) else name)
    more = f" and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return ", ".join(described) + more


def _rename_aliases(source: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} is not a state dict: {name} is a {type(value).__name__}, not a tensor")
        canonical = name
        for alias, replacement in _ALIASES.items():
            canonical = canonical.replace(alias, replacement)
        if canonical in renamed:
            raise ValueError(f"{source} contains {canonical} twice, the second time as {name}")
        renamed[canonical] = value
    return renamed


def _recognise_layout(source: str, tensors: Mapping[str, Tensor]) -> Layout:
    for layout in LAYOUTS.values():
        prefixes = (layout.tower, layout.projection, layout.adapter)
        if all(any(name.startswith(prefix) for name in tensors) for prefix in prefixes):
            return layout
    expected = " or ".join(f"{layout.tower}, {layout.projection} and {layout.adapter}" for layout in LAYOUTS.values())
    raise ValueError(
        f"{source} is not an LLM2CLIP checkpoint: tensor names must start with {expected}, but it has "
        f"{describe_tensors(tensors)}. Supported are checkpoints with a CLIP tower of transformers or an EVA-02 tower"
    )


def _official_tower_name(name: str, layout: Layout) -> str:
    if layout is EVA:
        for timm_name, eva_name in _TIMM_TO_EVA.items():
            name = name.replace(timm_name, eva_name)
    return name


def _official_adapter_name(name: str, depth: int) -> str:
    """Map blocks.N.LAYER.weight, norm.weight and out.weight; officially all are entries of one nn.Sequential."""
    *block, layer, kind = name.split(".")
    if block:
        return f"{block[1]}.{_ADAPTER_LAYERS[layer]}.{kind}"
    return f"{depth + ('norm', 'out').index(layer)}.{kind}"
