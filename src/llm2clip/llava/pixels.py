"""What the LLM is shown of a picture: the pixels that the tower takes, or the patch features that it gave for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.cache.features import embed_images
from llm2clip.cache.store import EmbeddingStore
from llm2clip.data.images import EvalTransform, Preprocess
from llm2clip.data.refs import ImageRef
from llm2clip.data.skips import SkipLog
from llm2clip.models.identity import weights_hash


class Pixels:
    """Decoded pictures to the tower's input, as the processor would make it."""

    def __init__(self, processor: Any) -> None:
        preprocess = Preprocess.from_dict(processor.image_processor.to_dict())
        self.transform = EvalTransform(preprocess)
        self.mean = torch.tensor(preprocess.mean).view(3, 1, 1)
        self.std = torch.tensor(preprocess.std).view(3, 1, 1)

    def __call__(self, picture: Tensor) -> Tensor:
        """uint8 (3, H, W) to float32 (3, S, S), normalised."""
        pixels: Tensor = self.transform(picture)
        return (pixels.float() / 255 - self.mean) / self.std


class PatchFeatures:
    """A multimodal model's tower as the side of a store: (tokens * width) numbers a picture, before the projector."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.transform = model.eval(), Pixels(processor)
        size = self.transform.transform.preprocess.size
        self.tokens, self.patch_width = self._seen(torch.zeros(1, 3, size, size)).shape[1:]
        self.width = self.tokens * self.patch_width

    def identity(self) -> dict[str, Any]:
        """All that changes a feature."""
        tower = self.model.model.vision_tower
        return {
            "tower": tower.config.to_dict(),
            "weights": weights_hash(tower),
            "preprocess": self.transform.transform.preprocess.to_dict(),
            "patches": self.tokens,
        }

    @torch.no_grad()
    def encode_pictures(self, pictures: list[Any]) -> Tensor:
        return self._seen(torch.stack(pictures)).float().flatten(1).cpu()

    @torch.no_grad()
    def _seen(self, pixels: Tensor) -> Tensor:
        """What goes into the projector, (N, tokens, width)."""
        found: list[Tensor] = []
        hook = self.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        finally:
            hook.remove()
        return found[0]


def keep_features(
    refs: Sequence[ImageRef], model: Any, processor: Any, folder: Path, log: SkipLog, workers: int | None = None
) -> tuple[EmbeddingStore, int]:
    """The store of pictures' patch features at `folder`, float16, filled where it is not yet; and the tokens of a
    picture.

    Raises:
        StoreError: the store there is another tower's.
    """
    side = PatchFeatures(model, processor)
    size = max(1, min(8192, (1 << 30) // (2 * side.width)))  # shards of a gigabyte at most
    identity = side.identity()
    store = embed_images(refs, side, identity, folder, log, batch=32, workers=workers, shard_size=size)
    return store, side.tokens


class Given(nn.Module):
    """Stands where the tower was: passes on features that it gave before, in the form in which the model expects
    them."""

    def __init__(self, maps: bool) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """(N, tokens, width) as a tower's output."""
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        last: Any = pixel_values.transpose(1, 2) if self.maps else pixel_values
        return BaseModelOutputWithPooling(last_hidden_state=last, hidden_states=(pixel_values, pixel_values))


@contextmanager
def without_tower(model: Any) -> Iterator[None]:
    """The model takes patch features for pixels, with `vision_feature_select_strategy="full"`; its tower waits."""
    tower = model.model.vision_tower
    model.model.vision_tower = Given(maps=model.config.model_type == "fast_vlm")
    try:
        yield
    finally:
        model.model.vision_tower = tower
