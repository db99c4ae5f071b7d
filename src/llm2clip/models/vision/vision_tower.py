"""Common interface for pretrained image encoders (vision towers) from timm and transformers, with LoRA support.

A tower maps uint8 pixels to pooled features, without any projection, and stores the preprocessing it was trained with.
Its architecture can be rebuilt from its `config` without network access, so a model can save the tower's weights in its
own state dict.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from timm.models import group_parameters
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from llm2clip.data.transforms import Preprocess
from llm2clip.models.hub.loading import hide_loading_bars
from llm2clip.models.vision.vision_backbones import build_backbone, load_backbone

# Matches the names of repeated blocks. Alternatives, in order: timm's ViTs and EfficientNets; ConvNeXt and similar
# models; ResNets; transformers' ViTs.
_BLOCK = re.compile(r"(?:blocks\.(?:\d+\.)+|stages\.\d+\.blocks\.\d+\.|layer[1-4]\.\d+\.|layers?\.\d+\.)")
# transformers model types that interpolate position embeddings only on request. Other types always interpolate them.
_INTERPOLATES_ON_REQUEST = ("clip_vision_model", "siglip_vision_model")


class VisionTower(nn.Module):
    """Vision encoder that maps images of shape (N, 3, S, S) to pooled features of shape (N, feature_dim).

    Attributes:
        backbone: timm or transformers module with all parameters.
        config: JSON-serialisable dict from which `from_config` rebuilds the architecture.
        preprocess: image preprocessing. `preprocess.size` is S.
        freeze_norm: if True, batch norms stay in eval mode during training. In training mode, small batches would
            distort the running statistics, and features would depend on the other images in the batch. Changes to this
            attribute take effect at the next call to `train()`.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, config: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.config = config
        self.feature_dim = _get_feature_dim(backbone, config)
        self.preprocess = Preprocess.from_dict(config["preprocess"])
        self.freeze_norm = True
        self.register_buffer("mean", torch.empty(0), persistent=False)
        self.register_buffer("std", torch.empty(0), persistent=False)
        self._set_normalization(torch.get_default_device())
        # The channels-last format speeds up networks with many convolutions, but not ViTs, which have only one.
        self._channels_last = sum(isinstance(module, nn.Conv2d) for module in backbone.modules()) > 4
        for name, parameter in backbone.named_parameters():
            # DINO uses the mask token only in pretraining, and DDP would wait for its gradient.
            if name.endswith("mask_token"):
                parameter.requires_grad_(False)

    # ---- construction -----------------------------------------------------------------------------------------------

    @classmethod
    @hide_loading_bars()
    def from_pretrained(cls, name: str | Path, *, image_size: int | None = None, pretrained: bool = True) -> Self:
        """Load a tower in float32 and eval mode. Code that comes with a model is never run.

        Args:
            name: `timm:NAME` loads a model with timm, and `hf:NAME` with transformers. Without a prefix, the name is a
                folder saved by either library, a hub id (with a slash), the name of a timm model, or the name of a
                model that `llm2clip` can download (see `models/hub/pretrained.py`).
            image_size: image size in pixels. Default: the tower's training resolution.
            pretrained: if True, load the pretrained weights. If False, initialise the weights randomly.

        Raises:
            ValueError: the model is not supported.
            OSError: the model does not exist.
        """
        backbone, config = load_backbone(str(name), image_size, pretrained)
        return cls(backbone, config).eval()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Build a tower from its `config` with random weights, in eval mode, without network access."""
        return cls(build_backbone(config), config).eval()

    # ---- forward pass -----------------------------------------------------------------------------------------------

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images as pooled features of shape (N, feature_dim), in the backbone's output dtype.

        Args:
            pixels: images of shape (N, 3, S, S), uint8 or float from 0 to 1.
        """
        if self.config["library"] == "timm":
            return cast(Tensor, self.backbone(self._build_timm_input(pixels)))
        interpolate = self.preprocess.size != self.config["architecture"]["image_size"]
        return cast(Tensor, self._run_transformers(pixels, interpolate).pooler_output)

    def forward_features(self, pixels: Tensor) -> Tensor:
        """Encode images as unpooled features. Position embeddings of transformers models are interpolated.

        Args:
            pixels: images of shape (N, 3, H, W), uint8 or float from 0 to 1.

        Returns:
            For a vision transformer, all tokens of shape (N, L, C), including class and register tokens. For a
            convolutional network, the feature map in the timm model's layout (NCHW or NHWC).
        """
        if self.config["library"] == "timm":
            return cast(Tensor, cast(Any, self.backbone).forward_features(self._build_timm_input(pixels)))
        return cast(Tensor, self._run_transformers(pixels, interpolate=True).last_hidden_state)

    def _build_timm_input(self, pixels: Tensor) -> Tensor:
        x = self._normalize(pixels)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _run_transformers(self, pixels: Tensor, interpolate: bool) -> Any:
        """Run the transformers model. If `interpolate` is True, interpolate its position embeddings."""
        options = {}
        if interpolate and self.config["architecture"]["model_type"] in _INTERPOLATES_ON_REQUEST:
            options["interpolate_pos_encoding"] = True
        return self.backbone(pixel_values=self._normalize(pixels), **options)

    def _normalize(self, pixels: Tensor) -> Tensor:
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return ((x - self.mean) / self.std).to(next(self.backbone.parameters()).dtype)

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. If `freeze_norm` is True, batch norms stay in eval mode."""
        super().train(mode)
        if mode and self.freeze_norm:
            for module in self.backbone.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing, which recomputes activations in the backward pass.

        Raises:
            ValueError: timm does not support gradient checkpointing for this architecture.
        """
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

    def _set_normalization(self, device: torch.device) -> None:
        self.mean = torch.tensor(self.preprocess.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std, device=device).view(3, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Apply `fn` to the weights, but keep `mean` and `std` in float32.

        PyTorch's `to`, `half`, `cuda` and `to_empty` call this method.
        """
        super()._apply(fn, recurse)
        self._set_normalization(self.mean.device)
        return self

    # ---- layers -----------------------------------------------------------------------------------------------------

    def get_parameter_depths(self) -> dict[str, int]:
        """Return the depth of each parameter, keyed by name, for layer-wise learning rate decay and unfreezing layers.

        Parameters of the stem or embeddings have depth 0. Parameters closest to the output have the largest depth.
        """
        if self.config["library"] == "timm":
            if not hasattr(self.backbone, "group_matcher"):  # timm does not specify the layers of this architecture
                return {name: 0 for name, _ in self.named_parameters()}
            matcher = cast(Any, self.backbone).group_matcher(coarse=False)
            depths = cast(dict[str, int], group_parameters(self.backbone, matcher, reverse=True))
        else:
            depths = _compute_transformers_depths([name for name, _ in self.backbone.named_parameters()])
        return {f"backbone.{name}": depth for name, depth in depths.items()}

    @property
    def num_layers(self) -> int:
        """Number of distinct depths: the largest value in `get_parameter_depths` plus 1."""
        return 1 + max(self.get_parameter_depths().values())

    def get_blocks(self) -> list[nn.Module]:
        """Return the repeated blocks in order from input to output. The list is empty if there are no such blocks."""
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


def _get_feature_dim(backbone: Any, config: dict[str, Any]) -> int:
    if config["library"] == "transformers":
        return int(config["architecture"]["hidden_size"])
    # Some convolutional networks have a hidden layer after pooling, which remains when the classifier is removed.
    return int(getattr(backbone, "head_hidden_size", None) or backbone.num_features)


def _compute_transformers_depths(names: list[str]) -> dict[str, int]:
    """Compute the depth of each parameter in a transformers model.

    The embeddings and the norm that follows them have depth 0, the L layers have depths 1 to L, and the remaining
    parameters have depth L + 1.
    """
    layer_indices = {name: int(match[1]) for name in names if (match := re.search(r"\blayers?\.(\d+)\.", name))}
    last_depth = 2 + max(layer_indices.values())
    stem = re.compile(r"embeddings\.|pre_layrnorm\.")
    depths = {}
    for name in names:
        if stem.match(name):
            depths[name] = 0
        elif name in layer_indices:
            depths[name] = layer_indices[name] + 1
        else:
            depths[name] = last_depth
    return depths


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def add_tower_lora(tower: VisionTower, rank: int, alpha: int) -> None:
    """Add LoRA (arXiv 2106.09685) to the linear layers and 1 x 1 convolutions in the tower's blocks.

    All original weights are frozen. Raise ValueError if the tower has no layer that supports LoRA.
    """
    modules = list(tower.backbone.named_modules())
    # nn.MultiheadAttention uses the weights of its sublayers without calling them, so LoRA would have no effect.
    attention_prefixes = tuple(f"{name}." for name, m in modules if isinstance(m, nn.MultiheadAttention))
    targets = []
    for name, module in modules:
        is_pointwise_conv = type(module) is nn.Conv2d and module.kernel_size == (1, 1) and module.groups == 1
        is_linear = isinstance(module, nn.Linear) or is_pointwise_conv
        if is_linear and tower.is_in_block(name) and not name.startswith(attention_prefixes):
            targets.append(name)
    if not targets:
        raise ValueError("--align.lora_r: this tower has no linear layers that support LoRA. Use --align.lora_r 0")
    _set_qkv_module_call(tower, True)
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), tower.backbone)
    for name, parameter in tower.backbone.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merge_tower_lora(tower: VisionTower) -> None:
    """Merge all LoRA layers into the original weights, and make all tower weights trainable."""
    lora_layers = {name: m for name, m in tower.backbone.named_modules() if isinstance(m, BaseTunerLayer)}
    for name, layer in lora_layers.items():
        layer.merge(safe_merge=True)
        tower.backbone.set_submodule(name, layer.get_base_layer())
    _set_qkv_module_call(tower, False)
    if hasattr(tower.backbone, "peft_config"):
        del tower.backbone.peft_config
    tower.requires_grad_(True)


def _set_qkv_module_call(tower: VisionTower, enable: bool) -> None:
    """Set whether timm's EVA models call their qkv layer. By default, they only use its weight, which bypasses LoRA."""
    for module in tower.backbone.modules():
        if hasattr(module, "qkv_bias_separate"):
            cast(Any, module).qkv_bias_separate = enable
