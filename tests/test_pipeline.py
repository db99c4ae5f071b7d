"""The whole path on generated pictures, through the command, and the model folder that it leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.run_config import ConfigChangedError, save_or_check_config


def command(pictures: Path, llm: Path, out: Path) -> list[str]:
    return [
        *("fit", str(pictures / "captions.jsonl"), "--out", str(out)),
        *("--encoder.path", str(llm), "--tune.steps", "6", "--tune.batch_size", "8", "--tune.save_steps", "3"),
        *(
            "--evaluate.fields",
            '["captions_xx"]',
            "--embed.shard_size",
            "32",
            "--align.tower",
            "timm:test_efficientnet",
            "--align.pretrained",
            "false",
        ),
        *("--align.image_size", "64", "--align.embed_dim", "16", "--align.epochs", "40", "--align.batch_size", "15"),
        *("--align.tower_lr", "3e-3", "--align.lr", "3e-3", "--align.workers", "0"),
    ]


@pytest.fixture(scope="module")
def run(pictures: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    assert main(command(pictures, llm, out)) == 0
    return out


def test_fit_leaves_what_it_promises(run: Path) -> None:
    for name in ("config.yaml", "skipped.jsonl", "tune/encoder/modules.json", "store/manifest.json", "report.md"):
        assert (run / name).exists(), name
    names = {p.name for p in (run / "model").iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "text", "README.md"}
    assert "I2T R@1" in (run / "report.md").read_text()
    measured = {r["captions"]: r for r in json.loads((run / "evaluate/trained.json").read_text())}
    assert {k: (r["images"], r["texts"]) for k, r in measured.items()} == {
        "captions": (6, 15),  # two or three captions each
        "long_captions": (6, 6),
        "captions_xx": (3, 3),  # every other picture has one
    }
    assert len((run / "tune/metrics.jsonl").read_text().splitlines()) == 6


def test_fit_runs_under_torchrun(pictures: Path, llm: Path, tmp_path: Path) -> None:
    """Two processes make one run, with the same command."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llm2clip"]
    halves = ["--tune.batch_size", "4", "--align.batch_size", "7", "--align.epochs", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *command(pictures, llm, tmp_path / "run"), *halves],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("4/4 evaluate") == 1  # once, not once a process
    assert {p.name for p in (tmp_path / "run/model").iterdir()} > {"config.json", "model.safetensors", "text"}
    assert len((tmp_path / "run/tune/metrics.jsonl").read_text().splitlines()) == 6
    assert len((tmp_path / "run/align/metrics.jsonl").read_text().splitlines()) == 4  # 30 images, 14 in a step, twice


def test_fit_learns(run: Path) -> None:
    """On the pictures it was trained on, which is what so tiny a model can show, it is far above chance."""
    losses = [json.loads(line)["loss"] for line in (run / "align/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0]


def test_the_model_folder_answers(run: Path, pictures: Path) -> None:
    model = LLM2CLIP.from_pretrained(run / "model", device="cpu")
    images = model.encode_image([pictures / "0.png", Image.open(pictures / "1.png")])
    texts = model.encode_text(["a red picture", "一只猫", "a third"])
    assert images.shape == (2, 16) and texts.shape == (3, 16)
    assert images.dtype == texts.dtype == torch.float32
    assert torch.allclose(images.norm(dim=1), torch.ones(2), atol=1e-5)
    assert torch.allclose(texts.norm(dim=1), torch.ones(3), atol=1e-5)
    scores = model.similarity(texts, images)
    assert scores.shape == (3, 2)
    assert torch.allclose(scores[1, 0], texts[1] @ images[0])
    assert model.encode_image(str(pictures / "0.png")).shape == (1, 16)
    assert model.encode_image([]).shape == (0, 16)


def test_save_and_load_give_the_same_vectors(run: Path, pictures: Path, tmp_path: Path) -> None:
    model = LLM2CLIP.from_pretrained(run / "model", device="cpu")
    again = LLM2CLIP.from_pretrained(model.save_pretrained(tmp_path / "copy"), device="cpu")
    picture = [pictures / "3.png"]
    assert torch.equal(model.encode_image(picture), again.encode_image(picture))
    assert torch.equal(model.encode_text(["a dog"]), again.encode_text(["a dog"]))


def test_the_same_command_again_trains_nothing(run: Path, pictures: Path, llm: Path) -> None:
    before = (run / "model/model.safetensors").stat().st_mtime_ns
    assert main(command(pictures, llm, run)) == 0
    assert (run / "model/model.safetensors").stat().st_mtime_ns == before


def test_other_settings_in_the_same_folder_are_refused(
    run: Path, pictures: Path, llm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(pictures, llm, run), "--align.epochs", "2"]) == 1
    said = capsys.readouterr().err
    assert "align.epochs" in said and "40" in said and "2" in said


def test_a_stage_lost_to_a_kill_is_made_again(run: Path, pictures: Path, llm: Path, tmp_path: Path) -> None:
    """Without its model but with a checkpoint, the run goes on from there and ends where it ended before."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "align/checkpoints/step-80")  # 80 steps; the one before is 50
    (copy / "align/checkpoints/step-66").mkdir()  # half-written: without its mark
    (copy / "evaluate/trained.json").unlink()
    assert main(command(pictures, llm, copy)) == 0
    whole, resumed = (json.loads((f / "evaluate/trained.json").read_text()) for f in (run, copy))
    assert whole == resumed
    lines = [(f / "align/metrics.jsonl").read_text().splitlines() for f in (run, copy)]
    steps = [[json.loads(line)["step"] for line in part] for part in lines]
    assert steps[0] == steps[1] == list(range(1, 81))


def test_stages_one_at_a_time_and_evaluate(pictures: Path, llm: Path, tmp_path: Path) -> None:
    data, enc = str(pictures / "captions.jsonl"), str(tmp_path / "tuned/encoder")
    train = f"{data}@train"
    assert main(["tune", train, "--out", str(tmp_path / "tuned"), "--encoder.path", str(llm), "--tune.steps", "2",
                 "--tune.batch_size", "4"]) == 0  # fmt: skip
    assert main(["embed", data, "--out", str(tmp_path / "store"), "--encoder.path", enc]) == 0
    align = ["align", train, "--store", str(tmp_path / "store"), "--encoder.path", enc, "--out", str(tmp_path / "run"),
             "--align.tower", "timm:test_efficientnet", "--align.pretrained", "false", "--align.image_size", "64",
             "--align.epochs", "1", "--align.batch_size", "15", "--align.workers", "0"]  # fmt: skip
    assert main(align) == 0
    out = tmp_path / "results"
    assert main(["evaluate", str(tmp_path / "run/model"), f"{data}@val", "--captions", data,
                 "--out", str(out)]) == 0  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    assert results["captions"]["images"] == 36
    report = (out / "report.md").read_text()
    assert "paper: Llama3-8B-CC, COCO | 73.0" in report and f"run | {results['captions']['CRA']:.1f}" in report
    assert {r["captions"] for r in results["results"][0]["rows"]} == {"captions", "long_captions"}
    # without a split, what a fit of the data holds out: here its val
    assert main(["evaluate", str(tmp_path / "run/model"), data, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again/results.json").read_text())["results"] == results["results"]
    # another encoder's store is refused, naming what differs
    assert main([*align[:-1], "0", "--encoder.path", str(llm), "--out", str(tmp_path / "other")]) == 1


def test_mistakes_are_one_clear_message(tmp_path: Path, llm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", str(tmp_path / "captoins.jsonl"), "--out", str(tmp_path / "x")]) == 1
    said = capsys.readouterr().err
    assert "captoins.jsonl" in said and "Traceback" not in said
    assert main(["evaluate"]) == 1
    assert "--captions" in capsys.readouterr().err


def test_keep_names_what_changed(tmp_path: Path) -> None:
    save_or_check_config({"a": {"b": 1, "c": [1]}}, tmp_path / "r.yaml")
    save_or_check_config({"a": {"b": 1, "c": [1]}}, tmp_path / "r.yaml")
    (tmp_path / "tune").mkdir()
    with pytest.raises(ConfigChangedError, match=r"a\.b: 1 there, 2 now"):
        save_or_check_config({"a": {"b": 2, "c": [1]}}, tmp_path / "r.yaml")
