"""Tests of captioning with a model in this process: names of models, sampling, memory and several processes."""

import hashlib
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from caption_fixtures import make_photos
from conftest import run_distributed
from llava_fixtures import build_tiny_llava, load_model
from llm2clip.caption import local
from llm2clip.caption.answers import Answer, CaptionRequest
from llm2clip.caption.local import LocalCaptioner
from llm2clip.caption.prompts import Prompt
from llm2clip.cli import main
from llm2clip.models.hub.loading import name_vision_language_model
from llm2clip.runs.ranks import process_state
from test_caption import read_rows, run_command, write_prompts


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
    monkeypatch.setattr(local, "clean_answer", lambda text, *_: Answer(text))
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


def _caption_on_rank(words: list[str], folder: str) -> None:
    """Run the command twice, and write the requests of this process."""
    prompts = []
    generate = LocalCaptioner._generate

    def record(self: LocalCaptioner, requests: list[CaptionRequest]) -> list[Answer]:
        prompts.extend(request.prompt.name for request in requests)
        return generate(self, requests)

    def accept(text: str, *_: Any) -> Answer:
        number = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Answer(f"A dog number {number} runs over a meadow.", None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalCaptioner, "_generate", record)
        patch.setattr(local, "clean_answer", accept)
        for _ in range(2):
            run_command(*words)
    Path(folder, f"rank{process_state().process_index}").write_text(" ".join(prompts))


def test_two_processes_caption_each_image_once(tmp_path: Path, photos: Path, tiny_llava: Path) -> None:
    out = tmp_path / "out.jsonl"
    file = write_prompts(
        tmp_path / "prompts.yaml",
        one={"kind": "short", "text": "Describe.", "samples": 2, "max_tokens": 9, "temperature": 1.0},
        two={"kind": "dense", "text": "Describe all.", "max_tokens": 9, "temperature": 1.0},
    )
    words = ["caption", photos, "--model", tiny_llava, "--prompts", file, "--out", out, "--batch_size", 2]
    run_distributed(2, _caption_on_rank, list(map(str, words)), str(tmp_path))
    prompts = [(tmp_path / f"rank{rank}").read_text().split() for rank in range(2)]
    assert sorted(prompts[0] + prompts[1]) == ["one"] * 12 + ["two"] * 6
    assert prompts[0] and prompts[1]
    rows = read_rows(out)
    assert [row["image"] for row in rows] == [f"photos/{number:04}.png" for number in range(6)]
    assert all(len(row["captions"]) == 2 and len(row["long_captions"]) == 1 for row in rows)
    assert len({caption for row in rows for caption in row["captions"]}) == 12
