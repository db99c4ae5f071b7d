"""Tests of the LLaVA benchmarks on tiny files in the official formats, with results worked out by hand."""

from __future__ import annotations

import base64
import json
import math
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from PIL import Image

from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage, MemoryImage
from llm2clip.data.images import load_image
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.data.training_images import TRAINING_IMAGES_FILE, hash_images, save_training_images
from llm2clip.llava.build import build_llava
from llm2clip.llava.caption_metrics import caption_scores, tokenize
from llm2clip.llava.chat_template import Conversation, tokenize_and_label
from llm2clip.llava.evaluate import GenerationOptions, caption_task, evaluate_model, pope_task
from llm2clip.llava.generate import AnswerGenerator
from llm2clip.llava.tasks import TASKS, Question
from llm2clip.llava.tasks.base import OPTION_LETTER, SHORT_ANSWER, first_units
from llm2clip.llava.tasks.llm_judge import MM_VET_PROMPT, OpenAIJudge, judge_llava_bench, judge_mm_vet
from llm2clip.llava.tasks.multiple_choice import OPTION_LETTER_CN, mmbench_letter, scienceqa_letter
from llm2clip.llava.tasks.vqa import (
    UNANSWERABLE,
    agreement,
    contractions,
    normalize_answer,
    process_answer,
    vizwiz_accuracy,
    vqa_accuracy,
)
from llm2clip.llava.tasks.yes_no import mme_answer, says_yes
from search_fixtures import running_server
from test_export import hf_tower


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "red").save(path, "PNG")
    return path


def write(path: Path, data: Any) -> None:
    """Write text, or anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def read(name: str, folder: Path, log: SkipLog | None = None) -> list[Question]:
    return TASKS[name].read(folder, log or SkipLog())


def score(name: str, questions: list[Question], *answers: str) -> dict[str, float]:
    """Return the metrics of a benchmark, rounded."""
    return {metric: round(value, 2) for metric, value in TASKS[name].score(questions, answers).items()}


# ---- open questions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The  two Dogs", "2 dogs"),
        ("dont know!", "don't know"),
        ("1,000 people/day", "1000 peopleday"),  # all punctuation is removed next to a thousands comma
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("3.5 a.b 7.", "3.5 ab 7"),
        ("T-shirt", "t shirt"),
        ("none", "0"),
        ("a", ""),
        ("it's 10:30", "it's 10:30"),
        ("somebody'd", "somebodyd"),
        ("Jack's 1,000?", "jack's 1000"),
    ],
)
def test_normalize_answer_follows_vqa_eval(answer: str, expected: str) -> None:
    assert normalize_answer(answer) == expected


def test_process_answer_separates_possessives() -> None:
    assert process_answer("Jack's 1,000?") == "jack 's 1000"


def test_contractions_table_is_complete() -> None:
    assert len(contractions()) == 120


def test_agreement_depends_on_the_number_of_equal_answers() -> None:
    for equal, expected in enumerate((0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1)):
        assert agreement("x", ["x"] * equal + ["y"] * (10 - equal)) == pytest.approx(expected)


def test_vqa_accuracy_normalises_only_if_human_answers_differ() -> None:
    assert vqa_accuracy("A Dog.", ["dog"] * 9 + ["cat"]) == 1
    assert vqa_accuracy("Dog", ["dog"] * 10) == 0
    assert vqa_accuracy("dog", ["dog"] * 10) == 1


def human_answers(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]


def test_vqav2_val_is_scored_and_test_is_submitted(tmp_path: Path) -> None:
    for n in (1, 2):
        write_image(tmp_path / f"val2014/COCO_val2014_{n:012d}.jpg")
    rows = [{"image_id": n, "question": f"Q{n}?", "question_id": n * 1000} for n in (1, 2, 3)]
    write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": rows})
    annotations = [
        {"question_id": 1000, "answers": human_answers(*["yes"] * 7, *["no"] * 3), "answer_type": "yes/no"},
        {"question_id": 2000, "answers": human_answers(*["two"] * 2, *["3"] * 8), "answer_type": "number"},
    ]
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": annotations})
    log = SkipLog(None, 1.0)
    questions = read("vqav2", tmp_path, log)
    assert log.skipped == {"no image": 1}
    assert [question.prompt for question in questions] == ["Q1?" + SHORT_ANSWER, "Q2?" + SHORT_ANSWER]
    assert score("vqav2", questions, "No", "2") == {"accuracy": 75.0, "yes/no": 90.0, "number": 60.0}

    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    questions = read("vqav2", tmp_path, log)
    assert score("vqav2", questions, "No", "2") == {}
    submission = TASKS["vqav2"].submission
    assert submission is not None
    expected = [{"question_id": 1000, "answer": "no"}, {"question_id": 2000, "answer": "2"}]
    assert submission(questions, ["No.", "Two"]) == {"vqav2.json": expected}
    with pytest.raises(FileNotFoundError, match="has no v2_OpenEnded"):
        read("vqav2", tmp_path / "elsewhere")


def test_vizwiz_does_not_normalise_human_answers(tmp_path: Path) -> None:
    write_image(tmp_path / "val/VizWiz_val_00000000.jpg")
    row = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "what IS this?",
        "answer_type": "unanswerable",
        "answers": human_answers(*["unanswerable"] * 4, *["Coke"] * 6),
    }
    write(tmp_path / "val.json", [row])
    questions = read("vizwiz", tmp_path)
    assert questions[0].prompt == "What is this?" + UNANSWERABLE + SHORT_ANSWER
    assert score("vizwiz", questions, "Unanswerable") == {"accuracy": 100.0, "unanswerable": 100.0}
    assert score("vizwiz", questions, "Coke")["accuracy"] == 0


def test_vizwiz_accuracy_corrects_contractions_with_typographic_apostrophes() -> None:
    assert vizwiz_accuracy("dont", ["don't"] * 10) == 0
    assert vizwiz_accuracy("dont", ["don\u2019t"] * 10) == 1
    assert vizwiz_accuracy("cant", ["can't"] * 10) == 1


def test_textvqa_prompt_includes_ocr_tokens(tmp_path: Path) -> None:
    write_image(tmp_path / "train_images/aa.jpg")
    row = {
        "question": "what brand is it?",
        "image_id": "aa",
        "question_id": 7,
        "answers": ["Nous, les"] * 2 + ["x"] * 8,
    }
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row]})
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "aa", "ocr_tokens": ["NOUS", "LES"]}]})
    questions = read("textvqa", tmp_path)
    assert questions[0].prompt == "What brand is it?\nReference OCR token: NOUS, LES" + SHORT_ANSWER
    assert score("textvqa", questions, "nous les") == {"accuracy": 60.0}


def test_gqa_reports_binary_and_open_questions(tmp_path: Path) -> None:
    write_image(tmp_path / "images/9.jpg")
    rows = {
        "01": {"question": "Is it?", "imageId": "9", "answer": "yes", "types": {"structural": "verify"}},
        "02": {"question": "What is it?", "imageId": "9", "answer": "pond", "types": {"structural": "query"}},
    }
    write(tmp_path / "testdev_balanced_questions.json", rows)
    questions = read("gqa", tmp_path)
    assert score("gqa", questions, "Yes.", "a pond") == {"accuracy": 50.0, "binary": 100.0, "open": 0.0}


# ---- yes or no ------------------------------------------------------------------------------------------------------


def test_says_yes_looks_for_a_negation_before_the_first_period() -> None:
    assert not says_yes("Yes, there is no doubt. No")
    assert not says_yes("No, there is not.")
    assert says_yes("Perhaps")
    assert says_yes("NO")
    assert says_yes("nothing")


def test_pope_metrics_match_the_confusion_matrix(tmp_path: Path) -> None:
    write_image(tmp_path / "val2014/a.jpg")
    rows = []
    for n, label in enumerate(("yes", "no", "yes", "no"), 1):
        rows.append({"question_id": n, "image": "a.jpg", "text": "Is there a dog?", "label": label})
    for sampling in ("random", "popular", "adversarial"):
        write(tmp_path / f"coco/coco_pope_{sampling}.json", "\n".join(map(json.dumps, rows)))
    questions = read("pope", tmp_path)
    metrics = score("pope", questions, *["Yes", "No", "No", "No"], *["Yes"] * 4, *["No"] * 4)
    names = ("accuracy", "precision", "recall", "F1", "yes")
    assert [metrics[f"random {name}"] for name in names] == [75, 100, 50, 66.67, 25]
    assert [metrics[f"popular {name}"] for name in names] == [50, 50, 100, 66.67, 100]
    assert [metrics[f"adversarial {name}"] for name in names] == [50, 0, 0, 0, 0]
    assert metrics["F1"] == round((2 / 3 + 2 / 3 + 0) / 3 * 100, 2)
    assert metrics["accuracy"] == round((75 + 50 + 50) / 3, 2)


def test_mme_answer_reads_the_first_four_characters() -> None:
    answers = {"Yes": "yes", "no.": "no", "Not so": "no", "The yes": "other", "I say yes": "other", "yes, no": "yes"}
    assert {answer: mme_answer(answer) for answer in answers} == answers


@pytest.fixture
def mme_questions(tmp_path: Path) -> list[Question]:
    """One image with a yes and a no question for each subtask, in both folder layouts."""
    root = tmp_path / "MME_Benchmark_release_version"
    lines = "Is it? Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo\n"
    flat = ("code_reasoning", "color", "commonsense_reasoning", "count", "existence", "numerical_calculation", "OCR")
    for subtask in (*flat, "position", "text_translation"):
        write_image(root / subtask / "1.png")
        write(root / subtask / "1.txt", lines)
    for subtask in ("artwork", "celebrity", "landmark", "posters", "scene"):
        write_image(root / subtask / "images/1.jpg")
        write(root / subtask / "questions_answers_YN/1.txt", "Q? Please answer yes or no.\tYes\nR?\tNo\n")
    return read("mme", tmp_path)


def test_mme_points_add_accuracy_and_accuracy_per_image(mme_questions: list[Question]) -> None:
    assert len(mme_questions) == 28
    assert mme_questions[0].prompt == "Is it?" + SHORT_ANSWER
    perfect = score("mme", mme_questions, *[question.target for question in mme_questions])
    assert (perfect["perception"], perfect["cognition"]) == (2000, 800)
    always_yes = score("mme", mme_questions, *["Yes"] * 28)
    assert always_yes["existence"] == 50, "half of the questions are correct, but no image has both correct"
    assert always_yes["perception"] == 500


def test_first_units_keeps_the_questions_of_an_image_together(mme_questions: list[Question]) -> None:
    assert len(first_units(mme_questions, 3)) == 6


def test_task_folder_accepts_the_names_of_llava(tmp_path: Path) -> None:
    assert TASKS["mme"].folder(tmp_path) == tmp_path / "mme", "default if neither exists"
    (tmp_path / "MME").mkdir()
    assert TASKS["mme"].folder(tmp_path) == tmp_path / "MME"
    assert TASKS["gqa"].folder(tmp_path) == tmp_path / "gqa"


# ---- multiple choice ------------------------------------------------------------------------------------------------


def test_scienceqa_letter_accepts_the_forms_of_llava() -> None:
    ambiguous = "The answer is A. The answer is B."
    letters = {"B": "B", "B. Yes": "B", "The answer is C.": "C", "Bee": None, "b": None, ambiguous: None}
    assert {answer: scienceqa_letter(answer) for answer in letters} == letters


def test_scienceqa_asks_only_questions_with_an_image(tmp_path: Path) -> None:
    write_image(tmp_path / "images/test/5/image.png")
    common = {"choices": ["one", "two"], "subject": "natural science", "split": "test"}
    problems = {
        "5": {**common, "question": "Which?", "answer": 1, "hint": "A hint.", "image": "image.png"},
        "6": {**common, "question": "Which?", "answer": 0, "hint": "", "image": None},
    }
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": ["5", "6"]})
    (question,) = read("scienceqa", tmp_path)
    assert question.prompt == "Context: A hint.\nWhich?\nA. one\nB. two" + OPTION_LETTER
    assert score("scienceqa", [question], "B") == {"accuracy": 100.0, "natural science": 100.0}


def test_mmbench_letter_reads_letters_and_option_texts() -> None:
    letters = {
        "A": "A",
        "(B)": "B",
        "B. a cat": "B",
        "A fish swims on mats": None,
        "A fish is here so B.": "B",
        "It is a dog.": "A",
        "a dog or a cat": None,
    }
    assert {answer: mmbench_letter(answer, ["a dog", "a cat"]) for answer in letters} == letters


def write_mmbench(file: Path) -> None:
    """Write a table with a question in two rotations, another question, and one without an image."""
    base64_image = base64.b64encode(write_image(file.parent / "x.png").read_bytes()).decode()
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        ["1", "Which?", "A hint", "dog", "cat", "", "", "A", "CP", base64_image],
        ["1000001", "Which?", "A hint", "cat", "dog", "", "", "B", "CP", "1"],
        ["2", "Who?", "nan", "x", "y", "z", "nan", "C", "LR", base64_image],
        ["3", "Who?", "", "x", "y", "", "", "A", "LR", "99"],
    ]
    write(file, "\n".join("\t".join(row) for row in [header, *rows]) + "\n")


def test_mmbench_requires_all_rotations_to_be_correct(tmp_path: Path) -> None:
    write_mmbench(tmp_path / "mmbench_dev_20230712.tsv")
    log = SkipLog(None, 1.0)
    questions = read("mmbench", tmp_path, log)
    assert log.skipped == {"no image": 1}
    assert questions[0].prompt == "A hint\nWhich?\nA. dog\nB. cat" + OPTION_LETTER
    assert questions[1].image == questions[0].image
    assert questions[2].options == ("x", "y", "z")
    correct = {"accuracy": 100, "not circular": 100, "CP": 100, "LR": 100}
    assert score("mmbench", questions, "A", "B", "C") == correct
    one_rotation_wrong = {"accuracy": 50, "not circular": 66.67, "CP": 0, "LR": 100}
    assert score("mmbench", questions, "A", "A", "C") == one_rotation_wrong


def test_first_units_keeps_rotations_together(tmp_path: Path) -> None:
    write_mmbench(tmp_path / "mmbench_dev_20230712.tsv")
    questions = read("mmbench", tmp_path, SkipLog(None, 1.0))
    assert [question.id for question in first_units(questions, 1)] == ["1", "1000001"]
    assert first_units(questions, None) == questions
    assert first_units(questions, 9) == questions


def test_mmbench_cn_asks_for_the_letter_in_chinese(tmp_path: Path) -> None:
    write_mmbench(tmp_path / "mmbench_dev_cn_20231003.tsv")
    questions = read("mmbench-cn", tmp_path, SkipLog(None, 1.0))
    assert questions[0].prompt.endswith(OPTION_LETTER_CN)


def test_seed_reports_images_videos_and_question_types(tmp_path: Path) -> None:
    write_image(tmp_path / "SEED-Bench-image/12_34")
    write_image(tmp_path / "SEED-Bench-video-image/10_v1.png")
    common = {f"choice_{letter}": letter.upper() * 2 for letter in "abcd"} | {"question": "Q?"}
    image_row = {"answer": "A", "data_id": "12_34", "data_type": "image", "question_id": "1", "question_type_id": 5}
    video_row = {"answer": "B", "data_id": "v.webm", "data_type": "video", "question_id": "v1", "question_type_id": 10}
    types = {"Instances Counting": 5, "Action Recognition": 10}
    data = {"questions": [common | image_row, common | video_row], "question_type": types}
    write(tmp_path / "SEED-Bench.json", data)
    questions = read("seed", tmp_path)
    assert questions[0].prompt == "Q?\nA. AA\nB. BB\nC. CC\nD. DD" + OPTION_LETTER
    metrics = score("seed", questions, "A", "C")
    assert metrics == {"accuracy": 50, "image": 100, "video": 0, "Instances Counting": 100, "Action Recognition": 0}


# ---- LLM judge ------------------------------------------------------------------------------------------------------


def test_llava_bench_compares_with_the_reference_answer(tmp_path: Path) -> None:
    write_image(tmp_path / "images/001.jpg")
    rows = []
    for n, category in enumerate(("conv", "detail")):
        rows.append({"question_id": n, "image": "001.jpg", "text": "What?", "category": category})
    references = [{"question_id": n, "text": "It is a hill."} for n in (0, 1)]
    write(tmp_path / "questions.jsonl", "\n".join(map(json.dumps, rows)))
    write(tmp_path / "context.jsonl", json.dumps({"id": "001", "image": "001.jpg", "caption": "A view."}))
    write(tmp_path / "answers_gpt4.jsonl", "\n".join(map(json.dumps, references)))
    questions = read("llava-bench", tmp_path)
    calls: list[Any] = []
    replies = ("8 6\nBecause.", "8, 6\nThree parts, which is invalid.")

    def judge(messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        calls.append((messages, temperature, max_tokens))
        return replies[len(calls) - 1]

    scores = [judge_llava_bench(question, "A hill", judge) for question in questions]
    assert scores == [(8.0, 6.0), (-1.0, -1.0)]
    messages, temperature, max_tokens = calls[0]
    prompt = messages[1]["content"]
    assert prompt.startswith(
        "[Context]\nA view.\n\n[Question]\nWhat?\n\n[Assistant 1]\nIt is a hill.\n\n[End of Assistant 1]"
    )
    assert "[Assistant 2]\nA hill\n\n[End of Assistant 2]\n\n[System]\nWe would like" in prompt
    assert (temperature, max_tokens) == (0.2, 1024)
    metrics = TASKS["llava-bench"].score(questions, scores)
    assert metrics["conv"] == 75
    assert metrics["relative"] == pytest.approx(100 * 5 / 7)


def test_mm_vet_asks_again_until_the_reply_is_a_score(tmp_path: Path) -> None:
    write_image(tmp_path / "images/v1_0.png")
    common = {"imagename": "v1_0.png", "question": "What is x?"}
    rows = {
        "v1_0": {**common, "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {**common, "answer": "4", "capability": ["ocr"]},
    }
    write(tmp_path / "mm-vet.json", rows)
    questions = read("mm-vet", tmp_path)
    replies = iter(["0.5", "about", "1.5", "1.0"])
    calls: list[tuple[str, float]] = []

    def judge(messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        calls.append((messages[0]["content"], temperature))
        return next(replies)

    scores = [judge_mm_vet(question, "x = -1", judge) for question in questions]
    assert scores == [0.5, 1.0]
    assert [temperature for _, temperature in calls] == [0, 0, 0, 0.5]
    assert calls[0][0] == f"{MM_VET_PROMPT}\nWhat is x? | -1 <AND> -5 | x = -1 | "
    assert TASKS["mm-vet"].score(questions, scores) == {"total": 75, "ocr": 75, "math": 50, "math+ocr": 50}
    assert judge_mm_vet(questions[0], "x", lambda *_: "?") == 0


@pytest.fixture
def judge_server() -> Iterator[tuple[str, list[Any]]]:
    """An OpenAI-compatible server and the requests it got; with max_tokens 99 its reply has no text."""
    app = FastAPI()
    requests: list[Any] = []

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        body = await request.json()
        requests.append((body, request.headers["authorization"]))
        return {"choices": [{"message": {"content": None if body["max_tokens"] == 99 else "0.7"}}]}

    with running_server(app) as address:
        yield address, requests


def test_openai_judge_sends_key_and_model(judge_server: tuple[str, list[Any]]) -> None:
    address, requests = judge_server
    judge = OpenAIJudge(f"{address}v1", "some-model", "SECRET")
    assert judge([{"role": "user", "content": "x"}], 0.5, 3) == "0.7"
    ((body, authorization),) = requests
    assert authorization == "Bearer SECRET"
    assert (body["model"], body["max_tokens"]) == ("some-model", 3)


def test_openai_judge_raises_without_a_valid_reply(judge_server: tuple[str, list[Any]]) -> None:
    address, _ = judge_server
    with pytest.raises(ConnectionError, match="reply has no text: None"):
        OpenAIJudge(f"{address}v1", "m")([], 0, 99)
    with pytest.raises(ConnectionError, match="404"):
        OpenAIJudge(f"{address}v2", "m")([], 0, 1)
    with pytest.raises(ConnectionError, match="must start with http"):
        OpenAIJudge("file:///etc", "m")([], 0, 1)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(_send_invalid_http, server)
        with pytest.raises(ConnectionError, match="the judge at"):
            OpenAIJudge(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m")([], 0, 1)


def _send_invalid_http(server: socket.socket) -> None:
    with server.accept()[0] as client:
        client.recv(1 << 16)
        client.sendall(b"no status line\r\n\r\n")


# ---- caption metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog doesn't run, it sits; (really!)", "a man 's dog does n't run it sits really"),
        ("A T-shirt -- red & blue... 3.5 m", "a t-shirt red & blue 3.5 m"),
        ("1,000 people at 5:30, they cannot go.", "1,000 people at 5:30 they can not go"),
    ],
)
def test_tokenize_matches_the_coco_tokenizer(caption: str, expected: str) -> None:
    assert tokenize(caption) == expected


def reference_cider(captions: list[str], references: list[list[str]]) -> float:
    """Compute CIDEr-D by its definition: clipped tf-idf cosines of n-grams, with a Gaussian length penalty."""

    def n_grams(text: str, n: int) -> list[tuple[str, ...]]:
        words = text.split()
        return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]

    def weight(text: str, gram: tuple[str, ...]) -> float:
        n = len(gram)
        document_frequency = sum(any(gram in n_grams(text, n) for text in texts) for texts in references)
        return n_grams(text, n).count(gram) * (math.log(len(references)) - math.log(max(1, document_frequency)))

    def norm(text: str, n: int) -> float:
        return math.sqrt(sum(weight(text, gram) ** 2 for gram in set(n_grams(text, n))))

    total = 0.0
    for caption, texts in zip(captions, references, strict=True):
        for n in (1, 2, 3, 4):
            for text in texts:
                norms = norm(caption, n) * norm(text, n)
                if not norms:
                    continue
                dot = 0.0
                for gram in set(n_grams(caption, n)):
                    dot += min(weight(caption, gram), weight(text, gram)) * weight(text, gram)
                length_difference = len(n_grams(caption, 2)) - len(n_grams(text, 2))
                total += dot / norms * math.exp(-(length_difference**2) / 72) / len(texts) / 4
    return 1000 * total / len(captions)


CAPTIONS = ["a red dog runs over the grass", "two men sit on a bench", "snow on a hill"]


def test_caption_scores_match_the_definition_of_cider() -> None:
    references = [
        ["a red dog runs on the grass", "a dog runs over the green grass", "the dog is red"],
        ["two men sit on a long bench", "a bench with two men"],
        ["a hill with snow", "there is snow on a hill today"],
    ]
    scores = caption_scores(CAPTIONS, references)
    assert scores["CIDEr-D"] == pytest.approx(reference_cider(CAPTIONS, references), rel=1e-9)


def test_caption_scores_are_maximal_for_equal_captions() -> None:
    scores = caption_scores(CAPTIONS, [[caption] for caption in CAPTIONS])
    assert scores["BLEU-4"] == pytest.approx(100)
    assert scores["CIDEr-D"] == pytest.approx(1000)


def test_caption_scores_match_the_example_of_aac_metrics() -> None:
    references = [
        ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
        ["rain is falling hard on a surface"],
    ]
    scores = caption_scores(["a man is speaking", "rain falls"], references)
    assert scores["CIDEr-D"] == pytest.approx(96.14, abs=0.005)  # its documentation has 0.9614


def test_caption_scores_need_two_images() -> None:
    with pytest.raises(ValueError, match="at least two images"):
        caption_scores(CAPTIONS[:1], [CAPTIONS[:1]])


# ---- answers of a model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llm: Path) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return build_llava(hf_tower(folder, "clip_vision_model"), str(llm), folder / "built")


@pytest.mark.parametrize("num_beams", [1, 2])
def test_generate_does_not_depend_on_the_batch(num_beams: int, built: Path, image_folder: Path) -> None:
    """Each answer equals the one that transformers generates for the question alone."""
    generator = AnswerGenerator(str(built), "cpu", "fp32", batch_size=3)
    questions = [Question(str(n), FileImage(str(image_folder / f"{n}.png")), "What?" * (1 + n % 3)) for n in range(5)]
    questions.append(Question("text", None, "Hello?"))
    undecodable = Question("bad", MemoryImage(b"no image", "bad"), "What?")
    answers = dict(generator.generate([*questions, undecodable], 6, num_beams))
    assert len(answers) == 7
    assert answers[6] is None
    image_id = generator.tokenizer.convert_tokens_to_ids("<image>")
    for n, question in enumerate(questions):
        content: list[dict[str, Any]] = [{"type": "text", "text": question.prompt}]
        if question.image is not None:
            content.insert(0, {"type": "image", "image": Image.open(str(question.image)).convert("RGB")})
        inputs = generator.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = inputs["input_ids"][0].tolist()
        assert generator.prompt_ids(question) == ids
        output = generator.model.generate(
            **inputs, max_new_tokens=6, do_sample=False, num_beams=num_beams, bad_words_ids=[[image_id]]
        )
        expected = generator.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()
        assert answers[n] == expected, n


def test_choose_options_minimises_the_loss(built: Path, image_folder: Path) -> None:
    generator = AnswerGenerator(str(built), "cpu", "fp32")
    options = ("Yes", "No, never", "A rather long one")
    questions = [
        Question("1", FileImage(str(image_folder / "1.png")), "Is it?", options=options),
        Question("2", None, "Q", options=options),
    ]
    choices = dict(generator.choose_options(questions))
    for n, question in enumerate(questions):
        inputs: dict[str, Any] = {}
        if question.image is not None:
            inputs["pixel_values"] = generator.transform(load_image(question.image))[None]
        losses = []
        for option in options:
            conversation = Conversation("", question.image, ((question.prompt, option),))
            row = tokenize_and_label(conversation, generator.tokenizer, generator.image_tokens)
            with torch.no_grad():
                output = generator.model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels]), **inputs)
            losses.append(float(output.loss))
        assert choices[n] == losses.index(min(losses))


def test_evaluate_model_reuses_cached_answers(
    built: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = list(open_records(f"{image_folder / 'captions.jsonl'}@val"))
    animals = []
    for n, name in enumerate(("dog", "cat")):
        animals.append(Record(str(n), FileImage(str(image_folder / f"{n}.png")), (f"a {name}",)))
    tasks = [caption_task(records), pope_task(animals)]
    calls: list[int] = []
    generate: Callable[..., Any] = AnswerGenerator.generate

    def counting_generate(self: AnswerGenerator, questions: list[Question], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(questions))
        return generate(self, questions, *args, **kwargs)

    monkeypatch.setattr(AnswerGenerator, "generate", counting_generate)
    options = GenerationOptions(num_beams=2, precision="fp32")
    first = list(evaluate_model(str(built), tasks, options, tmp_path, SkipLog()))
    (cache,) = (tmp_path / "answers").glob("captions-*.jsonl")
    lines = cache.read_text().splitlines()
    damaged = "\n".join([*lines[:2], lines[2][:20]]).encode() + b"\xc3"  # ends in the middle of a character
    cache.write_bytes(damaged)
    second = list(evaluate_model(str(built), tasks, options, tmp_path, SkipLog()))
    assert [result.metrics for result in first] == [result.metrics for result in second]
    assert calls == [6, 12, 4]


def test_evaluate_model_raises_if_too_many_images_cannot_be_decoded(built: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:60])
    records = [Record(f"{n}", FileImage(str(tmp_path / f"{n}.jpg")), ("a dog",)) for n in (0, 1)]
    log = SkipLog(max_skipped=0.05)
    log.count_at_least(1000)  # the limit applies to each task, whatever was read before
    with pytest.raises(TooManySkipped, match=r"the images of 1 of 2 questions cannot be decoded, .*1\.jpg"):
        list(evaluate_model(str(built), [caption_task(records)], GenerationOptions(num_beams=1), tmp_path, log))


def test_first_units_takes_from_each_group_in_turn() -> None:
    questions = [Question(f"{n}", None, "?", group=group) for n, group in enumerate("aaaabbbbcc")]
    assert [question.id for question in first_units(questions, 4)] == ["0", "1", "4", "8"]
    assert len(first_units(questions, 9)) == 9


# ---- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def gqa_root(tmp_path: Path) -> Path:
    """A folder of benchmarks that holds GQA with one question."""
    write_image(tmp_path / "root/gqa/images/9.jpg")
    rows = {"01": {"question": "Is it?", "imageId": "9", "answer": "yes", "types": {"structural": "verify"}}}
    write(tmp_path / "root/gqa/testdev_balanced_questions.json", rows)
    return tmp_path / "root"


def test_evaluate_command_writes_report_and_results(
    built: Path, image_folder: Path, gqa_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["llava", "evaluate", str(built), "--benchmarks", "all", "--root", str(gqa_root), "--out", str(out)]
    command += ["--captions", f"{image_folder / 'captions.jsonl'}@val", "--limit", "4", "--num_beams", "1"]
    images = [record.image for record in open_records(f"{image_folder / 'captions.jsonl'}@val")]
    save_training_images(built, hash_images(images))
    assert main(command) == 0
    (built / TRAINING_IMAGES_FILE).unlink()
    output = capsys.readouterr().out
    assert "## gqa: 1 questions\n\n| model | accuracy | binary |" in output
    assert "## captions: 4 questions\n\n| model | CIDEr-D | BLEU-4 |" in output
    warning = f"{built.name} was trained on 4 of the images of captions."
    assert warning in output and warning in (out / "report.md").read_text()
    page = (out / "report.html").read_text()
    assert "63.1" in page, "GQA in the paper"
    assert page.count("<img") == 4
    assert "human:" in page
    assert {row["task"] for row in json.loads((out / "results.json").read_text())} == {"gqa", "captions"}


def test_evaluate_command_rejects_missing_and_unknown_benchmarks(
    built: Path, gqa_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["llava", "evaluate", str(built), "--out", str(tmp_path / "out"), "--root", str(gqa_root)]
    assert main(command) == 1
    assert "Nothing to evaluate" in capsys.readouterr().err
    assert main([*command, "--benchmarks", "vqa"]) == 1
    assert "unknown benchmark 'vqa'; available: vqav2, gqa" in capsys.readouterr().err
    assert main([*command, "--benchmarks", "mme"]) == 1


def test_benchmarks_command_shows_which_files_were_found(gqa_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llava", "benchmarks", "--root", str(gqa_root)]) == 0
    output = capsys.readouterr().out
    assert "gqa          found" in output
    assert "mme          missing" in output
