"""LLaVA model class for lmms-eval, registered through an entry point. Example:

lmms-eval --model llm2clip_llava --model_args pretrained=RUN/model --tasks pope,gqa --batch_size 16
"""

from typing import Any

import numpy as np
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from llm2clip.llava.generate import AnswerGenerator, Question
from llm2clip.runs.ranks import process_state

CHUNK_SIZE = 256  # maximum number of requests whose images are in memory at a time
MANIFEST = ModelManifest("llm2clip_llava", simple_class_path="llm2clip.llava.lmms.LmmsModel")


class LmmsModel(lmms):
    """LLaVA model that generates and scores answers for lmms-eval. A question must have at most one image."""

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 16, precision: str = "auto", **_: Any
    ) -> None:
        super().__init__()
        self.generator = AnswerGenerator(pretrained, device, precision, int(batch_size))
        self.device = self.generator.device
        self._rank = process_state().process_index
        self._world_size = process_state().num_processes

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Generate an answer for each request, truncated before the first occurrence of any of its `until` strings.

        The only other generation settings used are `max_new_tokens` and `num_beams`. Answers are never sampled.
        """
        answers = [""] * len(requests)
        requests_by_settings: dict[tuple[int, int], list[int]] = {}
        for n, request in enumerate(requests):
            settings = request.args[1]
            key = (int(settings.get("max_new_tokens", 128)), int(settings.get("num_beams") or 1))
            requests_by_settings.setdefault(key, []).append(n)
        for (max_new_tokens, num_beams), numbers in requests_by_settings.items():
            for start in range(0, len(numbers), CHUNK_SIZE):
                chunk = numbers[start : start + CHUNK_SIZE]
                questions = []
                for n in chunk:
                    context, _, *document = requests[n].args
                    questions.append(self._convert_to_question(context, *document))
                generated = self.generator.generate(questions, max_new_tokens, num_beams)
                for n, answer in zip(chunk, generated, strict=True):
                    answers[n] = _truncate_at_stop_strings(answer, requests[n].args[1].get("until") or [])
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each answer, and whether greedy decoding yields the answer."""
        results = []
        for request in requests:
            context, target, to_visual, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            results.append(
                self.generator.score_answer(self._convert_to_question(context, to_visual, doc_id, task, split), answer)
            )
        return results

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("multi-round requests are not supported")

    def _convert_to_question(self, context: str, to_visual: Any, doc_id: Any, task: str, split: str) -> Question:
        visuals = (to_visual(self.task_dict[task][split][doc_id]) if to_visual else None) or []
        if any(isinstance(visual, str) for visual in visuals):
            raise ValueError(f"{task}: videos are not supported")
        if len(visuals) > 1:
            raise ValueError(f"{task}: a question must have at most one image (got {len(visuals)})")
        return Question(np.array(visuals[0].convert("RGB")) if visuals else None, context)


def _truncate_at_stop_strings(answer: str, until: str | list[str]) -> str:
    for end in [until] if isinstance(until, str) else until:
        answer = answer.partition(end)[0]
    return answer.strip()
