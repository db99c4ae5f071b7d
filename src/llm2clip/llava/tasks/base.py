"""What a benchmark of multimodal LLMs is: questions from files in their official form, and figures from the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

from llm2clip.data.image_refs import FileImage, ImageRef, is_inside
from llm2clip.data.skip_log import SkipLog

T = TypeVar("T")
SHORT = "\nAnswer the question using a single word or phrase."  # LLaVA-1.5's three forms of a question; this is one,
LETTER = "\nAnswer with the option's letter from the given choices directly."  # this another, and none the third


@dataclass(frozen=True)
class Question:
    """One question to a model.

    Args:
        id: of the question, unique in its benchmark.
        image: what it is about; None is a question of text alone.
        prompt: as it is put to the model, without a mark of the image.
        truth: what the answer is scored by; None where only a server knows.
        group: the part of the benchmark that it belongs to.
        options: of a multiple choice, in their order.
        unit: questions with the same one are scored together, such as the rotations of a multiple choice; empty is a
            question that is scored alone.
    """

    id: str
    image: ImageRef | None
    prompt: str
    truth: Any = None
    group: str = ""
    options: tuple[str, ...] = ()
    unit: str = ""


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        name: what it is called on the command line.
        about: one line: its protocol in short.
        get: where its files are from, and how they lie in its folder.
        read: the questions in a folder; questions without their image go to the log.
        score: figures from questions and answers, in percent where nothing else is said; the first is the one that
            LLaVA-1.5's table has.
        submission: what a server takes, in its form, from questions and answers; file name to content.
        tokens: longest answer.
        judge: what a judge makes of an answer, which is then scored in its place: question, answer and judge to it.
        folder: what LLaVA-1.5's own tree of benchmarks calls its folder, where that is not its name.
    """

    name: str
    about: str
    get: str
    read: Callable[[Path, SkipLog], list[Question]]
    score: Callable[[Sequence[Question], Sequence[Any]], dict[str, float]]
    submission: Callable[[Sequence[Question], Sequence[str]], dict[str, Any]] | None = None
    tokens: int = 128
    judge: Callable[[Question, str, Any], Any] | None = None
    folder: str = ""

    def place(self, root: str | Path) -> Path:
        """Its folder under the one of all benchmarks: by its name, or as LLaVA-1.5's tree has it; it need not exist."""
        named, theirs = Path(root) / self.name, Path(root) / self.folder
        return theirs if self.folder and not named.is_dir() and theirs.is_dir() else named


def mean_score(values: Sequence[float]) -> float:
    """In percent; of none, not a number."""
    return 100 * sum(values) / len(values) if values else float("nan")


def first_units(asked: Sequence[Question], count: int | None) -> list[Question]:
    """The questions of the first so many units, of each group in turn: what is scored together is never cut. None is
    all."""
    groups: dict[str, dict[str, None]] = {}
    for one in asked:
        groups.setdefault(one.group, {})[one.unit or one.id] = None
    turns = chain.from_iterable(zip_longest(*groups.values()))
    kept = set(islice(dict.fromkeys(unit for unit in turns if unit is not None), count))
    return [one for one in asked if (one.unit or one.id) in kept]


def group_by(asked: Sequence[Question], values: Sequence[T]) -> dict[str, list[T]]:
    """Values by the group of their question, groups in the order in which they come."""
    found: dict[str, list[T]] = {}
    for one, value in zip(asked, values, strict=True):
        found.setdefault(one.group, []).append(value)
    return found


def image_file(folder: Path, name: str, log: SkipLog, file: Path, number: int) -> FileImage | None:
    """The image of a question, by its name in a folder; one that is not there, or not in it, is a row skipped."""
    log.count_row()
    if not is_inside(name):
        log.skip(str(file), number, "name leads out of the folder", name)
    elif not (folder / name).is_file():
        log.skip(str(file), number, "no image", folder / name)
    else:
        return FileImage(str(folder / name))
    return None
