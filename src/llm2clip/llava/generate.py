"""A multimodal model that answers questions about pictures, many at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.image_loader import decode_or_error
from llm2clip.distributed import process_state
from llm2clip.llava import modeling_patches  # noqa: F401  (transformers learns of its classes)
from llm2clip.llava.chat_template import IGNORED, IMAGE, Conversation, to_messages, tokenize_and_label
from llm2clip.llava.image_features import LlavaImageProcessor
from llm2clip.llava.tasks.base import Question
from llm2clip.models.precision import resolve_device_precision


class Generator:
    """A model of transformers for images and text, as `llm2clip llava` makes them.

    Its answers are greedy, or the best of a beam. Pictures that cannot be decoded have no answer (None).
    """

    def __init__(self, name: str, device: torch.device | str | None = None, precision: str = "auto", batch: int = 16):
        """
        Args:
            name: folder or hub id.
            device: by default this process's.
            precision: fp32, bf16, or auto: bf16 where the device multiplies it in hardware.
            batch: questions in a pass.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.device = torch.device(device) if device is not None else process_state().device
        low = resolve_device_precision(precision, self.device) == "bf16"
        dtype = torch.bfloat16 if low else torch.float32
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        self.name, self.model, self.batch = name, model.to(self.device).eval(), batch
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        self.tokenizer, self.pixels = self.processor.tokenizer, LlavaImageProcessor(self.processor)
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        if getattr(self.model.config, "image_seq_length", None) is None:
            raise ValueError(f"{name} is not of LLaVA's kind, whose pictures are always as many tokens")
        self.tokens: int = self.model.config.image_seq_length
        keep_freed_memory(self.device)

    def answer(self, asked: Sequence[Question], tokens: int, beams: int = 1) -> Iterator[tuple[int, str | None]]:
        """Answers as they come: the number of a question, and what was said.

        Args:
            asked: the questions; those of similar length are answered together.
            tokens: longest answer.
            beams: of beam search; 1 is greedy.
        """
        for numbers, batch in self._batches(asked):
            with torch.inference_mode(), onednn_matmul():
                said = self.model.generate(
                    **batch, max_new_tokens=tokens, do_sample=False, num_beams=beams,
                    bad_words_ids=[[self.tokenizer.convert_tokens_to_ids(IMAGE)]],
                )  # fmt: skip
            answers = self.tokenizer.batch_decode(said[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            yield from ((n, answer.strip()) for n, answer in zip(numbers, answers, strict=True))
        yield from ((n, None) for n in self._undecodable)

    def choose(self, asked: Sequence[Question]) -> Iterator[tuple[int, int | None]]:
        """The likeliest option of each question, by the mean log-likelihood of its tokens: the number of the question,
        and that of the option."""
        for n, one in enumerate(asked):
            found = self.likelihoods(one, one.options)
            yield n, None if found is None else int((found[:, 0] / found[:, 1]).argmax())

    def likelihoods(self, one: Question, answers: Sequence[str]) -> Tensor | None:
        """Of each answer to a question: the sum of its tokens' log-likelihoods, how many they are, and how many of them
        are the likeliest there, (answers, 3) float32; None if the picture cannot be decoded."""
        seen = decode_or_error(one.image, self.pixels) if one.image is not None else None
        if isinstance(seen, str):
            return None
        rows = [
            tokenize_and_label(Conversation(one.id, one.image, ((one.prompt, answer),)), self.tokenizer, self.tokens)
            for answer in answers
        ]
        length, pad = max(len(row.ids) for row in rows), self.tokenizer.pad_token_id
        gaps = [length - len(row.ids) for row in rows]
        batch = {
            "input_ids": torch.tensor([row.ids + [pad] * gap for row, gap in zip(rows, gaps, strict=True)]),
            "attention_mask": torch.tensor([[1] * (length - gap) + [0] * gap for gap in gaps]),
        }
        if seen is not None:
            batch["pixel_values"] = seen.to(self.model.dtype).expand(len(rows), -1, -1, -1)
        labels = torch.tensor([row.labels + [IGNORED] * gap for row, gap in zip(rows, gaps, strict=True)])[:, 1:]
        with torch.inference_mode(), onednn_matmul():
            logits = self.model(**{k: v.to(self.device) for k, v in batch.items()}).logits[:, :-1].float().cpu()
        said = labels != IGNORED
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        greedy = (logits.argmax(-1) == labels) & said
        return torch.stack([-losses.sum(1), said.sum(1).float(), greedy.sum(1).float()], 1)

    def _batches(self, asked: Sequence[Question]) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Numbers of questions, and their tokens, padded on the left, with their pixels. Questions with a picture are
        apart from those without."""
        self._undecodable: list[int] = []
        self.tokenizer.padding_side = "left"
        order = sorted(range(len(asked)), key=lambda n: (asked[n].image is None, -len(asked[n].prompt)))
        for pictured in (True, False):
            mine = [n for n in order if (asked[n].image is not None) is pictured]
            for start in range(0, len(mine), self.batch):
                numbers, pixels = [], []
                for n in mine[start : start + self.batch]:
                    image = asked[n].image
                    seen = decode_or_error(image, self.pixels) if image is not None else None
                    if isinstance(seen, str):
                        self._undecodable.append(n)
                        continue
                    numbers.append(n)
                    if seen is not None:
                        pixels.append(seen)
                if not numbers:
                    continue
                prompts = {"input_ids": [self.prompt(asked[n]) for n in numbers]}
                batch = dict(self.tokenizer.pad(prompts, return_tensors="pt"))
                if pixels:
                    batch["pixel_values"] = torch.stack(pixels).to(self.model.dtype)
                yield numbers, {k: v.to(self.device) for k, v in batch.items()}

    def prompt(self, one: Question) -> list[int]:
        """Token ids up to where the answer begins."""
        said = to_messages(Conversation(one.id, one.image, ((one.prompt, ""),)))[:1]
        text = self.processor.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        text = text.replace(IMAGE, IMAGE * self.tokens)
        starts_itself = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not starts_itself)["input_ids"]
        return ids
