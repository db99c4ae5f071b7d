"""Backbones for vision towers: timm and transformers models, loaded by name or built from a config.

A backbone is described by a JSON-serialisable config:

library        timm or transformers
architecture   name of the architecture (timm) or the model's config as a dict (transformers)
args           arguments for `timm.create_model` (timm only)
preprocess     image preprocessing, from `Preprocess.to_dict()`
"""

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, load_model_config_from_hf, split_model_name_tag
from torch import nn

from llm2clip.data.transforms import Preprocess
from llm2clip.io_utils import read_json_object
from llm2clip.models.hub.loading import build_config, check_model_source, hide_load_report, load_config
from llm2clip.models.hub.pretrained import resolve_pretrained

log = logging.getLogger(__name__)

# Default preprocessing for each supported transformers model type, used if there is no preprocessor_config.json. The
# model's image size replaces 224. Only models whose pooled output was trained are supported.
_CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF_STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DEFAULT_PREPROCESS = {
    "clip_vision_model": Preprocess(224, "shortest", 1.0, "bicubic", *_CLIP_STATS, crop_rounding="down"),
    "siglip_vision_model": Preprocess(224, "squash", 1.0, "bicubic", *_HALF_STATS, crop_rounding="down"),
    "dinov2": Preprocess(224, "shortest", 0.875, "bicubic", *_IMAGENET_STATS, crop_rounding="down"),
    "dinov2_with_registers": Preprocess(224, "shortest", 0.875, "bicubic", *_IMAGENET_STATS, crop_rounding="down"),
    "dinov3_vit": Preprocess(224, "squash", 1.0, "bilinear", *_IMAGENET_STATS, crop_rounding="down"),
}
# Model types of dual encoders. Only their vision model is used.
_DUAL_ENCODER_TYPES = ("clip", "metaclip_2", "siglip")
# transformers config entries that do not describe the architecture.
_TRANSIENT_ENTRIES = ("transformers_version", "_name_or_path", "dtype", "architectures", "id2label", "label2id")


def load_backbone(name: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    """Load a backbone by name, and return it with its config. For the arguments, see `VisionTower.from_pretrained`."""
    library, source = _parse_name(resolve_pretrained(name))
    load = _load_timm if library == "timm" else _load_transformers
    return load(source, image_size, pretrained)


def build_backbone(config: dict[str, Any]) -> nn.Module:
    """Build the backbone described by a config, with random weights and without network access."""
    if config["library"] == "timm":
        return _create_timm(config["architecture"], config["args"])
    if config["architecture"].get("model_type") not in _DEFAULT_PREPROCESS:
        raise ValueError(f"the vision tower has unsupported model type {config['architecture'].get('model_type')!r}")
    return _build_transformers(build_config(config["architecture"]))


def _create_timm(architecture: str, args: dict[str, Any]) -> nn.Module:
    """Create a timm model with random weights from a saved architecture and arguments.

    A model folder may come from an untrusted source. Therefore, names that trigger downloads, such as
    `hf-hub:OWNER/NAME`, are rejected, and `timm.create_model`'s own arguments, such as `checkpoint_path`, are ignored.

    Raises:
        ValueError: timm has no such architecture.
    """
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}")
    factory_args = inspect.signature(timm.create_model).parameters
    args = {name: value for name, value in args.items() if name not in factory_args}
    return timm.create_model(architecture, pretrained=False, **args)


def _parse_name(name: str) -> tuple[str, str]:
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("timm", "hf"):
        if prefix == "hf" or "/" in rest:
            check_model_source(rest)
        return ("timm" if prefix == "timm" else "transformers"), rest
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} has no config.json: the folder was saved neither by timm nor by transformers")
        config = read_json_object(folder / "config.json")
    elif "/" not in name or name.startswith("timm/"):
        return "timm", name
    else:
        config = _download_config(name)
    if config.get("model_type") == "llm2clip":
        raise ValueError(
            f"{name} is an llm2clip model, not a vision tower: use the tower it was trained from, or export its tower "
            "with `llm2clip export --to vision`"
        )
    if "model_type" in config:
        return "transformers", name
    if "architecture" in config:
        return "timm", name
    raise ValueError(f"{name}: config.json has neither 'architecture' (timm) nor 'model_type' (transformers)")


def _download_config(hub_id: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    check_model_source(hub_id)
    try:
        return read_json_object(Path(hf_hub_download(hub_id, "config.json")))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{hub_id} is neither a folder nor a model on the hub ({error})") from error


# ---- timm -----------------------------------------------------------------------------------------------------------


def _load_timm(source: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    model_name, architecture, cfg, args = _resolve_timm_source(source)
    if pretrained and cfg.get("hf_hub_id") and not Path(source).is_dir():
        check_model_source(cfg["hf_hub_id"])  # timm downloads the weights from the hub
    args = {**args, "num_classes": 0}
    if cfg.get("fixed_input_size") or "img_size" in args:
        # Position embeddings or attention windows are built for one image size. timm resizes the pretrained weights.
        # The size is always saved in the config, because an architecture's default size depends on the tag.
        built_size = args.get("img_size") or cfg["input_size"][-2:]
        sides = {built_size} if isinstance(built_size, int) else set(built_size)
        if image_size is None and len(sides) > 1:
            raise ValueError(f"{model_name} was built for images of {built_size}; only square images are supported")
        args["img_size"] = image_size or sides.pop()
    backbone = timm.create_model(model_name, pretrained=pretrained, **args)
    preprocess = _read_timm_preprocess(backbone, model_name, args.get("img_size") or image_size)
    config = {"library": "timm", "architecture": architecture, "args": args, "preprocess": preprocess.to_dict()}
    return backbone, config


def _resolve_timm_source(source: str) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Return (name for `timm.create_model`, architecture, pretrained config, saved arguments)."""
    if Path(source).is_dir():
        saved = read_json_object(Path(source) / "config.json")
        cfg = saved.get("pretrained_cfg", saved)
        return f"local-dir:{source}", saved["architecture"], cfg, saved.get("model_args") or {}
    if "/" in source:
        cfg, architecture, args = load_model_config_from_hf(source)
        return f"hf-hub:{source}", architecture, cfg, args or {}
    architecture = split_model_name_tag(source)[0]
    if not timm.is_model(architecture):
        raise ValueError(
            f"timm has no model {source!r}, and there is no such folder; a hub id must contain a slash (OWNER/NAME)"
        )
    try:
        pretrained_cfg = get_pretrained_cfg(source, allow_unregistered=True)
    except RuntimeError as error:  # the architecture does not have this tag
        raise ValueError(str(error)) from error
    return source, architecture, pretrained_cfg.to_dict() if pretrained_cfg else {}, {}


def _read_timm_preprocess(backbone: nn.Module, name: str, size: int | None) -> Preprocess:
    """Return the preprocessing that a timm model was trained with. If `size` is set, it replaces the image size."""
    data = resolve_model_data_config(backbone)
    height, width = data["input_size"][-2:]  # before timm 1.0.31, this is the original size even if `img_size` is set
    if size is None and height != width:
        raise ValueError(f"{name} was trained on images of {height} x {width}; only square images are supported")
    if data["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"{name} uses crop mode {data['crop_mode']!r}; only 'center' and 'squash' are supported")
    return Preprocess(
        size=size or height,
        resize="squash" if data["crop_mode"] == "squash" else "shortest",
        crop_pct=data["crop_pct"],
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


# ---- transformers ---------------------------------------------------------------------------------------------------


def _load_transformers(source: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPVisionConfig

    config = load_config(source)
    if config.model_type in _DUAL_ENCODER_TYPES:
        config = config.vision_config
    if config.model_type == "metaclip_2_vision_model":
        # MetaCLIP 2's vision model has CLIP's architecture and weight names, but AutoModel does not support its type.
        fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = CLIPVisionConfig.from_dict(fields)
    if config.model_type.startswith("siglip2"):
        raise ValueError(
            f"{source} is a NaFlex model, whose images have no fixed size. Use a SigLIP 2 model with a fixed image "
            "size, such as google/siglip2-so400m-patch16-256"
        )
    if config.model_type not in _DEFAULT_PREPROCESS:
        supported = ", ".join([*_DUAL_ENCODER_TYPES, *_DEFAULT_PREPROCESS])
        raise ValueError(f"{source} has unsupported model type {config.model_type!r}; supported types: {supported}")
    backbone = _build_transformers(config, source if pretrained else None)
    preprocess = _read_transformers_preprocess(source, config)
    preprocess = replace(preprocess, size=image_size or preprocess.size)
    architecture = {key: value for key, value in config.to_dict().items() if key not in _TRANSIENT_ENTRIES}
    return backbone, {
        "library": "transformers",
        "architecture": architecture,
        "preprocess": preprocess.to_dict(),
    }


@hide_load_report()
def _build_transformers(config: Any, source: str | None = None) -> nn.Module:
    """Build the vision model of a transformers config, with weights from `source` or, if None, with random weights."""
    from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

    # Given a folder with a complete CLIP model, AutoModel would build both towers.
    classes = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
    model_class: Any = classes.get(config.model_type)
    if source is None:
        model = model_class(config) if model_class else AutoModel.from_config(config)
        model = model.float()
    else:
        # By default, transformers 5 loads half-precision checkpoints in half precision.
        model, report = (model_class or AutoModel).from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would only warn and initialise these weights randomly
            raise ValueError(f"{source} is missing {len(missing):,} weights, including {missing[0]}")
    return cast(nn.Module, model)


def _read_transformers_preprocess(source: str, config: Any) -> Preprocess:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        preprocess = replace(_DEFAULT_PREPROCESS[config.model_type], size=int(config.image_size))
        log.warning(
            "%s has no preprocessor_config.json; using the default preprocessing for its model type: %s",
            source,
            preprocess,
        )
        return preprocess
    return Preprocess.from_dict(processor.to_dict())
