"""Tests of the dual encoders: every kind of model gives the embeddings of its own library."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from llm2clip.data.image_loader import image_batches
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval_eval import evaluate_caption_fields
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.heads import AdapterConfig
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.prompts import QueryTemplates
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from test_caption_retrieval import make_clip

TEXTS = ["a dog", "two cats", "a text of more than twenty-four tokens, the context length of the tiny CLIP model"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPImageProcessor

    folder = make_clip(tmp_path_factory.mktemp("clip") / "clip", "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def encode_both(model: DualEncoder, image_folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Return the embeddings of eight images and of `TEXTS`, and the files of the images."""
    refs = [r.image for r in open_records(image_folder / "captions.jsonl") if r.image is not None][:8]
    [(decoded, inputs, failures)] = image_batches(refs, model.transform)
    assert decoded == list(range(8)) and not failures
    images, texts = model.encode_images(inputs), model.encode_texts(TEXTS)
    assert images.shape == (8, model.embed_dim) and texts.shape == (3, model.embed_dim)
    assert images.dtype == texts.dtype == torch.float32
    return images, texts, [str(ref) for ref in refs]


def assert_same_embeddings(ours: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(ours, F.normalize(reference.float(), dim=-1), atol=1e-5, rtol=0)


def test_transformers_model_matches_transformers(clip: Path, image_folder: Path) -> None:
    from transformers import AutoModel, AutoProcessor

    model = open_dual_encoder(str(clip), "cpu")
    images, texts, files = encode_both(model, image_folder)
    assert model.count_truncated(TEXTS) == 1
    reference, processor = AutoModel.from_pretrained(clip).eval(), AutoProcessor.from_pretrained(clip)
    with torch.no_grad():
        pixels = processor(images=[Image.open(f).convert("RGB") for f in files], return_tensors="pt")
        assert_same_embeddings(images, reference.get_image_features(**pixels).pooler_output)
        for text, vector in zip(TEXTS, texts, strict=True):
            tokens = processor.tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
            assert_same_embeddings(
                vector[None], reference.get_text_features(input_ids=tokens["input_ids"]).pooler_output
            )


def test_sentence_transformers_model_matches_sentence_transformers(clip: Path, image_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = open_dual_encoder(f"st:{clip}", "cpu")
    reference = SentenceTransformer(str(clip), device="cpu")
    refs = [r.image for r in open_records(image_folder / "captions.jsonl") if r.image is not None][:8]
    [(_, inputs, _)] = image_batches(refs, model.transform)
    assert_same_embeddings(
        model.encode_images(inputs), reference.encode([Image.open(str(r)) for r in refs], convert_to_tensor=True)
    )
    assert_same_embeddings(model.encode_texts(TEXTS[:2]), reference.encode(TEXTS[:2], convert_to_tensor=True))
    assert model.count_truncated(TEXTS) is None


def test_open_clip_model_matches_open_clip(tmp_path: Path, image_folder: Path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    reference = open_clip.create_model("ViT-S-32-alt").eval()
    config = {"model_cfg": open_clip.get_model_config("ViT-S-32-alt"), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(reference.state_dict(), tmp_path / "open_clip_model.safetensors")
    images, texts, files = encode_both(open_dual_encoder(f"open_clip:{tmp_path}", "cpu"), image_folder)
    transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")[2]
    with torch.no_grad():
        assert_same_embeddings(images, reference.encode_image(torch.stack([transform(Image.open(f)) for f in files])))
        assert_same_embeddings(texts, reference.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)))


def test_model_folder_matches_llm2clip(llm: Path, tmp_path: Path, image_folder: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    tower = VisionTower.from_pretrained("timm:test_vit", pretrained=False, image_size=64)
    config = LLM2CLIPConfig(
        tower.config, encoder.embed_dim, embed_dim=12, adapter=AdapterConfig(depth=1), encoder=encoder.identity()
    )
    LLM2CLIP(config, tower).save_pretrained(tmp_path / "model", encoder=encoder)
    model = open_dual_encoder(str(tmp_path / "model"), "cpu")
    images, texts, files = encode_both(model, image_folder)
    reference = LLM2CLIP.from_pretrained(tmp_path / "model", "cpu")
    assert_same_embeddings(images, reference.encode_image(files))
    assert_same_embeddings(texts, reference.encode_text(TEXTS))
    assert (
        model.count_truncated(TEXTS) == 0
        and model.identity() == open_dual_encoder(str(tmp_path / "model"), "cpu").identity()
    )


def test_untrained_model_is_at_chance_and_truncation_is_counted(clip: Path, image_folder: Path) -> None:
    """An untrained model is about at chance, and its truncated texts are counted."""
    records = list(open_records(image_folder / "captions.jsonl"))
    vectors = ModelEmbeddings(open_dual_encoder(str(clip), "cpu"), SkipLog(), progress=False)
    [row] = evaluate_caption_fields(vectors, {"captions": records})
    assert row["images"] == len(records) and row["truncated"] is not None
    low, high = row["T2I interval"]["R@10"]
    assert low <= row["T2I"]["R@10"] <= high


def test_cached_embeddings_are_reused(
    clip: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = list(open_records(image_folder / "captions.jsonl"))
    model = open_dual_encoder(str(clip), "cpu")
    once = evaluate_caption_fields(ModelEmbeddings(model, SkipLog(), progress=False), {"captions": records})
    kept = evaluate_caption_fields(ModelEmbeddings(model, SkipLog(), tmp_path), {"captions": records[:20]})
    assert kept[0]["images"] == 20
    assert evaluate_caption_fields(ModelEmbeddings(model, SkipLog(), tmp_path), {"captions": records}) == once

    def never(*_: object) -> Tensor:
        raise AssertionError("encoded again")

    again = dataclasses.replace(model, encode_images_raw=never, encode_texts_raw=never)
    assert evaluate_caption_fields(ModelEmbeddings(again, SkipLog(), tmp_path), {"captions": records}) == once
    other = dataclasses.replace(again, identity=lambda: {"name": "another"})
    with pytest.raises(AssertionError, match="encoded again"):
        evaluate_caption_fields(ModelEmbeddings(other, SkipLog(), tmp_path), {"captions": records})


def test_unknown_models_are_rejected(tmp_path: Path, llm: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_dual_encoder(str(tmp_path / "nothing"), "cpu")
    with pytest.raises(ValueError, match="not 'llm2clip'"):
        open_dual_encoder(str(llm), "cpu")


def test_identity_of_an_llm2clip_model_contains_everything_that_affects_embeddings() -> None:
    config = LLM2CLIPConfig(tower={"x": 1}, text_dim=8, embed_dim=4)
    changes: list[dict[str, Any]] = [
        *({"tower": {"x": 2}}, {"embed_dim": 5}, {"adapter": AdapterConfig(normalize_input=False)}),
        *({"projection": False}, {"encoder": {"weights": "0"}}),
    ]
    identities = [dataclasses.replace(config, **change).identity() for change in changes]
    assert all(identity != config.identity() for identity in identities)
    templates = QueryTemplates(("a photo of {}",))
    assert dataclasses.replace(config, query_templates=templates).identity() == config.identity()
