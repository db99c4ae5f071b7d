"""Tests of `fit --encoder.path auto`: the score, the choice between candidates, and runs that use the choice."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from llm2clip import LLM2CLIP
from llm2clip.cli import main
from llm2clip.config import EncoderConfig, EvaluateConfig, FitConfig, TuneConfig
from llm2clip.data.build_table import read_data_splits
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate import encoder_choice
from llm2clip.evaluate.encoder_choice import (
    choose_caption_encoder,
    compute_mutual_knn_alignment,
    describe_encoder_choice,
    resolve_auto_encoder,
)
from llm2clip.models.pretrained import AssetUnavailableError
from llm2clip.models.vision.vision_tower import VisionTower
from test_pipeline import fit_command


def naive_mutual_knn(first: np.ndarray, second: np.ndarray, neighbours: int) -> float:
    shares = []
    for n in range(len(first)):
        lists = []
        for embeddings in (first, second):
            cosines = embeddings @ embeddings[n] / np.linalg.norm(embeddings, axis=1) / np.linalg.norm(embeddings[n])
            ranked = [m for m in np.argsort(-cosines) if m != n]
            lists.append(set(ranked[:neighbours]))
        shares.append(len(lists[0] & lists[1]) / neighbours)
    return float(np.mean(shares))


@pytest.mark.parametrize(("items", "neighbours"), [(300, 10), (45, 4), (7, 1)])
def test_mutual_knn_matches_float64(items: int, neighbours: int) -> None:
    generator = torch.Generator().manual_seed(items)
    first = torch.randn(items, 8, generator=generator)
    second = torch.cat([first[:, :4] + torch.randn(items, 4, generator=generator), torch.ones(items, 2)], 1)
    expected = naive_mutual_knn(first.double().numpy(), second.double().numpy(), neighbours)
    assert compute_mutual_knn_alignment(first, second, neighbours) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1
    assert compute_mutual_knn_alignment(first, 3 * first, neighbours) == pytest.approx(1)


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch, llm: Path) -> tuple[EncoderConfig, ...]:
    """Replace the candidates by tiny encoders with all layers and with one layer."""
    tiny = (EncoderConfig(str(llm)), EncoderConfig(str(llm), layers=1))
    monkeypatch.setattr(encoder_choice, "CANDIDATES", tiny)
    monkeypatch.setattr(encoder_choice, "MIN_IMAGES", 5)
    return tiny


@pytest.fixture
def vision_tower(tower: Path) -> VisionTower:
    return VisionTower.from_pretrained(str(tower), image_size=64)


@pytest.fixture
def train(image_folder: Path) -> RecordTable:
    return read_data_splits([str(image_folder / "captions.jsonl")], EvaluateConfig(), {}, SkipLog()).train


def make_command(image_folder: Path, llm: Path, tower: Path, out: Path, *flags: str) -> list[str]:
    """Return a short `fit` command without settings of the encoder and of `tune`."""
    command = fit_command(image_folder, llm, tower, out)
    for setting in ("--encoder.path", "--tune.steps", "--tune.batch_size", "--tune.save_steps"):
        position = command.index(setting)
        del command[position : position + 2]
    command[command.index("--align.epochs") + 1] = "1"
    return [*command, *flags]


def test_fit_uses_the_best_candidate_without_tuning(
    image_folder: Path,
    llm: Path,
    tower: Path,
    tmp_path: Path,
    candidates: tuple[EncoderConfig, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = iter([0.25, 0.5, 0.75, 0.5])
    monkeypatch.setattr(encoder_choice, "compute_mutual_knn_alignment", lambda *_: next(scores))
    out = tmp_path / "run"

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # interrupted after the choice
        patch.setattr("llm2clip.pipeline.tune", interrupt)
        main(make_command(image_folder, llm, tower, out, "--align.image_size", "48"))
    assert json.loads((out / "encoder_choice.json").read_text())["encoder"]["layers"] == 1
    command = make_command(image_folder, llm, tower, out)
    capsys.readouterr()
    assert main(command) == 0
    choice = json.loads((out / "encoder_choice.json").read_text())
    assert choice["encoder"] == asdict(candidates[0]), "the candidates are compared again with the new image size"
    assert (choice["tower"], choice["image_size"], choice["images"]) == (str(tower), 64, 30)
    sentence = (
        f"Caption encoder: {llm} (not tuned). Nearest-neighbour agreement between images and captions: 75.0% "
        f"({llm}, 1 layer: 50.0%)."
    )
    assert sentence in capsys.readouterr().out
    assert sentence in (out / "report.md").read_text().replace("\n", " ")
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert (settings["encoder"]["path"], settings["tune"]["steps"]) == ("auto", 0)
    assert not (out / "tune/checkpoints").exists()
    model = LLM2CLIP.from_pretrained(out / "model")
    model.load_encoder()
    assert model.encoder.llm.config.num_hidden_layers > 1
    (out / "report.md").unlink()
    assert main([*command, "--tune.steps", "0"]) == 0, "the saved choice is used"
    assert (out / "report.md").exists()


def test_fit_needs_only_one_caption_per_image(
    image_folder: Path, llm: Path, tower: Path, tmp_path: Path, candidates: tuple[EncoderConfig, ...]
) -> None:
    rows = [json.loads(line) for line in (image_folder / "captions.jsonl").read_text().splitlines()]
    rows = [{"image": str(image_folder / row["image"]), "captions": row["captions"][:1]} for row in rows]
    (tmp_path / "captions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = make_command(tmp_path, llm, tower, tmp_path / "run")
    del command[command.index("--evaluate.fields") : command.index("--evaluate.fields") + 2]
    assert main(command) == 0


def test_only_images_with_captions_that_can_be_decoded_are_compared(
    image_folder: Path,
    train: RecordTable,
    vision_tower: VisionTower,
    candidates: tuple[EncoderConfig, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = list(train)
    broken = replace(records[0], image=FileImage(str(image_folder / "missing.png")))
    without_captions = replace(records[1], captions=(), short_captions=(), long_captions=())
    long_only = replace(records[2], captions=(), long_captions=("A long text.",))
    shapes: list[list[int]] = []

    def record_shapes(*embeddings: Tensor) -> float:
        shapes.append([len(each) for each in embeddings])
        return 0.5

    monkeypatch.setattr(encoder_choice, "compute_mutual_knn_alignment", record_shapes)
    table = [broken, without_captions, Record("x", None, ("a dog",)), long_only, *records[3:]]
    choice = choose_caption_encoder(RecordTable.from_records(table), vision_tower, candidates)
    assert choice["encoder"] == asdict(candidates[0]), "the first candidate is chosen if the scores are equal"
    assert shapes == [[len(records) - 2] * 2] * 2 and choice["images"] == len(records) - 2


def test_too_few_images_are_not_compared(
    train: RecordTable,
    vision_tower: VisionTower,
    candidates: tuple[EncoderConfig, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choice = choose_caption_encoder(train[:4], vision_tower, candidates)
    assert (choice["encoder"], choice["images"], choice["scores"]) == (asdict(candidates[0]), 4, {})
    description = describe_encoder_choice(choice)
    assert "only 4 images could be encoded within a minute" in description
    assert choose_caption_encoder(train[:0], vision_tower, candidates)["images"] == 0
    monkeypatch.setattr(encoder_choice, "MAX_SECONDS", -1)  # as with a slow tower
    assert choose_caption_encoder(train, vision_tower, candidates)["images"] == 0


def test_candidates_that_cannot_be_downloaded_are_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"all-minilm-l6-v2"}

    def resolve(name: str) -> str:
        if name in missing:
            raise AssetUnavailableError("no network")
        return name

    monkeypatch.setattr(encoder_choice, "resolve_pretrained_name", resolve)
    assert encoder_choice.download_candidate_encoders() == [EncoderConfig("smollm2-135m", layers=4)]
    assert "Skipped the candidate encoder all-minilm-l6-v2: no network" in capsys.readouterr().out
    missing.add("smollm2-135m")
    with pytest.raises(AssetUnavailableError, match=r"set --encoder\.path to a local folder"):
        encoder_choice.download_candidate_encoders()


def test_settings_that_auto_would_ignore_are_errors() -> None:
    with pytest.raises(ValueError, match=r"--encoder\.layers requires --encoder\.path"):
        EncoderConfig("auto", layers=4)
    for tune in (TuneConfig(steps=300), TuneConfig(lr=1e-4)):
        with pytest.raises(ValueError, match=r"--tune settings require --encoder\.path"):
            FitConfig(tune=tune)
    assert FitConfig() == FitConfig(tune=TuneConfig(steps=0)) and FitConfig().tune.steps == 0
    assert resolve_auto_encoder(FitConfig()).encoder == encoder_choice.CANDIDATES[-1]
    named = FitConfig(encoder=EncoderConfig("x"))
    assert resolve_auto_encoder(named) is named and named.tune.steps > 0


def test_describe_encoder_choice_with_a_single_candidate() -> None:
    choice = {"encoder": {"path": "x"}, "images": 1000, "scores": {"x": 0.125}}
    sentence = "Nearest-neighbour agreement between images and captions: 12.5%."
    assert describe_encoder_choice(choice) == f"Caption encoder: x (not tuned). {sentence}"
