"""Benchmarks with free-form answers scored by an LLM judge: LLaVA-Bench (in the wild) and MM-Vet.

The judge can be any LLM with an OpenAI-compatible API. The prompts are the benchmarks' official prompts. The official
judges are gpt-4-0314 for LLaVA-Bench and gpt-4-0613 for MM-Vet. Scores from other judges are not comparable with
published scores.
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
from llm2clip.llava.tasks.base import Question, Task, find_image, group_by, mean_by_group, mean_percent

MM_VET_ATTEMPTS = 5
MAX_REPLY_BYTES = 1 << 20
RETRY_DELAYS = (1, 4, 16)  # delay before each retry, in seconds
RETRY_STATUS = (429, 500, 502, 503, 504)

Judge = Callable[[list[dict[str, str]], float, int], str]  # messages, temperature, maximum number of tokens


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Handler that does not follow redirects, because the API key must be sent only to the configured address."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


@dataclass(frozen=True)
class OpenAIJudge:
    """An LLM judge with an OpenAI-compatible API.

    Args:
        address: base URL, ending in /v1.
        model: name of the judge model.
        key: API key. May be empty.
        timeout: timeout per request, in seconds.
    """

    address: str
    model: str
    key: str = ""
    timeout: float = 120.0

    def __call__(self, messages: list[dict[str, str]], temperature: float, max_tokens: int) -> str:
        """Return the judge's reply to a list of messages. Timeouts and temporary server errors are retried.

        Raises:
            ConnectionError: no valid reply was received.
        """
        if not self.address.startswith(("http://", "https://")):
            raise ConnectionError(f"the judge's address must start with http:// or https:// (got {self.address})")
        body = {"model": self.model, "messages": messages, "temperature": temperature, "max_tokens": max_tokens}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key or 'none'}"}
        url = f"{self.address.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        for delay in (*RETRY_DELAYS, 0):  # 0 marks the last attempt
            try:
                return self._send(request)
            except urllib.error.HTTPError as error:
                if delay == 0 or error.code not in RETRY_STATUS:
                    details = error.read(500).decode(errors="replace")
                    raise ConnectionError(f"the judge at {self.address} failed: {error} {details}".strip()) from error
            except TimeoutError as error:
                if delay == 0:
                    raise ConnectionError(
                        f"the judge at {self.address} did not reply within {self.timeout:g} seconds"
                    ) from error
            except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                raise ConnectionError(f"the judge at {self.address} failed: {error}") from error
            time.sleep(delay)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _send(self, request: urllib.request.Request) -> str:
        with _OPENER.open(request, timeout=self.timeout) as response:
            reply = json.loads(response.read(MAX_REPLY_BYTES))["choices"][0]["message"]["content"]
        if not isinstance(reply, str):  # null if the judge declined to reply, which must not count as a score
            raise ValueError(f"the reply has no text: {reply!r}")
        return reply


# ---- LLaVA-Bench ----------------------------------------------------------------------------------------------------

_SYSTEM_PROMPT = "You are a helpful and precise assistant for checking the quality of the answer."
_INSTRUCTIONS = (
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
    """Read questions.jsonl, context.jsonl, answers_gpt4.jsonl and images/ from liuhaotian/llava-bench-in-the-wild."""
    file = first_existing(folder, "questions.jsonl")
    context = {row["image"]: row["caption"] for _, row in read_jsonl(first_existing(folder, "context.jsonl"))}
    reference = {row["question_id"]: row["text"] for _, row in read_jsonl(first_existing(folder, "answers_gpt4.jsonl"))}
    questions = []
    for number, row in read_jsonl(file):
        image = find_image(folder / "images", row["image"], log, file, number)
        if image is None:
            continue
        captions = context[row["image"]]
        target = {
            "question": row["text"],
            "context": captions if isinstance(captions, str) else "\n".join(captions),
            "reference": reference[row["question_id"]],
        }
        questions.append(
            Question(id=str(row["question_id"]), image=image, prompt=row["text"], target=target, group=row["category"])
        )
    return questions


def judge_llava_bench(question: Question, answer: str, judge: Judge) -> tuple[float, float]:
    """Return the judge's scores, from 1 to 10, for GPT-4's answer and for the model's answer.

    As in the benchmark's official code, both scores are -1 if the reply does not start with two scores.
    """
    target = question.target
    prompt = (
        f"[Context]\n{target['context']}\n\n[Question]\n{target['question']}\n\n"
        f"[Assistant 1]\n{target['reference']}\n\n[End of Assistant 1]\n\n"
        f"[Assistant 2]\n{answer}\n\n[End of Assistant 2]\n\n[System]\n{_INSTRUCTIONS}\n\n"
    )
    messages = [{"role": "system", "content": _SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
    reply = judge(messages, 0.2, 1024)
    # As in the official code, "8, 6" is split into three parts and is therefore invalid.
    parts = reply.partition("\n")[0].replace(",", " ").split(" ")
    try:
        reference_score, model_score = map(float, parts)
    except ValueError:
        return -1.0, -1.0
    return reference_score, model_score


def score_llava_bench(questions: Sequence[Question], scores: Sequence[Any]) -> dict[str, float]:
    """Return the model's mean score as a percentage of GPT-4's mean score, overall and by category."""
    by_category = {category: _relative_score(group) for category, group in group_by(questions, scores).items()}
    return {"relative": _relative_score(scores)} | by_category


def _relative_score(scores: Sequence[Any]) -> float:
    reference_total = sum(reference for reference, _ in scores)
    model_total = sum(model for _, model in scores)
    return 100 * model_total / reference_total if reference_total else float("nan")


# ---- MM-Vet (arXiv 2308.02490) --------------------------------------------------------------------------------------

_MEME_TRUTH = (
    "This meme is poking fun at the fact that the names of the countries Iceland and Greenland are misleading. Despite "
    "its name, Iceland is known for its beautiful green landscapes, while Greenland is mostly covered in ice and snow. "
    "The meme is saying that the person has trust issues because the names of these countries do not accurately "
    "represent their landscapes."
)
_MEME_PARTIAL = (
    "The meme talks about Iceland and Greenland. It's pointing out that despite their names, Iceland is not very icy "
    "and Greenland isn't very green."
)
_MEME_COMPLETE = (
    "The meme is using humor to point out the misleading nature of Iceland's and Greenland's names. Iceland, despite "
    "its name, has lush green landscapes while Greenland is mostly covered in ice and snow. The text 'This is why I "
    "have trust issues' is a playful way to suggest that these contradictions can lead to distrust or confusion. The "
    "humor in this meme is derived from the unexpected contrast between the names of the countries and their actual "
    "physical characteristics."
)
_EQUATION = "What is x in the equation? | -1 <AND> -5 | "
_MEME = f"Can you explain this meme? | {_MEME_TRUTH} | "
MM_VET_PROMPT = (
    "Compare the ground truth and prediction from AI models, to give a correctness score for the prediction. <AND> in "
    "the ground truth means it is totally right only when all elements in the ground truth are present in the "
    "prediction, and <OR> means it is totally right when any one element in the ground truth is present in the "
    "prediction. The correctness score is 0.0 (totally wrong), 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, or 1.0 "
    "(totally right). Just complete the last space of the correctness score.\n\n"
    "Question | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\n"
    f"{_EQUATION}x = 3 | 0.0\n"
    f"{_EQUATION}x = -1 | 0.5\n"
    f"{_EQUATION}x = -5 | 0.5\n"
    f"{_EQUATION}x = -5 or 5 | 0.5\n"
    f"{_EQUATION}x = -1 or x = -5 | 1.0\n"
    f"{_MEME}{_MEME_PARTIAL} | 0.4\n{_MEME}{_MEME_COMPLETE} | 1.0\n"
)


def read_mm_vet(folder: Path, log: SkipLog) -> list[Question]:
    """Read mm-vet.json and images/, as released by MM-Vet's authors."""
    file = first_existing(folder, "mm-vet.json", "*/mm-vet.json")
    questions = []
    for number, (question_id, row) in enumerate(read_json(file).items(), 1):
        image = find_image(file.parent / "images", row["imagename"], log, file, number)
        if image is None:
            continue
        questions.append(
            Question(
                id=question_id,
                image=image,
                prompt=row["question"],
                target={name: row[name] for name in ("question", "answer", "capability")},
                group="+".join(sorted(row["capability"])),
            )
        )
    return questions


def judge_mm_vet(question: Question, answer: str, judge: Judge) -> float:
    """Return the judge's score, from 0 to 1. If the judge's first five replies are all invalid, the score is 0."""
    target = question.target["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = f"{MM_VET_PROMPT}\n{question.target['question']} | {target} | {answer} | "
    for attempt in range(MM_VET_ATTEMPTS):
        reminder = "" if attempt == 0 else "\nPredict the correctness of the answer (digit): "
        temperature = 0.5 * max(0, attempt - 1)
        words = judge([{"role": "user", "content": prompt + reminder}], temperature, 3).split()
        try:
            score = float(words[0])
        except (ValueError, IndexError):
            continue
        if 0 <= score <= 1:
            return score
    return 0.0


def score_mm_vet(questions: Sequence[Question], scores: Sequence[Any]) -> dict[str, float]:
    """Return the mean score overall, by required capability, and by combination of capabilities."""
    scores_of_capability: dict[str, list[float]] = {}
    for question, score in zip(questions, scores, strict=True):
        for capability in dict.fromkeys(question.target["capability"]):
            scores_of_capability.setdefault(capability, []).append(score)
    by_capability = {name: mean_percent(values) for name, values in scores_of_capability.items()}
    combinations = {name: value for name, value in mean_by_group(questions, scores).items() if "+" in name}
    return {"total": mean_percent(scores)} | by_capability | combinations


TASKS = (
    Task(
        name="llava-bench",
        description="LLaVA-Bench (in the wild): free-form answers, scored by an LLM judge",
        source="huggingface.co liuhaotian/llava-bench-in-the-wild",
        read=read_llava_bench,
        score=score_llava_bench,
        max_new_tokens=1024,
        judge=judge_llava_bench,
        llava_folder="llava-bench-in-the-wild",
    ),
    Task(
        name="mm-vet",
        description="MM-Vet: free-form answers, scored by an LLM judge",
        source="github.com/yuweihao/MM-Vet (Releases)",
        read=read_mm_vet,
        score=score_mm_vet,
        max_new_tokens=1024,
        judge=judge_mm_vet,
    ),
)
