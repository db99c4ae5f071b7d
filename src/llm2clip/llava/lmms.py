"""A multimodal model inside lmms-eval, which finds it by an entry point where both are installed:

python -m lmms_eval --model llm2clip_llava --model_args pretrained=RUN/model --tasks pope --batch_size 16
"""

from __future__ import annotations

import io
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from llm2clip.data.image_refs import MemoryImage
from llm2clip.distributed import process_state
from llm2clip.llava.generate import Generator
from llm2clip.llava.tasks import Question

TOGETHER = 256  # requests whose pictures are held at once
MANIFEST = ModelManifest("llm2clip_llava", simple_class_path="llm2clip.llava.lmms.LmmsModel")


class LmmsModel(lmms):
    """lmms-eval's model: greedy answers, and likelihoods of answers, to questions with a picture or with none."""

    def __init__(
        self, pretrained: str, device: str | None = None, batch_size: int | str = 16, precision: str = "auto", **_: Any
    ) -> None:
        """
        Args:
            pretrained: folder or hub id of the model.
            device: by default this process's.
            batch_size: questions in a pass.
            precision: fp32, bf16 or auto.
        """
        super().__init__()
        self.answerer = Generator(pretrained, device, precision, int(batch_size))
        self._rank, self._world_size = process_state().process_index, process_state().num_processes

    def _asked(self, n: int, context: str, to_visual: Any, doc_id: Any, task: str, split: str) -> Question:
        """A request as a question. Raises ValueError for several pictures, or a film."""
        pictures = (to_visual(self.task_dict[task][split][doc_id]) if to_visual else None) or []
        if len(pictures) > 1 or any(isinstance(one, str) for one in pictures):
            raise ValueError(f"{task}: questions about one picture alone; this has {len(pictures)}, or a film")
        image = None
        if pictures:
            stream = io.BytesIO()
            pictures[0].convert("RGB").save(stream, "PNG")
            image = MemoryImage(stream.getvalue(), f"{task} {doc_id}")
        return Question(str(n), image, context)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers in the order of the requests; what stands before `until`."""
        found = [""] * len(requests)
        settings = [request.args[1] for request in requests]
        for limit in sorted({int(some.get("max_new_tokens", 128)) for some in settings}):
            mine = [n for n, some in enumerate(settings) if int(some.get("max_new_tokens", 128)) == limit]
            for start in range(0, len(mine), TOGETHER):
                part = mine[start : start + TOGETHER]
                asked = [self._asked(n, requests[n].args[0], *requests[n].args[2:]) for n in part]
                for k, said in self.answerer.answer(asked, limit):
                    until = settings[part[k]].get("until") or []
                    for end in [until] if isinstance(until, str) else until:
                        said = (said or "").partition(end)[0]
                    found[part[k]] = (said or "").strip()
        return found

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The log-likelihood of each answer, and whether it is what would be said."""
        found = []
        for n, request in enumerate(requests):
            context, target, to_visual, doc_id, task, split = request.args
            answer = target if isinstance(target, str) else target(self.task_dict[task][split][doc_id])
            total = self.answerer.likelihoods(self._asked(n, context, to_visual, doc_id, task, split), [answer])
            if total is None:
                raise ValueError(f"{task} {doc_id}: its picture cannot be decoded")
            found.append((float(total[0, 0]), bool(total[0, 1] == total[0, 2])))
        return found

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("questions of one round alone")
