"""Dual encoders: each type of model gives the embeddings of its own library. See also test_baselines.py."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from llm2clip.data.images import iter_image_batches
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval import evaluate_caption_fields
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.model_folder import AdapterConfig, LLM2CLIPConfig
from llm2clip.models.prompts import QueryTemplates
from test_caption_retrieval import make_clip

TEXTS = ["a dog", "two cats", "a text of more than twenty-four tokens, the context length of the tiny CLIP model"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPImageProcessor

    folder = make_clip(tmp_path_factory.mktemp("clip") / "clip", "clip")
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def encode_images(model: DualEncoder, image_folder: Path) -> tuple[Tensor, list[str]]:
    """Return the embeddings of eight images, and the files of the images."""
    refs = [r.image for r in open_records(image_folder / "captions.jsonl") if r.image is not None][:8]
    [(decoded, inputs, failures)] = iter_image_batches(refs, model.transform)
    assert decoded == list(range(8)) and not failures
    return model.encode_images(inputs), [str(ref) for ref in refs]


def assert_same_embeddings(ours: Tensor, reference: Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, F.normalize(reference.float(), dim=-1), atol=1e-5, rtol=0)


def test_sentence_transformers_model_matches_sentence_transformers(clip: Path, image_folder: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = open_dual_encoder(f"st:{clip}", "cpu")
    reference = SentenceTransformer(str(clip), device="cpu")
    images, files = encode_images(model, image_folder)
    assert_same_embeddings(images, reference.encode([Image.open(file) for file in files], convert_to_tensor=True))
    assert_same_embeddings(model.encode_texts(TEXTS[:2]), reference.encode(TEXTS[:2], convert_to_tensor=True))
    assert model.count_truncated_texts(TEXTS) is None


def test_model_folder_matches_llm2clip(model_folder: Path, image_folder: Path) -> None:
    model = open_dual_encoder(str(model_folder), "cpu")
    reference = LLM2CLIP.from_pretrained(model_folder, "cpu")
    images, files = encode_images(model, image_folder)
    assert_same_embeddings(images, reference.encode_image(files))
    assert_same_embeddings(model.encode_texts(TEXTS), reference.encode_text(TEXTS))
    assert model.count_truncated_texts(TEXTS) == 0
    assert model.identity() == open_dual_encoder(str(model_folder), "cpu").identity()


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
    with pytest.raises(ValueError, match="must be 'llm2clip'"):
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
