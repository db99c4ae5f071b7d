"""Multiple choice: ScienceQA-IMG, MMBench and MMBench-CN, SEED-Bench."""

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
from llm2clip.llava.tasks.base import LETTER, Question, Task, group_by, image_file, mean_score

LETTERS = "ABCDE"


def list_options(question: str, options: Sequence[str], ending: str = LETTER) -> str:
    """A question, its options by letter, and what LLaVA-1.5 asks for."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines]) + ending


# ---- ScienceQA ------------------------------------------------------------------------------------------------------


def read_scienceqa(folder: Path, log: SkipLog) -> list[Question]:
    """problems.json and pid_splits.json; of the test split what has an image, in images/test/ID/image.png (the part
    that LLaVA-1.5's table has)."""
    file = first_existing(folder, "problems.json", "*/problems.json")
    problems = read_json(file)
    found = []
    for number, name in enumerate(read_json(first_existing(folder, "pid_splits.json", "*/pid_splits.json"))["test"], 1):
        row = problems[name]
        if not row["image"]:
            continue
        if image := image_file(file.parent / "images" / "test" / name, row["image"], log, file, number):
            context = f"Context: {row['hint']}\n" if row["hint"] else ""
            prompt = list_options(context + row["question"], row["choices"])
            options = tuple(row["choices"])
            found.append(Question(name, image, prompt, LETTERS[row["answer"]], row["subject"], options))
    return found


def scienceqa_letter(answer: str) -> str | None:
    """LLaVA's reading of an answer: a letter, `A. ...`, or one `The answer is A.`"""
    if answer in LETTERS and len(answer) == 1:
        return answer
    if len(answer) >= 3 and answer[0] in LETTERS and answer[1:3] == ". ":
        return answer[0]
    said = re.findall(r"The answer is ([A-Z]).", answer)
    return said[0] if len(said) == 1 else None


def score_scienceqa(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy over the questions with an image, and of each subject."""
    right = [float(scienceqa_letter(a.strip()) == one.truth) for one, a in zip(asked, answers, strict=True)]
    return {
        "accuracy": mean_score(right),
        **{subject: mean_score(some) for subject, some in group_by(asked, right).items()},
    }


# ---- MMBench (arXiv 2307.06281) -------------------------------------------------------------------------------------

MMBENCH_CN = "\n请直接回答选项字母。"
_BASE = 1_000_000  # rows with the options rotated have this, or more of it, added to their index
_DECORATED = ("{}", "{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def read_mmbench(folder: Path, log: SkipLog) -> list[Question]:
    """mmbench_dev_20230712.tsv, or a newer one in English: images in the table, base64."""
    return _mmbench(first_existing(folder, "mmbench_dev_2*.tsv", "mmbench_dev_en_*.tsv"), log, LETTER)


def read_mmbench_cn(folder: Path, log: SkipLog) -> list[Question]:
    """mmbench_dev_cn_20231003.tsv."""
    return _mmbench(first_existing(folder, "mmbench_dev_cn_*.tsv"), log, MMBENCH_CN)


def _mmbench(file: Path, log: SkipLog, ending: str) -> list[Question]:
    csv.field_size_limit(max(csv.field_size_limit(), min(sys.maxsize, 1 << 30)))  # for pictures in cells
    found = []
    images: dict[str, MemoryImage] = {}
    with file.open(encoding="utf-8", newline="") as table:
        for number, row in enumerate(csv.DictReader(table, delimiter="\t"), 1):
            log.count_row()
            options: list[str] = []
            for letter in "ABCD":
                if _empty(row.get(letter)):
                    break
                options.append(row[letter])
            try:
                image = _from_table(row, images)
            except ValueError as error:
                log.skip(str(file), number, "no image", error)
                continue
            question = row["question"] if _empty(row.get("hint")) else f"{row['hint']}\n{row['question']}"
            found.append(
                Question(
                    row["index"], image, list_options(question, options, ending), row.get("answer") or None,
                    row.get("category") or "", tuple(options), str(int(row["index"]) % _BASE),
                )
            )  # fmt: skip
    return found


def _empty(cell: str | None) -> bool:
    """What pandas, by which LLaVA reads the table, takes for nothing, or what LLaVA does."""
    return (cell or "").strip().lower() in ("", "nan", "none", "na", "n/a", "null", "<na>")


def _from_table(row: dict[str, Any], images: dict[str, MemoryImage]) -> MemoryImage:
    """A cell with a picture, or with the index of the row that has it.

    Raises:
        ValueError: it is neither.
    """
    cell = row["image"] or ""
    if cell in images:
        return images[cell]
    if len(cell) < 64:
        raise ValueError(f"{cell!r} is no image, nor an earlier row's index")
    images[row["index"]] = MemoryImage(base64.b64decode(cell, validate=True), f"mmbench {row['index']}")
    return images[row["index"]]


def mmbench_letter(answer: str, options: Sequence[str]) -> str | None:
    """MMBench's reading of an answer, without a language model's help: the one letter that stands alone, then the one
    option whose text it contains."""
    words = answer.split()
    letters = LETTERS[: len(options)]
    for form in _DECORATED:
        there = [letter for letter in letters if form.format(letter) in words]
        if len(there) == 1:
            if there[0] == "A" and form == "{}" and len(words) > 3:
                continue  # an article
            return there[0]
    contained = [letter for letter, option in zip(letters, options, strict=False) if option.lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def score_mmbench(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """CircularEval: a question counts as right if it is in every rotation of its options; overall, by category, and
    what it would be without the circle. An answer that names no option is wrong (the server asks a language model
    first)."""
    known = [(one, a) for one, a in zip(asked, answers, strict=True) if one.truth is not None]
    if not known:
        return {}
    right: dict[str, list[float]] = {}
    group: dict[str, str] = {}
    for one, answer in known:
        right.setdefault(one.unit, []).append(float(mmbench_letter(answer, one.options) == one.truth))
        group.setdefault(one.unit, one.group)
    circular = {base: min(some) for base, some in right.items()}
    found = {
        "accuracy": mean_score(list(circular.values())),
        "not circular": mean_score([v for s in right.values() for v in s]),
    }
    for name in dict.fromkeys(group.values()):
        found[name] = mean_score([value for base, value in circular.items() if group[base] == name])
    return found


# ---- SEED-Bench (arXiv 2307.16125) ----------------------------------------------------------------------------------


def read_seed(folder: Path, log: SkipLog) -> list[Question]:
    """SEED-Bench.json; images in SEED-Bench-image/, and of videos the frame in the middle, as LLaVA-1.5 shows it, in
    SEED-Bench-video-image/TYPE_QUESTION.png."""
    file = first_existing(folder, "SEED-Bench.json")
    data = read_json(file)
    names = {number: name for name, number in data["question_type"].items()}
    found = []
    for number, row in enumerate(data["questions"], 1):
        kind, name = row["question_type_id"], str(row["question_id"])
        if row["data_type"] == "image":
            image = image_file(folder / "SEED-Bench-image", row["data_id"], log, file, number)
        else:
            image = image_file(folder / "SEED-Bench-video-image", f"{kind}_{name}.png", log, file, number)
        if image:
            options = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
            prompt = list_options(row["question"], options)
            found.append(Question(f"{row['data_type']}/{name}", image, prompt, row["answer"], names[kind], options))
    return found


def score_seed(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Accuracy over all questions, those of images and those of videos, and by their type."""
    right = [float(a.strip() == one.truth) for one, a in zip(asked, answers, strict=True)]
    found = {"accuracy": mean_score(right)}
    for kind in ("image", "video"):
        some = [value for one, value in zip(asked, right, strict=True) if one.id.startswith(kind)]
        if some:
            found[kind] = mean_score(some)
    return found | {name: mean_score(some) for name, some in group_by(asked, right).items()}


TASKS = (
    Task("scienceqa", "ScienceQA, the test questions with an image", "github.com/lupantech/ScienceQA",
         read_scienceqa, score_scienceqa, tokens=1024),
    Task("mmbench", "MMBench dev: every rotation of the options right", "github.com/open-compass/MMBench",
         read_mmbench, score_mmbench, tokens=1024),
    Task("mmbench-cn", "MMBench dev in Chinese", "github.com/open-compass/MMBench",
         read_mmbench_cn, score_mmbench, tokens=1024, folder="mmbench_cn"),
    Task("seed", "SEED-Bench: images, and the middle frame of videos", "huggingface.co AILab-CVPR/SEED-Bench",
         read_seed, score_seed, folder="seed_bench"),
)  # fmt: skip
