"""Tests of answers and log-likelihoods of LLaVA models, alone and in lmms-eval (skipped if it is not installed)."""

import json
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
from llm2clip.llava.dataset import IGNORE_INDEX, tokenize_and_label
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
        labeled = tokenize_and_label(conversation, generator.tokenizer, generator.num_image_tokens)
        labels = torch.tensor([labeled.labels])
        with torch.no_grad():
            loss = float(generator.model(input_ids=torch.tensor([labeled.ids]), labels=labels, **inputs).loss)
        num_tokens = int((labels != IGNORE_INDEX).sum())
        score = generator.score_answer(question, "No, never")
        assert score[0] == pytest.approx(-num_tokens * loss, rel=1e-4)
        assert score[1] is False

    def predict_the_next_token(input_ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=F.one_hot(input_ids.roll(-1, 1), len(generator.tokenizer)).float())

    generator.model = predict_the_next_token
    assert generator.score_answer(Question(None, "Q"), "No, never")[1] is True


# ---- lmms-eval ------------------------------------------------------------------------------------------------------

QUESTIONS = ("Is it red?", "What colour has the middle of it, would you say?", "Is it?")
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["image_path"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, answers):
    return {"answer": answers[0], "correct": 1.0}

def join(items):
    return " | ".join(items)
"""
TASK_YAML = """
task: local_task
dataset_path: json
dataset_kwargs:
  data_files: {{test: {rows}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 6, num_beams: 2, do_sample: false}}
process_results: !function utils.results
metric_list:
  - metric: answer
    aggregation: !function utils.join
    higher_is_better: true
"""


def write_task(folder: Path, image_folder: Path) -> list[dict[str, Any]]:
    """Write a task with five questions for lmms-eval; return its rows."""
    rows = []
    for n in range(5):
        rows.append({"image_path": str(image_folder / f"{n}.png"), "question": QUESTIONS[n % 3], "answer": "yes"})
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(UTILS)
    (folder / "local_task.yaml").write_text(TASK_YAML.format(rows=folder / "rows.jsonl"))
    return rows


def test_lmms_model_answers_like_answer_generator(built: Path, image_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llm2clip.llava.lmms import MANIFEST, LmmsModel

    assert MANIFEST.simple_class_path == f"{LmmsModel.__module__}.{LmmsModel.__qualname__}"
    rows = write_task(tmp_path / "tasks", image_folder)
    output = simple_evaluate(
        model=LmmsModel(str(built), "cpu", 2, "fp32"),
        tasks=["local_task"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        log_samples=False,
        bootstrap_iters=0,
    )
    questions = [Question(load_pixels(image_folder, n), row["question"]) for n, row in enumerate(rows)]
    expected = AnswerGenerator(str(built), "cpu", "fp32", 2).generate(questions, 6, num_beams=2)
    metrics = output["results"]["local_task"]
    (answers,) = [value for name, value in metrics.items() if name.partition(",")[0] == "answer"]
    assert answers == " | ".join(expected)


def test_lmms_model_loglikelihood_matches_score_answer(built: Path, image_folder: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from llm2clip.llava.lmms import LmmsModel

    lmms_model = LmmsModel(str(built), "cpu", 2, "fp32")
    path = image_folder / "1.png"
    lmms_model.task_dict = {"task": {"test": {0: {"image_path": path}}}}
    request = SimpleNamespace(args=("Is it?", "Yes", lambda doc: [Image.open(doc["image_path"])], 0, "task", "test"))
    question = Question(load_pixels(image_folder, 1), "Is it?")
    expected = AnswerGenerator(str(built), "cpu", "fp32").score_answer(question, "Yes")
    assert lmms_model.loglikelihood([request]) == [expected]
