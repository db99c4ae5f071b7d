"""Export of the image encoder to open_clip, for models with a timm vision tower."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from llm2clip.io_utils import install_command
from llm2clip.models.llm2clip import LLM2CLIP

# Config of the placeholder text tower, which is the smallest text tower that open_clip can build.
PLACEHOLDER_TEXT = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}

ADVICE = "Use a format that supports all towers: --to transformers, --to onnx, or --to vision (images only)"


def export_open_clip(model: LLM2CLIP, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` can load.

    In open_clip, `encode_image` returns the model's image embeddings. open_clip does not support bidirectional LLMs
    with an adapter, so the text tower is a placeholder. Its weights are NaN, so `encode_text` returns NaN rather than
    meaningless values. To encode texts, use llm2clip or another export format.

    Raises:
        ValueError: open_clip cannot represent the vision tower or its preprocessing.
        ImportError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"exporting to open_clip requires `{install_command('open-clip')}` ({error})") from error
    _check_tower(model)
    (folder / "open_clip_config.json").write_text(json.dumps(_build_open_clip_config(model), indent=1))
    target = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    tensors = _build_open_clip_tensors(model, target.state_dict())
    save_file(tensors, folder / "open_clip_model.safetensors", {"format": "pt"})


def _check_tower(model: LLM2CLIP) -> None:
    tower, preprocess = model.tower.config, model.tower.preprocess
    if tower["library"] != "timm":
        raise ValueError(
            f"the open_clip format requires a timm vision tower, but this tower is from {tower['library']}. {ADVICE}"
        )
    changed = {key: value for key, value in tower["args"].items() if key not in ("num_classes", "img_size")}
    if changed:
        raise ValueError(
            f"open_clip builds timm towers with default arguments, but this tower uses {changed}. {ADVICE}"
        )
    if preprocess.crop_pct != 1:
        raise ValueError(
            f"open_clip does not crop images, but this model's preprocessing crops off {1 - preprocess.crop_pct:.0%} "
            f"of the height and width. {ADVICE}"
        )


def _build_open_clip_config(model: LLM2CLIP) -> dict[str, Any]:
    preprocess = model.tower.preprocess
    vision = {
        "image_size": preprocess.size,
        "timm_model_name": model.tower.config["architecture"],
        "timm_model_pretrained": False,
        "timm_pool": "" if model.config.projection else _get_pooling_name(model.tower.backbone),
        "timm_proj": "linear" if model.config.projection else "none",
        "timm_proj_bias": model.config.projection_bias,
    }
    return {
        "model_cfg": {"embed_dim": model.config.embed_dim, "vision_cfg": vision, "text_cfg": PLACEHOLDER_TEXT},
        "preprocess_cfg": {
            "mean": list(preprocess.mean),
            "std": list(preprocess.std),
            "interpolation": preprocess.interpolation,
            "resize_mode": preprocess.resize,
        },
    }


def _get_pooling_name(backbone: Any) -> str:
    """Return timm's name for a backbone's pooling. open_clip ignores timm's default if there is no projection."""
    pooling = backbone.global_pool
    return str(getattr(pooling, "pool_type", pooling))


def _build_open_clip_tensors(model: LLM2CLIP, target: dict[str, Tensor]) -> dict[str, Tensor]:
    backbone, projection = model.tower.backbone.state_dict(), model.projection.state_dict()
    tensors = {}
    for name, expected in target.items():
        if name.startswith("visual.trunk."):
            tensor = backbone[name.removeprefix("visual.trunk.")]
        elif name.startswith("visual.head.proj."):
            tensor = projection[name.removeprefix("visual.head.proj.")]
        elif name == "logit_scale":
            tensor = model.logit_scale[0]
        elif expected.is_floating_point():  # a weight of the placeholder text tower
            tensor = torch.full_like(expected, torch.nan)
        else:
            tensor = expected
        if tensor.shape != expected.shape:
            raise ValueError(
                f"in open_clip's {model.tower.config['architecture']}, {name} has shape {tuple(expected.shape)}, but "
                f"{tuple(tensor.shape)} in this model. Only models with the default image size can be exported"
            )
        tensors[name] = tensor.detach().cpu().clone().contiguous()
    return tensors
