"""The pipeline on generated images, through the command line: fit, its stages, resuming, and the saved model."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import run_distributed
from llm2clip import LLM2CLIP, pipeline
from llm2clip.cli import main
from llm2clip.config import AlignConfig, EncoderConfig, FitConfig, TuneConfig
from llm2clip.data.image_facts import TRAINING_IMAGES_FILE, count_training_images, load_training_image_hashes
from llm2clip.data.records import open_records
from llm2clip.data.table import RecordTable
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.store.store import EmbeddingStore
from llm2clip.tools import plan as planner
from test_plan import measure_image_costs, measure_text_costs


def fit_command(image_folder: Path, llm: Path, tower: Path, out: Path) -> list[str]:
    flags = {
        "encoder.path": llm,
        "tune.steps": 6,
        "tune.batch_size": 8,
        "tune.save_steps": 3,
        "align.tower": tower,
        "align.image_size": 64,
        "align.embed_dim": 16,
        "align.epochs": 40,
        "align.batch_size": 15,
        "align.tower_lr": 3e-3,
        "align.lr": 3e-3,
        "align.workers": 0,
        "evaluate.fields": '["captions_xx"]',
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["fit", str(image_folder / "captions.jsonl"), "--out", str(out), *words]


Loads = list[tuple[str, str]]  # (stage, "LLM" or "tower") of each model that is loaded


@pytest.fixture(scope="module")
def recorded_run(
    image_folder: Path, llm: Path, tower: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Loads]:
    """Run `fit`. Return the run directory, and the models that were loaded with pretrained weights."""
    out, stages, loads = tmp_path_factory.mktemp("run") / "run", ["start"], []

    def record(kind: str, load: Callable[..., object]) -> Callable[..., object]:
        def recorded_load(*args: object, **options: Any) -> object:
            if options.get("pretrained", True):
                loads.append((stages[-1], kind))
                assert kind == "tower" or options["device"] == "cpu"
            return load(*args, **options)

        return recorded_load

    def record_stage(name: str, stage: Callable[..., object]) -> Callable[..., object]:
        return lambda *args, **options: stages.append(name) or stage(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionEncoder, "from_pretrained", record("LLM", CaptionEncoder.from_pretrained))
        patch.setattr(VisionTower, "from_pretrained", record("tower", VisionTower.from_pretrained))
        for name in ("tune", "embed", "align", "evaluate"):
            patch.setattr(pipeline, name, record_stage(name, getattr(pipeline, name)))
        assert main(fit_command(image_folder, llm, tower, out)) == 0
    return out, loads


@pytest.fixture(scope="module")
def run(recorded_run: tuple[Path, Loads]) -> Path:
    return recorded_run[0]


def test_fit_loads_the_llm_once_per_use_and_the_tower_once(recorded_run: tuple[Path, Loads]) -> None:
    """`align` and `evaluate` read embeddings from the store and copy the encoder's folder.

    `tune` also loads the tuned LLM, to measure it. `embed` reads the weights on the CPU, for the store's identity.
    """
    assert recorded_run[1] == [("start", "tower"), ("tune", "LLM"), ("tune", "LLM"), ("embed", "LLM")]


def test_fit_writes_the_documented_files(run: Path) -> None:
    for name in ("config.yaml", "skipped.jsonl", "tune/encoder/modules.json", "store/manifest.json", "report.md"):
        assert (run / name).exists(), name
    names = {p.name for p in (run / "model").iterdir()}
    assert names == {
        "config.json", "model.safetensors", "preprocessor_config.json", "text", "README.md", TRAINING_IMAGES_FILE
    }  # fmt: skip
    assert "I2T R@1" in (run / "report.md").read_text()
    rows = {r["captions"]: r for r in json.loads((run / "evaluate/trained.json").read_text())}
    assert {k: (r["images"], r["texts"]) for k, r in rows.items()} == {
        "captions": (6, 15),  # two or three captions each
        "long_captions": (6, 6),
        "captions_xx": (3, 3),  # every other image has one
    }
    assert len((run / "tune/metrics.jsonl").read_text().splitlines()) == 6
    losses = [json.loads(line)["loss"] for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_runs_command_lists_a_run_with_its_final_metrics(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(run.parent)]) == 0
    (_, row) = capsys.readouterr().out.splitlines()
    steps = len((run / "align/metrics.jsonl").read_text().splitlines())
    trained = json.loads((run / "evaluate/trained.json").read_text())[0]
    assert f"{steps} of {steps}" in row and re.search(r"fit +finished +–", row)
    assert f"R@1: I2T {trained['I2T']['R@1']:.1f}, T2I {trained['T2I']['R@1']:.1f}" in row


def test_fit_rotates_the_embedding_space_to_principal_components(run: Path) -> None:
    """The rotation is computed from one caption per training image. Here, all captions of the store are used."""
    model, store = LLM2CLIP.from_pretrained(run / "model", "cpu"), EmbeddingStore(run / "store")
    texts = model.project_text_embeddings(torch.from_numpy(store.take(np.arange(len(store)))))
    moments = texts.square().mean(0)
    assert moments[:4].sum() > 20 * moments[-4:].sum()


def test_fit_report_describes_the_run_and_shows_searches(run: Path) -> None:
    page, report = (run / "report.html").read_text(), (run / "report.md").read_text()
    assert "<title>Training results: run</title>" in page and "<details><summary>Settings</summary>" in page
    durations = json.loads((run / "durations.json").read_text())
    assert list(durations) == ["tune", "embed", "align", "evaluate"]
    assert "<td>after tuning</td>" in page and "wrong: " not in page
    assert f"llm2clip index PHOTOS --model {run}/model --out {run}/index" in report
    for text in (f"llm2clip {metadata.version('llm2clip')}, ", " UTC, ", "Stages: tune ", "95% interval"):
        assert text in page and text in report
    [row] = [row for row in json.loads((run / "evaluate/trained.json").read_text()) if row["captions"] == "captions"]
    low, high = row["T2I interval"]["R@1"]
    assert f"{row['T2I']['R@1']:.1f} | {low:.1f} to {high:.1f}" in report
    examples = json.loads((run / "evaluate/examples.json").read_text())
    assert len(examples) == 5 and all(len(example["images"]) in (5, 6) for example in examples)
    assert page.count("data:image/jpeg") == sum(len(example["images"]) for example in examples)
    assert all(sum(image["is_correct"] is True for image in example["images"]) == 1 for example in examples)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--align.tower", "timm:resnet5000"], "'resnet5000' is neither a timm model nor"),
        (["--align.tower", "vit_base_patch32_224", "--align.image_size", "16"], "cannot encode images at 16 pixels"),
        (["--align.report_to", "[nosuchtracker]"], "--align.report_to must be one of"),
    ],
)
def test_fit_checks_the_tower_before_it_reads_data(
    flags: list[str],
    message: str,
    image_folder: Path,
    llm: Path,
    tower: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    load = VisionTower.from_pretrained
    monkeypatch.setattr(VisionTower, "from_pretrained", partial(load, pretrained=False))
    assert main([*fit_command(image_folder, llm, tower, tmp_path / "run"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_fit_checks_disk_space_and_memory_before_training(
    image_folder: Path,
    llm: Path,
    tower: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, function in (("measure_text_costs", measure_text_costs), ("measure_image_costs", measure_image_costs)):
        monkeypatch.setattr(planner, name, function)  # these functions measure each model only once
    align = AlignConfig(tower=str(tower), image_size=64, embed_dim=16, tower_lr=3e-3)
    config = FitConfig(encoder=EncoderConfig(str(llm)), align=align)
    with monkeypatch.context() as patch:
        patch.setattr(planner.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**5))
        assert main(fit_command(image_folder, llm, tower, tmp_path / "run")) == 1
        assert re.search(r"needs about [\d.]+ MB of disk space .* 100\.0 kB is free", capsys.readouterr().err)
        assert not (tmp_path / "run/tune").exists()
        with pytest.raises(OSError, match="MB of disk space"):  # before the captions of `fit --caption` are written
            planner.check_resources(config, tmp_path, None)
    records = RecordTable.from_records(open_records(image_folder / "captions.jsonl"))
    assert planner.check_resources(config, tmp_path, records) == []
    monkeypatch.setattr(planner, "get_available_memory", lambda: 10**8)
    warnings = planner.check_resources(config, tmp_path, records)
    assert warnings[0].startswith("Warning: tune needs about") and "100.0 MB is free" in warnings[0]


def test_fit_on_two_ranks_makes_one_run(image_folder: Path, llm: Path, tower: Path, tmp_path: Path) -> None:
    per_rank = ["--tune.batch_size", "4", "--align.batch_size", "7", "--align.epochs", "2"]
    command = [*fit_command(image_folder, llm, tower, tmp_path / "run"), *per_rank]
    run_distributed(2, _run_command_on_rank, command, tmp_path)
    outputs = [(tmp_path / f"output-{rank}").read_text() for rank in range(2)]
    assert [output.count("4/4 evaluate") for output in outputs] == [1, 0]
    assert {p.name for p in (tmp_path / "run/model").iterdir()} > {"config.json", "model.safetensors", "text"}
    assert len((tmp_path / "run/tune/metrics.jsonl").read_text().splitlines()) == 6
    assert len((tmp_path / "run/align/metrics.jsonl").read_text().splitlines()) == 4  # 30 images, 14 in a step, twice


def _run_command_on_rank(command: list[str], folder: Path) -> None:
    with (folder / f"output-{torch.distributed.get_rank()}").open("w") as file, redirect_stdout(file):
        assert main(command) == 0


def test_saved_model_encodes_images_and_texts(run: Path, image_folder: Path) -> None:
    model = LLM2CLIP.from_pretrained(run / "model", device="cpu")
    images = model.encode_image([image_folder / "0.png", Image.open(image_folder / "1.png")])
    texts = model.encode_text(["a red picture", "一只猫", "a third"])
    assert images.shape == (2, 16) and texts.shape == (3, 16)
    assert images.dtype == texts.dtype == torch.float32
    assert torch.allclose(images.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3), atol=1e-5)
    scores = model.similarity(texts, images)
    assert scores.shape == (3, 2)
    assert torch.allclose(scores[1, 0], texts[1] @ images[0])
    batch = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    arrays = (batch * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert torch.equal(model.encode_image(batch), model.encode_image(arrays))
    assert model.encode_image(arrays[0]).shape == (1, 16)
    assert model.encode_image(str(image_folder / "0.png")).shape == (1, 16)
    assert model.encode_image([]).shape == (0, 16)


def test_model_knows_its_training_images(run: Path, image_folder: Path, tmp_path: Path) -> None:
    copy = LLM2CLIP.from_pretrained(run / "model", device="cpu").save_pretrained(tmp_path / "copy")
    training_images = load_training_image_hashes(copy)
    assert training_images is not None and len(training_images) == 30
    for split, count in (("train", 30), ("val", 0)):
        images = [record.image for record in open_records(f"{image_folder / 'captions.jsonl'}@{split}")]
        assert count_training_images(training_images, images) == count


def test_fit_run_again_trains_nothing_and_prints_a_summary(
    run: Path, image_folder: Path, llm: Path, tower: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "model/model.safetensors").stat().st_mtime_ns
    assert main(fit_command(image_folder, llm, tower, run)) == 0
    assert (run / "model/model.safetensors").stat().st_mtime_ns == before
    output = capsys.readouterr().out
    trained = json.loads((run / "evaluate/trained.json").read_text())[0]
    summary = [line.split("|")[1:-1] for line in output.splitlines() if line.startswith("|")]
    assert summary[2][0].strip() == "CRA (6 images)"
    name, _, _, after = (cell.strip() for cell in summary[4])
    assert (name, after) == ("captions: T2I R@1 (6 images)", f"{trained['T2I']['R@1']:.1f}")
    data = image_folder / "captions.jsonl"
    assert f"Next: llm2clip evaluate {run / 'model'} {data}\n" in output
    index = run / "index"
    assert f"      llm2clip index {data} --model {run / 'model'} --out {index}\n" in output
    assert f"      llm2clip search {index} 'a description of an image'\n      llm2clip serve {index}\n" in output
    assert f"Report: {run / 'report.html'}" in output
    assert "How to use the model" not in output and "Before training: " not in output


def test_rows_of_other_tuning_sources_are_counted_separately(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "more.jsonl"
    data.write_text('{"captions": ["a", "b"]}\n{"captions": ["c", "d"]}\n{broken\n')
    config = FitConfig(encoder=EncoderConfig(), tune=TuneConfig(data=[str(data)]), max_skipped=0.5)
    run = pipeline.Run("fit", [str(image_folder / "captions.jsonl")], tmp_path, config)
    assert len(run.read_tuning_pairs()[0]) == 2
    assert "tuning data: 1 of 3 rows skipped (malformed row: 1)" in capsys.readouterr().out
    assert json.loads((tmp_path / "skipped_tune.jsonl").read_text())["row"] == 3


def test_fit_resumes_align_from_its_last_checkpoint(
    run: Path, image_folder: Path, llm: Path, tower: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "align/checkpoints/checkpoint-80")  # of 80 steps; the checkpoint before is step 50
    (copy / "align/checkpoints/checkpoint-66").mkdir()  # incomplete: no marker file
    (copy / "evaluate/trained.json").unlink()
    assert main(fit_command(image_folder, llm, tower, copy)) == 0
    uninterrupted, resumed = (json.loads((f / "evaluate/trained.json").read_text()) for f in (run, copy))
    assert uninterrupted == resumed
    lines = [(f / "align/metrics.jsonl").read_text().splitlines() for f in (run, copy)]
    steps = [[json.loads(line)["step"] for line in part] for part in lines]
    assert steps[0] == steps[1] == list(range(1, 81))


def test_stage_commands_and_evaluate(
    image_folder: Path, llm: Path, tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is evaluated, the LLM is loaded on the CPU, for the store's identity and to save it with the model."""
    devices: list[object] = []
    load_encoder = CaptionEncoder.from_pretrained

    def record_load(path: str | Path, **options: object) -> CaptionEncoder:
        devices.append(options.get("device"))
        return load_encoder(path, **options)

    monkeypatch.setattr(CaptionEncoder, "from_pretrained", record_load)
    data, enc = str(image_folder / "captions.jsonl"), str(tmp_path / "tuned/encoder")
    train = f"{data}@train"
    assert main(["tune", train, "--out", str(tmp_path / "tuned"), "--encoder.path", str(llm), "--tune.steps", "2",
                 "--tune.batch_size", "4"]) == 0  # fmt: skip
    assert main(["embed", data, "--out", str(tmp_path / "store"), "--encoder.path", enc]) == 0
    align = ["align", train, "--store", str(tmp_path / "store"), "--encoder.path", enc, "--out", str(tmp_path / "run"),
             "--align.tower", str(tower), "--align.image_size", "64",
             "--align.epochs", "1", "--align.batch_size", "15", "--align.workers", "0"]  # fmt: skip
    assert main(align) == 0
    assert devices and set(devices) == {"cpu"}
    out = tmp_path / "results"
    assert main(["evaluate", str(tmp_path / "run/model"), f"{data}@val", "--captions", data,
                 "--out", str(out)]) == 0  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["caption retrieval"]["images"] == 36
    report = (out / "report.md").read_text()
    assert "paper: Llama3-8B-CC, COCO | 29.5" in report and f"run | {results['caption retrieval']['CRA']:.1f}" in report
    assert {r["captions"] for r in results["results"][0]["rows"]} == {"captions", "long_captions"}
    # without a split, evaluate uses what fit holds out: here val
    assert main(["evaluate", str(tmp_path / "run/model"), data, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/results.json").read_text())["results"] == results["results"]
