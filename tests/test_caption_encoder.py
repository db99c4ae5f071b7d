"""Tests of the caption encoder: attention, packing, templates, saving, fingerprints and precision."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from transformers import AutoConfig, AutoModel, LlamaConfig, MistralConfig
from transformers.utils.logging import is_progress_bar_enabled

from conftest import FAMILIES, make_llm, save_tokenizer
from llm2clip.models.loading import fingerprint, select_output_entries
from llm2clip.models.precision import CALIBRATION_CAPTIONS, calibrate_precision
from llm2clip.models.text import packing
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.packing import TokenizedTexts, batch_by_length, get_default_encoding_batch_tokens

TEXTS = ["a dog", "a very long caption about two dogs that run through deep snow near a house", "猫"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {f: make_llm(tmp_path_factory.mktemp(f), f) for f in FAMILIES}


def first_token_state(encoder: CaptionEncoder, batch: list[str]) -> torch.Tensor:
    """Return the hidden state of the first token, padding excluded, of the first text of a batch."""
    features = encoder.collate(encoder.tokenize(batch).ids)
    states: torch.Tensor = encoder.st[0](features)["token_embeddings"].flatten(0, 1)
    return states[0 if "cu_seq_lens_q" in features else features["attention_mask"][0].argmax()]


@pytest.mark.parametrize("backend", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_direction_matches_bidirectional_option(
    folders: dict[str, Path], family: str, bidirectional: bool, backend: str
) -> None:
    """Changing the last token changes the state of the first one if bidirectional, and not if causal."""
    encoder = CaptionEncoder.from_pretrained(
        folders[family], bidirectional=bidirectional, attention=backend, device="cpu"
    )
    for side, extra in (("right", []), ("right", ["a cat sat"]), ("right", [TEXTS[1]]), ("left", [TEXTS[1]])):
        encoder.tokenizer.padding_side = side
        state, changed_state = (first_token_state(encoder, [text, *extra]) for text in ("a dog ru", "a dog sa"))
        change = (state - changed_state).abs().max()
        assert (change > 1e-3) if bidirectional else (change == 0)


def test_flex_attention_is_rejected_on_cpus_where_it_returns_nan(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="NaN on CPUs without AVX-512"):
        CaptionEncoder.from_pretrained(llm, attention="flex_attention", device="cpu")


@pytest.mark.parametrize(("attention", "side"), [("packed", "right"), ("sdpa", "right"), ("sdpa", "left")])
@pytest.mark.parametrize("family", FAMILIES)
def test_embedding_does_not_depend_on_its_batch(
    folders: dict[str, Path], family: str, attention: str, side: str
) -> None:
    encoder = CaptionEncoder.from_pretrained(folders[family], attention=attention, device="cpu")
    encoder.tokenizer.padding_side = side
    embeddings = encoder.encode(TEXTS, batch_tokens=10_000)
    for text, embedding in zip(TEXTS, embeddings, strict=True):
        assert torch.allclose(encoder.encode([text])[0], embedding, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_captions_do_not_attend_to_each_other(
    folders: dict[str, Path], family: str, window: int | None, bidirectional: bool, tmp_path: Path
) -> None:
    """The states of a packed caption equal those of the caption alone, and do not change with its neighbours.

    Also if the sliding window is shorter than the caption.
    """
    if window:
        shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        config |= {"sliding_window": window, "use_sliding_window": True} | (layers if "layer_types" in config else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
    folder = tmp_path if window else folders[family]
    encoder = CaptionEncoder.from_pretrained(folder, bidirectional=bidirectional, device="cpu")
    assert encoder.attention == "packed"
    reference = CaptionEncoder.from_pretrained(folder, bidirectional=bidirectional, attention="eager", device="cpu")
    texts = [TEXTS[1], "two dogs", "two cats", "a dog", "two mice", "x"]
    ids = encoder.tokenize(texts).ids
    features = encoder.collate(ids)
    assert features["input_ids"].shape == (1, sum(map(len, ids)))
    states = encoder.st[0](features)["token_embeddings"][0].split([len(row) for row in ids])
    for row, packed_states in zip(ids, states, strict=True):
        expected = reference.llm(input_ids=torch.tensor([row])).last_hidden_state[0]
        assert torch.allclose(packed_states, expected, atol=1e-5)
    if window and family != "llama":  # Llama has no sliding window
        unlimited = CaptionEncoder.from_pretrained(folders[family], bidirectional=bidirectional, device="cpu")
        assert not torch.allclose(unlimited.llm(input_ids=torch.tensor([ids[0]])).last_hidden_state[0], states[0])
    changed = encoder.st[0](encoder.collate([*ids[:2], ids[2][::-1], *ids[3:]]))["token_embeddings"][0]
    for n, changed_states in enumerate(changed.split([len(row) for row in ids])):
        assert torch.equal(changed_states, states[n]) == (n != 2)


@torch.no_grad()
def test_model_without_attention_direction_is_packed_only_on_request(folders: dict[str, Path], tmp_path: Path) -> None:
    """Packing on request uses the direction of the attention layers, as padding does."""
    CaptionEncoder.from_pretrained(folders["mistral"], bidirectional=False, device="cpu").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": 4}
    del config["is_causal"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    padded = CaptionEncoder.from_pretrained(tmp_path, device="cpu")
    packed = CaptionEncoder.from_pretrained(tmp_path, attention="packed", device="cpu")
    assert padded.attention == "sdpa"
    assert torch.allclose(packed.encode(TEXTS), padded.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("modernbert", {"global_attn_every_n_layers": 2, "pad_token_id": 0}),
    ],
)
def test_conv_and_modernbert_models_fall_back_to_padding(family: str, options: dict, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        **options,
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = CaptionEncoder.from_pretrained(tmp_path, device="cpu")
    assert encoder.attention == "sdpa"
    assert torch.allclose(encoder.encode(TEXTS, batch_tokens=10_000)[0], encoder.encode(TEXTS[:1])[0], atol=1e-5)


def test_encode_empty_text_is_zero(encoder: CaptionEncoder) -> None:
    for batch_tokens in (None, 3):
        embeddings = encoder.encode(["", "a dog", ""], batch_tokens=batch_tokens)
        assert torch.equal(embeddings[0], torch.zeros(32)) and embeddings[1].any()
    assert torch.equal(encoder.encode(""), torch.zeros(1, 32))
    assert encoder.encode([]).shape == (0, 32)


def test_encode_rejects_invalid_strings(encoder: CaptionEncoder) -> None:
    invalid: dict[Any, type[Exception]] = {None: TypeError, b"a cat": TypeError, "a \ud83d cat": ValueError}
    for text, error in invalid.items():
        with pytest.raises(error, match="text 1"):
            encoder.encode(["a dog", text])


def test_from_pretrained_fails_on_missing_weights(tmp_path: Path) -> None:
    folder = make_llm(tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]  # transformers only warns, and leaves it random
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the model weight layers\.1\.mlp\.up_proj.* \(1 missing in total\)"):
        CaptionEncoder.from_pretrained(folder)


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken", "max", "cls"])
@pytest.mark.parametrize("template", [None, "<|user|>say: {caption}<|end|>"])
def test_packed_and_padded_embeddings_are_equal(llm: Path, pooling: str, template: str | None) -> None:
    packed, padded = (
        CaptionEncoder.from_pretrained(llm, pooling=pooling, template=template, attention=a, device="cpu")
        for a in (None, "sdpa")
    )
    assert torch.allclose(packed.encode(TEXTS), padded.encode(TEXTS), atol=1e-5)
    assert fingerprint(packed.identity()) == fingerprint(padded.identity())
    padded_by_st = packed.st.encode(TEXTS, convert_to_tensor=True)  # padded batches, with packed attention
    assert torch.allclose(padded_by_st, packed.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{}, {"layers": 2}, {"layers": 99}, {"template": "<|user|>say: {caption}<|end|>"}, {"pooling": "lasttoken"}],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_saved_folder_gives_equal_embeddings_in_sentence_transformers(
    folders: dict[str, Path], family: str, options: dict, tmp_path: Path
) -> None:
    encoder = CaptionEncoder.from_pretrained(folders[family], device="cpu", **options)
    embeddings = encoder.encode(TEXTS)
    encoder.save_pretrained(tmp_path)
    reference = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(reference, embeddings, atol=1e-5)
    reopened = CaptionEncoder.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(reopened.encode(TEXTS), embeddings)
    assert reopened.identity() == encoder.identity()
    assert not list(tmp_path.rglob("*.bin"))


def test_encode_precision_sets_dtype_of_each_layer(encoder: CaptionEncoder) -> None:
    dtypes: list[torch.dtype] = []
    for layer in encoder.llm.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    for precision, expected in {
        "fp32": [torch.float32] * 3,
        "bf16": [torch.bfloat16] * 3,
        "bf16+2": [torch.float32, torch.float32, torch.bfloat16],
    }.items():
        dtypes.clear()
        embedding = encoder.encode("a dog", precision=precision)
        assert dtypes == expected and embedding.dtype == torch.float32
    assert not any("forward" in vars(layer) for layer in encoder.llm.layers)  # the layers are restored
    for wrong in ("fp16", "bf16+", "bf16+x"):
        with pytest.raises(ValueError, match="precision must be"):
            encoder.encode("a dog", precision=wrong)


def test_calibrate_precision_finds_layers_that_need_fp32(
    encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that amplifies small errors needs fp32, and so do the layers before it."""
    assert calibrate_precision(encoder) == "bf16"
    exact = encoder.encode(CALIBRATION_CAPTIONS)
    mlp, was_autocast = encoder.llm.layers[1].mlp, {}
    forward = mlp.forward
    encoder.llm.layers[0].mlp.register_forward_pre_hook(
        lambda *_: was_autocast.update(first_layer=torch.is_autocast_enabled("cpu"))
    )

    def amplified(x: torch.Tensor) -> torch.Tensor:
        output = forward(x)
        is_exact = not was_autocast["first_layer"] and not torch.is_autocast_enabled("cpu")
        return output if is_exact else output + 30 * torch.randn(output.shape)

    monkeypatch.setattr(mlp, "forward", amplified)
    assert calibrate_precision(encoder) == "bf16+2"
    for precision, is_accurate in (("bf16+2", True), ("bf16+1", False)):
        embeddings = encoder.encode(CALIBRATION_CAPTIONS, precision=precision)
        assert (torch.cosine_similarity(embeddings, exact).min() > 0.999) == is_accurate


def test_tokenize_does_not_apply_chat_template(encoder: CaptionEncoder) -> None:
    """By default, sentence-transformers 6 wraps every text in the chat template. Here 5 bytes must stay 5 tokens."""
    assert [len(i) for i in encoder.tokenize(["a dog"]).ids] == [5]
    assert len(encoder.st.tokenize(["a dog"])["input_ids"][0]) == 5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken"])
@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        (None, [], []),
        ("<|user|>{caption}<|end|>", [1], [0]),
        ("<|user|>say:{caption}<|end|>", [1, "s", "a", "y", ":"], [0]),
        ("say:{caption}", ["s", "a", "y", ":"], []),
    ],
)
@torch.no_grad()
def test_pooling_with_template_matches_its_definition(
    llm: Path, pooling: str, template: str | None, before: list, after: list[int], side: str
) -> None:
    """The text before the caption is excluded from pooling, the token after it is included.

    The weights of weightedmean count from the first token of the input. The longer second text causes padding.
    """
    encoder = CaptionEncoder.from_pretrained(llm, template=template, pooling=pooling, device="cpu")
    encoder.tokenizer.padding_side = side
    token = encoder.tokenizer.convert_tokens_to_ids
    ids = [*(b if isinstance(b, int) else token(b) for b in before), *token(list("dog")), *after]
    assert encoder.tokenize(["dog"]).ids == [ids]
    assert encoder.tokenize(["dog"]).prompt_lengths == [len(before)]
    states = encoder.llm(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    weights = torch.arange(1.0, len(ids) + 1) if pooling == "weightedmean" else torch.ones(len(ids))
    weights[: len(before)] = 0
    expected = states[-1] if pooling == "lasttoken" else (weights.double() @ states) / weights.sum()
    assert torch.allclose(encoder.encode(["dog", TEXTS[1]], batch_tokens=10_000)[0].double(), expected, atol=1e-5)


@torch.no_grad()
def test_prompt_length_excludes_trailing_space(tmp_path: Path) -> None:
    """A trailing space is a token on its own, but before a caption it is part of the first word's token."""
    from tokenizers import models
    from transformers import AutoTokenizer

    make_llm(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    space = tokenizer.tokenize(" ")[0]
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {**state["model"]["vocab"], f"{space}a": 298, f"{space}1": 299}
    merges = [(space, "a"), (space, "1")]
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=merges)
    tokenizer.save_pretrained(tmp_path)
    encoder = CaptionEncoder.from_pretrained(tmp_path, device="cpu")
    tokens = encoder.tokenize(["abc"], ["go: "])
    assert tokens.prompt_lengths == [3] and len(tokens.ids[0]) == 6  # g o : | _a b c
    with pytest.raises(ValueError, match="must not end in a space"):
        CaptionEncoder.from_pretrained(tmp_path, template="go: {caption}", device="cpu")


def test_truncate_dim_keeps_first_dimensions(llm: Path, encoder: CaptionEncoder, tmp_path: Path) -> None:
    truncated = CaptionEncoder.from_pretrained(llm, truncate_dim=12, device="cpu")
    embeddings = truncated.encode(TEXTS)
    assert truncated.embed_dim == 12 and torch.equal(embeddings, encoder.encode(TEXTS)[:, :12])
    truncated.save_pretrained(tmp_path)
    assert torch.equal(CaptionEncoder.from_pretrained(tmp_path, device="cpu").encode(TEXTS), embeddings)
    reference = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(reference, embeddings, atol=1e-5)
    assert fingerprint(truncated.identity()) != fingerprint(encoder.identity())
    assert CaptionEncoder.from_pretrained(llm, truncate_dim=1, device="cpu").embed_dim == 1
    for dim in (0, 33):
        with pytest.raises(ValueError, match="between 1 and 32"):
            CaptionEncoder.from_pretrained(llm, truncate_dim=dim, device="cpu")


@pytest.mark.parametrize(("positions", "expected"), [(128, 128), (2048, 512)])
def test_default_max_length_is_the_models_limit_or_512(
    llm: Path, tmp_path: Path, positions: int, expected: int
) -> None:
    folder = shutil.copytree(llm, tmp_path / "llm")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": positions}))
    assert CaptionEncoder.from_pretrained(folder, device="cpu").st.max_seq_length == expected


def test_layers_option_keeps_first_layers(llm: Path, encoder: CaptionEncoder) -> None:
    truncated = CaptionEncoder.from_pretrained(llm, layers=2, device="cpu")
    encoder.llm.layers = encoder.llm.layers[:2]
    assert torch.equal(truncated.encode(TEXTS), encoder.encode(TEXTS))
    assert truncated.identity()["layers"] == 2
    assert CaptionEncoder.from_pretrained(llm, layers=99, device="cpu").identity()["layers"] == 3


def test_fingerprint_depends_on_everything_that_changes_an_embedding(llm: Path, encoder: CaptionEncoder) -> None:
    base = fingerprint(encoder.identity())
    options: list[dict[str, Any]] = [
        *({}, {"bidirectional": False}, {"layers": 2}, {"template": "<|user|>{caption}<|end|>"}),
        *({"pooling": "lasttoken"}, {"max_length": 7}),
    ]
    fingerprints = [fingerprint(CaptionEncoder.from_pretrained(llm, device="cpu", **o).identity()) for o in options]
    assert fingerprints[0] == base and len(set(fingerprints)) == 6
    encoder.encode(TEXTS)  # leaves padding set in the tokenizer, which must not count
    assert fingerprint(encoder.identity()) == base
    encoder.llm.config.rms_norm_eps *= 2
    assert fingerprint(encoder.identity()) != base
    encoder.llm.config.rms_norm_eps /= 2
    assert fingerprint(encoder.identity()) == base
    with torch.no_grad():
        next(encoder.llm.parameters())[0, 0] += 1e-3
    assert fingerprint(encoder.identity()) != base


class NewerLlamaConfig(LlamaConfig):
    """Config of a transformers release that has added two entries that are off by default."""

    added_scale: float = 0.0
    added_size: int | None = None


def test_identity_depends_on_added_config_entries_only_if_they_are_set(encoder: CaptionEncoder) -> None:
    identity, values = encoder.identity(), encoder.llm.config.to_dict()
    encoder.llm.config = NewerLlamaConfig(**values)
    assert encoder.identity() == identity
    rope_parameters = {**values["rope_parameters"], "rope_theta": 500_000.0}
    for change in ({"added_scale": 2.0}, {"added_size": 3}, {"head_dim": 4}, {"rope_parameters": rope_parameters}):
        encoder.llm.config = NewerLlamaConfig(**{**values, **change})
        changed = encoder.identity()
        assert [name for name in identity if changed[name] != identity[name]] == ["config"], change


def test_identity_depends_on_the_defaults_of_the_config_class(encoder: CaptionEncoder) -> None:
    """A transformers release may change a default that the encoder's config.json does not contain."""
    identity, values = encoder.identity(), encoder.llm.config.to_diff_dict()

    class ChangedLlamaConfig(LlamaConfig):
        rms_norm_eps: float = 1e-3

    values.pop("rms_norm_eps", None)
    encoder.llm.config = ChangedLlamaConfig(**values)
    assert encoder.identity()["config"] != identity["config"]


def test_identity_of_a_config_that_is_valid_only_with_its_head_dim() -> None:
    config = MistralConfig(hidden_size=36, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    assert select_output_entries(config)["head_dim"] == 8


def test_config_of_another_model_type_is_described_differently() -> None:
    assert select_output_entries(LlamaConfig()) != select_output_entries(MistralConfig())


def test_tokenize_reports_truncated_captions(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, max_length=8, template="{caption}<|end|>", device="cpu")
    tokens = encoder.tokenize(["short", "much too long for this"])
    assert tokens.truncated == [1]
    assert len(tokens.ids[1]) == 8
    assert tokens.ids[1][-1] == 0  # the template's end token is kept


@pytest.mark.parametrize("template", ["no caption", "{caption} two words", "<|user|>{caption}"])
def test_invalid_templates_are_rejected(llm: Path, template: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        CaptionEncoder.from_pretrained(llm, template=template, device="cpu")


def test_old_transformers_versions_cannot_load_a_bidirectional_encoder(
    encoder: CaptionEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would ignore `is_causal` and return other embeddings. The version is checked before the weights are read."""
    encoder.save_pretrained(tmp_path / "first")
    CaptionEncoder.from_pretrained(tmp_path / "first", device="cpu").save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder/model.safetensors").unlink()
    monkeypatch.setattr("transformers.__version__", "5.1.0")
    for load in (SentenceTransformer, CaptionEncoder.from_pretrained):
        with pytest.raises(
            ImportError, match=r"transformers>=5\.2, but transformers==5\.1\.0 is installed. Earlier versions "
        ):
            load(str(tmp_path / "encoder"), device="cpu")
    monkeypatch.setattr("transformers.__version__", "5.2.0")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        SentenceTransformer(str(tmp_path / "encoder"), device="cpu")


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_encoders_without_is_causal_have_no_requirements(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    if family == "bert":
        config = AutoConfig.for_model("bert", hidden_size=24, intermediate_size=48, num_hidden_layers=1, vocab_size=300)
        config.num_attention_heads = 2
        AutoModel.from_config(config).save_pretrained(tmp_path / "bert")
        save_tokenizer(tmp_path / "bert")
    path = tmp_path / "bert" if family == "bert" else folders[family]
    options = {} if family == "bert" else {"bidirectional": False}
    CaptionEncoder.from_pretrained(path, device="cpu", **options).save_pretrained(tmp_path / "encoder")
    config_file = tmp_path / "encoder/config_sentence_transformers.json"
    assert "requirements" not in json.loads(config_file.read_text())


def test_saved_template_can_be_removed(llm: Path, encoder: CaptionEncoder, tmp_path: Path) -> None:
    plain = encoder.encode(TEXTS)
    CaptionEncoder.from_pretrained(llm, template="say: {caption}", device="cpu").save_pretrained(tmp_path)
    without_template = CaptionEncoder.from_pretrained(tmp_path, template="{caption}", device="cpu")
    assert torch.equal(without_template.encode(TEXTS), plain)
    assert torch.allclose(without_template.encode("a dog"), plain[:1], atol=1e-5)


def test_folder_with_only_a_peft_adapter_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"only a PEFT adapter.*llm2clip convert"):
        CaptionEncoder.from_pretrained(tmp_path)


def test_loading_and_saving_show_no_progress_bars(llm: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    CaptionEncoder.from_pretrained(llm, device="cpu").save_pretrained(tmp_path)
    CaptionEncoder.from_pretrained(tmp_path, device="cpu")
    assert capfd.readouterr().err == ""
    assert is_progress_bar_enabled()  # restored for other users of transformers


# ---- batches --------------------------------------------------------------------------------------------------------


def test_tune_batch_tokens_takes_the_fastest(encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A larger batch must be faster, and none is tried after one that is slower or does not fit in memory."""
    tokens = TokenizedTexts([[1, 2]] * packing.MIN_CAPTIONS_TO_TUNE, [], [0] * packing.MIN_CAPTIONS_TO_TUNE)
    tried: list[int] = []

    def set_speeds(speeds: dict[int, float]) -> None:
        """Simulate these speeds; other sizes do not fit in memory."""

        def speed(encoder: CaptionEncoder, tokens: TokenizedTexts, size: int, precision: str) -> float:
            tried.append(size)
            if size not in speeds:
                raise torch.OutOfMemoryError
            return speeds[size]

        tried.clear()
        monkeypatch.setattr(packing, "measure_tokens_per_second", speed)

    set_speeds({512: 100, 1024: 120, 2048: 121, 4096: 110})
    assert packing.tune_batch_tokens(encoder, tokens) == 1024 and tried == [512, 1024, 2048, 4096]
    set_speeds({512: 100, 1024: 90, 2048: 1000})
    assert packing.tune_batch_tokens(encoder, tokens) == 512 and tried == [512, 1024]
    set_speeds({512: 100, 1024: 120})
    assert packing.tune_batch_tokens(encoder, tokens) == 1024 and tried == [512, 1024, 2048]
    set_speeds({})
    assert packing.tune_batch_tokens(encoder, tokens) == 256  # not even the smallest one fits
    tried.clear()
    assert packing.tune_batch_tokens(encoder, encoder.tokenize(["a few"])) == 1024 and not tried


def test_tokens_per_second_times_batches_of_all_lengths(
    encoder: CaptionEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(packing, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    encoded_lengths: list[int] = []
    encode = encoder.encode

    def record_and_encode(tokens: TokenizedTexts, **options: Any) -> torch.Tensor:
        encoded_lengths.append(len(tokens.ids[0]))
        return encode(tokens, **options)

    monkeypatch.setattr(encoder, "encode", record_and_encode)
    lengths = [40] * 10 + [20] * 20 + [10] * 40 + [5] * 80  # 400 tokens of each length
    tokens = TokenizedTexts([[1] * n for n in lengths], [], [0] * len(lengths))
    assert packing.measure_tokens_per_second(encoder, tokens, 200, "fp32") == 200  # one second per batch
    assert encoded_lengths == [40, 40, 40, 10, 5]


@pytest.mark.parametrize(
    ("device", "hidden_size", "tokens"), [("cuda", 576, 32768), ("cuda", 4096, 16384), ("cpu", 4096, 1024)]
)
def test_default_encoding_tokens_limits_the_memory_of_large_llms(device: str, hidden_size: int, tokens: int) -> None:
    assert get_default_encoding_batch_tokens(torch.device(device), hidden_size) == tokens


def test_length_batches_cover_all_rows_within_max_tokens() -> None:
    lengths = torch.randint(1, 60, (200,)).tolist()
    batches = list(batch_by_length(lengths, 128))
    assert sorted(r for b in batches for r in b) == list(range(200))
    assert all(len(b) * max(lengths[r] for r in b) <= 128 for b in batches)
    assert list(batch_by_length([500], 128)) == [[0]]
