"""Benchmarks with open-ended questions and short answers: VQAv2, VizWiz, TextVQA and GQA.

The benchmarks define how answers are normalised before they are compared, and this module reproduces these rules
exactly. VQAv2 and VizWiz use the rules of vqaEval.py in GT-Vision-Lab/VQA. TextVQA, and answers submitted to servers,
use the rules of m4c_evaluators.py in facebookresearch/mmf.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import first_existing, read_json
from llm2clip.llava.tasks.base import SHORT_ANSWER, Question, Task, find_image, mean_by_group, mean_percent

# ---- answer normalisation -------------------------------------------------------------------------------------------

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_THOUSANDS_COMMA = re.compile(r"(\d)(\,)(\d)")
# `(?!<=\d)` was apparently meant to be the look-behind `(?<!\d)`, but vqaEval.py uses this pattern,
# and all reported results depend on it.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# vqaEval.py passes re.UNICODE (32) as the count argument of re.sub, so at most 32 periods are removed.
_MAX_PERIODS = 32

# Contractions that have a straight apostrophe or no apostrophe, instead of a typographic one, in VizWiz's table.
_STRAIGHT_IN_VIZWIZ = {
    "aint", "arent", "cant", "couldve", "couldnt", "couldn'tve", "hadn'tve", "weve", "wheres", "whove",
}  # fmt: skip


@lru_cache
def contractions() -> dict[str, str]:
    """Return vqaEval.py's mapping from contractions with a missing apostrophe to their correct spelling."""
    lines = Path(__file__).with_name("contractions.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


@lru_cache
def vizwiz_contractions() -> dict[str, str]:
    """Return the contraction table of VizWiz's scorer, in which almost all apostrophes are typographic (U+2019).

    An answer corrected with this table therefore never equals a human answer with a straight apostrophe.
    """
    table = {}
    for word, correct in contractions().items():
        straight = word in _STRAIGHT_IN_VIZWIZ
        key = word if straight else word.replace("'", "\u2019")
        table[key] = correct if straight and "'" not in word else correct.replace("'", "\u2019")
    return table


def normalize_answer(answer: str, table: dict[str, str] | None = None) -> str:
    """Normalise an answer as vqaEval.py does. `table` maps contractions to corrections (default: `contractions()`)."""
    return _normalize_words(_remove_punctuation(_to_single_line(answer)), table)


def process_answer(answer: str) -> str:
    """Normalise an answer as TextVQA's scorer does, and as LLaVA does before submitting answers."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalize_words(_remove_punctuation(_to_single_line(text), check_commas=False))


def _to_single_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _remove_punctuation(text: str, check_commas: bool = True) -> str:
    """Remove punctuation marks that occur next to a space, and replace all others with a space.

    If the text contains a number such as 1,000, all marks are removed, unless `check_commas` is False.
    """
    has_thousands_comma = check_commas and _THOUSANDS_COMMA.search(text) is not None
    cleaned = text
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if next_to_space or has_thousands_comma else " ")
    return _PERIOD.sub("", cleaned, count=_MAX_PERIODS)


def _normalize_words(text: str, table: dict[str, str] | None = None) -> str:
    """Convert to lower case, write numbers up to ten as digits, drop articles and correct contractions."""
    table = table if table is not None else contractions()
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(table.get(word, word) for word in words if word not in ARTICLES)


# ---- accuracy -------------------------------------------------------------------------------------------------------


def agreement(answer: str, human_answers: Sequence[str]) -> float:
    """Return VQA's score for the agreement of an answer with human answers, from 0 to 1.

    The score is the mean of min(1, matches / 3) over all ways to leave out one human answer.
    """
    credits = []
    for left_out in range(len(human_answers)):
        matches = sum(answer == other for n, other in enumerate(human_answers) if n != left_out)
        credits.append(min(1.0, matches / 3))
    return sum(credits) / len(credits)


def vqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer, from 0 to 1. Answers are normalised unless all human answers agree."""
    answer = _to_single_line(answer)
    human_answers = [_to_single_line(other) for other in human_answers]
    if len(set(human_answers)) > 1:
        answer = normalize_answer(answer)
        human_answers = [normalize_answer(other) for other in human_answers]
    return agreement(answer, human_answers)


def vizwiz_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Return the VizWiz accuracy of an answer, from 0 to 1. Human answers are not normalised."""
    return agreement(normalize_answer(answer, vizwiz_contractions()), human_answers)


def textvqa_accuracy(answer: str, human_answers: Sequence[str]) -> float:
    """Return the TextVQA accuracy of an answer, from 0 to 1. All answers are normalised by `process_answer`."""
    return agreement(process_answer(answer), [process_answer(other) for other in human_answers])


def _mean_accuracy(
    questions: Sequence[Question], answers: Sequence[str], accuracy: Callable[[str, Sequence[str]], float]
) -> dict[str, float]:
    """Return the mean accuracy overall and by group, or an empty dict if no question has human answers."""
    scored = []
    values = []
    for question, answer in zip(questions, answers, strict=True):
        if question.target is not None:
            scored.append(question)
            values.append(accuracy(answer, question.target))
    if not scored:
        return {}
    by_group = {group: value for group, value in mean_by_group(scored, values).items() if group}
    return {"accuracy": mean_percent(values), **by_group}


# ---- VQAv2 ----------------------------------------------------------------------------------------------------------


def read_vqav2(folder: Path, log: SkipLog) -> list[Question]:
    """Read questions from v2_OpenEnded_mscoco_SPLIT_questions.json, and answers from v2_mscoco_SPLIT_annotations.json.

    The split is val2014 if its question file exists, and otherwise test-dev2015, which has no annotations. The images
    are in val2014/ or test2015/.
    """
    file = first_existing(
        folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_OpenEnded_mscoco_test*_questions.json"
    )
    split = file.name.split("_")[3]
    image_split = split.replace("test-dev", "test")
    annotation_file = folder / f"v2_mscoco_{split}_annotations.json"
    annotations = {}
    if annotation_file.is_file():
        annotations = {row["question_id"]: row for row in read_json(annotation_file)["annotations"]}
    questions = []
    for number, row in enumerate(read_json(file)["questions"], 1):
        image_name = f"COCO_{image_split}_{row['image_id']:012d}.jpg"
        image = find_image(folder / image_split, image_name, log, file, number)
        if image is None:
            continue
        annotation = annotations.get(row["question_id"])
        questions.append(
            Question(
                id=str(row["question_id"]),
                image=image,
                prompt=row["question"] + SHORT_ANSWER,
                target=[human["answer"] for human in annotation["answers"]] if annotation else None,
                group=annotation["answer_type"] if annotation else "",
            )
        )
    return questions


def score_vqav2(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy overall and by answer type: yes/no, number, other."""
    return _mean_accuracy(questions, answers, vqa_accuracy)


def submit_vqav2(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Return the submission for EvalAI challenge 830.

    The server expects an answer to every question in the test set. Add missing questions with "" as the answer.
    """
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        rows.append({"question_id": int(question.id), "answer": process_answer(answer)})
    return {"vqav2.json": rows}


# ---- VizWiz ---------------------------------------------------------------------------------------------------------

UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def read_vizwiz(folder: Path, log: SkipLog) -> list[Question]:
    """Read val.json, or test.json, which has no human answers. The images are in val/ or test/."""
    file = first_existing(folder, "val.json", "test.json", "Annotations/val.json", "Annotations/test.json")
    questions = []
    for number, row in enumerate(read_json(file), 1):
        image = find_image(folder / file.stem, row["image"], log, file, number)
        if image is None:
            continue
        questions.append(
            Question(
                id=row["image"],
                image=image,
                prompt=row["question"].capitalize() + UNANSWERABLE + SHORT_ANSWER,
                target=[human["answer"] for human in row["answers"]] if "answers" in row else None,
                group=row.get("answer_type", ""),
            )
        )
    return questions


def score_vizwiz(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy overall and by answer type."""
    return _mean_accuracy(questions, answers, vizwiz_accuracy)


def submit_vizwiz(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """Return the submission for EvalAI challenge 1911."""
    rows = []
    for question, answer in zip(questions, answers, strict=True):
        rows.append({"image": question.id, "answer": process_answer(answer)})
    return {"vizwiz.json": rows}


# ---- TextVQA --------------------------------------------------------------------------------------------------------


def read_textvqa(folder: Path, log: SkipLog) -> list[Question]:
    """Read TextVQA_0.5.1_val.json and TextVQA_Rosetta_OCR_v0.2_val.json. The images are in train_images/.

    As in LLaVA-1.5, the OCR tokens are included in the prompt.
    """
    file = first_existing(folder, "TextVQA_0.5.1_val.json")
    ocr_rows = read_json(first_existing(folder, "TextVQA_Rosetta_OCR_v0.2_val.json"))["data"]
    ocr_tokens = {row["image_id"]: row["ocr_tokens"] for row in ocr_rows}
    questions = []
    for number, row in enumerate(read_json(file)["data"], 1):
        image = find_image(folder / "train_images", f"{row['image_id']}.jpg", log, file, number)
        if image is None:
            continue
        tokens = ", ".join(ocr_tokens.get(row["image_id"], []))
        questions.append(
            Question(
                id=str(row["question_id"]),
                image=image,
                prompt=f"{row['question'].capitalize()}\nReference OCR token: {tokens}{SHORT_ANSWER}",
                target=row["answers"],
            )
        )
    return questions


def score_textvqa(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the mean accuracy."""
    return _mean_accuracy(questions, answers, textvqa_accuracy)


# ---- GQA ------------------------------------------------------------------------------------------------------------


def read_gqa(folder: Path, log: SkipLog) -> list[Question]:
    """Read testdev_balanced_questions.json. The images are in images/, next to that file."""
    file = first_existing(folder, "testdev_balanced_questions.json", "*/testdev_balanced_questions.json")
    questions = []
    for number, (question_id, row) in enumerate(read_json(file).items(), 1):
        image = find_image(file.parent / "images", f"{row['imageId']}.jpg", log, file, number)
        if image is None:
            continue
        is_open = row.get("types", {}).get("structural") == "query"
        questions.append(
            Question(
                id=question_id,
                image=image,
                prompt=row["question"] + SHORT_ANSWER,
                target=row["answer"],
                group="open" if is_open else "binary",
            )
        )
    return questions


def score_gqa(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the accuracy overall, for binary questions and for open questions.

    An answer is correct if it equals the target after conversion to lower case and removal of trailing periods.
    """
    correct = []
    for question, answer in zip(questions, answers, strict=True):
        correct.append(float(answer.rstrip(".").lower() == question.target))
    return {"accuracy": mean_percent(correct), **mean_by_group(questions, correct)}


TASKS = (
    Task(
        name="vqav2",
        description="VQAv2: agreement with ten human answers",
        source="visualqa.org/download: questions, annotations, COCO images",
        read=read_vqav2,
        score=score_vqav2,
        submission=submit_vqav2,
    ),
    Task(
        name="gqa",
        description="GQA testdev balanced: exact match",
        source="cs.stanford.edu/people/dorarad/gqa",
        read=read_gqa,
        score=score_gqa,
    ),
    Task(
        name="vizwiz",
        description="VizWiz: photos taken by blind people",
        source="vizwiz.org: the annotations, and the val or test images",
        read=read_vizwiz,
        score=score_vizwiz,
        submission=submit_vizwiz,
    ),
    Task(
        name="textvqa",
        description="TextVQA val, with OCR tokens in the prompt",
        source="textvqa.org: v0.5.1, Rosetta OCR v0.2, train_val images",
        read=read_textvqa,
        score=score_textvqa,
    ),
)
