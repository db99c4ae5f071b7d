"""Tests of the lmms-eval model class on a local task. Skipped if lmms-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip.data.image_refs import FileImage
from llm2clip.llava.build import build_llava
from llm2clip.llava.generate import AnswerGenerator
from llm2clip.llava.tasks import Question
from test_export import hf_tower

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

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
generation_kwargs: {{max_new_tokens: 6, do_sample: false}}
process_results: !function utils.results
metric_list:
  - metric: answer
    aggregation: !function utils.join
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, llm: Path) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return build_llava(hf_tower(folder, "clip_vision_model"), str(llm), folder / "built")


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


def test_lmms_model_answers_like_answer_generator(model: Path, image_folder: Path, tmp_path: Path) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llm2clip.llava.lmms import MANIFEST, LmmsModel

    assert MANIFEST.simple_class_path == f"{LmmsModel.__module__}.{LmmsModel.__qualname__}"
    rows = write_task(tmp_path / "tasks", image_folder)
    output = simple_evaluate(
        model=LmmsModel(str(model), "cpu", 2, "fp32"),
        tasks=["local_task"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        log_samples=False,
        bootstrap_iters=0,
    )
    questions = [Question(str(n), FileImage(row["image_path"]), row["question"]) for n, row in enumerate(rows)]
    expected = dict(AnswerGenerator(str(model), "cpu", "fp32", 2).generate(questions, 6))
    metrics = output["results"]["local_task"]
    (answers,) = [value for name, value in metrics.items() if name.partition(",")[0] == "answer"]
    assert answers == " | ".join(str(expected[n]) for n in range(5))


def test_lmms_model_loglikelihood_matches_score_answers(model: Path, image_folder: Path) -> None:
    from PIL import Image

    from llm2clip.llava.lmms import LmmsModel

    lmms_model = LmmsModel(str(model), "cpu", 2, "fp32")
    path = image_folder / "1.png"
    lmms_model.task_dict = {"task": {"test": {0: {"image_path": path}}}}
    request = SimpleNamespace(args=("Is it?", "Yes", lambda doc: [Image.open(doc["image_path"])], 0, "task", "test"))
    ((log_likelihood, is_greedy),) = lmms_model.loglikelihood([request])
    question = Question("", FileImage(str(path)), "Is it?")
    scores = AnswerGenerator(str(model), "cpu", "fp32").score_answers(question, ["Yes"])
    assert scores is not None
    assert log_likelihood == pytest.approx(float(scores[0, 0]), abs=1e-4)
    assert is_greedy is bool(scores[0, 1] == scores[0, 2])
