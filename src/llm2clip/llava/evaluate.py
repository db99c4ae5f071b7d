"""Evaluation of LLaVA models on benchmarks and captioned images.

OUT/answers/TASK-FINGERPRINT.jsonl   cached answers, for resuming an interrupted evaluation
OUT/submissions/                     files to upload to the servers of benchmarks without public test answers
OUT/results.json                     metrics
OUT/report.html, OUT/report.md       tables of metrics, and sample captions
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.data.training_images import count_training_images, load_training_images
from llm2clip.io_utils import atomic_write_text
from llm2clip.llava.answer_cache import cached_answers
from llm2clip.llava.caption_metrics import caption_scores
from llm2clip.llava.datasets import SHORT_CAPTION_PROMPTS
from llm2clip.llava.generate import AnswerGenerator
from llm2clip.llava.tasks import Question, Task
from llm2clip.llava.tasks.multiple_choice import LETTERS
from llm2clip.llava.tasks.yes_no import pope_questions, score_pope
from llm2clip.models.hub.fingerprint import fingerprint, hash_weights
from llm2clip.runs.ranks import process_state


@dataclass
class LlavaResult:
    """A model's metrics and answers for one task.

    Args:
        model: display name of the model.
        task: name of the task.
        metrics: metrics, keyed by name.
        questions: questions whose images can be decoded.
        answers: answer to each of these questions.
        trained_on: number of images in the questions on which the model was trained. None if the training images are
            unknown.
    """

    model: str
    task: str
    metrics: dict[str, float]
    questions: list[Question] = field(repr=False)
    answers: list[str] = field(repr=False)
    trained_on: int | None = None

    def to_dict(self) -> dict[str, Any]:
        entry = {"model": self.model, "task": self.task, "questions": len(self.questions), "metrics": self.metrics}
        return entry if self.trained_on is None else entry | {"images trained on": self.trained_on}


@dataclass(frozen=True)
class GenerationOptions:
    """Options for generating and scoring answers.

    Args:
        num_beams: number of beams for generating captions. Benchmarks use greedy decoding, as LLaVA-1.5 does.
        by_likelihood: if True, answer each multiple-choice question with the most likely option instead of generating a
            letter.
        batch_size: number of questions per forward pass.
        precision: fp32, bf16 or auto.
        judge: LLM judge that scores free-form answers. Without a judge, free-form answers are generated but not scored.
    """

    num_beams: int = 3
    by_likelihood: bool = False
    batch_size: int = 16
    precision: str = "auto"
    judge: Any = None


def caption_task(records: Sequence[Record]) -> tuple[Task, list[Question]]:
    """Return a captioning task and its questions. Generated captions are compared with the records' captions."""
    task = Task(
        name="captions",
        description="BLEU-4 and CIDEr-D against human captions",
        read=_no_questions,
        score=_score_captions,
        max_new_tokens=32,
    )
    questions = []
    for n, record in enumerate(records):
        if record.image is None or not record.captions:
            continue
        questions.append(
            Question(
                id=f"{n}/{record.id}",
                image=record.image,
                prompt=SHORT_CAPTION_PROMPTS[0],
                target=list(record.captions),
            )
        )
    return task, questions


def pope_task(records: Sequence[Record], seed: int = 0) -> tuple[Task, list[Question]]:
    """Return a POPE task and its questions about captioned images. See `llava/pope.py`."""
    task = Task(
        name="pope of captions",
        description="whether objects are present, according to the captions",
        read=_no_questions,
        score=score_pope,
        max_new_tokens=8,
    )
    return task, pope_questions(records, seed=seed)


def evaluate_model(
    name: str, tasks: Sequence[tuple[Task, list[Question]]], options: GenerationOptions, out: Path, log: SkipLog
) -> Iterator[LlavaResult]:
    """Evaluate a model and yield its result for each task.

    Args:
        name: model folder or hub id.
        tasks: tasks with their questions.
        options: options for generating and scoring answers.
        out: folder for answers and submissions.
        log: log of images that cannot be decoded.

    Raises:
        TooManySkipped: too many images of a task cannot be decoded.
    """
    model = AnswerGenerator(name, precision=options.precision, batch_size=options.batch_size)
    weights = hash_weights(model.model)
    training_images = load_training_images(name)
    for task, questions in tasks:
        num_beams = options.num_beams if task.name == "captions" else 1
        by_likelihood = options.by_likelihood and any(question.options for question in questions)
        # These keys are hashed into the file name: renaming a key invalidates cached answers.
        identity = {
            "weights": weights,
            "dtype": str(model.model.dtype),
            "beams": num_beams,
            "choose": by_likelihood,
            "tokens": task.max_new_tokens,
            "template": model.tokenizer.chat_template,
            "pixels": model.processor.image_processor.to_dict(),
        }
        file = out / "answers" / f"{task.name.replace(' ', '-')}-{fingerprint(identity)[:8]}.jsonl"

        generate: Callable[[list[Question]], Iterator[tuple[int, str | None]]]
        if by_likelihood:
            generate = partial(_choose_letters, model)
        else:
            generate = partial(model.generate, max_new_tokens=task.max_new_tokens, num_beams=num_beams)
        all_answers = cached_answers(file, questions, generate, description=task.name)
        answered, answers = _drop_undecodable(task, questions, all_answers, log)
        if task.submission and process_state().is_main_process:
            for filename, rows in task.submission(answered, answers).items():
                submission_file = out / "submissions" / f"{weights[:8]}-{filename}"
                atomic_write_text(submission_file, json.dumps(rows, ensure_ascii=False))
        metrics = _score(task, answered, answers, options.judge, file)
        result = LlavaResult(model=name, task=task.name, metrics=metrics, questions=answered, answers=answers)
        if training_images is not None:
            images = [question.image for question in answered]
            result.trained_on = count_training_images(training_images, images)
        yield result


def _no_questions(folder: Path, log: SkipLog) -> list[Question]:
    """Return an empty list: the questions for this task are made from records."""
    return []


def _score_captions(questions: Sequence[Question], captions: Sequence[str]) -> dict[str, float]:
    scores = caption_scores(captions, [question.target for question in questions])
    return {name: scores[name] for name in ("CIDEr-D", "BLEU-4")}


def _choose_letters(model: AnswerGenerator, questions: Sequence[Question]) -> Iterator[tuple[int, str | None]]:
    for n, option in model.choose_options(questions):
        yield n, None if option is None else LETTERS[option]


def _drop_undecodable(
    task: Task, questions: Sequence[Question], answers: Sequence[str | None], log: SkipLog
) -> tuple[list[Question], list[str]]:
    """Remove and log the questions that have no answer because their image could not be decoded.

    Raises:
        TooManySkipped: the fraction of removed questions exceeds `log.max_skipped`.
    """
    answered, texts, undecodable = [], [], []
    for question, text in zip(questions, answers, strict=True):
        if text is None:
            undecodable.append(question)
            log.skip(str(question.image), 0, "undecodable image", task.name)
        else:
            answered.append(question)
            texts.append(text)
    if len(undecodable) > log.max_skipped * len(questions):
        raise TooManySkipped(
            f"{task.name}: the images of {len(undecodable):,} of {len(questions):,} questions cannot be decoded, "
            f"for example {undecodable[0].image}. Repair these images, or raise --max_skipped"
        )
    return answered, texts


def _score(task: Task, questions: list[Question], answers: list[str], judge: Any, file: Path) -> dict[str, float]:
    """Score answers. Return no metrics if the task needs a judge but there is none.

    Judge scores are cached next to `file`.
    """
    if not questions:
        return {}
    judge_answer = task.judge
    if judge_answer is None:
        return task.score(questions, answers)
    if judge is None:
        return {}
    answer_of = {question.id: text for question, text in zip(questions, answers, strict=True)}
    judge_id = fingerprint({"judge": str(getattr(judge, "model", ""))})[:8]
    score_file = file.with_name(f"{file.stem}-judged-{judge_id}.jsonl")

    def ask_judge(batch: Sequence[Question]) -> Iterator[tuple[int, Any]]:
        for n, question in enumerate(batch):
            yield n, judge_answer(question, answer_of[question.id], judge)

    scores = cached_answers(score_file, questions, ask_judge, description=f"{task.name} (judge)")
    return task.score(questions, scores)
