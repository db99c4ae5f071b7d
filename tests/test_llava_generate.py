"""Tests of answers and log-likelihoods of LLaVA models, alone and through the interface of lmms-eval."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llm2clip.data.images import load_image
from llm2clip.llava.build import build_llava
from llm2clip.llava.conversations import IGNORE_INDEX, tokenize_and_label
from llm2clip.llava.generate import AnswerGenerator, Question
from test_export import hf_tower


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llm: Path) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return build_llava(hf_tower(folder, "clip_vision_model"), str(llm), folder / "built")


def load_pixels(image_folder: Path, n: int) -> np.ndarray:
    return np.array(Image.open(image_folder / f"{n}.png").convert("RGB"))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_does_not_depend_on_the_batch(num_beams: int, built: Path, image_folder: Path) -> None:
    """Each answer equals the one that transformers generates for the question alone."""
    generator = AnswerGenerator(str(built), "cpu", "fp32", batch_size=3)
    questions = [Question(load_pixels(image_folder, n), "What?" * (1 + n % 3)) for n in range(5)]
    questions.append(Question(None, "Hello?"))
    answers = generator.generate(questions, 6, num_beams)
    assert len(answers) == 6
    image_id = generator.tokenizer.convert_tokens_to_ids("<image>")
    for n, question in enumerate(questions):
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        if question.image is not None:
            content.insert(0, {"type": "image", "image": Image.fromarray(question.image)})
        inputs = generator.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0].tolist()
        output = generator.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=num_beams, bad_words_ids=[[image_id]]
        )
        expected = generator.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        assert answers[n] == expected, n


def test_score_answer_matches_the_loss(built: Path, image_folder: Path) -> None:
    generator = AnswerGenerator(str(built), "cpu", "fp32")
    for question in (Question(load_pixels(image_folder, 1), "Is it?"), Question(None, "Q")):
        inputs: dict[str, Any] = {}
        if question.image is not None:
            inputs["pixel_values"] = generator.transform(load_image(question.image))[None]
        conversation = question.to_conversation("No, never")
        labelled = tokenize_and_label(conversation, generator.tokenizer, generator.num_image_tokens)
        labels = torch.tensor([labelled.labels])
        with torch.no_grad():
            loss = float(generator.model(input_ids=torch.tensor([labelled.ids]), labels=labels, **inputs).loss)
        num_tokens = int((labels != IGNORE_INDEX).sum())
        score = generator.score_answer(question, "No, never")
        assert score[0] == pytest.approx(-num_tokens * loss, rel=1e-4)
        assert score[1] is False

    def predict_the_next_token(input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=F.one_hot(input_ids.roll(-1, 1), len(generator.tokenizer)).float())

    generator.model = predict_the_next_token
    assert generator.score_answer(Question(None, "Q"), "No, never")[1] is True


# ---- lmms-eval ------------------------------------------------------------------------------------------------------


class LmmsStub:
    """Base class of lmms-eval's models."""

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}


@pytest.fixture
def lmms_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the lmms-eval model. If lmms-eval is not installed, the two imported classes are replaced."""
    if importlib.util.find_spec("lmms_eval") is None:
        registry = SimpleNamespace(ModelManifest=lambda name, **paths: SimpleNamespace(model_id=name, **paths))
        for name, module in (("api.model", SimpleNamespace(lmms=LmmsStub)), ("models.registry_v2", registry)):
            monkeypatch.setitem(sys.modules, f"lmms_eval.{name}", module)
        for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace(__path__=[]))
    yield importlib.import_module("llm2clip.llava.lmms")
    sys.modules.pop("llm2clip.llava.lmms")


def test_lmms_model_answers_and_scores_like_answer_generator(lmms_module: Any, built: Path, image_folder: Path) -> None:
    model = lmms_module.LmmsModel(str(built), "cpu", 2, "fp32")
    assert lmms_module.MANIFEST.simple_class_path == f"{type(model).__module__}.{type(model).__qualname__}"
    model.task_dict = {"task": {"test": dict(enumerate(range(5)))}}
    generator = AnswerGenerator(str(built), "cpu", "fp32", 2)
    prompts = ["Is it red?", "What colour has the middle of it, would you say?", "Is it?", "Is it red?", "Is it?"]
    questions = [Question(load_pixels(image_folder, n), prompt) for n, prompt in enumerate(prompts)]

    def load(n: int) -> list[Image.Image]:
        return [Image.open(image_folder / f"{n}.png")]

    requests = []
    for n, prompt in enumerate(prompts):
        settings = {"max_new_tokens": 6, "num_beams": 1 + n % 2}
        requests.append(SimpleNamespace(args=(prompt, settings, load, n, "task", "test")))
    expected = [generator.generate([question], 6, 1 + n % 2)[0] for n, question in enumerate(questions)]
    assert model.generate_until(requests) == expected
    end = next(answer for answer in expected if answer)[-1]
    requests[0].args[1]["until"] = [end]
    assert model.generate_until(requests)[0] == expected[0].partition(end)[0].strip()

    request = SimpleNamespace(args=(prompts[1], "Yes", load, 1, "task", "test"))
    assert model.loglikelihood([request]) == [generator.score_answer(questions[1], "Yes")]
    for visuals, message in (
        (["video.mp4"], "videos are not supported"),
        (load(1) * 2, r"at most one image \(got 2\)"),
    ):
        request = SimpleNamespace(args=("Q", "Yes", lambda doc, visuals=visuals: visuals, 1, "task", "test"))
        with pytest.raises(ValueError, match=message):
            model.loglikelihood([request])
