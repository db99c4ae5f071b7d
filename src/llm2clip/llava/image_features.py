"""What the LLM is shown of a picture: the tower's input, and the patch features that it gives for it.

The tower is frozen in training, so it stands outside of the model that learns: `Given` is in its place and passes on
its features, which come from a store, or from the tower a moment before.
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

SHARD = 1 << 30  # bytes of a shard of features, at most


class LlavaImageProcessor:
    """Decoded pictures to the tower's input, as the processor makes it."""

    def __init__(self, processor: Any) -> None:
        settings = processor.image_processor.to_dict()
        self.preprocess = Preprocess.from_dict(settings)
        self.transform = EvalTransform(self.preprocess)
        self.mean = torch.tensor(self.preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(self.preprocess.std).view(3, 1, 1)
        self.pad = bool(settings.get("do_pad"))

    def __call__(self, picture: Tensor) -> Tensor:
        """uint8 (3, H, W) to float32 (3, S, S), normalised."""
        if self.pad:
            most = 8 * self.preprocess.resize_size
            if max(picture.shape[-2:]) > most:  # or the square of a long one would fill the memory
                picture = resize_shortest(picture, most)
            picture = pad_to_square(picture, [int(255 * value) for value in self.preprocess.mean])
        pixels: Tensor = self.transform(picture)
        return (pixels.float() / 255 - self.mean) / self.std


def resize_shortest(picture: Tensor, most: int) -> Tensor:
    """A picture (3, H, W) so small that its longer side is `most`."""
    height, width = picture.shape[-2:]
    part = most / max(height, width)
    return resize(picture, [max(1, round(height * part)), max(1, round(width * part))], antialias=True)


def pad_to_square(picture: Tensor, colour: Sequence[int]) -> Tensor:
    """A picture (3, H, W) in the middle of a square of a colour, as LLaVA-1.5 sees it. What the tower's own
    preparation crops (a crop_pct below 1) is cut off all the same."""
    height, width = picture.shape[-2:]
    side = max(height, width)
    left, above = (side - width) // 2, (side - height) // 2
    return pad(picture, [left, above, side - width - left, side - height - above], fill=list(colour))


def patch_feature_size(config: Any) -> int:
    """The width of a patch's features, of a multimodal model's config."""
    layers = 1 if isinstance(config.vision_feature_layer, int) else len(config.vision_feature_layer)
    width: int = config.vision_config.hidden_size * layers
    return width


class PatchFeatures:
    """A multimodal model's tower: pixels to what goes into the projector, (N, tokens, width)."""

    def __init__(self, model: Any, processor: Any, low: bool = False) -> None:
        """
        Args:
            model: its tower is put in eval mode, and keeps its device.
            processor: of the model.
            low: multiply in bf16.
        """
        self.tower, self.config, self.transform, self.low = (
            model.model.vision_tower.eval(), model.config, LlavaImageProcessor(processor), low,
        )  # fmt: skip
        size = self.transform.preprocess.size
        self.tokens, width = self(torch.zeros(1, 3, size, size)).shape[1:]
        self.embed_dim = self.tokens * width

    @property
    def device(self) -> torch.device:
        return next(self.tower.parameters()).device

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, self.tower.dtype)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            if self.config.model_type == "fast_vlm":
                found: Tensor = self.tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
                return found
            states = self.tower(pixels, output_hidden_states=True).hidden_states
            layers = self.config.vision_feature_layer
            chosen = [states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
            if self.config.vision_feature_select_strategy == "default":
                chosen = [state[:, 1:] for state in chosen]
            return torch.cat(chosen, -1)

    def identity(self) -> dict[str, Any]:
        """All that changes a feature."""
        return {
            "tower": self.tower.config.to_dict(),
            "weights": hash_weights(self.tower),
            "preprocess": {**self.transform.preprocess.to_dict(), "pad": self.transform.pad},
            "layer": self.config.vision_feature_layer,
            "patches": self.tokens,
            "low": self.low,
        }

    def encode_images(self, pictures: list[Any]) -> Tensor:
        """As the side of a store: (N, tokens * width) float32 on the CPU."""
        return self(torch.stack(pictures)).float().flatten(1).cpu()


def cache_patch_features(
    refs: Sequence[ImageRef], side: PatchFeatures, folder: Path, log: SkipLog, workers: int | None = None
) -> EmbeddingStore:
    """The store of pictures' patch features at `folder`, float16, filled where it is not yet.

    Raises:
        StoreError: the store there is another tower's.
    """
    size = max(1, min(8192, SHARD // (2 * side.embed_dim)))
    return store_image_features(refs, side, side.identity(), folder, log, batch_size=32, workers=workers, shard_size=size)


class PrecomputedVision(nn.Module):
    """Stands where the tower was: passes on features that it gave, in the form in which the model expects them. It is
    asked for the last layer, and for all of its tokens: see `Collate`."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """(N, tokens, width) as a tower's output."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        last: Any = pixel_values.transpose(1, 2) if self.maps else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=(pixel_values,))
