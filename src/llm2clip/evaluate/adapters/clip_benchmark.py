"""Adapter that lets CLIP_benchmark evaluate any model that `open_dual_encoder` can load.

The adapter registers the model type "llm2clip" with CLIP_benchmark:

    python -m llm2clip.evaluate.adapters.clip_benchmark eval --model_type llm2clip --model runs/mine/model \\
        --pretrained none --dataset cifar10 --no_amp

CLIP_benchmark calls a tokenizer and passes its output to the model. This adapter's tokenizer returns the texts
unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder

MODEL_TYPE = "llm2clip"


class RawTexts(list[str]):
    """List of texts that stands in for a token tensor. `.to(device)` returns the list unchanged."""

    def to(self, device: Any) -> RawTexts:
        return self


class CLIPBenchmarkModel(nn.Module):
    """Model with the interface that CLIP_benchmark expects. Embeddings are L2-normalised, float32 of shape (N, D)."""

    def __init__(self, model: DualEncoder, device: torch.device | str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(list(pixels.cpu())).to(self.device)

    def encode_text(self, texts: RawTexts) -> Tensor:
        return self.model.encode_texts(texts).to(self.device)


class ImageTransform:
    """Picklable transform from a PIL image to an input for the model's image encoder."""

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        pixels = self.transform(load_image(image))
        if not isinstance(pixels, Tensor):
            raise TypeError("CLIP_benchmark needs tensors, but this model's image encoder takes PIL images")
        return pixels


def load_model(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[CLIPBenchmarkModel, ImageTransform, type[RawTexts]]:
    """Load a model for CLIP_benchmark. Return the model, its image transform and its tokenizer.

    Args:
        model_name: Model as accepted by `open_dual_encoder`.
        pretrained, cache_dir: Ignored. CLIP_benchmark passes these arguments to every model.
    """
    model = open_dual_encoder(model_name, device)
    return CLIPBenchmarkModel(model, device).eval(), ImageTransform(model.transform), RawTexts


def register_model() -> None:
    """Register the "llm2clip" model type with the installed CLIP_benchmark.

    Raises:
        ImportError: If CLIP_benchmark is not installed.
    """
    from clip_benchmark import models

    models.TYPE2FUNC[MODEL_TYPE] = load_model
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)


if __name__ == "__main__":
    register_model()
    from clip_benchmark.cli import main

    main()
