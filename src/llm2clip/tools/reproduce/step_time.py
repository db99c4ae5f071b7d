"""What a step of training costs: with the cached teacher, as CLIP is fine-tuned, and with the LLM in the loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.images import load_image
from llm2clip.data.transforms import EvalTransform
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.pipeline import new_model
from llm2clip.tools.reproduce.experiments import Experiments
from llm2clip.train.losses import info_nce


class ClipTextTower(nn.Module):
    """The text tower of CLIP ViT-B/32 (arXiv 2103.00020): 12 blocks, 512 wide, 77 tokens; its weights at random, which
    cost what trained ones do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        self.model = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=width))

    def forward(self, ids: Tensor) -> Tensor:
        return F.normalize(self.model(input_ids=ids).text_embeds.float(), dim=-1)


@onednn_matmul()
def measure_step_times(lab: Experiments, name: str) -> dict[str, Any]:
    """Seconds of a training step of the whole tower, way by way, the ways by turns, so that what else the machine does
    meets all of them.

    Args:
        lab: the run.
        name: of the caption encoder.

    Returns:
        "cached teacher", "CLIP's text tower trained along", "LLM in the loop": the median of the steps, and all of
        them under "steps"; "images" and "captions" of a step; "parameters" of what is trained, in millions, by way.
    """
    config, records = lab.config, lab.sets.train
    chosen = [r for r in records if r.texts][: config.cost_images]
    texts, count = [r.texts[0] for r in chosen], len(chosen)
    store, encoder = lab.store(name, [t for r in records for t in r.texts]), lab.encoder(name)
    model = new_model(lab.align_config(0), store)
    keep_freed_memory(model.device)
    tower = ClipTextTower(config.embed_dim).to(model.device)
    transform = EvalTransform(model.tower.preprocess)
    pixels = torch.stack([transform(load_image(r.image)) for r in chosen if r.image is not None]).to(model.device)
    ids = torch.randint(1, 49406, (count, 77), device=model.device)  # CLIP reads every text as 77 tokens
    ids[:, -1] = 49407  # the end, where the tower's vector is read
    ways: dict[str, tuple[list[nn.Parameter], Callable[[], Tensor]]] = {
        "cached teacher": (
            list(model.parameters()),
            lambda: _loss(model, pixels, torch.from_numpy(store.take(store.rows(texts)))),
        ),
        "CLIP's text tower trained along": (
            [*_vision(model), *tower.parameters()],
            lambda: _with_tower(model, tower, pixels, ids),
        ),
        "LLM in the loop": (
            list(model.parameters()),
            lambda: _loss(model, pixels, _encoded(encoder, texts)),
        ),
    }
    optimizers = {way: torch.optim.AdamW(parameters, lr=1e-6) for way, (parameters, _) in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    model.train()
    for n, way in zip(range(len(ways) * (config.cost_steps + 1)), cycle(ways), strict=False):
        start = time.perf_counter()
        ways[way][1]().backward()
        optimizers[way].step()
        optimizers[way].zero_grad()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        if n >= len(ways):  # the first of each warms up
            times[way].append(time.perf_counter() - start)
    found: dict[str, Any] = {way: statistics.median(some) for way, some in times.items()}
    trained = {way: sum(p.numel() for p in parameters) / 1e6 for way, (parameters, _) in ways.items()}
    return found | {"steps": times, "images": count, "captions": len(texts), "parameters": trained}


def _vision(model: LLM2CLIP) -> list[nn.Parameter]:
    return [*model.tower.parameters(), *model.projection.parameters(), model.logit_scale]


def _loss(model: LLM2CLIP, pixels: Tensor, embeddings: Tensor) -> Tensor:
    image, text, scale, _ = model(pixels, embeddings.to(model.device).float())
    assert image is not None and text is not None
    return info_nce(image, text, scale)


def _with_tower(model: LLM2CLIP, tower: ClipTextTower, pixels: Tensor, ids: Tensor) -> Tensor:
    image, _, scale, _ = model(pixels)
    assert image is not None
    return info_nce(image, tower(ids), scale)


def _encoded(encoder: CaptionEncoder, texts: list[str]) -> Tensor:
    return encoder.encode(texts).clone()  # out of inference mode
