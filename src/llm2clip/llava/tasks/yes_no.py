"""Benchmarks with yes-or-no questions: POPE and MME."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llm2clip.data.records import Record
from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import first_existing, read_jsonl
from llm2clip.llava.pope import OBJECTS_PER_IMAGE, Sampling, make_questions
from llm2clip.llava.tasks.base import SHORT_ANSWER, Question, Task, find_image, group_by, mean_percent

# ---- POPE (arXiv 2305.10355) ----------------------------------------------------------------------------------------


def says_yes(answer: str) -> bool:
    """Return True if no word before the first period of an answer is "No", "no" or "not", as in POPE."""
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "no", "not"} & set(words)


def read_pope(folder: Path, log: SkipLog) -> list[Question]:
    """Read coco_pope_{random,popular,adversarial}.json, which contain one question per line.

    The files may be in `folder` or in a subfolder such as coco/. The images are in val2014/.
    """
    questions = []
    for sampling in Sampling:
        file = first_existing(folder, f"coco_pope_{sampling}.json", f"*/coco_pope_{sampling}.json")
        for number, row in read_jsonl(file):
            image = find_image(folder / "val2014", row["image"], log, file, number)
            if image is None:
                continue
            questions.append(
                Question(
                    id=f"{sampling}-{row['question_id']}",
                    image=image,
                    prompt=row["text"] + SHORT_ANSWER,
                    target=row["label"],
                    group=sampling,
                )
            )
    return questions


def pope_questions(records: Sequence[Record], per_image: int = OBJECTS_PER_IMAGE, seed: int = 0) -> list[Question]:
    """Make POPE questions about captioned images. See `llava/pope.py`."""
    questions = []
    for sampling in Sampling:
        for n, question in enumerate(make_questions(records, sampling, per_image, seed)):
            questions.append(
                Question(
                    id=f"{sampling}-{n}",
                    image=question.image,
                    prompt=question.text + SHORT_ANSWER,
                    target=question.answer,
                    group=sampling,
                )
            )
    return questions


def score_pope(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the mean F1 and accuracy over the sampling strategies, followed by the metrics for each strategy.

    The metrics for a strategy are accuracy, precision, recall, F1 (as in LLaVA-1.5's table), and the percentage of yes
    answers.
    """
    pairs = [(question.target == "yes", says_yes(answer)) for question, answer in zip(questions, answers, strict=True)]
    by_sampling = {sampling: _yes_metrics(group) for sampling, group in group_by(questions, pairs).items()}
    if not by_sampling:
        return {}
    metrics = {}
    for name in ("F1", "accuracy"):
        metrics[name] = sum(values[name] for values in by_sampling.values()) / len(by_sampling)
    for sampling, values in by_sampling.items():
        metrics |= {f"{sampling} {name}": value for name, value in values.items()}
    return metrics


def _yes_metrics(pairs: Sequence[tuple[bool, bool]]) -> dict[str, float]:
    """Compute metrics from pairs (target is yes, answer is yes), where yes is the positive class."""
    true_positives = sum(target and answer for target, answer in pairs)
    predicted = sum(answer for _, answer in pairs)
    positives = sum(target for target, _ in pairs)
    precision = true_positives / predicted if predicted else 0.0
    recall = true_positives / positives if positives else 0.0
    f1 = 2 * precision * recall / (precision + recall) if true_positives else 0.0
    return {
        "accuracy": mean_percent([target == answer for target, answer in pairs]),
        "precision": 100 * precision,
        "recall": 100 * recall,
        "F1": 100 * f1,
        "yes": 100 * predicted / len(pairs),
    }


# ---- MME (arXiv 2306.13394) -----------------------------------------------------------------------------------------

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def read_mme(folder: Path, log: SkipLog) -> list[Question]:
    """Read the questions and images in each folder MME_Benchmark_release_version/SUBTASK.

    The questions about NAME.jpg or NAME.png are in NAME.txt. Each text file has two lines, and each line is either
    `question<tab>Yes` or `question<tab>No`. In some subtasks, the text files are in
    questions_answers_YN/ and the images are in images/.
    """
    root = next((path for path in (*folder.glob("MME_Benchmark_release_version*"), folder) if path.is_dir()), folder)
    questions = []
    for subtask in (*PERCEPTION, *COGNITION):
        subfolder = first_existing(root, subtask, f"*/{subtask}")
        images = subfolder / "images" if (subfolder / "images").is_dir() else subfolder
        texts = subfolder / "questions_answers_YN"
        for file in sorted((texts if texts.is_dir() else subfolder).glob("*.txt")):
            names = [f"{file.stem}.{extension}" for extension in ("jpg", "png")]
            image_name = next((name for name in names if (images / name).is_file()), "")
            for number, line in enumerate(file.read_text(encoding="utf-8").strip().splitlines(), 1):
                image = find_image(images, image_name, log, file, number)
                if image is None:
                    continue
                text, _, target = line.rpartition("\t")
                text = text.strip().removesuffix("Please answer yes or no.").strip()
                unit = f"{subtask}/{file.stem}"
                questions.append(
                    Question(
                        id=f"{unit}/{number}",
                        image=image,
                        prompt=text + SHORT_ANSWER,
                        target=target.strip().lower(),
                        group=subtask,
                        unit=unit,
                    )
                )
    return questions


def mme_answer(answer: str) -> str:
    """Classify an answer as yes, no or other, as MME does."""
    answer = answer.lower()
    if answer in ("yes", "no"):
        return answer
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def score_mme(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Return the MME scores: perception (at most 2,000), cognition (at most 800) and each of the 14 subtasks.

    The points for a subtask are the sum of two percentages: the accuracy, and the percentage of images for which both
    questions are answered correctly.
    """
    correct_of_image: dict[str, dict[str, list[float]]] = {}  # by subtask, then by image
    for question, answer in zip(questions, answers, strict=True):
        correct = float(mme_answer(answer.strip()) == question.target)
        correct_of_image.setdefault(question.group, {}).setdefault(question.unit, []).append(correct)
    points: dict[str, float] = {}
    for subtask, by_image in correct_of_image.items():
        accuracy = mean_percent([correct for values in by_image.values() for correct in values])
        both_correct = mean_percent([min(values) for values in by_image.values()])
        points[subtask] = accuracy + both_correct
    totals = {
        "perception": sum(points.get(name, 0.0) for name in PERCEPTION),
        "cognition": sum(points.get(name, 0.0) for name in COGNITION),
    }
    return totals | points


TASKS = (
    Task(
        name="pope",
        description="POPE: whether objects are present, with three sampling strategies",
        source="github.com/AoiDragon/POPE (output/coco) and COCO val2014 images",
        read=read_pope,
        score=score_pope,
    ),
    Task(
        name="mme",
        description="MME: yes-or-no questions in fourteen subtasks, scored in points",
        source="on request from the authors",
        read=read_mme,
        score=score_mme,
        llava_folder="MME",
    ),
)
