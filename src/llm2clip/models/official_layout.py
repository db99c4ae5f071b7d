"""Weight files and tensor names of the LLM2CLIP authors' official checkpoints.

Code in a checkpoint is never run. Weights are read from safetensors files, or from pickle files with
`weights_only=True`. The official checkpoints have four naming schemes for tensors, called layouts:

- "hf": a CLIP vision tower with transformers' tensor names, a projection without bias, and an adapter.
- "openai": the same tensors as in "hf", with the names of OpenAI's CLIP code.
- "eva": an EVA-02 vision tower with the names of the EVA-CLIP code, a projection with bias, and an adapter.
- "siglip2": a timm SigLIP 2 vision tower and an adapter, without a projection.
"""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.data.transforms import PreprocessConfig
from llm2clip.io_utils import DataFormatError, describe_error, read_json_object
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import check_model_source, download_hub_snapshot, read_safetensors, split_revision
from llm2clip.models.model_folder import AdapterConfig

log = logging.getLogger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
CONFIG_FILE = "config.json"
PREPROCESSOR_FILE = "preprocessor_config.json"


def read_official_checkpoint(source: str | Path) -> tuple[dict[str, Any], dict[str, Any], PreprocessConfig | None]:
    """Read a checkpoint. Return (tensors, contents of config.json or {}, preprocessing or None).

    `source` is a folder, hub id or weight file. A folder or repository must contain model.safetensors or
    pytorch_model.bin, possibly sharded, or a single .pt file. If `source` is a weight file, no JSON files are read.
    """
    path = Path(source)
    if path.is_file():
        return _load_weights(path), {}, None
    folder = path if path.is_dir() else download_official_checkpoint(str(source))
    weights = folder / select_weights_file([file.name for file in folder.iterdir()], str(source))
    tensors = _load_weight_shards(weights) if weights.name.endswith(".index.json") else _load_weights(weights)
    preprocess = _read_optional_json(folder / PREPROCESSOR_FILE)
    return (
        tensors,
        _read_optional_json(folder / CONFIG_FILE),
        PreprocessConfig.from_dict(preprocess) if preprocess else None,
    )


def select_weights_file(names: list[str], source: str) -> str:
    """Return the name of the weight file, or of the index file if the weights are sharded.

    A .pt file with "EVA" in its name takes precedence, because the official EVA repositories also contain a weight file
    with a different text tower.
    """
    pt_files = [name for name in names if name.endswith(".pt") and "/" not in name]
    eva_files = [name for name in pt_files if "EVA" in name]
    if len(eva_files) == 1:
        return eva_files[0]
    for name in WEIGHT_FILES:
        if name in names:
            return name
    if len(pt_files) == 1:
        return pt_files[0]
    raise ValueError(
        f"{source} must contain one of {', '.join(WEIGHT_FILES)}, or a single .pt file. If the folder contains "
        "several .pt files, pass the path of the correct file"
    )


def _load_weights(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    try:
        # With mmap, unused tensors, such as those of an LLM in the checkpoint, are not read from disk.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} contains objects other than tensors, so loading the file could run code. If you trust the file, "
            f"save its state dict with safetensors.torch.save_file and load that file ({_get_first_error_line(error)})"
        ) from error
    except Exception as error:  # corrupt files can make torch raise almost any type of exception
        raise ValueError(
            f"{path} is corrupt, incomplete or a TorchScript archive. Download the file again or, for a TorchScript "
            f"archive, save its state dict with safetensors.torch.save_file ({_get_first_error_line(error)})"
        ) from error
    for key in ("state_dict", "module", "model"):  # keys under which training checkpoints store the state dict
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{path} contains a {type(content).__name__}, not a mapping from names to tensors")
    return dict(content)


def _get_first_error_line(error: Exception) -> str:
    return (str(error).splitlines() or [describe_error(error)])[0]


def _load_weight_shards(index: Path) -> dict[str, Any]:
    shard_of = read_weight_map(index)
    tensors: dict[str, Any] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard:
            raise ValueError(f"{index} lists a shard outside its folder: {shard!r}")
        tensors |= _load_weights(index.parent / shard)
    differing = sorted(tensors.keys() ^ shard_of.keys())
    if differing:
        raise ValueError(
            f"{index} does not match its shards. Tensors that are only in the index or only in a shard: {differing[:8]}"
        )
    return tensors


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the mapping from tensor names to shard file names in an index file."""
    shard_of = read_json_object(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise DataFormatError(f'{index} must have the form {{"weight_map": {{"TENSOR": "SHARD.safetensors"}}}}')
    return shard_of


def _read_optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def download_official_checkpoint(name: str) -> Path:
    """Download the weights and the config of OWNER/NAME[@REVISION]. If the download fails, use the hub's cache."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import HFValidationError, HTTPError

    hub_id, revision = split_revision(name)
    check_model_source(hub_id)
    try:
        weights = select_weights_file(list_repo_files(hub_id, revision=revision), name)
        patterns = [weights, CONFIG_FILE, PREPROCESSOR_FILE]
        if weights.endswith(".index.json"):
            patterns.append(weights.removesuffix(".index.json").replace(".", "-*."))  # model-*.safetensors
        return download_hub_snapshot(name, patterns)
    except (HFValidationError, HTTPError, OSError):
        return download_hub_snapshot(name, ["*"], local_files_only=True)


@dataclass(frozen=True)
class OfficialLayout:
    """Naming scheme of an official checkpoint: the tensor-name prefixes of its tower, projection and adapter."""

    name: str
    required: tuple[str, ...]  # prefixes that identify the layout; each prefix must match at least one tensor
    tower: str
    projection: str
    adapter: str = "text.text_adaptor."
    # Tensors to ignore: the LLM and the original CLIP model's text tower, which do not affect the embeddings.
    ignored: re.Pattern[str] = re.compile(r"text\.text\.")


HF = OfficialLayout(
    name="hf",
    required=("vision_model.", "visual_projection.", "text_adapter.adaptor."),
    tower="vision_model.",
    projection="visual_projection.",
    adapter="text_adapter.adaptor.",
    ignored=re.compile(r"text_model\.|text_projection\.weight$"),
)
OPENAI = OfficialLayout(
    name="openai",
    required=("visual.conv1.", "visual.transformer.resblocks.", "text.text_adaptor."),
    # After `_rename_openai_tensors`, the tensors have the "hf" prefixes.
    tower=HF.tower,
    projection=HF.projection,
    adapter=HF.adapter,
)
EVA = OfficialLayout(
    name="eva",
    required=("visual.blocks.", "visual.head.", "text.text_adaptor."),
    tower="visual.",
    projection="visual.head.",
)
SIGLIP2 = OfficialLayout(
    name="siglip2", required=("visual.trunk.", "text.text_adaptor."), tower="visual.trunk.", projection=""
)
LAYOUTS = (HF, OPENAI, EVA, SIGLIP2)

# Parts of tensor names in an EVA-02 block: name in timm -> name in the EVA-CLIP code.
_TIMM_TO_EVA = {
    "attn.norm.": "attn.inner_attn_ln.",
    "mlp.norm.": "mlp.ffn_ln.",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
    "mlp.fc2.": "mlp.w3.",
}
# Parts of tensor names in a CLIP vision tower: name in OpenAI's CLIP code -> name in transformers.
_OPENAI_TO_HF = {
    "text.text_adaptor.": HF.adapter,
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
# Tensor name prefix of an adapter that was trained with the LLM in the training loop.
_ONLINE_ADAPTER = "text.text_proj.text_adaptor."
# Aliases in some versions of the LLM2CLIP authors' code -> canonical parts of tensor names. The aliases of
# the query and value biases come from the original EVA-CLIP code. Some checkpoints contain the biases under both names.
_ALIASES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    _ONLINE_ADAPTER: EVA.adapter,
}
_DEFAULT_LOGIT_SCALE = 2.6592  # default `logit_scale_init_value` of transformers' CLIPConfig, ln(1 / 0.07)


@dataclass
class OfficialCheckpoint:
    """Contents of an official checkpoint, with canonical tensor names."""

    source: str
    layout: OfficialLayout
    tensors: dict[str, Tensor]
    online: bool  # True if the adapter was trained with the LLM in the training loop, not on cached embeddings
    config: dict[str, Any]  # contents of config.json
    preprocess: PreprocessConfig | None  # from preprocessor_config.json

    @classmethod
    def from_tensors(
        cls, source: str, tensors: Mapping[str, Any], config: dict[str, Any], preprocess: PreprocessConfig | None = None
    ) -> OfficialCheckpoint:
        """Create a checkpoint from a state dict. Detect the layout, and rename tensors to their canonical names."""
        if tensors and all(name.startswith("module.") for name in tensors):  # saved from DistributedDataParallel
            tensors = {name.removeprefix("module."): value for name, value in tensors.items()}
        online = any(name.startswith(_ONLINE_ADAPTER) for name in tensors)
        renamed = _rename_tensor_aliases(source, tensors)
        layout = _detect_layout(source, renamed)
        if layout is OPENAI:
            renamed = _rename_openai_tensors(renamed)
        if layout is HF and "logit_scale" not in renamed:
            renamed["logit_scale"] = _get_default_logit_scale(source, config)
        return cls(source, layout, renamed, online, config, preprocess)

    def get_shape(self, name: str) -> tuple[int, ...]:
        if name not in self.tensors:
            raise ValueError(f"{self.source} has no tensor {name}, which the {self.layout.name!r} layout requires")
        return tuple(self.tensors[name].shape)

    def count_blocks(self, prefix: str) -> int:
        """Count the distinct numbers N in tensor names of the form `prefix`N.NAME."""
        pattern = re.compile(rf"{re.escape(prefix)}(\d+)\.")
        matches = [pattern.match(name) for name in self.tensors]
        return len({match[1] for match in matches if match})


def get_official_name(name: str, layout: OfficialLayout, adapter: AdapterConfig) -> str:
    """Return the official name of an `LLM2CLIP` tensor."""
    part, _, rest = name.partition(".")
    if part == "tower":
        rest = rest.removeprefix("backbone.")
        return layout.tower + (_replace_substrings(rest, _TIMM_TO_EVA) if layout is EVA else rest)
    if part == "projection":
        return layout.projection + rest
    if part == "adapter":
        return layout.adapter + adapter.get_official_name(rest)
    return name  # logit_scale, logit_bias


def compute_checkpoint_buffers(model: LLM2CLIP, layout: OfficialLayout) -> dict[str, Tensor]:
    """Compute the position ids or rotary embeddings that official checkpoints may store as buffers."""
    if layout is SIGLIP2:
        return {}
    backbone: Any = model.tower.backbone
    if layout in (HF, OPENAI):
        positions = backbone.embeddings.position_embedding.num_embeddings
        return {"vision_model.embeddings.position_ids": torch.arange(positions)[None]}
    sin, cos = backbone.rope.get_embed().chunk(2, dim=-1)
    buffers = {}
    for prefix in ("", *(f"blocks.{i}.attn." for i in range(len(backbone.blocks)))):
        buffers[f"visual.{prefix}rope.freqs_cos"] = cos
        buffers[f"visual.{prefix}rope.freqs_sin"] = sin
    return buffers


def format_tensor_shapes(tensors: Mapping[str, Tensor]) -> str:
    described = [f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(tensors.items())]
    more = f" and {len(described) - 8} more" if len(described) > 8 else ""
    return ", ".join(described[:8]) + more


def _rename_tensor_aliases(source: str, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{source} is not a state dict: {name} has type {type(value).__name__}, not Tensor")
        canonical = _replace_substrings(name, _ALIASES)
        if canonical in renamed and not torch.equal(renamed[canonical], value):
            raise ValueError(
                f"{source} contains the same tensor as both {canonical} and {name}, with different values: remove the "
                "one that the model does not use"
            )
        renamed[canonical] = value
    return renamed


def _replace_substrings(name: str, replacements: Mapping[str, str]) -> str:
    for part, replacement in replacements.items():
        name = name.replace(part, replacement)
    return name


def _rename_openai_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the tensors of an "openai" checkpoint to the "hf" layout.

    - `attn.in_proj_weight`, of shape (3 * width, width), and `attn.in_proj_bias`, of shape (3 * width,), are split into
      the query, key and value projections.
    - `visual.proj`, of shape (width, embed_dim), is transposed to the weight of a linear layer.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new_name = _replace_substrings(name, _OPENAI_TO_HF)
        prefix, is_packed, kind = new_name.partition("in_proj_")
        if name == "visual.proj":
            renamed["visual_projection.weight"] = tensor.T.contiguous()
        elif is_packed:
            for projection, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"{prefix}{projection}_proj.{kind}"] = part
        else:
            renamed[new_name] = tensor
    return renamed


def _detect_layout(source: str, tensors: Mapping[str, Tensor]) -> OfficialLayout:
    for layout in LAYOUTS:
        if all(any(name.startswith(prefix) for name in tensors) for prefix in layout.required):
            return layout
    expected = [f"{layout.name!r}: {'*, '.join(layout.required)}*" for layout in LAYOUTS]
    raise ValueError(
        f"{source} is not an LLM2CLIP checkpoint. Each supported layout requires tensors with these names: "
        f"{'; '.join(expected)}. The adapter's tensor names may also start with {_ONLINE_ADAPTER}. "
        f"Tensors in this checkpoint: {format_tensor_shapes(tensors)}"
    )


def _get_default_logit_scale(source: str, config: Mapping[str, Any]) -> Tensor:
    value = float(config.get("logit_scale_init_value", _DEFAULT_LOGIT_SCALE))
    origin = "from config.json" if "logit_scale_init_value" in config else "transformers' default"
    message = "%s has no logit_scale; using logit_scale_init_value %s (%s). The embeddings are not affected"
    log.warning(message, source, value, origin)
    return torch.tensor(value)
