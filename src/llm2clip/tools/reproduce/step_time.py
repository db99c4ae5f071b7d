"""Duration of training steps with each source of text embeddings.

The sources are cached teacher embeddings, CLIP's own text tower, and the LLM in the training loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.images import load_image
from llm2clip.data.transforms import EvalTransform
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.pipeline import new_model
from llm2clip.tools.reproduce.experiments import Experiments
from llm2clip.train.losses import info_nce

# Variants of the training step, which differ in the source of the text embeddings.
CACHED_TEACHER = "cached teacher"
CLIP_TEXT_TOWER = "CLIP's text tower, trained too"
LLM_IN_LOOP = "LLM in the loop"

# CLIP's text tower pads texts to 77 tokens and pools the output of the end token.
CLIP_CONTEXT_LENGTH = 77
CLIP_END_TOKEN = 49407


class ClipTextTower(nn.Module):
    """Text tower with the architecture of CLIP ViT-B/32 (arXiv 2103.00020): 12 layers, width 512, 77 tokens.

    The weights are initialised randomly, because their values do not affect the step time.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.model = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Return L2-normalised embeddings (N, embed_dim) for token ids (N, 77)."""
        return F.normalize(self.model(input_ids=ids).text_embeds.float(), dim=-1)


@dataclass(frozen=True)
class StepTimes:
    """Measured durations of the training steps of each variant.

    Args:
        seconds: Duration of each step in seconds, keyed by variant.
        parameters: Number of trained parameters in millions, keyed by variant.
        batch_size: Number of images per step, each with one caption.
    """

    seconds: dict[str, list[float]]
    parameters: dict[str, float]
    batch_size: int

    def median(self, variant: str) -> float:
        """Return the median step time of a variant, in seconds."""
        return statistics.median(self.seconds[variant])


@onednn_matmul()
def measure_step_times(experiments: Experiments, name: str) -> StepTimes:
    """Measure the duration of training steps for each variant.

    The variants alternate, so that other load on the machine affects all of them equally.

    Args:
        experiments: Experiments that provide the data, the stores and the caption encoders.
        name: Name of the caption encoder to use.
    """
    config, train = experiments.config, experiments.data.train
    records = [record for record in train if record.texts][: config.cost_images]
    texts = [record.texts[0] for record in records]
    store = experiments.store(name, [text for record in train for text in record.texts])
    encoder = experiments.encoder(name)
    model = new_model(experiments.align_config(0), store)
    device = model.device
    keep_freed_memory(device)
    text_tower = ClipTextTower(config.embed_dim).to(device)
    transform = EvalTransform(model.tower.preprocess)
    images = [load_image(record.image) for record in records if record.image is not None]
    pixels = torch.stack([transform(image) for image in images]).to(device)
    ids = torch.randint(1, CLIP_END_TOKEN - 1, (len(texts), CLIP_CONTEXT_LENGTH), device=device)
    ids[:, -1] = CLIP_END_TOKEN

    losses: dict[str, Callable[[], Tensor]] = {
        CACHED_TEACHER: lambda: _loss(model, pixels, torch.from_numpy(store.take(store.rows(texts)))),
        CLIP_TEXT_TOWER: lambda: _loss_with_text_tower(model, text_tower, pixels, ids),
        LLM_IN_LOOP: lambda: _loss(model, pixels, _encode(encoder, texts)),
    }
    model_parameters = list(model.parameters())
    vision_parameters = [*model.tower.parameters(), *model.projection.parameters(), model.logit_scale]
    parameters: dict[str, list[nn.Parameter]] = {
        CACHED_TEACHER: model_parameters,
        CLIP_TEXT_TOWER: [*vision_parameters, *text_tower.parameters()],
        LLM_IN_LOOP: model_parameters,
    }
    optimizers = {variant: torch.optim.AdamW(parameters[variant], lr=1e-6) for variant in losses}
    seconds: dict[str, list[float]] = {variant: [] for variant in losses}
    model.train()
    num_steps = len(losses) * (config.cost_steps + 1)
    for step, variant in zip(range(num_steps), cycle(losses), strict=False):
        start = time.perf_counter()
        losses[variant]().backward()
        optimizers[variant].step()
        optimizers[variant].zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= len(losses):  # the first step of each variant is a warm-up
            seconds[variant].append(time.perf_counter() - start)
    counts = {variant: sum(p.numel() for p in parameters[variant]) / 1e6 for variant in losses}
    return StepTimes(seconds, counts, batch_size=len(texts))


def _loss(model: LLM2CLIP, pixels: Tensor, embeddings: Tensor) -> Tensor:
    """Return the loss for images and the LLM embeddings of their captions, (N, D)."""
    image, text, scale, _ = model(pixels, embeddings.to(model.device).float())
    assert image is not None and text is not None
    return info_nce(image, text, scale)


def _loss_with_text_tower(model: LLM2CLIP, text_tower: ClipTextTower, pixels: Tensor, ids: Tensor) -> Tensor:
    """Return the loss for images and token ids, (N, 77), which are encoded by CLIP's text tower."""
    image, _, scale, _ = model(pixels)
    assert image is not None
    return info_nce(image, text_tower(ids), scale)


def _encode(encoder: CaptionEncoder, texts: list[str]) -> Tensor:
    # Autograd does not support inference tensors, so copy the embeddings to a normal tensor.
    return encoder.encode(texts).clone()
