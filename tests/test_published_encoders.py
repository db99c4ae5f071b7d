"""Published caption encoders: LoRA adapters, NV-Embed-v2, and the built-in configs of the paper's text encoders."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import AddedToken
from transformers import AutoModel, AutoTokenizer, MistralConfig, MistralModel

from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.cli.commands import read_builtin_configs
from llm2clip.models.export.transformers import build_exported_model
from llm2clip.models.loading import fingerprint
from llm2clip.models.official_checkpoint import load_official_checkpoint
from llm2clip.models.published_encoders import (
    LLAMA_3_1_8B,
    find_lora_adapter,
    is_nv_embed,
    load_encoder_with_lora,
    load_nv_embed,
)
from llm2clip.models.text import latent_attention
from llm2clip.models.text.caption_encoder import CaptionEncoder
from official_reference import (
    FIXTURE,
    LLM_CONFIG,
    MAX_LENGTH,
    NV_EMBED_FIXTURE,
    NV_EMBED_TEXTS,
    TEXTS,
    make_weights,
    save_llama2_tokenizer,
    save_llm,
    save_lora,
    save_nv_embed,
)
from test_published_checkpoints import write_checkpoint


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_lora(tmp_path / "mntp", base, "mntp")


def test_chain_of_adapters_matches_the_authors_class(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The reference merges the same two adapters with the LLM2Vec class of the authors' code."""
    second = save_lora(tmp_path / "supervised", base, "supervised")
    (second / "llm2vec_config.json").write_text(json.dumps({"pooling_mode": "mean", "max_length": MAX_LENGTH}))
    reference = json.loads(FIXTURE.read_text())["texts"]["adapters"]
    names = ["short", "longer", "other script", "spaces at the end"]
    expected = torch.tensor([reference[name] for name in names])
    for sources in ([adapter, second], [base, adapter, second]):
        encoder = load_encoder_with_lora(sources)
        assert encoder.st.max_seq_length == MAX_LENGTH
        torch.testing.assert_close(encoder.encode([TEXTS[name] for name in names]), expected, atol=1e-5, rtol=0)
    other_order = load_encoder_with_lora([base, second]).encode([TEXTS["short"]])
    assert not torch.allclose(other_order, expected[:1], atol=1e-2)


def test_adapter_whose_base_is_an_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    second = save_lora(tmp_path / "supervised", adapter, "supervised")
    captions = list(TEXTS.values())
    assert torch.equal(
        load_encoder_with_lora([second]).encode(captions), load_encoder_with_lora([adapter, second]).encode(captions)
    )
    loop = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(adapter)}
    (adapter / "adapter_config.json").write_text(json.dumps(loop))
    with pytest.raises(ValueError, match="the chain of adapters is circular"):
        load_encoder_with_lora([adapter])


def test_adapter_of_a_causal_lm(base: Path, adapter: Path) -> None:
    """Its tensor names contain the decoder's name, and its task type requires an LM head."""
    expected = load_encoder_with_lora([adapter]).encode(["a dog"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace("model.layers", "model.model.layers"): tensor for name, tensor in tensors.items()}
    save_file(renamed, adapter / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(load_encoder_with_lora([adapter]).encode(["a dog"]), expected)


def test_adapters_that_do_not_match_are_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.layers.0.mlp.up_proj.lora_A.weight"
    config = json.loads((adapter / "adapter_config.json").read_text())

    def check(message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            load_encoder_with_lora([adapter])

    save_file({n: t for n, t in tensors.items() if n != name}, adapter / "adapter_model.safetensors")
    check(rf"does not match the LLM .*shaped tensors: 1, including {name}.*was trained on: {base}")
    save_file(tensors | {name: torch.zeros(4, 31)}, adapter / "adapter_model.safetensors")
    check(rf"wrongly shaped tensors: 1, including {name}")
    save_file(tensors, adapter / "adapter_model.safetensors")
    (adapter / "llm2vec_config.json").write_text('{"pooling_mode": "eos_token"}')
    check(r"pooling_mode must be 'mean' \(got 'eos_token'\)")
    (adapter / "llm2vec_config.json").write_text('{"skip_instruction": false}')
    check("skip_instruction must be true")
    (adapter / "llm2vec_config.json").unlink()
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    check(rf"LoRA adapter for {tmp_path}/gone.*llm2clip convert LLM {adapter} --out", FileNotFoundError)
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "IA3", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]})
    )
    check("is not a LoRA adapter")
    with pytest.raises(ValueError, match=r"is not a PEFT adapter: it has no adapter_config\.json"):
        load_encoder_with_lora([base, base])


def test_find_adapter_downloads_a_subfolder_of_a_repository(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, _, subfolder = LLAMA_3_1_8B.rpartition("/")
    adapter.rename(tmp_path / subfolder)

    def download(name: str, allow_patterns: list[str], revision: None) -> str:
        assert name == repository
        assert {f"{subfolder}/adapter_config.json", f"{subfolder}/adapter_model.safetensors"} <= set(allow_patterns)
        assert all(pattern.startswith(subfolder) and "*" not in pattern for pattern in allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("llm2clip.models.loading.find_hub_problem", lambda: "")
    assert find_lora_adapter(LLAMA_3_1_8B) == tmp_path / subfolder
    assert find_lora_adapter(Path("weights.pt")) is None and find_lora_adapter("C:\\weights\\model.pt") is None


def test_convert_command_merges_adapters(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second, out = save_lora(tmp_path / "supervised", base, "supervised"), tmp_path / "encoder"
    assert main(["convert", str(adapter), str(second), "--out", str(out)]) == 0
    output = capsys.readouterr().out
    assert f"Caption encoder: {out}" in output
    assert f"llm2clip fit DATA --out RUN --encoder.path {out}" in output
    captions = list(TEXTS.values())
    expected = load_encoder_with_lora([adapter, second]).encode(captions)
    assert torch.equal(CaptionEncoder.from_pretrained(out, device="cpu").encode(captions), expected)
    assert main(["convert", str(adapter), "--out", str(out)]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(adapter), "--out", str(tmp_path / "x"), "--to", "hf"]) == 1
    assert "--to and --text cannot be used with LoRA adapters" in capsys.readouterr().err

    checkpoint, model = write_checkpoint("siglip2", tmp_path), tmp_path / "model"
    assert main(["convert", str(checkpoint), "--out", str(model)]) == 0
    assert "--text ENCODER" in capsys.readouterr().out
    assert main(["convert", str(model), "--out", str(model), "--text", str(adapter)]) == 0
    assert torch.equal(
        LLM2CLIP.from_pretrained(model, device="cpu").encode_text(captions),
        load_official_checkpoint(checkpoint, text=adapter).encode_text(captions),
    )


def test_adapter_folders_are_rejected_as_encoders_with_the_command_to_convert_them(adapter: Path) -> None:
    with pytest.raises(ValueError, match=f"llm2clip convert {adapter} --out ENCODER"):
        CaptionEncoder.from_pretrained(adapter)


NV_TEXTS = list(NV_EMBED_TEXTS.values())


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
    torch.testing.assert_close(encoder.encode(NV_TEXTS), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_embedding_does_not_depend_on_its_batch(converted: Path, attention: str, side: str) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, attention=attention, device="cpu")
    encoder.tokenizer.padding_side = side
    alone = torch.cat([encoder.encode(text) for text in NV_TEXTS])
    for batch_tokens in (1, 40, 10_000):
        assert torch.allclose(encoder.encode(NV_TEXTS, batch_tokens=batch_tokens), alone, atol=1e-5)


def test_chunks_do_not_change_embeddings(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, device="cpu")
    expected = encoder.encode(NV_TEXTS)
    monkeypatch.setattr(latent_attention, "TOKENS_PER_CHUNK", 3)
    assert torch.allclose(encoder.encode(NV_TEXTS), expected, atol=1e-6)


def test_gradients_reach_the_llm(converted: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(converted, device="cpu")
    weight = encoder.llm.layers[0].mlp.down_proj.weight
    ids = encoder.tokenize(NV_TEXTS).ids
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
    assert torch.equal(copy.encode(NV_TEXTS), encoder.encode(NV_TEXTS))
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
    unnormalized = load_nv_embed(published).encode(NV_TEXTS)
    config = json.loads((published / "config.json").read_text())
    config["latent_attention_config"]["output_normalize"] = True
    (published / "config.json").write_text(json.dumps(config))
    load_nv_embed(published).save_pretrained(tmp_path / "encoder")
    embeddings = CaptionEncoder.from_pretrained(tmp_path / "encoder", device="cpu").encode(NV_TEXTS)
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
    with pytest.raises(ValueError, match="does not support the caption encoder's latent attention pooling"):
        build_exported_model(model)


CAPTIONS = ["a dog", "Two children play in the snow, and their mother watches them.", "一只猫"]
DEEPSEEK_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>")


def open_with_config(folder: Path, config: str) -> CaptionEncoder:
    settings = yaml.safe_load(read_builtin_configs()[config])["encoder"]
    return CaptionEncoder.from_pretrained(**{**settings, "path": str(folder)}, device="cpu")


@pytest.mark.parametrize("adds_end_token", [True, False])
@torch.no_grad()
def test_bge_en_icl_is_the_normalized_state_of_the_end_token(tmp_path: Path, adds_end_token: bool) -> None:
    """Whether or not the tokenizer adds </s> itself, which depends on the version of transformers."""
    model = MistralModel(MistralConfig(**LLM_CONFIG))
    model.load_state_dict(make_weights({name: tuple(t.shape) for name, t in model.state_dict().items()}))
    model.save_pretrained(tmp_path / "llm")
    save_llama2_tokenizer(tmp_path / "llm", adds_end_token)
    transformer = Transformer(str(tmp_path / "llm"))
    transformer.tokenizer.pad_token = "</s>"
    st = SentenceTransformer(modules=[transformer, Pooling(32, "lasttoken"), Normalize()])
    st.save_pretrained(str(tmp_path / "bge-en-icl"))

    encoder = open_with_config(tmp_path / "bge-en-icl", "bge-en-icl")
    llm, tokenizer = AutoModel.from_pretrained(tmp_path / "llm"), AutoTokenizer.from_pretrained(tmp_path / "llm")
    for text, embedding in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        ids = tokenizer(f"<s>{text}</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected = llm(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(embedding, expected / expected.norm(), atol=1e-5, rtol=0)


def test_llm2vec_template_is_the_template_of_the_converted_encoder(tmp_path: Path) -> None:
    base = save_llm(tmp_path / "llm")
    adapters = [save_lora(tmp_path / name, base, name) for name in ("mntp", "supervised")]
    converted = load_encoder_with_lora(adapters)
    converted.save_pretrained(tmp_path / "encoder")
    encoder = open_with_config(tmp_path / "encoder", "llm2vec-llama-3-8b")
    assert encoder.tokenize(CAPTIONS) == converted.tokenize(CAPTIONS)
    assert torch.equal(encoder.encode(CAPTIONS), converted.encode(CAPTIONS))


@torch.no_grad()
def test_deepseek_template_pools_the_caption_and_the_end_token(tmp_path: Path) -> None:
    save_llm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    begin, end, user, assistant = DEEPSEEK_TOKENS
    tokenizer.add_special_tokens({"bos_token": begin, "eos_token": end, "pad_token": end})
    tokenizer.add_tokens([AddedToken(user, normalized=False), AddedToken(assistant, normalized=False)])  # not special
    tokenizer.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path)

    encoder = open_with_config(tmp_path, "deepseek-r1-distill-llama-8b")
    (ids,) = encoder.tokenize(["  a dog "]).ids
    assert encoder.tokenizer.convert_ids_to_tokens(ids) == [begin, user, *"aĠdog", end]
    states = encoder.llm(input_ids=torch.tensor([ids])).last_hidden_state  # (1, T, D)
    torch.testing.assert_close(encoder.encode("a dog")[0], states[0, 2:].mean(0), atol=1e-5, rtol=0)
