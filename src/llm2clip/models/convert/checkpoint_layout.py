"""What the published LLM2CLIP checkpoints call their tensors, and which architecture their shapes are of.

They come in two forms. "hf" is a transformers checkpoint: OpenAI's vision tower under the names of transformers, a
projection without a bias, an adapter. "eva" is a state dict of the EVA-CLIP code: an EVA-02 tower, which timm has under
its own names, a projection with a bias, the same adapter. Everything here works on names and shapes alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from llm2clip.data.images import Preprocess
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig

FORMS = ("hf", "eva")
HEAD_WIDTH = 64  # of all published towers: 12 heads at 768, 16 at 1024

_ADAPTER = {"hf": "text_adapter.adaptor.", "eva": "text.text_adaptor."}
_TOWER = {"hf": "vision_model.", "eva": "visual."}
_PROJECTION = {"hf": "visual_projection.", "eva": "visual.head."}
_LAYER = {"norm": "ln", "up": "fn.0", "down": "fn.3"}  # of a block of the adapter
# timm's names and the EVA code's, where they differ.
_EVA = {
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.fc2.": "mlp.w3.",
}
# The same tensors under the names of other versions of the official code. The original EVA-CLIP keeps the biases of
# queries and values beside their weights; an adapter that was trained with the LLM running has it beside it.
_ONLINE = "text.text_proj.text_adaptor."
_VARIANTS = {"attn.q_bias": "attn.q_proj.bias", "attn.v_bias": "attn.v_proj.bias", _ONLINE: _ADAPTER["eva"]}
# What a checkpoint may hold besides, none of which has a part in image and text vectors: the text half of the CLIP
# that the tower is from, and the language model.
_OTHERS = {"hf": re.compile(r"text_model\.|text_projection\.weight$"), "eva": re.compile(r"text\.text\.")}
# timm's towers by patch, width, depth and hidden width, at their own image size.
_EVA_TOWERS = {
    (16, 768, 12, 2048): {224: "eva02_base_patch16_clip_224"},
    (14, 1024, 24, 2730): {224: "eva02_large_patch14_clip_224", 336: "eva02_large_patch14_clip_336"},
}


# What makes a tower of transformers or timm, in their words.
CLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)
EVA_ARGS = ("num_classes", "img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


@dataclass
class Checkpoint:
    """The tensors of an official checkpoint under one set of names, and what stood beside them.

    Attributes:
        where: the file or folder, for messages.
        tensors: by name.
        config: of its config.json, where there is one.
        preprocess: of its preprocessor_config.json, where there is one.
        form: "hf" or "eva".
        online: the language model ran while the adapter was trained.
    """

    where: str
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    preprocess: Preprocess | None
    form: str
    online: bool

    @classmethod
    def of(
        cls, where: str, tensors: Mapping[str, Any], config: dict[str, Any], preprocess: Preprocess | None
    ) -> Checkpoint:
        """Recognise the form and settle on its names.

        Raises:
            ValueError: the tensors are of neither form.
        """
        if tensors and all(name.startswith("module.") for name in tensors):
            tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        online = any(name.startswith(_ONLINE) for name in tensors)
        settled: dict[str, Tensor] = {}
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise ValueError(f"{where}: {name} is a {type(value).__name__}, not a tensor: this is no state dict")
            renamed = name
            for variant, usual in _VARIANTS.items():
                renamed = renamed.replace(variant, usual)
            if renamed in settled:
                raise ValueError(f"{where} holds {renamed} twice, once as {name}: it is unclear which is meant")
            settled[renamed] = value
        for form in FORMS:
            if all(any(n.startswith(p[form]) for n in settled) for p in (_ADAPTER, _TOWER, _PROJECTION)):
                return cls(where, settled, config, preprocess, form, online)
        prefixes = " or ".join(" + ".join(p[f] for p in (_TOWER, _PROJECTION, _ADAPTER)) for f in FORMS)
        raise ValueError(
            f"{where} is no LLM2CLIP checkpoint: its tensors would begin with {prefixes}; here they are "
            f"{format_shapes(settled)}. Supported are those with a CLIP tower of transformers and those with an EVA-02 tower"
        )

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor.

        Raises:
            ValueError: there is none of that name.
        """
        if name not in self.tensors:
            raise ValueError(
                f"{self.where} lacks the tensor {name}, which every checkpoint of the form {self.form} has"
            )
        return tuple(self.tensors[name].shape)

    def count(self, pattern: str) -> int:
        """How many numbers stand in the place of {} in names that begin so."""
        begin, end = (re.escape(part) for part in pattern.split("{}"))
        return len({m[1] for name in self.tensors if (m := re.match(rf"{begin}(\d+){end}", name))})


# ---- names ----------------------------------------------------------------------------------------------------------


def to_official_name(name: str, form: str, depth: int) -> str:
    """What the official code calls a tensor of our model; `depth` is that of the adapter."""
    part, _, rest = name.partition(".")
    if part == "projection":
        return _PROJECTION[form] + rest
    if part == "adapter":
        *block, layer, kind = rest.split(".")
        if block:
            return f"{_ADAPTER[form]}{block[1]}.{_LAYER[layer]}.{kind}"
        return f"{_ADAPTER[form]}{depth + ('norm', 'out').index(layer)}.{kind}"
    if part == "tower":
        rest = rest.removeprefix("backbone.")
        for ours, theirs in _EVA.items() if form == "eva" else ():
            rest = rest.replace(ours, theirs)
        return _TOWER[form] + rest
    return name  # logit_scale


def computed_buffers(model: LLM2CLIP, form: str) -> dict[str, Tensor]:
    """Tensors that official checkpoints may hold and that follow from the architecture: position numbers, or the
    cosines and sines of EVA's rotary embedding, once for the tower and once for every block."""
    backbone: Any = model.tower.backbone
    if form == "hf":
        count = backbone.embeddings.position_embedding.num_embeddings
        return {"vision_model.embeddings.position_ids": torch.arange(count)[None]}
    sin, cos = backbone.rope.get_embed().chunk(2, dim=-1)
    places = ["", *(f"blocks.{i}.attn." for i in range(len(backbone.blocks)))]
    return {f"visual.{p}rope.freqs_{k}": t for p in places for k, t in (("cos", cos), ("sin", sin))}


def is_ignored_key(name: str, form: str) -> bool:
    """Whether a tensor of a checkpoint belongs to a part that image and text vectors do not need."""
    return _OTHERS[form].match(name) is not None


# ---- architecture ---------------------------------------------------------------------------------------------------


def infer_config(checkpoint: Checkpoint, normalize_input: bool | None = None) -> LLM2CLIPConfig:
    """The architecture of a checkpoint, from its config.json and the shapes of its tensors.

    The official adapter L2-normalises the embeddings it is given. The published checkpoints were trained so, on cached
    embeddings. Where the language model runs in the training loop, the official code switches that off; such
    checkpoints are known by their names. No file says it, so `normalize_input` may overrule.

    Raises:
        ValueError: a tensor that tells is missing, or the tower is of a kind that is not supported.
    """
    form, prefix = checkpoint.form, _ADAPTER[checkpoint.form]
    depth = checkpoint.count(prefix + "{}.ln.")
    text_width = checkpoint.shape(f"{prefix}{depth}.weight")[0]
    hidden = checkpoint.shape(f"{prefix}0.fn.0.weight")[0] if depth else 2 * text_width
    return LLM2CLIPConfig(
        tower=_clip_tower(checkpoint) if form == "hf" else _eva_tower(checkpoint),
        text_dim=text_width,
        embed_dim=checkpoint.shape(f"{prefix}{depth + 1}.weight")[0],
        adapter_depth=depth,
        adapter_expansion=hidden // text_width,
        normalize_input=not checkpoint.online if normalize_input is None else normalize_input,
        projection_bias=form == "eva",
    )


def _clip_tower(checkpoint: Checkpoint) -> dict[str, Any]:
    """A VisionTower's config: what config.json says about the tower, else what the shapes do; then it is OpenAI's."""
    from transformers import CLIPVisionConfig

    said = checkpoint.config.get("vision_config")
    if said:
        if (kind := said.get("model_type", "clip_vision_model")) != "clip_vision_model":
            raise ValueError(f"{checkpoint.where}: the tower is a {kind!r}; only CLIP's can be read")
        fields = {key: value for key, value in said.items() if key in CLIP_FIELDS}
    else:
        width, _, patch, _ = checkpoint.shape("vision_model.embeddings.patch_embedding.weight")
        positions = checkpoint.shape("vision_model.embeddings.position_embedding.weight")[0]
        fields = {
            "hidden_size": width,
            "intermediate_size": checkpoint.shape("vision_model.encoder.layers.0.mlp.fc1.weight")[0],
            "num_hidden_layers": checkpoint.count("vision_model.encoder.layers.{}."),
            "num_attention_heads": _heads(checkpoint, width, HEAD_WIDTH),
            "image_size": _side(checkpoint, positions) * patch,
            "patch_size": patch,
        }
    config = CLIPVisionConfig(**fields)
    architecture: dict[str, Any] = {key: getattr(config, key) for key in CLIP_FIELDS}
    architecture["model_type"] = "clip_vision_model"
    preprocess = checkpoint.preprocess or _preprocess(architecture["image_size"])
    return {"library": "transformers", "architecture": architecture, "preprocess": preprocess.to_dict()}


def _eva_tower(checkpoint: Checkpoint) -> dict[str, Any]:
    """A VisionTower's config: one of timm's EVA-02 towers for CLIP, or one of that kind with other sizes."""
    width, _, patch, _ = checkpoint.shape("visual.patch_embed.proj.weight")
    size = _side(checkpoint, checkpoint.shape("visual.pos_embed")[1]) * patch
    depth = checkpoint.count("visual.blocks.{}.")
    hidden = checkpoint.shape("visual.blocks.0.mlp.w1.weight")[0]
    rotary = checkpoint.tensors.get("visual.rope.freqs_cos")
    heads = _heads(checkpoint, width, HEAD_WIDTH if rotary is None else rotary.shape[-1])
    args: dict[str, Any] = {"num_classes": 0, "img_size": size}
    usual = _EVA_TOWERS.get((patch, width, depth, hidden), {}) if heads == width // HEAD_WIDTH else {}
    architecture = usual.get(size)
    if architecture is None:
        architecture = "eva02_large_patch14_clip_336"
        args |= {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
        args["mlp_ratio"] = (hidden + 0.5) / width  # timm rounds down
    preprocess = checkpoint.preprocess or _preprocess(size)
    return {"library": "timm", "architecture": architecture, "args": args, "preprocess": preprocess.to_dict()}


def _preprocess(size: int) -> Preprocess:
    """As OpenAI's towers and EVA's were trained and are evaluated by the official code: shortest side, no margin.

    timm's own settings of the EVA towers at 224 leave a margin of a tenth.
    """
    return Preprocess(size, "shortest", 1.0, "bicubic", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def _side(checkpoint: Checkpoint, positions: int) -> int:
    """Patches along a side, of the number of positions, one of which is the class token's."""
    side = math.isqrt(positions - 1)
    if side * side != positions - 1:
        raise ValueError(f"{checkpoint.where} has {positions} positions, which is not a square and one")
    return side


def _heads(checkpoint: Checkpoint, width: int, head: int) -> int:
    if width % head:
        raise ValueError(f"{checkpoint.where}: the tower's width {width} does not divide into heads of {head}")
    return width // head


def format_shapes(names: Mapping[str, Any], most: int = 8) -> str:
    """Names with their shapes, the first few."""
    shown = [f"{n} {tuple(t.shape)}" if isinstance(t, Tensor) else n for n, t in sorted(names.items())[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")
