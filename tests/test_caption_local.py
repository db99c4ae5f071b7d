"""Tests of captioning with a model in this process: names of models, sampling, memory and several processes."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from caption_fixtures import make_photos
from llava_fixtures import build_tiny_llava, load_model
from llm2clip.caption import captioners
from llm2clip.caption.answers import Answer, CaptionRequest
from llm2clip.caption.captioners import LocalCaptioner
from llm2clip.caption.options import Prompt
from llm2clip.cli import main
from llm2clip.models.loading import name_vision_language_model


@pytest.fixture(scope="module")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return make_photos(tmp_path / "photos", 6)


def test_sampled_answers_differ_between_processes_and_retries(
    tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new process starts with PyTorch's default seed."""
    monkeypatch.setattr(captioners, "clean_answer", lambda text, *_: Answer(text))
    prompt = Prompt("a", "short", "Describe it.", temperature=1.0, max_tokens=10)
    answers = []
    for _ in range(2):
        torch.manual_seed(0)
        captioner = LocalCaptioner(str(tiny_llava), 4)
        image = captioner.prepare(torch.zeros(3, 40, 60, dtype=torch.uint8))
        answers.append(captioner.ask([CaptionRequest(image, prompt)] * 4))
    assert answers[0] != answers[1]


def test_names_of_local_models_depend_on_their_files_and_not_on_their_location(
    tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = LocalCaptioner(str(tiny_llava), 4).name
    assert re.fullmatch(r"built-[0-9a-f]{8}", name)
    copy = shutil.copytree(tiny_llava, tmp_path / "other/built/model")  # named after the run's folder
    assert LocalCaptioner(str(copy), 4, precision="fp32").name == name

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub/models--org--built"
    shutil.copytree(tiny_llava, repository / "snapshots/1")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("1")
    assert name_vision_language_model("org/built") == name

    model, _ = load_model(copy)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias[0] += 1
    model.save_pretrained(copy)
    retrained = LocalCaptioner(str(copy), 4).name
    assert retrained != name
    (copy / "chat_template.jinja").write_text((copy / "chat_template.jinja").read_text() + "Answer:")
    assert name_vision_language_model(str(copy)) not in (name, retrained)


def test_out_of_memory_error_names_the_settings_that_need_less(
    tmp_path: Path,
    photos: Path,
    tiny_llava: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def generate(*_: Any) -> list[Answer]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(LocalCaptioner, "_generate", generate)
    words = ["caption", photos, "--model", tiny_llava, "--out", tmp_path / "out.jsonl", "--batch_size", 4]
    assert main(list(map(str, words))) == 1
    message = capsys.readouterr().err
    assert "4 images at a time do not fit in the memory of the" in message and "Traceback" not in message
    assert "a lower --batch_size, or with a lower --image_size" in message
