"""Direct fine-tuning of both towers of a CLIP model, the paper's baseline."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from align_fixtures import ALIGN, killed_after, read_split
from conftest import load_benchmark
from llm2clip.config import AlignConfig
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.models.clip_models import load_clip_text_encoder
from llm2clip.models.dual_encoder import open_dual_encoder
from llm2clip.runs.output_folder import read_metrics

script = load_benchmark("finetune_clip")
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def make_tokenizer() -> CLIPTokenizerFast:
    """A CLIP tokenizer whose tokens are single letters."""
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizerFast(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=16)


@pytest.fixture(params=["clip", "siglip"])
def clip(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a tiny random CLIP or SigLIP model."""
    tokenizer = make_tokenizer()
    text = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**SIZES, "image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    if request.param == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
        torch.nn.init.constant_(model.logit_scale, math.log(20))
    else:
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
        torch.nn.init.constant_(model.logit_scale, math.log(20))
        torch.nn.init.constant_(model.logit_bias, -5.0)
    folder = tmp_path / request.param
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


def settings(clip: Path, **changes: Any) -> AlignConfig:
    loss: Any = "sigmoid" if clip.name == "siglip" else "infonce"
    return dataclasses.replace(ALIGN, tower=str(clip), image_size=None, loss=loss, lr=1e-3, **changes)


def test_model_gives_the_embeddings_of_the_original_model(clip: Path) -> None:
    text_encoder = load_clip_text_encoder(str(clip), torch.device("cpu"))
    captions = script.TokenizedCaptions(text_encoder)
    texts = ["a dog", "two red cats in the rain", "a dog"]
    rows = captions.find_rows(texts)
    assert rows.tolist() == [0, 1, 0]
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    original: Any = AutoModel.from_pretrained(clip)
    model = script.build_finetuning_model(text_encoder.model, settings(clip)).eval()
    with torch.no_grad():
        image, text, scale, bias = model(pixels=pixels, embeddings=torch.from_numpy(captions.take(rows)))
        expected_text = load_clip_text_encoder(str(clip), torch.device("cpu")).encode(texts)
        normalized = (pixels / 255 - model.tower.mean) / model.tower.std
        features = original.get_image_features(pixel_values=normalized)
        expected_image = features if isinstance(features, Tensor) else features.pooler_output
    torch.testing.assert_close(text, F.normalize(expected_text, dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(image, F.normalize(expected_image, dim=-1), atol=1e-6, rtol=0)
    assert scale.item() == pytest.approx(20)
    assert bias.item() == pytest.approx(-5 if clip.name == "siglip" else 0)


def test_both_towers_are_trained_and_the_result_is_an_ordinary_model(clip: Path, image_folder: Path) -> None:
    records = read_split(image_folder)
    out = clip.parent / "out"
    folder = script.finetune_clip(
        RecordTable.from_records(records), settings(clip, epochs=3, tower_lr=1e-3), out, SkipLog()
    )
    losses = [line["loss"] for line in read_metrics(out / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    before, after = AutoModel.from_pretrained(clip).state_dict(), AutoModel.from_pretrained(folder).state_dict()
    unchanged = [name for name in before if torch.equal(before[name], after[name]) and before[name].is_floating_point()]
    assert not [name for name in unchanged if "position" not in name and "k_proj.bias" not in name], unchanged
    trained = open_dual_encoder(str(folder))
    assert trained.encode_texts(["a dog"]).shape == (1, trained.embed_dim)


def test_interrupted_run_resumes_with_the_same_result(clip: Path, image_folder: Path) -> None:
    records, config = read_split(image_folder), settings(clip, epochs=1, save_steps=1)
    complete = script.finetune_clip(RecordTable.from_records(records), config, clip.parent / "complete", SkipLog())

    interrupted = clip.parent / "interrupted"
    with killed_after(1):
        script.finetune_clip(RecordTable.from_records(records), config, interrupted, SkipLog())
    assert not (interrupted / "model").exists()
    resumed = script.finetune_clip(RecordTable.from_records(records), config, interrupted, SkipLog())
    expected, actual = AutoModel.from_pretrained(complete).state_dict(), AutoModel.from_pretrained(resumed).state_dict()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)


def test_script_trains_the_baseline(clip: Path, image_folder: Path) -> None:
    out = clip.parent / "run"
    command = [f"{image_folder / 'captions.jsonl'}@train", "--out", str(out), "--align.tower", str(clip)]
    script.main([*command, "--align.batch_size", "8", "--align.epochs", "1", "--align.workers", "0"])
    assert json.loads((out / "model" / "config.json").read_text())["model_type"] == clip.name


def test_unsupported_tower_is_an_error(tmp_path: Path) -> None:
    from transformers import AltCLIPConfig, AltCLIPModel

    AltCLIPModel(
        AltCLIPConfig(
            text_config={**SIZES, "vocab_size": 60, "project_dim": 16},
            vision_config={**SIZES, "image_size": 32, "patch_size": 16},
        )
    ).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'altclip' model, which is not supported"):
        script.finetune_clip(
            RecordTable.from_records([]), AlignConfig(tower=str(tmp_path)), tmp_path / "out", SkipLog()
        )
