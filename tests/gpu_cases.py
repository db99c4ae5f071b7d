"""Tests of the code for GPUs, on the pretended GPU of pretended_gpu. `test_pretended_gpu.py` runs them.

The tests compare counts between small and large inputs, instead of expecting fixed counts: a synchronisation per step
costs microseconds, but a synchronisation per image or caption makes the GPU wait for the host.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import pretended_gpu
from align_fixtures import ALIGN, make_store, read_split
from conftest import CAPTIONS, make_llm, make_tower
from llava_fixtures import build_tiny_llava, make_conversations
from llm2clip.cli import main
from llm2clip.config import TuneConfig
from llm2clip.data.pairs import ImageCaptions
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate import metrics
from llm2clip.llava import LlavaConfig
from llm2clip.llava.train import train_llava
from llm2clip.models.dual_encoder import DualEncoder, wrap_llm2clip
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.search.sqlite_backend import SqliteBackend
from llm2clip.store.store import EmbeddingStore
from llm2clip.train import align as align_module
from llm2clip.train import optim
from llm2clip.train.align import align
from llm2clip.train.initial_model import create_initial_model
from llm2clip.train.tune import tune
from pretended_gpu import Counts
from search_fixtures import create_patient_app, make_index

TUNE = TuneConfig(batch_size=4, save_steps=1000, precision="bf16")
CountSteps = Callable[..., Counts]


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random vision transformer with two blocks, as a timm checkpoint folder."""
    return make_tower(tmp_path_factory.mktemp("vit"), "test_vit", depth=2)


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random decoder LLM with two layers, as a folder."""
    return make_llm(tmp_path_factory.mktemp("llm"), layers=2)


@pytest.fixture(autouse=True)
def few_bootstrap_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the pretended GPU, each operation on the CPU is slow as well."""
    few = partial(metrics.draw_bootstrap_counts, num_resamples=20)
    monkeypatch.setattr(metrics, "draw_bootstrap_counts", few)


@pytest.fixture(scope="session")
def few_images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of eight images for training and of three held-out images."""
    rows = [json.loads(line) for line in (image_folder / "captions.jsonl").read_text().splitlines()]
    selected = [row for row in rows if row["split"] == "train"][:8] + [row for row in rows if row["split"] == "val"][:3]
    file = tmp_path_factory.mktemp("few") / "captions.jsonl"
    file.write_text("".join(json.dumps({**row, "image": str(image_folder / row["image"])}) + "\n" for row in selected))
    return file


@pytest.fixture(scope="session")
def store(image_folder: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingStore:
    return make_store(image_folder, llm, tmp_path_factory.mktemp("embedded") / "store")


@pytest.fixture(scope="session")
def align_step(
    image_folder: Path, store: EmbeddingStore, vit: Path, tmp_path_factory: pytest.TempPathFactory
) -> CountSteps:
    """Return a function that counts the events of one `align` step with the given settings."""
    records = RecordTable.from_records(read_split(image_folder))

    def count_step(**settings: Any) -> Counts:
        config = dataclasses.replace(ALIGN, tower=str(vit), precision="bf16", save_steps=1000, **settings)
        config = dataclasses.replace(config, epochs=3 / (len(records) // config.batch_size))
        model = create_initial_model(config, store)
        return third_step(lambda: align(records, store, model, config, tmp_path_factory.mktemp("align"), SkipLog()))

    return memoize(count_step)


@pytest.fixture(scope="session")
def tune_step(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> CountSteps:
    """Return a function that counts the events of one `tune` step with the given captions and settings."""

    def count_step(captions: Sequence[ImageCaptions] = CAPTIONS, **settings: Any) -> Counts:
        config = dataclasses.replace(TUNE, steps=3, **settings)
        encoder = CaptionEncoder.from_pretrained(llm)
        return third_step(lambda: tune([captions], encoder, config, tmp_path_factory.mktemp("tune")))

    return memoize(count_step)


def memoize(count_step: CountSteps) -> CountSteps:
    """Train only once for each combination of arguments."""
    results: dict[str, Counts] = {}

    def count_once(*args: Any, **settings: Any) -> Counts:
        key = repr((args, sorted(settings.items())))
        if key not in results:
            results[key] = count_step(*args, **settings)
        return results[key]

    return count_once


def third_step(run: Callable[[], object]) -> Counts:
    """Return the events of a run between the second and the third step of the optimizer."""
    snapshots: list[Counts] = []
    with pretended_gpu.count() as counts:
        hook = register_optimizer_step_post_hook(lambda *_: snapshots.append(copy.deepcopy(counts)))
        try:
            run()
        finally:
            hook.remove()
    assert len(snapshots) == 3
    return snapshots[2] - snapshots[1]


def assert_no_more_syncs(large: Counts, small: Counts) -> None:
    assert small.syncs.total() > 0
    assert large.syncs.total() <= small.syncs.total(), large.syncs - small.syncs


def assert_no_more_kernels(large: Counts, small: Counts) -> None:
    assert small.kernels.total() > 0
    assert large.kernels.total() <= small.kernels.total(), large.kernels - small.kernels


# ---- the pretended GPU itself ---------------------------------------------------------------------------------------


def test_pretended_gpu_computes_the_values_of_the_cpu() -> None:
    layer = torch.nn.Linear(3, 2)
    inputs = torch.randn(4, 3)
    layer(inputs).sum().backward()
    assert layer.weight.grad is not None
    expected = layer(inputs), layer.weight.grad.clone()
    layer = layer.to("cuda")
    layer.zero_grad()
    output = layer(inputs.to("cuda"))
    output.sum().backward()
    assert output.device == torch.device("cuda", 0)
    torch.testing.assert_close(output.cpu(), expected[0])
    torch.testing.assert_close(layer.weight.grad.cpu(), expected[1])


def test_pretended_gpu_rejects_mixed_devices() -> None:
    on_gpu, on_cpu = torch.ones(2, device="cuda"), torch.ones(2)
    with pytest.raises(pretended_gpu.MixedDevicesError):
        on_gpu + on_cpu
    with pytest.raises(TypeError, match="to the host"):
        on_gpu.numpy()
    assert (on_gpu + torch.tensor(1.0)).tolist() == [2, 2]


def test_pretended_gpu_counts_synchronisations_and_copies() -> None:
    x = torch.arange(4, device="cuda")
    with pretended_gpu.count() as counts:
        x.sum().item()
        x[x > 1]
        x.cpu()
        torch.ones(2).to("cuda", non_blocking=True)
    causes = dict(counts.syncs.keys())
    assert set(causes) == {"_local_scalar_dense", "boolean mask", "copy to the host"}
    assert causes["boolean mask"].startswith("gpu_cases.py:")
    assert counts.copied_bytes == {"to the host": 32, "to the GPU": 8}


# ---- no mixed devices on any path, and the LLM in bf16 --------------------------------------------------------------


@pytest.fixture
def encoding_weights(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Return a list to which each call of `CaptionEncoder.encode` adds the devices and dtypes of the LLM's matrices."""
    calls: list[set[str]] = []
    encode = CaptionEncoder.encode

    def record(self: CaptionEncoder, *args: Any, **kwargs: Any) -> torch.Tensor:
        weights = (module.weight for module in self.llm.modules() if isinstance(module, torch.nn.Linear))
        calls.append({f"{weight.device.type} {weight.dtype}" for weight in weights})
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(CaptionEncoder, "encode", record)
    return calls


def assert_llm_is_in_bf16(calls: list[set[str]]) -> None:
    """Assert that encoding ran on the GPU in bf16. Only the choice of the precision uses fp32, layer by layer."""
    assert {"cuda torch.bfloat16"} in calls
    assert all(call in ({"cuda torch.bfloat16"}, {"cpu torch.float32"}) for call in calls), calls


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--tune.lora_r=0", "--tune.precision=fp16", "--tune.grad_cache=true", "--tune.gradient_checkpointing=true",
         "--tune.batch_tokens=64", "--embed.dtype=int8", "--embed.precision=bf16+1", "--align.loss=sigmoid",
         "--align.precision=fp32", "--align.micro_batch_size=2", "--align.lora_r=4", "--align.eval_steps=1"],
    ],
    ids=["defaults", "other settings"],
)  # fmt: skip
def test_fit(
    options: list[str], encoding_weights: list[set[str]], few_images: Path, llm: Path, vit: Path, tmp_path: Path
) -> None:
    command = ["fit", str(few_images), "--out", str(tmp_path / "run"), "--encoder.path", str(llm)]
    command += ["--tune.steps=2", "--tune.batch_size=4", "--align.tower", str(vit), "--align.embed_dim=12"]
    command += ["--align.batch_size=4", "--align.epochs=1", "--align.workers=0"]
    with pretended_gpu.count() as counts:
        main([*command, *options])
    assert counts.kernels.total() > 1000  # the run used the GPU
    assert json.loads((tmp_path / "run/evaluate/trained.json").read_text())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/align/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)
    if not options:
        assert (tmp_path / "run/tune/cra_tuned.json").is_file()
        assert_llm_is_in_bf16(encoding_weights)


@pytest.mark.parametrize("tower_lr", [0, 1e-5], ids=["frozen tower", "trained tower"])
def test_align_in_fp16(tower_lr: float, image_folder: Path, store: EmbeddingStore, vit: Path, tmp_path: Path) -> None:
    records = RecordTable.from_records(read_split(image_folder)[:8])
    config = dataclasses.replace(ALIGN, tower=str(vit), precision="fp16", batch_size=4, epochs=1, tower_lr=tower_lr)
    with pretended_gpu.count() as counts:
        align(records, store, create_initial_model(config, store), config, tmp_path / "run", SkipLog())
    assert counts.kernels.total() > 100
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


def test_index_and_search(encoding_weights: list[set[str]], model_folder: Path, photos: Path, tmp_path: Path) -> None:
    index = str(tmp_path / "index")
    with pretended_gpu.count() as counts:
        main(["index", str(photos), "--model", str(model_folder), "--out", index, "--workers=0"])
        assert not encoding_weights  # an index does not need the caption encoder
        main(["search", index, "red", "--images", str(photos / "1.png"), "--negative", "a dog"])
    assert counts.kernels.total() > 0
    assert_llm_is_in_bf16(encoding_weights)


def test_serve(dual_encoder: DualEncoder, image_folder: Path, tmp_path: Path) -> None:
    testclient = pytest.importorskip("starlette.testclient")
    backend: SqliteBackend = make_index(tmp_path / "index", image_folder, dual_encoder)
    app = create_patient_app(dual_encoder, backend)
    with pretended_gpu.count() as counts, testclient.TestClient(app, base_url="http://localhost") as client:
        response = client.post("/search", json={"texts": ["red"], "top": 3})
    assert len(response.json()["hits"]) == 3
    assert counts.kernels.total() > 0


@pytest.mark.parametrize("captions", [False, True])
def test_evaluate(
    captions: bool, encoding_weights: list[set[str]], model_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    source = f"{image_folder / 'captions.jsonl'}@val"
    arguments = ["--captions", source] if captions else [source]
    with pretended_gpu.count() as counts:
        main(["evaluate", str(model_folder), *arguments, "--out", str(tmp_path)])
    assert counts.kernels.total() > 0
    assert_llm_is_in_bf16(encoding_weights)


def test_regions_and_segmentation_equal_those_of_the_cpu(model_folder: Path, image_folder: Path) -> None:
    results = []
    masks = torch.zeros(2, 40, 48, dtype=torch.bool)
    masks[0, 3:20, 5:9] = masks[1, 30] = True
    for device in ("cpu", "cuda"):
        model = LLM2CLIP.from_pretrained(model_folder, device)
        image = image_folder / "0.png"
        labels, scores = model.segment(image, ["red", ["green", "blue"]], return_scores=True)
        assert torch.equal(labels, scores.argmax(0))
        regions = (
            model.encode_regions(image, [[1, 2, 20, 30], [0, 0, 47, 39]]),
            model.encode_regions(image, masks=masks),
        )
        results.append((*regions, scores))
    for expected, result in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)


def test_vision_tower_encodes_in_bf16(model_folder: Path) -> None:
    dtypes = []
    for precision in ("auto", "fp32"):
        model = LLM2CLIP.from_pretrained(model_folder, "cuda")
        model.tower.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
        encoder = wrap_llm2clip(model, "model", precision)
        encoder.encode_images([torch.zeros(3, 32, 32, dtype=torch.uint8)])
    assert dtypes == [torch.bfloat16, torch.float32]


def test_export(model_folder: Path, tmp_path: Path) -> None:
    main(["export", str(model_folder), "--to", "sentence-transformers", "--out", str(tmp_path / "exported")])
    assert list((tmp_path / "exported").rglob("*.safetensors"))


def test_llava_training(image_folder: Path, tmp_path: Path) -> None:
    config = LlavaConfig(
        pretrain_batch_size=4, batch_size=4, micro_batch_size=2, precision="bf16", save_steps=1000, lora_r=4
    )
    conversations = make_conversations(image_folder)[-5:]
    with pretended_gpu.count() as counts:
        model = train_llava(
            str(build_tiny_llava(tmp_path)), conversations, conversations, config, tmp_path / "run", SkipLog()
        )
    assert (model / "config.json").is_file()
    assert counts.kernels.total() > 1000


# ---- counts do not grow with the size of the input ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "values", "loss"),
    [("batch_size", (4, 10), "infonce"), ("batch_size", (4, 10), "sigmoid"), ("captions_per_image", (1, 4), "infonce")],
)
def test_align_step_does_not_depend_on_the_size_of_the_batch(
    align_step: CountSteps, setting: str, values: tuple[int, int], loss: str
) -> None:
    small, large = (align_step(**{setting: value}, loss=loss) for value in values)
    assert_no_more_syncs(large, small)
    assert_no_more_kernels(large, small)


@pytest.mark.parametrize("settings", [{"loss": "infonce"}, {"loss": "sigmoid"}, {"micro_batch_size": 2}])
def test_align_step_waits_only_for_the_metrics_of_the_previous_step(
    align_step: CountSteps, settings: dict[str, Any]
) -> None:
    """While the GPU computes a step, the host launches the next one. Any other synchronisation would prevent that.

    If several images share a text, the loss waits in addition, because the number of their pairs is not known.
    """
    syncs = align_step(**{"batch_size": 4, **settings}).syncs
    assert [(cause, line.partition(":")[0]) for cause, line in syncs.elements()] == [("wait for an event", "loop.py")]


def test_gradient_caching_copies_a_batch_once(align_step: CountSteps) -> None:
    plain, cached = align_step(batch_size=4, loss="infonce"), align_step(batch_size=4, micro_batch_size=2)
    assert cached.copied_bytes["to the GPU"] <= plain.copied_bytes["to the GPU"]
    assert_no_more_syncs(cached, plain)


def test_tune_step_does_not_synchronise_more_for_larger_batches(tune_step: CountSteps) -> None:
    assert_no_more_syncs(tune_step(batch_size=8), tune_step(batch_size=4))


@pytest.mark.parametrize(("min_steps", "compiles"), [(3, True), (4, False)])
def test_align_compiles_the_tower_in_long_runs(
    align_step: CountSteps, monkeypatch: pytest.MonkeyPatch, min_steps: int, compiles: bool
) -> None:
    compiled: list[VisionTower] = []
    monkeypatch.setattr(optim, "MIN_COMPILED_STEPS", min_steps)
    monkeypatch.setattr(align_module, "compile_blocks", compiled.append)
    align_step(embed_dim=12, batch_size=4, seed=min_steps)  # three steps
    assert len(compiled) == compiles


def test_pair_loss_does_not_synchronise(tune_step: CountSteps) -> None:
    """All synchronisations of a step are in the trainer of transformers, which `tune` calls."""
    lines = {line for _, line in tune_step(batch_size=4).syncs}
    assert lines and all(line.startswith("tune.py:") for line in lines)


def test_tune_step_has_no_full_length_gradient_per_caption_length(tune_step: CountSteps) -> None:
    equal_lengths = [ImageCaptions((f"dog {i:03d}", f"cat {i:03d}"), ()) for i in range(12)]
    many_lengths = [ImageCaptions((f"{'a' * i} dog", f"{'b' * i} cat"), ()) for i in range(1, 13)]
    equal, many = tune_step(equal_lengths, batch_size=4), tune_step(many_lengths, batch_size=4)
    assert many.kernels["aten.slice_backward"] <= equal.kernels["aten.slice_backward"]


def test_gradient_caching_with_a_single_pass_is_free(tune_step: CountSteps) -> None:
    plain, cached = tune_step(batch_size=4), tune_step(grad_cache=True)
    assert cached.kernels.total() <= 1.1 * plain.kernels.total()


def test_encoding_a_longer_batch_launches_no_more_kernels(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm)
    counts = [count_encode(encoder, [text] * n) for text, n in (("a dog", 2), ("two cats in the snow", 20))]
    assert_no_more_syncs(counts[1], counts[0])
    assert_no_more_kernels(counts[1], counts[0])


@pytest.mark.parametrize("template", [None, "<|user|>say: {caption}<|end|>"])
def test_encoding_more_batches_does_not_synchronise_more(llm: Path, template: str | None) -> None:
    encoder = CaptionEncoder.from_pretrained(llm, template=template)
    captions = ["a dog", "two cats in the snow"] * 20
    one_batch = count_encode(encoder, captions, batch_tokens=10_000)
    assert_no_more_syncs(count_encode(encoder, captions, batch_tokens=200), one_batch)


def test_encoding_with_bf16_weights_does_not_convert_them(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm)
    converted = count_encode(encoder, ["a dog"]).kernels["aten._to_copy"]
    encoder.move_for_encoding("cuda", "bf16")
    matrices = sum(isinstance(module, torch.nn.Linear) for module in encoder.modules())
    assert count_encode(encoder, ["a dog"]).kernels["aten._to_copy"] <= converted - matrices


def test_embedding_texts_and_images_synchronises_once_per_call(model_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(model_folder).to("cuda").eval()
    images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    counts = []
    for n in (1, 8):
        with pretended_gpu.count() as call, torch.no_grad():
            model(pixels=images[:n].to("cuda"))
        counts.append(call)
    assert_no_more_syncs(counts[1], counts[0])
    assert_no_more_kernels(counts[1], counts[0])


def count_encode(encoder: CaptionEncoder, captions: list[str], precision: str = "bf16", **options: Any) -> Counts:
    with pretended_gpu.count() as counts:
        encoder.encode(captions, precision=precision, **options)
    return counts


# ---- attention kernels ----------------------------------------------------------------------------------------------


def test_encoding_uses_attention_kernels_without_a_mask(llm: Path) -> None:
    encoder = CaptionEncoder.from_pretrained(llm)
    assert set(count_encode(encoder, ["a dog", "two cats"] * 4).attention) == {"flash bfloat16"}
    fp32 = count_encode(encoder, ["a dog", "two cats"] * 4, precision="fp32").attention
    assert set(fp32) == {"memory-efficient float32"}


def test_training_uses_flash_attention(align_step: CountSteps, tune_step: CountSteps) -> None:
    assert set(align_step(batch_size=4, loss="infonce").attention) == {"flash bfloat16"}
    assert set(tune_step(batch_size=4).attention) == {"flash bfloat16"}
