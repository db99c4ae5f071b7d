"""A model's vision side for open_clip, where its towers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llm2clip.models.llm2clip import LLM2CLIP


def export_open_clip(model: LLM2CLIP, folder: Path) -> None:
    """Write a folder that `open_clip.create_model_and_transforms("local-dir:FOLDER")` opens, whose `encode_image`
    gives the model's vectors.

    open_clip has no text tower that reads a language model in both directions with an adapter behind it. The folder's
    text tower is a place-holder whose weights are not numbers, so that whoever calls `encode_text` gets NaN and not
    vectors of nothing: encode texts by this package, by the `sentence-transformers` form or by text.onnx.

    Args:
        model: with a tower of timm and a linear projection.
        folder: there already, and empty.

    Raises:
        ValueError: open_clip has no place for the model's vision side.
        ImportError: open_clip is not installed.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"the open_clip form needs `pip install open-clip-torch` ({error})") from error
    tower: dict[str, Any] = model.tower.config
    if tower["library"] != "timm":
        raise ValueError(
            f"open_clip's form is for towers of timm; this is one of {tower['library']}. "
            "A CLIP tower of transformers goes to `--to transformers` or `--to vision`"
        )
    prepared = model.tower.preprocess
    others = {k: v for k, v in tower["args"].items() if k not in ("num_classes", "img_size")}
    if others:
        raise ValueError(f"open_clip builds towers of timm as they are; this one has {others}")
    vision = {
        "image_size": prepared.size,
        "timm_model_name": tower["architecture"],
        "timm_model_pretrained": False,
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_proj_bias": model.config.projection_bias,
    }
    text = {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    config = {
        "model_cfg": {"embed_dim": model.config.embed_dim, "vision_cfg": vision, "text_cfg": text},
        "preprocess_cfg": {
            "mean": list(prepared.mean),
            "std": list(prepared.std),
            "interpolation": prepared.interpolation,
            "resize_mode": "squash" if prepared.resize == "squash" else "shortest",
        },
    }
    if prepared.crop_pct != 1:
        raise ValueError(f"open_clip crops nothing off; this model's pictures lose {1 - prepared.crop_pct:.0%}")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1))
    built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    trunk, head, state = model.tower.backbone.state_dict(), model.projection.state_dict(), {}
    for name, theirs in built.state_dict().items():
        tensor = theirs
        if name.startswith("visual.trunk."):
            tensor = trunk[name.removeprefix("visual.trunk.")]
        elif name.startswith("visual.head.proj."):
            tensor = head[name.removeprefix("visual.head.proj.")]
        elif name == "logit_scale":
            tensor = model.logit_scale[0]
        elif tensor.is_floating_point():
            tensor = torch.full_like(tensor, torch.nan)
        if tensor.shape != theirs.shape:
            raise ValueError(
                f"open_clip would build the tower {tower['architecture']} with {name} "
                f"{tuple(theirs.shape)}, here it is {tuple(tensor.shape)}: it runs at another size"
            )
        state[name] = tensor.detach().cpu().clone().contiguous()
    save_file(state, folder / "open_clip_model.safetensors", {"format": "pt"})
