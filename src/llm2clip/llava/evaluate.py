"""Multimodal models on benchmarks and on captioned pictures: answers, which are kept, and figures from them.

OUT/answers/TASK-FINGERPRINT.jsonl   an answer a line, so that what was answered once is not asked again
OUT/submissions/                     what servers take, of benchmarks whose truth only they know
OUT/results.json, report.html, report.md
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.distributed import process_state
from llm2clip.io_utils import atomic_write_text
from llm2clip.llava.captions import caption_scores
from llm2clip.llava.datasets import BRIEF
from llm2clip.llava.generate import Generator
from llm2clip.llava.tasks import Question, Task
from llm2clip.llava.tasks.yes_no import pope_metrics, score_pope
from llm2clip.models.fingerprint import fingerprint, hash_weights
from llm2clip.store.image_features import image_name


@dataclass
class LlavaResult:
    """A model's figures on a task, and what it said."""

    model: str
    task: str
    figures: dict[str, float]
    asked: list[Question] = field(repr=False)
    answers: list[str] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "task": self.task, "questions": len(self.asked), "figures": self.figures}


@dataclass(frozen=True)
class GenerationOptions:
    """How questions are answered.

    Args:
        beams: of captions; 1 is greedy. Benchmarks are greedy, as LLaVA-1.5's are.
        choose: multiple choice by the option's likelihood, and not by the letter that the model says.
        batch: questions in a pass.
        precision: fp32, bf16 or auto.
        judge: of free answers; None leaves them unscored.
    """

    beams: int = 3
    choose: bool = False
    batch: int = 16
    precision: str = "auto"
    judge: Any = None


def caption_task(records: Sequence[Record]) -> tuple[Task, list[Question]]:
    """Captions of pictures, scored against people's."""
    task = Task("captions", "BLEU-4 and CIDEr-D against people's captions", "", _nothing, _score_captions, tokens=32)
    asked = [
        Question(f"{n}/{record.id}", record.image, BRIEF[0], list(record.captions))
        for n, record in enumerate(records)
        if record.image is not None and record.captions
    ]
    return task, asked


def pope_task(records: Sequence[Record], seed: int = 0) -> tuple[Task, list[Question]]:
    """POPE of captioned pictures."""
    task = Task("pope of captions", "objects that captions name or do not", "", _nothing, score_pope, tokens=8)
    return task, pope_metrics(records, seed=seed)


def _score_captions(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    scores = caption_scores(answers, [one.truth for one in asked])
    return {"CIDEr-D": scores["CIDEr-D"], "BLEU-4": scores["BLEU-4"]}


def _nothing(folder: Path, log: SkipLog) -> list[Question]:
    return []


def run_task(
    name: str, work: Sequence[tuple[Task, list[Question]]], ways: GenerationOptions, out: Path, log: SkipLog
) -> Iterator[LlavaResult]:
    """A model's figures, task after task.

    Args:
        name: of the model: folder or hub id.
        work: tasks and their questions.
        ways: how they are answered.
        out: folder for answers and submissions.
        log: where pictures that cannot be decoded are listed.

    Raises:
        TooManySkipped: so are too many of a task's.
    """
    model = Generator(name, precision=ways.precision, batch=ways.batch)
    weights = hash_weights(model.model)
    for task, asked in work:
        choose = ways.choose and any(one.options for one in asked)
        beams = ways.beams if task.name == "captions" else 1
        identity = {
            "weights": weights, "dtype": str(model.model.dtype), "beams": beams, "choose": choose,
            "tokens": task.tokens, "template": model.tokenizer.chat_template,
            "pixels": model.processor.image_processor.to_dict(),
        }  # fmt: skip
        file = out / "answers" / f"{task.name.replace(' ', '-')}-{fingerprint(identity)[:8]}.jsonl"
        answers = _kept(file, asked, task.name, partial(_said, model, task, beams, choose))
        known = [(one, answer) for one, answer in zip(asked, answers, strict=True) if answer is not None]
        lost = [one for one, answer in zip(asked, answers, strict=True) if answer is None]
        for one in lost:
            log.skip(str(one.image), 0, "undecodable image", task.name)
        if len(lost) > log.max_skipped * len(asked):
            raise TooManySkipped(
                f"{task.name}: of {len(asked):,} questions the pictures of {len(lost):,} cannot be decoded, "
                f"{lost[0].image} for one; mend them, or raise --max_skipped"
            )
        questions, said = [one for one, _ in known], [answer for _, answer in known]
        if task.submission:
            for written, rows in task.submission(questions, said).items():
                place = out / "submissions" / f"{weights[:8]}-{written}"
                if process_state().is_main_process:
                    atomic_write_text(place, json.dumps(rows, ensure_ascii=False))
        yield LlavaResult(name, task.name, _figures(task, questions, said, ways, file), questions, said)


def _figures(
    task: Task, asked: list[Question], answers: list[str], ways: GenerationOptions, file: Path
) -> dict[str, float]:
    if not asked:
        return {}
    if task.judge is None:
        return task.score(asked, answers)
    if ways.judge is None:
        return {}
    of = dict(zip((one.id for one in asked), answers, strict=True))
    by = fingerprint({"judge": str(getattr(ways.judge, "model", ""))})[:8]
    judged = file.with_name(f"{file.stem}-judged-{by}.jsonl")
    judge = task.judge
    points = _kept(
        judged, asked, f"{task.name}, judged",
        lambda some: ((n, judge(one, of[one.id], ways.judge)) for n, one in enumerate(some)),
    )  # fmt: skip
    return task.score(asked, points)


def _said(
    model: Generator, task: Task, beams: int, choose: bool, asked: Sequence[Question]
) -> Iterator[tuple[int, str | None]]:
    """Answers; of a choice by likelihood the letter."""
    if not choose:
        yield from model.answer(asked, task.tokens, beams)
        return
    for n, option in model.choose(asked):
        yield n, None if option is None else "ABCDE"[option]


def _kept(
    file: Path, asked: Sequence[Question], name: str, answer: Callable[[list[Question]], Iterator[tuple[int, Any]]]
) -> list[Any]:
    """Answers in the order of their questions: those in the file and beside it, and the others, which are added as they
    come, each process asking its share and writing its own file. A question is known by its words and its picture; a
    line that was cut off is asked again, and so is a picture that could not be decoded."""
    state = process_state()
    file.parent.mkdir(parents=True, exist_ok=True)
    there = _read(file)
    questions = [_question(one) for one in asked]
    new = [n for n, question in enumerate(questions) if question not in there]
    state.wait_for_everyone()  # all have read before one writes
    mine = new[state.process_index :: state.num_processes]
    own = file if state.is_main_process else file.with_suffix(f".{state.process_index}.jsonl")
    if mine:
        bar = tqdm(total=len(mine), desc=name, unit="question", disable=not state.is_main_process)
        with own.open("a", encoding="utf-8") as kept, bar:
            if kept.tell():
                kept.write("\n")  # after a line that was cut off
            for n, said in answer([asked[n] for n in mine]):
                bar.update()
                if said is None:
                    continue
                row = {"question": questions[mine[n]], "id": asked[mine[n]].id, "answer": said}
                kept.write(json.dumps(row, ensure_ascii=False) + "\n")
                kept.flush()
    state.wait_for_everyone()
    there = _read(file)
    return [there.get(question) for question in questions]


def _question(one: Question) -> str:
    return fingerprint({"id": one.id, "prompt": one.prompt, "image": image_name(one.image) if one.image else ""})


def _read(file: Path) -> dict[str, Any]:
    """The answers in a file and in those of other processes beside it."""
    there: dict[str, Any] = {}
    for one in sorted(file.parent.glob(f"{file.stem}*.jsonl")):
        if not re.fullmatch(r"(\.\d+)?", one.stem[len(file.stem) :]):
            continue  # of a judge
        for line in one.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
                there[row["question"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                continue
    return there
