"""LLaVA image preprocessing, and computation and caching of patch features.

The vision tower is frozen, so `PrecomputedVision` replaces it during training and returns patch features that were
either read from a store or computed just before the forward pass.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from llm2clip.data.image_refs import ImageRef
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.transforms import EvalTransform, Preprocess
from llm2clip.models.loading import hash_weights
from llm2clip.store.encode import store_image_features
from llm2clip.store.store import EmbeddingStore

MAX_SCALE = 8  # maximum length of an image's longer side before padding, as a multiple of the input size


class LlavaTransform:
    """Preprocessing of decoded images that matches a LLaVA model's image processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor.image_processor
        settings = self.processor.to_dict()
        self.preprocess = replace(Preprocess.from_dict(settings), crop_rounding="down")  # as in transformers
        self.transform = EvalTransform(self.preprocess)
        self.mean = torch.tensor(self.preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std).view(3, 1, 1)
        self.pad = bool(settings.get("do_pad"))

    def __call__(self, image: Tensor) -> Tensor:
        """Convert a uint8 image of shape (3, H, W) to normalised float32 pixels of shape (3, S, S)."""
        if self.pad:
            max_side = MAX_SCALE * self.preprocess.resize_size
            longer_side = max(image.shape[-2:])
            if longer_side > max_side:  # padding a very long image to a square would exhaust memory
                shape = [max(1, round(side * max_side / longer_side)) for side in image.shape[-2:]]
                image = resize(image, shape, antialias=True)
            colour = tuple(int(255 * value) for value in self.preprocess.mean)
            image = self.processor.pad_to_square(image, background_color=colour)
        pixels: Tensor = self.transform(image)
        return (pixels.float() / 255 - self.mean) / self.std


def get_patch_feature_size(config: Any) -> int:
    """Return the patch feature dimension for a LLaVA model's config."""
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    size: int = config.vision_config.hidden_size * layers
    return size


class PatchFeatures:
    """Callable that runs a LLaVA model's vision tower and returns the projector's input.

    Implements the `ImageEncoder` protocol from `store/encode.py`.
    """

    def __init__(self, model: Any, processor: Any, bf16: bool = False) -> None:
        """
        Args:
            model: LLaVA model. Its tower is switched to eval mode and stays on its current device.
            bf16: if True, run the tower under bfloat16 autocast.
        """
        self.tower = model.model.vision_tower.eval()
        self.config = model.config
        self.transform = LlavaTransform(processor)
        self.bf16 = bf16
        size = self.transform.preprocess.size
        self.num_tokens, feature_size = self(torch.zeros(1, 3, size, size)).shape[1:]
        self.embed_dim = self.num_tokens * feature_size

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Map pixels of shape (N, 3, S, S) to patch features of shape (N, tokens, feature size)."""
        pixels = pixels.to(self.device, self.tower.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            if self.config.model_type == "fast_vlm":
                feature_map: Tensor = self.tower(pixels).last_hidden_state  # (N, channels, rows, columns)
                return feature_map.flatten(2).transpose(1, 2)
            hidden_states = self.tower(pixels, output_hidden_states=True).hidden_states
            layers = self.config.vision_feature_layer
            selected = [hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            if self.config.vision_feature_select_strategy == "default":
                selected = [state[:, 1:] for state in selected]  # drop the class token
            return torch.cat(selected, -1)

    def identity(self) -> dict[str, Any]:
        """Return all settings that affect the features, and a hash of the weights, for the store's fingerprint."""
        return {
            "tower": self.tower.config.to_dict(),
            "weights": hash_weights(self.tower),
            "preprocess": {**self.transform.preprocess.to_dict(), "pad": self.transform.pad},
            "layer": self.config.vision_feature_layer,
            "patches": self.num_tokens,
            "low": self.bf16,
        }

    def encode_images(self, images: list[Any]) -> Tensor:
        """Encode preprocessed images as a float32 CPU tensor of shape (N, tokens * feature size)."""
        return self(torch.stack(images)).float().flatten(1).cpu()


def cache_patch_features(
    refs: Sequence[ImageRef], features: PatchFeatures, folder: Path, log: SkipLog, workers: int | None = None
) -> EmbeddingStore:
    """Add missing patch features to the float16 store in `folder` and return the store.

    Raises:
        StoreError: the store contains a different tower's features.
    """
    return store_image_features(refs, features, features.identity(), folder, log, batch_size=32, workers=workers)


class PrecomputedVision(nn.Module):
    """Replacement for the vision tower that returns precomputed patch features in the format that the model expects.

    The model inputs must select the last layer and all tokens, as in `LlavaCollator`.
    """

    def __init__(self, feature_maps: bool) -> None:
        """
        Args:
            feature_maps: if True, return channels-first features, as FastVLM expects.
        """
        super().__init__()
        self.feature_maps = feature_maps

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Wrap patch features of shape (N, tokens, feature size) in the output type of a vision tower."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        last: Any = pixel_values.transpose(1, 2) if self.feature_maps else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=(pixel_values,))
