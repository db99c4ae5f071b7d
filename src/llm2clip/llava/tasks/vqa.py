"""Open questions with short answers: VQAv2, VizWiz, TextVQA, GQA.

Answers are compared after a normalisation that is part of the protocol, oddities included: GT-Vision-Lab/VQA's
vqaEval.py, and for TextVQA and what is sent to servers the variant of facebookresearch/mmf's m4c_evaluators.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import first_existing, read_json
from llm2clip.llava.tasks.base import SHORT, Question, Task, group_by, image_file, mean_score

_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(n) for n, word in enumerate(_DIGITS)}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"(\d)(\,)(\d)")
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # meant as a look-behind, but every published figure is made with this
_PERIODS = 32  # re.UNICODE, given where the count belongs: no more are taken out


@lru_cache
def contractions() -> dict[str, str]:
    """How the protocol writes contractions without their apostrophe: the table of vqaEval.py."""
    lines = Path(__file__).with_name("contractions.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


_STRAIGHT = {"aint", "arent", "cant", "couldve", "couldnt", "couldn'tve", "hadn'tve", "weve", "wheres", "whove"}


@lru_cache
def curly_contractions() -> dict[str, str]:
    """The table of VizWiz's scorer: nearly all of its apostrophes are typographic, so that what it mends never equals
    a person's answer with a straight one."""
    found = {}
    for word, mended in contractions().items():
        key = word if word in _STRAIGHT else word.replace("'", "\u2019")
        kept = word in _STRAIGHT and "'" not in word
        found[key] = mended if kept else mended.replace("'", "\u2019")
    return found


def _punctuation(text: str, commas: bool = True) -> str:
    """A mark with a space beside it is taken out, any other becomes a space; in a text with a number such as 1,000 all
    are taken out."""
    out, has_comma = text, commas and _COMMA.search(text) is not None
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or has_comma else " ")
    return _PERIOD.sub("", out, count=_PERIODS)


def _words(text: str, table: dict[str, str] | None = None) -> str:
    """Lower case, numbers to ten as digits, no articles, contractions with their apostrophe."""
    table = table if table is not None else contractions()
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(table.get(word, word) for word in words if word not in ARTICLES)


def _line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_answer(answer: str, table: dict[str, str] | None = None) -> str:
    """An answer as VQA's scorer compares it, or another with its table of contractions."""
    return _words(_punctuation(_line(answer)), table)


def process_answer(answer: str) -> str:
    """An answer as TextVQA's scorer compares it, and as LLaVA sends it to servers."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(_line(text), commas=False))


def agreement(answer: str, answers: Sequence[str]) -> float:
    """The share of people that an answer agrees with, as VQA counts it: of each choice of all answers but one, a third
    for each that is the same, at most 1; the mean of those."""
    return sum(
        min(1.0, sum(answer == other for n, other in enumerate(answers) if n != left_out) / 3)
        for left_out in range(len(answers))
    ) / len(answers)


def vqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VQA's accuracy of one answer, 0 to 1. Where all answers of people are the same, nothing is normalised."""
    answer, answers = _line(answer), [_line(a) for a in answers]
    if len(set(answers)) > 1:
        answer, answers = normalize_answer(answer), [normalize_answer(a) for a in answers]
    return agreement(answer, answers)


def vizwiz_accuracy(answer: str, answers: Sequence[str]) -> float:
    """VizWiz's: people's answers are compared as they are."""
    return agreement(normalize_answer(answer, curly_contractions()), answers)


def textvqa_accuracy(answer: str, answers: Sequence[str]) -> float:
    """TextVQA's: both sides are always processed."""
    return agreement(process_answer(answer), [process_answer(a) for a in answers])


# ---- VQAv2 ----------------------------------------------------------------------------------------------------------


def read_vqav2(folder: Path, log: SkipLog) -> list[Question]:
    """v2_OpenEnded_mscoco_SPLIT_questions.json, with v2_mscoco_SPLIT_annotations.json where people's answers are
    public, and images in SPLIT/: val2014 if it is there, else test-dev2015, whose images are in test2015/."""
    file = first_existing(
        folder, "v2_OpenEnded_mscoco_val2014_questions.json", "v2_OpenEnded_mscoco_test*_questions.json"
    )
    split = file.name.split("_")[3]
    images = split.replace("test-dev", "test")
    known = folder / f"v2_mscoco_{split}_annotations.json"
    answers = {a["question_id"]: a for a in read_json(known)["annotations"]} if known.is_file() else {}
    found = []
    for number, row in enumerate(read_json(file)["questions"], 1):
        name = f"COCO_{images}_{row['image_id']:012d}.jpg"
        if image := image_file(folder / images, name, log, file, number):
            said = answers.get(row["question_id"])
            truth = [a["answer"] for a in said["answers"]] if said else None
            group = said["answer_type"] if said else ""
            found.append(Question(str(row["question_id"]), image, row["question"] + SHORT, truth, group))
    return found


def _vqa_scores(asked: Sequence[Question], answers: Sequence[str], accuracy: Any) -> dict[str, float]:
    known = [(one, answer) for one, answer in zip(asked, answers, strict=True) if one.truth is not None]
    if not known:
        return {}
    values = [accuracy(answer, one.truth) for one, answer in known]
    by = group_by([one for one, _ in known], values)
    return {"accuracy": mean_score(values), **{group: mean_score(some) for group, some in by.items() if group}}


def score_vqav2(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, and that of questions for yes or no, for numbers, and others."""
    return _vqa_scores(asked, answers, vqa_accuracy)


def submit_vqav2(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """For EvalAI's challenge 830. Questions of the whole test set that were not asked are for the sender to add: it
    takes an answer to each, "" for none."""
    rows = [{"question_id": int(one.id), "answer": process_answer(a)} for one, a in zip(asked, answers, strict=True)]
    return {"vqav2.json": rows}


# ---- VizWiz ---------------------------------------------------------------------------------------------------------


def read_vizwiz(folder: Path, log: SkipLog) -> list[Question]:
    """val.json, else test.json, whose answers only the server knows; images in val/ or test/."""
    file = first_existing(folder, "val.json", "test.json", "Annotations/val.json", "Annotations/test.json")
    found = []
    for number, row in enumerate(read_json(file), 1):
        if image := image_file(folder / file.stem, row["image"], log, file, number):
            unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            truth = [a["answer"] for a in row["answers"]] if "answers" in row else None
            prompt = row["question"].capitalize() + unsure + SHORT
            found.append(Question(row["image"], image, prompt, truth, row.get("answer_type", "")))
    return found


def score_vizwiz(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy, and that of each type of answer."""
    return _vqa_scores(asked, answers, vizwiz_accuracy)


def submit_vizwiz(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, Any]:
    """For EvalAI's challenge 1911."""
    return {
        "vizwiz.json": [{"image": one.id, "answer": process_answer(a)} for one, a in zip(asked, answers, strict=True)]
    }


# ---- TextVQA --------------------------------------------------------------------------------------------------------


def read_textvqa(folder: Path, log: SkipLog) -> list[Question]:
    """TextVQA_0.5.1_val.json with TextVQA_Rosetta_OCR_v0.2_val.json, whose words LLaVA-1.5 shows with the question;
    images in train_images/."""
    file = first_existing(folder, "TextVQA_0.5.1_val.json")
    words = read_json(first_existing(folder, "TextVQA_Rosetta_OCR_v0.2_val.json"))["data"]
    seen = {row["image_id"]: row["ocr_tokens"] for row in words}
    found = []
    for number, row in enumerate(read_json(file)["data"], 1):
        if image := image_file(folder / "train_images", f"{row['image_id']}.jpg", log, file, number):
            tokens = ", ".join(seen.get(row["image_id"], []))
            prompt = f"{row['question'].capitalize()}\nReference OCR token: {tokens}{SHORT}"
            found.append(Question(str(row["question_id"]), image, prompt, row["answers"]))
    return found


def score_textvqa(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy."""
    return _vqa_scores(asked, answers, textvqa_accuracy)


# ---- GQA ------------------------------------------------------------------------------------------------------------


def read_gqa(folder: Path, log: SkipLog) -> list[Question]:
    """testdev_balanced_questions.json, and images/ beside it."""
    file = first_existing(folder, "testdev_balanced_questions.json", "*/testdev_balanced_questions.json")
    found = []
    for number, (name, row) in enumerate(read_json(file).items(), 1):
        if image := image_file(file.parent / "images", f"{row['imageId']}.jpg", log, file, number):
            group = "open" if row.get("types", {}).get("structural") == "query" else "binary"
            found.append(Question(name, image, row["question"] + SHORT, row["answer"], group))
    return found


def score_gqa(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy: the answer in lower case, without periods at its end, is the one; and of binary and open questions."""
    values = [float(a.rstrip(".").lower() == one.truth) for one, a in zip(asked, answers, strict=True)]
    return {
        "accuracy": mean_score(values),
        **{group: mean_score(some) for group, some in group_by(asked, values).items()},
    }


TASKS = (
    Task(
        "vqav2", "VQAv2: agreement with ten people", "visualqa.org/download: questions, annotations, COCO's images",
        read_vqav2, score_vqav2, submit_vqav2,
    ),
    Task("gqa", "GQA testdev balanced: exact answers", "cs.stanford.edu/people/dorarad/gqa", read_gqa, score_gqa),
    Task(
        "vizwiz", "VizWiz: photographs by blind people", "vizwiz.org: Annotations, val or test images",
        read_vizwiz, score_vizwiz, submit_vizwiz,
    ),
    Task("textvqa", "TextVQA val, with OCR's words", "textvqa.org: v0.5.1, Rosetta OCR v0.2, train_val images",
         read_textvqa, score_textvqa),
)  # fmt: skip
