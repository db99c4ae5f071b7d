"""Image preprocessing, patch features of the frozen vision tower, and their store.

The tower is frozen during training, so it is not part of the trained model. `PrecomputedVision` replaces it and
returns the patch features, which are read from a store or computed just before the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pad, resize

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.transforms import EvalTransform, Preprocess
from llm2clip.models.fingerprint import hash_weights
from llm2clip.store.image_features import store_image_features
from llm2clip.store.store import EmbeddingStore

MAX_SHARD_BYTES = 1 << 30
MAX_SHARD_IMAGES = 8192
MAX_SCALE = 8  # images are shrunk before padding if their longer side exceeds this many times the tower's input


class LlavaTransform:
    """Preprocessing of decoded images, equivalent to the image processor of a LLaVA model."""

    def __init__(self, processor: Any) -> None:
        settings = processor.image_processor.to_dict()
        self.preprocess = Preprocess.from_dict(settings)
        self.transform = EvalTransform(self.preprocess)
        self.mean = torch.tensor(self.preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std).view(3, 1, 1)
        self.pad = bool(settings.get("do_pad"))

    def __call__(self, image: Tensor) -> Tensor:
        """Convert uint8 (3, H, W) to normalised float32 (3, S, S)."""
        if self.pad:
            max_side = MAX_SCALE * self.preprocess.resize_size
            if max(image.shape[-2:]) > max_side:  # padding a very long image to a square would exhaust the memory
                image = resize_longest(image, max_side)
            image = pad_to_square(image, [int(255 * value) for value in self.preprocess.mean])
        pixels: Tensor = self.transform(image)
        return (pixels.float() / 255 - self.mean) / self.std


def resize_longest(image: Tensor, side: int) -> Tensor:
    """Resize (3, H, W) so that the longer side equals `side`."""
    height, width = image.shape[-2:]
    scale = side / max(height, width)
    return resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True)


def pad_to_square(image: Tensor, colour: Sequence[int]) -> Tensor:
    """Pad (3, H, W) on both sides to a square, as LLaVA-1.5 does.

    A tower whose preprocessing crops (crop_pct below 1) still crops the padded image.
    """
    height, width = image.shape[-2:]
    side = max(height, width)
    left, top = (side - width) // 2, (side - height) // 2
    return pad(image, [left, top, side - width - left, side - height - top], fill=list(colour))


def patch_feature_size(config: Any) -> int:
    """Return the size of one patch feature, given the config of a LLaVA model."""
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    size: int = config.vision_config.hidden_size * layers
    return size


class PatchFeatures:
    """The vision tower of a LLaVA model as a function from pixels to the projector's input.

    Implements `ImageEncoder` of `store/image_features.py`, with the patch features of an image as one long vector.
    """

    def __init__(self, model: Any, processor: Any, bf16: bool = False) -> None:
        """
        Args:
            model: LLaVA model. Its tower is put in eval mode and stays on its device.
            processor: processor of the model.
            bf16: compute under bfloat16 autocast.
        """
        self.tower = model.model.vision_tower.eval()
        self.config = model.config
        self.transform = LlavaTransform(processor)
        self.bf16 = bf16
        size = self.transform.preprocess.size
        self.tokens, feature_size = self(torch.zeros(1, 3, size, size)).shape[1:]
        self.embed_dim = self.tokens * feature_size

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Map (N, 3, S, S) to patch features (N, tokens, feature size)."""
        pixels = pixels.to(self.device, self.tower.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.config.model_type == "fast_vlm":
                feature_map: Tensor = self.tower(pixels).last_hidden_state  # (N, channels, rows, columns)
                return feature_map.flatten(2).transpose(1, 2)
            hidden_states = self.tower(pixels, output_hidden_states=True).hidden_states
            layers = self.config.vision_feature_layer
            selected = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            if self.config.vision_feature_select_strategy == "default":
                selected = [state[:, 1:] for state in selected]  # without the class token
            return torch.cat(selected, -1)

    def identity(self) -> dict[str, Any]:
        """Return everything that affects a feature, for the fingerprint of the store."""
        return {
            "tower": self.tower.config.to_dict(),
            "weights": hash_weights(self.tower),
            "preprocess": {**self.transform.preprocess.to_dict(), "pad": self.transform.pad},
            "layer": self.config.vision_feature_layer,
            "patches": self.tokens,
            "low": self.bf16,
        }

    def encode_images(self, images: list[Any]) -> Tensor:
        """Encode transformed images to (N, tokens * feature size) float32 on the CPU."""
        return self(torch.stack(images)).float().flatten(1).cpu()


def cache_patch_features(
    refs: Sequence[ImageRef], features: PatchFeatures, folder: Path, log: SkipLog, workers: int | None = None
) -> EmbeddingStore:
    """Compute the patch features that the store at `folder` lacks, and return the store (float16).

    Raises:
        StoreError: the store holds features of another tower.
    """
    bytes_per_image = 2 * features.embed_dim
    shard_size = max(1, min(MAX_SHARD_IMAGES, MAX_SHARD_BYTES // bytes_per_image))
    return store_image_features(
        refs, features, features.identity(), folder, log, batch_size=32, workers=workers, shard_size=shard_size
    )


class PrecomputedVision(nn.Module):
    """Replacement for the vision tower that returns precomputed patch features in the form the model expects.

    The model must select the last layer and all tokens: see `LlavaCollator`.
    """

    def __init__(self, feature_maps: bool) -> None:
        """
        Args:
            feature_maps: return features channels first, as FastVLM reads them.
        """
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Wrap patch features (N, tokens, feature size) as a tower's output."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        last: Any = pixel_values.transpose(1, 2) if self.feature_maps else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=(pixel_values,))
