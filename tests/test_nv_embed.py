"""NV-Embed-v2: conversion, latent attention pooling, batches, saving and unsupported uses."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from llm2clip.cli import main
from llm2clip.models.export.transformers import build_export_model
from llm2clip.models.loading import fingerprint
from llm2clip.models.published_encoders import is_nv_embed, load_nv_embed
from llm2clip.models.text import latent_attention
from llm2clip.models.text.caption_encoder import CaptionEncoder
from official_reference import NV_EMBED_FIXTURE, NV_EMBED_TEXTS, save_nv_embed

TEXTS = list(NV_EMBED_TEXTS.values())


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return save_nv_embed(tmp_path / "NV-Embed-v2")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the encoder that the command `convert` writes."""
    folder = tmp_path_factory.mktemp("nv-embed")
    source = save_nv_embed(folder / "published")
    assert main(["convert", str(source), "--out", str(folder / "encoder")]) == 0
    return folder / "encoder"


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_converted_encoder_matches_the_official_class(converted: Path, attention: str) -> None:
    reference = json.loads(NV_EMBED_FIXTURE.read_text())
    expected = torch.tensor([reference[name] for name in NV_EMBED_TEXTS])
    encoder = CaptionEncoder.from_pretrained(converted, attention=attention, device="cpu")
    torch.testing.assert_close(encoder.encode(TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_embedding_does_not_depend_on_its_batch(converted: Path, attention: str, side: str) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, attention=attention, device="cpu")
    encoder.tokenizer.padding_side = side
    alone = torch.cat([encoder.encode(text) for text in TEXTS])
    for batch_tokens in (1, 40, 10_000):
        assert torch.allclose(encoder.encode(TEXTS, batch_tokens=batch_tokens), alone, atol=1e-5)


def test_chunks_do_not_change_embeddings(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, device="cpu")
    expected = encoder.encode(TEXTS)
    monkeypatch.setattr(latent_attention, "TOKENS_PER_CHUNK", 3)
    assert torch.allclose(encoder.encode(TEXTS), expected, atol=1e-6)


def test_gradients_reach_the_llm(converted: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, device="cpu")
    weight = encoder.llm.layers[0].mlp.down_proj.weight
    ids = encoder.tokenize(TEXTS).ids
    (gradient,) = torch.autograd.grad(encoder(ids).square().sum(), weight)
    step = 1e-3 * gradient / gradient.norm()
    with torch.no_grad():  # compare with the finite difference along the gradient
        weight += step
        higher = encoder(ids).square().sum()
        weight -= 2 * step
        lower = encoder(ids).square().sum()
    assert float(higher - lower) == pytest.approx(2e-3 * float(gradient.norm()), rel=0.02)


@torch.no_grad()
def test_instructions_are_excluded_from_pooling(converted: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, device="cpu")
    instruction = "Find the image:\n"
    encoder.exclude_prompts_from_pooling([instruction])
    tokens = encoder.tokenize(["a dog"], prompts=[instruction])
    ids = torch.tensor(tokens.ids)
    states = encoder.st[1].transform_tokens(encoder.llm(input_ids=ids).last_hidden_state)  # (1, T, D)
    expected = states[0, 1 + len(instruction) :].mean(0)  # the tokenizer has one token per byte, and a begin token
    assert torch.allclose(encoder.encode(tokens)[0], expected, atol=1e-5)


def test_saved_encoder_is_unchanged(converted: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, device="cpu")
    encoder.save_pretrained(tmp_path / "copy")
    copy = CaptionEncoder.from_pretrained(tmp_path / "copy", device="cpu")
    assert torch.equal(copy.encode(TEXTS), encoder.encode(TEXTS))
    assert fingerprint(copy.identity()) == fingerprint(encoder.identity())
    with torch.no_grad():
        copy.st[1].latents[0, 0] += 1
    assert fingerprint(copy.identity()) != fingerprint(encoder.identity())


def test_sentence_transformers_requires_trust(converted: Path) -> None:
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        SentenceTransformer(str(converted), device="cpu")
    st = SentenceTransformer(str(converted), device="cpu", trust_remote_code=True)
    expected = CaptionEncoder.from_pretrained(converted, device="cpu").encode("a dog")
    assert torch.allclose(torch.tensor(st.encode(["a dog"])), expected, atol=1e-5)


def test_output_normalization_is_kept(published: Path, tmp_path: Path) -> None:
    unnormalized = load_nv_embed(published).encode(TEXTS)
    config = json.loads((published / "config.json").read_text())
    config["latent_attention_config"]["output_normalize"] = True
    (published / "config.json").write_text(json.dumps(config))
    load_nv_embed(published).save_pretrained(tmp_path / "encoder")
    embeddings = CaptionEncoder.from_pretrained(tmp_path / "encoder", device="cpu").encode(TEXTS)
    assert torch.allclose(embeddings, torch.nn.functional.normalize(unnormalized, dim=-1), atol=1e-6)


def test_tensors_that_do_not_match_are_rejected(published: Path) -> None:
    file = published / "model.safetensors"
    tensors = load_file(file)
    latents, norm = "latent_attention_model.latents", "embedding_model.norm.weight"

    def check(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            load_nv_embed(published)

    check({n: t for n, t in tensors.items() if n != latents}, 'LatentAttentionPooling:\\s+Missing key.*"latents"')
    check({n: t for n, t in tensors.items() if n != norm}, 'MistralModel:\\s+Missing key.*"norm.weight"')
    check({**tensors, norm: torch.ones(31)}, r"size mismatch for norm.weight: .*\[31\].*\[32\]")
    check({**tensors, "head.weight": torch.ones(1)}, 'Unexpected key.*"head.weight"')
    buffers = {**tensors, "embedding_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(buffers, file)
    load_nv_embed(published)


def test_other_folders_are_not_nv_embed(converted: Path, published: Path, tmp_path: Path) -> None:
    assert is_nv_embed(published)
    assert not is_nv_embed(converted)
    assert not is_nv_embed(tmp_path / "missing")


def test_published_format_must_be_converted_first(published: Path) -> None:
    with pytest.raises(ValueError, match=f"must be converted first.*llm2clip convert {published} --out ENCODER"):
        CaptionEncoder.from_pretrained(published, device="cpu")


def test_latent_attention_cannot_be_replaced_or_exported(converted: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, pooling="mean", device="cpu")
    assert isinstance(encoder.st[1], latent_attention.LatentAttentionPooling)
    with pytest.raises(ValueError, match="cannot be replaced with 'lasttoken' pooling"):
        CaptionEncoder.from_pretrained(converted, pooling="lasttoken", device="cpu")
    model: Any = SimpleNamespace(encoder=encoder)
    with pytest.raises(ValueError, match="latent attention pooling, which this format does not support"):
        build_export_model(model)
