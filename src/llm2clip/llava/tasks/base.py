"""Base types of the benchmarks: questions, and tasks that read questions and score answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from llm2clip.data.image_refs import FileImage, ImageRef, is_inside
from llm2clip.data.skip_log import SkipLog

T = TypeVar("T")

# LLaVA-1.5 appends one of these instructions to a question, or none.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."


@dataclass(frozen=True)
class Question:
    """A question to a model.

    Args:
        id: unique within the benchmark.
        image: None for a question without an image.
        prompt: text given to the model, without an image token.
        target: what the answer is scored against; None if only the benchmark's server has it.
        group: part of the benchmark, for metrics per part.
        options: options of a multiple choice, in order.
        unit: questions with the same unit are scored together, such as the rotations of one multiple choice. Empty: the
            question is scored alone.
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
    """A benchmark.

    Args:
        name: name on the command line.
        description: protocol, in one line.
        source: where to download its files.
        read: reads the questions from a folder; questions whose image is missing are skipped and logged.
        score: computes metrics from questions and answers, in percent unless noted. The first one is the metric of
            LLaVA-1.5's table.
        submission: file name to content for the benchmark's server, from questions and answers.
        max_new_tokens: maximum number of tokens of an answer.
        judge: scores an answer with an LLM judge; arguments: question, answer, judge. `score` then receives the judge's
            scores instead of the answers.
        llava_folder: name of the folder in LLaVA-1.5's evaluation data, if it differs from `name`.
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
        """Return the benchmark's folder under `root`: `name`, or `llava_folder` if only that exists."""
        by_name = Path(root) / self.name
        by_llava = Path(root) / self.llava_folder
        if self.llava_folder and by_llava.is_dir() and not by_name.is_dir():
            return by_llava
        return by_name


def mean_percent(values: Sequence[float]) -> float:
    """Return the mean in percent, or NaN if there are no values."""
    return 100 * sum(values) / len(values) if values else float("nan")


def group_by(questions: Sequence[Question], values: Sequence[T]) -> dict[str, list[T]]:
    """Group one value per question by the question's group, in order of first appearance."""
    groups: dict[str, list[T]] = {}
    for question, value in zip(questions, values, strict=True):
        groups.setdefault(question.group, []).append(value)
    return groups


def mean_by_group(questions: Sequence[Question], values: Sequence[float]) -> dict[str, float]:
    """Return the mean of each group in percent."""
    return {group: mean_percent(members) for group, members in group_by(questions, values).items()}


def first_units(questions: Sequence[Question], count: int | None) -> list[Question]:
    """Return the questions of the first `count` units, taken from each group in turn. None returns all.

    Units are never split.
    """
    units_of_group: dict[str, dict[str, None]] = {}  # dicts as ordered sets
    for question in questions:
        units_of_group.setdefault(question.group, {})[question.unit or question.id] = None
    round_robin = chain.from_iterable(zip_longest(*units_of_group.values()))
    units = dict.fromkeys(unit for unit in round_robin if unit is not None)
    selected = set(islice(units, count))
    return [question for question in questions if (question.unit or question.id) in selected]


def find_image(folder: Path, name: str, log: SkipLog, file: Path, number: int) -> FileImage | None:
    """Return an image in a folder, or log a skipped row and return None if it is missing or outside the folder.

    Args:
        folder: folder of the images.
        name: relative path of the image.
        log: receives the skipped row.
        file: file that names the image, for the log.
        number: its row in that file.
    """
    log.count_row()
    if not is_inside(name):
        log.skip(str(file), number, "name leads out of the folder", name)
        return None
    if not (folder / name).is_file():
        log.skip(str(file), number, "no image", folder / name)
        return None
    return FileImage(str(folder / name))
