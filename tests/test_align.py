"""What align can do beyond its plain loop: large batches, shared weights, which part learns, evaluation on the way."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from conftest import Killed, distributed, share_out
from format_fixtures import write_tar
from llm2clip.checkpoint import read_metrics
from llm2clip.config import AlignConfig
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog
from llm2clip.evaluate.embeddings import ModelEmbeddings
from llm2clip.evaluate.retrieval_eval import dual_encoder_from_store, make_validator
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.llm2clip import LLM2CLIP, MAX_LOGIT_SCALE, LLM2CLIPConfig
from llm2clip.models.vision_tower import VisionTower
from llm2clip.store.encode import embed
from llm2clip.store.layout import StoreError
from llm2clip.store.lock import folder_lock
from llm2clip.store.store import EmbeddingStore
from llm2clip.train.align import align
from llm2clip.train.align_data import AlignBatches
from llm2clip.train.ema import Ema

ALIGN = AlignConfig(
    embed_dim=12,
    epochs=2,
    batch_size=10,
    save_steps=2,
    workers=0,
    image_size=64,
    eval_steps=0,
    report_to=[],
    captions_per_image=2,
)


@pytest.fixture(scope="module")
def records(pictures: Path) -> list[Record]:
    return [r for r in open_records(pictures / "captions.jsonl") if r.split == "train"]


@pytest.fixture(scope="module")
def store(pictures: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    encoder = CaptionEncoder.from_pretrained(llm, device="cpu")
    texts = [t for r in open_records(pictures / "captions.jsonl") for t in r.texts]
    return embed(texts, encoder, tmp_path_factory.mktemp("store") / "store")


def fresh_model(recipe: AlignConfig = ALIGN, tower: str = "test_vit", **options: Any) -> LLM2CLIP:
    torch.manual_seed(0)
    vision = VisionTower.from_pretrained(f"timm:{tower}", pretrained=False, image_size=64)
    for module in vision.backbone.modules():  # chance in the forward pass, too
        if isinstance(module, nn.Dropout):
            module.p = options.get("dropout", 0.0)
    config = LLM2CLIPConfig(
        vision.config,
        32,
        embed_dim=32 if recipe.adapter == "none" else 12,
        adapter=recipe.adapter,
        adapter_depth=1,
        projection=recipe.projection,
        logit_bias=recipe.loss == "sigmoid",
    )
    return LLM2CLIP(config, vision)


def trained(
    records: list[Record],
    store: EmbeddingStore,
    folder: Path,
    recipe: AlignConfig,
    validate: Any = None,
    **options: Any,
) -> LLM2CLIP:
    return align(records, store, fresh_model(recipe, **options), recipe, folder, SkipLog(max_skipped=1.0), validate)


def agreement(records: list[Record], store: EmbeddingStore) -> Any:
    """Evaluates to the mean similarity of images and their first captions: a figure without jumps."""

    def measure(model: LLM2CLIP) -> dict[str, float]:
        assert not model.training
        vectors = ModelEmbeddings(dual_encoder_from_store(model, store), SkipLog(max_skipped=1.0), progress=False)
        images, kept = vectors.images([r.image for r in records if r.image is not None])
        texts = vectors.texts([records[i].captions[0] for i in kept])
        return {"score": float((images * texts).sum(-1).mean())}

    return measure


def same_run(one: LLM2CLIP, two: dict[str, torch.Tensor], a: Path, b: Path, atol: float = 1e-5) -> None:
    """The same losses on the way and the same weights at the end."""
    one_log, two_log = (read_metrics(f / "metrics.jsonl") for f in (a, b))
    for key, close in (
        ("loss", {"abs": atol}),
        ("grad_norm", {"rel": 100 * atol}),
    ):  # clipping hides a factor, norms do not
        assert one_log and [line[key] for line in one_log] == pytest.approx([line[key] for line in two_log], **close)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, two[name], atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("change", [{}, {"loss": "sigmoid"}, {"captions": 0}, {"recompute": True}, {"lora_r": 2}])
def test_a_batch_in_parts_has_the_gradients_of_the_batch_in_one(
    records: list[Record],
    store: EmbeddingStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
) -> None:
    """Gradient caching: parts of 4, 4 and 2 of a batch of 10."""
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, *_: found.append([p.grad.clone() for g in self.param_groups for p in g["params"]]),
    )
    for parts in (None, 4):
        trained(
            records,
            store,
            tmp_path / str(parts),
            dataclasses.replace(ALIGN, micro_batch_size=parts, epochs=1, **change),
        )
    assert len(found) == 2 * 3
    for one, two in zip(found[:3], found[3:], strict=True):
        assert sum(g.norm().item() > 0 for g in one) > len(one) / 2
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6 * max(1, a.abs().max().item()), rtol=1e-5)


def test_parts_have_the_same_dropout_both_times(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tower that drops: what goes backward is what went forward, part by part."""
    seen: list[torch.Tensor] = []
    forward = VisionTower.forward

    def watched(self: VisionTower, pixels: torch.Tensor) -> torch.Tensor:
        seen.append(forward(self, pixels))
        return seen[-1]

    monkeypatch.setattr(VisionTower, "forward", watched)
    trained(records, store, tmp_path, dataclasses.replace(ALIGN, micro_batch_size=5, epochs=1), dropout=0.3)
    assert len(seen) == 3 * 2 * 2
    for n in range(0, len(seen), 4):
        assert torch.equal(seen[n], seen[n + 2]) and torch.equal(seen[n + 1], seen[n + 3])
        assert seen[n + 2].requires_grad and not seen[n].requires_grad


def test_accumulated_batches_are_a_batch(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """Where there are no negatives, two batches of 5 are one of 10: the cosine loss."""
    whole = dataclasses.replace(ALIGN, loss="cosine", adapter="none")
    parts = dataclasses.replace(whole, batch_size=5, accumulate=2)
    one, two = (trained(records, store, tmp_path / str(r.accumulate), r) for r in (whole, parts))
    same_run(one, two.state_dict(), tmp_path / "1", tmp_path / "2")
    assert one.logit_scale.item() == fresh_model(whole).logit_scale.item()


WAYS = [
    {"micro_batch": 2},
    {"loss": "sigmoid", "accumulate": 2, "batch": 4},
    {"tower_lr": 0.0, "cache_features": True, "captions": 0, "adapter": "glu", "projection": "glu"},
    {"lora_r": 2, "ema": 0.9},
]


@pytest.mark.parametrize("change", WAYS)
def test_processes_align_as_one(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    recipe = dataclasses.replace(ALIGN, **change)
    _as_one(records, store, tmp_path, recipe, fsdp=False)


@pytest.mark.parametrize("change", [{"micro_batch": 2, "head_epochs": 1, "head_batch": 10}, {"lora_r": 2, "ema": 0.9}])
def test_weights_shared_out_over_processes_align_as_one(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, change: dict[str, Any]
) -> None:
    """FSDP2, killed in the middle and gone on with."""
    _as_one(records, store, tmp_path, dataclasses.replace(ALIGN, **change), fsdp=True)


def _as_one(records: list[Record], store: EmbeddingStore, folder: Path, recipe: AlignConfig, fsdp: bool) -> None:
    recipe = dataclasses.replace(recipe, eval_steps=2, load_best_at_end="best")
    distributed(2, _rank, records, str(store.folder), recipe, str(folder / "two"), fsdp)
    one = trained(records, store, folder / "one", recipe, agreement(records, store))
    same_run(one, load_file(folder / "two" / "trained.safetensors"), folder / "one", folder / "two", atol=1e-4)
    scores = [[line["score"] for line in read_metrics(folder / f / "evaluations.jsonl")] for f in ("one", "two")]
    assert len(scores[0]) == 3 and scores[0] == pytest.approx(scores[1], abs=1e-4)


def _rank(records: list[Record], store: str, recipe: AlignConfig, folder: str, fsdp: bool) -> None:
    half = dataclasses.replace(recipe, batch_size=recipe.batch_size // 2, head_batch=recipe.head_batch // 2)
    validate = agreement(records, EmbeddingStore(store))
    if fsdp:
        share_out()
        whole = AlignBatches.batches

        def dies(self: AlignBatches, first: int) -> Any:
            for n, batch in enumerate(whole(self, first), start=first):
                if n == 5:
                    raise Killed
                yield batch

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(AlignBatches, "batches", dies)
            trained(records, EmbeddingStore(store), Path(folder), half, validate)
    model = trained(records, EmbeddingStore(store), Path(folder), half, validate)
    if torch.distributed.get_rank() == 0:
        save_file(model.state_dict(), Path(folder) / "trained.safetensors")
    torch.distributed.barrier()


def test_pictures_that_any_process_cannot_read_are_listed(
    records: list[Record], store: EmbeddingStore, tmp_path: Path
) -> None:
    broken = {n: tmp_path / f"{n}.png" for n in range(0, len(records), 5)}
    for n, file in broken.items():
        file.write_bytes(Path(str(records[n].image)).read_bytes()[:300])
    some = [
        dataclasses.replace(r, image=FileImage(str(broken[n]))) if n in broken else r for n, r in enumerate(records)
    ]
    distributed(2, _listing_rank, some, str(store.folder), str(tmp_path))
    listed = [json.loads(line)["file"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(listed) == sorted(map(str, broken.values()))


def _listing_rank(records: list[Record], store: str, folder: str) -> None:
    log = SkipLog(Path(folder) / "skipped.jsonl" if torch.distributed.get_rank() == 0 else None, max_skipped=0.5)
    log.count_at_least(len(records))
    half = dataclasses.replace(ALIGN, batch_size=ALIGN.batch // 2)
    align(records, EmbeddingStore(store), fresh_model(), half, Path(folder) / "run", log)
    assert log.skipped["undecodable image"] == len(range(0, len(records), 5)), "all processes judge alike"


def test_the_running_mean_of_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    ema, right = Ema(model, 0.8), model.weight.detach().double().clone()
    for step in range(1, 30):
        model.weight.data.add_(torch.randn(2, 3))
        ema.update(step)
        decay = min(0.8, (1 + step) / (10 + step))
        right = decay * right + (1 - decay) * model.weight.detach().double()
    last = model.weight.detach().clone()
    with ema.instead():
        torch.testing.assert_close(model.weight.detach().double(), right, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.weight, last) and list(ema.mean) == ["weight"]


@pytest.mark.parametrize("change", [{"ema": 0.9}, {"lora_r": 2, "keep": "best"}, {"accumulate": 2, "micro_batch": 3}])
def test_goes_on_exactly(
    records: list[Record], store: EmbeddingStore, pictures: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Killed in the middle of an epoch: the same lines in every log, the same evaluations, the same bytes."""
    recipe = dataclasses.replace(ALIGN, **{"epochs": 3, "batch": 6, "evaluate_every": 2, **change})
    held_out = {"captions": [r for r in open_records(pictures / "captions.jsonl") if r.split == "val"]}

    def run(folder: Path) -> LLM2CLIP:
        validate = make_validator(held_out, SkipLog(max_skipped=1.0), store)
        return align(records, store, fresh_model(recipe), recipe, folder, SkipLog(max_skipped=1.0), validate)

    whole, batches = run(tmp_path / "whole"), AlignBatches.batches

    def dies(self: AlignBatches, first: int) -> Any:
        for n, batch in enumerate(batches(self, first)):
            if n == 5 * recipe.accumulate:
                raise Killed
            yield batch

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AlignBatches, "batches", dies)
        run(tmp_path / "cut")
    again = run(tmp_path / "cut")
    for (name, a), b in zip(whole.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    for log in ("metrics", "evaluations"):
        one, two = (read_metrics(tmp_path / f / f"{log}.jsonl") for f in ("whole", "cut"))
        kept = [{k: v for k, v in line.items() if k not in ("images_per_second", "waited")} for line in one]
        assert kept == [{k: v for k, v in line.items() if k not in ("images_per_second", "waited")} for line in two]
        assert [line["step"] for line in one][-1] == len(read_metrics(tmp_path / "whole/metrics.jsonl"))


def test_the_best_weights_are_kept(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """A score that falls after the second evaluation: the best are those of step 4, the result is what `keep` says."""
    weights: dict[int, torch.Tensor] = {}

    def run(keep: Any) -> LLM2CLIP:
        weights.clear()

        def validate(model: LLM2CLIP) -> dict[str, float]:
            assert not model.training
            weights[len(weights)] = model.projection.weight.detach().clone()
            return {"score": [1.0, 5.0, 3.0][len(weights) - 1]}

        recipe = dataclasses.replace(ALIGN, eval_steps=2, load_best_at_end=keep, ema=0.5)
        return align(records, store, fresh_model(), recipe, tmp_path / keep, SkipLog(max_skipped=1.0), validate)

    last, best = run("last"), run("best")
    assert json.loads((tmp_path / "best/best/figures.json").read_text()) == {"step": 4, "score": 5.0}
    assert torch.equal(best.projection.weight, weights[1]) and torch.equal(last.projection.weight, weights[2])
    assert torch.equal(load_file(tmp_path / "last/best/model.safetensors")["projection.weight"], weights[1])


def test_lora_is_merged_and_changes_nothing_else(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    model = trained(records, store, tmp_path, dataclasses.replace(ALIGN, lora_r=2, tower_lr=1e-2))
    before, after = fresh_model().state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if name.startswith("tower.") and not torch.equal(before[name], after[name])}
    assert changed == {f"tower.backbone.blocks.{n}.{part}.weight" for n in range(6) for part in LINEAR}
    for name in changed:
        assert torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5) <= 2


LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_scale_stays_below_its_limit(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, precision: Any
) -> None:
    """From beyond it, in the forward pass and in the parameter, whose gradient would vanish there for good."""
    recipe = dataclasses.replace(ALIGN, precision=precision, epochs=3, lr=1e-4, scale_lr=0.5)
    model = fresh_model()
    model.logit_scale.data.fill_(9.0)
    align(records, store, model, recipe, tmp_path, SkipLog())
    scales = [line["scale"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert scales[0] == pytest.approx(MAX_LOGIT_SCALE) and max(scales) <= MAX_LOGIT_SCALE * (1 + 1e-6)
    assert scales[-1] < MAX_LOGIT_SCALE / 2 and model.logit_scale.item() < math.log(MAX_LOGIT_SCALE)


def test_trackers_by_name(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = dataclasses.replace(ALIGN, report_to=["tensorboard"])
    trained(records, store, tmp_path, recipe)
    events = EventAccumulator(str(next((tmp_path / "logs").rglob("events*")).parent)).Reload()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [e.step for e in events.Scalars("loss")] == [line["step"] for line in lines]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([line["loss"] for line in lines])
    with pytest.raises(ValueError, match="knows tensorboard, wandb, trackio, not 'paper'"):
        trained(records, store, tmp_path / "a", dataclasses.replace(ALIGN, report_to=["paper"]))
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        trained(records, store, tmp_path / "b", dataclasses.replace(ALIGN, report_to=["wandb"]))


def test_a_part_of_an_epoch(records: list[Record], store: EmbeddingStore) -> None:
    assert [
        len(AlignBatches(records, store, fresh_model(), dataclasses.replace(ALIGN, epochs=e))) for e in (0.5, 1, 2.3)
    ] == [*(2, 3, 7)]


def test_compiled_is_the_same(
    records: list[Record], store: EmbeddingStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, compile_ = [], nn.Module.compile

    def watched(self: nn.Module, *_: Any, **__: Any) -> None:  # inductor takes half a minute here
        compiled.append(self)
        compile_(self, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", watched)
    one, two = (
        trained(records, store, tmp_path / str(c), dataclasses.replace(ALIGN, compile=c)) for c in (False, True)
    )
    assert len(compiled) == 1
    same_run(one, two.state_dict(), tmp_path / "False", tmp_path / "True", atol=1e-4)


def test_augmented_pictures_depend_on_seed_and_step_alone(records: list[Record], store: EmbeddingStore) -> None:
    plain = next(AlignBatches(records, store, fresh_model(), ALIGN).batches(0)).images
    for augment in ("color", "randaugment", "trivialaugment"):
        recipe: Any = dataclasses.replace(ALIGN, augment=augment)
        one, two = (AlignBatches(records, store, fresh_model(), recipe) for _ in range(2))
        torch.manual_seed(1)
        seen = next(one.batches(0)).images
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert torch.equal(seen, next(two.batches(0)).images)
        assert torch.equal(before, torch.get_rng_state())  # torchvision draws from it
        assert not torch.equal(seen, plain) and seen.dtype == torch.uint8


def test_tars_are_shuffled_whole_and_gone_on_with(
    records: list[Record], store: EmbeddingStore, pictures: Path, tmp_path: Path
) -> None:
    """Two tars of what the folder has: the same batches as from the files, mixing both, from any step."""
    for n, half in enumerate((records[:15], records[15:])):
        members = []
        for record in half:
            key = f"{int(record.id):03d}"
            members.append((f"{key}.png", Path(str(record.image)).read_bytes()))
            texts = {"captions": record.captions, "long_captions": record.long_captions}
            members.append((f"{key}.json", json.dumps(texts).encode()))
        write_tar(tmp_path / f"shard-{n}.tar", members)
    packed = list(open_records(str(tmp_path / "shard-{0..1}.tar")))
    assert len(packed) == 30
    model = fresh_model()
    for first in (0, 4):
        ours = AlignBatches(packed, store, model, dataclasses.replace(ALIGN, workers=1)).batches(first)
        theirs = AlignBatches(records, store, model, ALIGN).batches(first)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a.images, b.images) and np.array_equal(a.rows, b.rows)
            assert len({name.split("!")[0] for name in a.names}) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": "cosine"}, "needs texts that stay"),
        ({"lora_r": 2, "tower_lr": 0.0}, "lora_r is for the tower"),
        ({"cache_features": True}, "needs --align.tower_lr 0"),
        ({"keep": "best", "evaluate_every": 0}, "needs evaluations"),
        ({"epochs": 0}, "epochs is above 0"),
        ({"ema": 1.0}, "ema is a share"),
        ({"crop": 3.0}, "crop is a share"),
        ({"micro_batch": 0}, "micro_batch is 1 or more"),
        ({"train_layers": 1, "tower_lr": 0.0}, "needs --align.tower_lr"),
        ({"captions": -1}, "captions is 0 or more"),
    ],
)
def test_wrong_settings_show_at_once(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(ALIGN, **change)


def test_wrong_settings_for_what_is_there(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name some with --held_out"):
        trained(records, store, tmp_path / "a", dataclasses.replace(ALIGN, load_best_at_end="best", eval_steps=None))
    with pytest.raises(ValueError, match="fp16 is for GPUs"):
        trained(records, store, tmp_path / "b", dataclasses.replace(ALIGN, precision="fp16"))
    with pytest.raises(ValueError, match="train_layers finds no blocks"):
        trained(records, store, tmp_path / "c", dataclasses.replace(ALIGN, train_layers=1), tower="vgg11")
    with pytest.raises(ValueError, match="cannot recompute activations of vgg11"):
        trained(records, store, tmp_path / "d", dataclasses.replace(ALIGN, gradient_checkpointing=True), tower="vgg11")
    with folder_lock(tmp_path), pytest.raises(StoreError, match="another run"):
        trained(records, store, tmp_path, ALIGN)


def test_heads_of_other_settings_are_trained_anew(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """Killed once the heads are done; the settings are mended, which only a checkpoint of the rest would forbid."""
    recipe = dataclasses.replace(ALIGN, head_epochs=2, head_batch=15, lr=1e-2)
    for lr in (1e-2, 1e-2, 1e-4):
        heads = read_metrics(tmp_path / "heads/metrics.jsonl")
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(AlignBatches, "batches", _only_features)
            trained(records, store, tmp_path, dataclasses.replace(recipe, lr=lr))
        same = [line["loss"] for line in heads] == [
            line["loss"] for line in read_metrics(tmp_path / "heads/metrics.jsonl")
        ]
        assert same == (bool(heads) and lr == 1e-2)
    assert len(list(tmp_path.glob("features-*"))) == 1


_batches = AlignBatches.batches


def _only_features(self: AlignBatches, first: int) -> Any:
    if self.features is None:
        raise Killed
    return _batches(self, first)


def test_best_weights_of_another_run_are_no_ones(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    """Killed after an evaluation and before a checkpoint: what it kept is of steps that are done again."""
    recipe = dataclasses.replace(ALIGN, eval_steps=1, load_best_at_end="best", save_steps=100)
    scores = iter([9.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])

    def validate(model: LLM2CLIP) -> dict[str, float]:
        return {"score": next(scores)}

    def dies(self: AlignBatches, first: int) -> Any:
        yield next(_batches(self, first))
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(AlignBatches, "batches", dies)
        align(records, store, fresh_model(), recipe, tmp_path, SkipLog(max_skipped=1.0), validate)
    assert json.loads((tmp_path / "best/figures.json").read_text())["score"] == 9.0
    align(records, store, fresh_model(), recipe, tmp_path, SkipLog(max_skipped=1.0), validate)
    assert json.loads((tmp_path / "best/figures.json").read_text()) == {"step": 2, "score": 2.0}


def test_checkpoints_hold_what_is_trained(records: list[Record], store: EmbeddingStore, tmp_path: Path) -> None:
    recipe = dataclasses.replace(ALIGN, tower_lr=0.0, cache_features=True)
    trained(records, store, tmp_path, recipe)
    names = load_file(tmp_path / "checkpoints/step-6/model.safetensors").keys()
    assert names and not any(name.startswith("tower.backbone") for name in names)
