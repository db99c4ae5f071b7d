"""Batched answer generation and answer log-likelihoods for LLaVA models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.data.image_loader import decode_or_error
from llm2clip.data.image_refs import ImageRef
from llm2clip.llava import modeling_patches  # noqa: F401  (registers its classes with transformers)
from llm2clip.llava.chat_template import IGNORE_INDEX, IMAGE_TOKEN, Conversation, to_messages, tokenize_and_label
from llm2clip.llava.image_features import LlavaTransform
from llm2clip.models.hub.loading import load_config
from llm2clip.models.precision import resolve_precision
from llm2clip.runs.ranks import process_state


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt without an image token, optionally about an image."""

    image: ImageRef | None
    prompt: str


class AnswerGenerator:
    """A LLaVA model that answers questions by greedy decoding or beam search."""

    def __init__(
        self, name: str, device: torch.device | str | None = None, precision: str = "auto", batch_size: int = 16
    ) -> None:
        """
        Args:
            name: model folder or hub id.
            device: device to run the model on, by default the device of the current process.
            precision: fp32, bf16 or auto. auto selects bf16 if the hardware supports it, and fp32 otherwise.
            batch_size: number of questions per forward pass.

        Raises:
            ValueError: the model does not use a fixed number of tokens per image.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.batch_size = batch_size
        self.device = torch.device(device) if device is not None else process_state().device
        bf16 = resolve_precision("tune", precision, self.device) == "bf16"
        model: Any = AutoModelForImageTextToText.from_pretrained(
            name,
            config=load_config(name),
            dtype=torch.bfloat16 if bf16 else torch.float32,
            trust_remote_code=False,
        )
        self.model = model.to(self.device).eval()
        self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        self.transform = LlavaTransform(self.processor)
        if getattr(self.model.config, "image_seq_length", None) is None:
            raise ValueError(
                f"{name} is not supported: use a model with a fixed number of tokens per image, like LLaVA"
            )
        self.image_tokens: int = self.model.config.image_seq_length
        keep_freed_memory(self.device)

    def generate(
        self, questions: Sequence[Question], max_new_tokens: int, num_beams: int = 1
    ) -> Iterator[tuple[int, str | None]]:
        """Yield (question index, answer) as each batch completes. Questions are sorted by length before batching.

        Args:
            questions: if the image of a question cannot be decoded, its answer is None.
            max_new_tokens: maximum number of tokens per answer.
            num_beams: number of beams; 1 means greedy decoding.
        """
        self.tokenizer.padding_side = "left"
        image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        for indices in self._batch_indices(questions):
            usable, inputs = self._prepare_inputs(questions, indices)
            if usable:
                with torch.inference_mode(), onednn_matmul():
                    output = self.model.generate(
                        **inputs,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        num_beams=num_beams,
                        bad_words_ids=[[image_id]],
                    )
                new_tokens = output[:, inputs["input_ids"].shape[1] :]
                answers = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
                for n, answer in zip(usable, answers, strict=True):
                    yield n, answer.strip()
            for n in indices:
                if n not in usable:
                    yield n, None

    def score_answer(self, question: Question, answer: str) -> tuple[float, bool] | None:
        """Return the log-likelihood of an answer and True if greedy decoding would produce it.

        The answer includes the token that ends it. Return None if the image cannot be decoded.
        """
        conversation = Conversation("", question.image, ((question.prompt, answer),))
        labeled = tokenize_and_label(conversation, self.tokenizer, self.image_tokens)
        inputs = {"input_ids": torch.tensor([labeled.ids], device=self.device)}
        if question.image is not None:
            pixels = decode_or_error(question.image, self.transform)
            if isinstance(pixels, str):
                return None
            inputs["pixel_values"] = pixels[None].to(self.device, self.model.dtype)
        with torch.inference_mode(), onednn_matmul():
            logits = self.model(**inputs).logits[0, :-1].float().cpu()  # (tokens - 1, vocabulary)
        labels = torch.tensor(labeled.labels[1:])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        is_greedy = (logits.argmax(-1) == labels)[labels != IGNORE_INDEX].all()
        return -float(loss), bool(is_greedy)

    def tokenize_prompt(self, question: Question) -> list[int]:
        """Return the token ids of a question's prompt, up to the start of the answer."""
        messages = to_messages(Conversation("", question.image, ((question.prompt, ""),)))[:1]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        text = text.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.image_tokens)
        has_bos = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        ids: list[int] = self.tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        return ids

    def _batch_indices(self, questions: Sequence[Question]) -> Iterator[list[int]]:
        """Yield the question indices of each batch.

        Questions with images come before questions without. In both groups, the longest prompts come first.
        """
        longest_first = sorted(range(len(questions)), key=lambda n: -len(questions[n].prompt))
        for has_image in (True, False):
            indices = [n for n in longest_first if (questions[n].image is not None) is has_image]
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _prepare_inputs(
        self, questions: Sequence[Question], indices: Sequence[int]
    ) -> tuple[list[int], dict[str, Tensor]]:
        """Return the indices of the usable questions and the model inputs for them.

        Questions whose image cannot be decoded are not usable. Prompts are left-padded.
        """
        usable, pixels = [], []
        for n in indices:
            image = questions[n].image
            if image is not None:
                decoded = decode_or_error(image, self.transform)
                if isinstance(decoded, str):
                    continue
                pixels.append(decoded)
            usable.append(n)
        if not usable:
            return [], {}
        prompts = {"input_ids": [self.tokenize_prompt(questions[n]) for n in usable]}
        inputs = dict(self.tokenizer.pad(prompts, return_tensors="pt"))
        if pixels:
            inputs["pixel_values"] = torch.stack(pixels).to(self.model.dtype)
        return usable, {name: tensor.to(self.device) for name, tensor in inputs.items()}
