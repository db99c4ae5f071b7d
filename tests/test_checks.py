"""Checks of paths and model names before the heavy imports."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image

from llm2clip.cli.checks import ENCODERS, check_pretrained, check_sources, resolve_encoder, resolve_model
from llm2clip.io_utils import EXTRAS
from llm2clip.models.pretrained import ASSETS

WRONG_PATHS = (
    (["search", "nowhere", "x"], "nowhere is not an index"),
    (["search", "photos", ""], "text 0 is empty"),
    (["search", "photos", "x", "--templates", "a photo"], "--templates: template 0 .* has no {} placeholder"),
    (["fit", "photo", "--out", "x"], "did you mean .*/photos"),
    (["convert", "checkpoint.pt", "--out", "x"], "checkpoint.pt is neither a folder nor"),
    (["store", "verify", "store"], "llm2clip store verify: store is not a store: no such folder"),
    (["fit", "photos", "--out", "x", "--encoder.path", "TT"], "TT is neither a folder nor a hub id"),
    (["evaluate", "runs/a/model", "photos"], "runs/a/model is neither a folder nor a hub id"),
    (["evaluate", "m", "photos", "--benchmarks", "cocoo"], "unknown benchmark 'cocoo'"),
    (["evaluate", "m"], "nothing to evaluate: pass a model and either data or --benchmarks"),
    (["llava", "train", "./nope", "--pretrain", "photos", "--out", "x"], "./nope is neither a folder nor a hub id"),
    (["search", "--server", "http://127.0.0.1:9", "x"], "cannot reach the server http://127.0.0.1:9"),
    (["evaluate", "m", "photos", "--baselines", "nope.npz"], "nope.npz: no such file"),
    (["index", "clip.mp4", "--out", "x"], "unknown format; videos are not supported"),
    (["embed", "prices.csv", "--out", "x"], "no caption column; the file has the columns image, price"),
    (["fit", "gone.csv", "--out", "x"], "missing image"),
    (["data", "gone.csv", "--columns", "text=caption"], "unknown field 'text'; available fields: id, image"),
    (["search", "photos", "x", "--model", "runs/nomodel"], "neither a folder nor a model in the hub's cache"),
    (
        ["search", "dog", "photos"],
        "but photos is. Pass the index first: llm2clip search photos dog",
    ),
    (["search", "photos", "x", "--model", "photos"], "photos is an index, not a model"),
    (["fit", "photos", "--out", "x", "--encoder.path", "photos"], "photos is an index, not a model"),
    (["store", "repair", "photos"], "photos is not a store: it has no manifest.json"),
    (
        ["caption", "photos", "--out", "c.jsonl", "--endpoint", "http://127.0.0.1:9", "--model", "x"],
        "no server responds at",
    ),
    (["caption", "photos", "--out", "/proc/c.jsonl", "--model", "m"], "--out /proc/c.jsonl: nothing can be created"),
    (["data", "photos", "--report", "/proc/x.html"], "--report /proc/x.html: nothing can be created in /proc"),
)
# Command, module that is missing, and extra that contains the module.
MISSING_PACKAGES = (
    (["search", "photos", "x"], "usearch", "search"),
    (["search", "postgresql://u@127.0.0.1/x", "x"], "psycopg", "postgres"),
    (["serve", "photos", "--port", "0"], "uvicorn", "search"),
    (["index", "photos", "--model", "m", "--out", "x", "--ocr"], "rapidocr", "ocr"),
    (["export", "m", "--to", "onnx", "--out", "x"], "onnxscript", "onnx"),
    (["export", "m", "--to", "gallery", "--index", "photos", "--out", "x"], "onnxscript", "onnx"),
    (["evaluate", "open_clip:ViT-B-32/openai", "photos"], "open_clip", "open-clip"),
    (["fit", "photos", "--out", "x", "--tune.qlora", "true"], "bitsandbytes", "qlora"),
    (["embed", "photos", "--out", "x", "--engine", "ray"], "ray", "ray"),
    (["quickstart", "--out", "x"], "emoji", "quickstart"),
)


def test_wrong_paths_and_missing_packages_are_reported_without_importing_torch(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/index.sqlite").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    (tmp_path / "photos/a.txt").write_text("a black square")
    (tmp_path / "clip.mp4").touch()
    (tmp_path / "prices.csv").write_text("image,price\na.jpg,3\n")
    (tmp_path / "gone.csv").write_text("image,caption\na.jpg,a dog\n")
    commands = [(command, []) for command, _ in WRONG_PATHS]
    commands += [(command, [module]) for command, module, _ in MISSING_PACKAGES]
    code = f"""if True:
        import sys
        from llm2clip.cli import main
        for command, missing in {commands!r}:
            sys.modules.update(dict.fromkeys(missing))
            assert main(command) == 1
            for name in missing:
                del sys.modules[name]
        print("torch" in sys.modules)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert run.stdout == "False\n"
    errors = [line for line in run.stderr.splitlines() if line.startswith("llm2clip ")]
    for error, (_, message) in zip(errors, WRONG_PATHS, strict=False):
        assert re.search(message, error)
    for error, (_, module, extra) in zip(errors[len(WRONG_PATHS) :], MISSING_PACKAGES, strict=True):
        assert re.search(rf"requires additional packages \({module}\)\. Run pip install 'llm2clip\[{extra}\]'", error)


def test_extras_match_pyproject() -> None:
    pyproject = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    for extra, modules in EXTRAS.items():
        packages = [re.split(r"[<>=\[]", entry)[0] for entry in pyproject["project"]["optional-dependencies"][extra]]
        names = {"open-clip-torch": "open_clip"}
        assert {names.get(package, package.replace("-", "_")) for package in packages} == set(modules)


def test_run_directories_stand_for_the_model_and_the_encoder_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    for run, encoder in (("run", "tune/encoder"), ("tuned", "encoder"), ("run/model", "text")):
        (tmp_path / run / encoder).mkdir(parents=True)
        (tmp_path / run / encoder / "modules.json").write_text("[]")
        assert resolve_encoder(str(tmp_path / run)) == str(tmp_path / run / encoder)
        assert resolve_encoder(str(tmp_path / run / encoder)) == str(tmp_path / run / encoder)
    assert resolve_model(str(tmp_path / "run")) == resolve_model(str(tmp_path / "run/model"))
    assert capsys.readouterr().err.count(": using ") == 4


def test_names_of_models_are_accepted_and_missing_paths_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.models.loading.find_hub_problem", lambda: "")
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
