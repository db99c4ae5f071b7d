"""Questions for yes or no: POPE and MME."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import first_existing, read_jsonl
from llm2clip.llava.pope import Sampling, make_questions
from llm2clip.llava.tasks.base import SHORT, Question, Task, group_by, image_file, mean_score

# ---- POPE (arXiv 2305.10355) ----------------------------------------------------------------------------------------


def says_yes(answer: str) -> bool:
    """POPE's reading: no if one of No, no, not is among the words before the first period; else yes."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def read_pope(folder: Path, log: SkipLog) -> list[Question]:
    """coco_pope_{random,popular,adversarial}.json, an object a line, in coco/ or in the folder; images in val2014/."""
    found = []
    for sampling in Sampling:
        file = first_existing(folder, f"coco_pope_{sampling}.json", f"*/coco_pope_{sampling}.json")
        for number, row in read_jsonl(file):
            if image := image_file(folder / "val2014", row["image"], log, file, number):
                name = f"{sampling}-{row['question_id']}"
                found.append(Question(name, image, row["text"] + SHORT, row["label"], sampling))
    return found


def pope_metrics(records: Sequence[Record], each: int = 3, seed: int = 0) -> list[Question]:
    """The same of any captioned records: see `llava/pope.py`."""
    return [
        Question(f"{sampling}-{n}", question.image, question.text + SHORT, question.answer, sampling)
        for sampling in Sampling
        for n, question in enumerate(make_questions(records, sampling, each, seed))
    ]


def score_pope(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Mean F1 of the samplings (LLaVA-1.5's table has each), and of each accuracy, precision, recall, F1, and the share
    of answers that are yes."""
    found: dict[str, float] = {}
    pairs = [(one.truth == "yes", says_yes(answer)) for one, answer in zip(asked, answers, strict=True)]
    for sampling, some in group_by(asked, pairs).items():
        right = sum(truth and said for truth, said in some)
        said_yes, true = sum(said for _, said in some), sum(truth for truth, _ in some)
        precision = right / said_yes if said_yes else 0.0
        recall = right / true if true else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        found[f"{sampling} accuracy"] = mean_score([truth == said for truth, said in some])
        found[f"{sampling} precision"], found[f"{sampling} recall"] = 100 * precision, 100 * recall
        found[f"{sampling} F1"], found[f"{sampling} yes"] = 100 * f1, 100 * said_yes / len(some)
    f1s = [value for name, value in found.items() if name.endswith("F1")]
    accuracies = [value for name, value in found.items() if name.endswith("accuracy")]
    return {"F1": sum(f1s) / len(f1s), "accuracy": sum(accuracies) / len(accuracies), **found} if f1s else {}


# ---- MME (arXiv 2306.13394) -----------------------------------------------------------------------------------------

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_mme(folder: Path, log: SkipLog) -> list[Question]:
    """MME_Benchmark_release_version/SUBTASK: NAME.txt with two lines `question<tab>Yes or No` beside NAME.jpg or .png,
    or in questions_answers_YN/ and images/."""
    root = next((f for f in (*folder.glob("MME_Benchmark_release_version*"), folder) if f.is_dir()), folder)
    found = []
    for subtask in (*PERCEPTION, *COGNITION):
        place = first_existing(root, subtask, f"*/{subtask}")
        images = place / "images" if (place / "images").is_dir() else place
        texts = place / "questions_answers_YN" if (place / "questions_answers_YN").is_dir() else place
        for file in sorted(texts.glob("*.txt")):
            name = next((f"{file.stem}.{e}" for e in ("jpg", "png") if (images / f"{file.stem}.{e}").is_file()), "")
            for number, line in enumerate(file.read_text(encoding="utf-8").strip().splitlines(), 1):
                question, _, truth = line.rpartition("\t")
                if image := image_file(images, name, log, file, number):
                    question = question.strip().removesuffix("Please answer yes or no.").strip()
                    pair, truth = f"{subtask}/{file.stem}", truth.strip().lower()
                    found.append(Question(f"{pair}/{number}", image, question + SHORT, truth, subtask, unit=pair))
    return found


def mme_answer(answer: str) -> str:
    """MME's reading of an answer: yes, no, or other."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def score_mme(asked: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Points: of a subtask the accuracy and the share of images whose two questions are both right, in percent, added;
    perception sums ten subtasks (of 2,000), cognition four (of 800)."""
    right = [float(mme_answer(answer.strip()) == one.truth) for one, answer in zip(asked, answers, strict=True)]
    points: dict[str, float] = {}
    for subtask, values in group_by(asked, right).items():
        images: dict[str, list[float]] = {}
        for one, value in zip((a for a in asked if a.group == subtask), values, strict=True):
            images.setdefault(one.unit, []).append(value)
        points[subtask] = mean_score(values) + mean_score([min(both) for both in images.values()])
    total: dict[str, Any] = {
        "perception": sum(points.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(points.get(name, 0.0) for name in COGNITION),
    }
    return total | points


TASKS = (
    Task("pope", "POPE: objects that are there or not, three samplings",
         "github.com/AoiDragon/POPE output/coco, and COCO's val2014 images", read_pope, score_pope),
    Task("mme", "MME: yes or no, fourteen subtasks, in points", "its authors give it on request", read_mme, score_mme,
         folder="MME"),
)  # fmt: skip
