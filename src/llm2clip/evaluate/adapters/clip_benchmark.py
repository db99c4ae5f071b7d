"""Any model that `open_dual_encoder` opens, in CLIP_benchmark, whose command gets an additional model type.

    python -m llm2clip.evaluate.adapters.clip_benchmark eval --model_type llm2clip --model runs/mine/model \\
        --pretrained none --dataset cifar10 --no_amp

CLIP_benchmark calls a tokenizer on texts and passes the result to the model. Here the tokenizer returns the texts
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


class TokenizedTexts(list[str]):
    """Texts in place of a tensor of tokens; `.to(device)` returns them unchanged."""

    def to(self, device: Any) -> TokenizedTexts:
        return self


class CLIPBenchmarkModel(nn.Module):
    """Image and text encoders with CLIP_benchmark's interface: (N, D) float32, L2-normalised, on the device."""

    def __init__(self, model: DualEncoder, device: torch.device | str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(list(pixels.cpu())).to(self.device)

    def encode_text(self, texts: TokenizedTexts) -> Tensor:
        return self.model.encode_texts(texts).to(self.device)


class ImageTransform:
    """Transform of a PIL image to the input of the model's image encoder. It can be pickled."""

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Tensor:
        pixels = self.transform(load_image(image))
        if not isinstance(pixels, Tensor):
            raise TypeError("CLIP_benchmark needs tensors, but this model's image encoder takes PIL images")
        return pixels


def load_model(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[CLIPBenchmarkModel, ImageTransform, type[TokenizedTexts]]:
    """Return what CLIP_benchmark expects of a model type: a model, an image transform and a tokenizer.

    Args:
        model_name: See `open_dual_encoder`.
        pretrained, cache_dir: Not used.
        device: Device of the model.
    """
    model = open_dual_encoder(model_name, device)
    return CLIPBenchmarkModel(model, device).eval(), ImageTransform(model.transform), TokenizedTexts


def register_model() -> None:
    """Add the model type to the installed CLIP_benchmark.

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
