"""Parameter groups, learning rates, compilation, and gradient caching on several ranks."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from align_fixtures import ALIGN, fresh_model
from conftest import run_distributed
from llm2clip.config import AlignConfig
from llm2clip.models.precision import use_tf32_matmul
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.runs.ranks import full_tensor
from llm2clip.train.optim import (
    WEIGHT_DECAY,
    compute_cached_loss,
    make_cosine_schedule,
    make_optimizer,
    make_parameter_groups,
    select_trainable_weights,
)

CONFIG = AlignConfig(lr=1e-2, tower_lr=1e-3, layer_decay=0.5, loss="sigmoid")


def test_parameter_groups_set_rate_and_weight_decay_of_each_part() -> None:
    model = fresh_model(CONFIG, tower="test_efficientnet")
    select_trainable_weights(model, CONFIG)
    group_of = {id(p): group for group in make_parameter_groups(model, CONFIG) for p in group["params"]}
    assert len(group_of) == sum(1 for _ in model.parameters())
    assert group_of[id(model.projection.weight)]["lr"] == group_of[id(model.adapter.out.weight)]["lr"] == 1e-2
    assert group_of[id(model.adapter.out.weight)]["weight_decay"] == WEIGHT_DECAY
    assert group_of[id(model.adapter.out.bias)]["weight_decay"] == 0
    for scalar in (model.logit_scale, model.logit_bias):
        assert group_of[id(scalar)]["lr"] == 1e-2 and group_of[id(scalar)]["weight_decay"] == 0
    assert all(group_of[id(p)]["lr"] <= 1e-3 for p in model.tower.parameters())


@pytest.mark.parametrize("tower", ["timm:test_vit", "clip_vision_model"])
def test_layer_decay_gives_the_final_norm_the_full_rate_and_the_top_block_one_decay(
    tower: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if tower == "clip_vision_model":
        folder = tmp_path_factory.mktemp("clip")
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 32}
        CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=6, patch_size=16)).save_pretrained(folder)
        vision_tower = VisionTower.from_pretrained(folder)
        stem, block, norm = "backbone.embeddings.", "backbone.encoder.layers.{}.", "backbone.post_layernorm.weight"
    else:
        vision_tower = VisionTower.from_pretrained(tower, pretrained=False)
        stem, block, norm = "backbone.patch_embed.", "backbone.blocks.{}.", "backbone.norm.weight"
    model = fresh_model()
    model.tower = vision_tower
    select_trainable_weights(model, CONFIG)
    lr_of = {id(p): group["lr"] for group in make_parameter_groups(model, CONFIG) for p in group["params"]}
    lrs = {name: lr_of[id(p)] for name, p in vision_tower.named_parameters() if p.requires_grad}
    assert lrs[norm] == 1e-3
    for n in range(6):
        block_lrs = {lr for name, lr in lrs.items() if name.startswith(block.format(n))}
        assert len(block_lrs) == 1 and block_lrs.pop() == pytest.approx(1e-3 * 0.5 ** (6 - n))
    stem_lrs = {lr for name, lr in lrs.items() if name.startswith(stem)}
    assert len(stem_lrs) == 1 and stem_lrs.pop() == pytest.approx(1e-3 * 0.5**7)


def test_position_embeddings_and_class_tokens_have_no_weight_decay(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    CLIPVisionModel(CLIPVisionConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "clip")
    SiglipVisionModel(SiglipVisionConfig(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "siglip")
    Dinov2Model(Dinov2Config(**sizes, num_hidden_layers=1)).save_pretrained(tmp_path / "dino")
    towers = {
        "timm:test_vit": {"pos_embed", "cls_token"},
        "timm:test_eva": {"pos_embed", "cls_token"},
        str(tmp_path / "clip"): {"embeddings.class_embedding", "embeddings.position_embedding.weight"},
        str(tmp_path / "siglip"): {"embeddings.position_embedding.weight"},
        str(tmp_path / "dino"): {"embeddings.cls_token", "embeddings.position_embeddings"},
    }
    if not timm.is_model("test_eva"):
        towers["timm:eva02_tiny_patch14_224"] = towers.pop("timm:test_eva")
    for tower, expected in towers.items():
        model = fresh_model()
        model.tower = VisionTower.from_pretrained(tower, pretrained=not tower.startswith("timm:"))
        select_trainable_weights(model, CONFIG)
        decay_of = {
            id(p): group["weight_decay"] for group in make_parameter_groups(model, CONFIG) for p in group["params"]
        }
        without = set()
        for name, parameter in model.tower.named_parameters():
            if parameter.requires_grad and decay_of[id(parameter)] == 0 and not name.endswith("bias"):
                is_vector = parameter.ndim < 2 and "embedding" not in name
                without |= set() if is_vector else {name.removeprefix("backbone.")}
        assert without == expected, tower


def test_layer_decay_is_rejected_for_towers_without_ordered_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = fresh_model()
    names = [name for name, _ in model.tower.named_parameters()]
    monkeypatch.setattr(VisionTower, "get_parameter_depths", lambda self: dict.fromkeys(names, 0))
    with pytest.raises(ValueError, match="layer_decay cannot be less than 1"):
        make_parameter_groups(model, CONFIG)
    groups = make_parameter_groups(model, replace(CONFIG, layer_decay=1.0))
    assert {group["lr"] for group in groups} == {1e-2, 1e-3}


def test_cached_loss_gradients_equal_those_of_a_single_pass() -> None:
    """Parts of different sizes, dropout, an output that the loss does not use, and a gradient of the loss of 3."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3)), torch.randn(7, 4)
    passes: list[Any] = [lambda part=part: (model(part), 2 * model(part)) for part in x.split([4, 3])]

    def contrastive_loss(embeddings: Tensor, unused: Tensor) -> Tensor:
        return F.cross_entropy(embeddings @ embeddings.T, torch.arange(7).flip(0))

    results = []
    for cached in (False, True):
        torch.manual_seed(1)
        if cached:
            loss = compute_cached_loss(passes, contrastive_loss, model, torch.device("cpu"))
        else:
            loss = contrastive_loss(*map(torch.cat, zip(*[run() for run in passes], strict=True)))
        model.zero_grad()
        (3 * loss).backward()
        gradients = [p.grad for p in model.parameters()]
        results.append([loss.detach(), *gradients, torch.rand(1)])  # the random state must be restored, too
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize(("steps", "warmup"), [(10, 0), (1, 0), (7, 1), (40, 10), (5, 5)])
def test_cosine_schedule_equals_that_of_the_authors(steps: int, warmup: int) -> None:
    expected = []
    for step in range(steps):  # warmup_cosine_lr in training/scheduler.py
        if step < warmup:
            expected.append((step + 1) / warmup)
        else:
            expected.append(0.5 * (1 + np.cos(np.pi * (step - warmup) / (steps - warmup))))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_cosine_schedule(steps, warmup / steps))
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected, abs=1e-12)


def test_adamw_is_fused_on_gpus() -> None:
    model = fresh_model()
    for device, expected in (("cpu", None), ("cuda:0", True)):
        assert make_optimizer(model, ALIGN, torch.device(device)).defaults["fused"] is expected


def test_tf32_matmul_is_limited_to_the_block_and_to_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    for available, expected in ((False, before), (True, "high")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        with use_tf32_matmul():
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before


# ---- gradient caching ------------------------------------------------------------------------------------------------


# The function with which FSDP reduces gradients; the first is new in PyTorch 2.13.
REDUCE_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def test_fsdp_reduces_gradients_once_for_all_passes() -> None:
    run_distributed(2, _compare_passes_on_rank)


def _compare_passes_on_rank() -> None:
    """Compare four passes with a single pass: equal gradients, and equally many reductions."""
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(dist.get_rank()))
    gradients, reductions = [], []
    for size in (8, 2):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        with mock.patch.object(dist, REDUCE_SCATTER, wraps=getattr(dist, REDUCE_SCATTER)) as reduce_scatter:
            for _ in range(2):  # the second step adds to the gradients of the first
                passes = [partial(_run, model, part) for part in inputs.split(size)]
                compute_cached_loss(passes, lambda x: (x @ x.T).logsumexp(1).mean(), model, inputs.device).backward()
        reductions.append(reduce_scatter.call_count)
        gradients.append([full_tensor(parameter.grad) for parameter in model.parameters()])
    assert reductions[0] == reductions[1] > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def _run(model: nn.Module, inputs: Tensor) -> tuple[Tensor]:
    return (model(inputs),)
