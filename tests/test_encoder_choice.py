"""Tests of `fit --encoder.path auto`: the score, the choice between candidates, and runs that use the choice."""

import json
from dataclasses import replace
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
from llm2clip.data.build_table import read_splits
from llm2clip.data.image_refs import FileImage
from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.data.table import RecordTable
from llm2clip.evaluate import encoder_choice
from llm2clip.evaluate.encoder_choice import describe_choice, mutual_knn, resolve_auto, score_candidates
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
    assert mutual_knn(first, second) == pytest.approx(expected, abs=1e-6)
    assert 0 < expected < 1


def test_mutual_knn_of_equal_and_too_few_embeddings() -> None:
    embeddings = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    assert mutual_knn(embeddings, 3 * embeddings) == pytest.approx(1)
    assert mutual_knn(embeddings[:1], embeddings[:1]) == mutual_knn(embeddings[:0], embeddings[:0]) == 0


@pytest.fixture
def candidates(monkeypatch: pytest.MonkeyPatch, llm: Path) -> dict[str, EncoderConfig]:
    """Replace the candidates: the two tiny encoders differ in the number of layers."""
    tiny = {"deep": EncoderConfig(str(llm)), "shallow": EncoderConfig(str(llm), layers=1)}
    monkeypatch.setattr(encoder_choice, "CANDIDATES", tiny)
    return tiny


def test_fit_uses_the_best_candidate_without_tuning(
    image_folder: Path,
    llm: Path,
    tower: Path,
    tmp_path: Path,
    candidates: dict[str, EncoderConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    scores = iter([0.25, 0.5])
    monkeypatch.setattr(encoder_choice, "mutual_knn", lambda *_: next(scores))
    command = fit_command(image_folder, llm, tower, tmp_path / "run")
    command = [word for word in command if "encoder.path" not in word and word != str(llm)]
    for setting in ("--tune.steps", "--tune.batch_size", "--tune.save_steps"):
        position = command.index(setting)
        del command[position : position + 2]
    command[command.index("--align.epochs") + 1] = "1"
    assert main(command) == 0
    output = capsys.readouterr().out
    sentence = (
        "Caption encoder: shallow, without tuning. Its captions have 50.0% of their nearest neighbours in common with "
        "the images (deep: 25.0%)."
    )
    assert sentence in output
    assert json.loads((tmp_path / "run/encoder_choice.json").read_text()) == {"shallow": 0.5, "deep": 0.25}
    assert sentence in (tmp_path / "run/report.md").read_text().replace("\n", " ")
    assert "first 1 layers, untuned" in (tmp_path / "run/report.md").read_text()
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["encoder"]["path"] == "auto"
    assert not (tmp_path / "run/tune/checkpoints").exists()
    model = LLM2CLIP.from_pretrained(tmp_path / "run/model")
    model.load_encoder()
    assert model.encoder.llm.config.num_hidden_layers == 1
    (tmp_path / "run/report.md").unlink()
    assert main(command) == 0, "the saved scores are used, so `mutual_knn` is not called again"
    assert (tmp_path / "run/report.md").exists()


def test_candidates_are_scored_with_the_captions_of_images_that_can_be_decoded(
    image_folder: Path, tower: Path, candidates: dict[str, EncoderConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = read_splits([str(image_folder / "captions.jsonl")], EvaluateConfig(), {}, SkipLog())
    records = list(splits.train)
    broken = replace(records[0], image=FileImage(str(image_folder / "missing.png")))
    without_captions = replace(records[1], captions=(), short_captions=(), long_captions=())
    shapes: list[tuple[tuple[int, ...], ...]] = []

    def record_shapes(*embeddings: Tensor) -> float:
        shapes.append(tuple(each.shape for each in embeddings))
        return 0.5

    monkeypatch.setattr(encoder_choice, "mutual_knn", record_shapes)
    table = RecordTable.from_records([broken, without_captions, Record("x", None, ("a dog",)), *records[2:]])
    vision_tower = VisionTower.from_pretrained(str(tower), image_size=64)
    assert score_candidates(table, vision_tower) == {"deep": 0.5, "shallow": 0.5}
    assert [[shape[0] for shape in pair] for pair in shapes] == [[len(records) - 2] * 2] * 2


def test_candidates_that_cannot_be_downloaded_are_skipped(
    image_folder: Path,
    tower: Path,
    candidates: dict[str, EncoderConfig],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = read_splits([str(image_folder / "captions.jsonl")], EvaluateConfig(), {}, SkipLog()).train
    vision_tower = VisionTower.from_pretrained(str(tower), image_size=64)
    load, missing = encoder_choice.load_for_evaluation, {None}

    def load_some(path: str, layers: int | None, **options: Any) -> object:
        if layers in missing:
            raise AssetUnavailableError("no network")
        return load(path, layers=layers, **options)

    monkeypatch.setattr(encoder_choice, "load_for_evaluation", load_some)
    assert list(score_candidates(train, vision_tower)) == ["shallow"]
    assert "deep is not a candidate for the caption encoder: no network" in capsys.readouterr().out
    missing.add(1)
    with pytest.raises(AssetUnavailableError, match=r"set --encoder\.path to a local folder"):
        score_candidates(train, vision_tower)


def test_settings_that_auto_would_ignore_are_errors() -> None:
    with pytest.raises(ValueError, match=r"--encoder\.layers cannot be combined with --encoder\.path auto"):
        EncoderConfig("auto", layers=4)
    with pytest.raises(ValueError, match=r"To tune an encoder, set --encoder\.path"):
        FitConfig(tune=TuneConfig(steps=300, lr=1e-4))
    config = resolve_auto(FitConfig())
    assert (config.encoder.path, config.tune.steps) == ("all-minilm-l6-v2", 0)
    assert resolve_auto(config) is config


def test_choice_without_alternative_is_described() -> None:
    assert describe_choice({"x": 0.125}) == (
        "Caption encoder: x, without tuning. Its captions have 12.5% of their nearest neighbours in common with the "
        "images."
    )
