"""A multimodal model inside lmms-eval, where it is installed: a local task, answered as our own evaluation does."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llm2clip.data.image_refs import FileImage
from llm2clip.llava.build import build_llava
from llm2clip.llava.generate import Generator
from llm2clip.llava.tasks import Question
from test_export import hf_tower

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")

QUESTIONS = ("Is it red?", "What colour has the middle of it, would you say?", "Is it?")
UTILS = """
from PIL import Image

def visual(doc):
    return [Image.open(doc["picture"]).convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, said):
    return {"said": said[0], "right": 1.0}

def kept(items):
    return " | ".join(items)
"""
GENERATE = """
task: local_say
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
  - metric: said
    aggregation: !function utils.kept
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, llm: Path) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return build_llava(hf_tower(folder, "clip_vision_model"), str(llm), folder / "built")


def local(folder: Path, pictures: Path) -> list[dict[str, Any]]:
    """A task in a folder of its own; its rows."""
    rows = [{"picture": str(pictures / f"{n}.png"), "question": QUESTIONS[n % 3], "answer": "yes"} for n in range(5)]
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "utils.py").write_text(UTILS)
    (folder / "local_say.yaml").write_text(GENERATE.format(rows=folder / "rows.jsonl"))
    return rows


def test_a_local_task_is_answered_as_by_our_own_evaluation(model: Path, pictures: Path, tmp_path: Path) -> None:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from llm2clip.llava.lmms import MANIFEST, LmmsModel

    assert MANIFEST.simple_class_path == f"{LmmsModel.__module__}.{LmmsModel.__qualname__}"
    rows = local(tmp_path / "tasks", pictures)
    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(
        model=LmmsModel(str(model), "cpu", 2, "fp32"), tasks=["local_say"], task_manager=manager, log_samples=False,
        bootstrap_iters=0,
    )  # fmt: skip
    asked = [Question(str(n), FileImage(row["picture"]), row["question"]) for n, row in enumerate(rows)]
    own = dict(Generator(str(model), "cpu", "fp32", 2).answer(asked, 6))
    (said,) = [v for k, v in found["results"]["local_say"].items() if k.partition(",")[0] == "said"]
    assert said == " | ".join(str(own[n]) for n in range(5))


def test_likelihoods_are_the_model_s_own(model: Path, pictures: Path) -> None:
    from PIL import Image

    from llm2clip.llava.lmms import LmmsModel

    inside = LmmsModel(str(model), "cpu", 2, "fp32")
    path = pictures / "1.png"
    inside.task_dict = {"t": {"test": {0: {"picture": path}}}}
    arguments = ("Is it?", "Yes", lambda doc: [Image.open(doc["picture"])], 0, "t", "test")
    (found,) = inside.loglikelihood([SimpleNamespace(args=arguments)])
    own = Generator(str(model), "cpu", "fp32").likelihoods(Question("", FileImage(str(path)), "Is it?"), ["Yes"])
    assert own is not None and found[0] == pytest.approx(float(own[0, 0]), abs=1e-4)
    assert found[1] is bool(own[0, 1] == own[0, 2])
