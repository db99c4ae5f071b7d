"""Benchmarks of multimodal LLMs: each in its official form, tiny, with an expectation worked out by hand."""

from __future__ import annotations

import base64
import json
import math
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI, Request
from llm2clip.llava.captions import caption_scores, words
from PIL import Image

from llm2clip.cli import main
from llm2clip.data.image_refs import FileImage, MemoryImage
from llm2clip.data.records import Record, open_records
from llm2clip.data.skip_log import SkipLog, TooManySkipped
from llm2clip.llava.build import build_llava
from llm2clip.llava.evaluate import GenerationOptions, caption_task, pope_task, run_task
from llm2clip.llava.generate import Generator
from llm2clip.llava.tasks import TASKS, Question
from llm2clip.llava.tasks.base import LETTER, SHORT, first_units
from llm2clip.llava.tasks.llm_judge import MM_VET, OpenAIJudge, judge_llava_bench, judge_mm_vet
from llm2clip.llava.tasks.multiple_choice import MMBENCH_CN, mmbench_letter, scienceqa_letter
from llm2clip.llava.tasks.vqa import (
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


def image(path: Path, colour: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), colour).save(path, "PNG")
    return path


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")


def read(name: str, folder: Path, log: SkipLog | None = None) -> list[Question]:
    return TASKS[name].read(folder, log or SkipLog())


def scored(name: str, asked: list[Question], *answers: str) -> dict[str, float]:
    return {k: round(v, 2) for k, v in TASKS[name].score(asked, answers).items()}


# ---- open questions -------------------------------------------------------------------------------------------------


def test_answers_are_normalised_as_the_protocol_has_it() -> None:
    assert len(contractions()) == 120
    for raw, expected in {
        "The  two Dogs": "2 dogs",
        "dont know!": "don't know",
        "1,000 people/day": "1000 peopleday",  # a thousands comma: every mark is taken out
        "red/blue": "red blue",
        "red / blue": "red blue",
        "3.5 a.b 7.": "3.5 ab 7",
        "T-shirt": "t shirt",
        "none": "0",
        "a": "",
        "it's 10:30": "it's 10:30",
        "somebody'd": "somebodyd",
    }.items():
        assert normalize_answer(raw) == expected, raw
    assert process_answer("Jack's 1,000?") == "jack 's 1000" and normalize_answer("Jack's 1,000?") == "jack's 1000"


def test_agreement_with_ten_people() -> None:
    for same, expected in enumerate((0, 0.3, 0.6, 0.9, 1, 1, 1, 1, 1, 1, 1)):
        assert agreement("x", ["x"] * same + ["y"] * (10 - same)) == pytest.approx(expected)
    assert vqa_accuracy("A Dog.", ["dog"] * 9 + ["cat"]) == 1
    assert vqa_accuracy("Dog", ["dog"] * 10) == 0, "where all agree nothing is normalised"
    assert vqa_accuracy("dog", ["dog"] * 10) == 1


def answers(*some: str) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(some, 1)]


def test_vqav2(tmp_path: Path) -> None:
    for n in (1, 2):
        image(tmp_path / f"val2014/COCO_val2014_{n:012d}.jpg")
    questions = [{"image_id": n, "question": f"Q{n}?", "question_id": n * 1000} for n in (1, 2, 3)]
    write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": questions})
    truth = [
        {"question_id": 1000, "answers": answers(*["yes"] * 7, *["no"] * 3), "answer_type": "yes/no"},
        {"question_id": 2000, "answers": answers(*["two"] * 2, *["3"] * 8), "answer_type": "number"},
    ]
    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": truth})
    log = SkipLog(None, 1.0)
    asked = read("vqav2", tmp_path, log)
    assert log.skipped == {"no image": 1} and [one.prompt for one in asked] == ["Q1?" + SHORT, "Q2?" + SHORT]
    assert scored("vqav2", asked, "No", "2") == {"accuracy": 75.0, "yes/no": 90.0, "number": 60.0}
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    asked = read("vqav2", tmp_path, log)
    assert scored("vqav2", asked, "No", "2") == {}
    submit = TASKS["vqav2"].submission
    assert submit is not None
    rows = [{"question_id": 1000, "answer": "no"}, {"question_id": 2000, "answer": "2"}]
    assert submit(asked, ["No.", "Two"]) == {"vqav2.json": rows}
    with pytest.raises(FileNotFoundError, match="has no v2_OpenEnded"):
        read("vqav2", tmp_path / "elsewhere")


def test_vizwiz(tmp_path: Path) -> None:
    image(tmp_path / "val/VizWiz_val_00000000.jpg")
    row = {
        "image": "VizWiz_val_00000000.jpg", "question": "what IS this?", "answer_type": "unanswerable",
        "answers": answers(*["unanswerable"] * 4, *["Coke"] * 6),
    }  # fmt: skip
    write(tmp_path / "val.json", [row])
    asked = read("vizwiz", tmp_path)
    unsure = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."
    assert asked[0].prompt == "What is this?" + unsure + SHORT
    assert scored("vizwiz", asked, "Unanswerable") == {"accuracy": 100.0, "unanswerable": 100.0}
    assert scored("vizwiz", asked, "Coke")["accuracy"] == 0, "people's answers are not normalised"
    assert vizwiz_accuracy("dont", ["don't"] * 10) == 0, "its scorer mends with a typographic apostrophe"
    assert vizwiz_accuracy("dont", ["don\u2019t"] * 10) == 1 == vizwiz_accuracy("cant", ["can't"] * 10)


def test_textvqa(tmp_path: Path) -> None:
    image(tmp_path / "train_images/aa.jpg")
    row = {
        "question": "what brand is it?",
        "image_id": "aa",
        "question_id": 7,
        "answers": ["Nous, les"] * 2 + ["x"] * 8,
    }
    write(tmp_path / "TextVQA_0.5.1_val.json", {"data": [row]})
    write(tmp_path / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": [{"image_id": "aa", "ocr_tokens": ["NOUS", "LES"]}]})
    asked = read("textvqa", tmp_path)
    assert asked[0].prompt == "What brand is it?\nReference OCR token: NOUS, LES" + SHORT
    assert scored("textvqa", asked, "nous les") == {"accuracy": 60.0}


def test_gqa(tmp_path: Path) -> None:
    image(tmp_path / "images/9.jpg")
    rows = {
        "01": {"question": "Is it?", "imageId": "9", "answer": "yes", "types": {"structural": "verify"}},
        "02": {"question": "What is it?", "imageId": "9", "answer": "pond", "types": {"structural": "query"}},
    }
    write(tmp_path / "testdev_balanced_questions.json", rows)
    asked = read("gqa", tmp_path)
    assert scored("gqa", asked, "Yes.", "a pond") == {"accuracy": 50.0, "binary": 100.0, "open": 0.0}


# ---- yes or no ------------------------------------------------------------------------------------------------------


def test_pope(tmp_path: Path) -> None:
    assert says_yes("Yes, there is no doubt. No") is False and says_yes("Perhaps") and says_yes("NO")
    assert not says_yes("No, there is not.") and says_yes("nothing")
    image(tmp_path / "val2014/a.jpg")
    rows = [{"question_id": n, "image": "a.jpg", "text": "Is there a dog?", "label": label}
            for n, label in enumerate(("yes", "no", "yes", "no"), 1)]  # fmt: skip
    for sampling in ("random", "popular", "adversarial"):
        write(tmp_path / f"coco/coco_pope_{sampling}.json", "\n".join(map(json.dumps, rows)))
    asked = read("pope", tmp_path)
    said = ["Yes", "No", "No", "No"] + ["Yes"] * 4 + ["No"] * 4
    found = scored("pope", asked, *said)
    assert [found[f"random {k}"] for k in ("accuracy", "precision", "recall", "F1", "yes")] == [75, 100, 50, 66.67, 25]
    assert [found[f"popular {k}"] for k in ("accuracy", "precision", "recall", "F1", "yes")] == [
        50,
        50,
        100,
        66.67,
        100,
    ]
    assert [found[f"adversarial {k}"] for k in ("accuracy", "F1", "yes")] == [50, 0, 0]
    assert found["F1"] == round(2 * 200 / 3 / 3, 2) - 0 and found["accuracy"] == round(175 / 3, 2)


def test_mme(tmp_path: Path) -> None:
    assert [mme_answer(a) for a in ("Yes", "no.", "Not so", "The yes", "I say yes", "yes, no")] == [
        "yes", "no", "no", "other", "other", "yes",
    ]  # fmt: skip
    root = tmp_path / "MME_Benchmark_release_version"
    flat = ("code_reasoning", "color", "commonsense_reasoning", "count", "existence", "numerical_calculation", "OCR")
    for subtask in (*flat, "position", "text_translation"):
        image(root / subtask / "1.png")
        write(
            root / subtask / "1.txt", "Is it? Please answer yes or no.\tYes\nIs it not?  Please answer yes or no.\tNo\n"
        )
    for subtask in ("artwork", "celebrity", "landmark", "posters", "scene"):
        image(root / subtask / "images/1.jpg")
        write(root / subtask / "questions_answers_YN/1.txt", "Q? Please answer yes or no.\tYes\nR?\tNo\n")
    asked = read("mme", tmp_path)
    assert len(asked) == 28 and asked[0].prompt == "Is it?" + SHORT
    perfect = scored("mme", asked, *[one.truth for one in asked])
    assert perfect["perception"] == 2000 and perfect["cognition"] == 800
    always = scored("mme", asked, *["Yes"] * 28)
    assert always["perception"] == 500 and always["existence"] == 50, "half the questions, no image whole"
    assert len(first_units(asked, 3)) == 6, "an image's two questions count together"


def test_a_benchmark_may_lie_as_llavas_tree_has_it(tmp_path: Path) -> None:
    assert TASKS["mme"].place(tmp_path) == tmp_path / "mme", "the name to use where neither is there"
    (tmp_path / "MME").mkdir()
    assert TASKS["mme"].place(tmp_path) == tmp_path / "MME"
    assert TASKS["gqa"].place(tmp_path) == tmp_path / "gqa"


# ---- multiple choice ------------------------------------------------------------------------------------------------


def test_scienceqa(tmp_path: Path) -> None:
    both = "The answer is A. The answer is B."
    read_as = {"B": "B", "B. Yes": "B", "The answer is C.": "C", "Bee": None, "b": None, both: None}
    assert {said: scienceqa_letter(said) for said in read_as} == read_as
    image(tmp_path / "images/test/5/image.png")
    common = {"choices": ["one", "two"], "subject": "natural science", "split": "test"}
    problems = {
        "5": {**common, "question": "Which?", "answer": 1, "hint": "A hint.", "image": "image.png"},
        "6": {**common, "question": "Which?", "answer": 0, "hint": "", "image": None},
    }
    write(tmp_path / "problems.json", problems)
    write(tmp_path / "pid_splits.json", {"test": ["5", "6"]})
    (asked,) = read("scienceqa", tmp_path)
    assert asked.prompt == "Context: A hint.\nWhich?\nA. one\nB. two" + LETTER
    assert scored("scienceqa", [asked], "B") == {"accuracy": 100.0, "natural science": 100.0}


def test_mmbench(tmp_path: Path) -> None:
    cases = {
        "A": "A",
        "(B)": "B",
        "B. a cat": "B",
        "A fish swims on mats": None,
        "A fish is here so B.": "B",
        "It is a dog.": "A",
        "a dog or a cat": None,
    }
    assert {said: mmbench_letter(said, ["a dog", "a cat"]) for said in cases} == cases
    picture = base64.b64encode(image(tmp_path / "x.png").read_bytes()).decode()
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    rows = [
        ["1", "Which?", "A hint", "dog", "cat", "", "", "A", "CP", picture],
        ["1000001", "Which?", "A hint", "cat", "dog", "", "", "B", "CP", "1"],
        ["2", "Who?", "nan", "x", "y", "z", "nan", "C", "LR", picture],
        ["3", "Who?", "", "x", "y", "", "", "A", "LR", "99"],
    ]
    table = "\n".join("\t".join(row) for row in [head, *rows]) + "\n"
    write(tmp_path / "mmbench_dev_20230712.tsv", table)
    log = SkipLog(None, 1.0)
    asked = read("mmbench", tmp_path, log)
    assert log.skipped == {"no image": 1}
    assert asked[0].prompt == "A hint\nWhich?\nA. dog\nB. cat" + LETTER and asked[1].image == asked[0].image
    assert asked[2].options == ("x", "y", "z")
    assert scored("mmbench", asked, "A", "B", "C") == {"accuracy": 100, "not circular": 100, "CP": 100, "LR": 100}
    assert scored("mmbench", asked, "A", "A", "C") == {"accuracy": 50, "not circular": 66.67, "CP": 0, "LR": 100}
    assert [one.id for one in first_units(asked, 1)] == ["1", "1000001"], "a limit does not cut a circle"
    assert first_units(asked, None) == asked and first_units(asked, 9) == asked
    write(tmp_path / "mmbench_dev_cn_20231003.tsv", table)
    assert read("mmbench-cn", tmp_path, SkipLog(None, 1.0))[0].prompt.endswith(MMBENCH_CN)


def test_seed(tmp_path: Path) -> None:
    image(tmp_path / "SEED-Bench-image/12_34")
    image(tmp_path / "SEED-Bench-video-image/10_v1.png")
    options = {f"choice_{x}": x.upper() * 2 for x in "abcd"}
    rows = [
        {**options, "answer": "A", "data_id": "12_34", "data_type": "image", "question": "Q?", "question_id": "1",
         "question_type_id": 5},
        {**options, "answer": "B", "data_id": "v.webm", "data_type": "video", "question": "Q?", "question_id": "v1",
         "question_type_id": 10},
    ]  # fmt: skip
    kinds = {"Instances Counting": 5, "Action Recognition": 10}
    write(tmp_path / "SEED-Bench.json", {"questions": rows, "question_type": kinds})
    asked = read("seed", tmp_path)
    assert asked[0].prompt == "Q?\nA. AA\nB. BB\nC. CC\nD. DD" + LETTER
    found = scored("seed", asked, "A", "C")
    assert found == {"accuracy": 50, "image": 100, "video": 0, "Instances Counting": 100, "Action Recognition": 0}


# ---- a judge --------------------------------------------------------------------------------------------------------


def test_llava_bench(tmp_path: Path) -> None:
    image(tmp_path / "images/001.jpg")
    questions = [
        {"question_id": n, "image": "001.jpg", "text": "What?", "category": c} for n, c in enumerate(("conv", "detail"))
    ]
    write(tmp_path / "questions.jsonl", "\n".join(map(json.dumps, questions)))
    write(tmp_path / "context.jsonl", json.dumps({"id": "001", "image": "001.jpg", "caption": "A view."}))
    said = [{"question_id": n, "text": "It is a hill."} for n in (0, 1)]
    write(tmp_path / "answers_gpt4.jsonl", "\n".join(map(json.dumps, said)))
    asked = read("llava-bench", tmp_path)
    seen: list[Any] = []

    def judge(messages: list[dict[str, str]], temperature: float, tokens: int) -> str:
        seen.append((messages, temperature, tokens))
        return ("8 6\nBecause.", "8, 6\nThree parts, so nothing.")[len(seen) - 1]

    points = [judge_llava_bench(one, "A hill", judge) for one in asked]
    assert points == [(8.0, 6.0), (-1.0, -1.0)]
    prompt = seen[0][0][1]["content"]
    assert prompt.startswith(
        "[Context]\nA view.\n\n[Question]\nWhat?\n\n[Assistant 1]\nIt is a hill.\n\n[End of Assistant 1]"
    )
    assert "[Assistant 2]\nA hill\n\n[End of Assistant 2]\n\n[System]\nWe would like" in prompt and seen[0][1:] == (
        0.2,
        1024,
    )
    found = TASKS["llava-bench"].score(asked, points)
    assert found["conv"] == 75 and found["relative"] == pytest.approx(100 * 5 / 7)


def test_mm_vet(tmp_path: Path) -> None:
    image(tmp_path / "images/v1_0.png")
    common = {"imagename": "v1_0.png", "question": "What is x?"}
    rows = {
        "v1_0": {**common, "answer": "-1<AND>-5", "capability": ["ocr", "math"]},
        "v1_1": {**common, "answer": "4", "capability": ["ocr"]},
    }
    write(tmp_path / "mm-vet.json", rows)
    asked = read("mm-vet", tmp_path)
    replies = iter(["0.5", "about", "1.5", "1.0"])
    seen: list[Any] = []

    def judge(messages: list[dict[str, str]], temperature: float, tokens: int) -> str:
        seen.append((messages[0]["content"], temperature))
        return next(replies)

    points = [judge_mm_vet(one, "x = -1", judge) for one in asked]
    assert points == [0.5, 1.0] and [temperature for _, temperature in seen] == [0, 0, 0, 0.5]
    assert seen[0][0] == f"{MM_VET}\nWhat is x? | -1 <AND> -5 | x = -1 | "
    assert TASKS["mm-vet"].score(asked, points) == {"total": 75, "ocr": 75, "math": 50, "math+ocr": 50}
    assert judge_mm_vet(asked[0], "x", lambda *_: "?") == 0


def test_a_judge_at_an_address() -> None:
    app, seen = FastAPI(), []

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        seen.append((await request.json(), request.headers["authorization"]))
        return {"choices": [{"message": {"content": None if seen[-1][0]["max_tokens"] == 99 else "0.7"}}]}

    with running_server(app) as address:
        judge = OpenAIJudge(f"{address}v1", "some-model", "SECRET")
        assert judge([{"role": "user", "content": "x"}], 0.5, 3) == "0.7"
        assert seen[0][1] == "Bearer SECRET" and seen[0][0]["model"] == "some-model" and seen[0][0]["max_tokens"] == 3
        with pytest.raises(ConnectionError, match="it said None"):  # a refusal is no opinion
            judge([], 0, 99)
        with pytest.raises(ConnectionError, match="404"):
            OpenAIJudge(f"{address}v2", "m")([], 0, 1)
    with pytest.raises(ConnectionError, match="no http address"):
        OpenAIJudge("file:///etc", "m")([], 0, 1)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as other:
        other.submit(_answers_nonsense, server)
        with pytest.raises(ConnectionError, match="the judge at"):
            OpenAIJudge(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m")([], 0, 1)


def _answers_nonsense(server: socket.socket) -> None:
    with server.accept()[0] as client:
        client.recv(1 << 16)
        client.sendall(b"no status line\r\n\r\n")


# ---- captions -------------------------------------------------------------------------------------------------------


def test_words_are_split_as_coco_s_tokenizer_does() -> None:
    assert words("A man's dog doesn't run, it sits; (really!)") == "a man 's dog does n't run it sits really"
    assert words("A T-shirt -- red & blue... 3.5 m") == "a t-shirt red & blue 3.5 m"
    assert words("1,000 people at 5:30, they cannot go.") == "1,000 people at 5:30 they can not go"


def naive_cider(captions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D from its paper, in float64: mean over n of clipped tf-idf cosines, with a Gaussian of the lengths."""

    def grams(text: str, n: int) -> list[tuple[str, ...]]:
        w = text.split()
        return [tuple(w[i : i + n]) for i in range(len(w) - n + 1)]

    total = 0.0
    for caption, people in zip(captions, references, strict=True):
        for n in (1, 2, 3, 4):

            def weight(text: str, gram: tuple[str, ...], n: int = n) -> float:
                df = sum(any(gram in grams(r, n) for r in some) for some in references)
                return grams(text, n).count(gram) * (math.log(len(references)) - math.log(max(1, df)))

            for person in people:
                dot = sum(
                    min(weight(caption, g), weight(person, g)) * weight(person, g) for g in set(grams(caption, n))
                )
                size = [math.sqrt(sum(weight(t, g) ** 2 for g in set(grams(t, n)))) for t in (caption, person)]
                if size[0] and size[1]:
                    length = len(grams(caption, 2)) - len(grams(person, 2))
                    total += dot / size[0] / size[1] * math.exp(-(length**2) / 72) / len(people) / 4
    return 1000 * total / len(captions)


def test_captions_are_scored_as_by_hand() -> None:
    captions = ["a red dog runs over the grass", "two men sit on a bench", "snow on a hill"]
    references = [
        ["a red dog runs on the grass", "a dog runs over the green grass", "the dog is red"],
        ["two men sit on a long bench", "a bench with two men"],
        ["a hill with snow", "there is snow on a hill today"],
    ]
    found = caption_scores(captions, references)
    assert found["CIDEr-D"] == pytest.approx(naive_cider(captions, references), rel=1e-9)
    same = caption_scores(captions, [[c] for c in captions])
    assert same["BLEU-4"] == pytest.approx(100) and same["CIDEr-D"] == pytest.approx(1000)
    known = [["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
             ["rain is falling hard on a surface"]]  # fmt: skip
    example = caption_scores(["a man is speaking", "rain falls"], known)
    assert example["CIDEr-D"] == pytest.approx(96.14, abs=0.005)  # 0.9614 in the documentation of aac-metrics
    with pytest.raises(ValueError, match="two pictures at least"):
        caption_scores(captions[:1], references[:1])


# ---- a model that answers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llm: Path) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    return build_llava(hf_tower(folder, "clip_vision_model"), str(llm), folder / "built")


def test_answers_do_not_depend_on_their_neighbours(built: Path, pictures: Path) -> None:
    """Nor on the batch: each is what transformers says to the question alone."""
    model = Generator(str(built), "cpu", "fp32", batch=3)
    asked = [Question(str(n), FileImage(str(pictures / f"{n}.png")), "What?" * (1 + n % 3)) for n in range(5)]
    asked.append(Question("text", None, "Hello?"))
    asked.append(Question("bad", MemoryImage(b"no image", "bad"), "What?"))
    for beams in (1, 2):
        found = dict(model.answer(asked, 6, beams))
        assert found[6] is None and len(found) == 7
        for n, one in enumerate(asked[:6]):
            content: list[dict[str, Any]] = [{"type": "text", "text": one.prompt}]
            if one.image is not None:
                picture = Image.open(str(one.image)).convert("RGB")
                content.insert(0, {"type": "image", "image": picture})
            inputs = model.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            if one.image is not None:  # the processor crops an odd margin elsewhere
                from llm2clip.data.images import load_image

                inputs["pixel_values"] = model.pixels(load_image(str(one.image)))[None]
            ids = inputs["input_ids"][0].tolist()
            assert model.prompt(one) == ids
            said = model.model.generate(
                **inputs, max_new_tokens=6, do_sample=False, num_beams=beams,
                bad_words_ids=[[model.tokenizer.convert_tokens_to_ids("<image>")]],
            )  # fmt: skip
            alone = model.tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True).strip()
            assert found[n] == alone, (n, beams)


def test_the_likeliest_option_is_that_of_the_model_s_own_loss(built: Path, pictures: Path) -> None:
    model = Generator(str(built), "cpu", "fp32")
    options = ("Yes", "No, never", "A rather long one")
    asked = [
        Question("1", FileImage(str(pictures / "1.png")), "Is it?", options=options),
        Question("2", None, "Q", options=options),
    ]
    found = dict(model.choose(asked))
    from llm2clip.data.images import load_image
    from llm2clip.llava.chat_template import Conversation, tokenize_and_label

    for n, one in enumerate(asked):
        losses = []
        for option in options:
            row = tokenize_and_label(
                Conversation("", one.image, ((one.prompt, option),)), model.tokenizer, model.tokens
            )
            pixels = {"pixel_values": model.pixels(load_image(str(one.image)))[None]} if one.image is not None else {}
            with torch.no_grad():
                ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
                losses.append(float(model.model(input_ids=ids, labels=labels, **pixels).loss))
        assert found[n] == losses.index(min(losses))


def test_what_was_answered_is_not_asked_again(
    built: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = list(open_records(f"{pictures / 'captions.jsonl'}@val"))
    named = [Record(str(n), FileImage(str(pictures / f"{n}.png")), (f"a {o}",)) for n, o in enumerate(("dog", "cat"))]
    work = [caption_task(records), pope_task(named)]
    calls: list[int] = []
    answer: Callable[..., Any] = Generator.answer

    def counted(self: Generator, asked: list[Question], *args: Any) -> Any:
        calls.append(len(asked))
        return answer(self, asked, *args)

    monkeypatch.setattr(Generator, "answer", counted)
    ways = GenerationOptions(beams=2, precision="fp32")
    first = list(run_task(str(built), work, ways, tmp_path, SkipLog()))
    (kept,) = (tmp_path / "answers").glob("captions-*.jsonl")
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join([*lines[:2], lines[2][:20]]))  # cut off in its third line
    again = list(run_task(str(built), work, ways, tmp_path, SkipLog()))
    assert [m.figures for m in first] == [m.figures for m in again]
    assert calls == [6, 12, 4]


def test_too_many_pictures_that_cannot_be_decoded_are_no_result(built: Path, tmp_path: Path) -> None:
    image(tmp_path / "0.jpg")
    (tmp_path / "1.jpg").write_bytes((tmp_path / "0.jpg").read_bytes()[:60])
    records = [Record(f"{n}", FileImage(str(tmp_path / f"{n}.jpg")), ("a dog",)) for n in (0, 1)]
    log = SkipLog(max_skipped=0.05)
    log.count_at_least(1000)  # many rows of other things hide nothing
    with pytest.raises(TooManySkipped, match=r"of 2 questions the pictures of 1 cannot be decoded, .*1\.jpg"):
        list(run_task(str(built), [caption_task(records)], GenerationOptions(beams=1), tmp_path, log))


def test_a_limit_takes_of_each_group_in_turn() -> None:
    asked = [Question(f"{n}", None, "?", group=group) for n, group in enumerate("aaaabbbbcc")]
    assert [one.id for one in first_units(asked, 4)] == ["0", "1", "4", "8"]
    assert len(first_units(asked, 9)) == 9


def test_the_command_measures_and_reports(
    built: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image(tmp_path / "root/gqa/images/9.jpg")
    rows = {"01": {"question": "Is it?", "imageId": "9", "answer": "yes", "types": {"structural": "verify"}}}
    write(tmp_path / "root/gqa/testdev_balanced_questions.json", rows)
    data, out = f"{pictures / 'captions.jsonl'}@val", str(tmp_path / "out")
    line = [
        "llava",
        "evaluate",
        str(built),
        "--benchmarks",
        "all",
        "--root",
        str(tmp_path / "root"),
        "--captions",
        data,
    ]
    assert main([*line, "--out", out, "--limit", "4", "--beams", "1"]) == 0
    said = capsys.readouterr().out
    assert "gqa (1 questions): accuracy" in said and "captions (4 questions): CIDEr-D" in said
    page = (tmp_path / "out/report.html").read_text()
    assert "63.1" in page and page.count("<img") == 4 and "people:" in page
    assert {row["task"] for row in json.loads((tmp_path / "out/results.json").read_text())} == {"gqa", "captions"}
    assert main(["llava", "benchmarks", "--root", str(tmp_path / "root")]) == 0
    assert "gqa          here" in capsys.readouterr().out
    assert main(["llava", "evaluate", str(built), "--benchmarks", "vqa", "--out", out]) == 1
    assert main(["llava", "evaluate", str(built), "--out", out]) == 1
    assert (
        main(["llava", "evaluate", str(built), "--benchmarks", "mme", "--root", str(tmp_path / "root"), "--out", out])
        == 1
    )
    errors = capsys.readouterr().err
    assert "there is no benchmark 'vqa'; there are vqav2, gqa" in errors and "name --captions DATA" in errors
