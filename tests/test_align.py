"""Stage 2, align: the training loop, gradient caching, several ranks, exact resume, evaluation during training."""

import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, DistributedType
from safetensors.torch import load_file, save_file

from align_fixtures import ALIGN, fresh_model, killed_after, read_split, run_align
from conftest import (
    CAPTIONS,
    HANG_TIMEOUT,
    TUNE,
    emulate_fsdp_launch,
    make_llm,
    make_tower,
    redirect_errors,
    run_distributed,
    run_in_process,
    start_command,
)
from llm2clip.cli import main
from llm2clip.config import AlignConfig
from llm2clip.data.image_order import draw_random_image_order
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import load_image
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog, TooManySkippedError
from llm2clip.data.table import RecordTable
from llm2clip.data.transforms import EvalTransform
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval import build_dual_encoder_from_store, create_validation_function
from llm2clip.models.llm2clip import LLM2CLIP, MAX_LOGIT_SCALE
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.parallel import Prefetcher
from llm2clip.runs.output_folder import read_metrics
from llm2clip.store.encode import embed
from llm2clip.store.store import EmbeddingStore
from llm2clip.train import align as align_module
from llm2clip.train import loop, optim
from llm2clip.train.align import align
from llm2clip.train.loop import StepLogger
from llm2clip.train.losses import LOSSES, info_nce
from llm2clip.train.sampling import AlignBatches
from llm2clip.train.tune import tune

TIMES = ("images_per_second", "data_wait")  # metrics that differ from run to run
TOWER_LINEAR_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def metrics_of(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """Return the lines of a metrics file without the times."""
    lines = read_metrics(run_dir / f"{name}.jsonl")
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def replace_info_nce(monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
    monkeypatch.setitem(LOSSES, "infonce", dataclasses.replace(LOSSES["infonce"], function=function))


def read_metrics_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read the metrics of a step during the next step, as on a GPU."""
    report = StepLogger._log_pending_steps
    monkeypatch.setattr(StepLogger, "_log_pending_steps", lambda self, pending: report(self, pending=1))
    monkeypatch.setattr(StepLogger, "flush", lambda self: report(self, pending=0))


def damaged_image(record: Record, folder: Path) -> FileImage:
    """Write a truncated copy of a record's image."""
    original = Path(str(record.image))
    (folder / original.name).write_bytes(original.read_bytes()[:300])
    return FileImage(str(folder / original.name))


def mean_similarity(records: list[Record], store: EmbeddingStore) -> Any:
    """Return a validation function: the mean similarity of images and their first captions, a smooth score."""

    def validate(model: LLM2CLIP) -> dict[str, float]:
        assert not model.training
        embeddings = ModelEmbeddings(
            build_dual_encoder_from_store(model, store), SkipLog(max_skipped=1.0), progress=False
        )
        images, indices = embeddings.encode_images([r.image for r in records if r.image is not None])
        texts = embeddings.encode_texts([records[i].captions[0] for i in indices])
        return {"score": float((images * texts).sum(-1).mean())}

    return validate


def assert_same_run(
    model: LLM2CLIP, other_state: dict[str, torch.Tensor], run_dir: Path, other_dir: Path, atol: float
) -> None:
    """Check that two runs have the same losses and gradient norms, and end with the same weights."""
    lines, other_lines = metrics_of(run_dir), metrics_of(other_dir)
    # Clipping and AdamW hide a constant factor on the gradients; their norm does not.
    for key, tolerance in (("loss", {"abs": atol}), ("grad_norm", {"rel": 100 * atol})):
        assert lines and [line[key] for line in lines] == pytest.approx(
            [line[key] for line in other_lines], **tolerance
        )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(
            tensor, other_state[name], atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [{}, {"matryoshka_dims": [3, 6]}, {"distill_weight": 5.0}],
    ids=str,
)
def test_align_matches_adamw_written_out(
    records: list[Record],
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    """Six steps by hand: rates by part, warm-up and cosine, clipped gradients, decay of matrices only."""
    monkeypatch.setattr(loop, "MAX_GRAD_NORM", 0.5)
    monkeypatch.setattr(optim, "WEIGHT_DECAY", 0.3)
    config = dataclasses.replace(ALIGN, lr=3e-3, tower_lr=1e-3, warmup_ratio=0.34, **change)
    trained = run_align(records, store, tmp_path, config)
    lines = read_metrics(tmp_path / "metrics.jsonl")

    model, frozen_tower = fresh_model().train(), fresh_model().tower.eval()
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    factors = [1 / 2, 1, 1, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5]  # two of six steps of warm-up
    batches = AlignBatches(RecordTable.from_records(records), store, model.tower.preprocess, config).iterate_batches(0)
    norms = []
    for step, (batch, factor) in enumerate(zip(batches, factors, strict=True)):
        batch = batch.to(torch.device("cpu"))
        image, text, scale, _ = model(pixels=batch.images, embeddings=batch.embeddings)
        losses = []
        for dim in (*config.matryoshka_dims, 12):
            unit_image, unit_text = F.normalize(image[:, :dim]), F.normalize(text[:, :dim])
            losses.append(info_nce(unit_image, unit_text, scale, batch.image_of_caption, batch.caption_rows))
        loss = torch.stack(losses).mean()
        if config.distill_weight:
            frozen_features = frozen_tower(batch.images).detach()
            student, teacher = F.normalize(model.tower(batch.images)), F.normalize(frozen_features)
            distances = F.smooth_l1_loss(F.pdist(student), F.pdist(teacher))
            loss = loss + 5 * (distances + (student - teacher).square().sum(1).mean())
        parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in parameters], allow_unused=True)
        norms.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
        expected = {"loss": loss.item(), "grad_norm": norms[-1], "logit_scale": scale.item(), "lr": 3e-3 * factor}
        assert {name: lines[step][name] for name in expected} == pytest.approx(expected, rel=1e-3)
        for (name, p), gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            lr = (1e-3 if name.startswith("tower.") else 3e-3) * factor
            gradient = gradient * min(1.0, 0.5 / norms[-1])
            mean, square = moments[name]
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient**2, 0.001)
            p.data -= lr * (0.3 if p.ndim > 1 else 0.0) * p.data
            p.data -= lr * (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    assert max(norms) > 0.5, "no gradient was clipped"
    for name, p in trained.state_dict().items():
        torch.testing.assert_close(p, model.state_dict()[name], atol=2e-4, rtol=1e-3, msg=lambda m, name=name: name + m)


def test_align_trains_the_heads_of_a_frozen_tower_on_its_features(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    """The loss is that of the model itself; images that cannot be decoded are left out."""
    broken = dataclasses.replace(records[0], image=damaged_image(records[0], tmp_path))
    config = dataclasses.replace(
        ALIGN, epochs=60, batch_size=15, lr=3e-3, warmup_ratio=0.0, tower_lr=0.0, captions_per_image=0, save_steps=100
    )
    log = SkipLog(tmp_path / "skipped.jsonl", max_skipped=1.0)
    log.count_at_least(31)
    run_dir = tmp_path / "run"
    model = align(RecordTable.from_records([*records, broken]), store, fresh_model(), config, run_dir, log)
    assert str(broken.image) in (tmp_path / "skipped.jsonl").read_text()
    before = fresh_model().state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("tower."), name
    losses = [line["loss"] for line in metrics_of(run_dir)]
    assert len(losses) == 60 * 2 and losses[-1] < 0.8 * losses[0]

    first = [records[int(i)] for i in draw_random_image_order(30, config.seed, 0)[:15]]
    pixels = torch.stack([EvalTransform(model.tower.preprocess)(load_image(r.image)) for r in first])
    rows = np.concatenate([store.find_rows(r.texts) for r in first])
    image_of_text = torch.tensor([n for n, record in enumerate(first) for _ in record.texts])
    image, text, scale, _ = fresh_model().eval()(pixels, torch.from_numpy(store.take(rows)))
    expected = info_nce(image, text, scale, image_of_text, torch.from_numpy(rows)).item()
    assert losses[0] == pytest.approx(expected, abs=2e-3)  # the features are stored in float16
    features = EmbeddingStore(next(run_dir.glob("features-*")))
    assert len(features) == 30


def test_align_merges_tower_lora_into_the_blocks(train: Any, tmp_path: Path) -> None:
    model = train(tmp_path, dataclasses.replace(ALIGN, lora_r=2, tower_lr=1e-2))
    before, after = fresh_model().state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if name.startswith("tower.") and not torch.equal(before[name], after[name])}
    assert changed == {f"tower.backbone.blocks.{n}.{layer}.weight" for n in range(6) for layer in TOWER_LINEAR_LAYERS}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2


def test_align_keeps_the_logit_scale_below_its_limit(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    """In the forward pass and in the parameter, whose gradient would vanish above the limit for good."""
    config = dataclasses.replace(ALIGN, precision="bf16", epochs=3, lr=0.5, tower_lr=0.0)
    model = fresh_model()
    model.logit_scale.data.fill_(9.0)
    align(RecordTable.from_records(records), store, model, config, tmp_path, SkipLog())
    scales = [line["logit_scale"] for line in metrics_of(tmp_path)]
    assert scales[0] == pytest.approx(MAX_LOGIT_SCALE) and max(scales) <= MAX_LOGIT_SCALE * (1 + 1e-6)
    assert scales[-1] < MAX_LOGIT_SCALE / 2 and model.logit_scale.item() < math.log(MAX_LOGIT_SCALE)


def test_align_stops_if_too_many_images_cannot_be_decoded(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    """See also `test_align_lists_undecodable_images_of_all_processes`."""
    record = dataclasses.replace(records[0], image=damaged_image(records[0], tmp_path))
    log = SkipLog(max_skipped=0.0)
    log.count_at_least(len(records))
    with pytest.raises(TooManySkippedError):
        align(RecordTable.from_records([record, *records[1:]]), store, fresh_model(), ALIGN, tmp_path / "run", log)


def test_align_stops_at_a_loss_that_is_not_finite(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(99))
    replace_info_nce(monkeypatch, lambda *args: info_nce(*args) * (math.nan if next(calls) == 4 else 1))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 5\. .*checkpoint-4") as error:
        train(tmp_path)
    file = next(tmp_path.glob("not-finite-5-*.json"))
    assert str(file) in str(error.value)
    images = json.loads(file.read_text())["images"]
    assert len(images) == ALIGN.batch_size and all(name.endswith(".png") for name in images)


def test_align_stops_at_a_gradient_that_is_not_finite(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    """The loss of the step is still finite; the weights after it would not be, nor would the next checkpoint."""
    model = fresh_model()
    model.projection.weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(FloatingPointError, match="grad_norm is"):
        align(RecordTable.from_records(records), store, model, ALIGN, tmp_path, SkipLog())
    assert not list((tmp_path / "checkpoints").glob("*/complete"))


@pytest.mark.parametrize("change", [{}, {"eval_steps": 3}], ids=str)
def test_weights_are_checked_before_they_are_saved_if_metrics_are_read_later(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Step 4 saves weights; step 3 evaluates them."""
    read_metrics_late(monkeypatch)
    failing = 3 if change else 4
    calls = iter(range(99))
    evaluated: list[int] = []

    def loss(*args: Any) -> torch.Tensor:
        return info_nce(*args) * (math.nan if next(calls) == failing - 1 else 1)

    def validate(model: LLM2CLIP) -> dict[str, float]:
        evaluated.append(1)
        return {"score": 0.0}

    replace_info_nce(monkeypatch, loss)
    with pytest.raises(FloatingPointError, match=rf"loss is nan at step {failing}\. .*checkpoint-2"):
        train(tmp_path, dataclasses.replace(ALIGN, **change), validate)
    assert not evaluated and not (tmp_path / "checkpoints" / "checkpoint-4").exists()
    assert [line["step"] for line in metrics_of(tmp_path)] == list(range(1, failing))


def test_align_reports_to_trackers_by_name(train: Any, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, dataclasses.replace(ALIGN, report_to=["tensorboard"]))
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent)).Reload()
    lines = metrics_of(tmp_path)
    assert [event.step for event in events.Scalars("loss")] == [line["step"] for line in lines]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    with pytest.raises(ValueError, match="must be one of tensorboard, wandb, trackio"):
        train(tmp_path / "a", dataclasses.replace(ALIGN, report_to=["paper"]))
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        train(tmp_path / "b", dataclasses.replace(ALIGN, report_to=["wandb"]))


# ---- gradient caching ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"loss": "sigmoid", "captions_per_image": 0, "distill_weight": 5.0, "matryoshka_dims": [3, 6]},
        {"lora_r": 2, "distill_weight": 5.0},
    ],
    ids=str,
)
def test_micro_batches_give_the_gradients_of_the_whole_batch(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Parts of 4, 4 and 2 images of a batch of 10."""
    steps: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *_: steps.append([p.grad.clone() for group in self.param_groups for p in group["params"]]),
    )
    for micro_batch_size in (None, 4):
        config = dataclasses.replace(ALIGN, micro_batch_size=micro_batch_size, epochs=1, **change)
        train(tmp_path / str(micro_batch_size), config)
    assert len(steps) == 2 * 3
    for whole, in_parts in zip(steps[:3], steps[3:], strict=True):
        assert sum(gradient.norm().item() > 0 for gradient in whole) > len(whole) / 2
        for a, b in zip(whole, in_parts, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * max(1, a.abs().max().item()), rtol=1e-5)


def test_micro_batches_repeat_their_dropout_in_the_second_pass(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[torch.Tensor] = []
    forward = VisionTower.forward

    def recorded_forward(self: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
        outputs.append(forward(self, pixels))
        return outputs[-1]

    monkeypatch.setattr(VisionTower, "forward", recorded_forward)
    train(tmp_path, dataclasses.replace(ALIGN, micro_batch_size=5, epochs=1), dropout=0.3)
    assert len(outputs) == 3 * 2 * 2  # steps, parts, passes
    for n in range(0, len(outputs), 4):
        assert torch.equal(outputs[n], outputs[n + 2]) and torch.equal(outputs[n + 1], outputs[n + 3])
        assert outputs[n + 2].requires_grad and not outputs[n].requires_grad


# ---- several ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 2, "distill_weight": 5.0, "loss": "sigmoid", "matryoshka_dims": [3, 6]},
        {"lora_r": 2, "distill_weight": 5.0},
    ],
    ids=str,
)
def test_align_on_two_ranks_matches_one_process(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    _compare_with_one_process(records, store, tmp_path, dataclasses.replace(ALIGN, **change), fsdp=False)


def test_align_with_fsdp_matches_one_process(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """Killed in the middle and resumed. Without LoRA: see `test_align_resumes_on_other_numbers_of_ranks`."""
    config = dataclasses.replace(ALIGN, micro_batch_size=2, distill_weight=5.0, lora_r=2)
    _compare_with_one_process(records, store, tmp_path, config, fsdp=True)


def _compare_with_one_process(
    records: list[Record], store: EmbeddingStore, folder: Path, config: AlignConfig, fsdp: bool
) -> None:
    """Two ranks with half the batch size each must do what one process does with the whole batch."""
    config = dataclasses.replace(config, eval_steps=2)
    run_distributed(2, _align_on_rank, records, str(store.folder), config, str(folder / "two"), fsdp)
    model = run_align(records, store, folder / "one", config, mean_similarity(records, store))
    state = load_file(folder / "two" / "trained.safetensors")
    assert_same_run(model, state, folder / "one", folder / "two", atol=1e-4)
    scores = [[line["score"] for line in metrics_of(folder / run, "evaluations")] for run in ("one", "two")]
    assert len(scores[0]) == 3 and scores[0] == pytest.approx(scores[1], abs=1e-4)


def _align_on_rank(records: list[Record], store: str, config: AlignConfig, folder: str, fsdp: bool) -> None:
    half = dataclasses.replace(config, batch_size=config.batch_size // 2)
    run = (records, EmbeddingStore(store), Path(folder), half, mean_similarity(records, EmbeddingStore(store)))
    if fsdp:
        emulate_fsdp_launch()
        with killed_after(5):
            run_align(*run)
    model = run_align(*run)
    assert (AcceleratorState().distributed_type is DistributedType.FSDP) == fsdp
    if torch.distributed.get_rank() == 0:
        save_file(model.state_dict(), Path(folder) / "trained.safetensors")
    torch.distributed.barrier()


def test_align_lists_undecodable_images_of_all_processes(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    damaged = [
        dataclasses.replace(record, image=damaged_image(record, tmp_path)) if n % 5 == 0 else record
        for n, record in enumerate(records)
    ]
    run_distributed(2, _align_damaged_on_rank, damaged, str(store.folder), str(tmp_path))
    listed = [json.loads(line)["file"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(str(record.image) for record in damaged[::5])


def _align_damaged_on_rank(records: list[Record], store: str, folder: str) -> None:
    log = SkipLog(Path(folder) / "skipped.jsonl" if torch.distributed.get_rank() == 0 else None, max_skipped=0.5)
    log.count_at_least(len(records))
    half = dataclasses.replace(ALIGN, batch_size=ALIGN.batch_size // 2)
    table = RecordTable.from_records(records)
    align(table, EmbeddingStore(store), fresh_model(), half, Path(folder) / "run", log)
    assert log.skipped["undecodable image"] == len(range(0, len(records), 5)), "every rank must count all"


# ---- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "tower"),
    [
        ({}, "test_efficientnet"),
        ({"lora_r": 2, "save_steps": 1}, "test_vit"),
        ({"micro_batch_size": 3}, "test_vit"),
        ({"tower_lr": 0.0, "batch_size": 100, "epochs": 15}, "test_vit"),  # a step uses all images
    ],
    ids=str,
)
def test_align_resumes_exactly(
    train: Any,
    store: EmbeddingStore,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    tower: str,
) -> None:
    """Killed in the middle of an epoch: the same metrics, evaluations and weights, to the last bit.

    If each step is saved, the last checkpoint is truncated, as after a power failure. The evaluation of the
    repeated steps is then discarded.
    """
    config = dataclasses.replace(ALIGN, **{"epochs": 3, "batch_size": 6, "eval_steps": 2, **change})
    held_out = {"captions": read_split(image_folder, "val")}

    def run(name: str) -> LLM2CLIP:
        validate = create_validation_function(held_out, SkipLog(max_skipped=1.0), store)
        return train(tmp_path / name, config, validate, tower=tower, dropout=0.1)

    uninterrupted = run("uninterrupted")
    monkeypatch.setattr(align_module, "prefetch_on_accelerator", lambda items, _: Prefetcher(items))
    with killed_after(6 if config.save_steps == 1 else 5):
        run("killed")
    if config.save_steps == 1:
        file = tmp_path / "killed/checkpoints/checkpoint-6/state-1.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    resumed = run("killed")
    assert (tmp_path / "killed/checkpoints/checkpoint-6.damaged").is_dir() == (config.save_steps == 1)
    for (name, a), b in zip(uninterrupted.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for log in ("metrics", "evaluations"):
        lines = metrics_of(tmp_path / "uninterrupted", log)
        assert lines == metrics_of(tmp_path / "killed", log)
        assert lines[-1]["step"] == 15


def test_align_resumes_with_another_hash_seed(
    image_folder: Path, llm: Path, store: EmbeddingStore, tmp_path: Path
) -> None:
    """The order of sets of strings differs between interpreters."""
    tower = make_tower(tmp_path / "tower", "test_vit")
    command = ["align", f"{image_folder / 'captions.jsonl'}@train", "--store", str(store.folder)]
    command += ["--encoder.path", str(llm), "--align.tower", str(tower), "--align.image_size", "64"]
    command += ["--align.batch_size", "6", "--align.epochs", "2", "--align.save_steps", "2"]
    command += ["--align.workers", "0", "--align.precision", "fp32"]
    assert main([*command, "--out", str(tmp_path / "uninterrupted")]) == 0
    with killed_after(3):
        main([*command, "--out", str(tmp_path / "killed")])
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2",
        "XDG_CACHE_HOME": str(tmp_path),
    }
    resume = [sys.executable, "-m", "llm2clip", *command, "--out", str(tmp_path / "killed")]
    process = subprocess.run(resume, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    expected, lines = metrics_of(tmp_path / "uninterrupted"), metrics_of(tmp_path / "killed")
    assert [line["step"] for line in lines] == list(range(1, 11))
    # The loss depends on the order of images and captions; the interpreters may use other kernels.
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


def test_an_error_in_the_loss_stops_the_workers_and_the_thread(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    """A worker would be aborted if a thread were still sending a batch when the interpreter is finalized."""
    exit_code = run_in_process(_fail_in_the_loss, records, str(store.folder), tmp_path)
    errors = (tmp_path / "errors").read_text()
    assert exit_code == 0 and "terminate" not in errors, errors


def _fail_in_the_loss(records: list[Record], store: str, folder: Path) -> None:
    redirect_errors(folder / "errors")
    torch.set_num_threads(1)
    workers: list[Any] = []

    def failing_loss(*_: Any) -> None:
        workers.extend(multiprocessing.active_children())
        raise RuntimeError("out of memory")

    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(RuntimeError, match="out of memory"):
        replace_info_nce(monkeypatch, failing_loss)
        monkeypatch.setattr(align_module, "prefetch_on_accelerator", lambda items, _: Prefetcher(items))
        run_align(records, EmbeddingStore(store), folder / "run", dataclasses.replace(ALIGN, workers=1, epochs=99))
    assert [worker.exitcode for worker in workers] == [0]
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}


def test_ctrl_c_ends_the_align_command(image_folder: Path, llm: Path, store: EmbeddingStore, tmp_path: Path) -> None:
    """Starts a real process with a worker, and interrupts both during training, as a terminal does."""
    tower = make_tower(tmp_path / "tower", "test_vit")
    command = ["align", f"{image_folder / 'captions.jsonl'}@train"]
    command += ["--store", str(store.folder), "--encoder.path", str(llm), "--out", str(tmp_path / "run")]
    command += ["--align.tower", str(tower), "--align.workers", "1", "--align.epochs", "9999"]
    command += ["--align.batch_size", "10", "--align.image_size", "64"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = start_command(command, tmp_path / "output")
    deadline = time.monotonic() + HANG_TIMEOUT
    while process.is_alive() and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_text():  # the first step is complete
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # the output says why the process has ended
        os.killpg(process.pid or 0, signal.SIGINT)
    process.join(HANG_TIMEOUT)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 130, output
    assert "Run the same command again to resume" in output
    assert "Traceback" not in output and "terminate" not in output, output


def test_align_does_not_resume_with_other_data_or_settings(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    config = dataclasses.replace(ALIGN, epochs=1, save_steps=1)
    run_align(records, store, tmp_path / "run", config)
    for change, message in (
        ({"batch_size": 20}, r"--align\.batch_size: 10 saved, 20 now"),
        ({"lr": 0.1}, r"--align\.lr: 0\.001 saved, 0\.1 now"),
    ):
        with pytest.raises(ValueError, match=message):
            run_align(records, store, tmp_path / "run", dataclasses.replace(config, **change))
    with pytest.raises(ValueError, match=r"images: .* saved"):
        run_align(records[::-1], store, tmp_path / "run", config)
    other_encoder = CaptionEncoder.from_pretrained(make_llm(tmp_path / "other", seed=1), device="cpu")
    other_store = embed([text for r in records for text in r.texts], other_encoder, tmp_path / "other store")
    with pytest.raises(ValueError, match=r"caption encoder: .* saved"):
        run_align(records, other_store, tmp_path / "run", config)


@pytest.mark.parametrize(
    ("batch_size", "ranks", "fsdp"), [(12, (1, 2), False), (6, (2, 3), True)], ids=["1-2-1, DDP", "2-3-1, FSDP"]
)
def test_align_resumes_on_other_numbers_of_ranks(
    records: list[Record],
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    batch_size: int,
    ranks: tuple[int, int],
    fsdp: bool,
) -> None:
    """Killed and resumed twice with unchanged settings, and then compared with an uninterrupted run.

    With DDP, the tower is frozen. With FSDP, three ranks have shards of unequal sizes, and the last part of the run is
    not sharded.
    """
    config = dataclasses.replace(ALIGN, batch_size=batch_size, epochs=3, tower_lr=1e-4 if fsdp else 0.0)
    for count, steps in zip(ranks, (3, 5), strict=True):
        run = (records, str(store.folder), config, str(tmp_path / "run"), fsdp, steps)
        if count == 1:
            _align_until_killed(*run)
        else:
            run_distributed(count, _align_until_killed, *run)
    sizes: list[int] = []
    forward = LLM2CLIP.forward

    def recorded_forward(self: LLM2CLIP, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(kwargs.get("pixels", kwargs.get("features"))))
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LLM2CLIP, "forward", recorded_forward)
        resumed = run_align(records, store, tmp_path / "run", config)
    # Two steps. The memory must not grow, so batches of twice the batch size need two parts and two passes.
    assert sizes == ([12] * 2 if batch_size == 12 else [6] * 2 * 2 * 2)
    line = f"processes: 1 (was {ranks[-1]}). Resuming from step 4 with 12 images per step, as before (12 per process)"
    assert line in capsys.readouterr().out
    whole = dataclasses.replace(config, batch_size=12)
    uninterrupted = run_align(records, store, tmp_path / "uninterrupted", whole)
    assert_same_run(resumed, uninterrupted.state_dict(), tmp_path / "uninterrupted", tmp_path / "run", atol=1e-4)


def _align_until_killed(
    records: list[Record], store: str, config: AlignConfig, folder: str, fsdp: bool, steps: int
) -> None:
    if fsdp:
        emulate_fsdp_launch()
    with killed_after(steps):
        run_align(records, EmbeddingStore(store), Path(folder), config)
    assert (AcceleratorState().distributed_type is DistributedType.FSDP) == fsdp


# ---- precision -------------------------------------------------------------------------------------------------------


def test_fp16_is_rejected_on_a_cpu(train: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="fp16 requires a GPU"):
        train(tmp_path, dataclasses.replace(ALIGN, precision="fp16"))


def test_stages_do_not_inherit_a_precision(
    train: Any, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate keeps one precision per process, and the launcher's in the environment."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    tune([CAPTIONS], encoder, dataclasses.replace(TUNE, steps=1), tmp_path / "tune")
    assert AcceleratorState().mixed_precision == "no"
    train(tmp_path / "align", dataclasses.replace(ALIGN, precision="bf16", epochs=1))
    assert AcceleratorState().mixed_precision == "bf16"
