"""The caption encoder: attention both ways, padding, templates, the sentence-transformers folder, the fingerprint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch._dynamo.exc import TorchDynamoException
from transformers import AutoConfig, AutoModel

from conftest import FAMILIES, make_llm, save_tokenizer
from llm2clip.cpu_tuning import flex_attention_is_correct
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.fingerprint import fingerprint
from llm2clip.models.length_batching import length_batches
from llm2clip.models.packing import can_pack, first_token_indices, unfused_attention
from llm2clip.models.precision import CAPTIONS, calibrate_precision

TEXTS = ["a dog", "a very long caption about two dogs that run through deep snow near a house", "猫"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {f: make_llm(tmp_path_factory.mktemp(f), f) for f in FAMILIES}


def first_state(encoder: CaptionEncoder, batch: list[str]) -> torch.Tensor:
    """The state of the first real token of the batch's first text."""
    features = encoder.collate(encoder.tokenize(batch).ids)
    states: torch.Tensor = encoder.st[0](features)["token_embeddings"].flatten(0, 1)
    return states[first_token_indices(features)[0]]


@pytest.mark.parametrize("backend", ["packed", "sdpa", "eager", "flex_attention"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("batch", [1, 2, "padded"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_attention_is_what_was_asked(
    folders: dict[str, Path], family: str, batch: int | str, side: str, backend: str
) -> None:
    """Changing the last token changes the first token's state when bidirectional, and not when causal."""
    extra = {1: [], 2: ["a cat sat"], "padded": [TEXTS[1]]}[batch]
    for bidirectional in (True, False):
        options: dict = {"bidirectional": bidirectional, "attention": backend, "device": "cpu"}
        if backend == "flex_attention" and not flex_attention_is_correct():
            with pytest.raises(ValueError, match="NaN on CPUs without AVX-512"):
                CaptionEncoder.from_pretrained(folders[family], **options)
            continue
        encoder = CaptionEncoder.from_pretrained(folders[family], **options)
        encoder.tokenizer.padding_side = side
        try:
            one, other = (first_state(encoder, [text, *extra]) for text in ("a dog ru", "a dog sa"))
        except TorchDynamoException as error:  # flex attention is compiled, which asks for more than PyTorch alone
            pytest.skip(f"flex attention does not compile here: {str(error).splitlines()[0]}")
        change = (one - other).abs().max()
        assert (change > 1e-3) if bidirectional else (change == 0)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_vector_does_not_depend_on_its_batch(
    folders: dict[str, Path], family: str, attention: str, side: str
) -> None:
    encoder = CaptionEncoder.from_pretrained(folders[family], attention=attention, device="cpu")
    encoder.tokenizer.padding_side = side
    together = encoder.encode(TEXTS, batch_tokens=10_000)
    for text, vector in zip(TEXTS, together, strict=True):
        assert torch.allclose(encoder.encode([text])[0], vector, atol=1e-5)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packing_does_not_leak(
    folders: dict[str, Path], family: str, window: int | None, bidirectional: bool, tmp_path: Path
) -> None:
    """Each token's state in a row of captions, some of one length, is what it is in its caption alone, padded or not,
    where a window is shorter than the caption, too; and another neighbour changes nothing at all."""
    if window:
        shutil.copytree(folders[family], tmp_path, dirs_exist_ok=True)
        config = json.loads((tmp_path / "config.json").read_text())
        layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
        config |= {"sliding_window": window, "use_sliding_window": True} | (layers if "layer_types" in config else {})
        (tmp_path / "config.json").write_text(json.dumps(config))
    folder = tmp_path if window else folders[family]
    encoder = CaptionEncoder.from_pretrained(folder, bidirectional=bidirectional, device="cpu")
    assert encoder.attention == "packed"
    peer = CaptionEncoder.from_pretrained(folder, bidirectional=bidirectional, attention="eager", device="cpu")
    texts = [TEXTS[1], "two dogs", "two cats", "a dog", "two mice", "x"]
    ids = encoder.tokenize(texts).ids
    features = encoder.collate(ids)
    assert features["input_ids"].shape == (1, sum(map(len, ids)))
    states = encoder.st[0](features)["token_embeddings"][0].split([len(row) for row in ids])
    for row, found in zip(ids, states, strict=True):
        alone = peer.llm(input_ids=torch.tensor([row])).last_hidden_state[0]
        assert torch.allclose(found, alone, atol=1e-5)
    if window and family != "llama":  # which has none
        unlimited = CaptionEncoder.from_pretrained(folders[family], bidirectional=bidirectional, device="cpu")
        assert not torch.allclose(unlimited.llm(input_ids=torch.tensor([ids[0]])).last_hidden_state[0], states[0])
    other = encoder.st[0](encoder.collate([*ids[:2], ids[2][::-1], *ids[3:]]))["token_embeddings"][0]
    for n, found in enumerate(other.split([len(row) for row in ids])):
        assert torch.equal(found, states[n]) == (n != 2)


@torch.no_grad()
def test_a_window_is_counted_by_the_models_own_direction(folders: dict[str, Path], tmp_path: Path) -> None:
    """Where the configuration does not say which: packed only if asked, and then as the padded one is read."""
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
def test_what_would_run_over_from_caption_to_caption_is_padded(family: str, options: dict, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_as_two_products_is_attention(scaling: float | None, length: int, causal: bool) -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8, generator=g) for heads in (4, 2, 2))
    found = unfused_attention(query, key, value, None, causal, scaling)
    key, value = (x.double().repeat_interleave(2, 1) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), key, value, is_causal=causal, scale=scaling
    )
    assert torch.allclose(found.double(), expected.transpose(1, 2), atol=1e-5)
    low = unfused_attention(*(x.bfloat16() for x in (query, key[:, ::2], value[:, ::2])), None, causal, scaling)
    assert low.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "change", [{"layer_types": ["chunked_attention"] * 3}, {"use_bidirectional_attention": True}, {"is_causal": None}]
)
def test_layers_that_would_run_over_are_not_packed(llm: Path, change: dict) -> None:
    model = AutoModel.from_pretrained(llm)
    model.config.is_causal = False
    assert can_pack(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert not can_pack(model)


def test_lost_lengths_are_an_error(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    features = encoder.collate(encoder.tokenize(TEXTS).ids)
    del features["caption_lengths"]
    with pytest.raises(ValueError, match="would see each other"):
        encoder.st(features)


def test_an_empty_text_among_others(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    for batch_tokens in (None, 3):
        vectors = encoder.encode(["", "a dog", ""], batch_tokens=batch_tokens)
        assert torch.equal(vectors[0], torch.zeros(32)) and vectors[1].any()
    assert torch.equal(encoder.encode(""), torch.zeros(1, 32))


def test_an_llm_that_lacks_a_weight_is_refused(tmp_path: Path) -> None:
    folder = make_llm(tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]  # transformers would leave it random, and only warn
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights, layers\.1\.mlp\.up_proj"):
        CaptionEncoder.from_pretrained(folder)


@pytest.mark.parametrize("pooling", ["mean", "weightedmean", "lasttoken", "max", "cls"])
@pytest.mark.parametrize("template", [None, "<|user|>say: {caption}<|end|>"])
def test_packed_and_padded_batches_give_the_same_vectors(llm: Path, pooling: str, template: str | None) -> None:
    packed, padded = (
        CaptionEncoder.from_pretrained(llm, pooling=pooling, template=template, attention=a, device="cpu")
        for a in (None, "sdpa")
    )
    assert torch.allclose(packed.encode(TEXTS), padded.encode(TEXTS), atol=1e-5)
    assert fingerprint(packed.identity()) == fingerprint(padded.identity())
    peer = packed.st.encode(TEXTS, convert_to_tensor=True)  # pads, under the name of packed attention
    assert torch.allclose(peer, packed.encode(TEXTS), atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"layers": 2}, {"template": "<|user|>say: {caption}<|end|>"}, {"pooling": "lasttoken"}]
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_sentence_transformers_reads_the_same_vectors(
    folders: dict[str, Path], family: str, options: dict, tmp_path: Path
) -> None:
    encoder = CaptionEncoder.from_pretrained(folders[family], device="cpu", **options)
    vectors = encoder.encode(TEXTS)
    encoder.save_pretrained(tmp_path)
    peer = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(peer, vectors, atol=1e-5)
    again = CaptionEncoder.from_pretrained(tmp_path, device="cpu")
    assert torch.equal(again.encode(TEXTS), vectors)
    assert again.identity() == encoder.identity()
    assert not list(tmp_path.rglob("*.bin"))


def test_precision_labels_and_what_they_run(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    met: list[torch.dtype] = []
    for layer in encoder.llm.layers:
        layer.mlp.up_proj.register_forward_hook(lambda _, __, out: met.append(out.dtype))
    for label, kinds in {
        "fp32": [torch.float32] * 3,
        "bf16": [torch.bfloat16] * 3,
        "bf16+2": [torch.float32, torch.float32, torch.bfloat16],
    }.items():
        met.clear()
        vector = encoder.encode("a dog", precision=label)
        assert met == kinds and vector.dtype == torch.float32
    assert not any("forward" in vars(layer) for layer in encoder.llm.layers)  # nothing stays behind
    for wrong in ("fp16", "bf16+", "bf16+x"):
        with pytest.raises(ValueError, match="precision is"):
            encoder.encode("a dog", precision=wrong)


def test_the_blocks_that_cannot_bear_bf16_are_found(llm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that makes much of small errors, as a threshold does, needs those before it, and itself, in fp32."""
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    assert calibrate_precision(encoder) == "bf16"
    exact = encoder.encode(CAPTIONS)
    mlp, seen = encoder.llm.layers[1].mlp, {}
    forward = mlp.forward
    encoder.llm.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.update(before=torch.is_autocast_enabled("cpu")))

    def amplified(x: torch.Tensor) -> torch.Tensor:
        out = forward(x)
        return out + 30 * torch.randn(out.shape) if seen["before"] or torch.is_autocast_enabled("cpu") else out

    monkeypatch.setattr(mlp, "forward", amplified)
    assert calibrate_precision(encoder) == "bf16+2"
    found = encoder.encode(CAPTIONS, precision="bf16+2")
    assert torch.cosine_similarity(found, exact).min() > 0.999
    assert torch.cosine_similarity(encoder.encode(CAPTIONS, precision="bf16+1"), exact).min() < 0.999


def test_no_chat_template_touches_a_caption(llm: Path) -> None:
    """sentence-transformers 6 would wrap every text in the tokenizer's template: 5 bytes must stay 5 tokens."""
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
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
def test_pooling_and_templates_on_tokens_by_hand(
    llm: Path, pooling: str, template: str | None, before: list, after: list[int], side: str
) -> None:
    """What stands before the caption is read and not pooled, what stands after it is; weights count from the first
    token that is read. The longer text beside it pads."""
    encoder = CaptionEncoder.from_pretrained(llm, template=template, pooling=pooling, device="cpu")
    encoder.tokenizer.padding_side = side
    token = encoder.tokenizer.convert_tokens_to_ids
    ids = [*(b if isinstance(b, int) else token(b) for b in before), *token(list("dog")), *after]
    assert encoder.tokenize(["dog"]).ids == [ids]
    assert encoder.tokenize(["dog"]).prompt_lengths == [len(before)]
    states = encoder.llm(input_ids=torch.tensor([ids])).last_hidden_state[0].double()
    weights = torch.arange(1.0, len(ids) + 1) if pooling == "weightedmean" else torch.ones(len(ids))
    weights[: len(before)] = 0
    by_hand = states[-1] if pooling == "lasttoken" else (weights.double() @ states) / weights.sum()
    assert torch.allclose(encoder.encode(["dog", TEXTS[1]], batch_tokens=10_000)[0].double(), by_hand, atol=1e-5)


@torch.no_grad()
def test_an_instruction_that_ends_in_a_space_takes_no_token_of_the_caption(tmp_path: Path) -> None:
    """A space joins the word after it: counted alone it is a token, before the caption it is none."""
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
    found = encoder.tokenize(["abc"], ["go: "])
    assert found.prompt_lengths == [3] and len(found.ids[0]) == 6  # g o : | _a b c
    with pytest.raises(ValueError, match="may not end in a space"):
        CaptionEncoder.from_pretrained(tmp_path, template="go: {caption}", device="cpu")


def test_a_shorter_vector_is_the_first_part_of_the_whole(llm: Path, tmp_path: Path) -> None:
    whole = CaptionEncoder.from_pretrained(llm, device="cpu")
    cut = CaptionEncoder.from_pretrained(llm, truncate_dim=12, device="cpu")
    assert cut.embed_dim == 12 and torch.equal(cut.encode(TEXTS), whole.encode(TEXTS)[:, :12])
    cut.save_pretrained(tmp_path)
    assert torch.equal(CaptionEncoder.from_pretrained(tmp_path, device="cpu").encode(TEXTS), cut.encode(TEXTS))
    peer = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS, convert_to_tensor=True)
    assert torch.allclose(peer, cut.encode(TEXTS), atol=1e-5)
    assert fingerprint(cut.identity()) != fingerprint(whole.identity())
    with pytest.raises(ValueError, match="between 1 and 32"):
        CaptionEncoder.from_pretrained(llm, truncate_dim=33, device="cpu")


def test_layers_keeps_the_first_blocks(llm: Path, tmp_path: Path) -> None:
    whole = CaptionEncoder.from_pretrained(llm, device="cpu")
    cut = CaptionEncoder.from_pretrained(llm, layers=2, device="cpu")
    whole.llm.layers = whole.llm.layers[:2]
    assert torch.equal(whole.encode(TEXTS), cut.encode(TEXTS))
    assert cut.identity()["layers"] == 2
    with pytest.raises(ValueError, match="between 1 and 3"):
        CaptionEncoder.from_pretrained(llm, layers=4, device="cpu")


def test_fingerprint_tells_what_changes_a_vector(llm: Path) -> None:
    def of(**options: object) -> str:
        return fingerprint(CaptionEncoder.from_pretrained(llm, device="cpu", **options).identity())  # type: ignore[arg-type]

    base = of()
    assert of() == base
    changed = [
        of(bidirectional=False),
        of(layers=2),
        of(template="<|user|>{caption}<|end|>"),
        of(pooling="lasttoken"),
        of(max_length=7),
    ]
    assert len({base, *changed}) == 6
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    encoder.encode(TEXTS)  # leaves padding set in the tokenizer, which changes nothing
    assert fingerprint(encoder.identity()) == base
    encoder.llm.config.rms_norm_eps *= 2
    assert fingerprint(encoder.identity()) != base
    encoder.llm.config.rms_norm_eps /= 2
    assert fingerprint(encoder.identity()) == base
    with torch.no_grad():
        next(encoder.llm.parameters())[0, 0] += 1e-3
    assert fingerprint(encoder.identity()) != base


def test_what_is_cut_is_said(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, max_length=8, template="{caption}<|end|>", device="cpu")
    tokens = encoder.tokenize(["short", "much too long for this"])
    assert tokens.truncated == [1]
    assert len(tokens.ids[1]) == 8
    assert tokens.ids[1][-1] == 0  # the template's end is kept


@pytest.mark.parametrize("template", ["no caption", "{caption} two words", "<|user|>{caption}"])
def test_bad_templates_are_refused(llm: Path, template: str) -> None:
    with pytest.raises(ValueError, match="caption"):
        CaptionEncoder.from_pretrained(llm, template=template, device="cpu")


def test_length_batches_cover_all_rows_within_the_budget() -> None:
    lengths = torch.randint(1, 60, (200,)).tolist()
    batches = list(length_batches(lengths, 128))
    assert sorted(r for b in batches for r in b) == list(range(200))
    assert all(len(b) * max(lengths[r] for r in b) <= 128 for b in batches)
    assert list(length_batches([500], 128)) == [[0]]


def test_a_template_can_be_taken_away_again(llm: Path, tmp_path: Path) -> None:
    plain = CaptionEncoder.from_pretrained(llm, device="cpu").encode(TEXTS)
    CaptionEncoder.from_pretrained(llm, template="say: {caption}", device="cpu").save_pretrained(tmp_path)
    back = CaptionEncoder.from_pretrained(tmp_path, template="{caption}", device="cpu")
    assert torch.equal(back.encode(TEXTS), plain)
    assert torch.allclose(back.encode("a dog"), plain[:1], atol=1e-5)


def test_encoding_nothing(llm: Path) -> None:
    assert CaptionEncoder.from_pretrained(llm, device="cpu").encode([]).shape == (0, 32)
