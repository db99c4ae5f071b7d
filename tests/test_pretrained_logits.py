"""Logit scale and bias that `align` inherits from the tower's CLIP checkpoint."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel, SiglipConfig, SiglipModel

from llm2clip.config import AlignConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.pretrained_clip import read_pretrained_logits
from llm2clip.train.initial_model import new_model

TEXT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 32,
}
VISION: dict[str, Any] = {**TEXT, "image_size": 32, "patch_size": 16}


class _Store:
    """Stands in for an embedding store, of which `new_model` reads only these attributes."""

    embed_dim = 8
    manifest: ClassVar[dict[str, Any]] = {"identity": {}}


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A transformers CLIP model with logit scale 80."""
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=8))
    torch.nn.init.constant_(model.logit_scale, math.log(80))
    model.save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


def make_model(tower: Path, **settings: Any) -> LLM2CLIP:
    return new_model(AlignConfig(tower=str(tower), embed_dim=12, **settings), _Store())  # type: ignore[arg-type]


def test_logit_scale_of_a_clip_checkpoint_is_inherited(clip: Path) -> None:
    assert read_pretrained_logits(str(clip)) == (pytest.approx(80, rel=1e-6), None)
    *_, scale, bias = make_model(clip, logit_scale="inherit")()
    assert scale.item() == pytest.approx(80, rel=1e-5) and bias.item() == 0


def test_logit_scale_is_read_from_a_sharded_checkpoint(clip: Path) -> None:
    CLIPModel.from_pretrained(clip).save_pretrained(clip.parent / "shards", max_shard_size="4KB")
    assert (clip.parent / "shards" / "model.safetensors.index.json").is_file()
    assert read_pretrained_logits(str(clip.parent / "shards"))[0] == pytest.approx(80, rel=1e-6)


def test_siglip_scale_is_clamped_and_its_bias_is_inherited_with_the_sigmoid_loss(tmp_path: Path) -> None:
    model = SiglipModel(SiglipConfig(text_config=TEXT, vision_config=VISION))
    torch.nn.init.constant_(model.logit_scale, math.log(112.7))
    torch.nn.init.constant_(model.logit_bias, -16.5)
    model.save_pretrained(tmp_path)
    *_, scale, bias = make_model(tmp_path, logit_scale="inherit", loss="sigmoid")()
    assert (scale.item(), bias.item()) == (pytest.approx(100, rel=1e-5), -16.5)
    assert make_model(tmp_path, logit_scale="inherit").logit_bias is None


def test_logit_scale_of_a_timm_tower_is_read_from_the_open_clip_file(tmp_path: Path) -> None:
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": {"input_size": [3, 160, 160]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"visual.trunk.norm.weight": torch.ones(4)}, tmp_path / "model.safetensors")
    save_file({"logit_scale": torch.tensor(math.log(50.0))}, tmp_path / "open_clip_model.safetensors")
    assert read_pretrained_logits(f"timm:{tmp_path}")[0] == pytest.approx(50, rel=1e-6)


@pytest.mark.parametrize("name", ["vision folder", "test_vit", "no_such_model"])
def test_tower_without_logit_scale_is_an_error_that_suggests_a_number(name: str, tmp_path: Path) -> None:
    if name == "vision folder":
        CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(tmp_path)
        name = str(tmp_path)
    with pytest.raises(ValueError, match="contains no logit scale"):
        read_pretrained_logits(name)


@pytest.mark.parametrize(
    ("loss", "setting", "expected"),
    [("infonce", None, 1 / 0.07), ("sigmoid", None, 10), ("infonce", 30.0, 30), ("sigmoid", 100, 100)],
)
def test_logit_scale_setting(clip: Path, loss: Any, setting: float | None, expected: float) -> None:
    *_, scale, bias = make_model(clip, loss=loss, logit_scale=setting)()
    assert scale.item() == pytest.approx(expected, rel=1e-5)
    assert bias.item() == (-10 if loss == "sigmoid" else 0)


@pytest.mark.parametrize("value", [0.5, 101])
def test_logit_scale_out_of_range_is_an_error(value: float) -> None:
    with pytest.raises(ValueError, match="must be between 1 and 100"):
        AlignConfig(logit_scale=value)
