"""Multimodal models on benchmarks and on captioned pictures: answers, which are kept, and figures from them.

OUT/answers/TASK-FINGERPRINT.jsonl   an answer a line, so that what was answered once is not asked again
OUT/submissions/                     what servers take, of benchmarks whose truth only they know
OUT/results.json, report.html, report.md
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from llm2clip.data.records import Record
from llm2clip.data.skips import SkipLog
from llm2clip.llava.answers import Answerer
from llm2clip.llava.captions import caption_scores
from llm2clip.llava.conversations import BRIEF
from llm2clip.llava.tasks import Asked, Task
from llm2clip.llava.tasks.yesno import pope_of, score_pope
from llm2clip.models.identity import fingerprint, weights_hash


@dataclass
class Measured:
    """A model's figures on a task; `judged` are the judge's points where there is one, else the answers."""

    model: str
    task: str
    figures: dict[str, float]
    asked: list[Asked] = field(repr=False)
    answers: list[str] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "task": self.task, "questions": len(self.asked), "figures": self.figures}


@dataclass(frozen=True)
class Ways:
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


def captions_of(records: Sequence[Record]) -> tuple[Task, list[Asked]]:
    """Captions of pictures, scored against people's."""
    task = Task("captions", "BLEU-4 and CIDEr-D against people's captions", "", _nothing, _score_captions, tokens=32)
    asked = [
        Asked(f"{n}/{record.id}", record.image, BRIEF[0], list(record.captions))
        for n, record in enumerate(records)
        if record.image is not None and record.captions
    ]
    return task, asked


def pope_task(records: Sequence[Record], seed: int = 0) -> tuple[Task, list[Asked]]:
    """POPE of captioned pictures."""
    task = Task("pope of captions", "objects that captions name or do not", "", _nothing, score_pope, tokens=8)
    return task, pope_of(records, seed=seed)


def _score_captions(asked: Sequence[Asked], answers: Sequence[str]) -> dict[str, float]:
    scores = caption_scores(answers, [one.truth for one in asked])
    return {"CIDEr-D": scores["CIDEr-D"], "BLEU-4": scores["BLEU-4"]}


def _nothing(folder: Path, log: SkipLog) -> list[Asked]:
    return []


def measure(
    name: str, work: Sequence[tuple[Task, list[Asked]]], ways: Ways, out: Path, log: SkipLog
) -> Iterator[Measured]:
    """A model's figures, task after task.

    Args:
        name: of the model: folder or hub id.
        work: tasks and their questions.
        ways: how they are answered.
        out: folder for answers and submissions.
        log: where pictures that cannot be decoded are listed.
    """
    model = Answerer(name, precision=ways.precision, batch=ways.batch)
    weights = weights_hash(model.model)
    for task, asked in work:
        choose = ways.choose and any(one.options for one in asked)
        beams = ways.beams if task.name == "captions" else 1
        identity = {
            "weights": weights, "dtype": str(model.model.dtype), "beams": beams, "choose": choose,
            "tokens": task.tokens, "template": model.processor.chat_template,
        }  # fmt: skip
        file = out / "answers" / f"{task.name.replace(' ', '-')}-{fingerprint(identity)[:8]}.jsonl"
        answers = _kept(file, asked, task.name, partial(_said, model, task, beams, choose))
        known = [(one, answer) for one, answer in zip(asked, answers, strict=True) if answer is not None]
        for one, answer in zip(asked, answers, strict=True):
            log.seen_one()
            if answer is None:
                log.skip(str(one.image), 0, "undecodable image", task.name)
        questions, said = [one for one, _ in known], [answer for _, answer in known]
        if task.submission:
            for written, rows in task.submission(questions, said).items():
                place = out / "submissions" / Path(name).name / written
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(json.dumps(rows, ensure_ascii=False))
        yield Measured(name, task.name, _figures(task, questions, said, ways, file), questions, said)


def _figures(task: Task, asked: list[Asked], answers: list[str], ways: Ways, file: Path) -> dict[str, float]:
    if not asked:
        return {}
    if task.judge is None:
        return task.score(asked, answers)
    if ways.judge is None:
        return {}
    of = dict(zip((one.id for one in asked), answers, strict=True))
    judged = file.with_suffix(f".{fingerprint({'judge': str(getattr(ways.judge, 'model', ''))})[:8]}.jsonl")
    judge = task.judge
    points = _kept(
        judged, asked, f"{task.name}, judged",
        lambda some: ((n, judge(one, of[one.id], ways.judge)) for n, one in enumerate(some)),
    )  # fmt: skip
    return task.score(asked, points)


def _said(
    model: Answerer, task: Task, beams: int, choose: bool, asked: Sequence[Asked]
) -> Iterator[tuple[int, str | None]]:
    """Answers; of a choice by likelihood the letter."""
    if not choose:
        yield from model.answer(asked, task.tokens, beams)
        return
    for n, option in model.choose(asked):
        yield n, None if option is None else "ABCDE"[option]


def _kept(
    file: Path, asked: Sequence[Asked], name: str, answer: Callable[[list[Asked]], Iterator[tuple[int, Any]]]
) -> list[Any]:
    """Answers in the order of their questions: those in the file, and the others, which are added to it as they
    come. A question is known by its id and its words; a line that was cut off is asked again."""
    there: dict[str, Any] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
                there[row["question"]] = row["answer"]
            except (ValueError, KeyError, TypeError):
                continue
    questions = [fingerprint({"id": one.id, "prompt": one.prompt, "image": str(one.image)}) for one in asked]
    new = [n for n, question in enumerate(questions) if question not in there]
    if new:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as kept, tqdm(total=len(asked), desc=name, unit="question") as bar:
            if kept.tell():
                kept.write("\n")  # after a line that was cut off
            bar.update(len(asked) - len(new))
            for n, said in answer([asked[n] for n in new]):
                question = questions[new[n]]
                there[question] = said
                row = {"question": question, "id": asked[new[n]].id, "answer": said}
                kept.write(json.dumps(row, ensure_ascii=False) + "\n")
                kept.flush()
                bar.update()
    return [there[question] for question in questions]
