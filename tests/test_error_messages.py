"""What a clumsy user gets: for each mistake a message that names what is wrong, and what to do. None is a traceback."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import make_llm
from llm2clip.cli import main
from search_fixtures import make_model

FIT = "fit {data} --out {tmp}/run --encoder.path {llm} --align.tower timm:test_vit --align.pretrained false"
ALIGN = "align {data} --store {store} --out {tmp}/run --encoder.path {llm} --align.tower timm:test_vit"
MISTAKES = {
    # paths and sources
    "a file that is not there": ("fit {folder}/capions.jsonl --out {tmp}/run", "no such file", "did you mean"),
    "a folder of nothing": ("fit {tmp}/empty --out {tmp}/run", "without images", "can be read"),
    "an unknown kind of file": ("fit {tmp}/notes.docx --out {tmp}/run", "unknown format", "can be read"),
    "a column that is not there": (
        FIT + " --columns {{'captions': 'caption'}}", "no column 'caption'", "it has", "did you mean captions",
    ),
    "no captions": ("embed {tmp}/none.csv --out {tmp}/s --encoder.path {llm}", "no column of captions", "columns: {"),
    "a split that is not there": ("fit {data}@trian --out {tmp}/run", "no record", "its splits: ", "train"),
    "broken JSON": ("embed {tmp}/broken.jsonl --out {tmp}/s --encoder.path {llm}", "malformed row", "row 2", "mend"),
    "a quote that stays open": (
        "embed {tmp}/open.csv --out {tmp}/s --encoder.path {llm}", "open.csv", "line 2", "not closed",
    ),
    "images that are gone": (
        "fit {tmp}/gone.jsonl --out {tmp}/run", "missing image", "gone.jsonl, row 1", "max_skipped",
    ),
    "nothing to type": ("", "VERB"),
    # words of the command
    "a verb that there is not": ("trian {data}", "trian", "fit", "tune"),
    "an option that there is not": ("fit {data} --out {tmp}/run --align.epoch 3", "align.epoch", "--help"),
    "another verb's option": ("embed {data} --out {tmp}/s --align.epochs 3", "align.epochs", "--help"),
    "a word for a number": ("fit {data} --out {tmp}/run --align.epochs many", "align.epochs", "many", "float"),
    "no place for the result": ("fit {data}", "out", "required"),
    "a file of settings that is not there": (
        "fit {data} --out {tmp}/run --config {tmp}/no.yaml", "no.yaml", "No such file",
    ),
    "a file of settings that is no YAML": ("fit {data} --out {tmp}/run --config {tmp}/bad.yaml", "bad.yaml", "line 2"),
    "a setting misspelt in a file": ("fit {data} --out {tmp}/run --config {tmp}/typo.yaml", "tune.stpes", "--help"),
    "no epochs": (FIT + " --align.epochs 0", "--align.epochs is above 0, not 0"),
    "a negative batch": (FIT + " --tune.batch_size -4", "--tune.batch_size is 1 or more, not -4"),
    "a temperature of nothing": (FIT + " --tune.temperature 0", "--tune.temperature is above 0"),
    "settings that contradict each other": (FIT + " --align.cache_features true", "--align.tower_lr 0"),
    # data that do not suffice
    "a batch larger than the data": (FIT + " --align.batch_size 5000", "batch of 5000", "--align.batch_size"),
    "captions that cannot pair": (
        "fit {tmp}/one.jsonl --out {tmp}/run --encoder.path {llm} --align.batch_size 4", "--tune.steps 0",
    ),
    # models
    "a model that is not there": ("evaluate {tmp}/nomodel {data}", "nomodel", "neither a folder here nor"),
    "a tower that is not there": (
        ALIGN.replace("timm:test_vit", "./towr") + " --align.batch_size 4", "./towr", "neither a folder here nor",
    ),
    "our model for a tower": (
        ALIGN.replace("timm:test_vit", "{model}") + " --align.batch_size 4", "model folder of ours", "--to vision",
    ),
    "a language model for a model": ("evaluate {llm} {data}", "not 'llm2clip'"),
    "a template without a caption": (
        "embed {data} --out {tmp}/s --encoder.path {llm} --encoder.template hello", "{caption}",
    ),
    "more layers than there are": ("embed {data} --out {tmp}/s --encoder.path {llm} --encoder.layers 99", "99", "3"),
    "a way of pooling that there is not": (
        "embed {data} --out {tmp}/s --encoder.path {llm} --encoder.pooling median", "median", "mean",
    ),
    "damaged weights": ("search {tmp}/badindex dog --model {tmp}/damaged", "model.safetensors", "damaged"),
    # stores
    "a store of another encoder": (
        ALIGN.replace("{llm}", "{other}"), "another encoder", "weights",
    ),
    "a store that is not there": (
        "align {data} --store {tmp}/nostore --out {tmp}/run --encoder.path {llm}", "nostore", "llm2clip embed",
    ),
    "captions that the store lacks": (
        ALIGN.replace("{data}", "{tmp}/more.jsonl@train") + " --align.pretrained false --align.batch_size 1",
        "no vector for the caption 'never embedded'", "run `llm2clip embed`",
    ),
    "a damaged store": ("store verify {tmp}/damagedstore", "damaged", "store repair"),
    "no form to export a store in": ("store export {store}", "--parquet FILE or --tars"),
    # evaluation
    "a benchmark that there is not": ("evaluate {model} --benchmarks flickr31k", "flickr31k", "there are flickr30k"),
    "a benchmark that is not here": ("evaluate {model} --benchmarks docci --root {tmp}", "docci", "It takes"),
    "nothing to evaluate": ("evaluate {model}", "--benchmarks", "--captions"),
    "captions of a file of vectors": ("evaluate {tmp}/v.npz {data} --captions {data}", "v.npz", "leave out --captions"),
    "half of the sources with splits": ("evaluate {model} {data}@val {folder}", "of all sources or of none"),
    "a claim that there is not": ("reproduce {folder} --claims 9", "no claim 9", "1, 2"),
    # search
    "an index that is not there": ("search {tmp}/noindex dog", "noindex is no index", "llm2clip index"),
    "a date that is none": ("search {tmp}/noindex dog --after yesterday", "yesterday"),
    "a server of nothing": ("serve", "--index", "--model"),
    # exports, plans, llava
    "an export onto something": ("export {model} --to vision --out {tmp}", "there already", "another"),
    "a form that there is not": ("export {model} --to tflite --out {tmp}/x", "tflite", "onnx"),
    "a device that is not known": ("plan --images 10 --device gtx1080", "gtx1080", "h100", "--tflops"),
    "too large a share": ("plan --images 10 --device h100 --mfu 40", "--mfu", "at most 1"),
    "no conversations": ("llava train {llm} --out {tmp}/run", "no conversations"),
    "a benchmark of llava that there is not": ("llava evaluate {llm} --benchmarks vqa --out {tmp}/e", "vqav2"),
    # folders
    "another setting in a run's folder": (
        FIT + " --align.seed 7", "begun with other settings", "align.seed", "another --out",
    ),
    "a file where a folder is to be": (FIT.replace("{tmp}/run", "{tmp}/notes.docx/run"), "notes.docx"),
}  # fmt: skip


@pytest.fixture(scope="module")
def things(pictures: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("things")
    found = {"folder": pictures, "data": pictures / "captions.jsonl", "llm": llm, "other": make_llm(root / "o", seed=5)}
    found["model"], found["store"] = make_model(root), root / "store"
    command = ["embed", str(found["data"]), "--out", str(found["store"]), "--encoder.path", str(llm)]
    assert main(command) == 0
    return found


@pytest.fixture
def tmp(things: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of things that are not as they should be."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LLM2CLIP_TRACEBACK", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "none.csv").write_text("image,price\na.jpg,3\n")
    (tmp_path / "broken.jsonl").write_text('{"captions": ["a", "b"]}\n{"captions": ["a", \n')
    (tmp_path / "open.csv").write_text('image,caption\na.jpg,"a dog\nb.jpg,a cat\n')
    rows = ({"image": f"{n}.jpg", "captions": ["a", "b"]} for n in range(9))
    (tmp_path / "gone.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bad.yaml").write_text("tune: [\n")
    (tmp_path / "typo.yaml").write_text("tune:\n  stpes: 3\n")
    image = str(things["folder"] / "0.png")
    ones = ({"image": str(things["folder"] / f"{n}.png"), "captions": [f"only {n}"]} for n in range(20))
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ones))
    more = {"image": image, "captions": ["never embedded", "nor this"], "split": "train"}
    (tmp_path / "more.jsonl").write_text(json.dumps(more) + "\n")
    np.savez(tmp_path / "v.npz", images=np.zeros((1, 2)))
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_message_names_what_is_wrong_and_what_to_do(
    mistake: str, things: dict[str, Path], tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line, *expected = MISTAKES[mistake]
    if "damagedstore" in line:
        shutil.copytree(things["store"], tmp / "damagedstore")
        with (tmp / "damagedstore/embeddings-00000.npy").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
    if "badindex" in line:
        shutil.copytree(things["model"], tmp / "damaged")
        (tmp / "damaged/model.safetensors").write_bytes(b"version https://git-lfs")
        assert (
            main(["index", str(things["folder"]), "--model", str(things["model"]), "--out", str(tmp / "badindex")]) == 0
        )
    if "align.seed 7" in line:
        (tmp / "run/tune").mkdir(parents=True)
        (tmp / "run/align/checkpoints").mkdir(parents=True)
        (tmp / "run/config.yaml").write_text("align: {seed: 0}\n")
    capsys.readouterr()
    words = [word.format(tmp=tmp, **things) for word in line.split()]
    words = [w if "{'" not in w else "{'captions':'caption'}" for w in words]
    try:
        status = main([w for w in words if w != "'caption'}"])
    except SystemExit as error:
        status = error.code
    said = "".join(capsys.readouterr())
    assert status not in (0, None), said
    for part in expected:
        assert part in said, f"{part!r} is not in: {said[-1500:]}"
    assert "Traceback" not in said and not re.search(r"\b(KeyError|TypeError|AttributeError)\b", said)
