"""Checks of paths and model names before the heavy imports."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from llm2clip.cli.checks import (
    ENCODERS,
    check_pretrained_names,
    check_sources_exist,
    resolve_encoder_path,
    resolve_model_name,
)
from llm2clip.io_utils import EXTRAS
from llm2clip.models.pretrained import ASSETS
from llm2clip.tools.doctor import DEVELOPER_EXTRAS

ROOT = Path(__file__).parent.parent
PACKAGES = {"PIL": "pillow", "open_clip": "open-clip-torch", "sklearn": "scikit-learn", "yaml": "pyyaml"}  # of modules
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
    (["search", "photos", "x", "--model", "runs/nomodel"], "neither a local path nor a model in the hub's cache"),
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
    (["caption", "photos", "--out", "c.jsonl", "--model", "m"], "py3langid", "caption"),
    (["fit", "photos", "--out", "x", "--caption", "m"], "httpx", "caption"),
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


# ---- dependencies ----------------------------------------------------------------------------------------------------


def read_dependencies() -> tuple[set[str], dict[str, set[str]]]:
    """Return the names of the core dependencies, and those of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"": project["dependencies"], **project["optional-dependencies"]}
    names = {extra: {re.split(r"[<>=;\[]", line)[0].lower() for line in lines} for extra, lines in groups.items()}
    return names.pop(""), names


def to_module(package: str) -> str:
    modules = {package: module for module, package in PACKAGES.items()}
    return modules.get(package, package.replace("-", "_"))


def find_imports() -> Iterator[tuple[str, str, bool]]:
    """Yield the file and the top-level module of each import of another package in src.

    The third value is True if the import runs when the file itself is imported.
    """
    package = ROOT / "src/llm2clip"
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for module in {name.partition(".")[0] for name in names} - {"llm2clip"} - sys.stdlib_module_names:
                yield file.relative_to(package).as_posix(), module, node in tree.body


def test_imported_packages_are_dependencies() -> None:
    core, extras = read_dependencies()
    user_packages = core.union(*(extras[name] for name in extras.keys() - {*DEVELOPER_EXTRAS}))
    undeclared, need_extras = set(), set()
    for file, module, is_immediate in find_imports():
        package = PACKAGES.get(module, module.replace("_", "-"))
        if package not in user_packages:
            undeclared.add((file, module))
        elif is_immediate and package not in core:
            need_extras.add(file)
    # lmms-eval and mteb themselves call the code in these files.
    assert undeclared == {("llava/lmms.py", "lmms_eval"), ("evaluate/mteb.py", "mteb")}
    assert need_extras == {
        "caption/captioners.py", "search/immich.py", "search/inference.py", "search/mcp_tools.py",
        "search/middleware.py", "search/postgres_backend.py", "search/postgres_database.py", "search/schemas.py",
        "search/server.py", "search/sqlite_backend.py",
    }  # fmt: skip


def test_help_of_all_commands_works_without_extras() -> None:
    core, extras = read_dependencies()
    modules = [to_module(package) for package in set().union(*extras.values()) - core - {"llm2clip"}]
    code = f"""if True:
        import contextlib, io, sys
        sys.modules.update(dict.fromkeys({modules!r}))
        from llm2clip.cli import build_parser
        parser, commands = build_parser()
        for command in commands:
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    parser.parse_args([*command.split(), "--help"])
            except SystemExit as error:
                assert error.code == 0, command"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_extras_match_pyproject() -> None:
    core, extras = read_dependencies()
    assert len(core) <= 25
    for extra, modules in EXTRAS.items():
        assert set(map(to_module, extras[extra])) == set(modules)
    (all_extras,) = re.findall(r'^  "llm2clip\[(.*)\]"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert all_extras.split(",") == sorted(extras.keys() - {"dev"})  # `dev` contains all other extras


def test_run_directories_stand_for_the_model_and_the_encoder_in_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/config.json").write_text("{}")
    for run, encoder in (("run", "tune/encoder"), ("tuned", "encoder"), ("run/model", "text")):
        (tmp_path / run / encoder).mkdir(parents=True)
        (tmp_path / run / encoder / "modules.json").write_text("[]")
        assert resolve_encoder_path(str(tmp_path / run)) == str(tmp_path / run / encoder)
        assert resolve_encoder_path(str(tmp_path / run / encoder)) == str(tmp_path / run / encoder)
    assert resolve_model_name(str(tmp_path / "run")) == resolve_model_name(str(tmp_path / "run/model"))
    assert capsys.readouterr().err.count(": using ") == 4


def test_names_of_models_are_accepted_and_missing_paths_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm2clip.models.loading.find_hub_problem", lambda: "")
    assert set(ENCODERS) <= ASSETS.keys()
    for name in ("openai/clip-vit-base-patch16", "open_clip:ViT-B-32/openai", "st:clip-ViT-B-32", str(tmp_path)):
        assert resolve_model_name(name) == name
    for name in (*ENCODERS, "Qwen/Qwen2.5-0.5B"):
        assert resolve_encoder_path(name) == name
    check_pretrained_names("efficientnet-lite0", "timm:resnet50", "hf:a/b", "google/siglip2-base-patch16-224")
    check_sources_exist(["hf:nlphuji/flickr30k"], None, [f"{tmp_path}@train"])
    for name in ("model", "./model", "/no/model", "a/b/model", "~/model", "model.npz"):
        with pytest.raises(FileNotFoundError):
            resolve_model_name(name)
    for name in ("./tower", "/no/tower", "a\\b"):
        with pytest.raises(FileNotFoundError):
            check_pretrained_names(name)
