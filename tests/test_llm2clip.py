"""Tests of the model and its adapter."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from align_fixtures import fresh_model
from conftest import make_llm
from llm2clip import LLM2CLIP
from llm2clip.config import AlignConfig
from llm2clip.data.transforms import PreprocessConfig
from llm2clip.models.model_folder import LLM2CLIPConfig, is_model_folder
from llm2clip.models.modeling_llm2clip import Adapter
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.runs.output_folder import FormatVersionError
from llm2clip.train.initial_model import make_model_config


@pytest.fixture
def model(encoder: CaptionEncoder) -> LLM2CLIP:
    tower = VisionTower.from_pretrained("timm:test_efficientnet", pretrained=False, image_size=64)
    config = LLM2CLIPConfig(tower.config, encoder.embed_dim, embed_dim=12, encoder=encoder.identity())
    return LLM2CLIP(config, tower, encoder).eval()


def read_files(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("text_dim", "millions"), [(4096, 273.8), (2048, 69.8)])
def test_adapter_parameter_count_matches_paper(text_dim: int, millions: float) -> None:
    """The published checkpoints have 273.8 M parameters for 4096 -> 1280 dimensions and 69.8 M for 2048 -> 1280."""
    with torch.device("meta"):
        adapter = Adapter(text_dim, 1280)
    assert round(sum(p.numel() for p in adapter.parameters()) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("architecture", "std", "has_bias"),
    [
        ("eva02_base_patch16_clip_224", 0.02 * 0.001, True),  # EVAVisionTransformer.head in the authors' code
        ("vit_base_patch16_clip_224", 32**-0.5, False),  # VisionTransformer.proj in the authors' code
    ],
)
def test_new_projection_starts_as_in_the_authors_code(architecture: str, std: float, has_bias: bool) -> None:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 32, "depth": 1, "num_heads": 1, "num_classes": 0}
    preprocess = PreprocessConfig(32, "shortest", 1.0, "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to_dict()
    tower_config = {"library": "timm", "architecture": architecture, "args": sizes, "preprocess": preprocess}
    tower = VisionTower.from_config(tower_config)
    settings = AlignConfig(embed_dim=1280)
    projection = LLM2CLIP(make_model_config(settings, tower, text_dim=8), tower).projection
    assert projection.weight.std().item() == pytest.approx(std, rel=0.02)
    assert projection.weight.mean().item() == pytest.approx(0, abs=0.02 * std)
    assert (projection.bias is not None) == has_bias
    assert not has_bias or not projection.bias.any()


@pytest.mark.parametrize("normalize", [True, False])
def test_adapter_matches_its_formula(normalize: bool) -> None:
    adapter = Adapter(6, 4, depth=2, expansion=3, normalize_input=normalize).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    y = x / x.norm(dim=1, keepdim=True) if normalize else x

    def norm(v: torch.Tensor, layer: torch.nn.LayerNorm) -> torch.Tensor:
        centred = v - v.mean(1, keepdim=True)
        return centred / (v.var(1, correction=0, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias

    for block in adapter.blocks:
        hidden = norm(y, block.norm) @ block.up.weight.T + block.up.bias
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        y = y + hidden @ block.down.weight.T + block.down.bias
    y = norm(y, adapter.norm) @ adapter.out.weight.T + adapter.out.bias
    assert torch.allclose(adapter(x), y)


def test_forward_of_images_texts_or_both(model: LLM2CLIP) -> None:
    pixels, embeddings = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), torch.randn(2, 32)
    image, text, scale, _ = model(pixels, embeddings)
    assert image.shape == (3, 12) and text.shape == (2, 12)
    assert scale.item() == pytest.approx(1 / 0.07)
    assert torch.equal(model(pixels=pixels)[0], image) and model(pixels=pixels)[1] is None
    assert torch.equal(model(embeddings=embeddings)[1], text) and model(embeddings=embeddings)[0] is None


def test_forward_returns_float32_unit_vectors_under_autocast(model: LLM2CLIP) -> None:
    pixels, embeddings = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8), torch.randn(2, 32)
    with torch.autocast("cpu", torch.bfloat16):
        vectors = model(pixels, embeddings)[:2]
    for part in vectors:
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.norm(dim=-1), torch.ones(len(part)), atol=1e-6, rtol=0)


def test_logit_scale_is_clamped_only_in_training(model: LLM2CLIP) -> None:
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    assert model.eval()()[2].item() == pytest.approx(math.exp(5))
    assert model.train()()[2].item() == pytest.approx(100)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == pytest.approx(math.log(100))


def test_set_logits_sets_scale_and_bias() -> None:
    model = fresh_model(AlignConfig(loss="sigmoid"))
    model.set_logits(20.0, -3.0)
    assert model.logit_bias is not None
    assert model.logit_scale.item() == pytest.approx(math.log(20)) and model.logit_bias.item() == -3
    model.set_logits(1000.0)
    assert model.logit_scale.item() == pytest.approx(math.log(100)) and model.logit_bias.item() == -3


def test_caption_encoder_is_not_in_parameters(model: LLM2CLIP) -> None:
    children = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert children == {"tower", "projection", "adapter", "logit_scale"}


def test_encode_text_rejects_empty_texts(model: LLM2CLIP) -> None:
    for texts, templates in ((["a dog", " \n"], None), (["a dog", ""], ["a photo of a {}"])):
        with pytest.raises(ValueError, match="text 1 is empty"):
            model.encode_text(texts, templates=templates)


def test_encode_text_is_encoder_then_adapter(model: LLM2CLIP) -> None:
    texts = ["a dog", "a much longer caption of a dog"]
    with torch.no_grad():
        expected = F.normalize(model.adapter(model.encoder.encode(texts)), dim=-1)
    assert torch.allclose(model.encode_text(texts), expected, atol=1e-6)


def test_encode_document_adds_the_embeddings_of_texts_and_images(model: LLM2CLIP, image_folder: Path) -> None:
    files = [image_folder / "0.png", image_folder / "20.png"]
    texts, images = model.encode_text(["a", "b"]), model.encode_image(files)
    documents = [
        "a",
        files[0],
        {"image": str(files[1])},
        {"text": "b", "image": files[1]},
        {"text": "b", "image": None},
        {"text": " ", "image": files[0]},
    ]
    pair = F.normalize(texts[1] + images[1], dim=0)
    expected = torch.stack([texts[0], images[0], images[1], pair, texts[1], images[0]])
    torch.testing.assert_close(model.encode_document(documents), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.encode_document("a"), texts[:1], atol=1e-5, rtol=0)
    assert model.encode_document([]).shape == (0, 12)
    for document in ({"caption": "a"}, {"text": ""}, ""):
        with pytest.raises(ValueError, match=r"document 2 has neither an image nor a non-empty text \(keys: \['"):
            model.encode_document(["a", files[0], document])
    model._encoder.clear()  # images need no caption encoder
    torch.testing.assert_close(model.encode_document(files), images, atol=1e-5, rtol=0)


def test_encode_document_accepts_the_batches_of_encode_text_and_encode_image(model: LLM2CLIP) -> None:
    texts = ["a", "b"]
    column = Dataset.from_dict({"caption": texts})["caption"]
    for batch in (column, np.array(texts), (text for text in texts)):
        torch.testing.assert_close(model.encode_document(batch), model.encode_text(texts))
    pixels = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    expected = model.encode_image(pixels)
    for images in (pixels, pixels.permute(0, 2, 3, 1).numpy()):
        torch.testing.assert_close(model.encode_document(images), expected)
        torch.testing.assert_close(model.encode_document(images[0]), expected[:1])


def test_saved_folder_has_no_pickle_and_reopens(model: LLM2CLIP, tmp_path: Path) -> None:
    folder = model.save_pretrained(tmp_path / "m")
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "llm2clip" and len(config["encoder_fingerprint"]) == 32
    loaded = LLM2CLIP.from_pretrained(folder, device="cpu")
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


def test_invalid_folders_are_rejected(model: LLM2CLIP, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        LLM2CLIP.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="'clip'"):
        LLM2CLIP.from_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="not a model folder"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()


def test_encoder_with_wrong_dimension_is_rejected(model: LLM2CLIP, tmp_path: Path) -> None:
    model.config.text_dim = 48
    model.adapter = Adapter(48, 12)
    folder = model.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=r"\(32\) must equal the adapter's input dimension \(48\)"):
        LLM2CLIP.from_pretrained(folder, device="cpu").encode_text(["a"])


def test_set_encoder_rejects_another_encoder(model: LLM2CLIP, tmp_path: Path) -> None:
    """Even with the right dimension, its embeddings mean nothing to the adapter."""
    other = CaptionEncoder.from_pretrained(make_llm(tmp_path / "other", seed=1), device="cpu")
    with pytest.raises(ValueError, match=r"different caption encoder \(mismatch in weights\)"):
        model.set_encoder(other)
    model.set_encoder(model.encoder)


def test_embeddings_can_be_used_in_training(model: LLM2CLIP) -> None:
    weight = torch.zeros(12, requires_grad=True)
    (model.encode_text(["a"]) @ weight).sum().backward()
    (model.encode_image(torch.zeros(3, 64, 64, dtype=torch.uint8)) @ weight).sum().backward()


def test_save_pretrained_copies_the_encoder_without_opening_it(
    model: LLM2CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = model.save_pretrained(tmp_path / "first")
    reopened = LLM2CLIP.from_pretrained(first, device="cpu")
    monkeypatch.setattr(CaptionEncoder, "from_pretrained", None)
    second = reopened.save_pretrained(tmp_path / "second")
    assert read_files(first / "text") == read_files(second / "text")
    (second / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="is corrupt"):
        LLM2CLIP.from_pretrained(second)


def test_save_pretrained_replaces_a_model_folder(model: LLM2CLIP, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "m")
    with torch.no_grad():
        model.logit_scale.fill_(1.0)
    model.save_pretrained(tmp_path / "m")
    assert LLM2CLIP.from_pretrained(tmp_path / "m", device="cpu").logit_scale.item() == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("version", [None, 0, 2])
def test_model_folder_of_another_format_version_is_rejected(model: LLM2CLIP, version: object, tmp_path: Path) -> None:
    file = model.save_pretrained(tmp_path / "m") / "config.json"
    config = json.loads(file.read_text())
    assert config["format_version"] == 1
    file.write_text(json.dumps(config | {"format_version": version}))
    with pytest.raises(FormatVersionError, match=r"config\.json has .*only format version 1\. (Create|Update)"):
        LLM2CLIP.from_pretrained(tmp_path / "m")


def test_model_without_projection_uses_the_towers_output(model: LLM2CLIP, tmp_path: Path) -> None:
    config = LLM2CLIPConfig(model.tower.config, 32, embed_dim=model.tower.feature_dim, projection=False)
    bare = LLM2CLIP(config, model.tower)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(bare(pixels=pixels)[0], F.normalize(model.tower(pixels), dim=-1))
    reopened = LLM2CLIP.from_pretrained(bare.save_pretrained(tmp_path / "m"), device="cpu")
    assert reopened.config == config and torch.equal(reopened(pixels=pixels)[0], bare(pixels=pixels)[0])
    with pytest.raises(ValueError, match=r"embed_dim \(12\) must equal the vision tower's feature dimension"):
        LLM2CLIP(LLM2CLIPConfig(model.tower.config, 32, embed_dim=12, projection=False), model.tower)


@pytest.mark.parametrize("config", ["[" * 3000, "[]", '{"model_type": "llm2clip", "tower": []}', "{", "\xff"])
def test_malformed_config_is_rejected(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    assert is_model_folder(tmp_path) == ("llm2clip" in config)
    with pytest.raises(ValueError, match=r"config\.json"):
        LLM2CLIP.from_pretrained(tmp_path)
