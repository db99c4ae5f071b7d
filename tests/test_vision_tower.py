"""Tests of the vision tower with tiny random models of every supported family of timm and transformers."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import CLIPVisionConfig

from llm2clip.data.transforms import PreprocessConfig
from llm2clip.models.precision import FP32
from llm2clip.models.vision.vision_tower import VisionTower, add_tower_lora, merge_tower_lora
from llm2clip.store.encode import TowerEncoder
from llm2clip.train.optim import MIN_COMPILED_STEPS, should_compile

TINY = {"embed_dim": 64, "depth": 3, "num_heads": 2, "img_size": 64}
TIMM: dict[str, dict[str, Any]] = {
    **{f"test_{name}": {} for name in ("vit", "vit3", "efficientnet", "resnet", "convnext", "mambaout")},
    "eva02_base_patch16_clip_224": TINY,
    "eva_giant_patch14_clip_224": TINY | {"img_size": 56, "mlp_ratio": 2.0},  # one fused matmul for q, k and v
    "vit_pe_core_small_patch16_384": TINY,
    "vit_base_patch16_siglip_224": TINY,
    "vit_base_patch16_clip_224": TINY,
}
HF = ["clip", "siglip", "dinov2", "dinov2_with_registers", "dinov3_vit", "metaclip_2"]
VISION_ONLY = ["clip_vision_model", "siglip_vision_model", "metaclip_2_vision_model"]  # the same vision models
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


def save_timm(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=7, **TIMM[name])
    timm.models.save_for_hf(model, folder, model_args=TIMM[name])
    return model.eval()


def save_hf(kind: str, folder: Path, processor: bool = True) -> nn.Module:
    """Save a model of this type as they are published, and return its vision model."""
    import transformers as tf

    torch.manual_seed(0)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 9, "max_position_embeddings": 5, "projection_size": 32}
    metaclip = tf.MetaClip2VisionConfig(**SMALL)
    builders: dict[str, Any] = {
        "clip": lambda: tf.CLIPModel(tf.CLIPConfig(vision_config=SMALL, text_config=text, projection_dim=16)),
        "clip_vision_model": lambda: tf.CLIPVisionModelWithProjection(tf.CLIPVisionConfig(**SMALL)),
        "siglip": lambda: tf.SiglipModel(tf.SiglipConfig(vision_config=SMALL, text_config=text)),
        "siglip_vision_model": lambda: tf.SiglipVisionModel(tf.SiglipVisionConfig(**SMALL)),
        "dinov2": lambda: tf.Dinov2Model(tf.Dinov2Config(**SMALL)),
        "dinov2_with_registers": lambda: tf.Dinov2WithRegistersModel(tf.Dinov2WithRegistersConfig(**SMALL)),
        "dinov3_vit": lambda: tf.DINOv3ViTModel(tf.DINOv3ViTConfig(**SMALL, num_register_tokens=2)),
        "metaclip_2": lambda: tf.MetaClip2Model(tf.MetaClip2Config(vision_config=SMALL, text_config=text)),
        "metaclip_2_vision_model": lambda: tf.MetaClip2VisionModelWithProjection(metaclip),
    }
    model = builders[kind]().eval()
    for parameter in model.parameters():  # also biases and scales, so that swapped ones are noticed
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    model.half().save_pretrained(folder)  # as most published checkpoints
    model.float()
    if processor:
        if kind.startswith("siglip"):
            tf.SiglipImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        else:
            tf.CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=32).save_pretrained(folder)
    return getattr(model, "vision_model", model)


def pixels(size: int, count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def normalized(x: Tensor, preprocess: PreprocessConfig) -> Tensor:
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preprocess.mean, preprocess.std))
    return (x / 255 - mean) / std


def uses_grad_checkpointing(tower: nn.Module) -> bool:
    flags = ("grad_checkpointing", "gradient_checkpointing")
    return any(getattr(module, flag, False) is True for module in tower.modules() for flag in flags)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Folder and original model of each family."""
    root = tmp_path_factory.mktemp("towers")
    families = {name: (root / name, save_timm(name, root / name)) for name in TIMM}
    return families | {kind: (root / kind, save_hf(kind, root / kind)) for kind in [*HF, *VISION_ONLY]}


@pytest.mark.parametrize("family", ["test_vit", *(name for name in TIMM if "eva" in name or "pe_core" in name), *HF])
def test_blocks_of_transformers_compile_once_without_graph_breaks(
    family: str, saved: dict[str, tuple[Path, nn.Module]]
) -> None:
    torch._dynamo.reset()
    tower = VisionTower.from_pretrained(saved[family][0])
    assert should_compile(tower, torch.device("cuda"), MIN_COMPILED_STEPS) and len(tower.get_blocks()) > 1
    x = pixels(tower.preprocess.size)
    expected = tower(x)
    counter = CompileCounter()
    for block in tower.get_blocks():
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    torch.testing.assert_close(tower(x), expected)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("family", [*TIMM, *HF, *VISION_ONLY])
def test_tower_matches_original_model_and_is_rebuilt_from_config(
    family: str, saved: dict[str, tuple[Path, nn.Module]]
) -> None:
    folder, original = saved[family]
    tower = VisionTower.from_pretrained(folder)
    assert not tower.training
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.float32}
    size = tower.preprocess.size
    assert size == (TIMM[family].get("img_size", 160) if family in TIMM else 32)

    x = pixels(size)
    features = tower(x)
    assert features.shape == (2, tower.feature_dim)
    assert torch.equal(features, tower(x / 255))

    # The features equal those of the original model on the same pixels.
    if family in TIMM:
        original.reset_classifier(0)  # type: ignore[operator]
        expected = original(normalized(x, tower.preprocess))
    else:
        expected = original(pixel_values=normalized(x, tower.preprocess)).pooler_output
    # The saved transformers models are in half precision.
    torch.testing.assert_close(features, expected, atol=1e-4 if family in TIMM else 2e-2, rtol=1e-3)
    assert (features[0] - features[1]).abs().max() > 1e-4

    # The config alone rebuilds the architecture; the weights are loaded into it.
    config = json.loads(json.dumps(tower.config))
    assert str(folder.parent) not in json.dumps(config)
    rebuilt = VisionTower.from_config(config)
    assert all(name.startswith("backbone.") for name in tower.state_dict())
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(x), features)
    assert (rebuilt.preprocess, rebuilt.feature_dim) == (tower.preprocess, tower.feature_dim)


@pytest.mark.parametrize("family", [*TIMM, *HF])
def test_gradients_depths_and_grad_checkpointing(family: str, saved: dict[str, tuple[Path, nn.Module]]) -> None:
    tower = VisionTower.from_pretrained(saved[family][0]).train()
    x = pixels(tower.preprocess.size)
    torch.manual_seed(0)
    tower(x).square().sum().backward()
    # DDP waits forever for the gradient of a parameter that gets none.
    assert [n for n, p in tower.named_parameters() if p.requires_grad and p.grad is None] == []

    depths = tower.get_parameter_depths()
    assert depths.keys() == {name for name, _ in tower.named_parameters()}
    assert set(depths.values()) == set(range(tower.num_layers))
    assert tower.num_layers >= 4
    if family in HF:
        assert tower.num_layers == 5
        assert {depths[name] for name in depths if "embeddings" in name or "pre_layr" in name} == {0}
    else:
        first_convolution = next(name for name, p in tower.named_parameters() if p.ndim == 4)
        assert depths[first_convolution] == 0
    if family == "test_vit":
        blocks = [depths[f"backbone.blocks.{i}.attn.qkv.weight"] for i in range(6)]
        assert blocks == list(range(1, 7))

    gradients = {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    tower.set_grad_checkpointing()
    assert uses_grad_checkpointing(tower)
    torch.manual_seed(0)
    tower(x).square().sum().backward()
    for name, parameter in tower.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-3, atol=1e-4 * gradients[name].abs().max()
            )
    tower.set_grad_checkpointing(False)
    assert not uses_grad_checkpointing(tower)


@pytest.mark.parametrize("family", [*TIMM, *HF])
def test_lora_starts_neutral_trains_and_merges(family: str, saved: dict[str, tuple[Path, nn.Module]]) -> None:
    """LoRA changes no feature at first, all of its weights get gradients, and merging keeps the features."""
    tower = VisionTower.from_pretrained(saved[family][0])
    names, x = list(tower.state_dict()), pixels(tower.preprocess.size)
    for name, parameter in tower.named_parameters():
        if parameter.ndim == 1 and "bias" not in name:  # layer scales of untrained models may be zero
            nn.init.ones_(parameter)
    with torch.no_grad():
        before = tower(x)
    assert len(tower.get_blocks()) >= 3
    add_tower_lora(tower, 2, 4)
    torch.testing.assert_close(tower(x), before, atol=1e-5, rtol=1e-5)
    trained = {name: p for name, p in tower.named_parameters() if p.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert tower.get_parameter_depths().keys() == dict(tower.named_parameters()).keys()
    for name, parameter in trained.items():
        if ".lora_B" in name:  # zero at first, so that lora_A would get no gradient
            nn.init.normal_(parameter, std=0.05)
    changed = tower(x)
    changed.square().sum().backward()
    # A layer whose weight the tower reads directly, without LoRA, would have no gradient.
    assert [n for n, p in trained.items() if p.grad is None or not p.grad.abs().sum()] == []
    merge_tower_lora(tower)
    assert list(tower.state_dict()) == names and all(p.requires_grad for p in tower.parameters())
    with torch.no_grad():
        torch.testing.assert_close(tower(x), changed, atol=1e-4 * changed.abs().max().item(), rtol=1e-4)
    assert (changed - before).abs().max() > 1e-4


@torch.no_grad()
@pytest.mark.parametrize("family", [*TIMM, "clip", "siglip", "dinov2", "dinov3_vit", "metaclip_2"])
def test_image_size_option_changes_resolution(family: str, saved: dict[str, tuple[Path, nn.Module]]) -> None:
    folder, _ = saved[family]
    original = VisionTower.from_pretrained(folder)
    size = original.preprocess.size * 3 // 2
    tower = VisionTower.from_pretrained(folder, image_size=size)
    assert tower.preprocess.size == size
    assert tower.preprocess.crop_pct == pytest.approx(original.preprocess.crop_pct)
    x = pixels(size)
    assert tower(x).shape == (2, original.feature_dim)
    rebuilt = VisionTower.from_config(json.loads(json.dumps(tower.config)))
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(x), tower(x))
    # The pretrained weights are loaded: an image of a single colour has similar features at both sizes.
    plain = torch.full((1, 3, 1, 1), 200, dtype=torch.uint8)
    both = [t(plain.expand(1, 3, t.preprocess.size, t.preprocess.size)) for t in (original, tower)]
    assert torch.cosine_similarity(*both).item() > 0.9


def test_preprocess_is_that_of_the_pretrained_model(
    saved: dict[str, tuple[Path, nn.Module]], capfd: pytest.CaptureFixture[str]
) -> None:
    vit = VisionTower.from_pretrained(saved["test_vit"][0]).preprocess
    assert vit == PreprocessConfig(160, "shortest", 0.95, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    assert VisionTower.from_pretrained(saved["test_resnet"][0]).preprocess.interpolation == "bilinear"
    clip = VisionTower.from_pretrained(saved["clip"][0]).preprocess
    assert (clip.size, clip.resize_size, clip.resize, clip.mean[0]) == (32, 36, "shortest", 0.48145466)
    assert capfd.readouterr() == ("", ""), "transformers would list the weights of the text model as unexpected"
    siglip = VisionTower.from_pretrained(saved["siglip"][0]).preprocess
    assert (siglip.size, siglip.resize_size, siglip.resize, siglip.mean[0]) == (32, 32, "squash", 0.5)


def test_missing_preprocessor_config_falls_back_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_hf("dinov2", tmp_path, processor=False)
    with caplog.at_level(logging.WARNING):
        tower = VisionTower.from_pretrained(tmp_path)
    assert "has no preprocessor_config.json" in caplog.text
    assert tower.preprocess == PreprocessConfig(
        32, "shortest", 0.875, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), crop_rounding="down"
    )


def test_from_pretrained_resolves_names(tmp_path: Path, saved: dict[str, tuple[Path, nn.Module]]) -> None:
    for name in ("test_resnet", "timm:test_resnet", "timm:test_resnet.r160_in1k"):
        tower = VisionTower.from_pretrained(name, pretrained=False)
        assert (tower.config["library"], tower.config["architecture"]) == ("timm", "test_resnet")
    for prefix, family in (("timm:", "test_vit"), ("hf:", "clip"), ("", "clip")):
        named = VisionTower.from_pretrained(f"{prefix}{saved[family][0]}")
        assert torch.equal(*(next(t.parameters()) for t in (named, VisionTower.from_pretrained(saved[family][0]))))
    random = VisionTower.from_pretrained(f"hf:{saved['clip'][0]}", pretrained=False)
    assert not torch.equal(*(next(t.parameters()) for t in (random, VisionTower.from_pretrained(saved["clip"][0]))))

    for name in ("no_such_model", "test_resnet.no_such_tag"):
        with pytest.raises(ValueError, match="no_such"):
            VisionTower.from_pretrained(name)
    with pytest.raises(ValueError, match=r"no config\.json"):
        VisionTower.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="neither"):
        VisionTower.from_pretrained(tmp_path)


def test_unsupported_models_are_rejected(tmp_path: Path) -> None:
    import transformers as tf

    args = {"img_size": (64, 48), "depth": 1, "embed_dim": 32, "num_heads": 2}
    model = timm.create_model("vit_base_patch16_clip_224", **args)
    timm.models.save_for_hf(model, tmp_path / "rectangle", model_args=args)
    tf.AutoConfig.for_model("bert").save_pretrained(tmp_path / "bert")
    # SigLIP 2 models with a fixed image size have the model type `siglip`.
    naflex = {name: value for name, value in SMALL.items() if name != "image_size"}
    tf.Siglip2VisionConfig(**naflex).save_pretrained(tmp_path / "naflex")
    messages = {
        "rectangle": "only square images",
        "bert": "Supported types",
        "naflex": "is a NaFlex model, which has no fixed image size",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            VisionTower.from_pretrained(tmp_path / name)


def test_code_in_model_folder_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "configuration_evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.Evil"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"evil|trust_remote_code"):
        VisionTower.from_pretrained(tmp_path)
    assert not marker.exists()


def test_identity_depends_on_added_config_entries_only_if_they_are_set(tmp_path: Path) -> None:
    class NewerConfig(CLIPVisionConfig):
        added_scale: float = 0.0

    save_hf("clip_vision_model", tmp_path)
    encoder = TowerEncoder(VisionTower.from_pretrained(tmp_path), FP32)
    identity, values = encoder.identity(), encoder.tower.backbone.config.to_dict()
    encoder.tower.backbone.config = NewerConfig(**values)
    assert encoder.identity() == identity
    for change in ({"added_scale": 2.0}, {"layer_norm_eps": 1e-3}):
        encoder.tower.backbone.config = NewerConfig(**{**values, **change})
        assert encoder.identity() != identity


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_hf("clip_vision_model", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "layers.1." not in k}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks the model weight .* missing in total"):
        VisionTower.from_pretrained(tmp_path)


def test_batch_norm_is_frozen_in_training() -> None:
    tower = VisionTower.from_pretrained("test_resnet", pretrained=False)
    x = pixels(160, 4)
    before = {name: value.clone() for name, value in tower.state_dict().items() if "running" in name}
    assert before
    tower.train()
    assert tower.training
    features = tower(x)
    assert torch.allclose(features[:1], tower(x[:1]), atol=1e-5)  # images do not depend on each other
    assert all(torch.equal(tower.state_dict()[name], value) for name, value in before.items())

    tower.freeze_norm = False
    tower.train()
    assert not torch.allclose(tower(x)[:1], tower(x[:2])[:1], atol=1e-3)
    assert not all(torch.equal(tower.state_dict()[name], value) for name, value in before.items())
    tower.eval()
    assert not any(module.training for module in tower.modules())

    vit = VisionTower.from_pretrained("test_vit", pretrained=False).train()
    assert all(module.training for module in vit.modules())


@torch.no_grad()
def test_normalization_stays_exact_in_half_precision_and_on_meta(saved: dict[str, tuple[Path, nn.Module]]) -> None:
    tower = VisionTower.from_pretrained(saved["clip"][0])
    expected = tower(pixels(32))
    mean = tower.mean.clone()
    tower.to(torch.bfloat16)
    assert torch.equal(tower.mean, mean)
    assert tower(pixels(32)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.cosine_similarity(tower.float()(pixels(32)).float(), expected).min() > 0.99

    with torch.device("meta"):
        empty = VisionTower.from_config(tower.config)
    assert empty.mean.is_meta
    empty.to_empty(device="cpu")
    assert torch.equal(empty.mean, mean)
