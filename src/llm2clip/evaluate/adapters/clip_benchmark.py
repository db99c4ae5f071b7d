"""Any model that `open_dual` opens, in CLIP_benchmark: its own command, with a model type more.

    python -m llm2clip.evaluate.adapters.clip_benchmark eval --model_type llm2clip --model runs/mine/model \\
        --pretrained none --dataset cifar10 --no_amp

CLIP_benchmark gives a tokenizer texts and a model what came of them; here the texts themselves go through.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm2clip.data.images import load_image
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder

NAME = "llm2clip"


class TokenizedTexts(list[str]):
    """Texts where a tensor of tokens is expected: `.to(device)` changes nothing."""

    def to(self, device: Any) -> TokenizedTexts:
        return self


class CLIPBenchmarkModel(nn.Module):
    """`encode_image` of a batch that the transform made, `encode_text` of `Texts`: (N, width) float32, L2-normalised,
    on the device."""

    def __init__(self, model: DualEncoder, device: torch.device | str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.encode_images(list(pixels.cpu())).to(self.device)

    def encode_text(self, texts: TokenizedTexts) -> Tensor:
        return self.model.encode_texts(texts).to(self.device)


class Transform:
    """A PIL picture to what the model's image side takes; it can be pickled."""

    def __init__(self, transform: Callable[[Tensor], Any]) -> None:
        self.transform = transform

    def __call__(self, picture: Any) -> Tensor:
        found = self.transform(load_image(picture))
        if not isinstance(found, Tensor):
            raise TypeError("CLIP_benchmark batches tensors, and this model takes pictures as they are")
        return found


def load_model(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: torch.device | str = "cpu"
) -> tuple[CLIPBenchmarkModel, Transform, type[TokenizedTexts]]:
    """What CLIP_benchmark asks of a model type: a model, a transform, a tokenizer.

    Args:
        model_name: as of `open_dual`.
        pretrained, cache_dir: not used.
        device: where the model runs.
    """
    model = open_dual_encoder(model_name, device)
    return CLIPBenchmarkModel(model, device).eval(), Transform(model.transform), TokenizedTexts


def register_model() -> None:
    """Add the model type to the installed CLIP_benchmark.

    Raises:
        ImportError: it is not installed.
    """
    from clip_benchmark import models

    models.TYPE2FUNC[NAME] = load_model
    if NAME not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(NAME)


if __name__ == "__main__":
    register_model()
    from clip_benchmark.cli import main

    main()
