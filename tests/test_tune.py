"""Stage 1, tune: its loss against a plain reference, gradient caching, exact resume, several ranks."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer

from conftest import CAPTIONS, TUNE, Killed, TouchOnLoad, emulate_fsdp_launch, run_distributed
from llm2clip.config import TuneConfig
from llm2clip.data.pairs import Pair
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.runs.output_folder import read_metrics
from llm2clip.train import tune as tune_module
from llm2clip.train.optim import compute_cached_loss
from llm2clip.train.tune import PairCollator, PairLoss, pair_loss, tune

INSTRUCTION = "find: "
PAIRS = [
    Pair("a dog", "the dog runs through deep snow", ("a cat sleeps", "a house"), INSTRUCTION),
    Pair("two cats on a sofa", "cats", ("the dog runs through deep snow",)),  # its negative is another pair's positive
    Pair("a house", "homes", ()),  # its anchor is another pair's negative
    Pair("x", "a much longer text on nothing in particular", (), INSTRUCTION),
]


def open_encoder(llm: Path) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(llm, device="cpu")


def collate(encoder: CaptionEncoder, pairs: list[Pair] = PAIRS) -> dict[str, Any]:
    return PairCollator(preprocess_fn=encoder.tokenize)([dataclasses.asdict(pair) for pair in pairs])


@contextmanager
def recorded_models(killed_in: int | None = None) -> Iterator[list[torch.nn.Module]]:
    """Record the model, with its distributed wrapper, in each training step. Raise `Killed` in step `killed_in`."""
    models: list[torch.nn.Module] = []
    forward = PairLoss.forward

    def recorded_forward(self: PairLoss, *args: Any, **kwargs: Any) -> torch.Tensor:
        models.append(self.model)
        if len(models) == killed_in:
            raise Killed
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PairLoss, "forward", recorded_forward)
        yield models


@contextmanager
def killed_in_step(step: int) -> Iterator[list[torch.nn.Module]]:
    """Expect training to be killed in a step, counted from the start of this block."""
    with recorded_models(step) as models, pytest.raises(Killed):
        yield models


def assert_same_run(encoder_dir: Path, other_dir: Path, rtol: float = 2e-3, atol: float = 1e-4) -> None:
    """Check that two runs have the same losses and gradient norms, and end with the same weights.

    Clipping and AdamW hide a constant factor on the gradients; their norm does not.
    """
    lines, other_lines = (read_metrics(folder.parent / "metrics.jsonl") for folder in (encoder_dir, other_dir))
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in other_lines], rel=rtol)
    weights, other_weights = (load_file(folder / "model.safetensors") for folder in (encoder_dir, other_dir))
    assert lines and weights.keys() == other_weights.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, other_weights[name], atol=atol), name


# ---- the loss --------------------------------------------------------------------------------------------------------


def pair_loss_reference(
    embeddings: dict[tuple[str, str], torch.Tensor], pairs: list[Pair], symmetric: bool
) -> torch.Tensor:
    """Compute the loss pair by pair in float64. `embeddings` maps (instruction, text) to an embedding."""
    unit = {key: F.normalize(embedding.double(), dim=-1) for key, embedding in embeddings.items()}
    negatives = [("", text) for pair in pairs for text in pair.negatives]
    total = torch.zeros((), dtype=torch.float64)
    for pair in pairs:
        anchor, positive = (pair.instruction, pair.anchor), ("", pair.positive)
        directions = [(anchor, positive, [("", other.positive) for other in pairs] + negatives)]
        if symmetric:
            directions.append((positive, anchor, [(other.instruction, other.anchor) for other in pairs]))
        for query, answer, candidates in directions:
            target = 20 * unit[query] @ unit[answer]
            others = [20 * unit[query] @ unit[c] for c in candidates if c[1] not in (query[1], answer[1])]
            total -= (target - torch.stack([target, *others]).logsumexp(0)) / len(directions)
    return total / len(pairs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pair_loss_module_matches_the_reference(llm: Path, symmetric: bool) -> None:
    """With hard negatives, duplicate texts and unpooled instructions, in small passes of similar length."""
    encoder = open_encoder(llm)
    encoder.exclude_prompts_from_pooling([INSTRUCTION])
    loss = PairLoss(encoder, 0.05, batch_tokens=64, symmetric=symmetric)
    texts = {(p.instruction, p.anchor) for p in PAIRS} | {("", t) for p in PAIRS for t in (p.positive, *p.negatives)}
    embeddings = {}
    for instruction, text in texts:
        ids = encoder.tokenizer(instruction + text)["input_ids"]  # a token per byte
        states = encoder.llm(input_ids=torch.tensor([ids])).last_hidden_state[0]
        embeddings[instruction, text] = states[len(instruction) :].double().mean(0)
    expected = pair_loss_reference(embeddings, PAIRS, symmetric)
    assert loss([collate(encoder)]).item() == pytest.approx(expected.item(), abs=1e-4)


@pytest.mark.parametrize(("pairs", "batch_tokens"), [(PAIRS, 64), (PAIRS[1:3], 4096)], ids=["passes", "one pass"])
def test_gradient_caching_gives_the_same_gradients(llm: Path, pairs: list[Pair], batch_tokens: int) -> None:
    """With dropout, the second pass must drop what the first one dropped. A batch that fits in one pass runs once."""
    results = []
    for grad_cache in (False, True):
        encoder, forward_passes = open_encoder(llm), []
        for layer in encoder.llm.layers:
            layer.mlp.register_forward_hook(lambda _, __, out: F.dropout(out, 0.1))
        encoder.llm.layers[0].register_forward_hook(lambda *_, passes=forward_passes: passes.append(1))
        torch.manual_seed(3)
        loss = PairLoss(encoder, 0.05, batch_tokens=batch_tokens, grad_cache=grad_cache)([collate(encoder, pairs)])
        (loss * 2).backward()
        assert (len(forward_passes) == 1) == (batch_tokens == 4096)
        gradients = {name: p.grad for name, p in encoder.named_parameters()}
        results.append({"loss": loss.detach(), "random state": torch.rand(1), **gradients})
    tolerances = {"atol": 1e-5, "rtol": 1e-4} if batch_tokens == 64 else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(results[0], results[1], **tolerances)
    assert torch.equal(results[0]["random state"], results[1]["random state"])


def test_ranks_agree_on_gradient_caching(llm: Path, tmp_path: Path) -> None:
    """Gradient caching is used on all ranks if the batch of any rank needs several passes."""
    run_distributed(2, _count_forward_passes, str(llm), str(tmp_path))
    counts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert counts == [[2, 1], [4, 1]]  # rank 1 needs two passes for its first batch, all other batches need one


def _count_forward_passes(llm: str, folder: str) -> None:
    """Save the number of forward passes for a batch that is long on rank 1, and for a short batch."""
    rank, encoder, counts = torch.distributed.get_rank(), open_encoder(Path(llm)), []
    model = torch.nn.parallel.DistributedDataParallel(encoder.st, broadcast_buffers=False)
    encoder.llm.layers[0].register_forward_hook(lambda *_: counts.__setitem__(-1, counts[-1] + 1))
    loss = PairLoss(encoder, 0.05, batch_tokens=64, grad_cache=True)
    loss.model = model
    for text in ("x" * 20 if rank else "x", "x"):
        counts.append(0)
        loss([collate(encoder, [Pair(text, text + "y", ()), Pair("z", "w", ())])]).backward()
    Path(folder, f"{rank}.json").write_text(json.dumps(counts))


def test_pair_loss_on_two_ranks_matches_one_process(tmp_path: Path) -> None:
    """Averaged over ranks as DDP does, with ragged numbers of negatives and duplicates among them."""
    run_distributed(2, _save_pair_loss, str(tmp_path))
    weight = torch.eye(6).requires_grad_()
    loss = pair_loss(*_pair_loss_inputs(weight, range(8)))
    loss.backward()
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert torch.allclose(torch.stack([part["grad"] for part in parts]).mean(0), weight.grad, atol=1e-6)
    assert sum(part["loss"] for part in parts).item() / 2 == pytest.approx(loss.item(), abs=1e-6)


def _pair_loss_inputs(weight: torch.Tensor, rows: range) -> tuple[Any, ...]:
    """Return the arguments of `pair_loss` for some rows of eight pairs."""
    generator = torch.Generator().manual_seed(0)
    anchor, positive, negatives = (
        F.normalize(torch.randn(8, 6, generator=generator) @ weight, dim=-1) for _ in range(3)
    )
    anchor_ids, positive_ids = torch.arange(8), torch.arange(10, 18)
    negative_ids = torch.tensor([11, 20, 21, 22, 23, 2, 24, 25])  # two equal a positive or an anchor
    pairs = torch.tensor(list(rows))
    with_negatives = pairs[pairs < 5]
    ids = torch.cat([anchor_ids[pairs], positive_ids[pairs], negative_ids[with_negatives]])
    return anchor[pairs], positive[pairs], 10.0, ids, negatives[with_negatives]


def _save_pair_loss(folder: str) -> None:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    weight = torch.eye(6).requires_grad_()
    loss = pair_loss(*_pair_loss_inputs(weight, range(rank * 8 // world_size, (rank + 1) * 8 // world_size)))
    loss.backward()
    torch.save({"grad": weight.grad, "loss": loss.detach()}, f"{folder}/{rank}.pt")


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_tune_changes_the_encoder_and_merges_lora(llm: Path, tmp_path: Path) -> None:
    """The encoder in memory afterwards equals the saved one: no autocast of the training remains."""
    encoder = open_encoder(llm)
    before = encoder.encode(["a dog"])
    tuned = open_encoder(tune([CAPTIONS], encoder, dataclasses.replace(TUNE, precision="bf16"), tmp_path))
    assert not torch.allclose(tuned.encode(["a dog"]), before, atol=1e-3)
    assert encoder.tokenizer.chat_template is None
    assert not any("lora" in name for name in tuned.state_dict())
    assert torch.allclose(tuned.encode(["a dog"]), encoder.encode(["a dog"]), atol=1e-5)
    assert tuned.identity()["bidirectional"]


def test_tune_without_steps_saves_the_encoder_as_it_is(llm: Path, tmp_path: Path) -> None:
    encoder_dir = tune([], open_encoder(llm), dataclasses.replace(TUNE, steps=0), tmp_path)
    assert torch.equal(open_encoder(encoder_dir).encode(["a dog"]), open_encoder(llm).encode(["a dog"]))
    assert not (tmp_path / "checkpoints").exists()


def test_qlora_quantizes_the_frozen_matrices_during_training_only(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, parameters = open_encoder(llm), []
    forward = PairLoss.forward

    def recorded_forward(self: PairLoss, *args: Any) -> torch.Tensor:
        llm = self._encoder[0].llm
        parameters.append({name: (p.dtype, p.requires_grad) for name, p in llm.named_parameters() if ".mlp." in name})
        return forward(self, *args)

    monkeypatch.setattr(PairLoss, "forward", recorded_forward)
    encoder_dir = tune([CAPTIONS], encoder, dataclasses.replace(TUNE, qlora=True, steps=2), tmp_path)
    mlp = {name.split("mlp.")[1]: value for name, value in parameters[0].items()}
    assert mlp["up_proj.base_layer.weight"] == (torch.uint8, False)
    assert mlp["up_proj.lora_A.default.weight"] == (torch.float32, True)
    before, after = open_encoder(llm).llm.state_dict(), open_encoder(encoder_dir).llm.state_dict()
    for name, tensor in before.items():
        change = after[name] - tensor
        assert torch.linalg.matrix_rank(change, atol=1e-5) <= TUNE.lora_r if change.ndim > 1 else not change.any()
    assert torch.equal(encoder.encode(["a dog"]), open_encoder(encoder_dir).encode(["a dog"]))


def test_full_tuning_leaves_the_token_embeddings_and_the_truncation(llm: Path, tmp_path: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, truncate_dim=12, device="cpu")
    tune([CAPTIONS], encoder, dataclasses.replace(TUNE, lora_r=0, steps=3), tmp_path)
    before, after = open_encoder(llm).llm.state_dict(), open_encoder(tmp_path / "encoder").llm.state_dict()
    assert {name for name in before if torch.equal(before[name], after[name])} == {"embed_tokens.weight"}
    assert torch.equal(encoder.st[2].linear.weight, torch.eye(12, 32))


def test_tune_on_text_pairs_saves_an_encoder_that_does_not_pool_instructions(llm: Path, tmp_path: Path) -> None:
    """sentence-transformers reads an instruction in the saved folder as tuning did."""
    pairs = [Pair(f"question {n}", f"answer {n}", (f"wrong {n}",), "find:\n") for n in range(48)]
    folder = tune([CAPTIONS, pairs], open_encoder(llm), TUNE, tmp_path)
    encoder = open_encoder(folder)
    tokens = encoder.tokenize(["a dog"], ["find:\n"])
    assert tokens.prompt_lengths == [6]
    embedding = encoder.encode(tokens)[0]
    states = encoder.llm(input_ids=torch.tensor(tokens.ids)).last_hidden_state[0]
    assert torch.allclose(embedding, states[6:].mean(0), atol=1e-5)
    model = SentenceTransformer(str(folder), device="cpu")
    assert torch.allclose(embedding, model.encode("a dog", prompt="find:\n", convert_to_tensor=True), atol=1e-5)


def test_cached_passes_run_in_the_precision_of_training_also_in_a_second_training(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second pass runs inside the backward pass, where autocast is no longer active by itself."""
    outputs = set()
    forward = torch.nn.Linear.forward

    def recorded_forward(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        outputs.add((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(torch.nn.Linear, "forward", recorded_forward)
    encoder = open_encoder(llm)
    config = dataclasses.replace(TUNE, lora_r=0, steps=1, precision="bf16", grad_cache=True, batch_tokens=64)
    for name in ("first", "second"):
        tune([CAPTIONS], encoder, config, tmp_path / name)
        assert outputs == {(False, torch.bfloat16), (True, torch.bfloat16)}
        outputs.clear()


def test_tune_stops_at_a_loss_that_is_not_finite(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm2clip.train.tune.pair_loss", lambda a, b, *_: (a * b).sum() * math.nan)
    with pytest.raises(FloatingPointError, match="loss is nan at step 1"):
        tune([CAPTIONS], open_encoder(llm), TUNE, tmp_path)
    assert not (tmp_path / "encoder").exists()


def test_tune_stops_at_a_gradient_that_is_not_finite(llm: Path, tmp_path: Path) -> None:
    """The loss of the step is still finite; the next checkpoint would hold weights that are not."""
    encoder = open_encoder(llm)
    list(encoder.llm.parameters())[-1].register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="grad_norm is"):
        tune([CAPTIONS], encoder, dataclasses.replace(TUNE, lora_r=0), tmp_path)
    assert not list((tmp_path / "checkpoints").glob("*/complete"))


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"lora_r": 0, "hard_negative_group_size": 3, "batch_size": 100},  # more pairs than there are images
        {"precision": "bf16", "grad_cache": True, "batch_tokens": 64},
        {"qlora": True, "gradient_checkpointing": True},
    ],
    ids=str,
)
def test_tune_resumes_exactly(llm: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Killed in step 6 of 6: the same losses and weights as without the interruption, to the last bit."""
    config = dataclasses.replace(TUNE, **change)
    uninterrupted = tune([CAPTIONS], open_encoder(llm), config, tmp_path / "uninterrupted")
    with killed_in_step(6):
        tune([CAPTIONS], open_encoder(llm), config, tmp_path / "killed")
    (tmp_path / "killed/checkpoints/checkpoint-5").mkdir(parents=True)  # incomplete: no marker file
    resumed = tune([CAPTIONS], open_encoder(llm), config, tmp_path / "killed")
    resumed_weights = load_file(resumed / "model.safetensors")
    for name, tensor in load_file(uninterrupted / "model.safetensors").items():
        assert torch.equal(tensor, resumed_weights[name]), name
    runs = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("uninterrupted", "killed")]
    losses = [[line["loss"] for line in run] for run in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_tune_does_not_resume_with_other_settings_or_data(llm: Path, tmp_path: Path) -> None:
    tune([CAPTIONS], open_encoder(llm), TUNE, tmp_path).rename(tmp_path / "removed")
    for change, data, message in (
        ({"precision": "bf16"}, CAPTIONS, "precision: fp32 saved, bf16 now"),
        ({"steps": 7}, CAPTIONS, "steps: 6 saved, 7 now"),
        ({}, CAPTIONS[::-1], r"texts: .* saved"),
    ):
        with pytest.raises(ValueError, match=rf"Cannot resume from .*{message}"):
            tune([data], open_encoder(llm), dataclasses.replace(TUNE, **change), tmp_path)


def test_pickles_in_a_checkpoint_are_not_executed(llm: Path, tmp_path: Path) -> None:
    """In place of the files that are saved, and under the names that the Trainer would load."""
    config = dataclasses.replace(TUNE, steps=4)
    tune([CAPTIONS], open_encoder(llm), config, tmp_path / "run").rename(tmp_path / "removed")
    shutil.rmtree(tmp_path / "run/checkpoints/checkpoint-4")
    checkpoint = tmp_path / "run/checkpoints/checkpoint-2"
    marker = json.loads((checkpoint / "complete").read_text())
    (checkpoint / "complete").write_text(json.dumps({**marker, "files": {}}))  # no file counts as damaged
    for name in ("optimizer.pt", "scheduler.pt", "pytorch_model.bin", "training_args.bin"):
        torch.save(TouchOnLoad(tmp_path / "executed"), checkpoint / name)
    for name in ("state-1.safetensors", "state.json", "trainer_state.json", "scaler.pt", "rng_state.pth"):
        original = (checkpoint / name).read_bytes() if name != "scaler.pt" else None  # saved on GPUs only
        torch.save(TouchOnLoad(tmp_path / "executed"), checkpoint / name)
        with pytest.raises(Exception, match=r"."):
            tune([CAPTIONS], open_encoder(llm), config, tmp_path / "run")
        (checkpoint / name).unlink()
        if original is not None:
            (checkpoint / name).write_bytes(original)
    tune([CAPTIONS], open_encoder(llm), config, tmp_path / "run")
    assert not (tmp_path / "executed").exists()


# ---- several ranks ---------------------------------------------------------------------------------------------------

# No dropout, which each rank draws by itself, and passes of few tokens, so that ranks make different numbers of passes.
SMALL_PASSES = dataclasses.replace(TUNE, lora_dropout=0.0, lr=1e-4, batch_tokens=64)


def test_tune_on_two_ranks_matches_one_process(llm: Path, tmp_path: Path) -> None:
    """Two ranks with half the batch each, of captions of unequal length, do what one does with the whole batch.

    Without gradient caching: see `test_tune_resumes_on_another_number_of_ranks`.
    """
    config = dataclasses.replace(SMALL_PASSES, steps=3, grad_cache=True)
    run_distributed(2, _tune_on_rank, str(llm), str(tmp_path / "two"), config)
    encoder_dir = tune([CAPTIONS], open_encoder(llm), config, tmp_path / "one")
    assert_same_run(tmp_path / "two/encoder", encoder_dir)


def _tune_on_rank(llm: str, folder: str, config: TuneConfig) -> None:
    half = dataclasses.replace(config, batch_size=config.batch_size // 2)
    tune([CAPTIONS], open_encoder(Path(llm)), half, Path(folder))


def test_tune_resumes_on_another_number_of_ranks(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed on two ranks after the checkpoint of step 2, and resumed by one process with the same settings."""
    whole = dataclasses.replace(SMALL_PASSES, steps=4)
    half = dataclasses.replace(whole, batch_size=whole.batch_size // 2)
    run_distributed(2, _tune_until_killed, str(llm), str(tmp_path / "run"), whole)
    losses_before = [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    uninterrupted = tune([CAPTIONS], open_encoder(llm), whole, tmp_path / "uninterrupted")
    cached_steps: list[int] = []
    monkeypatch.setattr(
        tune_module, "compute_cached_loss", lambda *args: cached_steps.append(1) or compute_cached_loss(*args)
    )
    resumed = tune([CAPTIONS], open_encoder(llm), half, tmp_path / "run")
    line = "Number of processes: 1 (was 2). Resuming from step 2 with 6 pairs per step, as before (6 per process)"
    assert line in capsys.readouterr().out
    assert len(cached_steps) == 2, "the memory must not grow with an unchanged batch size"
    assert_same_run(resumed, uninterrupted)
    assert [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")][:2] == losses_before[:2]


def _tune_until_killed(llm: str, folder: str, config: TuneConfig) -> None:
    with killed_in_step(4):
        _tune_on_rank(llm, folder, config)


@pytest.mark.parametrize(
    "change",
    [{"lora_r": 0, "grad_cache": True}, {"precision": "bf16", "gradient_checkpointing": True}],
    ids=str,
)
def test_tune_with_fsdp_matches_one_process(llm: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    """Two ranks with different numbers of passes, killed and resumed."""
    config = dataclasses.replace(SMALL_PASSES, steps=4, **change)
    run_distributed(2, _tune_sharded_on_rank, str(llm), str(tmp_path / "two"), config)
    encoder_dir = tune([CAPTIONS], open_encoder(llm), config, tmp_path / "one")
    # In bf16, FSDP rounds more values than autocast.
    rtol, atol = (2e-3, 1e-4) if config.precision == "fp32" else (3e-2, 1e-3)
    assert_same_run(tmp_path / "two/encoder", encoder_dir, rtol, atol)
    if config.precision == "fp32":  # resumed by one process without FSDP, with an unchanged batch size
        half = dataclasses.replace(config, batch_size=config.batch_size // 2)
        assert_same_run(tune([CAPTIONS], open_encoder(llm), half, tmp_path / "killed"), encoder_dir)


def _tune_sharded_on_rank(llm: str, folder: str, config: TuneConfig) -> None:
    from torch.distributed.fsdp import FSDPModule

    emulate_fsdp_launch()
    with killed_in_step(4) as models:  # after the checkpoint of step 2
        _tune_on_rank(llm, folder, config)
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder, Path(folder).parent / "killed")
    torch.distributed.barrier()
    encoder = open_encoder(Path(llm))
    with recorded_models() as resumed_models:
        tune([CAPTIONS], encoder, dataclasses.replace(config, batch_size=config.batch_size // 2), Path(folder))
    assert len(resumed_models) == 2
    for model in [*models, *resumed_models]:  # also the layers are sharded
        assert isinstance(model, FSDPModule) and sum(isinstance(m, FSDPModule) for m in model.modules()) > 2
    assert not list(Path(folder).rglob("*fsdp*")), "checkpoints must not hold frozen weights or pickles"
    assert torch.equal(encoder.encode(["a dog"]), open_encoder(Path(folder) / "encoder").encode(["a dog"]))


def test_fsdp_version_1_is_rejected(llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        tune([CAPTIONS], open_encoder(llm), TUNE, tmp_path)
