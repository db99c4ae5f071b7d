"""Tests of dense features: each variant against its formula in float64, each head alone, and every kind of model."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import resize

from llm2clip.data.transforms import PreprocessConfig
from llm2clip.models.dual_encoder import open_dual_encoder, wrap_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.vision.dense import DENSE_VARIANTS, build_dense_encoder, compute_feature_map
from llm2clip.models.vision.vision_tower import VisionTower
from test_baselines import CLIP_STATS, make_model, save_open_clip
from test_regions import naive_roi_align
from test_segmentation import reference_window_scores
from test_vision_tower import SMALL, TINY, normalized, pixels

PREPROCESS = PreprocessConfig(64, "squash", 1.0, "bicubic", (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATS = {"clip": (CLIP_STATS["image_mean"], CLIP_STATS["image_std"]), "siglip": HALVES}


def timm_tower(name: str, size: int = 64, **args: Any) -> VisionTower:
    preprocess = dataclasses.replace(PREPROCESS, size=size).to_dict()
    config = {"library": "timm", "architecture": name, "args": {"num_classes": 0, **args}, "preprocess": preprocess}
    return randomize(VisionTower.from_config(config))


def hf_tower(model_type: str, **options: Any) -> VisionTower:
    preprocess = dataclasses.replace(PREPROCESS, size=options.get("image_size", SMALL["image_size"])).to_dict()
    architecture = {"model_type": model_type, **SMALL, **options}
    config = {"library": "transformers", "architecture": architecture, "preprocess": preprocess}
    return randomize(VisionTower.from_config(config))


def randomize(tower: VisionTower) -> VisionTower:
    """Change all weights, including biases and scales, so that no step of a formula is the identity."""
    generator = torch.Generator().manual_seed(2)
    for parameter in tower.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return tower


BUILDERS: dict[str, Callable[[], VisionTower]] = {
    "vit": lambda: timm_tower("vit_base_patch16_clip_224", **TINY),
    "vit_qk_norm_registers_layer_scale": lambda: timm_tower(
        "vit_base_patch16_clip_224", **TINY, qk_norm=True, reg_tokens=2, init_values=0.5
    ),
    "vit_siglip": lambda: timm_tower("vit_base_patch16_siglip_224", **TINY),
    "eva02": lambda: timm_tower("eva02_base_patch16_clip_224", **TINY),
    "eva_giant": lambda: timm_tower("eva_giant_patch14_clip_224", 56, **TINY | {"img_size": 56, "mlp_ratio": 2.0}),
    "clip": lambda: hf_tower("clip_vision_model"),
    "siglip": lambda: hf_tower("siglip_vision_model"),
    "dinov2": lambda: hf_tower("dinov2"),
    "dinov3": lambda: hf_tower("dinov3_vit", num_register_tokens=2),
}


# ---- naive formulas -------------------------------------------------------------------------------------------------

# Each family's attention, and the prefixes of its norms and layer scales. Other families have the names of "vit".
PARTS = {
    **dict.fromkeys(("clip", "siglip"), ("self_attn", "layer_norm", "")),
    **dict.fromkeys(("dinov2", "dinov3"), ("attention", "norm", "layer_scale")),
    **dict.fromkeys(("eva02", "eva_giant"), ("attn", "norm", "gamma_")),
    "vit": ("attn", "norm", "ls"),
}


def project(attention: Any, x: Tensor) -> list[Tensor]:
    """Return the queries, keys and values of all heads, each of shape (N, heads, L, head_dim)."""
    if getattr(attention, "qkv", None) is None:
        parts = [getattr(attention, f"{name}_proj")(x) for name in "qkv"]
    else:
        bias = attention.qkv.bias
        if bias is None:
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        parts = list((x @ attention.qkv.weight.T + bias).chunk(3, -1))
    heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    return [q, k, v]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs_are_adjacent: bool) -> Tensor:
    """Rotary position embedding of the patches (RoFormer, arXiv 2104.09864). Prefix tokens have no position."""
    prefix, patches = x.tensor_split([x.shape[-2] - cos.shape[-2]], -2)
    if pairs_are_adjacent:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], -1).flatten(-2)
    else:
        first, second = patches.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return torch.cat([prefix, patches * cos + turned * sin], -2)


def naive_softmax(scores: Tensor) -> Tensor:
    weights = (scores - scores.max()).exp()
    return weights / weights.sum(-1, keepdim=True)


def naive_attention(variant: str, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """Attention of one head of one image: q, k and v are (L, head_dim)."""
    scale = 1 / math.sqrt(q.shape[-1])
    if variant == "plain":
        return naive_softmax(scale * q @ k.T) @ v
    if variant == "maskclip":
        return v
    if variant == "sclip":
        return (naive_softmax(scale * q @ q.T) + naive_softmax(scale * k @ k.T)) @ v
    if variant == "clearclip":
        return naive_softmax(scale * q @ q.T) @ v
    patches = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    prefix = len(k) - len(patches)
    bias = torch.zeros(len(k), len(k), dtype=torch.float64)
    for i, (row, column) in enumerate(patches):
        for j, (other_row, other_column) in enumerate(patches):
            squared_distance = (row - other_row) ** 2 + (column - other_column) ** 2
            bias[prefix + i, prefix + j] = math.exp(-squared_distance / (2 * 5.0**2))
    return naive_softmax(scale * k @ k.T + bias) @ v


def naive_features(
    family: str, tower: VisionTower, variant: str, images: Tensor, grid: tuple[int, int], patch: pytest.MonkeyPatch
) -> Tensor:
    """Run the tower with the formulas above in place of its last block, for each head alone."""
    block: Any = tower.get_blocks()[-1]
    attention_name, norm_prefix, scale_prefix = PARTS.get(family, PARTS["vit"])
    attention = getattr(block, attention_name)
    output = next(getattr(attention, name) for name in ("proj", "out_proj", "o_proj") if hasattr(attention, name))

    def scale(n: int, x: Tensor) -> Tensor:
        factor = getattr(block, f"{scale_prefix}{n}", None)
        if factor is None:
            return x
        return factor(x) if isinstance(factor, nn.Module) else factor * x

    def run_block(x: Tensor, *_: Any, rope: Any = None, position_embeddings: Any = None, **__: Any) -> Tensor:
        q, k, v = project(attention, getattr(block, f"{norm_prefix}1")(x))
        if rope is not None:  # timm's EVA
            sin, cos = rope.chunk(2, -1)
            q, k = (rotate(y, cos, sin, pairs_are_adjacent=True) for y in (q, k))
        if position_embeddings is not None:  # DINOv3
            q, k = (rotate(y, *position_embeddings, pairs_are_adjacent=False) for y in (q, k))
        per_head = zip(*(y.flatten(0, 1) for y in (q, k, v)), strict=True)
        heads = torch.stack([naive_attention(variant, *qkv, grid) for qkv in per_head]).view_as(v)
        y = heads.transpose(1, 2).flatten(2)
        y = scale(1, output(attention.norm(y) if hasattr(attention, "norm") else y))
        if variant in ("clearclip", "naclip"):
            return y
        x = x + y
        return x + scale(2, block.mlp(getattr(block, f"{norm_prefix}2")(x)))

    with patch.context() as inner:
        inner.setattr(block, "forward", run_block)
        return build_dense_encoder(tower, nn.Identity()).features(images, "plain")


@torch.no_grad()
@pytest.mark.parametrize("family", BUILDERS)
def test_variants_match_their_formulas(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = BUILDERS[family]().double()
    dense = build_dense_encoder(tower, nn.Identity())
    assert dense.variants == DENSE_VARIANTS
    images = pixels(5 * dense.cell_size)[:, :, : 3 * dense.cell_size]  # a grid that is not square
    results = {}
    for variant in DENSE_VARIANTS:
        results[variant] = dense.features(images, variant)
        expected = naive_features(family, tower, variant, images, (3, 5), monkeypatch)
        torch.testing.assert_close(results[variant], expected, atol=2e-6, rtol=2e-6)
    differences = [(results[a] - results[b]).abs().max() for a in results for b in results if a < b]
    assert min(differences) > 1e-3


# ---- plain features -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["vit", "eva02", "clip", "dinov3", "test_efficientnet"])
def test_feature_map_has_the_librarys_features_and_gradients(family: str) -> None:
    tower = BUILDERS[family]() if family in BUILDERS else timm_tower(family)
    backbone: Any = tower.backbone
    features = compute_feature_map(tower, pixels(tower.preprocess.size))
    x = normalized(pixels(tower.preprocess.size), tower.preprocess)
    is_timm = tower.config["library"] == "timm"
    with torch.no_grad():
        expected = backbone.forward_features(x) if is_timm else backbone(x).last_hidden_state
    if expected.ndim == 3:  # tokens of shape (N, L, C)
        grid = features.shape[2:]
        expected = expected[:, -grid.numel() :].transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    features.square().sum().backward()
    weights = [parameter for parameter in backbone.parameters() if parameter.ndim == 4]
    assert weights[0].grad is not None and weights[0].grad.abs().sum() > 0  # the first convolution


POOLED: dict[str, Callable[[int], VisionTower]] = {
    "vit_average": lambda size: timm_tower(
        "vit_base_patch16_clip_224", size, **TINY | {"img_size": size, "global_pool": "avg", "fc_norm": False}
    ),
    "vit_average_norm": lambda size: timm_tower(
        "vit_base_patch16_clip_224", size, **TINY | {"img_size": size, "global_pool": "avg", "fc_norm": True}
    ),
    "vit_siglip": lambda size: timm_tower("vit_base_patch16_siglip_224", size, **TINY | {"img_size": size}),
    "siglip": lambda size: hf_tower("siglip_vision_model", image_size=size),
    **{
        name: lambda size, name=name: timm_tower(name, size)  # type: ignore[misc]
        for name in ("test_resnet", "test_efficientnet", "test_convnext", "test_mambaout", "mobilenetv3_small_050")
    },
}


@torch.no_grad()
@pytest.mark.parametrize("name", POOLED)
def test_the_head_is_applied_to_each_cell_alone(name: str) -> None:
    """In an image that consists of one cell, the tower pools this cell alone."""
    size = {"siglip": 8}.get(name, 16 if "vit" in name else 32)
    tower = POOLED[name](size)
    dense = build_dense_encoder(tower, nn.Identity())
    assert dense.cell_size == size
    features = dense.features(pixels(size), "plain")
    assert features.shape == (2, 1, 1, tower.feature_dim)
    torch.testing.assert_close(features[:, 0, 0], tower(pixels(size)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_average", "test_resnet", "test_efficientnet"])
def test_the_mean_of_the_cells_is_the_average_pooled_output(name: str) -> None:
    tower = POOLED[name](96)
    features = build_dense_encoder(tower, nn.Identity()).features(pixels(96), "plain")
    assert features.shape[1] > 1
    torch.testing.assert_close(features.mean((1, 2)), tower(pixels(96)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", BUILDERS)
def test_plain_features_equal_the_librarys_at_every_image_size(family: str) -> None:
    tower = BUILDERS[family]()
    dense = build_dense_encoder(tower, nn.Identity())
    cell = dense.cell_size
    before = tower(pixels(dense.image_size))
    side = dense.image_size // cell
    for rows, columns in ((side, side), (3, 5), (2, 8)):  # 2 x 8: as many cells as at the training resolution
        images = pixels(8 * cell)[:, :, : rows * cell, : columns * cell]
        features = dense.features(images, "plain")
        x = normalized(images, tower.preprocess)
        if tower.config["library"] == "timm":
            args = tower.config["args"] | {"dynamic_img_size": True}
            peer: Any = timm.create_model(tower.config["architecture"], **args).eval()
            peer.load_state_dict(tower.backbone.state_dict())
            tokens = peer.forward_intermediates(x, norm=True, output_fmt="NLC")[1][-1]
            if family == "vit_siglip":
                tokens = peer.attn_pool(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
        else:
            peer = tower.backbone
            options = {"interpolate_pos_encoding": True} if family in ("clip", "siglip") else {}
            tokens = peer(x, **options).last_hidden_state[:, -rows * columns :]
            if family == "siglip":
                tokens = peer.head(tokens.flatten(0, 1)[:, None]).unflatten(0, tokens.shape[:2])
            tokens = peer.post_layernorm(tokens) if family == "clip" else tokens
        torch.testing.assert_close(features.flatten(1, 2), tokens, atol=1e-5, rtol=1e-5)
    for variant in dense.variants:
        dense.features(images, variant)
    assert torch.equal(tower(pixels(dense.image_size)), before)  # the tower itself did not change


# ---- interface ------------------------------------------------------------------------------------------------------


def make_llm2clip(tower: VisionTower) -> LLM2CLIP:
    torch.manual_seed(3)
    return LLM2CLIP(LLM2CLIPConfig(tower=tower.config, text_dim=8, embed_dim=12, projection_bias=True), tower)


@torch.no_grad()
def test_encode_dense_projects_and_normalizes_cells(tmp_path: Path) -> None:
    model = make_llm2clip(BUILDERS["eva02"]())
    wide, tall = pixels(150)[0, :, :70], pixels(150)[1, :, :, :75]
    Image.fromarray(wide.permute(1, 2, 0).numpy()).save(tmp_path / "wide.png")
    cells = model.encode_dense([tmp_path / "wide.png", tall, wide], "sclip", batch_size=2)
    assert [tuple(embeddings.shape) for embeddings in cells] == [(4, 9, 12), (8, 4, 12), (4, 9, 12)]
    assert torch.equal(cells[0], cells[2])

    dense = wrap_llm2clip(model, "model").dense
    assert dense is not None and dense.resize(tall).shape == (3, 128, 64)
    features = build_dense_encoder(model.tower, nn.Identity()).features(dense.resize(tall)[None], "sclip")
    torch.testing.assert_close(cells[1], F.normalize(model.projection(features), dim=-1)[0])
    [larger] = model.encode_dense(tall, image_size=100)  # 100 pixels are 6.25 cells
    assert larger.shape == (12, 6, 12) and larger.dtype == torch.float32
    [line] = model.encode_dense(torch.zeros(3, 1, 4000, dtype=torch.uint8))
    assert line.shape == (4, 32, 12)
    assert model.encode_dense([]) == []


@torch.no_grad()
@pytest.mark.parametrize("family", ["vit", "siglip", "test_efficientnet"])
def test_encode_regions_averages_the_cells_of_boxes_and_masks(family: str) -> None:
    model = make_llm2clip(BUILDERS[family]() if family in BUILDERS else timm_tower(family))
    image = pixels(75)[0, :, :45]
    dense = build_dense_encoder(model.tower, model.projection)
    [cells] = model.encode_dense(image, dense.localization_variant, dense.localization_image_size)
    h, w, _ = cells.shape
    grid = cells.double().numpy()

    boxes = np.array([[3, 5, 40.5, 30], [0, 0, 74, 44], [70, 40, 75, 45]])
    expected = [naive_roi_align(grid, box * [w / 75, h / 45, w / 75, h / 45]) for box in boxes]
    reference = F.normalize(torch.from_numpy(np.stack(expected)), dim=-1)
    torch.testing.assert_close(model.encode_regions(image, boxes).double(), reference, atol=1e-5, rtol=0)

    masks = np.zeros((3, 45, 75), bool)
    masks[0, 7:20, 30:41] = masks[1, 2, 3] = True
    masks[2] = np.random.default_rng(0).random((45, 75)) < 0.3
    for mask, embedding in zip(masks, model.encode_regions(image, masks=masks), strict=True):
        total = np.zeros(grid.shape[-1])
        for y, x in zip(*mask.nonzero(), strict=True):
            for i in range(h):
                for j in range(w):
                    rows = min(y + 1, (i + 1) * 45 / h) - max(y, i * 45 / h)
                    columns = min(x + 1, (j + 1) * 75 / w) - max(x, j * 75 / w)
                    total += max(0, rows) * max(0, columns) * grid[i, j]
        torch.testing.assert_close(embedding.double(), F.normalize(torch.from_numpy(total), dim=0), atol=1e-5, rtol=0)
    assert model.encode_regions(image, []).shape == (0, 12)
    assert not torch.equal(
        model.encode_regions(image, boxes[:1], image_size=64)[0], model.encode_regions(image, boxes)[0]
    )


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ({}, "requires either boxes or masks"),
        ({"boxes": [[0, 0, 9, 9]], "masks": torch.ones(1, 64, 64, dtype=torch.bool)}, "requires either boxes or masks"),
        ({"boxes": [0, 0, 9, 9]}, r"boxes must have shape \(N, 4\), with columns x0, y0, x1 and y1 \(got \(4,\)\)"),
        ({"boxes": [[0, 0, 9, 9], [1, 2, float("nan"), 9]]}, r"box 1, \(1.0, 2.0, nan, 9.0\), contains NaN"),
        ({"boxes": [[5, 5, 5, 9]]}, r"box 0, \(5.0, 5.0, 5.0, 9.0\), is empty"),
        ({"boxes": [[5, 5, 65, 9]]}, "is not inside the image of 64 x 64 pixels: clip the boxes"),
        ({"boxes": [[-1, 5, 6, 9]]}, "is not inside the image of 64 x 64 pixels: clip the boxes"),
        ({"masks": torch.ones(2, 64, 32, dtype=torch.bool)}, r"masks must have shape \(N, 64, 64\)"),
        ({"masks": torch.ones(2, 64, 64)}, r"masks must be boolean \(got torch.float32\)"),
        ({"masks": torch.zeros(2, 64, 64, dtype=torch.bool)}, "mask 0 contains no pixels"),
        ({"boxes": [[0, 0, 9, 9]], "variant": "naclip"}, "does not support the dense variant 'naclip': use 'plain'"),
    ],
)
def test_encode_regions_rejects_invalid_regions(regions: dict[str, Any], message: str) -> None:
    model = make_llm2clip(timm_tower("test_efficientnet"))
    with pytest.raises(ValueError, match=message):
        model.encode_regions(pixels(64)[0], **regions)


@torch.no_grad()
def test_segment_follows_the_protocol_of_the_benchmark(model_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    image = pixels(70)[0, :, :45]
    names: list[str | list[str]] = ["red", ["green", "a dog"], "blue"]
    labels, scores = model.segment(image, names, templates=["a {}", "the {}."], return_scores=True)

    dense = build_dense_encoder(model.tower, model.projection)
    window, cell = dense.image_size, dense.cell_size
    size = [round(45 * 1.5 * window / 45), round(70 * 1.5 * window / 45)]
    resized = resize(image, size, antialias=True)
    windows = []
    for top in sorted({*range(0, size[0] - window, window // 2), size[0] - window}):
        for left in sorted({*range(0, size[1] - window, window // 2), size[1] - window}):
            windows.append(resized[:, top : top + window, left : left + window])
    texts = model.encode_text(
        ["a red", "the red.", "a green", "the green.", "a a dog", "the a dog.", "a blue", "the blue."]
    )
    queries = F.normalize(texts.double().unflatten(0, (4, 2)).mean(1), dim=-1)
    embeddings = dense.encode(torch.stack(windows), dense.localization_variant).double()
    assert embeddings.shape[1:3] == (window // cell, window // cell)
    cells = (embeddings @ queries.T).permute(0, 3, 1, 2)
    expected = reference_window_scores(resized, cells, window, (45, 70))
    class_scores = torch.stack([expected[0], expected[1:3].amax(0), expected[3]])
    torch.testing.assert_close(scores.double(), class_scores, atol=1e-5, rtol=0)
    assert labels.dtype == torch.int64 and torch.equal(labels, scores.argmax(0)) and len(labels.unique()) > 1
    assert torch.equal(model.segment(image, names, templates=["a {}", "the {}."]), labels)
    for invalid in ("red", [], ["red", " "], ["red", []]):
        with pytest.raises(ValueError, match="names must be a list with one or more non-empty names for each class"):
            model.segment(image, invalid)


def test_documented_examples_run_with_the_default_kind_of_tower(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default tower is a convolutional network, which supports only the variant plain."""
    model = LLM2CLIP.from_pretrained(model_folder, "cpu")
    assert build_dense_encoder(model.tower, model.projection).variants == ("plain",)
    monkeypatch.setattr(LLM2CLIP, "from_pretrained", lambda path: model)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (320, 240), (200, 100, 0)).save("market.jpg")
    page = (Path(__file__).parent.parent / "docs/howto/dense.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"masks": torch.ones(2, 240, 320, dtype=torch.bool)}
    for block in blocks:
        exec(block, names)
    assert names["patches"].shape[-1] == names["regions"].shape[-1] == model.config.embed_dim
    assert names["labels"].shape == (240, 320)


def test_dual_encoders_have_the_learned_logit_scale(tmp_path: Path) -> None:
    model = make_llm2clip(timm_tower("test_resnet"))
    assert wrap_llm2clip(model, "model").logit_scale() == pytest.approx(1 / 0.07)
    model.logit_scale.data.fill_(math.log(300))
    assert wrap_llm2clip(model, "model").logit_scale() == 100
    make_model(tmp_path, "clip")
    assert open_dual_encoder(str(tmp_path), "cpu").logit_scale() == pytest.approx(math.exp(2.6592), rel=0.01)  # bf16


def test_unsupported_requests_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = build_dense_encoder(timm_tower("test_efficientnet"), nn.Identity())
    with pytest.raises(ValueError, match=r"does not support the dense variant 'sclip': use 'plain'$"):
        dense.encode(pixels(64), "sclip")
    with pytest.raises(ValueError, match=r"where H and W are multiples of 32 \(got \(2, 3, 40, 40\)\)"):
        dense.encode(pixels(40))
    swin = timm_tower("swin_tiny_patch4_window7_224", img_size=64, embed_dim=16, depths=(1, 1), num_heads=(1, 2))
    swin_dense = build_dense_encoder(swin, nn.Identity())
    assert swin_dense.variants == ("plain",) and swin_dense.encode(pixels(64)).shape == (2, 8, 8, 32)
    with pytest.raises(ValueError, match="supports only images of 64 x 64 pixels"):
        swin_dense.encode(pixels(128))

    tower = BUILDERS["vit"]()
    tower.backbone.blocks[-1].attn.fused_attn = False  # type: ignore[index, union-attr]
    dense = build_dense_encoder(tower, nn.Identity())
    dense.encode(pixels(64))
    with pytest.raises(ValueError, match=r"'naclip' requires a last block .*got 0 calls .*\. Use variant 'plain'"):
        dense.encode(pixels(64), "naclip")

    model = make_llm2clip(timm_tower("test_resnet"))
    monkeypatch.delattr(model.tower.backbone, "feature_info")
    assert wrap_llm2clip(model, "model").dense is None
    with pytest.raises(ValueError, match="test_resnet does not support dense features"):
        model.encode_dense(pixels(64)[0])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "siglip", "chinese_clip"])
def test_dense_features_of_transformers_models(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModel

    make_model(tmp_path, kind)
    dense = open_dual_encoder(str(tmp_path), "cpu").dense
    if kind == "chinese_clip":
        assert dense is None
        return
    assert dense is not None and (dense.cell_size, dense.image_size) == (8, 32)
    reference = AutoModel.from_pretrained(tmp_path).eval()
    x = pixels(32) if kind == "clip" else pixels(8)  # SigLIP pools the only cell
    inputs: dict[str, Any] = {
        "pixel_values": normalized(x, PreprocessConfig(32, "squash", 1.0, "bicubic", *STATS[kind]))
    }
    if kind == "siglip":
        inputs["interpolate_pos_encoding"] = True
    if kind == "clip":
        tokens = reference.vision_model(**inputs).last_hidden_state[:, 1:]
        expected = reference.visual_projection(reference.vision_model.post_layernorm(tokens))
    else:
        expected = reference.get_image_features(**inputs).pooler_output[:, None]
    torch.testing.assert_close(dense.encode(x).flatten(1, 2), F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


@torch.no_grad()
def test_dense_features_of_open_clip_models_with_a_timm_trunk(tmp_path: Path) -> None:
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}
    towers = {"embed_dim": 24, "vision_cfg": vision | {"timm_model_pretrained": False}, "custom_text": True}
    reference = save_open_clip(tmp_path, towers)
    dense = open_dual_encoder(f"open_clip:{tmp_path}", "cpu").dense
    assert dense is not None and dense.image_size == 224 and dense.variants == DENSE_VARIANTS
    embeddings = dense.encode(pixels(224, 1))
    preprocess = PreprocessConfig(224, "squash", 1.0, "bicubic", *STATS["clip"])
    tokens = reference.visual.trunk.forward_features(normalized(pixels(224, 1), preprocess))[:, 1:]
    expected = F.normalize(reference.visual.head(tokens), dim=-1)
    torch.testing.assert_close(embeddings.flatten(1, 2), expected, atol=1e-5, rtol=0)
