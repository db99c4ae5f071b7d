"""Checks of paths and model names before the heavy imports."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm2clip.cli.checks import ENCODERS, check_pretrained, check_sources, resolve_encoder, resolve_model
from llm2clip.models.pretrained import ASSETS

WRONG_PATHS = (
    (["search", "nowhere", "x"], "nowhere is not an index"),
    (["search", "photos", ""], "text 0 is empty"),
    (["fit", "photo", "--out", "x"], "did you mean .*/photos"),
    (["convert", "checkpoint.pt", "--out", "x"], "checkpoint.pt is neither a folder nor"),
    (["store", "verify", "store"], "llm2clip store verify: store is not a store: no such folder"),
    (["fit", "photos", "--out", "x", "--encoder.path", "TT"], "TT is neither a folder nor a hub id"),
    (["evaluate", "runs/a/model", "photos"], "runs/a/model is neither a folder nor a hub id"),
    (["evaluate", "photos", "photos", "--baselines", "nope.npz"], "nope.npz: no such file"),
)


def test_wrong_paths_are_reported_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/index.sqlite").touch()
    commands = [command for command, _ in WRONG_PATHS]
    code = f"import sys; from llm2clip.cli import main; print([main(c) for c in {commands!r}], 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout == f"{[1] * len(commands)} False\n"
    for _, message in WRONG_PATHS:
        assert re.search(message, run.stderr)


def test_run_directories_stand_for_the_model_and_the_encoder_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    for run, encoder in (("run", "tune/encoder"), ("tuned", "encoder")):
        (tmp_path / run / encoder).mkdir(parents=True)
        (tmp_path / run / encoder / "modules.json").write_text("[]")
        assert resolve_encoder(str(tmp_path / run)) == str(tmp_path / run / encoder)
        assert resolve_encoder(str(tmp_path / run / encoder)) == str(tmp_path / run / encoder)
    assert resolve_model(str(tmp_path / "run")) == resolve_model(str(tmp_path / "run/model"))
    assert capsys.readouterr().err.count(": using ") == 3


def test_names_of_models_are_accepted_and_missing_paths_are_not(tmp_path: Path) -> None:
    assert set(ENCODERS) <= ASSETS.keys()
    for name in ("openai/clip-vit-base-patch16", "open_clip:ViT-B-32/openai", "st:clip-ViT-B-32", str(tmp_path)):
        assert resolve_model(name) == name
    for name in (*ENCODERS, "Qwen/Qwen2.5-0.5B"):
        assert resolve_encoder(name) == name
    check_pretrained("efficientnet-lite0", "timm:resnet50", "hf:a/b", "google/siglip2-base-patch16-224")
    check_sources(["hf:nlphuji/flickr30k"], None, [f"{tmp_path}@train"])
    for name in ("model", "./model", "/no/model", "a/b/model", "~/model", "model.npz"):
        with pytest.raises(FileNotFoundError):
            resolve_model(name)
    for name in ("./tower", "/no/tower", "a\\b"):
        with pytest.raises(FileNotFoundError):
            check_pretrained(name)
