"""Multiple-choice benchmarks: ScienceQA-IMG, MMBench, MMBench-CN and SEED-Bench."""

from __future__ import annotations

import base64
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.image_refs import MemoryImage
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import first_existing, read_json
from llm2clip.llava.tasks.base import (
    OPTION_LETTER,
    Question,
    Task,
    find_image,
    mean_by_group,
    mean_percent,
)

LETTERS = "ABCDE"


def format_choices(question: str, options: Sequence[str], instruction: str = OPTION_LETTER) -> str:
    """Return LLaVA-1.5's multiple-choice prompt: the question, lettered options, and an instruction."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines]) + instruction


# ---- ScienceQA ------------------------------------------------------------------------------------------------------


def read_scienceqa(folder: Path, log: SkipLog) -> list[Question]:
    """Read the test questions with images from problems.json and pid_splits.json, as in LLaVA-1.5.

    Each image is images/test/ID/image.png.
    """
    file = first_existing(folder, "problems.json", "*/problems.json")
    problems = read_json(file)
    test_ids = read_json(first_existing(folder, "pid_splits.json", "*/pid_splits.json"))["test"]
    questions = []
    for number, question_id in enumerate(test_ids, 1):
        row = problems[question_id]
        if not row["image"]:
            continue
        image = find_image(file.parent / "images" / "test" / question_id, row["image"], log, file, number)
        if image is None:
            continue
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        questions.append(
            Question(
                id=question_id,
                image=image,
                prompt=format_choices(context + row["question"], row["choices"]),
                target=LETTERS[row["answer"]],
                group=row["subject"],
                options=tuple(row["choices"]),
            )
        )
    return questions


def scienceqa_letter(answer: str) -> str | None:
    """Extract the option letter from an answer as LLaVA does: from `A`, `A. ...`, or a single `The answer is A.`"""
    if answer in LETTERS and len(answer) == 1:
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    letters = re.findall(r"The answer is ([A-Z]).", answer)
    return letters[0] if len(letters) == 1 else None


def score_scienceqa(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy overall and by subject."""
    correct = []
    for question, answer in zip(questions, answers, strict=True):
        correct.append(float(scienceqa_letter(answer.strip()) == question.target))
    return {"accuracy": mean_percent(correct), **mean_by_group(questions, correct)}


# ---- MMBench (arXiv 2307.06281) -------------------------------------------------------------------------------------

OPTION_LETTER_CN = "\n请直接回答选项字母。"
_ROTATION_OFFSET = 1_000_000  # rows with rotated options have the original index plus a multiple of this
_LETTER_FORMS = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")
# Cell contents that are treated as missing by LLaVA's code or by pandas, which it uses.
_EMPTY_CELLS = ("", "nan", "none", "na", "n/a", "null", "<na>")
_MIN_IMAGE_CHARS = 64  # shorter cells contain the index of another row instead of a base64 image


def read_mmbench(folder: Path, log: SkipLog) -> list[Question]:
    """Read mmbench_dev_20230712.tsv or a newer English file. The file contains the images, encoded as base64."""
    return _read_mmbench_table(first_existing(folder, "mmbench_dev_2*.tsv", "mmbench_dev_en_*.tsv"), log, OPTION_LETTER)


def read_mmbench_cn(folder: Path, log: SkipLog) -> list[Question]:
    """Read mmbench_dev_cn_20231003.tsv, the Chinese version."""
    return _read_mmbench_table(first_existing(folder, "mmbench_dev_cn_*.tsv"), log, OPTION_LETTER_CN)


def _read_mmbench_table(file: Path, log: SkipLog, instruction: str) -> list[Question]:
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 1 << 30)))  # images exceed the default limit
    questions = []
    images: dict[str, MemoryImage] = {}
    with file.open(encoding="utf-8", newline="") as table:
        for number, row in enumerate(csv.DictReader(table, delimiter="\t"), 1):
            log.count_row()
            try:
                image = _decode_cell(row, images)
            except ValueError as error:
                log.skip(str(file), number, "no image", error)
                continue
            options: list[str] = []
            for letter in "ABCD":
                if _is_empty(row.get(letter)):
                    break
                options.append(row[letter])
            text = row["question"] if _is_empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
            questions.append(
                Question(
                    id=row["index"],
                    image=image,
                    prompt=format_choices(text, options, instruction),
                    target=row.get("answer") or None,
                    group=row.get("category") or "",
                    options=tuple(options),
                    unit=str(int(row["index"]) % _ROTATION_OFFSET),
                )
            )
    return questions


def _is_empty(cell: str | None) -> bool:
    return (cell or "").strip().lower() in _EMPTY_CELLS


def _decode_cell(row: dict[str, Any], images: dict[str, MemoryImage]) -> MemoryImage:
    """Return the image of a row. The image cell contains a base64 image or the index of an earlier row.

    Args:
        row: row of the table.
        images: images of earlier rows, keyed by row index. If the cell contains a new image, it is added.

    Raises:
        ValueError: the cell contains neither a base64 image nor a known index.
    """
    cell = row["image"] or ""
    if cell in images:
        return images[cell]
    if len(cell) < _MIN_IMAGE_CHARS:
        raise ValueError(f"{cell!r} is neither a base64 image nor the index of an earlier row")
    image = MemoryImage(base64.b64decode(cell, validate=True), f"mmbench {row['index']}")
    images[row["index"]] = image
    return image


def mmbench_letter(answer: str, options: Sequence[str]) -> str | None:
    """Extract the option letter from an answer as MMBench does, but without using an LLM for unclear answers.

    If exactly one letter occurs as a separate word, return it. Otherwise, if the text of exactly one option occurs in
    the answer, return the letter of that option.
    """
    words = answer.split()
    letters = LETTERS[: len(options)]
    for form in _LETTER_FORMS:
        matches = [letter for letter in letters if form.format(letter) in words]
        if matches == ["A"] and form == "{}" and len(words) > 3:
            continue  # probably the article "A"
        if len(matches) == 1:
            return matches[0]
    contained = [letter for letter, option in zip(letters, options, strict=False) if option.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def score_mmbench(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy with and without CircularEval, and with CircularEval for each category.

    With CircularEval, a question counts as correct only if it is answered correctly for every rotation of its options.
    Here, an answer without a recognised option counts as wrong. MMBench's server asks an LLM about such answers.
    """
    correct: dict[str, list[float]] = {}  # by unit: one value per rotation
    category: dict[str, str] = {}
    for question, answer in zip(questions, answers, strict=True):
        if question.target is None:
            continue
        is_correct = float(mmbench_letter(answer, question.options) == question.target)
        correct.setdefault(question.unit, []).append(is_correct)
        category.setdefault(question.unit, question.group)
    if not correct:
        return {}
    circular = {unit: min(rotations) for unit, rotations in correct.items()}
    metrics = {
        "accuracy": mean_percent(list(circular.values())),
        "not circular": mean_percent([value for rotations in correct.values() for value in rotations]),
    }
    for name in dict.fromkeys(category.values()):
        metrics[name] = mean_percent([value for unit, value in circular.items() if category[unit] == name])
    return metrics


# ---- SEED-Bench (arXiv 2307.16125) ----------------------------------------------------------------------------------


def read_seed_bench(folder: Path, log: SkipLog) -> list[Question]:
    """Read SEED-Bench.json. The images are in SEED-Bench-image/.

    As in LLaVA-1.5, a video is represented by its middle frame, SEED-Bench-video-image/TYPE_QUESTION.png.
    """
    file = first_existing(folder, "SEED-Bench.json")
    data = read_json(file)
    type_names = {number: name for name, number in data["question_type"].items()}
    questions = []
    for number, row in enumerate(data["questions"], 1):
        question_type = row["question_type_id"]
        question_id = str(row["question_id"])
        if row["data_type"] == "image":
            image = find_image(folder / "SEED-Bench-image", row["data_id"], log, file, number)
        else:
            frame = f"{question_type}_{question_id}.png"
            image = find_image(folder / "SEED-Bench-video-image", frame, log, file, number)
        if image is None:
            continue
        options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
        questions.append(
            Question(
                id=f"{row['data_type']}/{question_id}",
                image=image,
                prompt=format_choices(row["question"], options),
                target=row["answer"],
                group=type_names[question_type],
                options=options,
            )
        )
    return questions


def score_seed(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy overall, for images, for videos, and by question type."""
    correct = []
    correct_by_medium: dict[str, list[float]] = {"image": [], "video": []}
    for question, answer in zip(questions, answers, strict=True):
        is_correct = float(answer.strip() == question.target)
        correct.append(is_correct)
        medium = question.id.partition("/")[0]
        correct_by_medium.setdefault(medium, []).append(is_correct)
    metrics = {"accuracy": mean_percent(correct)}
    metrics |= {medium: mean_percent(values) for medium, values in correct_by_medium.items() if values}
    return metrics | mean_by_group(questions, correct)


TASKS = (
    Task(
        name="scienceqa",
        description="ScienceQA: test questions with an image",
        source="github.com/lupantech/ScienceQA",
        read=read_scienceqa,
        score=score_scienceqa,
        max_new_tokens=1024,
    ),
    Task(
        name="mmbench",
        description="MMBench dev, CircularEval: answers must be correct for all rotations of the options",
        source="github.com/open-compass/MMBench",
        read=read_mmbench,
        score=score_mmbench,
        max_new_tokens=1024,
    ),
    Task(
        name="mmbench-cn",
        description="MMBench dev in Chinese",
        source="github.com/open-compass/MMBench",
        read=read_mmbench_cn,
        score=score_mmbench,
        max_new_tokens=1024,
        llava_folder="mmbench_cn",
    ),
    Task(
        name="seed",
        description="SEED-Bench: images, and the middle frame of videos",
        source="huggingface.co AILab-CVPR/SEED-Bench",
        read=read_seed_bench,
        score=score_seed,
        llava_folder="seed_bench",
    ),
)
