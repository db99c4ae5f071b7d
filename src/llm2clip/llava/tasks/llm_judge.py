"""Free answers that a judge scores: LLaVA-Bench (in the wild) and MM-Vet.

The judge is a language model behind any address of OpenAI's form that the user names. Prompts are those of the
benchmarks: figures of other judges than theirs (gpt-4-0314 and gpt-4-0613) are not comparable with published ones.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from llm2clip.data.skip_log import SkipLog
from llm2clip.io_utils import first_existing, read_json, read_jsonl
from llm2clip.llava.tasks.base import Question, Task, group_by, image_file, mean_score

TRIES = 5
LARGEST = 1 << 20  # bytes of a judge's reply


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the address that the user named, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


_DIRECT = urllib.request.build_opener(_NoRedirect)

Judge = Callable[[list[dict[str, str]], float, int], str]


@dataclass(frozen=True)
class OpenAIJudge:
    """A judge at an address of OpenAI's form.

    Args:
        address: up to /v1.
        model: its name there.
        key: that requests bear; "" is none.
        seconds: that a request may take.
    """

    address: str
    model: str
    key: str = ""
    seconds: float = 120.0

    def __call__(self, messages: list[dict[str, str]], temperature: float, tokens: int) -> str:
        """What it says.

        Raises:
            ConnectionError: it cannot be reached, or refuses.
        """
        if not self.address.startswith(("http://", "https://")):
            raise ConnectionError(f"{self.address} is no http address")
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": tokens}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key or 'none'}"}
        request = urllib.request.Request(
            f"{self.address.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        for wait in (1, 4, 16, 0):
            try:
                with _DIRECT.open(request, timeout=self.seconds) as answer:
                    said = json.loads(answer.read(LARGEST))["choices"][0]["message"]["content"]
                if not isinstance(said, str):  # a refusal is no opinion
                    raise ValueError(f"it said {said!r}")
                return said
            except urllib.error.HTTPError as error:
                if wait and error.code in (429, 500, 502, 503, 504):
                    time.sleep(wait)
                    continue
                said = error.read(500).decode(errors="replace")
                raise ConnectionError(f"the judge at {self.address}: {error} {said}".strip()) from error
            except TimeoutError as error:
                if not wait:
                    raise ConnectionError(f"the judge at {self.address} took over {self.seconds:g} s") from error
                time.sleep(wait)
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                raise ConnectionError(f"the judge at {self.address}: {error}") from error
        raise AssertionError("the last try returns or raises")


# ---- LLaVA-Bench ----------------------------------------------------------------------------------------------------

_HELPFUL = "You are a helpful and precise assistant for checking the quality of the answer."
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question "
    "displayed above. The user asks the question on observing an image. For your reference, the visual content in the "
    "image is represented with a few sentences describing the image. \n"
    "Please rate the helpfulness, relevance, accuracy, level of details of their responses. Each assistant receives an "
    "overall score on a scale of 1 to 10, where a higher score indicates better overall performance.\n"
    "Please first output a single line containing only two values indicating the scores for Assistant 1 and 2, "
    "respectively. The two scores are separated by a space.\n"
    "In the subsequent line, please provide a comprehensive explanation of your evaluation, avoiding any potential "
    "bias and ensuring that the order in which the responses were presented does not affect your judgment."
)


def read_llava_bench(folder: Path, log: SkipLog) -> list[Question]:
    """questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/, as the hub's liuhaotian/llava-bench-in-the-wild
    has them."""
    file = first_existing(folder, "questions.jsonl")
    context = {row["image"]: row["caption"] for _, row in read_jsonl(first_existing(folder, "context.jsonl"))}
    reference = {row["question_id"]: row["text"] for _, row in read_jsonl(first_existing(folder, "answers_gpt4.jsonl"))}
    found = []
    for number, row in read_jsonl(file):
        if image := image_file(folder / "images", row["image"], log, file, number):
            said = context[row["image"]]
            truth = {
                "question": row["text"],
                "context": said if isinstance(said, str) else "\n".join(said),
                "reference": reference[row["question_id"]],
            }
            found.append(Question(str(row["question_id"]), image, row["text"], truth, row["category"]))
    return found


def judge_llava_bench(one: Question, answer: str, judge: Judge) -> tuple[float, float]:
    """The judge's points for GPT-4's answer and for ours, 1 to 10; -1 for both if it gave none, as the official code
    counts it."""
    truth = one.truth
    asked = (
        f"[Context]\n{truth['context']}\n\n[Question]\n{truth['question']}\n\n"
        f"[Assistant 1]\n{truth['reference']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{_RULE}\n\n"
    )
    said = judge([{"role": "system", "content": _HELPFUL}, {"role": "user", "content": asked}], 0.2, 1024)
    numbers = said.partition("\n")[0].replace(",", " ").split(" ")  # "8, 6" is three parts to it, and so nothing
    try:
        first, second = map(float, numbers)
    except ValueError:
        return -1.0, -1.0
    return first, second


def score_llava_bench(asked: Sequence[Question], points: Sequence[Any]) -> dict[str, float]:
    """Our mean over GPT-4's in percent, over all questions and by category."""
    found = {"relative": _relative(points)}
    return found | {name: _relative(some) for name, some in group_by(asked, points).items()}


def _relative(points: Sequence[Any]) -> float:
    theirs, ours = (sum(both[n] for both in points) for n in (0, 1))
    return 100 * ours / theirs if theirs else float("nan")


# ---- MM-Vet (arXiv 2308.02490) --------------------------------------------------------------------------------------

_ICELAND = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite "
    "its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. "
    "The meme is saying that the person has trust issues because the names of these countries do not accurately "
    "represent their landscapes."
)
_SHORT = (
    "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy "
    "and Greenland isn't very green."
)
_WHOLE = (
    "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite "
    "its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I "
    "have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The "
    "humor in this meme is derived from the unexpected contrast between the names of the countries and their actual "
    "physical characteristics."
)
_X, _MEME = "What is x in the equation? | -1 <AND> -5 | ", f"Can you explain this meme? | {_ICELAND} | "
MM_VET = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    f"{_X}x = 3 | 0.0\n{_X}x = -1 | 0.5\n{_X}x = -5 | 0.5\n{_X}x = -5 or 5 | 0.5\n{_X}x = -1 or x = -5 | 1.0\n"
    f"{_MEME}{_SHORT} | 0.4\n{_MEME}{_WHOLE} | 1.0\n"
)


def read_mm_vet(folder: Path, log: SkipLog) -> list[Question]:
    """mm-vet.json and images/, as its release has them."""
    file = first_existing(folder, "mm-vet.json", "*/mm-vet.json")
    found = []
    for number, (name, row) in enumerate(read_json(file).items(), 1):
        if image := image_file(file.parent / "images", row["imagename"], log, file, number):
            truth = {"question": row["question"], "answer": row["answer"], "capability": row["capability"]}
            found.append(Question(name, image, row["question"], truth, "+".join(sorted(row["capability"]))))
    return found


def judge_mm_vet(one: Question, answer: str, judge: Judge) -> float:
    """The judge's score, 0 to 1; 0 if it gave none in five tries."""
    truth = one.truth["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{MM_VET}\n{one.truth['question']} | {truth} | {answer} | "
    for attempt in range(TRIES):
        again = "" if attempt == 0 else "\nPredict the correctness of the answer (digit): "
        said = judge([{"role": "user", "content": prompt + again}], 0.5 * max(0, attempt - 1), 3).split()
        try:
            score = float(said[0])
        except (ValueError, IndexError):
            score = -1.0
        if 0 <= score <= 1:
            return score
    return 0.0


def score_mm_vet(asked: Sequence[Question], points: Sequence[Any]) -> dict[str, float]:
    """Mean score over all questions, and over those that take each capability."""
    found = {"total": mean_score(points)}
    capabilities = dict.fromkeys(c for one in asked for c in one.truth["capability"])
    for capability in capabilities:
        found[capability] = mean_score(
            [p for one, p in zip(asked, points, strict=True) if capability in one.truth["capability"]]
        )
    return found | {name: mean_score(some) for name, some in group_by(asked, points).items() if "+" in name}


TASKS = (
    Task("llava-bench", "LLaVA-Bench (in the wild): free answers, judged", "huggingface.co liuhaotian/"
         "llava-bench-in-the-wild", read_llava_bench, score_llava_bench, tokens=1024, judge=judge_llava_bench,
         folder="llava-bench-in-the-wild"),
    Task("mm-vet", "MM-Vet: free answers, judged", "github.com/yuweihao/MM-Vet release", read_mm_vet, score_mm_vet,
         tokens=1024, judge=judge_mm_vet),
)  # fmt: skip
