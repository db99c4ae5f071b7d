"""Logit scale and bias of the pretrained CLIP model from which a vision tower was taken.

The LLM2CLIP authors' code starts from the logit scale of the pretrained CLIP model, which is close to the maximum of
100. A new CLIP model starts at 1 / 0.07 instead.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from llm2clip.models.convert.checkpoint_io import read_weight_map
from llm2clip.models.hub.pretrained import resolve_pretrained

# Weight files that may contain the logit scale. In timm's repositories, only the open_clip file contains it.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)


def read_pretrained_logits(tower: str) -> tuple[float, float | None]:
    """Return the factor that multiplies the cosine similarities in a pretrained CLIP model, and its logit bias.

    Args:
        tower: vision tower, as in `VisionTower.from_pretrained`.

    Returns:
        The logit scale (not its logarithm) and the logit bias, which is None for models without a bias.

    Raises:
        ValueError: the tower's checkpoint has no logit scale, because it contains only a vision tower.
    """
    source = hub_id_or_folder(resolve_pretrained(tower))
    for name in _WEIGHT_FILES:
        file = find_file(source, name)
        tensors = _read_tensors(file, ("logit_scale", "logit_bias")) if file is not None else {}
        if "logit_scale" in tensors:
            bias = tensors.get("logit_bias")
            return tensors["logit_scale"].double().exp().item(), None if bias is None else bias.item()
    raise ValueError(
        f"--align.logit_scale inherit: the checkpoint of {tower} contains no logit scale. Set --align.logit_scale to a "
        "number. Most CLIP models end their training with a logit scale of 100"
    )


def hub_id_or_folder(tower: str) -> str:
    """Return the folder or hub id of a tower's weights. The hub id of a timm model comes from timm's pretrained config.

    If it is a timm model without weights on the hub, the name is returned unchanged.
    """
    prefix, colon, rest = tower.partition(":")
    name = rest if colon and prefix in ("timm", "hf") else tower
    if "/" in name or Path(name).is_dir():
        return name
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:
        return name
    return config.hf_hub_id if config is not None and config.hf_hub_id else name


def find_file(source: str, name: str) -> Path | None:
    """Return the path of a file in a folder or hub repository. The file is downloaded if necessary."""
    from transformers.utils import cached_file

    if not Path(source).is_dir() and source.count("/") != 1:
        return None
    file = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if file is None else Path(file)


def _read_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the named tensors from a weight file, or from the shards listed in an index. Omit missing tensors."""
    if file.name.endswith(".index.json"):
        shard_of = read_weight_map(file)
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in shard_of:
                shard = find_file(str(file.parent), Path(shard_of[name]).name)
                if shard is not None:
                    tensors |= _read_tensors(shard, (name,))
        return tensors
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as weights:
            return {name: weights.get_tensor(name) for name in names if name in weights.keys()}  # noqa: SIM118
    state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: state_dict[name] for name in names if name in state_dict}
