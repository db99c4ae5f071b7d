"""Tests of the checks of output folders."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from llm2clip.cli import main
from llm2clip.cli.checks import KINDS, check_output_folder, detect_folder_kind
from llm2clip.config import (
    AlignConfig,
    DistillConfig,
    EncoderConfig,
    EvaluateConfig,
    FitConfig,
    TuneConfig,
)
from llm2clip.llava import LlavaConfig
from llm2clip.runs.output_folder import (
    RUN_LOCK,
    FormatVersionError,
    check_format_version,
    hold_folder_lock,
    save_or_check_config,
)

RUN_CONFIGS: dict[str, dict[str, Any]] = {
    "fit": {"data": ["d"], **dataclasses.asdict(FitConfig())},
    "tune": {"data": ["d"], "columns": {}, "encoder": EncoderConfig(), "tune": TuneConfig()},
    "align": {"data": ["d"], "store": "s", "encoder": EncoderConfig(), "align": AlignConfig()},
    "distill": {"model": "m", "data": ["d"], "student": "s", "evaluate": EvaluateConfig(), "distill": DistillConfig()},
    "llava": {"model": "m", "pretrain": ["d"], "llava": LlavaConfig()},
}
MARKERS = {
    "index": "index.sqlite",
    "store": "keys-00000.parquet",
    "evaluation": "results.json",
    "model": "config.json",
}


def make_folder(kind: str, folder: Path) -> Path:
    """Create a folder with the first file that a command of this kind writes, and with a log."""
    folder.mkdir()
    (folder / "skipped.jsonl").touch()
    if kind in RUN_CONFIGS:
        save_or_check_config(RUN_CONFIGS[kind], folder)
    else:
        (folder / MARKERS[kind]).touch()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_output_folder_must_be_of_the_same_kind(kind: str, tmp_path: Path) -> None:
    folder = make_folder(kind, tmp_path / "out")
    assert detect_folder_kind(folder) == kind
    check_output_folder(folder, kind)
    for other in KINDS:
        if other != kind:
            with pytest.raises(ValueError, match=f"is {KINDS[kind]}, not {KINDS[other]}. Pass a new or empty folder"):
                check_output_folder(folder, other)


@pytest.mark.parametrize("name", ["captions.csv", "a.JPG", "sub/a.jpg", "00000.tar"])
def test_output_folder_must_not_contain_data(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind in KINDS:
        check_output_folder(out, kind)  # does not exist
    (out / name).parent.mkdir(parents=True)
    (out / "log.txt").touch()
    for kind in KINDS:
        check_output_folder(out, kind)
    (out / name).touch()
    for kind in KINDS:
        with pytest.raises(ValueError, match=rf"already contains data, such as {name}"):
            check_output_folder(out, kind)
    with pytest.raises(NotADirectoryError, match="is a file"):
        check_output_folder(out / name, "fit")


@pytest.mark.parametrize(
    ("command", "kind", "message"),
    [
        ("index DATA --model M --out OUT", "store", "OUT is an embedding store, not an index"),
        ("fit DATA --out OUT", "tune", "`llm2clip tune`, not a run directory of `llm2clip fit`"),
        ("tune DATA --out OUT", "store", "not a run directory of `llm2clip tune`"),
        ("embed DATA --out OUT", "tune", "not an embedding store"),
        ("align DATA --store S --out OUT", "fit", "not a run directory of `llm2clip align`"),
        ("evaluate M DATA --out OUT", "model", "not an output folder of `llm2clip evaluate`"),
        ("store merge S --out OUT", "index", "not an embedding store"),
        ("llava train M --out OUT", "align", "not a run directory of `llm2clip llava train`"),
        ("quickstart --out OUT", "align", "not a run directory of `llm2clip fit`"),
    ],
)
def test_commands_reject_output_folders_of_another_kind(
    command: str, kind: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = make_folder(kind, tmp_path / "OUT")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main([str(out) if part == "OUT" else part for part in command.split()]) == 1
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("command", ["fit", "tune", "embed"])
def test_second_run_changes_no_file(
    command: str, llm: Path, tower: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = command.replace("embed", "store")
    out = make_folder(kind, tmp_path / "out")
    (out / "skipped.jsonl").write_text("{}\n")
    arguments = [command, str(image_folder / "captions.jsonl"), "--out", str(out), "--encoder.path", str(llm)]
    if command == "fit":
        arguments += ["--align.tower", str(tower)]
    with hold_folder_lock(out, RUN_LOCK):
        before = {path: path.read_bytes() for path in out.iterdir()}
        assert main(arguments) == 1
        assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert "another run is writing to" in capsys.readouterr().err
    (out / RUN_LOCK).unlink(missing_ok=True)
    (out / RUN_LOCK).mkdir()
    assert main(arguments) == 1
    assert f"cannot lock {out / RUN_LOCK} (Is a directory)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (2, "f has format version 2, but .* reads only format version 3. Build it again"),
        (4, "f has format version 4, but .* reads only format version 3. Update llm2clip"),
        (None, "f has no format version, but .* reads only format version 3. Build it again"),
        ("3", "f has format version 3, but"),
        (3.0, "f has format version 3.0, but"),
    ],
)
def test_format_version_must_be_supported(version: object, message: str) -> None:
    check_format_version("f", 3, 3, "Build it again")
    with pytest.raises(FormatVersionError, match=message):
        check_format_version("f", version, 3, "Build it again")
