"""Tensor names of the original OpenAI CLIP code, and their mapping to transformers' CLIP.

LLM2CLIP's `.pt` files with OpenAI towers use these names. Tensors are renamed when the file is read, so that the rest
of the conversion has to support only one set of names. The shapes of some tensors also change:

- `attn.in_proj_weight` of shape (3 * width, width) and `attn.in_proj_bias` contain the query, key and value
  projections. Each is split into three tensors.
- `visual.proj` of shape (width, embed_dim) is used as `x @ proj`, so it is transposed for a linear layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

# Tensors of the tower: OpenAI's name -> transformers' name.
_TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
# Layers of a block: OpenAI's name -> transformers' name.
_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK_NAME = re.compile(r"visual\.transformer\.resblocks\.(\d+)\.(.+)")


def rename_openai_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to the "hf" layout. Tensors with unknown names keep their names."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK_NAME.fullmatch(name)
        if block:
            renamed |= _rename_block_tensor(name, f"vision_model.encoder.layers.{block[1]}.", block[2], tensor)
        elif name == "visual.proj":
            renamed["visual_projection.weight"] = tensor.T.contiguous()
        elif name.removeprefix("visual.") in _TOWER:
            renamed["vision_model." + _TOWER[name.removeprefix("visual.")]] = tensor
        elif name.startswith("text.text_adaptor."):
            renamed[name.replace("text.text_adaptor.", "text_adapter.adaptor.")] = tensor
        else:
            renamed[name] = tensor
    return renamed


def _rename_block_tensor(name: str, prefix: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    """Rename a tensor of a block. Split it into three tensors if it contains the query, key and value projections."""
    if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = rest.removeprefix("attn.in_proj_")
        parts = tensor.chunk(3)
        return {f"{prefix}self_attn.{q}_proj.{kind}": part for q, part in zip("qkv", parts, strict=True)}
    layer, _, kind = rest.rpartition(".")
    return {f"{prefix}{_BLOCK[layer]}.{kind}" if layer in _BLOCK else name: tensor}
