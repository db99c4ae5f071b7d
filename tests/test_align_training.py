"""Both stages' loops: exact resume, whole checkpoints, what a step sees, what is trained at which rate."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from conftest import CAPTIONS, TUNE, Killed, distributed, make_llm
from llm2clip.checkpoint import MetricsLog, latest_checkpoint, mark_complete, read_metrics, validate_resume
from llm2clip.config import AlignConfig
from llm2clip.data.hashing import epoch_permutation
from llm2clip.data.image_refs import FileImage
from llm2clip.data.images import EvalTransform, load_image
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.store.encode import embed
from llm2clip.store.store import EmbeddingStore
from llm2clip.train import align_trainer as loop
from llm2clip.train.align import align
from llm2clip.train.align_data import AlignBatches, Batch
from llm2clip.train.losses import info_nce
from llm2clip.train.optim import cosine_schedule, parameter_groups, set_trainable
from llm2clip.train.tune import tune

ALIGN = AlignConfig(embed_dim=12, epochs=4, batch_size=10, save_steps=5, workers=0, image_size=64, report_to=[])


@pytest.fixture
def records(pictures: Path) -> list[Record]:
    return [r for r in open_records(pictures / "captions.jsonl") if r.split == "train"]


@pytest.fixture
def store(records: list[Record], llm: Path, tmp_path: Path) -> EmbeddingStore:
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    return embed([t for r in records for t in r.texts], encoder, tmp_path / "store")


def fresh_model(tower: str = "test_efficientnet", **settings: Any) -> LLM2CLIP:
    torch.manual_seed(0)
    vision = VisionTower.from_pretrained(f"timm:{tower}", pretrained=False, image_size=64)
    return LLM2CLIP(LLM2CLIPConfig(vision.config, 32, **{"embed_dim": 12, "adapter_depth": 1, **settings}), vision)


@pytest.mark.parametrize("head_epochs", [0, 3])
def test_align_goes_on_exactly(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_epochs: int
) -> None:
    recipe = dataclasses.replace(ALIGN, head_epochs=head_epochs, head_batch=15)
    whole = align(records, store, fresh_model(), recipe, tmp_path / "whole", SkipLog())
    batches = AlignBatches.batches

    def dies(self: AlignBatches, first: int) -> object:
        for n, batch in enumerate(batches(self, first), start=first):
            if n == 8:
                raise Killed
            yield batch

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AlignBatches, "batches", dies)
        align(records, store, fresh_model(), recipe, tmp_path / "cut", SkipLog())
    resumed = align(records, store, fresh_model(), recipe, tmp_path / "cut", SkipLog())
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    losses = [[line["loss"] for line in read_metrics(tmp_path / f / "metrics.jsonl")] for f in ("whole", "cut")]
    assert losses[0] == losses[1] and len(losses[0]) == 12


def test_workers_and_processes_change_nothing(records: list[Record], store: EmbeddingStore) -> None:
    model = fresh_model()
    one = list(AlignBatches(records, store, model, ALIGN).batches(3))
    other = list(AlignBatches(records, store, model, dataclasses.replace(ALIGN, workers=2)).batches(3))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a.images, b.images) and np.array_equal(a.rows, b.rows) and np.array_equal(a.owner, b.owner)
    half = dataclasses.replace(ALIGN, batch_size=5)
    ranks = [list(AlignBatches(records, store, model, half, 2, r).batches(3)) for r in range(2)]
    for whole, *parts in zip(one, *ranks, strict=True):
        assert sorted(of_images(whole)) == sorted(pair for part in parts for pair in of_images(part))


def of_images(batch: Batch) -> list[tuple[str, list[int]]]:
    """The images of a batch and the rows of their captions."""
    return [(name, batch.rows[batch.owner == n].tolist()) for n, name in enumerate(batch.names)]


@pytest.mark.parametrize("head_epochs", [0, 2])
def test_two_processes_align_as_one(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, head_epochs: int
) -> None:
    """Two ranks with half the batch each have the losses and end with the weights of one with the whole."""
    recipe = dataclasses.replace(ALIGN, epochs=2, lr=1e-3, save_steps=2, head_epochs=head_epochs, head_batch=14)
    distributed(2, _align_rank, records, str(store.folder), recipe, str(tmp_path / "two"))
    one = align(records, store, fresh_model("test_vit"), recipe, tmp_path / "one", SkipLog())
    losses = [[line["loss"] for line in read_metrics(tmp_path / f / "metrics.jsonl")] for f in ("one", "two")]
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    two = load_file(tmp_path / "two" / "trained.safetensors")
    for name, tensor in one.state_dict().items():
        assert torch.allclose(tensor, two[name], atol=1e-4), name


def _align_rank(records: list[Record], store: str, recipe: AlignConfig, folder: str) -> None:
    half = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2, head_batch=recipe.head_batch // 2)
    model = align(records, EmbeddingStore(store), fresh_model("test_vit"), half, Path(folder), SkipLog())
    if torch.distributed.get_rank() == 0:
        save_file(model.state_dict(), Path(folder) / "trained.safetensors")


def test_a_frozen_tower_learns_on_its_features(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """What is trained, what is not, that the loss is that of the model itself, and that the features are kept."""
    (tmp_path / "broken.png").write_text("no picture")
    broken = dataclasses.replace(records[0], image=FileImage(str(tmp_path / "broken.png")))
    recipe = dataclasses.replace(
        ALIGN,
        epochs=60,
        batch_size=15,
        lr=3e-3,
        warmup_ratio=0.0,
        tower_lr=0.0,
        cache_features=True,
        captions_per_image=0,
    )
    before = fresh_model("test_vit").state_dict()
    log = SkipLog(tmp_path / "skipped.jsonl", max_skipped=1.0)
    log.count_at_least(31)
    model = align([*records, broken], store, fresh_model("test_vit"), recipe, tmp_path / "run", log)
    assert "broken.png" in (tmp_path / "skipped.jsonl").read_text()
    for name, tensor in model.state_dict().items():
        still = name.startswith("tower.")
        assert torch.equal(tensor, before[name]) == still, name
    losses = [line["loss"] for line in read_metrics(tmp_path / "run/metrics.jsonl")]
    assert len(losses) == 60 * 2 and losses[-1] < 0.8 * losses[0]
    first = [records[int(i)] for i in epoch_permutation(30, recipe.seed, 0)[:15]]
    pixels = torch.stack([EvalTransform(model.tower.preprocess)(load_image(r.image)) for r in first])
    rows = np.concatenate([store.rows(r.texts) for r in first])  # all captions of each, in one step
    owner = torch.tensor([n for n, r in enumerate(first) for _ in r.texts])
    image, text, scale, _ = fresh_model("test_vit").eval()(pixels, torch.from_numpy(store.take(rows)))
    right = info_nce(image, text, scale, owner, torch.from_numpy(rows)).item()
    assert right == pytest.approx(losses[0], abs=2e-3)  # the features are kept in float16
    features = EmbeddingStore(next((tmp_path / "run").glob("features-*")))
    assert len(features) == 30 and features.width == model.tower.feature_dim


def test_other_data_or_another_batch_is_not_gone_on_with(
    records: list[Record], store: EmbeddingStore, llm: Path, tmp_path: Path
) -> None:
    """On more processes the steps would be fewer and bigger, and a run resumed past its end would count as done."""
    recipe = dataclasses.replace(ALIGN, epochs=1, save_steps=1)
    align(records, store, fresh_model(), recipe, tmp_path / "a", SkipLog())
    with pytest.raises(ValueError, match="images in a step: 10 there, 20 now"):
        align(records, store, fresh_model(), dataclasses.replace(recipe, batch_size=20), tmp_path / "a", SkipLog())
    with pytest.raises(ValueError, match=r"images: .* there"):
        align(records[::-1], store, fresh_model(), recipe, tmp_path / "a", SkipLog())
    with pytest.raises(ValueError, match=r"--align.lr: 0.001 there, 0.1 now"):
        align(records, store, fresh_model(), dataclasses.replace(recipe, lr=0.1), tmp_path / "a", SkipLog())
    other = CaptionEncoder.from_pretrained(make_llm(tmp_path / "other", seed=1), device="cpu")
    again = embed([t for r in records for t in r.texts], other, tmp_path / "other store")
    with pytest.raises(ValueError, match=r"caption encoder: .* there"):
        align(records, again, fresh_model(), recipe, tmp_path / "a", SkipLog())
    shutil.rmtree(tune([CAPTIONS], CaptionEncoder.from_pretrained(llm, device="cpu"), TUNE, tmp_path))
    with pytest.raises(ValueError, match=r"captions: .* there"):
        tune([CAPTIONS[::-1]], CaptionEncoder.from_pretrained(llm, device="cpu"), TUNE, tmp_path)


def test_stages_have_precisions_of_their_own(
    records: list[Record], store: EmbeddingStore, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accelerate keeps one precision a process, and a launcher's in the environment: neither may reach a stage."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    plain = dataclasses.replace(TUNE, steps=1)
    tune([CAPTIONS], CaptionEncoder.from_pretrained(llm, device="cpu"), plain, tmp_path / "tune")
    assert AcceleratorState().mixed_precision == "no"
    half = dataclasses.replace(ALIGN, precision="bf16", epochs=1)
    align(records, store, fresh_model(), half, tmp_path / "align", SkipLog())
    assert AcceleratorState().mixed_precision == "bf16"


@pytest.mark.parametrize("stage", ["tune", "align"])
def test_gradients_that_are_not_finite_stop_before_the_weights_are(
    records: list[Record], store: EmbeddingStore, llm: Path, tmp_path: Path, stage: str
) -> None:
    """The loss of a step is finite while its gradients are not; the next checkpoint would be called good."""
    poison = torch.nn.Parameter.register_hook
    if stage == "tune":
        encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
        poison(list(encoder.llm.parameters())[-1], lambda g: g * torch.inf)
        with pytest.raises(FloatingPointError, match="grad_norm is"):
            tune([CAPTIONS], encoder, dataclasses.replace(TUNE, lora_r=0), tmp_path)
    else:
        model = fresh_model()
        poison(model.projection.weight, lambda g: g * torch.inf)
        with pytest.raises(FloatingPointError, match="gradients' norm is"):
            align(records, store, model, ALIGN, tmp_path, SkipLog())
    assert not list((tmp_path / "checkpoints").glob("*/complete"))


def test_align_is_adamw_written_out(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """Six steps by hand: rates by part, warm-up and cosine, gradients clipped, decay of matrices alone."""
    recipe = dataclasses.replace(
        ALIGN, epochs=2, lr=3e-3, projection_lr=2e-3, scale_lr=1e-2, tower_lr=1e-3, layer_decay=1.0, warmup_ratio=0.34,
        weight_decay=0.3, max_grad_norm=0.5,
    )  # fmt: skip
    trained = align(records, store, fresh_model("test_vit"), recipe, tmp_path / "run", SkipLog(max_skipped=1.0))
    log = list(read_metrics(tmp_path / "run/metrics.jsonl"))

    model = fresh_model("test_vit").train()
    rates = {"tower": 1e-3, "projection": 2e-3, "adapter": 3e-3, "logit_scale": 1e-2}
    moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    factors = [1 / 2, 1, 1, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5]  # two of six steps up, four down
    norms = []
    for n, (batch, factor) in enumerate(
        zip(AlignBatches(records, store, model, recipe).batches(0), factors, strict=True)
    ):
        texts = torch.from_numpy(store.take(batch.rows))
        image, text, scale, _ = model(pixels=batch.images, embeddings=texts)
        loss = info_nce(image, text, scale, torch.from_numpy(batch.owner), torch.from_numpy(batch.rows))
        learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [p for _, p in learning], allow_unused=True)
        norms.append(sum(float(g.square().sum()) for g in gradients if g is not None) ** 0.5)
        line = {"loss": loss.item(), "grad_norm": norms[-1], "scale": scale.item(), "lr": 3e-3 * factor}
        assert {name: log[n][name] for name in line} == pytest.approx(line, rel=1e-3)
        for (name, p), gradient in zip(learning, gradients, strict=True):
            if gradient is None:
                continue
            rate, (mean, square) = rates[name.partition(".")[0]] * factor, moments[name]
            gradient = gradient * min(1.0, 0.5 / norms[-1])
            mean.lerp_(gradient, 0.1)
            square.lerp_(gradient**2, 0.001)
            p.data -= rate * (0.3 if p.ndim > 1 else 0.0) * p.data
            p.data -= rate * (mean / (1 - 0.9 ** (n + 1))) / ((square / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8)
    assert max(norms) > 0.5, "nothing was clipped"
    for name, p in trained.state_dict().items():
        torch.testing.assert_close(p, model.state_dict()[name], atol=2e-4, rtol=1e-3, msg=lambda m, name=name: name + m)


def test_short_and_long_captions_are_drawn_by_their_share(records: list[Record], store: EmbeddingStore) -> None:
    for share in (0.0, 1.0, 0.3):
        recipe = dataclasses.replace(ALIGN, caption_mix={"captions": 1 - share, "long_captions": share})
        steps = AlignBatches(records, store, fresh_model(), recipe)
        short, long = steps.by_kind
        drawn = {(e, i): steps.rows(e, i) for e in range(20) for i in range(len(records))}
        are_long = [row in long[i] for (_, i), rows in drawn.items() for row in rows[:1]]
        assert np.mean(are_long) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)
        for (_, i), rows in drawn.items():
            assert len(rows) == len(set(rows)) and set(rows) <= {*short[i], *long[i]}
            if share == 0.0:  # of two or three short captions no more than there are
                assert set(rows) == set(short[i].tolist())
    for mix, wanted in (({"captions": 1}, 0), ({"long_captions": 2}, 1)):  # all captions of the kinds that count
        steps = AlignBatches(
            records, store, fresh_model(), dataclasses.replace(ALIGN, captions_per_image=0, caption_mix=mix)
        )
        assert sorted(steps.rows(3, 7)) == sorted(steps.by_kind[wanted][7])
    none = dataclasses.replace(ALIGN, caption_mix={"short_captions": 1})  # which no image has: then all that they have
    steps = AlignBatches(records, store, fresh_model(), none)
    assert {row in steps.by_kind[0][2] for e in range(9) for row in steps.rows(e, 2)} == {True, False}
    with pytest.raises(ValueError, match="mix knows the kinds"):
        AlignBatches(records, store, fresh_model(), dataclasses.replace(ALIGN, caption_mix={"dense": 1}))


def test_each_image_comes_once_an_epoch_whatever_the_devices(records: list[Record], store: EmbeddingStore) -> None:
    """Two batches a step on two devices, 28 of 30 images an epoch: the devices' parts are those of one device."""
    recipe = dataclasses.replace(ALIGN, epochs=3, batch_size=7, accumulate=2)
    alone = dataclasses.replace(recipe, batch_size=14)
    one = [m for part in AlignBatches(records, store, fresh_model(), alone).members(0) for m in part]
    steps = [AlignBatches(records, store, fresh_model(), recipe, world=2, rank=rank) for rank in (0, 1)]
    assert len(steps[0]) == 3 and steps[0].step_size == 28
    parts = [list(some.members(0)) for some in steps]
    assert [len(part) for some in parts for part in some] == [7] * 12
    both = [m for left, right in zip(*parts, strict=True) for pair in zip(left, right, strict=True) for m in pair]
    assert both == one
    for epoch in range(3):
        seen = [image for e, image in both if e == epoch]
        assert len(seen) == len(set(seen)) == 28 and set(seen) < set(range(30))
    assert list(steps[1].members(2)) == parts[1][4:], "from any step on"


def test_an_undecodable_image_is_replaced_counted_and_listed(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes(Path(str(records[0].image)).read_bytes()[:300])
    broken = next(iter(open_records({"path": str(_one_row(cut, records[0]))}, image_check="exists")))
    log = SkipLog(tmp_path / "skipped.jsonl", max_skipped=0.5)
    log.count_at_least(len(records))
    align([broken, *records[1:]], store, fresh_model(), ALIGN, tmp_path / "run", log)
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [e["reason"] for e in listed] == ["undecodable image"] and "cut.png" in listed[0]["file"]
    strict = SkipLog(max_skipped=0.0)
    strict.count_at_least(len(records))
    with pytest.raises(TooManySkipped):
        align([broken, *records[1:]], store, fresh_model(), ALIGN, tmp_path / "strict", strict)


def _one_row(image: Path, record: Record) -> Path:
    file = image.with_name("one.jsonl")
    file.write_text(json.dumps({"image": str(image), "captions": list(record.captions)}) + "\n")
    return file


def test_rates_by_part() -> None:
    recipe = AlignConfig(
        lr=1e-2, projection_lr=5e-3, tower_lr=1e-3, scale_lr=1e-4, layer_decay=0.5, weight_decay=0.1, loss="sigmoid"
    )
    model = fresh_model(logit_bias=True)
    set_trainable(model, recipe)
    of = {id(p): g for g in parameter_groups(model, recipe) for p in g["params"]}
    assert len(of) == sum(1 for _ in model.parameters())
    assert of[id(model.projection.weight)]["lr"] == 5e-3 and of[id(model.adapter.out.weight)]["lr"] == 1e-2
    assert of[id(model.adapter.out.bias)]["weight_decay"] == 0
    assert of[id(model.adapter.out.weight)]["weight_decay"] == 0.1
    for number in (model.logit_scale, model.logit_bias):
        assert of[id(number)]["lr"] == 1e-4 and of[id(number)]["weight_decay"] == 0
    depth = model.tower.parameter_depths()
    for name, p in model.tower.named_parameters():
        assert of[id(p)]["lr"] == pytest.approx(1e-3 * 0.5 ** (model.tower.num_layers - 1 - depth[name]))
    set_trainable(model, dataclasses.replace(recipe, tower_lr=0.0))
    assert not any(p.requires_grad for p in model.tower.parameters())


def test_only_the_last_blocks_learn() -> None:
    model = fresh_model("test_vit")
    set_trainable(model, dataclasses.replace(ALIGN, train_layers=2))
    trained = {name for name, p in model.tower.named_parameters() if p.requires_grad}
    blocks = {name.split(".")[2] for name in trained if ".blocks." in name}
    assert blocks == {"4", "5"}
    assert not any("patch_embed" in name or "pos_embed" in name for name in trained)
    assert any(".blocks." not in name for name in trained)  # the norm after them


def test_a_loss_that_is_not_finite_stops_the_run(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.info_nce, iter(range(99))
    monkeypatch.setattr(loop, "info_nce", lambda *a: real(*a) * (math.nan if next(calls) == 6 else 1))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 7, of the images .*png") as error:
        align(records, store, fresh_model(), ALIGN, tmp_path, SkipLog())
    assert str(tmp_path / "checkpoints/step-5") in str(error.value)
    listed = json.loads(next(tmp_path.glob("not-finite-7-*.json")).read_text())
    assert len(listed["images"]) == ALIGN.batch and all(name.endswith(".png") for name in listed["images"])


def test_schedule_checkpoints_and_log(tmp_path: Path) -> None:
    factor = cosine_schedule(100, 0.1)
    assert [factor(0), factor(9), factor(10)] == pytest.approx([0.1, 1.0, 1.0])
    assert factor(55) == pytest.approx(0.5) and factor(100) == pytest.approx(0.0)
    for n in (5, 10, 15):
        (tmp_path / f"step-{n}").mkdir()
    mark_complete(tmp_path / "step-5", {"steps": 20})
    mark_complete(tmp_path / "step-10", {"steps": 20})
    assert latest_checkpoint(tmp_path) == tmp_path / "step-10"
    assert validate_resume(tmp_path / "step-10", {"steps": 20}) == tmp_path / "step-10"
    with pytest.raises(ValueError, match="steps: 20 there, 5 now"):
        validate_resume(tmp_path / "step-10", {"steps": 5})
    assert not (tmp_path / "step-15").exists()
    log = MetricsLog(tmp_path / "m.jsonl")
    for n in range(1, 5):
        log.write(n, loss=float(n))
    with log.path.open("a") as f:
        f.write('{"step": 5, "lo')  # cut off by a kill
    MetricsLog(tmp_path / "m.jsonl", resume_step=3).write(4, loss=0.0)
    assert [line["loss"] for line in read_metrics(tmp_path / "m.jsonl")] == [1.0, 2.0, 3.0, 0.0]
