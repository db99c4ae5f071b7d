"""Base types for benchmarks: `Question`, and `Task`, which reads questions and scores answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from llm2clip.data.image_refs import FileImage, ImageRef, is_inside
from llm2clip.data.skip_log import SkipLog

T = TypeVar("T")

# LLaVA-1.5 appends at most one of these instructions to a question.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """A question for a model.

    Args:
        id: question id, unique within the benchmark.
        image: image to which the question refers, or None.
        prompt: prompt for the model, without an image token.
        target: reference for scoring the answer, or None if the benchmark does not publish references.
        group: category of the question, for per-category metrics.
        options: options of a multiple-choice question, in order.
        unit: key shared by questions that are scored together, such as copies of a multiple-choice question with
            rotated options. If empty, the question is scored on its own.
    """

    id: str
    image: ImageRef | None
    prompt: str
    target: Any = None
    group: str = ""
    options: tuple[str, ...] = ()
    unit: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A benchmark, with functions that read its questions and score the answers.

    Args:
        name: name used on the command line.
        description: one-line description of the protocol.
        source: where to download the benchmark's files.
        read: function that reads questions from a folder. Questions whose image is missing are skipped and logged.
        score: function that computes metrics from questions and answers, in percent unless noted. The first metric must
            be the one in LLaVA-1.5's table.
        submission: function that converts questions and answers to files for the benchmark's server. It returns a dict
            {file name: file contents}.
        max_new_tokens: maximum number of tokens per answer.
        judge: function that scores an answer, given the question, the answer and an LLM judge. `score` then receives
            the judge's scores instead of the answers.
        llava_folder: name of the benchmark's folder in LLaVA-1.5's evaluation data, if it differs from `name`.
    """

    name: str
    description: str
    source: str = ""
    read: Callable[[Path, SkipLog], list[Question]]
    score: Callable[[Sequence[Question], Sequence[Any]], dict[str, float]]
    submission: Callable[[Sequence[Question], Sequence[str]], dict[str, Any]] | None = None
    max_new_tokens: int = 128
    judge: Callable[[Question, str, Any], Any] | None = None
    llava_folder: str = ""

    def folder(self, root: str | Path) -> Path:
        """Return the benchmark's folder: `root/llava_folder` if only that folder exists, otherwise `root/name`."""
        by_name = Path(root) / self.name
        by_llava = Path(root) / self.llava_folder
        if self.llava_folder and by_llava.is_dir() and not by_name.is_dir():
            return by_llava
        return by_name


def mean_percent(values: Sequence[float]) -> float:
    """Return the mean in percent, or NaN if there are no values."""
    return 100 * sum(values) / len(values) if values else float("nan")


def group_by(questions: Sequence[Question], values: Sequence[T]) -> dict[str, list[T]]:
    """Group values (one per question) by the questions' groups, in order of first appearance."""
    groups: dict[str, list[T]] = {}
    for question, value in zip(questions, values, strict=True):
        groups.setdefault(question.group, []).append(value)
    return groups


def mean_by_group(questions: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """Return the mean of each group, in percent."""
    return {group: mean_percent(members) for group, members in group_by(questions, values).items()}


def first_units(questions: Sequence[Question], count: int | None) -> list[Question]:
    """Return the questions of `count` units, taking the next unit from each group in turn.

    If `count` is None, all questions are returned. Units are never split.
    """
    units_of_group: dict[str, dict[str, None]] = {}  # dicts as ordered sets
    for question in questions:
        units_of_group.setdefault(question.group, {})[question.unit or question.id] = None
    round_robin = chain.from_iterable(zip_longest(*units_of_group.values()))
    units = dict.fromkeys(unit for unit in round_robin if unit is not None)
    selected = set(islice(units, count))
    return [question for question in questions if (question.unit or question.id) in selected]


def find_image(folder: Path, name: str, log: SkipLog, file: Path, number: int) -> FileImage | None:
    """Return an image. If the image is missing or outside the folder, log the row as skipped and return None.

    Args:
        folder: folder that contains the images.
        name: path of the image relative to the folder.
        log: log of skipped rows.
        file: file that refers to the image, for the log.
        number: row number in that file.
    """
    log.count_row()
    if not is_inside(name):
        log.skip(str(file), number, "image outside the folder", name)
        return None
    if not (folder / name).is_file():
        log.skip(str(file), number, "no image", folder / name)
        return None
    return FileImage(str(folder / name))
