"""Conversion of official checkpoints: strict loading, embeddings equal to independent references, exact round trips."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import TouchOnLoad, make_llm
from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.official_checkpoint import (
    copy_checkpoint_tensors,
    infer_model_config,
    load_official_checkpoint,
    save_official_checkpoint,
)
from llm2clip.models.official_layout import HF, OfficialCheckpoint, get_official_name
from llm2clip.models.published_encoders import TEMPLATE_TOKENS, find_published_template, suggest_published_encoders
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower

TEXT_DIM, EMBED_DIM = 32, 12
CLIP_SIZES = {"width": 64, "depth": 2, "hidden": 96, "patch": 8, "size": 24}
EVA_SIZES = {"width": 128, "depth": 2, "hidden": 341, "patch": 8, "size": 24}
PREFIX = {"hf": "text_adapter.adaptor.", "eva": "text.text_adaptor."}


# ---- official checkpoints, specified by hand ------------------------------------------------------------------------


def adapter_shapes(
    prefix: str, text: int = TEXT_DIM, width: int = EMBED_DIM, depth: int = 4
) -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        named |= {f"{prefix}{i}.ln.weight": (text,), f"{prefix}{i}.ln.bias": (text,)}
        named |= {f"{prefix}{i}.fn.0.weight": (2 * text, text), f"{prefix}{i}.fn.0.bias": (2 * text,)}
        named |= {f"{prefix}{i}.fn.3.weight": (text, 2 * text), f"{prefix}{i}.fn.3.bias": (text,)}
    named |= {f"{prefix}{depth}.weight": (text,), f"{prefix}{depth}.bias": (text,)}
    return named | {f"{prefix}{depth + 1}.weight": (width, text), f"{prefix}{depth + 1}.bias": (width,)}


def clip_shapes(width: int, depth: int, hidden: int, patch: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a CLIP tower's tensors under transformers' names."""
    named: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (width,),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.position_embedding.weight": ((size // patch) ** 2 + 1, width),
    }
    linear = {f"self_attn.{k}_proj": (width, width) for k in "qkv"} | {"self_attn.out_proj": (width, width)}
    linear |= {"mlp.fc1": (hidden, width), "mlp.fc2": (width, hidden)}
    for i in range(depth):
        for name, shape in linear.items():
            named |= {f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]}
        named |= {f"encoder.layers.{i}.layer_norm{n}.{k}": (width,) for n in "12" for k in ("weight", "bias")}
    named |= {f"{norm}.{k}": (width,) for norm in ("pre_layrnorm", "post_layernorm") for k in ("weight", "bias")}
    return {f"vision_model.{name}": shape for name, shape in named.items()}


def eva_shapes(width: int, depth: int, hidden: int, patch: int, size: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of an EVA-02 tower's tensors under the names of LLM2CLIP's version of the EVA-CLIP code."""
    named: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, (size // patch) ** 2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
    }
    norms = {"norm1": width, "norm2": width, "attn.inner_attn_ln": width, "mlp.ffn_ln": hidden}
    linear = {f"attn.{n}": (width, width) for n in ("q_proj", "k_proj", "v_proj", "proj")}
    linear |= {"mlp.w1": (hidden, width), "mlp.w2": (hidden, width), "mlp.w3": (width, hidden)}
    for i in range(depth):
        for name, shape in linear.items():
            named |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        del named[f"blocks.{i}.attn.k_proj.bias"]
        named |= {f"blocks.{i}.{name}.{k}": (n,) for name, n in norms.items() for k in ("weight", "bias")}
    named |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {f"visual.{name}": shape for name, shape in named.items()}


def official_shapes(
    layout: str, text: int = TEXT_DIM, shared: int = EMBED_DIM, **tower: int
) -> dict[str, tuple[int, ...]]:
    if layout == "hf":
        rest = clip_shapes(**tower) | {"visual_projection.weight": (shared, tower["width"])}
    else:
        rest = eva_shapes(**tower) | {"visual.head.weight": (shared, tower["width"]), "visual.head.bias": (shared,)}
    return rest | adapter_shapes(PREFIX[layout], text, shared) | {"logit_scale": ()}


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Return random tensors of these shapes, all different from each other and from their initial values."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor += 1
    tensors["logit_scale"] = torch.tensor(3.25)
    return tensors


def rotary(side: int, head: int = 64, trained: int = 16) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of EVA-02's rotary embedding, each (side * side, head).

    Half of a head's dimensions rotate with the row and half with the column, in pairs. Positions are stretched to the
    grid of the original training, `trained` patches per side.
    """
    frequencies = 10000.0 ** (-torch.arange(0, head // 2, 2) / (head // 2))
    angles = (torch.arange(side) / side * trained)[:, None] * frequencies
    angles = angles.repeat_interleave(2, dim=1)
    row, column = (torch.arange(side * side) // side), (torch.arange(side * side) % side)
    angles = torch.cat([angles[row], angles[column]], dim=1)
    return angles.cos(), angles.sin()


def make_checkpoint(layout: str, seed: int = 0) -> dict[str, Tensor]:
    tensors = random_tensors(official_shapes(layout, **(CLIP_SIZES if layout == "hf" else EVA_SIZES)), seed)
    if layout == "eva":
        cos, sin = rotary(3)
        for owner in ("", "blocks.0.attn.", "blocks.1.attn."):
            tensors |= {f"visual.{owner}rope.freqs_cos": cos, f"visual.{owner}rope.freqs_sin": sin}
    return tensors


def write_checkpoint(tensors: dict[str, Tensor], layout: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "eva":
        torch.save(tensors, folder / "official.pt")
        return folder / "official.pt"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"image_size": 24, "patch_size": 8}
    text = {"model_type": "clip_text_model", "hidden_size": 768}  # present in the published files, but not used
    config = {"model_type": "clip", "projection_dim": EMBED_DIM, "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def pixels(size: int = 24) -> Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(x: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    return (x / 255 - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


# ---- architecture ---------------------------------------------------------------------------------------------------

LARGE_CLIP = {"width": 1024, "depth": 24, "hidden": 4096, "patch": 14}
BASE_CLIP = {"width": 768, "depth": 12, "hidden": 3072, "patch": 16}


@pytest.mark.parametrize(
    ("tower", "size", "count"),
    [(LARGE_CLIP, 336, 578_587_905), (BASE_CLIP, 224, 360_552_193)],
    ids=["L-14-336", "B-16"],
)
def test_infer_config_matches_published_hf_parameter_counts(tower: dict[str, int], size: int, count: int) -> None:
    """The counts on the hub: vision tower, projection to 1280 without bias, adapter from 4096, logit scale."""
    shapes = official_shapes("hf", 4096, 1280, **tower, size=size)
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    with torch.device("meta"):
        checkpoint = OfficialCheckpoint.from_tensors(
            "memory", {name: torch.empty(shape) for name, shape in shapes.items()}, {}
        )
        config = infer_model_config(checkpoint)
        model = LLM2CLIP(config, VisionTower.from_config(config.tower))
        copy_checkpoint_tensors(model, checkpoint)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (config.text_dim, config.embed_dim, config.adapter) == (4096, 1280, AdapterConfig())
    assert config.tower["architecture"]["num_attention_heads"] == tower["width"] // 64
    assert config.tower["architecture"]["hidden_act"] == "quick_gelu"  # as OpenAI trained them
    assert not config.projection_bias


LARGE_EVA, BASE_EVA = LARGE_CLIP | {"hidden": 2730}, BASE_CLIP | {"hidden": 2048}


@pytest.mark.parametrize(
    ("tower", "size", "name", "reference"),
    [
        (LARGE_EVA, 336, "eva02_large_patch14_clip_336", "EVA02-L-14-336"),
        (LARGE_EVA, 224, "eva02_large_patch14_clip_224", "EVA02-L-14"),
        (BASE_EVA, 224, "eva02_base_patch16_clip_224", "EVA02-B-16"),
    ],
)
def test_infer_config_eva_towers_match_open_clip(tower: dict[str, int], size: int, name: str, reference: str) -> None:
    import open_clip

    shapes = official_shapes("eva", 4096, 1280, **tower, size=size)
    with torch.device("meta"):
        checkpoint = OfficialCheckpoint.from_tensors(
            "memory", {name: torch.empty(shape) for name, shape in shapes.items()}, {}
        )
        config = infer_model_config(checkpoint)
        model = LLM2CLIP(config, VisionTower.from_config(config.tower))
        trunk = open_clip.create_model(reference, load_weights=False, device="meta").visual.trunk
        copy_checkpoint_tensors(model, checkpoint)
    assert config.tower["architecture"] == name
    assert config.tower["args"] == {"num_classes": 0, "img_size": size}
    theirs = {n: p.shape for n, p in trunk.named_parameters() if not n.startswith("head.")}
    assert {n: p.shape for n, p in model.tower.backbone.named_parameters()} == theirs
    assert model.tower.backbone.blocks[0].attn.num_heads == trunk.blocks[0].attn.num_heads == tower["width"] // 64
    assert model.projection.bias is not None and model.projection.weight.shape == (1280, tower["width"])
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(math.prod(shape) for shape in shapes.values())
    if size == 336:
        assert count == 578_727_361
    assert model.tower.preprocess.resize_size == size  # timm's own setting at 224 crops 10% off


# ---- embeddings -----------------------------------------------------------------------------------------------------


def adapter_reference(w: dict[str, Tensor], prefix: str, x: Tensor, normalise: bool = True) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (TEXT_DIM,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = x / x.norm(dim=1, keepdim=True) if normalise else x
    for i in range(4):
        hidden = norm(x, f"{prefix}{i}.ln") @ w[f"{prefix}{i}.fn.0.weight"].T + w[f"{prefix}{i}.fn.0.bias"]
        x = x + F.gelu(hidden) @ w[f"{prefix}{i}.fn.3.weight"].T + w[f"{prefix}{i}.fn.3.bias"]
    x = norm(x, f"{prefix}4") @ w[f"{prefix}5.weight"].T + w[f"{prefix}5.bias"]
    return x / x.norm(dim=1, keepdim=True)


@torch.no_grad()
def test_load_official_image_embeddings_match_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    reference = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**small, image_size=24, patch_size=8, projection_dim=EMBED_DIM)
    ).eval()
    for parameter in reference.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path / "vision")
    theirs = load_file(tmp_path / "vision/model.safetensors")
    tensors = theirs | random_tensors(adapter_shapes(PREFIX["hf"]))
    assert {n: tuple(t.shape) for n, t in tensors.items()} == official_shapes("hf", **CLIP_SIZES)

    folder = write_checkpoint(tensors, "hf", tmp_path / "official")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 4  # not visible in any shape
    (folder / "config.json").write_text(json.dumps(config))
    model = load_official_checkpoint(folder)
    x = pixels()
    expected = F.normalize(reference(pixel_values=normalised(x)).image_embeds, dim=-1)
    torch.testing.assert_close(model(pixels=x)[0], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["hf", "eva"])
def test_load_official_text_embeddings_and_scale_match_reference(layout: str, tmp_path: Path) -> None:
    tensors = make_checkpoint(layout)
    model = load_official_checkpoint(write_checkpoint(tensors, layout, tmp_path))
    x = torch.randn(5, TEXT_DIM) * 3
    _, text, scale, _ = model(embeddings=x)
    torch.testing.assert_close(text, adapter_reference(tensors, PREFIX[layout], x), atol=1e-6, rtol=1e-5)
    assert scale.item() == pytest.approx(math.exp(3.25))
    assert model.logit_scale.item() == 3.25

    other = load_official_checkpoint(write_checkpoint(tensors, layout, tmp_path), normalize_input=False)
    expected = adapter_reference(tensors, PREFIX[layout], x, normalise=False)
    torch.testing.assert_close(other(embeddings=x)[1], expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(text, expected, atol=1e-2)


def test_load_official_online_adapter_does_not_normalise_its_input(tmp_path: Path) -> None:
    tensors = {n.replace("text.text_", "text.text_proj.text_"): t for n, t in make_checkpoint("eva").items()}
    tensors["text.text.model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    assert not load_official_checkpoint(write_checkpoint(tensors, "eva", tmp_path)).config.adapter.normalize_input


# ---- save_official_checkpoint ---------------------------------------------------------------------------------------


def load_tensors(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path / "model.safetensors")


@pytest.mark.parametrize("layout", ["hf", "eva"])
def test_save_official_round_trip_is_exact(layout: str, tmp_path: Path) -> None:
    tensors = make_checkpoint(layout)
    source = write_checkpoint(tensors, layout, tmp_path / "official")
    load_official_checkpoint(source).save_pretrained(tmp_path / "model")
    model = LLM2CLIP.from_pretrained(tmp_path / "model", device="cpu")
    back = save_official_checkpoint(model, tmp_path / ("back.pt" if layout == "eva" else "back"), layout)
    written = load_tensors(back)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if "rope" in name:
            torch.testing.assert_close(written[name], tensor)
        else:
            assert torch.equal(written[name], tensor) and written[name].shape == tensor.shape, name
    again = load_official_checkpoint(back)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert torch.equal(again.encode_image([pixels()[0]]), model.encode_image([pixels()[0]]))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["official", "model", back.name])


def test_save_official_eva_adds_a_zero_projection_bias(tmp_path: Path) -> None:
    model = load_official_checkpoint(write_checkpoint(make_checkpoint("eva"), "eva", tmp_path))
    config = LLM2CLIPConfig(**{**vars(model.config), "projection_bias": False})
    ours = LLM2CLIP(config, model.tower).eval()
    again = load_official_checkpoint(save_official_checkpoint(ours, tmp_path / "back.pt", "eva"))
    assert torch.allclose(again.encode_image([pixels()[0]]), ours.encode_image([pixels()[0]]), atol=1e-6)


def test_save_official_rejects_models_that_the_layout_cannot_represent(tmp_path: Path) -> None:
    clip = load_official_checkpoint(write_checkpoint(make_checkpoint("hf"), "hf", tmp_path / "hf"))
    eva = load_official_checkpoint(write_checkpoint(make_checkpoint("eva"), "eva", tmp_path / "eva"))
    with pytest.raises(ValueError, match=r"vision tower is clip_vision_model.*EVA-02"):
        save_official_checkpoint(clip, tmp_path / "x.pt", "eva")
    with pytest.raises(ValueError, match=r"vision tower is timm:eva02.*CLIP tower.*projection has a bias"):
        save_official_checkpoint(eva, tmp_path / "x", "hf")
    with pytest.raises(ValueError, match="'onnx'"):
        save_official_checkpoint(clip, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match=r"must end in \.pt"):
        save_official_checkpoint(eva, tmp_path / "x", "eva")
    with pytest.raises(FileExistsError, match="another path"):
        save_official_checkpoint(clip, tmp_path / "hf", "hf")
    clip.config.adapter = AdapterConfig(normalize_input=False)
    with pytest.raises(ValueError, match="does not normalise"):
        save_official_checkpoint(clip, tmp_path / "x", "hf")
    assert not (tmp_path / "x").exists()


# ---- checkpoint files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards", "bin", "half", "positions"])
def test_load_official_reads_hf_weight_files(kind: str, tmp_path: Path) -> None:
    tensors = make_checkpoint("hf")
    folder = source = write_checkpoint(tensors, "hf", tmp_path)
    weights = folder / "model.safetensors"
    if kind == "file":
        source = weights
    elif kind == "shards":
        weights.unlink()
        names = sorted(tensors)
        parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for file, shard in parts.items():
            save_file({name: tensors[name] for name in shard}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, shard in parts.items() for name in shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "bin":
        weights.unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    elif kind == "half":
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
        save_file(tensors, weights)
    else:
        more = {"vision_model.embeddings.position_ids": torch.arange(10)[None]}
        save_file(tensors | more | {"text_model.final_layer_norm.weight": torch.ones(2)}, weights)
    model = load_official_checkpoint(source)
    for name, tensor in model.state_dict().items():
        official = tensors[get_official_name(name, HF, AdapterConfig(depth=4))]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor.reshape(-1), official.float().reshape(-1))


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": ["x"]}', '{"weight_map": {"a": 3}}'])
def test_load_official_rejects_a_malformed_index_file(index: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match=r"index\.json must "):
        load_official_checkpoint(tmp_path)


def test_load_official_rejects_a_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ValueError, match=r"is corrupt, incomplete or a TorchScript archive"):
        load_official_checkpoint(tmp_path)


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "prefix", "original", "both names"])
def test_load_official_reads_eva_weight_files(wrapper: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = make_checkpoint("eva")
    wrapped: dict[str, Any] = {"epoch": 3, wrapper: tensors}
    if wrapper == "prefix":
        wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    elif wrapper == "original":  # the original EVA-CLIP's names of two biases
        wrapped = {n.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias"): t for n, t in tensors.items()}
        assert "visual.blocks.1.attn.q_bias" in wrapped
    elif wrapper == "both names":  # the authors' code saves both after it has loaded the original EVA-CLIP weights
        wrapped = tensors | {"visual.blocks.0.attn.q_bias": tensors["visual.blocks.0.attn.q_proj.bias"].clone()}
    torch.save(wrapped, tmp_path / "LLM2CLIP-EVA02-B-16.pt")
    (tmp_path / "model.safetensors").write_bytes(b"another format, which is not read")
    model = load_official_checkpoint(tmp_path)
    assert torch.equal(model.projection.bias, tensors["visual.head.bias"])
    assert torch.equal(model.tower.backbone.blocks[1].attn.q_proj.bias, tensors["visual.blocks.1.attn.q_proj.bias"])


@pytest.mark.parametrize(("config", "expected"), [({"logit_scale_init_value": 4.6052}, 4.6052), ({}, 2.6592)])
def test_load_official_hf_without_logit_scale_uses_the_initial_value(
    config: dict[str, float], expected: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = make_checkpoint("hf")
    del tensors["logit_scale"]
    folder = write_checkpoint(tensors, "hf", tmp_path)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    assert load_official_checkpoint(folder).logit_scale.item() == pytest.approx(expected)
    assert f"has no logit_scale; using logit_scale_init_value {expected}" in caplog.text


def test_load_official_downloads_only_the_needed_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(make_checkpoint("hf"), "hf", tmp_path)
    repository = ["config.json", "modeling_clip.py", "model.safetensors", "pytorch_model.bin"]
    patterns: list[str] = []

    def download(name: str, allow_patterns: list[str], revision: None) -> str:
        patterns.extend(allow_patterns)
        return str(folder)

    monkeypatch.setattr("llm2clip.models.loading.find_hub_problem", lambda: "")
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name, revision: repository)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_official_checkpoint("microsoft/LLM2CLIP-Openai-B-16")
    assert set(patterns) == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_load_official_reports_missing_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, revision: str | None) -> list[str]:
        from huggingface_hub.errors import HTTPError  # not an OSError when the host cannot be reached

        raise HTTPError("no network")

    monkeypatch.setattr("llm2clip.models.loading.find_hub_problem", lambda: "")
    monkeypatch.setattr("huggingface_hub.list_repo_files", offline)
    with pytest.raises(FileNotFoundError, match="no/such-model"):
        load_official_checkpoint("no/such-model")
    with pytest.raises(ValueError, match=r"must contain one of model\.safetensors"):
        load_official_checkpoint(tmp_path)


def test_load_official_does_not_execute_pickles(tmp_path: Path) -> None:
    torch.save(make_checkpoint("eva") | {"more": TouchOnLoad(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt contains objects other than tensors"):
        load_official_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


# ---- strict loading -------------------------------------------------------------------------------------------------


# A change sets a tensor, or deletes it if the value is None.
MISMATCHES: list[tuple[str, str, Tensor | None, str]] = [
    ("hf", "vision_model.post_layernorm.bias", None, r"missing vision_model\.post_layernorm\.bias \(64,\)$"),
    ("eva", "visual.head.bias", None, r"missing visual\.head\.bias \(12,\)$"),
    ("eva", "logit_scale", None, "missing logit_scale"),
    ("hf", "text_adapter.adaptor.5.weight", None, r"has no tensor text_adapter\.adaptor\.5\.weight"),
    ("hf", "visual_projection.weight", torch.zeros(12, 63), r"of shape \(12, 64\) \(got .*32, \(12, 63\)\)"),
    ("eva", "visual.norm.bias", torch.zeros(128, dtype=torch.int64), r"norm\.bias must be .* \(got torch\.int64"),
    ("hf", "visual_projection.bias", torch.zeros(12), r"unexpected visual_projection\.bias \(12,\)$"),
    ("eva", "visual.mask_token", torch.zeros(1, 1, 128), r"unexpected visual\.mask_token"),
    ("eva", "visual.blocks.0.attn.q_bias", torch.zeros(128), "contains the same tensor as both"),
    ("eva", "visual.rope.freqs_cos", rotary(3, trained=14)[0], r"freqs_cos of shape \(9, 64\) does not match"),
    ("hf", "vision_model.embeddings.position_ids", torch.arange(9)[None], r"\(1, 9\) does not match the architecture"),
]


@pytest.mark.parametrize(("layout", "name", "value", "message"), MISMATCHES, ids=[case[1] for case in MISMATCHES])
def test_load_official_rejects_missing_unexpected_and_mismatched_tensors(
    layout: str, name: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    tensors = make_checkpoint(layout)
    tensors.pop(name, None)
    if value is not None:
        tensors[name] = value
    with pytest.raises(ValueError, match=message):
        load_official_checkpoint(write_checkpoint(tensors, layout, tmp_path))


def test_load_official_rejects_other_models(tmp_path: Path) -> None:
    tensors = {name: t for name, t in make_checkpoint("hf").items() if "adaptor" not in name}
    expected = r"is not an LLM2CLIP checkpoint.*'hf'.*text_adapter\.adaptor.*'openai'.*visual\.conv1.*'eva'.*'siglip2'"
    with pytest.raises(ValueError, match=expected + r".*visual\.trunk.*Tensors in this checkpoint: logit_scale"):
        load_official_checkpoint(write_checkpoint(tensors, "hf", tmp_path))
    folder = write_checkpoint(make_checkpoint("hf"), "hf", tmp_path)
    (folder / "config.json").write_text('{"vision_config": {"model_type": "siglip_vision_model"}}')
    with pytest.raises(ValueError, match=r"must be 'clip_vision_model' \(got 'siglip_vision_model'\)"):
        load_official_checkpoint(folder)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="a list, not a mapping from names to tensors"):
        load_official_checkpoint(tmp_path / "list.pt")


# ---- caption encoder ------------------------------------------------------------------------------------------------


def test_load_official_attaches_the_caption_encoder(llm: Path, tmp_path: Path) -> None:
    tensors = make_checkpoint("hf")
    model = load_official_checkpoint(write_checkpoint(tensors, "hf", tmp_path / "official"), text=llm)
    folder = model.save_pretrained(tmp_path / "model")
    loaded = LLM2CLIP.from_pretrained(folder, device="cpu")
    assert loaded.config.encoder == CaptionEncoder.from_pretrained(llm, device="cpu").identity()
    captions = ["a dog", "two cats in the snow"]
    embeddings = CaptionEncoder.from_pretrained(llm, device="cpu").encode(captions)
    expected = adapter_reference(tensors, PREFIX["hf"], embeddings)
    torch.testing.assert_close(loaded.encode_text(captions), expected, atol=1e-5, rtol=1e-4)


def test_load_official_rejects_an_encoder_of_another_size(llm: Path, tmp_path: Path) -> None:
    tensors = random_tensors(official_shapes("hf", text=48, **CLIP_SIZES))
    with pytest.raises(
        ValueError, match=r"size 32, but the adapter's input size is 48.*no published encoder has embeddings of size 48"
    ):
        load_official_checkpoint(write_checkpoint(tensors, "hf", tmp_path), text=llm)


def test_suggest_encoders_tells_the_llms_of_width_4096_apart() -> None:
    clip = {"architecture": {"model_type": "clip_vision_model"}}
    siglip = {"architecture": "vit_so400m_patch14_siglip_224"}
    llama_3, llama_3_1 = "Llama-3-8B-Instruct-CC-Finetuned", "LLM2CLIP-Llama-3.1-8B"

    def suggest(source: str, dim: int, tower: dict[str, Any]) -> list[str]:
        return [name.removeprefix("microsoft/") for name in suggest_published_encoders(source, dim, tower)]

    assert suggest("microsoft/LLM2CLIP-Openai-L-14-336", 4096, clip) == [f"LLM2CLIP-{llama_3}"]
    assert suggest("LLM2CLIP-EVA02-B-16.pt", 4096, clip) == [f"LLM2CLIP-{llama_3}"]
    (adapter,) = suggest("checkpoint.pt", 4096, siglip)
    assert adapter.endswith(f"/{llama_3_1}")
    assert suggest("Llama3.1-8B-OpenaiCLIP-L-14.pt", 4096, clip) == [adapter]
    assert suggest("checkpoint.pt", 4096, clip) == [f"LLM2CLIP-{llama_3}", adapter]
    assert suggest("checkpoint.pt", 2048, clip) == ["LLM2CLIP-Llama-3.2-1B-Instruct-CC-Finetuned"]
    assert suggest("checkpoint.pt", 768, clip) == []


def test_load_official_gives_published_llms_their_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_llm(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATE_TOKENS)})
    tokenizer.save_pretrained(folder)
    model = load_official_checkpoint(write_checkpoint(make_checkpoint("hf"), "hf", tmp_path / "official"), text=folder)
    encoder = model.encoder
    assert encoder.prefix == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    (ids,) = encoder.tokenize(["a dog"]).ids
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[1], ids[-1]]) == [TEMPLATE_TOKENS[i] for i in (0, 1, 3)]
    # A folder saved by this package has its own template.
    plain = make_llm(tmp_path / "plain")
    CaptionEncoder.from_pretrained(plain, device="cpu").save_pretrained(tmp_path / "ours")
    shutil.copy(folder / "tokenizer.json", tmp_path / "ours/tokenizer.json")
    assert find_published_template(tmp_path / "ours") is None and find_published_template(plain) is None


# ---- the command ----------------------------------------------------------------------------------------------------


def test_convert_command(llm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def convert(*args: str | Path) -> str:
        assert main(["convert", *map(str, args)]) == 0
        return capsys.readouterr().out

    def error_of(*args: str | Path) -> str:
        assert main(["convert", *map(str, args)]) == 1
        return capsys.readouterr().err

    source, out = write_checkpoint(make_checkpoint("hf"), "hf", tmp_path / "official"), tmp_path / "model"
    output = convert(source, "--out", out)
    assert f"Model: {out}" in output and "--text ENCODER" in output
    assert not (out / "text").exists()
    bare = LLM2CLIP.from_pretrained(out, device="cpu")
    assert bare.encode_image([pixels()[0]]).shape == (1, EMBED_DIM)
    assert bare.project_text_embeddings(torch.randn(2, TEXT_DIM)).shape == (2, EMBED_DIM)
    with pytest.raises(ValueError, match=r"no caption encoder.*--text ENCODER"):
        bare.encode_text(["a dog"])

    assert f"Next: llm2clip evaluate {out} DATA" in convert(out, "--out", out, "--text", llm)
    complete = LLM2CLIP.from_pretrained(out, device="cpu")
    assert complete.encode_text(["a dog"]).shape == (1, EMBED_DIM)
    assert torch.equal(complete.encode_image([pixels()[0]]), bare.encode_image([pixels()[0]]))

    back = tmp_path / "back"
    assert str(back) in convert(out, "--out", back, "--to", "hf")
    assert all(torch.equal(load_tensors(back)[name], tensor) for name, tensor in make_checkpoint("hf").items())

    other = tmp_path / "other"
    assert "already has a caption encoder" in error_of(out, "--out", other, "--text", llm)
    assert "already a model folder" in error_of(out, "--out", other)
    assert "do not contain a caption encoder" in error_of(out, "--out", other, "--text", llm, "--to", "hf")
    assert "not a model folder" in error_of(source, "--out", source)
    assert not other.exists()
