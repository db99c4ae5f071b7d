"""The vision tower: a pretrained image encoder from timm or transformers behind one interface.

uint8 pixels go in, the pooled feature before any projection comes out. The tower knows the preprocessing it was trained
with, and its `config` rebuilds the architecture with no network, so its weights can live in the state dict of the
model around it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, group_parameters, load_model_config_from_hf, split_model_name_tag
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from llm2clip.data.images import Preprocess
from llm2clip.models.pretrained import resolve_pretrained

log = logging.getLogger(__name__)

# transformers: the model types whose pooled output is a trained image feature, and how their pictures are prepared when
# a folder has no preprocessor_config.json. Sizes are replaced by the model's own.
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TYPES = {
    "clip_vision_model": Preprocess(224, "shortest", 1.0, "bicubic", *_CLIP),
    "siglip_vision_model": Preprocess(224, "squash", 1.0, "bicubic", *_HALF),
    "dinov2": Preprocess(224, "shortest", 0.875, "bicubic", *_IMAGENET),
    "dinov2_with_registers": Preprocess(224, "shortest", 0.875, "bicubic", *_IMAGENET),
    "dinov3_vit": Preprocess(224, "squash", 1.0, "bilinear", *_IMAGENET),
}
_VISION_HALF = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}
# Where the blocks are: timm's transformers and EfficientNets, ConvNeXt and its kin, ResNets; transformers' ViTs.
_BLOCK = re.compile(r"(?:blocks\.(?:\d+\.)+|stages\.\d+\.blocks\.\d+\.|layer[1-4]\.\d+\.|layers?\.\d+\.)")
_INTERPOLATES_ON_REQUEST = ("clip_vision_model", "siglip_vision_model")  # the others do it by themselves


class VisionTower(nn.Module):
    """uint8 or float (N, 3, S, S) to the pooled feature, (N, width).

    Attributes:
        backbone: the library's module; all parameters are under this name.
        config: JSON-able; `from_config(config)` builds the same architecture with random weights, offline.
        preprocess: how the pictures must be prepared; `preprocess.size` is S.
        feature_dim: of the feature.
        freeze_norm: keep batch norms in eval mode while training, so that the small batches of a fine-tune do not
            spoil the running statistics and no pair sees the others' pixels through a batch's mean. Takes effect at the
            next `train()`. Norms without running statistics are untouched.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, config: dict[str, Any], width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.feature_dim = width
        self.preprocess = Preprocess.from_dict(config["preprocess"])
        self.freeze_norm = True
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.register_buffer("std", torch.empty(0), persistent=False)
        self._set_normalisation(torch.get_default_device())
        # Convolutions in a row are faster with the channels last; a ViT has one, on which nothing depends.
        self._channels_last = sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 4
        for name, parameter in backbone.named_parameters():
            if name.endswith("mask_token"):  # DINO's pretraining only: no gradient ever reaches it, and DDP would wait
                parameter.requires_grad_(False)

    # ---- building ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name: str | Path, *, image_size: int | None = None, pretrained: bool = True) -> Self:
        """Load a tower, in float32 and eval mode.

        `name` is `timm:NAME`, `hf:NAME`, a folder saved by either library, a hub id (with a slash), a timm model
        name, or a name of `models/assets.py`, which is fetched. `image_size` trains and runs it at another resolution
        than its own. `pretrained=False` keeps the random weights. Code that comes with a model is never run. Raises
        ValueError for a model that is not supported, OSError for one that cannot be found.
        """
        library, source = _parsed(resolve_pretrained(str(name)))
        build = _timm_from_source if library == "timm" else _hf_from_source
        backbone, config = build(source, image_size, pretrained)
        return cls(backbone, config, _width(backbone, config)).eval()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """The architecture of `config` with random weights, in eval mode, without network."""
        if config["library"] == "timm":
            backbone = timm.create_model(config["architecture"], pretrained=False, **config["args"])
        else:
            backbone = _hf_build(_hf_config(config["architecture"]))
        return cls(backbone, config, _width(backbone, config)).eval()

    # ---- running ----------------------------------------------------------------------------------------------------

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 (0 to 255) or float (0 to 1) (N, 3, S, S) to (N, width), in the dtype the backbone computes in."""
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        x = ((x - self.mean) / self.std).to(next(self.backbone.parameters()).dtype)
        if self.config["library"] == "timm":
            return cast(
                Tensor, self.backbone(x.contiguous(memory_format=torch.channels_last) if self._channels_last else x)
            )
        resized = self.preprocess.size != self.config["architecture"]["image_size"]
        if resized and self.config["architecture"]["model_type"] in _INTERPOLATES_ON_REQUEST:
            return cast(Tensor, self.backbone(pixel_values=x, interpolate_pos_encoding=True).pooler_output)
        return cast(Tensor, self.backbone(pixel_values=x).pooler_output)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them.

        Raises ValueError for a tower that cannot.
        """
        backbone = cast(Any, self.backbone)
        if self.config["library"] == "timm":
            try:
                backbone.set_grad_checkpointing(enable)
            except (AssertionError, AttributeError, TypeError) as error:
                raise ValueError(f"timm cannot recompute activations of {self.config['architecture']}") from error
        else:  # transformers is renaming these
            verb = "enable" if enable else "disable"
            new = getattr(backbone, f"activation_checkpointing_{verb}", None)
            (new or getattr(backbone, f"gradient_checkpointing_{verb}"))()

    def _set_normalisation(self, device: torch.device) -> None:
        self.mean = torch.tensor(self.preprocess.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std, device=device).view(3, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half`, `cuda` and `to_empty` go through: the normalisation moves along, in exact float32."""
        super()._apply(fn, recurse)
        self._set_normalisation(self.mean.device)
        return self

    # ---- depth ------------------------------------------------------------------------------------------------------

    def parameter_depths(self) -> dict[str, int]:
        """The depth of every parameter, by its name in this module: 0 is the stem or the embeddings, the largest is
        next to the output. For learning rates that decay with depth, and for training the last few layers only."""
        if self.config["library"] == "timm":
            if not hasattr(self.backbone, "group_matcher"):
                return {name: 0 for name, _ in self.named_parameters()}  # timm does not say: all are one layer
            matcher = cast(Any, self.backbone).group_matcher(coarse=False)
            depths = cast(dict[str, int], group_parameters(self.backbone, matcher, reverse=True))
        else:
            depths = _hf_depths([name for name, _ in self.backbone.named_parameters()])
        return {f"backbone.{name}": depth for name, depth in depths.items()}

    def is_in_block(self, name: str) -> bool:
        """Whether a module of the backbone, by its name there, is inside the blocks that repeat, and not in the stem or
        in what comes after them."""
        return _BLOCK.search(name) is not None

    def blocks(self) -> list[nn.Module]:
        """The blocks that repeat, from the input to the output; none where the architecture has no such list."""
        found = ((_BLOCK.search(f"{name}."), name, m) for name, m in self.backbone.named_modules())
        return [m for at, name, m in found if at and at.end() > len(name) and not isinstance(m, nn.Sequential)]

    @property
    def num_layers(self) -> int:
        """The number of depths in `parameter_depths`."""
        return 1 + max(self.parameter_depths().values())


def _width(backbone: Any, config: dict[str, Any]) -> int:
    if config["library"] == "transformers":
        return int(config["architecture"]["hidden_size"])
    # Some convolutional nets have a hidden layer between the pooling and the classifier, which stays.
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


# ---- what a name means ----------------------------------------------------------------------------------------------


def _parsed(name: str) -> tuple[str, str]:
    """("timm" or "transformers", a folder, hub id or registry name)."""
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("timm", "hf"):
        return ("timm" if prefix == "timm" else "transformers"), rest
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} has no config.json: neither timm nor transformers saved it")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    elif "/" not in name or name.startswith("timm/"):
        return "timm", name
    else:
        from huggingface_hub import hf_hub_download

        try:
            config = json.loads(Path(hf_hub_download(name, "config.json")).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{name} is neither a folder here nor a tower on the hub ({error})") from error
    if config.get("model_type") == "llm2clip":
        raise ValueError(f"{name} is a model folder of ours: give the tower it began as, or export it --to vision")
    if "model_type" in config:
        return "transformers", name
    if "architecture" in config:
        return "timm", name
    raise ValueError(f"{name}: its config.json has neither timm's 'architecture' nor transformers' 'model_type'")


# ---- timm -----------------------------------------------------------------------------------------------------------


def _timm_from_source(source: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    args: dict[str, Any] = {}
    if Path(source).is_dir():
        saved = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        cfg, architecture, args = saved.get("pretrained_cfg", saved), saved["architecture"], saved.get("model_args", {})
        source = f"local-dir:{source}"
    elif "/" in source:
        cfg, architecture, args = load_model_config_from_hf(source)
        source = f"hf-hub:{source}"
    elif timm.is_model(split_model_name_tag(source)[0]):
        architecture = split_model_name_tag(source)[0]
        try:
            known = get_pretrained_cfg(source, allow_unregistered=True)
        except RuntimeError as error:  # a tag that the architecture does not have
            raise ValueError(str(error)) from error
        cfg = known.to_dict() if known else {}
    else:
        raise ValueError(f"timm knows no model {source!r}; a folder or a hub id would have to exist or hold a slash")

    args = {**(args or {}), "num_classes": 0}
    if cfg.get("fixed_input_size") or "img_size" in args:
        # Position embeddings or windows are built for one size; timm resizes the pretrained ones to it. Always written
        # down, because another tag of the same architecture may default to another.
        built = args.get("img_size") or cfg["input_size"][-2:]
        sides = {built} if isinstance(built, int) else set(built)
        if image_size is None and len(sides) > 1:
            raise ValueError(f"{source} was built for {built} pixels; only squares are supported")
        args["img_size"] = image_size or sides.pop()
    backbone = timm.create_model(source, pretrained=pretrained, **args)

    data = resolve_model_data_config(backbone)
    height, width = data["input_size"][-2:]
    size = args.get("img_size") or image_size  # timm before 1.0.31 does not say in its data what size it built
    if size is None and height != width:
        raise ValueError(f"{source} was trained on {height} x {width} pixels; only squares are supported")
    if data["crop_mode"] not in ("center", "squash"):
        raise ValueError(
            f"{source} prepares pictures by {data['crop_mode']!r}; only 'center' and 'squash' are supported"
        )
    preprocess = Preprocess(
        size=size or height,
        resize="squash" if data["crop_mode"] == "squash" else "shortest",
        crop_pct=data["crop_pct"],
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )
    return backbone, {
        "library": "timm",
        "architecture": architecture,
        "args": args,
        "preprocess": preprocess.to_dict(),
    }


# ---- transformers ---------------------------------------------------------------------------------------------------


def _hf_from_source(source: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import AutoConfig

    # Without the explicit False transformers would ask at the terminal whether to run the code of a stranger.
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if config.model_type in _VISION_HALF:
        config = config.vision_config
    if config.model_type.startswith("siglip2"):
        raise ValueError(
            f"{source} is a NaFlex SigLIP 2, whose input has no fixed size; "
            "take one of the SigLIP 2 checkpoints with a resolution in its name"
        )
    if config.model_type not in _TYPES:
        raise ValueError(f"{source} is a {config.model_type!r}; supported are {', '.join([*_VISION_HALF, *_TYPES])}")
    backbone = _hf_build(config, source if pretrained else None)
    preprocess = _hf_preprocess(source, config)
    preprocess = replace(preprocess, size=image_size or preprocess.size)
    # What changes from version to version or names a path is not part of the architecture.
    transient = ("transformers_version", "_name_or_path", "dtype", "architectures", "id2label", "label2id")
    architecture = {key: value for key, value in config.to_dict().items() if key not in transient}
    return backbone, {
        "library": "transformers",
        "architecture": architecture,
        "preprocess": preprocess.to_dict(),
    }


def _hf_config(architecture: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**architecture)


def _hf_build(config: Any, source: str | None = None) -> nn.Module:
    """The vision model of a configuration, with the weights of `source` or random ones."""
    from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

    # AutoModel would build the whole CLIP from the folder of one.
    classes = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
    model_class: Any = classes.get(config.model_type)
    if source is None:
        model = model_class(config) if model_class else AutoModel.from_config(config)
        model = model.float()
    else:
        # Left alone, transformers 5 keeps the checkpoint's half precision.
        model, report = (model_class or AutoModel).from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
        if report["missing_keys"]:  # transformers only warns, and leaves these random
            raise ValueError(f"{source} lacks the weights {sorted(report['missing_keys'])[:5]}")
    # Before transformers 5.3 or so CLIP and SigLIP have one more floor. Without it the names of the weights agree.
    return cast(nn.Module, getattr(model, "vision_model", model))


def _hf_preprocess(source: str, config: Any) -> Preprocess:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        preprocess = replace(_TYPES[config.model_type], size=int(config.image_size))
        log.warning("%s says nothing about preprocessing; using what is usual for its type: %s", source, preprocess)
        return preprocess
    return Preprocess.from_dict(processor.to_dict())


def _hf_depths(names: list[str]) -> dict[str, int]:
    """Embeddings and the norm after them, the blocks, then whatever follows."""
    blocks = {name: int(match[1]) for name in names if (match := re.search(r"\blayers?\.(\d+)\.", name))}
    after = 2 + max(blocks.values())
    stem = re.compile(r"embeddings\.|pre_layrnorm\.")
    return {name: 0 if stem.match(name) else blocks[name] + 1 if name in blocks else after for name in names}
