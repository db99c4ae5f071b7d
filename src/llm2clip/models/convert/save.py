"""Export of `LLM2CLIP` models in the format of official LLM2CLIP checkpoints."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm2clip.io_utils import atomic_dir, atomic_path
from llm2clip.models.convert.checkpoint_layout import EVA, HF, Layout, compute_buffers, get_official_name
from llm2clip.models.convert.load import CLIP_FIELDS, EVA_ARGS
from llm2clip.models.llm2clip import LLM2CLIP

SAVED_LAYOUTS = {"hf": HF, "eva": EVA}


def save_official_checkpoint(model: LLM2CLIP, out: str | Path, layout_name: str) -> Path:
    """Save a model atomically as a checkpoint with the tensor names from the LLM2CLIP authors' code.

    An "hf" checkpoint is a folder with model.safetensors, config.json and preprocessor_config.json. An "eva" checkpoint
    is a .pt file with a state dict, including the rotary embeddings that the authors' code expects. It contains no
    preprocessing config, because the authors' code always resizes the shortest side to the tower's image size.

    Args:
        model: model with a transformers CLIP tower (for "hf") or a timm EVA-02 CLIP tower (for "eva").
        out: folder (for "hf") or .pt file (for "eva") to create.

    Returns:
        Path of the checkpoint (`out`).

    Raises:
        ValueError: the layout cannot represent the model.
        FileExistsError: `out` exists.
    """
    out = Path(out)
    layout = SAVED_LAYOUTS.get(layout_name)
    if layout is None:
        raise ValueError(f"layout must be one of {', '.join(SAVED_LAYOUTS)} (got {layout_name!r})")
    _check_representable(model, layout)
    if layout is EVA and out.suffix != ".pt":
        raise ValueError(
            f"with the 'eva' layout, the checkpoint is a single file whose name must end in .pt (got {out})"
        )
    if out.exists():
        raise FileExistsError(f"{out} already exists: choose another path")

    tensors = _build_official_tensors(model, layout)
    if layout is EVA:
        with atomic_path(out) as file:
            torch.save(tensors, file)
        return out
    with atomic_dir(out) as folder:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(_build_clip_config(model), indent=1))
        (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))
    return out


def _check_representable(model: LLM2CLIP, layout: Layout) -> None:
    """Raise ValueError if the layout cannot represent the model. The message lists all reasons."""
    config, tower = model.config, model.tower.config
    problems = []
    if layout is HF:
        problems += _find_clip_tower_problems(model)
        if config.projection_bias:
            problems.append("the projection has a bias")
    else:
        is_eva_clip = re.match("timm:eva02_(base|large)_.*_clip_", _get_tower_name(model)) is not None
        if not is_eva_clip or tower["args"].keys() - set(EVA_ARGS):
            problems.append(
                f"the vision tower is {_get_tower_name(model)}, but must be a timm EVA-02 CLIP tower with no custom "
                "arguments other than sizes"
            )
    if not config.projection:
        problems.append("there is no image projection")
    if config.logit_bias:
        problems.append("the logits have a bias")
    if config.adapter.depth == 0:
        problems.append("there is no adapter")
    elif not config.adapter.normalize_input:
        problems.append("the adapter does not normalise its input, but the official adapter does")
    if problems:
        raise ValueError(f"the model cannot be saved in the {layout.name!r} layout: {'; '.join(problems)}")


def _find_clip_tower_problems(model: LLM2CLIP) -> list[str]:
    if _get_tower_name(model) != "clip_vision_model":
        return [f"the vision tower is {_get_tower_name(model)}, but must be a transformers CLIP tower"]
    if model.tower.config["architecture"]["image_size"] != model.tower.preprocess.size:
        return ["the preprocessed images do not have the image size of the vision tower's position embeddings"]
    return []


def _get_tower_name(model: LLM2CLIP) -> str:
    config: dict[str, Any] = model.tower.config
    if config["library"] == "transformers":
        return str(config["architecture"]["model_type"])
    return f"timm:{config['architecture']}"


def _build_official_tensors(model: LLM2CLIP, layout: Layout) -> dict[str, Tensor]:
    tensors = {
        get_official_name(name, layout, model.config.adapter.depth): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    tensors["logit_scale"] = tensors["logit_scale"].reshape(())
    if layout is EVA:
        if not model.config.projection_bias:  # in the "eva" layout, the projection always has a bias
            tensors["visual.head.bias"] = torch.zeros(model.config.embed_dim)
        tensors |= {name: tensor.cpu().clone() for name, tensor in compute_buffers(model, layout).items()}
    return tensors


def _build_clip_config(model: LLM2CLIP) -> dict[str, Any]:
    architecture = model.tower.config["architecture"]
    vision_config = {"model_type": "clip_vision_model"} | {key: architecture[key] for key in CLIP_FIELDS}
    return {"model_type": "clip", "projection_dim": model.config.embed_dim, "vision_config": vision_config}
