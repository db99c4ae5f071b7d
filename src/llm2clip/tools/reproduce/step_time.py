"""Training step times with text embeddings from a cache, CLIP's text tower, or an LLM that runs in every step."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.images import load_image
from llm2clip.data.transforms import EvalTransform
from llm2clip.tools.reproduce.experiments import Experiments
from llm2clip.train.initial_model import create_initial_model
from llm2clip.train.losses import info_nce

# Variants of the training step, named after the source of the text embeddings.
CACHED_TEACHER = "cached teacher"
CLIP_TEXT_TOWER = "CLIP's text tower, also trained"
LLM_IN_LOOP = "LLM in the loop"

# CLIP's text tower pads texts to 77 tokens, and its embedding is the output at the end token.
CLIP_CONTEXT_LENGTH = 77
CLIP_END_TOKEN = 49407


class ClipTextTower(nn.Module):
    """Text tower with the architecture used in CLIP ViT-B/32 (arXiv 2103.00020): 12 layers, width 512, 77 tokens.

    The weights are randomly initialised, because their values do not affect the step time.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.model = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=embed_dim))

    def forward(self, ids: Tensor) -> Tensor:
        """Return L2-normalised embeddings of shape (N, embed_dim), given token ids of shape (N, 77)."""
        return F.normalize(self.model(input_ids=ids).text_embeds.float(), dim=-1)


@dataclass(frozen=True)
class StepTimes:
    """Training step times for each variant."""

    seconds: dict[str, list[float]]  # duration of each step, keyed by variant
    parameters: dict[str, float]  # number of trained parameters in millions, keyed by variant
    batch_size: int  # number of images per step, each with one caption

    def compute_median(self, variant: str) -> float:
        return statistics.median(self.seconds[variant])


@onednn_matmul()
def measure_step_times(experiments: Experiments, name: str) -> StepTimes:
    """Measure training step times for each variant, using the caption encoder called `name`.

    Steps of the variants are interleaved, so other processes on the machine slow down all variants equally.
    """
    config, train = experiments.config, experiments.data.train_records
    records = [record for record in train if record.texts][: config.cost_images]
    texts = [record.texts[0] for record in records]
    store = experiments.embed_texts(name, [text for record in train for text in record.texts])
    encoder = experiments.load_encoder(name)
    model = create_initial_model(experiments.make_align_config(0), store)
    device = model.device
    keep_freed_memory(device)
    text_tower = ClipTextTower(config.embed_dim).to(device)
    transform = EvalTransform(model.tower.preprocess)
    images = [load_image(record.image) for record in records if record.image is not None]
    pixels = torch.stack([transform(image) for image in images]).to(device)
    ids = torch.randint(1, CLIP_END_TOKEN - 1, (len(texts), CLIP_CONTEXT_LENGTH), device=device)
    ids[:, -1] = CLIP_END_TOKEN

    def adapt(embeddings: Tensor) -> Tensor:
        """Map LLM embeddings of shape (N, D) to text embeddings of shape (N, embed_dim)."""
        return cast(Tensor, model(embeddings=embeddings.to(device).float())[1])

    embed_texts: dict[str, Callable[[], Tensor]] = {
        CACHED_TEACHER: lambda: adapt(torch.from_numpy(store.take(store.find_rows(texts)))),
        CLIP_TEXT_TOWER: lambda: text_tower(ids),
        # Autograd does not support inference tensors, so copy the embeddings to a normal tensor.
        LLM_IN_LOOP: lambda: adapt(encoder.encode(texts).clone()),
    }
    model_parameters = list(model.parameters())
    vision_parameters = [*model.tower.parameters(), *model.projection.parameters(), model.logit_scale]
    parameters: dict[str, list[nn.Parameter]] = {
        CACHED_TEACHER: model_parameters,
        CLIP_TEXT_TOWER: [*vision_parameters, *text_tower.parameters()],
        LLM_IN_LOOP: model_parameters,
    }
    optimizers = {variant: torch.optim.AdamW(parameters[variant], lr=1e-6) for variant in embed_texts}
    seconds: dict[str, list[float]] = {variant: [] for variant in embed_texts}
    model.train()
    num_steps = len(embed_texts) * (config.cost_steps + 1)
    for step, variant in zip(range(num_steps), cycle(embed_texts), strict=False):
        start = time.perf_counter()
        image, _, scale, _ = model(pixels)
        info_nce(image, embed_texts[variant](), scale).backward()
        optimizers[variant].step()
        optimizers[variant].zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= len(embed_texts):  # the first step of each variant is a warm-up
            seconds[variant].append(time.perf_counter() - start)
    counts = {variant: sum(p.numel() for p in parameters[variant]) / 1e6 for variant in embed_texts}
    return StepTimes(seconds, counts, batch_size=len(texts))
