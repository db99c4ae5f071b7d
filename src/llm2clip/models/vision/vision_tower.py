"""Pretrained image encoders (vision towers) from timm and transformers, with LoRA support.

A vision tower maps uint8 pixels to pooled features, without any projection. The architecture and the preprocessing can
be rebuilt without network access from the tower's `config`, a JSON-serialisable dict:

library        timm or transformers
architecture   name of the architecture (timm) or the model's config as a dict (transformers)
args           arguments for `timm.create_model` (timm only)
preprocess     image preprocessing, from `PreprocessConfig.to_dict()`

To find the code that depends on the library, search for `["library"]`. Each branch assumes one of these two libraries.
"""

import inspect
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, cast

import timm
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.data import resolve_model_data_config
from timm.models import get_pretrained_cfg, group_parameters, load_model_config_from_hf, split_model_name_tag
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from llm2clip.data.transforms import PreprocessConfig
from llm2clip.io_utils import read_json_object
from llm2clip.models.loading import (
    ENTRIES_WITHOUT_EFFECT,
    build_transformers_config,
    check_model_source,
    download_hub_snapshot,
    explain_load_errors,
    hide_load_report,
    hide_loading_progress_bars,
    load_transformers_config,
)
from llm2clip.models.pretrained import resolve_pretrained_name

log = logging.getLogger(__name__)

# Supported transformers model types -> preprocessing of models without a preprocessor_config.json.
# The model's image size replaces 224. Model types without a trained pooled output are not supported.
_CLIP_STATS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF_STATS = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_DEFAULT_PREPROCESS = {
    "clip_vision_model": PreprocessConfig(224, "shortest", 1.0, "bicubic", *_CLIP_STATS, crop_rounding="down"),
    "siglip_vision_model": PreprocessConfig(224, "squash", 1.0, "bicubic", *_HALF_STATS, crop_rounding="down"),
    "dinov2": PreprocessConfig(224, "shortest", 0.875, "bicubic", *_IMAGENET_STATS, crop_rounding="down"),
    "dinov2_with_registers": PreprocessConfig(
        224, "shortest", 0.875, "bicubic", *_IMAGENET_STATS, crop_rounding="down"
    ),
    "dinov3_vit": PreprocessConfig(224, "squash", 1.0, "bilinear", *_IMAGENET_STATS, crop_rounding="down"),
}
# Supported image-text model types in transformers. The vision tower is the image-text model's vision model.
_DUAL_ENCODER_TYPES = ("clip", "metaclip_2", "siglip")
# Names of repeated blocks in timm's ViTs, EfficientNets, ConvNeXts and ResNets, and in transformers' ViTs.
_BLOCK = re.compile(r"(?:blocks\.(?:\d+\.)+|stages\.\d+\.blocks\.\d+\.|layer[1-4]\.\d+\.|layers?\.\d+\.)")
# transformers model types that interpolate position embeddings only on request. Other types always interpolate.
INTERPOLATES_ON_REQUEST = ("clip_vision_model", "siglip_vision_model")


class VisionTower(nn.Module):
    """Vision encoder that maps images of shape (N, 3, S, S) to pooled features of shape (N, feature_dim).

    Attributes:
        config: JSON-serialisable dict from which `from_config` rebuilds the architecture.
        preprocess: Image preprocessing. `preprocess.size` is S.
        freeze_norm: Keep batch norms in eval mode during training. Otherwise, small batches would distort the running
            statistics, and features would depend on the other images in the batch. Changes take effect at the next call
            to `train()`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        if config["library"] == "transformers":
            self.feature_dim = int(config["architecture"]["hidden_size"])
        else:  # in some convolutional networks, the layer before the classifier determines the feature size
            self.feature_dim = int(getattr(backbone, "head_hidden_size", None) or cast(Any, backbone).num_features)
        self.preprocess = PreprocessConfig.from_dict(config["preprocess"])
        self.freeze_norm = True
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.register_buffer("std", torch.empty(0), persistent=False)
        self._set_mean_and_std(torch.get_default_device())
        # The channels-last format speeds up networks with many convolutions. A ViT has only one convolution.
        self._channels_last = sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 4
        for name, parameter in backbone.named_parameters():
            # DINO uses the mask token only in pretraining. DDP would wait for its gradient, which is never computed.
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)

    @classmethod
    @hide_loading_progress_bars()
    def from_pretrained(cls, name: str | Path, *, image_size: int | None = None, pretrained: bool = True) -> Self:
        """Load a tower in float32 and eval mode. Code in a model folder or hub repository is never run.

        Args:
            name: `timm:NAME` for a timm model, or `hf:NAME` for a transformers model. Without a prefix, a folder saved
                by timm or transformers, a hub id (OWNER/NAME), the name of a timm model, or the name of a model that
                llm2clip can download (see `models/pretrained.py`).
            image_size: Image size in pixels. Default: the tower's training resolution.
            pretrained: If False, initialise the weights randomly.

        Raises:
            ValueError: The model is not supported.
            OSError: The model does not exist.
        """
        library, source = _parse_tower_name(resolve_pretrained_name(str(name)))
        load = _load_timm_backbone if library == "timm" else _load_transformers_backbone
        with explain_load_errors(name):
            backbone, config = load(source, image_size, pretrained)
            return cls(backbone, config).eval()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a tower with random weights from a config, in eval mode and without network access."""
        return cls(build_backbone(config), config).eval()

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images of shape (N, 3, S, S), uint8 or float from 0 to 1, as features of shape (N, feature_dim)."""
        if self.config["library"] == "timm":
            return cast(Tensor, self.backbone(self._build_timm_input(pixels)))
        interpolate = self.preprocess.size != self.config["architecture"]["image_size"]
        return cast(Tensor, self._run_transformers_backbone(pixels, interpolate).pooler_output)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Encode images of shape (N, 3, H, W), uint8 or float in [0, 1], into unpooled features.

        For a vision transformer, return all tokens, including class and register tokens, as shape (N, L, C). For a
        convolutional network, return the feature map in the timm model's format (NCHW or NHWC).
        """
        if self.config["library"] == "timm":
            return cast(Tensor, cast(Any, self.backbone).forward_features(self._build_timm_input(pixels)))
        return cast(Tensor, self._run_transformers_backbone(pixels, interpolate=True).last_hidden_state)

    def _build_timm_input(self, pixels: Tensor) -> Tensor:
        x = self._normalize_pixels(pixels)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _run_transformers_backbone(self, pixels: Tensor, interpolate: bool) -> Any:
        options = {}
        if interpolate and self.config["architecture"]["model_type"] in INTERPOLATES_ON_REQUEST:
            options["interpolate_pos_encoding"] = True
        return self.backbone(pixel_values=self._normalize_pixels(pixels), **options)

    def _normalize_pixels(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return ((x - self.mean) / self.std).to(next(self.backbone.parameters()).dtype)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode and self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing. Raise ValueError if timm does not support it for this tower."""
        backbone = cast(Any, self.backbone)
        if self.config["library"] == "timm":
            try:
                backbone.set_grad_checkpointing(enable)
            except (AssertionError, AttributeError, TypeError) as error:
                architecture = self.config["architecture"]
                raise ValueError(f"timm does not support gradient checkpointing for {architecture}") from error
            return
        # transformers is renaming gradient_checkpointing_* to activation_checkpointing_*.
        suffix = "enable" if enable else "disable"
        method = getattr(backbone, f"activation_checkpointing_{suffix}", None)
        (method or getattr(backbone, f"gradient_checkpointing_{suffix}"))()

    def _set_mean_and_std(self, device: torch.device) -> None:
        self.mean = torch.tensor(self.preprocess.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std, device=device).view(3, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Keep `mean` and `std` in float32 when PyTorch's `to`, `half`, `cuda` or `to_empty` calls `_apply`."""
        super()._apply(fn, recurse)
        self._set_mean_and_std(self.mean.device)
        return self

    def get_parameter_depths(self) -> dict[str, int]:
        """Return the depth of each parameter by name. Parameters of the stem or the embeddings have depth 0."""
        if self.config["library"] == "timm":
            if not hasattr(self.backbone, "group_matcher"):  # timm does not specify the layers of the architecture
                return {name: 0 for name, _ in self.named_parameters()}
            matcher = cast(Any, self.backbone).group_matcher(coarse=False)
            depths = cast(dict[str, int], group_parameters(self.backbone, matcher, reverse=True))
        else:
            depths = _compute_transformers_depths([name for name, _ in self.backbone.named_parameters()])
        return {f"backbone.{name}": depth for name, depth in depths.items()}

    @property
    def num_layers(self) -> int:
        """Number of distinct parameter depths (see `get_parameter_depths`)."""
        return 1 + max(self.get_parameter_depths().values())

    def get_blocks(self) -> list[nn.Module]:
        """Return the repeated blocks, ordered from input to output, or an empty list for towers without blocks."""
        blocks = []
        for name, module in self.backbone.named_modules():
            match = _BLOCK.search(f"{name}.")
            is_block = match is not None and match.end() > len(name)  # False for modules inside a block
            if is_block and not isinstance(module, nn.Sequential):
                blocks.append(module)
        return blocks

    def is_in_block(self, name: str) -> bool:
        """Return True if the backbone module or parameter called `name` is inside a repeated block."""
        return _BLOCK.search(name) is not None


def _compute_transformers_depths(names: list[str]) -> dict[str, int]:
    # Depth 0 is for the embeddings and their norm, 1 to L for the L layers, and L + 1 for all other parameters.
    layer_indices = {name: int(match[1]) for name in names if (match := re.search(r"\blayers?\.(\d+)\.", name))}
    depths = dict.fromkeys(names, 2 + max(layer_indices.values()))
    depths |= {name: index + 1 for name, index in layer_indices.items()}
    depths |= {name: 0 for name in names if name.startswith(("embeddings.", "pre_layrnorm."))}
    return depths


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def add_tower_lora(tower: VisionTower, rank: int, alpha: int) -> None:
    """Freeze a tower, and add LoRA (arXiv 2106.09685) to the linear layers and 1 x 1 convolutions in all blocks."""
    modules = list(tower.backbone.named_modules())
    # nn.MultiheadAttention does not call its sublayers but only uses their weights, so LoRA would have no effect.
    attention_prefixes = tuple(f"{name}." for name, m in modules if isinstance(m, nn.MultiheadAttention))
    targets = []
    for name, module in modules:
        is_pointwise_conv = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
        is_linear = isinstance(module, nn.Linear) or is_pointwise_conv
        if is_linear and tower.is_in_block(name) and not name.startswith(attention_prefixes):
            targets.append(name)
    if not targets:
        raise ValueError("--align.lora_r: this tower has no linear layers that support LoRA. Use --align.lora_r 0")
    _patch_qkv_forward(tower, True)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), tower.backbone)
    for name, parameter in tower.backbone.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merge_tower_lora(tower: VisionTower) -> None:
    """Merge all LoRA layers into the original weights, and make all weights of the tower trainable."""
    lora_layers = {name: m for name, m in tower.backbone.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in lora_layers.items():
        layer.merge(safe_merge=True)
        tower.backbone.set_submodule(name, layer.get_base_layer())
    _patch_qkv_forward(tower, False)
    if hasattr(tower.backbone, "peft_config"):
        del tower.backbone.peft_config
    tower.requires_grad_(True)


def _patch_qkv_forward(tower: VisionTower, enable: bool) -> None:
    """Enable or disable calls to the qkv layer in timm's EVA models, which otherwise ignore the layer's LoRA."""
    for module in tower.backbone.modules():
        if hasattr(module, "qkv_bias_separate"):
            cast(Any, module).qkv_bias_separate = enable


# ---- backbones ------------------------------------------------------------------------------------------------------


def build_backbone(config: dict[str, Any]) -> nn.Module:
    if config["library"] == "timm":
        return _create_timm_backbone(config["architecture"], config["args"])
    model_type = config["architecture"].get("model_type")
    if model_type not in _DEFAULT_PREPROCESS:
        raise ValueError(f"the vision tower has the unsupported model type {model_type!r}")
    return _build_transformers_backbone(build_transformers_config(config["architecture"]))


def _create_timm_backbone(architecture: str, args: dict[str, Any]) -> nn.Module:
    """Create a timm model with random weights from a saved architecture and arguments.

    Because a model folder may come from an untrusted source, architecture names that trigger downloads, such as
    `hf-hub:OWNER/NAME`, are rejected, and arguments that are not for the model, such as `checkpoint_path`, are ignored.
    """
    if not timm.is_model(architecture):
        raise ValueError(f"timm {timm.__version__} has no architecture {architecture!r}")
    factory_args = inspect.signature(timm.create_model).parameters
    args = {name: value for name, value in args.items() if name not in factory_args}
    return timm.create_model(architecture, pretrained=False, **args)


def _parse_tower_name(name: str) -> tuple[str, str]:
    prefix, colon, rest = name.partition(":")
    if colon and prefix in ("timm", "hf"):
        if prefix == "hf" or "/" in rest:
            check_model_source(rest)
        return ("timm" if prefix == "timm" else "transformers"), rest
    folder = Path(name)
    if not folder.is_dir():
        if "/" not in name or name.startswith("timm/"):
            return "timm", name
        folder = download_hub_snapshot(name, ["config.json"])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{name} was saved neither by timm nor by transformers: it has no config.json")
    config = read_json_object(folder / "config.json")
    if config.get("model_type") == "llm2clip":
        raise ValueError(
            f"{name} is an llm2clip model, not a vision tower: use the vision tower that the model was trained "
            "from, or export the model's vision tower with `llm2clip export --to vision`"
        )
    if "model_type" in config:
        return "transformers", name
    if "architecture" in config:
        return "timm", name
    raise ValueError(f"{name}: config.json has neither 'architecture' (timm) nor 'model_type' (transformers)")


def _load_timm_backbone(source: str, image_size: int | None, pretrained: bool) -> tuple[nn.Module, dict[str, Any]]:
    model_name, architecture, cfg, args = _resolve_timm_source(source)
    if pretrained and cfg.get("hf_hub_id") and not Path(source).is_dir():
        check_model_source(cfg["hf_hub_id"])  # timm downloads the weights from the hub
    args = {**args, "num_classes": 0}
    if cfg.get("fixed_input_size") or "img_size" in args:
        # Position embeddings or attention windows depend on the image size, and timm resizes the weights.
        # The image size is always saved in the config because an architecture's default size depends on the tag.
        built_size = args.get("img_size") or cfg["input_size"][-2:]
        sides = {built_size} if isinstance(built_size, int) else set(built_size)
        if image_size is None and len(sides) > 1:
            raise ValueError(f"{model_name} was built for images of {built_size}, but only square images are supported")
        args["img_size"] = image_size or sides.pop()
    backbone = timm.create_model(model_name, pretrained=pretrained, **args)
    preprocess = _read_timm_preprocess_config(backbone, model_name, args.get("img_size") or image_size)
    config = {"library": "timm", "architecture": architecture, "args": args, "preprocess": preprocess.to_dict()}
    return backbone, config


def _resolve_timm_source(source: str) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Return (model name for `timm.create_model`, architecture, pretrained config, saved model arguments)."""
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
            f"{source!r} is neither a timm model nor an existing folder. A hub id must contain a slash (OWNER/NAME)"
        )
    try:
        pretrained_cfg = get_pretrained_cfg(source, allow_unregistered=True)
    except RuntimeError as error:  # the model's tag does not exist
        raise ValueError(str(error)) from error
    return source, architecture, pretrained_cfg.to_dict() if pretrained_cfg else {}, {}


def _read_timm_preprocess_config(backbone: nn.Module, name: str, size: int | None) -> PreprocessConfig:
    """Return the preprocessing that a timm model was trained with. `size` overrides the image size."""
    data = resolve_model_data_config(backbone)
    height, width = data["input_size"][-2:]  # before timm 1.0.31, the original image size even if `img_size` is set
    if size is None and height != width:
        raise ValueError(f"{name} was trained on images of {height} x {width}, but only square images are supported")
    if data["crop_mode"] not in ("center", "squash"):
        raise ValueError(f"the crop mode of {name} must be 'center' or 'squash' (got {data['crop_mode']!r})")
    return PreprocessConfig(
        size=size or height,
        resize="squash" if data["crop_mode"] == "squash" else "shortest",
        crop_pct=data["crop_pct"],
        interpolation="bilinear" if data["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
    )


def _load_transformers_backbone(
    source: str, image_size: int | None, pretrained: bool
) -> tuple[nn.Module, dict[str, Any]]:
    from transformers import CLIPVisionConfig

    config = load_transformers_config(source)
    if config.model_type in _DUAL_ENCODER_TYPES:
        config = config.vision_config
    if config.model_type == "metaclip_2_vision_model":
        # AutoModel does not support MetaCLIP 2's vision model, which has CLIP's architecture and weight names.
        fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
        config = CLIPVisionConfig.from_dict(fields)
    if config.model_type.startswith("siglip2"):
        raise ValueError(
            f"{source} is a NaFlex model, which has no fixed image size. Use a SigLIP 2 model with a fixed image size, "
            "such as google/siglip2-so400m-patch16-256"
        )
    if config.model_type not in _DEFAULT_PREPROCESS:
        supported = ", ".join([*_DUAL_ENCODER_TYPES, *_DEFAULT_PREPROCESS])
        raise ValueError(f"{source} has the unsupported model type {config.model_type!r}. Supported types: {supported}")
    backbone = _build_transformers_backbone(config, source if pretrained else None)
    preprocess = _read_transformers_preprocess_config(source, config)
    preprocess = replace(preprocess, size=image_size or preprocess.size)
    architecture = {key: value for key, value in config.to_dict().items() if key not in ENTRIES_WITHOUT_EFFECT}
    return backbone, {"library": "transformers", "architecture": architecture, "preprocess": preprocess.to_dict()}


@hide_load_report()
def _build_transformers_backbone(config: Any, source: str | None = None) -> nn.Module:
    from transformers import AutoModel, CLIPVisionModel, SiglipVisionModel

    # For a folder that contains a complete CLIP model, AutoModel would build both towers.
    classes = {"clip_vision_model": CLIPVisionModel, "siglip_vision_model": SiglipVisionModel}
    model_class: Any = classes.get(config.model_type)
    if source is None:
        model = model_class(config) if model_class else AutoModel.from_config(config)
        model = model.float()
    else:
        # Without `dtype`, transformers 5 would load half-precision checkpoints in half precision.
        model, report = (model_class or AutoModel).from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        if missing:  # transformers would only log a warning and initialise the missing weights randomly
            raise ValueError(f"{source} lacks the model weight {missing[0]} ({len(missing):,} missing in total)")
    return cast(nn.Module, model)


def _read_transformers_preprocess_config(source: str, config: Any) -> PreprocessConfig:
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError):
        preprocess = replace(_DEFAULT_PREPROCESS[config.model_type], size=int(config.image_size))
        message = "%s has no preprocessor_config.json; using the default preprocessing for the model type: %s"
        log.warning(message, source, preprocess)
        return preprocess
    return PreprocessConfig.from_dict(processor.to_dict())
