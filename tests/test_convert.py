"""Published checkpoints: read strictly, the same vectors as independent references, and back to the bit."""

from __future__ import annotations

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

from conftest import make_llm
from llm2clip import LLM2CLIP
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.convert import convert
from llm2clip.models.convert.checkpoint_layout import Checkpoint, computed_buffers, infer_config, to_official_name
from llm2clip.models.convert.convert import convert_verb, fill_weights, load_official, save_official
from llm2clip.models.llm2clip import LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower

TEXT, WIDTH = 32, 12  # the caption encoder's width and the shared one
CLIP = {"width": 64, "depth": 2, "hidden": 96, "patch": 8, "size": 24}
EVA = {"width": 128, "depth": 2, "hidden": 341, "patch": 8, "size": 24}
PREFIX = {"hf": "text_adapter.adaptor.", "eva": "text.text_adaptor."}


# ---- official checkpoints, written down by hand ---------------------------------------------------------------------


def adapter_shapes(prefix: str, text: int = TEXT, width: int = WIDTH, depth: int = 4) -> dict[str, tuple[int, ...]]:
    named: dict[str, tuple[int, ...]] = {}
    for i in range(depth):
        named |= {f"{prefix}{i}.ln.weight": (text,), f"{prefix}{i}.ln.bias": (text,)}
        named |= {f"{prefix}{i}.fn.0.weight": (2 * text, text), f"{prefix}{i}.fn.0.bias": (2 * text,)}
        named |= {f"{prefix}{i}.fn.3.weight": (text, 2 * text), f"{prefix}{i}.fn.3.bias": (text,)}
    named |= {f"{prefix}{depth}.weight": (text,), f"{prefix}{depth}.bias": (text,)}
    return named | {f"{prefix}{depth + 1}.weight": (width, text), f"{prefix}{depth + 1}.bias": (width,)}


def clip_shapes(width: int, depth: int, hidden: int, patch: int, size: int) -> dict[str, tuple[int, ...]]:
    """The vision tower by the names of transformers."""
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
    """The vision tower by the names of the EVA code, as LLM2CLIP changed it."""
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


def official_shapes(form: str, text: int = TEXT, shared: int = WIDTH, **tower: int) -> dict[str, tuple[int, ...]]:
    if form == "hf":
        rest = clip_shapes(**tower) | {"visual_projection.weight": (shared, tower["width"])}
    else:
        rest = eva_shapes(**tower) | {"visual.head.weight": (shared, tower["width"]), "visual.head.bias": (shared,)}
    return rest | adapter_shapes(PREFIX[form], text, shared) | {"logit_scale": ()}


def random(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of these shapes: every one other than its neighbours and than its initial value."""
    torch.manual_seed(seed)
    tensors = {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 1 and name.endswith("weight"):
            tensor += 1
    tensors["logit_scale"] = torch.tensor(3.25)
    return tensors


def rotary(side: int, head: int = 64, trained: int = 16) -> tuple[Tensor, Tensor]:
    """Cosines and sines of EVA-02's rotary embedding, (side^2, head): half of a head's numbers turn with the row and
    half with the column, in pairs, at positions stretched to the grid of the first training."""
    speeds = 10000.0 ** (-torch.arange(0, head // 2, 2) / (head // 2))
    angles = (torch.arange(side) / side * trained)[:, None] * speeds
    angles = angles.repeat_interleave(2, dim=1)
    row, column = (torch.arange(side * side) // side), (torch.arange(side * side) % side)
    whole = torch.cat([angles[row], angles[column]], dim=1)
    return whole.cos(), whole.sin()


def checkpoint(form: str, seed: int = 0) -> dict[str, Tensor]:
    tensors = random(official_shapes(form, **(CLIP if form == "hf" else EVA)), seed)
    if form == "eva":
        cos, sin = rotary(3)
        for place in ("", "blocks.0.attn.", "blocks.1.attn."):
            tensors |= {f"visual.{place}rope.freqs_cos": cos, f"visual.{place}rope.freqs_sin": sin}
    return tensors


def write(tensors: dict[str, Tensor], form: str, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if form == "eva":
        torch.save(tensors, folder / "official.pt")
        return folder / "official.pt"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 1}
    vision |= {"image_size": 24, "patch_size": 8}
    text = {"model_type": "clip_text_model", "hidden_size": 768}  # as published, and without a meaning
    config = {"model_type": "clip", "projection_dim": WIDTH, "vision_config": vision, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_read(tensors: dict[str, Tensor], form: str) -> Checkpoint:
    return Checkpoint.of("here", tensors, {}, None)


def pixels(size: int = 24) -> Tensor:
    return torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def normalised(x: Tensor) -> Tensor:
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    return (x / 255 - mean) / torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


# ---- architecture ---------------------------------------------------------------------------------------------------

LARGE = {"width": 1024, "depth": 24, "hidden": 4096, "patch": 14}
BASE = {"width": 768, "depth": 12, "hidden": 3072, "patch": 16}


@pytest.mark.parametrize(
    ("tower", "size", "count"), [(LARGE, 336, 578_587_905), (BASE, 224, 360_552_193)], ids=["L-14-336", "B-16"]
)
def test_the_published_parameter_counts(tower: dict[str, int], size: int, count: int) -> None:
    """As the hub gives them: vision tower, projection to 1280 without a bias, adapter from 4096, logit scale."""
    shapes = official_shapes("hf", 4096, 1280, **tower, size=size)
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    with torch.device("meta"):
        read = as_read({name: torch.empty(shape) for name, shape in shapes.items()}, "hf")
        config = infer_config(read)
        model = LLM2CLIP(config, VisionTower.from_config(config.tower))
        fill_weights(model, read)
    assert sum(p.numel() for p in model.parameters()) == count
    assert (config.text_dim, config.embed_dim, config.adapter_depth, config.adapter_expansion) == (4096, 1280, 4, 2)
    assert config.tower["architecture"]["num_attention_heads"] == tower["width"] // 64
    assert config.tower["architecture"]["hidden_act"] == "quick_gelu"  # as OpenAI trained them
    assert config.normalize_input and not config.projection_bias


EVA_LARGE, EVA_BASE = LARGE | {"hidden": 2730}, BASE | {"hidden": 2048}


@pytest.mark.parametrize(
    ("tower", "size", "name", "reference"),
    [
        (EVA_LARGE, 336, "eva02_large_patch14_clip_336", "EVA02-L-14-336"),
        (EVA_LARGE, 224, "eva02_large_patch14_clip_224", "EVA02-L-14"),
        (EVA_BASE, 224, "eva02_base_patch16_clip_224", "EVA02-B-16"),
    ],
)
def test_the_eva_towers_are_open_clips(tower: dict[str, int], size: int, name: str, reference: str) -> None:
    import open_clip

    shapes = official_shapes("eva", 4096, 1280, **tower, size=size)
    with torch.device("meta"):
        read = as_read({name: torch.empty(shape) for name, shape in shapes.items()}, "eva")
        config = infer_config(read)
        model = LLM2CLIP(config, VisionTower.from_config(config.tower))
        trunk = open_clip.create_model(reference, load_weights=False, device="meta").visual.trunk
        fill_weights(model, read)
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
    assert model.tower.preprocess.resize_size == size  # timm's own setting at 224 leaves a margin


def test_the_adapter_of_the_1b_model() -> None:
    with torch.device("meta"):
        shapes = official_shapes("eva", 2048, 1280, **EVA_LARGE, size=336)
        config = infer_config(as_read({n: torch.empty(s) for n, s in shapes.items()}, "eva"))
    assert (config.text_dim, config.embed_dim) == (2048, 1280)


# ---- numbers --------------------------------------------------------------------------------------------------------


def adapter_reference(w: dict[str, Tensor], prefix: str, x: Tensor, normalise: bool = True) -> Tensor:
    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (TEXT,), w[f"{name}.weight"], w[f"{name}.bias"])

    x = x / x.norm(dim=1, keepdim=True) if normalise else x
    for i in range(4):
        hidden = norm(x, f"{prefix}{i}.ln") @ w[f"{prefix}{i}.fn.0.weight"].T + w[f"{prefix}{i}.fn.0.bias"]
        x = x + F.gelu(hidden) @ w[f"{prefix}{i}.fn.3.weight"].T + w[f"{prefix}{i}.fn.3.bias"]
    x = norm(x, f"{prefix}4") @ w[f"{prefix}5.weight"].T + w[f"{prefix}5.bias"]
    return x / x.norm(dim=1, keepdim=True)


def eva_reference(w: dict[str, Tensor], x: Tensor, heads: int = 2) -> Tensor:
    """EVA-02 as its paper has it (arXiv 2303.11331): pre-norm, rotary embedding, a norm inside attention and SwiGLU."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"visual.{name}.weight"], w[f"visual.{name}.bias"], 1e-6)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"visual.{name}.weight"], w.get(f"visual.{name}.bias"))

    def turn(x: Tensor) -> Tensor:
        cos, sin = rotary(3)
        other = torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        return torch.cat([x[:, :, :1], x[:, :, 1:] * cos + other[:, :, 1:] * sin], dim=2)

    x = F.conv2d(x, w["visual.patch_embed.proj.weight"], w["visual.patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["visual.cls_token"].expand(len(x), -1, -1), x], dim=1) + w["visual.pos_embed"]
    for i in range(2):
        y = norm(x, f"blocks.{i}.norm1")
        q, k, v = (linear(y, f"blocks.{i}.attn.{n}_proj").unflatten(2, (heads, -1)).transpose(1, 2) for n in "qkv")
        q, k = turn(q), turn(k)
        y = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + linear(norm(y.transpose(1, 2).flatten(2), f"blocks.{i}.attn.inner_attn_ln"), f"blocks.{i}.attn.proj")
        y = norm(x, f"blocks.{i}.norm2")
        y = F.silu(linear(y, f"blocks.{i}.mlp.w1")) * linear(y, f"blocks.{i}.mlp.w2")
        x = x + linear(norm(y, f"blocks.{i}.mlp.ffn_ln"), f"blocks.{i}.mlp.w3")
    return F.normalize(linear(norm(x, "norm")[:, 0], "head"), dim=-1)


@torch.no_grad()
def test_clip_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    reference = CLIPVisionModelWithProjection(
        CLIPVisionConfig(**small, image_size=24, patch_size=8, projection_dim=WIDTH)
    ).eval()
    for parameter in reference.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path / "vision")
    theirs = load_file(tmp_path / "vision/model.safetensors")
    tensors = theirs | random(adapter_shapes(PREFIX["hf"]))
    assert {n: tuple(t.shape) for n, t in tensors.items()} == official_shapes("hf", **CLIP)

    folder = write(tensors, "hf", tmp_path / "official")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 4  # no shape tells
    (folder / "config.json").write_text(json.dumps(config))
    model = load_official(folder)
    x = pixels()
    expected = F.normalize(reference(pixel_values=normalised(x)).image_embeds, dim=-1)
    torch.testing.assert_close(model(pixels=x)[0], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_eva_vectors_are_those_of_its_formulas(tmp_path: Path) -> None:
    tensors = checkpoint("eva")
    model = load_official(write(tensors, "eva", tmp_path))
    expected = eva_reference(tensors, normalised(pixels()))
    torch.testing.assert_close(model(pixels=pixels())[0], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("form", ["hf", "eva"])
def test_text_vectors_and_scale(form: str, tmp_path: Path) -> None:
    tensors = checkpoint(form)
    model = load_official(write(tensors, form, tmp_path))
    x = torch.randn(5, TEXT) * 3
    _, text, scale, _ = model(embeddings=x)
    torch.testing.assert_close(text, adapter_reference(tensors, PREFIX[form], x), atol=1e-6, rtol=1e-5)
    assert scale.item() == pytest.approx(math.exp(3.25))
    assert model.logit_scale.item() == 3.25

    other = load_official(write(tensors, form, tmp_path), normalize_input=False)
    expected = adapter_reference(tensors, PREFIX[form], x, normalise=False)
    torch.testing.assert_close(other(embeddings=x)[1], expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(text, expected, atol=1e-2)


def test_an_adapter_trained_with_the_llm_running_does_not_normalise(tmp_path: Path) -> None:
    tensors = {n.replace("text.text_", "text.text_proj.text_"): t for n, t in checkpoint("eva").items()}
    tensors["text.text.model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)
    assert not load_official(write(tensors, "eva", tmp_path)).config.normalize_input


# ---- names ----------------------------------------------------------------------------------------------------------


def test_names_both_ways() -> None:
    """A list made by hand."""
    pairs = {
        "hf": {
            "tower.backbone.embeddings.class_embedding": "vision_model.embeddings.class_embedding",
            "tower.backbone.pre_layrnorm.weight": "vision_model.pre_layrnorm.weight",
            "tower.backbone.encoder.layers.3.mlp.fc2.bias": "vision_model.encoder.layers.3.mlp.fc2.bias",
            "projection.weight": "visual_projection.weight",
            "adapter.blocks.2.norm.bias": "text_adapter.adaptor.2.ln.bias",
            "adapter.blocks.0.up.weight": "text_adapter.adaptor.0.fn.0.weight",
            "adapter.blocks.3.down.weight": "text_adapter.adaptor.3.fn.3.weight",
            "adapter.norm.weight": "text_adapter.adaptor.4.weight",
            "adapter.out.bias": "text_adapter.adaptor.5.bias",
            "logit_scale": "logit_scale",
        },
        "eva": {
            "tower.backbone.cls_token": "visual.cls_token",
            "tower.backbone.blocks.7.attn.q_proj.bias": "visual.blocks.7.attn.q_proj.bias",
            "tower.backbone.blocks.7.attn.norm.weight": "visual.blocks.7.attn.inner_attn_ln.weight",
            "tower.backbone.blocks.7.attn.proj.weight": "visual.blocks.7.attn.proj.weight",
            "tower.backbone.blocks.7.norm1.weight": "visual.blocks.7.norm1.weight",
            "tower.backbone.blocks.7.mlp.fc1_g.weight": "visual.blocks.7.mlp.w1.weight",
            "tower.backbone.blocks.7.mlp.fc1_x.bias": "visual.blocks.7.mlp.w2.bias",
            "tower.backbone.blocks.7.mlp.norm.bias": "visual.blocks.7.mlp.ffn_ln.bias",
            "tower.backbone.blocks.7.mlp.fc2.weight": "visual.blocks.7.mlp.w3.weight",
            "tower.backbone.norm.weight": "visual.norm.weight",
            "projection.bias": "visual.head.bias",
            "adapter.blocks.1.up.bias": "text.text_adaptor.1.fn.0.bias",
            "adapter.out.weight": "text.text_adaptor.5.weight",
        },
    }
    for form, names in pairs.items():
        assert {ours: to_official_name(ours, form, 4) for ours in names} == names


def test_timm_reads_the_same_from_eva_names(tmp_path: Path) -> None:
    from timm.models.eva import checkpoint_filter_fn

    tensors = checkpoint("eva")
    model = load_official(write(tensors, "eva", tmp_path))
    theirs = checkpoint_filter_fn(tensors, model.tower.backbone)
    assert set(theirs) - set(model.tower.backbone.state_dict()) == {"head.weight", "head.bias"}
    assert all(torch.equal(theirs[name], own) for name, own in model.tower.backbone.state_dict().items())


def test_rotary_tables_are_those_of_the_formula(tmp_path: Path) -> None:
    model = load_official(write(checkpoint("eva"), "eva", tmp_path))
    tables = computed_buffers(model, "eva")
    for table, expected in zip(("cos", "sin"), rotary(3), strict=True):
        torch.testing.assert_close(tables[f"visual.blocks.1.attn.rope.freqs_{table}"], expected)


# ---- back -----------------------------------------------------------------------------------------------------------


def content(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path / "model.safetensors")


@pytest.mark.parametrize("form", ["hf", "eva"])
def test_round_trips_to_the_bit(form: str, tmp_path: Path) -> None:
    tensors = checkpoint(form)
    source = write(tensors, form, tmp_path / "official")
    load_official(source).save_pretrained(tmp_path / "model")
    model = LLM2CLIP.from_pretrained(tmp_path / "model", device="cpu")
    back = save_official(model, tmp_path / ("back.pt" if form == "eva" else "back"), form)
    written = content(back)
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        if "rope" in name:
            torch.testing.assert_close(written[name], tensor)
        else:
            assert torch.equal(written[name], tensor) and written[name].shape == tensor.shape, name
    again = load_official(back)
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[n], t) for n, t in model.state_dict().items())
    assert torch.equal(again.encode_image([pixels()[0]]), model.encode_image([pixels()[0]]))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["official", "model", back.name])


def test_a_projection_without_bias_gets_one_of_zeros(tmp_path: Path) -> None:
    model = load_official(write(checkpoint("eva"), "eva", tmp_path))
    config = LLM2CLIPConfig(**{**vars(model.config), "projection_bias": False})
    ours = LLM2CLIP(config, model.tower).eval()
    again = load_official(save_official(ours, tmp_path / "back.pt", "eva"))
    assert torch.allclose(again.encode_image([pixels()[0]]), ours.encode_image([pixels()[0]]), atol=1e-6)


def test_what_has_no_place_in_an_official_form(tmp_path: Path) -> None:
    clip = load_official(write(checkpoint("hf"), "hf", tmp_path / "hf"))
    eva = load_official(write(checkpoint("eva"), "eva", tmp_path / "eva"))
    with pytest.raises(ValueError, match=r"tower is clip_vision_model.*EVA-02"):
        save_official(clip, tmp_path / "x.pt", "eva")
    with pytest.raises(ValueError, match=r"tower is timm:eva02.*CLIP tower.*projection has a bias"):
        save_official(eva, tmp_path / "x", "hf")
    with pytest.raises(ValueError, match="'onnx'"):
        save_official(clip, tmp_path / "x", "onnx")
    with pytest.raises(ValueError, match=r"one \.pt file"):
        save_official(eva, tmp_path / "x", "eva")
    with pytest.raises(FileExistsError, match="another place"):
        save_official(clip, tmp_path / "hf", "hf")
    clip.config.normalize_input = False
    with pytest.raises(ValueError, match="does not normalise"):
        save_official(clip, tmp_path / "x", "hf")
    assert not (tmp_path / "x").exists()


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "shards", "bin", "half", "positions"])
def test_hf_files(kind: str, tmp_path: Path) -> None:
    tensors = checkpoint("hf")
    folder = source = write(tensors, "hf", tmp_path)
    weights = folder / "model.safetensors"
    if kind == "file":
        source = weights
    elif kind == "shards":
        weights.unlink()
        names = sorted(tensors)
        parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
        for file, some in parts.items():
            save_file({name: tensors[name] for name in some}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
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
    model = load_official(source)
    for name, own in model.state_dict().items():
        assert own.dtype == torch.float32
        assert torch.equal(own.reshape(-1), tensors[to_official_name(name, "hf", 4)].float().reshape(-1))


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "prefix", "original"])
def test_eva_files(wrapper: str, tmp_path: Path) -> None:
    tensors: dict[str, Any] = checkpoint("eva")
    wrapped: dict[str, Any] = {"epoch": 3, wrapper: tensors}
    if wrapper == "prefix":
        wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    elif wrapper == "original":  # EVA-CLIP's own names for two biases
        wrapped = {n.replace("q_proj.bias", "q_bias").replace("v_proj.bias", "v_bias"): t for n, t in tensors.items()}
        assert "visual.blocks.1.attn.q_bias" in wrapped
    torch.save(wrapped, tmp_path / "LLM2CLIP-EVA02-B-16.pt")
    (tmp_path / "model.safetensors").write_bytes(b"another form, which is not read")
    model = load_official(tmp_path)
    assert torch.equal(model.projection.bias, tensors["visual.head.bias"])
    assert torch.equal(model.tower.backbone.blocks[1].attn.q_proj.bias, tensors["visual.blocks.1.attn.q_proj.bias"])


def test_a_hub_repository_is_fetched_without_what_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(checkpoint("hf"), "hf", tmp_path)
    asked: list[Any] = []
    files = ["config.json", "modeling_clip.py", "model.safetensors", "pytorch_model.bin"]
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda name: files)
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download", lambda name, allow_patterns: asked.extend(allow_patterns) or str(folder)
    )
    load_official("microsoft/LLM2CLIP-Openai-B-16")
    assert set(asked) == {"config.json", "preprocessor_config.json", "model.safetensors"}


def test_no_such_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no/such-thing"):
        load_official("no/such-thing")
    with pytest.raises(ValueError, match=r"holds none of model\.safetensors"):
        load_official(tmp_path)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    torch.save(checkpoint("eva") | {"more": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt holds more than tensors"):
        load_official(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


# ---- strictness -----------------------------------------------------------------------------------------------------


def test_every_tensor_has_its_place(tmp_path: Path) -> None:
    def refused(form: str, message: str, **changes: Tensor | None) -> None:
        tensors = checkpoint(form)
        for name, tensor in changes.items():
            del tensors[name]
            if tensor is not None:
                tensors[name] = tensor
        with pytest.raises(ValueError, match=message):
            load_official(write(tensors, form, tmp_path / form))

    def added(form: str, message: str, **more: Tensor) -> None:
        with pytest.raises(ValueError, match=message):
            load_official(write(checkpoint(form) | more, form, tmp_path / form))

    refused("hf", r"lacks vision_model\.post_layernorm\.bias \(64,\)$", **{"vision_model.post_layernorm.bias": None})
    refused("eva", r"lacks visual\.head\.bias \(12,\)$", **{"visual.head.bias": None})
    refused("hf", r"lacks logit_scale", logit_scale=None)
    refused("hf", r"lacks the tensor text_adapter\.adaptor\.5\.weight", **{"text_adapter.adaptor.5.weight": None})
    refused(
        "hf",
        r"visual_projection\.weight is torch\.float32 \(12, 63\), not floats \(12, 64\)",
        **{"visual_projection.weight": torch.zeros(12, 63)},
    )
    refused(
        "eva",
        r"visual\.norm\.bias is torch\.int64",
        **{"visual.norm.bias": torch.zeros(128, dtype=torch.int64)},
    )
    added("hf", r"has besides visual_projection\.bias \(12,\)$", **{"visual_projection.bias": torch.zeros(12)})
    added("eva", r"has besides visual\.mask_token", **{"visual.mask_token": torch.zeros(1, 1, 128)})
    added("eva", r"twice", **{"visual.blocks.0.attn.q_bias": torch.zeros(128)})
    added("eva", r"freqs_cos \(9, 64\) is not what follows", **{"visual.rope.freqs_cos": rotary(3, trained=14)[0]})
    added(
        "hf",
        r"position_ids \(1, 9\) is not what follows",
        **{"vision_model.embeddings.position_ids": torch.arange(9)[None]},
    )


def test_other_models_are_named(tmp_path: Path) -> None:
    tensors = {name: t for name, t in checkpoint("hf").items() if "adaptor" not in name}
    with pytest.raises(ValueError, match=r"is no LLM2CLIP checkpoint.*text_adapter\.adaptor"):
        load_official(write(tensors, "hf", tmp_path))
    folder = write(checkpoint("hf"), "hf", tmp_path)
    (folder / "config.json").write_text('{"vision_config": {"model_type": "siglip_vision_model"}}')
    with pytest.raises(ValueError, match=r"'siglip_vision_model'; only CLIP's"):
        load_official(folder)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="a list, not tensors by name"):
        load_official(tmp_path / "list.pt")


# ---- pairing --------------------------------------------------------------------------------------------------------


def test_with_its_caption_encoder(llm: Path, tmp_path: Path) -> None:
    tensors = checkpoint("hf")
    model = load_official(write(tensors, "hf", tmp_path / "official"), text=llm)
    folder = model.save_pretrained(tmp_path / "model")
    loaded = LLM2CLIP.from_pretrained(folder, device="cpu")
    assert loaded.config.encoder == CaptionEncoder.from_pretrained(llm, device="cpu").identity()
    captions = ["a dog", "two cats in the snow"]
    embeddings = CaptionEncoder.from_pretrained(llm, device="cpu").encode(captions)
    expected = adapter_reference(tensors, PREFIX["hf"], embeddings)
    torch.testing.assert_close(loaded.encode_text(captions), expected, atol=1e-5, rtol=1e-4)


def test_a_wrong_pair_is_refused_with_both_widths(llm: Path, tmp_path: Path) -> None:
    tensors = random(official_shapes("hf", text=48, **CLIP))
    with pytest.raises(ValueError, match=r"width 32, the adapter takes 48.*4096 is .*Llama-3-8B.*2048 is .*3\.2-1B"):
        load_official(write(tensors, "hf", tmp_path), text=llm)


def test_a_published_language_model_gets_its_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_llm(tmp_path / "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(convert._SPECIAL)})
    tokenizer.save_pretrained(folder)
    model = load_official(write(checkpoint("hf"), "hf", tmp_path / "official"), text=folder)
    encoder = model.encoder
    assert encoder.prefix == "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n"
    (ids,) = encoder.tokenize(["a dog"]).ids
    assert tokenizer.convert_ids_to_tokens([ids[0], ids[1], ids[-1]]) == [convert._SPECIAL[i] for i in (0, 1, 3)]
    # an encoder that was saved by ours says itself how it reads
    plain = make_llm(tmp_path / "plain")
    CaptionEncoder.from_pretrained(plain, device="cpu").save_pretrained(tmp_path / "ours")
    shutil.copy(folder / "tokenizer.json", tmp_path / "ours/tokenizer.json")
    assert convert._template(tmp_path / "ours") is None and convert._template(plain) is None


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_verb(llm: Path, tmp_path: Path) -> None:
    source, out = str(write(checkpoint("hf"), "hf", tmp_path / "official")), str(tmp_path / "model")
    lines = convert_verb(source, out)
    assert lines[0] == f"Model: {out}" and "--text ENCODER" in lines[-1]
    assert not (tmp_path / "model/text").exists()
    bare = LLM2CLIP.from_pretrained(out, device="cpu")
    assert bare.encode_image([pixels()[0]]).shape == (1, WIDTH)
    assert bare.project_text_embeddings(torch.randn(2, TEXT)).shape == (2, WIDTH)
    with pytest.raises(ValueError, match=r"no caption encoder.*--text ENCODER"):
        bare.encode_text(["a dog"])

    assert convert_verb(out, out, text=str(llm))[-1] == f"Next: llm2clip evaluate {out} DATA"
    whole = LLM2CLIP.from_pretrained(out, device="cpu")
    assert whole.encode_text(["a dog"]).shape == (1, WIDTH)
    assert torch.equal(whole.encode_image([pixels()[0]]), bare.encode_image([pixels()[0]]))

    with pytest.raises(ValueError, match="has a caption encoder"):
        convert_verb(out, str(tmp_path / "x"), text=str(llm))

    back = tmp_path / "back"
    assert str(back) in convert_verb(out, str(back), form="hf")[0]
    assert all(torch.equal(content(back)[name], tensor) for name, tensor in checkpoint("hf").items())

    with pytest.raises(ValueError, match="model folder already"):
        convert_verb(out, str(tmp_path / "x"))
    with pytest.raises(ValueError, match="hold no caption encoder"):
        convert_verb(out, str(tmp_path / "x"), text=str(llm), form="hf")
    with pytest.raises(FileExistsError, match="not a model folder"):
        convert_verb(source, source)
