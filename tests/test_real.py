"""Tests on real weights and real data."""

from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer

from llm2clip.config import EvaluateConfig
from llm2clip.data.build_table import read_data_splits
from llm2clip.data.records import open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate import encoder_choice
from llm2clip.evaluate.caption_retrieval import caption_retrieval_accuracy
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower

CAPTIONS = ["A dog runs.", "Two children in red coats build a snowman in front of a house.", "一只狗在跑。"]


@pytest.mark.weights
def test_smollm2_embeddings_survive_batching_and_saving(tmp_path: Path) -> None:
    """Chat template, padding and saving do not change an embedding of the real model."""
    encoder = CaptionEncoder.from_pretrained(resolve_pretrained_name("smollm2-135m"), layers=4, device="cpu")
    embeddings = encoder.encode(CAPTIONS)
    assert [len(i) for i in encoder.tokenize(CAPTIONS[:1]).ids] == [4]
    for caption, embedding in zip(CAPTIONS, embeddings, strict=True):
        assert torch.allclose(encoder.encode([caption])[0], embedding, atol=2e-5)
    encoder.save_pretrained(tmp_path)
    reference = SentenceTransformer(str(tmp_path), device="cpu").encode(CAPTIONS, convert_to_tensor=True)
    assert torch.allclose(reference, embeddings, atol=2e-5)


@pytest.mark.weights
@pytest.mark.data
def test_caption_retrieval_accuracy_of_minilm_on_coco(real_data: Path) -> None:
    """R@1 from first to second caption, on the first 1,000 images of the Karpathy test split, is 43.9.

    The value was measured independently of this package.
    """
    records = open_records(f"{real_data}/coco_text/captions.jsonl@karpathy_test", image_check="ignore")
    captions = [r.captions for r, _ in zip(records, range(1000), strict=False)]
    encoder = CaptionEncoder.from_pretrained(resolve_pretrained_name("all-minilm-l6-v2"), device="cpu")
    assert caption_retrieval_accuracy(captions, encoder, progress=False)["first to second"]["R@1"] == pytest.approx(
        43.9, abs=0.2
    )


@pytest.mark.weights
@pytest.mark.data
@pytest.mark.parametrize(("column", "chosen"), [("captions", "all-minilm-l6-v2"), ("captions_zh", "smollm2-135m")])
def test_auto_chooses_the_encoder_that_reads_the_language(
    column: str, chosen: str, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder_choice, "MAX_IMAGES", 300)
    source = [f"{real_data}/flickr8k/captions.jsonl"]
    train = read_data_splits(source, EvaluateConfig(), {"captions": column}, SkipLog(), "unchecked").train
    tower = VisionTower.from_pretrained("efficientnet-lite0", image_size=96)
    choice = encoder_choice.choose_caption_encoder(train, tower, encoder_choice.download_candidate_encoders())
    assert choice["encoder"]["path"] == chosen
