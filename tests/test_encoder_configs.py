"""The built-in configs of the paper's text encoders, with tiny models that have the encoders' layout and tokens."""

from pathlib import Path

import pytest
import torch
import yaml
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import AddedToken
from transformers import AutoModel, AutoTokenizer, MistralConfig, MistralModel

from llm2clip.cli.commands import read_builtin_configs
from llm2clip.models.published_encoders import load_adapter_encoder
from llm2clip.models.text.caption_encoder import CaptionEncoder
from official_reference import LLM_CONFIG, make_weights, save_llama2_tokenizer, save_llm, save_lora

TEXTS = ["a dog", "Two children play in the snow, and their mother watches them.", "一只猫"]
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
    for text, embedding in zip(TEXTS, encoder.encode(TEXTS), strict=True):
        ids = tokenizer(f"<s>{text}</s>", add_special_tokens=False, return_tensors="pt")["input_ids"]
        expected = llm(input_ids=ids).last_hidden_state[0, -1]
        torch.testing.assert_close(embedding, expected / expected.norm(), atol=1e-5, rtol=0)


def test_llm2vec_template_is_the_template_of_the_converted_encoder(tmp_path: Path) -> None:
    base = save_llm(tmp_path / "llm")
    adapters = [save_lora(tmp_path / name, base, name) for name in ("mntp", "supervised")]
    converted = load_adapter_encoder(adapters)
    converted.save_pretrained(tmp_path / "encoder")
    encoder = open_with_config(tmp_path / "encoder", "llm2vec-llama-3-8b")
    assert encoder.tokenize(TEXTS) == converted.tokenize(TEXTS)
    assert torch.equal(encoder.encode(TEXTS), converted.encode(TEXTS))


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
