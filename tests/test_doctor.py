"""Whether an environment is fit: what is there, what is amiss, and what to do then."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from llm2clip.cli import main
from llm2clip.tools import doctor


def test_a_healthy_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--offline", "--out", str(tmp_path / "new" / "runs")]) == 0
    said = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in said and "float64's" in said
    assert str(tmp_path) in said and "Nothing is in the way." in said


def test_versions_outside_their_ranges() -> None:
    assert doctor.version_problem(Requirement("torch>=2.6")) is None
    assert doctor.version_problem(Requirement("torch<2")) == f"torch {metadata.version('torch')} is not <2"
    assert doctor.version_problem(Requirement("no-such-package>=1")) == "no-such-package is missing"
    base = {one.name for one in doctor.requirements()[""]}
    assert {"torch", "transformers", "timm"} <= base and "fastapi" not in base


def test_what_is_amiss_is_named_with_a_way_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = {
        "": [Requirement("torch<2")],
        "search": [Requirement("no-such-package")],
        "dev": [Requirement("nor-this")],
    }
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    (tmp_path / "file").touch()
    assert main(["doctor", "--offline", "--out", str(tmp_path / "file" / "runs")]) == 1
    said = capsys.readouterr().err
    assert "is not <2" in said and "pip install -U llm2clip" in said
    assert "no-such-package is missing" in said and "llm2clip[search]" in said and "nor-this" not in said
    assert f"{tmp_path / 'file'} takes no files" in said and "2 of" in said


def test_a_wrong_gradient_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.train import losses

    right = losses.info_nce
    assert doctor.check_gradient(torch.device("cpu")).verdict == "ok"
    monkeypatch.setattr(losses, "info_nce", lambda image, text, scale, gather: 2 * right(image, text, scale))
    assert doctor.check_gradient(torch.device("cpu")).verdict == "bad"


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (check,) = doctor.check_hub()
    assert check.verdict == "note" and "HF_ENDPOINT" in check.do
