"""Error messages of the command line: each names what is wrong and what to do, and none is a traceback."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import make_llm
from llm2clip import cli
from llm2clip.cli import main
from search_fixtures import make_model

FIT = "fit {data} --out {tmp}/run --encoder.path {llm} --align.tower {tower}"
ALIGN = "align {data} --store {store} --out {tmp}/run --encoder.path {llm} --align.tower {tower}"
ERRORS = {
    # paths and sources
    "missing file": ("fit {folder}/capions.jsonl --out {tmp}/run", "no such file", "did you mean"),
    "empty folder": ("fit {tmp}/empty --out {tmp}/run", "contains no images", "supported formats"),
    "video": ("index {tmp}/clip.mp4 --model {model} --out {tmp}/i", "unknown format; videos are not supported"),
    "unknown file format": ("fit {tmp}/notes.docx --out {tmp}/run", "unknown format", "supported formats"),
    "missing column": (
        FIT + " --columns captions=caption", "no column 'caption'", "the file has", "did you mean captions",
    ),
    "no caption column": (
        "embed {tmp}/none.csv --out {tmp}/s --encoder.path {llm}",
        "no caption column; the file has the columns image, price", "--columns",
    ),
    "images without captions": ("fit {tmp}/photos --out {tmp}/run", "the images have no captions", "--caption MODEL"),
    "missing split": ("fit {data}@trian --out {tmp}/run", "no record", "rows per split: ", "train"),
    "invalid JSON": (
        "embed {tmp}/broken.jsonl --out {tmp}/s --encoder.path {llm}",
        "malformed row", "row 2", "Fix the source",
    ),
    "unclosed quote": (
        "embed {tmp}/open.csv --out {tmp}/s --encoder.path {llm}", "open.csv", "line 2", "not closed",
    ),
    "missing images": (
        "fit {tmp}/gone.jsonl --out {tmp}/run", "missing image: {tmp}/0.jpg", "gone.jsonl, row 1", "the caption file",
    ),
    "group without a command": ("store", "a COMMAND is missing", "verify, repair"),
    # arguments
    "unknown command": ("fti {data}", "llm2clip: no command 'fti' (did you mean fit?). Commands: doctor"),
    "unknown subcommand": ("llava tran", "llm2clip llava: no command 'tran' (did you mean train?)"),
    "unknown flag": (
        "fit {data} --out {tmp}/run --align.lrr 3", "unknown argument --align.lrr (did you mean --align.lr?)",
    ),
    "name of the setting in transformers": (
        "fit {data} --out {tmp}/run --align.learning_rate 1",
        "unknown argument --align.learning_rate (did you mean --align.lr?)",
    ),
    "URL as a captioning model": ("caption {data} --out {tmp}/x.jsonl --model http://x/v1", "Pass the URL to"),
    "runs of a missing folder": ("runs {tmp}/missing", "missing: no such folder"),
    "file as an index": ("search {folder}/captions.jsonl dog", "is not an index", "--out INDEX"),
    "flag without its stage": ("fit {data} --out {tmp}/run --lr=3", "--lr (did you mean --tune.lr or --align.lr?)"),
    "flag that is like no other": ("plan --foo", "llm2clip plan: unknown argument --foo\n"),
    "flag of another command": (
        "embed {data} --out {tmp}/s --align.epochs 3", "--align.epochs", "llm2clip embed --help",
    ),
    "text instead of a number": (FIT + " --align.epochs many", "--align.epochs must be a number (got many)"),
    "value not in a list": (FIT + " --align.loss mse", "--align.loss must be one of infonce, sigmoid (got mse)"),
    "value of no allowed type": (FIT + " --align.logit_scale x", "must be a number or one of inherit (got x)"),
    "fraction above 1": (
        "embed {data} --out {tmp}/s --max_skipped 5", "--max_skipped must be a number between 0 and 1",
    ),
    "negative length": (
        "search {tmp}/noindex dog --min_side -5", "--min_side must be an integer of at least 1 (got -5)",
    ),
    "port out of range": (
        "serve {tmp} --port 99999", "--port must be an integer between 0 and 65535 (got 99999)",
    ),
    "columns without a name": (
        "embed {data} --out {tmp}/s --columns text", "--columns must be of the form field=column",
    ),
    "missing arguments": ("fit", "llm2clip fit: required arguments are missing: DATA, --out"),
    "missing config file": ("fit {data} --out {tmp}/run --config {tmp}/no.yaml", "no.yaml", "no such file"),
    "unknown config": (
        "fit {data} --out {tmp}/run --config cpuu", "cpuu: no such file", "(did you mean cpu?)", "llama-3.2-1b",
    ),
    "invalid YAML": ("fit {data} --out {tmp}/run --config {tmp}/bad.yaml", "bad.yaml: line 2: not valid YAML"),
    "config file without settings": ("fit {data} --out {tmp}/run --config {tmp}/list.yaml", "list.yaml: the file"),
    "section without settings": ("fit {data} --out {tmp}/run --config {tmp}/section.yaml", "section.yaml: align must"),
    "unknown setting in a config file": (
        "fit {data} --out {tmp}/run --config {tmp}/typo.yaml",
        "typo.yaml: unknown setting tune.stpes (did you mean tune.steps?)",
    ),
    "text instead of a number in a config file": (
        "fit {data} --out {tmp}/run --config {tmp}/text.yaml", "text.yaml: align.epochs must be a number (got many)",
    ),
    "zero epochs": (FIT + " --align.epochs 0", "--align.epochs must be greater than 0 (got 0.0)"),
    # too little data
    "one image": (
        "fit {tmp}/single.jsonl --out {tmp}/run --encoder.path {llm} --align.tower {tower}",
        "too few images to train on", "needs at least 2 images that are not held out, but the data has 0",
    ),
    "wrong image column": (
        "evaluate {model} {tmp}/wrong.csv", "no image column", "the file has the columns img_file, sentence",
        "--columns image=img_file",
    ),
    "one caption per image": (
        "fit {tmp}/one.jsonl --out {tmp}/run --encoder.path {llm} --align.tower {tower} --align.batch_size 4",
        "no image has two different captions", "--tune.steps 0",
    ),
    # models
    "config as model": ("index {folder} --model tower-openai-b16 --out {tmp}/i", "tower-openai-b16 is a config, not"),
    "missing model": ("evaluate {tmp}/nomodel {data}", "nomodel", "neither a folder nor"),
    "missing tower": (
        ALIGN.replace("{tower}", "./towr") + " --align.batch_size 4", "./towr", "neither a folder nor",
    ),
    "llm2clip model as tower": (
        ALIGN.replace("{tower}", "{model}") + " --align.batch_size 4", "is an llm2clip model", "--to vision",
    ),
    "LLM folder as model": ("evaluate {llm} {data}", "must be 'llm2clip'"),
    "damaged weights": ("search {tmp}/badindex dog --model {tmp}/damaged", "model.safetensors", "corrupt"),
    # stores
    "store of another encoder": (
        ALIGN.replace("{llm}", "{other}"), "different encoder", "weights",
    ),
    "missing store": (
        "align {data} --store {tmp}/nostore --out {tmp}/run --encoder.path {llm}", "nostore", "llm2clip embed",
    ),
    "captions missing from the store": (
        ALIGN.replace("{data}", "{tmp}/more.jsonl@train") + " --align.batch_size 2",
        "no embedding for the caption 'never embedded'", "Run `llm2clip embed`",
    ),
    "damaged store": ("store verify {tmp}/damagedstore", "corrupt", "store repair"),
    # evaluation
    "unknown benchmark": ("evaluate {model} --benchmarks flickr31k", "flickr31k", "choose from flickr30k"),
    "benchmark not downloaded": ("evaluate {model} --benchmarks docci --root {tmp}", "docci", "Required files"),
    "nothing to evaluate": ("evaluate {model}", "--benchmarks", "--captions"),
    "CRA of precomputed embeddings": ("evaluate {tmp}/v.npz {data} --captions {data}", "v.npz", "remove --captions"),
    "splits for some sources only": ("evaluate {model} {data}@val {folder}", "for all sources or for none"),
    "short queries without data": ("evaluate --captions {data} --short_queries", "--short_queries needs images"),
    "templates without short queries": ("evaluate {model} {data} --templates a{{}}", "add --short_queries"),
    "template without a placeholder": (
        "evaluate {model} {data} --short_queries --templates photo", "--templates: template 0 ('photo') has no {}",
    ),
    # search
    "serve without index and model": ("serve", "pass an index", "--model"),
    "captions over their source": (
        "caption {tmp}/one.jsonl --out {tmp}/one.jsonl --model {model}", "--out {tmp}/one.jsonl is also the source",
    ),
    # exports, plans, llava
    "push to an incomplete name": ("push {model} me", "must be of the form USER/NAME (got me)"),
    "export to an existing folder": ("export {model} --to vision --out {tmp}", "exists", "another"),
    "unknown export format": ("export {model} --to tflite --out {tmp}/x", "tflite", "onnx"),
    "unknown device": ("plan --images 10 --device gtx1080", "gtx1080", "h100", "--tflops"),
    "MFU above 1": ("plan --images 10 --device h100 --mfu 40", "--mfu", "at most 1"),
    "llava without conversations": ("llava train {llm} --out {tmp}/run", "no conversations"),
    "llava with other columns": (
        "llava train {llm} --instruct {tmp}/none.csv --out {tmp}/r", "no caption column", "image and conversations: [",
    ),
    # folders
    "folder that cannot be created": (
        "fit {data} --out /proc/x/run", "--out /proc/x/run: nothing can be created in /proc",
    ),
    "changed setting in a run directory": (
        FIT + " --align.seed 7", "different settings", "align.seed", "--out",
    ),
    "file in place of a folder": (FIT.replace("{tmp}/run", "{tmp}/notes.docx/run"), "notes.docx"),
}  # fmt: skip


@pytest.fixture(scope="module")
def paths(image_folder: Path, llm: Path, tower: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("paths")
    paths = {"folder": image_folder, "data": image_folder / "captions.jsonl", "llm": llm, "tower": tower}
    paths |= {"other": make_llm(root / "other", seed=5), "model": make_model(root), "store": root / "store"}
    command = ["embed", str(paths["data"]), "--out", str(paths["store"]), "--encoder.path", str(llm)]
    assert main(command) == 0
    return paths


@pytest.fixture
def tmp(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with invalid files of many kinds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM2CLIP_TRACEBACK", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "photos").mkdir()
    shutil.copy(paths["folder"] / "0.png", tmp_path / "photos")
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "clip.mp4").write_text("x")
    (tmp_path / "none.csv").write_text("image,price\na.jpg,3\n")
    (tmp_path / "broken.jsonl").write_text('{"captions": ["a", "b"]}\n{"captions": ["a", \n')
    (tmp_path / "open.csv").write_text('image,caption\na.jpg,"a dog\nb.jpg,a cat\n')
    rows = ({"image": f"{n}.jpg", "captions": ["a", "b"]} for n in range(9))
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.yaml").write_text("tune: [\n")
    (tmp_path / "typo.yaml").write_text("tune:\n  stpes: 3\n")
    (tmp_path / "text.yaml").write_text("align:\n  epochs: many\n")
    (tmp_path / "list.yaml").write_text("- align\n")
    (tmp_path / "section.yaml").write_text("align: 3\n")
    image = str(paths["folder"] / "0.png")
    ones = ({"image": str(paths["folder"] / f"{n}.png"), "captions": [f"only {n}"]} for n in range(20))
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ones))
    more = {"image": image, "captions": ["never embedded", "nor this"], "split": "train"}
    other = {"image": str(paths["folder"] / "1.png"), "captions": ["third", "fourth"], "split": "train"}
    (tmp_path / "more.jsonl").write_text(json.dumps(more) + "\n" + json.dumps(other) + "\n")
    (tmp_path / "single.jsonl").write_text(json.dumps({**more, "split": None}) + "\n")
    (tmp_path / "wrong.csv").write_text("img_file,sentence\n0.png,a dog\n1.png,a cat\n")
    np.savez(tmp_path / "v.npz", images=np.zeros((1, 2)))
    return tmp_path


@pytest.mark.parametrize("case", ERRORS)
def test_error_names_the_problem_and_the_fix(
    case: str, paths: dict[str, Path], tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, *expected = ERRORS[case]
    if "damagedstore" in command:
        shutil.copytree(paths["store"], tmp / "damagedstore")
        with (tmp / "damagedstore/embeddings-00000.npy").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
    if "badindex" in command:
        shutil.copytree(paths["model"], tmp / "damaged")
        (tmp / "damaged/model.safetensors").write_bytes(b"version https://git-lfs")
        assert (
            main(["index", str(paths["folder"]), "--model", str(paths["model"]), "--out", str(tmp / "badindex")]) == 0
        )
    if "align.seed 7" in command:
        (tmp / "run/tune").mkdir(parents=True)
        (tmp / "run/align/checkpoints").mkdir(parents=True)
        (tmp / "run/config.yaml").write_text("embed: {}\nalign: {seed: 0}\n")
    capsys.readouterr()
    words = [word.format(tmp=tmp, **paths) for word in command.split()]
    try:
        status = main(words)
    except SystemExit as error:
        status = error.code
    output = "".join(capsys.readouterr())
    assert status not in (0, None), output
    for part in expected:
        part = part.replace("{tmp}", str(tmp))
        assert part in output, f"{part!r} is not in: {output[-1500:]}"
    assert "1/4 tune" not in output  # no stage has started
    assert "traceback" not in output.lower() and not re.search(r"\b(KeyError|TypeError|AttributeError)\b", output)


def test_ctrl_c_while_the_parser_is_built_is_not_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "build_parser", interrupt)
    assert main(["doctor"]) == 130
    assert "Interrupted" in capsys.readouterr().err
