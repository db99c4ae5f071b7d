"""Stage 1: its losses against plain references, gradient caching, masked prediction, exact resume, processes as one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from conftest import CAPTIONS, TUNE, Killed, distributed, make_llm, share_out
from llm2clip.checkpoint import read_metrics
from llm2clip.config import TuneConfig
from llm2clip.data.pairs import Pair, pair_batches
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.precision import resolve_device_precision
from llm2clip.train.mntp import MaskedTokenLoss, MaskingCollator, hidden_positions, output_layer
from llm2clip.train.pair_loss import PairCollator, PairLoss, pair_loss
from llm2clip.train.tune import tune

ROWS = [
    Pair("a dog", "the dog runs through deep snow", ("a cat sleeps", "a house"), "find: "),
    Pair("two cats on a sofa", "cats", ("the dog runs through deep snow",)),  # the other's answer, as its wrong one
    Pair("a house", "homes", ()),  # a query that is another's wrong answer
    Pair("x", "a much longer text about nothing in particular", (), "find: "),
]


def fresh(llm: Path) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(llm, device="cpu")


def batch_of(encoder: CaptionEncoder, pairs: list[Pair] = ROWS) -> dict[str, Any]:
    return PairCollator(preprocess_fn=encoder.tokenize)([dataclasses.asdict(p) for p in pairs])


def reference(vectors: dict[tuple[str, str], torch.Tensor], pairs: list[Pair], symmetric: bool) -> torch.Tensor:
    """Row by row in float64, straight from the definition: (prompt, text) to vectors."""
    unit = {key: F.normalize(v.double(), dim=-1) for key, v in vectors.items()}
    total = torch.zeros((), dtype=torch.float64)
    wrong = [("", text) for p in pairs for text in p.negatives]
    for p in pairs:
        ways = [((p.instruction, p.anchor), ("", p.positive), [("", q.positive) for q in pairs] + wrong)]
        if symmetric:
            ways.append((("", p.positive), (p.instruction, p.anchor), [(q.instruction, q.anchor) for q in pairs]))
        for query, answer, candidates in ways:
            right = 20 * unit[query] @ unit[answer]
            others = [20 * unit[query] @ unit[c] for c in candidates if c[1] not in (query[1], answer[1])]
            total = total - (right - torch.logsumexp(torch.stack([right, *others]), 0)) / len(ways)
    return total / len(pairs)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("widths", [(), (8, 20)])
def test_the_loss_is_that_of_the_definition(llm: Path, symmetric: bool, widths: tuple[int, ...]) -> None:
    """With negatives, a duplicate text, instructions that are not pooled, in small passes of similar length."""
    encoder = fresh(llm)
    encoder.exclude_prompts_from_pooling(["find: "])  # a byte is a token here, and a space joins nothing
    loss = PairLoss(encoder, 0.05, batch_tokens=64, symmetric=symmetric, widths=widths)([batch_of(encoder)])
    texts = {(p.instruction, p.anchor) for p in ROWS} | {("", t) for p in ROWS for t in (p.positive, *p.negatives)}
    vectors = {}
    for prompt, text in texts:
        ids = encoder.tokenizer(prompt + text)["input_ids"]
        states = encoder.llm(input_ids=torch.tensor([ids])).last_hidden_state[0]
        vectors[prompt, text] = states[len(prompt) :].double().mean(0)  # a byte is a token here
    losses = [reference({k: v[:w] for k, v in vectors.items()}, ROWS, symmetric) for w in (32, *widths)]
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), abs=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_caching_gives_the_same_gradients(llm: Path, dropout: float) -> None:
    """Dropout included: the second pass drops what the first did."""
    gradients = []
    for cached in (False, True):
        encoder = fresh(llm)
        for layer in encoder.llm.layers:
            layer.mlp.register_forward_hook(lambda _, __, out: F.dropout(out, dropout))
        torch.manual_seed(3)
        loss = PairLoss(encoder, 0.05, batch_tokens=64, grad_cache=cached)([batch_of(encoder)])
        (loss * 2).backward()
        gradients.append((loss.item(), {n: p.grad for n, p in encoder.named_parameters()}, torch.rand(1)))
    (plain, one, drawn), (cached, other, also) = gradients
    assert plain == pytest.approx(cached, abs=1e-6)
    assert torch.equal(drawn, also)  # what is random afterwards is the same, too
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert torch.allclose(gradient, other[name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"widths": [32]}, "between 1 and 31"),
        ({"lora_r": 0, "merge": False}, "LoRA's"),
        ({"steps": 0, "merge": False}, "has none"),
        ({"lengths": [1, 1]}, "three weights"),
        ({"batch": 25}, "a batch of 25"),
    ],
)
def test_wrong_settings_show_before_any_work(llm: Path, tmp_path: Path, change: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        tune([CAPTIONS], fresh(llm), dataclasses.replace(TUNE, mntp_steps=2, **change), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_give_the_gradients_of_one(processes: int, tmp_path: Path) -> None:
    """Negatives ragged over processes, duplicates among them; averaged as DDP does."""
    distributed(processes, _loss_rank, str(tmp_path))
    weight = torch.eye(6).requires_grad_()
    loss = pair_loss(*_loss_inputs(weight, range(8)))
    loss.backward()
    parts = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(processes)]
    assert torch.allclose(torch.stack([p["grad"] for p in parts]).mean(0), weight.grad, atol=1e-6)
    assert sum(p["loss"] for p in parts).item() / processes == pytest.approx(loss.item(), abs=1e-6)


def test_pairs_without_negatives_by_hand() -> None:
    first, second = (F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(n)), dim=-1) for n in (0, 1))
    logits, own = 20 * first.double() @ second.double().T, torch.arange(5)
    there, back = (F.cross_entropy(x, own).item() for x in (logits, logits.T))
    assert pair_loss(first, second, 20, torch.arange(10)).item() == pytest.approx((there + back) / 2, rel=1e-5)
    assert pair_loss(first, second, 20, torch.arange(10), symmetric=False).item() == pytest.approx(there, rel=1e-5)


def _loss_inputs(weight: torch.Tensor, rows: range) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(0)
    first, second, wrong = (F.normalize(torch.randn(8, 6, generator=g) @ weight, dim=-1) for _ in range(3))
    ids = torch.tensor([[*range(8)], [*range(10, 18)], [11, 20, 21, 22, 23, 2, 24, 25]])  # two of them are not wrong
    mine = torch.tensor(list(rows))
    negatives = mine[mine < 5]  # the last rows have none
    return first[mine], second[mine], 10.0, torch.cat([ids[0][mine], ids[1][mine], ids[2][negatives]]), wrong[negatives]


def _loss_rank(folder: str) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weight = torch.eye(6).requires_grad_()
    loss = pair_loss(*_loss_inputs(weight, range(rank * 8 // world, (rank + 1) * 8 // world)))
    loss.backward()
    torch.save({"grad": weight.grad, "loss": loss.detach()}, f"{folder}/{rank}.pt")


# ---- masked next-token prediction -----------------------------------------------------------------------------------


def test_what_is_hidden() -> None:
    assert hidden_positions(1, 0.2, "a") == [] and hidden_positions(2, 0.0, "a") == [1]
    drawn = [hidden_positions(100, 0.2, str(n)) for n in range(50)]
    assert drawn[3] == hidden_positions(100, 0.2, "3") != drawn[4]
    assert all(0 not in at for at in drawn)
    assert sum(map(len, drawn)) / 50 == pytest.approx(0.2 * 99, abs=2)
    assert min(hidden_positions(10, 0.9, "a", first=4)) >= 4 and hidden_positions(4, 0.9, "a", first=4) == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_prediction_by_hand(llm: Path, side: str) -> None:
    """The state before a hidden token gives its probability, whichever side is padded."""
    encoder = fresh(llm)
    encoder.tokenizer.padding_side = side
    mask = encoder.tokenizer("_")["input_ids"][0]
    texts = ["a dog runs", "two cats sleep on a sofa"]
    rows = [{"text": t, "seed": str(n)} for n, t in enumerate(texts)]
    batch = MaskingCollator(preprocess_fn=encoder.tokenize, share=0.3, mask=mask)(rows)
    loss = MaskedTokenLoss(encoder, batch_tokens=10_000)([batch])
    table = encoder.llm.get_input_embeddings().weight.double()
    terms = []
    for n, text in enumerate(texts):
        ids = encoder.tokenizer(text)["input_ids"]
        hidden = hidden_positions(len(ids), 0.3, str(n))
        seen = [mask if i in hidden else token for i, token in enumerate(ids)]
        states = encoder.llm(input_ids=torch.tensor([seen])).last_hidden_state[0].double()
        terms += [-F.log_softmax(table @ states[i - 1], 0)[ids[i]] for i in hidden]
    assert len(terms) > 3
    assert loss.item() == pytest.approx(torch.stack(terms).mean().item(), abs=1e-3)


def test_an_output_layer_of_its_own_is_read_from_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    make_llm(tmp_path)
    config = LlamaConfig.from_pretrained(tmp_path, tie_word_embeddings=False)
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    assert torch.equal(output_layer(fresh(tmp_path).llm), whole.lm_head.weight)
    whole.model.save_pretrained(tmp_path)  # as a caption encoder is saved
    with pytest.raises(ValueError, match=r"no lm_head\.weight"):
        output_layer(fresh(tmp_path).llm)


def test_masked_prediction_comes_first_and_learns(llm: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(TUNE, mntp_steps=20, steps=2)
    tune([CAPTIONS], fresh(llm), recipe, tmp_path)
    losses = [line["loss"] for line in read_metrics(tmp_path / "mntp/metrics.jsonl")]
    assert len(losses) == 20 and sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert (tmp_path / "mntp/encoder/modules.json").exists()


# ---- the stage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lora_r": 0, "alike": 3},
        {"precision": "bf16", "widths": [8]},
        {"grad_cache": True, "recompute": True},
        {"quantize": True},
        {"mntp_steps": 4},
    ],
    ids=str,
)
def test_tune_goes_on_exactly(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict) -> None:
    kill_and_go_on(PairLoss, 6, llm, tmp_path, monkeypatch, dataclasses.replace(TUNE, **change))
    losses = [[line["loss"] for line in read_metrics(tmp_path / f / "metrics.jsonl")] for f in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_masked_prediction_goes_on_exactly(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kill_and_go_on(MaskedTokenLoss, 4, llm, tmp_path, monkeypatch, dataclasses.replace(TUNE, mntp_steps=6, steps=2))


def kill_and_go_on(
    loss: type[PairLoss] | type[MaskedTokenLoss],
    step: int,
    llm: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: TuneConfig,
) -> None:
    """Tune in folder/whole, and in folder/cut with a kill at a step of `loss`; both end with the same weights."""
    whole = tune([CAPTIONS], fresh(llm), recipe, folder / "whole")
    forward, calls = loss.forward, []

    def dies(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loss, "forward", dies)
        tune([CAPTIONS], fresh(llm), recipe, folder / "cut")
    (folder / "cut/checkpoints/checkpoint-5").mkdir(parents=True)  # begun, not whole
    resumed = tune([CAPTIONS], fresh(llm), recipe, folder / "cut")
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(tensor, load_file(resumed / "model.safetensors")[name]), name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_tune_changes_the_encoder_and_merges_lora(llm: Path, tmp_path: Path, precision: str) -> None:
    """What is in memory afterwards is what was saved: nothing of the training's autocast stays."""
    raw = fresh(llm)
    before = raw.encode(["a dog"])
    tuned = fresh(tune([CAPTIONS], raw, dataclasses.replace(TUNE, precision=precision), tmp_path))
    assert not torch.allclose(tuned.encode(["a dog"]), before, atol=1e-3)
    assert raw.tokenizer.chat_template is None
    assert not any("lora" in name for name in tuned.state_dict())
    assert torch.allclose(tuned.encode(["a dog"]), raw.encode(["a dog"]), atol=1e-5)
    assert tuned.identity()["bidirectional"]


@pytest.mark.parametrize("change", [{}, {"quantize": True}, {"mntp_steps": 2}], ids=str)
def test_lora_kept_apart_is_lora_merged(llm: Path, tmp_path: Path, change: dict) -> None:
    """Of the same run: the same vectors, depth, attention and template from a folder that holds no LLM."""
    folders = {}
    for merge in (True, False):
        encoder = CaptionEncoder.from_pretrained(llm, layers=2, template="<|user|>{caption}<|end|>", device="cpu")
        recipe = dataclasses.replace(TUNE, merge=merge, **change)
        folders[merge] = tune([CAPTIONS], encoder, recipe, tmp_path / str(merge))
        assert torch.allclose(encoder.encode(["a dog"]), fresh(folders[merge]).encode(["a dog"]), atol=1e-5)
        assert encoder.identity() == fresh(folders[merge]).identity()
    merged, apart = fresh(folders[True]), fresh(folders[False])
    raw = CaptionEncoder.from_pretrained(llm, layers=2, template="<|user|>{caption}<|end|>", device="cpu")
    texts = ["a dog", "two cats in the snow"]
    assert torch.allclose(apart.encode(texts), merged.encode(texts), atol=1e-5)
    assert not torch.allclose(apart.encode(texts), raw.encode(texts), atol=1e-2)
    assert apart.identity()["bidirectional"] and apart.identity()["layers"] == 2
    assert not list(folders[False].glob("model*.safetensors"))
    apart.save_pretrained(tmp_path / "again")
    again = fresh(tmp_path / "again")
    assert torch.equal(again.encode(texts), apart.encode(texts)) and again.identity() == apart.identity()
    with pytest.raises(ValueError, match="LoraTransformer"):  # no silent reading in one direction
        SentenceTransformer(str(folders[False]), device="cpu")
    peer = SentenceTransformer(str(folders[False]), device="cpu", trust_remote_code=True)  # by the user's word
    assert torch.allclose(peer.encode(texts, convert_to_tensor=True), apart.encode(texts), atol=1e-5)
    with pytest.raises(ValueError, match="a second one"):
        tune([CAPTIONS], fresh(folders[False]), dataclasses.replace(TUNE, merge=False), tmp_path / "more")
    for lora_r in (4, 0):
        encoder = fresh(folders[False])
        recipe = dataclasses.replace(TUNE, steps=1, lora_r=lora_r)
        more = fresh(tune([CAPTIONS], encoder, recipe, tmp_path / f"more-{lora_r}"))
        assert not any("lora" in name for name in more.state_dict())
        assert torch.allclose(more.encode(texts), encoder.encode(texts), atol=1e-5)


def test_lora_whose_llm_is_gone_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llm(tmp_path / "llm")
    folder = tune([CAPTIONS], fresh(tmp_path / "llm"), dataclasses.replace(TUNE, merge=False, steps=1), tmp_path / "r")
    (tmp_path / "llm").rename(tmp_path / "elsewhere")
    with pytest.raises(
        OSError, match=r"holds LoRA for .*/llm, which could not be opened(.|\n)*base_model_name_or_path"
    ):
        fresh(folder)
    monkeypatch.setenv("LLM2CLIP_CACHE", str(tmp_path / "cache"))  # as of another machine
    (tmp_path / "cache").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "cache/llm")
    assert fresh(folder).embed_dim == 32
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match="an adapter of PEFT alone"):
        fresh(folder)


def test_four_bits_while_lora_trains(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrices are rounded in training, and only there: what LoRA does not touch is as it was."""
    raw, encoder, seen = fresh(llm), fresh(llm), []
    forward = PairLoss.forward

    def watched(self: PairLoss, *args: Any) -> torch.Tensor:
        llm = self._encoder[0].llm
        seen.append({n: (p.dtype, p.requires_grad) for n, p in llm.named_parameters() if ".mlp." in n})
        return forward(self, *args)

    monkeypatch.setattr(PairLoss, "forward", watched)
    recipe = dataclasses.replace(TUNE, qlora=True, lora_targets=["q_proj", "up_proj"], steps=2)
    folder = tune([CAPTIONS], encoder, recipe, tmp_path)
    kinds = {name.split("mlp.")[1]: kind for name, kind in seen[0].items()}
    assert kinds["down_proj.weight"] == kinds["up_proj.base_layer.weight"] == (torch.uint8, False)
    assert kinds["up_proj.lora_A.default.weight"] == (torch.float32, True)
    before, after = raw.llm.state_dict(), fresh(folder).llm.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"layers.{n}.{part}.weight" for n in range(3) for part in ("self_attn.q_proj", "mlp.up_proj")}
    assert torch.equal(encoder.encode(["a dog"]), fresh(folder).encode(["a dog"]))


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_cut_to_fewer_numbers_is_not_trained(llm: Path, tmp_path: Path, lora_r: int) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, width=12, device="cpu")
    tune([CAPTIONS], encoder, dataclasses.replace(TUNE, lora_r=lora_r), tmp_path)
    assert torch.equal(encoder.st[2].linear.weight, torch.eye(12, 32))


def test_cached_passes_are_in_the_precision_of_the_others(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass runs inside the backward pass, where autocast is long over."""
    met = []
    forward = torch.nn.Linear.forward

    def watched(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        met.append((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", watched)
    recipe = dataclasses.replace(TUNE, lora_r=0, steps=1, precision="bf16", grad_cache=True)
    tune([CAPTIONS], fresh(llm), recipe, tmp_path)
    assert set(met) == {(False, torch.bfloat16), (True, torch.bfloat16)}


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"steps": 7}], ids=str)
def test_a_changed_run_does_not_go_on(llm: Path, tmp_path: Path, change: dict) -> None:
    folder = tune([CAPTIONS], fresh(llm), TUNE, tmp_path)
    folder.rename(tmp_path / "lost")
    with pytest.raises(ValueError, match="cannot be gone on from"):
        tune([CAPTIONS], fresh(llm), dataclasses.replace(TUNE, **change), tmp_path)


def test_lora_on_the_layers_that_were_named(llm: Path, tmp_path: Path) -> None:
    raw, encoder = fresh(llm), fresh(llm)
    tune([CAPTIONS], encoder, dataclasses.replace(TUNE, lora_targets=["q_proj"]), tmp_path)
    before, after = raw.llm.state_dict(), encoder.llm.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"layers.{n}.self_attn.q_proj.weight" for n in range(3)}


def test_full_tuning_leaves_the_table_of_token_embeddings(llm: Path, tmp_path: Path) -> None:
    raw, encoder = fresh(llm), fresh(llm)
    tune([CAPTIONS], encoder, dataclasses.replace(TUNE, lora_r=0, steps=3), tmp_path)
    before, after = raw.llm.state_dict(), fresh(tmp_path / "encoder").llm.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {"embed_tokens.weight"}


def test_text_pairs_leave_an_encoder_that_does_not_pool_instructions(llm: Path, tmp_path: Path) -> None:
    """The saved folder reads a prompt as tuning did, in sentence-transformers too."""
    pairs = [Pair(f"question {n}", f"answer {n}", (f"wrong {n}",), "find:\n") for n in range(12)]
    folder = tune([CAPTIONS, pairs], fresh(llm), dataclasses.replace(TUNE, source_weights=[1, 1]), tmp_path)
    encoder = fresh(folder)
    found = encoder.tokenize(["a dog"], ["find:\n"])
    assert found.prompt_lengths == [6]
    ours = encoder.encode(found)
    states = encoder.llm(input_ids=torch.tensor(found.ids)).last_hidden_state[0]
    assert torch.allclose(ours[0], states[6:].mean(0), atol=1e-5)
    peer = SentenceTransformer(str(folder), device="cpu").encode("a dog", prompt="find:\n", convert_to_tensor=True)
    assert torch.allclose(ours[0], peer, atol=1e-5)


@pytest.mark.parametrize(("asked", "capable", "chosen"), [
    ("auto", "amx_bf16", "bf16"), ("auto", "avx512_bf16", "bf16"), ("auto", "avx2", "fp32"),
    ("fp32", "amx_bf16", "fp32"), ("fp16", "avx2", "fp16"),
])  # fmt: skip
def test_precision_is_what_the_device_is_good_at(
    asked: str, capable: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {capable: True}, raising=False)
    assert resolve_device_precision(asked, torch.device("cpu")) == chosen


def test_tune_stops_at_a_loss_that_is_not_finite(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.train.pair_loss.pair_loss", lambda a, b, *_: (a * b).sum() * math.nan)
    with pytest.raises(FloatingPointError, match="step 1"):
        tune([CAPTIONS], fresh(llm), TUNE, tmp_path)
    assert not (tmp_path / "encoder").exists()


@pytest.mark.parametrize("grad_cache", [False, True])
def test_two_processes_tune_as_one(llm: Path, tmp_path: Path, grad_cache: bool) -> None:
    """Two ranks with half the batch each, of captions of unequal length, do what one does with the whole."""
    distributed(2, _tune_rank, str(llm), str(tmp_path / "two"), grad_cache)
    one = tune([CAPTIONS], fresh(llm), _plain(6, grad_cache), tmp_path / "one")
    for part in ("", "mntp/"):  # Adam and clipping hide a factor on the gradients, their norm does not
        lines = [read_metrics(tmp_path / run / f"{part}metrics.jsonl") for run in ("one", "two")]
        norms = [[line["grad_norm"] for line in run] for run in lines]
        assert len(norms[0]) == 3 and norms[0] == pytest.approx(norms[1], rel=2e-3)
    for name, tensor in load_file(one / "model.safetensors").items():
        assert torch.allclose(tensor, load_file(tmp_path / "two/encoder/model.safetensors")[name], atol=1e-4), name


def _plain(batch: int, grad_cache: bool) -> TuneConfig:
    return dataclasses.replace(
        TUNE, batch_size=batch, steps=3, mntp_steps=3, lora_dropout=0.0, lr=1e-4, batch_tokens=64, grad_cache=grad_cache
    )


def _tune_rank(llm: str, folder: str, grad_cache: bool) -> None:
    tune([CAPTIONS], fresh(Path(llm)), _plain(3, grad_cache), Path(folder))


@pytest.mark.parametrize(
    "change",
    [{"lora_r": 0}, {"mntp_steps": 2, "grad_cache": True}, {"lora_r": 0, "precision": "bf16", "recompute": True}],
    ids=str,
)
def test_weights_shared_out_over_processes_tune_as_one(llm: Path, tmp_path: Path, change: dict) -> None:
    """FSDP: two ranks with different numbers of passes, stopped and gone on, do what one process does."""
    distributed(2, _sharded_rank, str(llm), str(tmp_path / "two"), change)
    recipe = dataclasses.replace(SHARDED, batch_size=6, **change)
    one = tune([CAPTIONS], fresh(llm), recipe, tmp_path / "one")
    lines = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("one", "two")]
    close = 2e-3 if recipe.precision == "fp32" else 3e-2  # FSDP rounds more than autocast does
    for key in ("loss", "grad_norm"):
        first, second = ([line[key] for line in run] for run in lines)
        assert len(first) == 4 and first == pytest.approx(second, rel=close)
    ours, theirs = (load_file(f / "model.safetensors") for f in (one, tmp_path / "two/encoder"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], atol=1e-4 if recipe.precision == "fp32" else 1e-3), name


SHARDED = dataclasses.replace(TUNE, lora_dropout=0.0, steps=4, lr=1e-4, batch_tokens=64)


def _sharded_rank(llm: str, folder: str, change: dict) -> None:
    from torch.distributed.fsdp import FSDPModule

    share_out()
    recipe, forward, calls = dataclasses.replace(SHARDED, batch_size=3, **change), PairLoss.forward, []

    def dies(self: PairLoss, *args: Any) -> torch.Tensor:
        assert isinstance(self.model, FSDPModule) and isinstance(self._encoder[0].llm.layers[0], FSDPModule)
        calls.append(1)
        if len(calls) == 4:  # after the checkpoint of step 2
            raise Killed
        return forward(self, *args)

    PairLoss.forward = dies  # type: ignore[method-assign]
    with pytest.raises(Killed):
        tune([CAPTIONS], fresh(Path(llm)), recipe, Path(folder))
    encoder = fresh(Path(llm))
    tune([CAPTIONS], encoder, recipe, Path(folder))
    assert len(calls) == 4 + 2
    assert not list(Path(folder).rglob("pytorch_model_fsdp*"))  # the frozen weights are not written again and again
    assert torch.equal(encoder.encode(["a dog"]), fresh(Path(folder) / "encoder").encode(["a dog"]))


def test_fsdp_is_version_2(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        tune([CAPTIONS], fresh(llm), TUNE, tmp_path)


def test_autocast_does_not_end_with_the_first_of_two_trainings(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = []
    forward = PairLoss.forward

    def watched(self: PairLoss, *args: Any) -> torch.Tensor:
        layer = self._encoder[0].llm.layers[0].mlp.up_proj
        with layer.register_forward_hook(lambda _, __, out: met.append(out.dtype)):
            return forward(self, *args)

    monkeypatch.setattr(PairLoss, "forward", watched)
    recipe = dataclasses.replace(TUNE, lora_r=0, mntp_steps=1, steps=1, precision="bf16")
    tune([CAPTIONS], fresh(llm), recipe, tmp_path)
    assert set(met) == {torch.bfloat16}


def test_the_rows_of_a_batch_are_plain_data() -> None:
    batch = next(pair_batches([CAPTIONS], [], 4, 1, 0))
    json.dumps([dataclasses.asdict(pair) for pair in batch])
