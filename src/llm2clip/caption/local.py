"""Captions from an image-text-to-text model of transformers that runs in this process."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from llm2clip.caption.answers import Answer, CaptionRequest, clean_answer
from llm2clip.caption.options import Prompt
from llm2clip.cpu_tuning import keep_freed_memory, onednn_matmul
from llm2clip.models.loading import load_vision_language_model, name_vision_language_model
from llm2clip.models.precision import resolve_precision
from llm2clip.runs.ranks import process_state


class LocalCaptioner:
    """Captioner that runs a vision-language model on this process's device.

    Args:
        model: Model folder or hub id.
        batch_size: Number of images per batch.
        precision: fp32, bf16 or auto. auto means bf16 if the hardware supports it, and fp32 otherwise.

    Raises:
        ValueError: The model is not supported, for example because it has no chat template.
        OSError: The model does not exist.
    """

    workers = 1

    def __init__(self, model: str, batch_size: int, precision: str = "auto") -> None:
        self.batch_size = batch_size
        self.worked_before = False
        self.device = process_state().device
        self.model, self.processor = load_vision_language_model(
            model, self.device, resolve_precision("caption", precision, self.device)
        )
        self.name = name_vision_language_model(model)
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not (self.processor.chat_template or tokenizer.chat_template):
            raise ValueError(f"{model} has no chat template, so it cannot be asked for captions. Use a chat model")
        self._special_tokens = [token for token in tokenizer.all_special_tokens if token]
        keep_freed_memory(self.device)
        torch.seed()  # PyTorch's default seed would give all processes, and each retry of a request, the same answers

    def prepare(self, image: Tensor) -> Image.Image:
        """Return a uint8 image of shape (3, H, W) as a Pillow image."""
        pil_image: Image.Image = to_pil_image(image)
        return pil_image

    def ask(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        """Return an answer for each request. All requests must have the same prompt.

        Raises:
            ValueError: The batch does not fit in the device's memory.
        """
        try:
            return self._ask(requests)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"{len(requests)} images at a time do not fit in the memory of the {self.device.type} device. Run "
                "`llm2clip caption` with a lower --batch_size, or with a lower --image_size. All earlier captions are "
                "stored"
            ) from error

    def stop(self) -> None:
        """Do nothing, because `ask` never waits."""

    def _ask(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        try:
            return self._generate(requests)
        except ValueError:  # a processor rejects some images, for example because they are too narrow
            return [self._ask_alone(request) for request in requests]

    def _ask_alone(self, request: CaptionRequest) -> Answer:
        try:
            return self._generate([request])[0]
        except ValueError as error:
            return Answer(None, f"the model's processor rejects the image: {error}")

    @torch.inference_mode()
    @onednn_matmul()
    def _generate(self, requests: Sequence[CaptionRequest]) -> list[Answer]:
        inputs = self.processor.apply_chat_template(
            [self._to_messages(request) for request in requests],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self.model.dtype)
        tokens = self.model.generate(**inputs, **self._make_options(requests[0].prompt))
        num_input = inputs["input_ids"].shape[1]
        answers = []
        for attention, new_tokens in zip(inputs["attention_mask"], tokens[:, num_input:].tolist(), strict=True):
            answers.append(self._to_answer(int(attention.sum()), new_tokens))
        return answers

    def _to_messages(self, request: CaptionRequest) -> list[dict[str, Any]]:
        text = request.text
        for token in self._special_tokens:  # such as the placeholder of an image
            text = text.replace(token, " ")
        return [
            {"role": "user", "content": [{"type": "image", "image": request.image}, {"type": "text", "text": text}]}
        ]

    def _make_options(self, prompt: Prompt) -> dict[str, Any]:
        tokenizer = self.processor.tokenizer
        options: dict[str, Any] = {"max_new_tokens": prompt.max_tokens, "pad_token_id": tokenizer.pad_token_id}
        if prompt.temperature > 0:
            options |= {"do_sample": True, "temperature": prompt.temperature}
        else:
            options["do_sample"] = False
        image_token = getattr(self.model.config, "image_token_id", None)
        if image_token is not None:
            options["bad_words_ids"] = [[image_token]]
        return options

    def _to_answer(self, num_input_tokens: int, new_tokens: list[int]) -> Answer:
        end = self.model.generation_config.eos_token_id
        end_tokens = {end} if isinstance(end, int) else set(end or ())
        length = next((n for n, token in enumerate(new_tokens) if token in end_tokens), len(new_tokens))
        text = self.processor.tokenizer.decode(new_tokens[:length], skip_special_tokens=True)
        return clean_answer(text, length == len(new_tokens), num_input_tokens, length)
