"""Check the distributions in dist/ and the installed wheel. `make test-wheel` runs this with the wheel's interpreter.

    ENVIRONMENT/bin/python -I tests/wheel_smoke.py

This file must not import anything from the repository. The files of the distributions are compared with those in git.
"""

import contextlib
import csv
import io
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llm2clip
from llm2clip.cli import build_parser, main

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = Path(llm2clip.__file__).parent
COLOURS = ("red", "green", "blue", "yellow", "black", "white")
BACKGROUNDS = ("gray", "orange", "purple", "brown", "pink", "cyan", "navy", "olive", "gold", "teal")


def check_distributions() -> None:
    """Check that the distributions and the installed package have the files of the repository, and no others."""
    command = ["git", "-C", str(REPOSITORY), "ls-files"]
    tracked = set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines())
    (source,) = REPOSITORY.glob("dist/*.tar.gz")
    (wheel,) = REPOSITORY.glob("dist/*.whl")
    with tarfile.open(source) as archive:
        in_source = {member.name.partition("/")[2] for member in archive if member.isfile()}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {name.removeprefix("src/") for name in tracked if name.startswith("src/")}
    check_equal(source, in_source, tracked | {"PKG-INFO"})
    check_equal(wheel, in_wheel, modules)
    installed = {file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    check_equal(PACKAGE, {file.relative_to(PACKAGE.parent).as_posix() for file in installed}, modules)
    for name in modules:
        assert (PACKAGE.parent / name).read_bytes() == (REPOSITORY / "src" / name).read_bytes(), f"{name} differs"


def check_equal(place: Path, files: set[str], expected: set[str]) -> None:
    assert files == expected, f"{place}: missing {sorted(expected - files)}, not in git {sorted(files - expected)}"


def check_help() -> None:
    """Run `--help` of every command."""
    commands = list(list_commands(build_parser()[0]))
    assert len(commands) > 20
    for command in commands:
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([*command, "--help"])
        words = output.getvalue().replace("[options]", "").split()
        assert words[: len(command) + 2] == ["usage:", "llm2clip", *command], output.getvalue()


def list_commands(parser: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words of each command and subcommand."""
    yield words
    for action in parser._actions:
        if action is parser._subcommands_action:
            for name, subparser in action.choices.items():
                yield from list_commands(subparser, (*words, name))


def make_images(folder: Path) -> Path:
    """Write images of a coloured square, and a CSV file with two captions of each. Return the CSV file."""
    from PIL import Image

    rows = [("image", "caption")]
    for colour in COLOURS:
        for background in BACKGROUNDS:
            name, image = f"{colour}-{background}.png", Image.new("RGB", (48, 48), background)
            image.paste(colour, (12, 12, 36, 36))
            image.save(folder / name)
            for caption in (f"a {colour} square on {background} paper", f"{background} paper with a {colour} square"):
                rows.append((name, caption))
    with (folder / "captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "captions.csv"


def make_llm(folder: Path) -> None:
    """Save a random LLM and a tokenizer with one token per byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    symbols = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    sizes = {"vocab_size": len(symbols), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**sizes, num_attention_heads=4, pad_token_id=0, eos_token_id=0)
    LlamaModel(config).save_pretrained(folder)


def make_tower(folder: Path) -> None:
    import timm

    timm.models.save_for_hf(timm.create_model("test_vit"), folder, model_args={}, safe_serialization=True)


def run(*command: str, status: int = 0) -> str:
    """Run a command of the installed package and check its exit status. Return its output."""
    program = Path(sys.executable).with_name("llm2clip")
    print("$ llm2clip", *command, flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LLM2CLIP_CACHE": "cache"}
    environment.pop("PYTHONPATH", None)  # it could lead to the clone
    result = subprocess.run(
        [program, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    assert result.returncode == status, result.stdout
    return result.stdout


def check_commands(folder: Path) -> None:
    """Train a tiny model, index the images, search them, and export the model."""
    captions = make_images(folder)
    make_llm(folder / "llm")
    make_tower(folder / "tower")
    assert "tower:" in run("configs", "cpu")
    run("doctor", "--offline")
    settings = ["--encoder.path", "llm", "--tune.steps", "2", "--align.tower", "tower", "--align.epochs", "1"]
    run("fit", str(captions), "--out", "run", *settings, "--align.workers", "0")
    assert "R@1" in Path("run/report.html").read_text()
    index = ["index", str(captions), "--model", "run/model", "--out", "index"]
    install = "pip install 'llm2clip[search]'"
    assert install in run(*index, status=1)
    subprocess.run([sys.executable, "-m", *shlex.split(install), "--quiet"], check=True)
    run(*index)
    hits = run("search", "index", "a red square on gold paper", "--top", "3", "--show_weak", "--no_group")
    assert hits.count(".png") == 3 and "not calibrated" not in hits, hits
    run("export", "run/model", "--to", "transformers", "--out", "exported")


if __name__ == "__main__":
    assert not PACKAGE.is_relative_to(REPOSITORY / "src"), f"{PACKAGE} is not an installed package"
    check_distributions()
    check_help()
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        check_commands(Path(work))
