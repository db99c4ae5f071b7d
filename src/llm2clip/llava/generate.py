"""Answer generation and answer scoring with LLaVA models."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm2clip.cpu_tuning import keep_freed_memory, use_onednn_matmul
from llm2clip.data.images import load_image
from llm2clip.llava.conversations import (
    IGNORE_INDEX,
    IMAGE_TOKEN,
    Conversation,
    convert_to_chat_messages,
    tokenize_and_label,
)
from llm2clip.llava.dataset import LlavaTransform
from llm2clip.llava.modeling_patches import register_llava_classes
from llm2clip.models.loading import load_vision_language_model
from llm2clip.models.precision import resolve_precision
from llm2clip.runs.ranks import process_state


@dataclass(frozen=True, slots=True)
class Question:
    """Question, optionally about an image."""

    image: np.ndarray | None  # uint8 RGB of shape (H, W, 3)
    prompt: str  # question without an image token

    def to_conversation(self, answer: str = "") -> Conversation:
        image: Any = self.image  # tokens depend only on whether there is an image
        return Conversation("", image, ((self.prompt, answer),))


class AnswerGenerator:
    """LLaVA model that answers questions with greedy decoding or beam search."""

    def __init__(
        self, name: str, device: torch.device | str | None = None, precision: str = "auto", batch_size: int = 16
    ) -> None:
        """
        Args:
            name: Folder or hub id of the model.
            precision: "fp32", "bf16" or "auto" (bf16 if the hardware supports it).
            batch_size: Maximum number of questions per forward pass.

        Raises:
            ValueError: The model has no fixed number of tokens per image.
        """
        register_llava_classes()
        self.batch_size = batch_size
        self.device = torch.device(device) if device is not None else process_state().device
        self.model, self.processor = load_vision_language_model(
            name, self.device, resolve_precision("llava", precision, self.device)
        )
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.chat_template = self.processor.chat_template or self.tokenizer.chat_template
        self.transform = LlavaTransform(self.processor)
        if getattr(self.model.config, "image_seq_length", None) is None:
            raise ValueError(
                f"{name} is not supported. Use a model with a fixed number of tokens per image, such as LLaVA"
            )
        self.num_image_tokens: int = self.model.config.image_seq_length
        keep_freed_memory(self.device)

    def generate(self, questions: Sequence[Question], max_new_tokens: int, num_beams: int = 1) -> list[str]:
        """Answer each question with up to `max_new_tokens` tokens. Greedy decoding is used if `num_beams` is 1."""
        answers = [""] * len(questions)
        image_id = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        # Batch questions of similar length to reduce padding. Batch questions with and without images separately.
        longest_first = sorted(range(len(questions)), key=lambda n: -len(questions[n].prompt))
        for has_image in (True, False):
            indices = [n for n in longest_first if (questions[n].image is not None) is has_image]
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                inputs = self._prepare_model_inputs([questions[n] for n in batch])
                with torch.inference_mode(), use_onednn_matmul():
                    output = self.model.generate(
                        **inputs,
                        max_new_tokens=max_new_tokens,
                        do_sample=False,
                        num_beams=num_beams,
                        bad_words_ids=[[image_id]],
                    )
                new_tokens = output[:, inputs["input_ids"].shape[1] :]
                texts = self.tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
                for n, text in zip(batch, texts, strict=True):
                    answers[n] = text.strip()
        return answers

    def score_answer(self, question: Question, answer: str) -> tuple[float, bool]:
        """Return the log-likelihood of an answer and its end-of-turn token, and whether greedy decoding yields both."""
        tokens = tokenize_and_label(question.to_conversation(answer), self.tokenizer, self.num_image_tokens)
        inputs = {"input_ids": torch.tensor([tokens.ids], device=self.device)} | self._prepare_pixel_values([question])
        with torch.inference_mode(), use_onednn_matmul():
            logits = self.model(**inputs).logits[0, :-1].float().cpu()  # (tokens - 1, vocabulary)
        labels = torch.tensor(tokens.labels[1:])
        loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        is_greedy = (logits.argmax(-1) == labels)[labels != IGNORE_INDEX].all()
        return -float(loss), bool(is_greedy)

    def _prepare_model_inputs(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        """Return the model inputs for a batch of questions. Either all of the questions or none must have an image."""
        prompts = []
        for question in questions:
            messages = convert_to_chat_messages(question.to_conversation())[:1]
            prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            prompts.append(prompt.replace(IMAGE_TOKEN, IMAGE_TOKEN * self.num_image_tokens))
        has_bos = self.tokenizer.bos_token is not None and prompts[0].startswith(self.tokenizer.bos_token)
        encoded = self.tokenizer(
            prompts, add_special_tokens=not has_bos, padding=True, padding_side="left", return_tensors="pt"
        )
        inputs = {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}
        return inputs | self._prepare_pixel_values(questions)

    def _prepare_pixel_values(self, questions: Sequence[Question]) -> dict[str, Tensor]:
        pixels = [self.transform(load_image(question.image)) for question in questions if question.image is not None]
        return {"pixel_values": torch.stack(pixels).to(self.device, self.model.dtype)} if pixels else {}
