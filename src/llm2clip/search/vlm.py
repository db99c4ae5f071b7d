"""Re-ranking by a vision-language model. The model is asked whether each image matches the query."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.models.dual_encoder import DualEncoder, open_dual_encoder
from llm2clip.models.hub.loading import load_vision_language_model
from llm2clip.models.precision import resolve_precision
from llm2clip.search.query import SearchQuery
from llm2clip.search.request_images import BadRequest

VLM_PREFIX = "vlm:"
QUESTION = "Does this image match the description: {}? Answer yes or no."
ANSWERS = ("yes", "Yes"), ("no", "No")
MAX_SIDE = 768  # in pixels; some models embed every tile of a large image


class VisionLanguageModel:
    """An image-text-to-text model of transformers that rates images by the probability that it answers yes."""

    def __init__(self, name: str, precision: str = "auto") -> None:
        """
        Args:
            name: Model folder or hub id.
            precision: fp32, bf16 or auto. auto means bf16 if the hardware supports it, and fp32 otherwise.

        Raises:
            ValueError: The type of the model is not supported, or its tokenizer cannot distinguish yes from no.
            OSError: The model does not exist.
        """
        self.name = name
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor = load_vision_language_model(
            name, self.device, resolve_precision("serve", precision, self.device)
        )
        self.special_tokens = [token for token in self.processor.tokenizer.all_special_tokens if token]
        encode = self.processor.tokenizer.encode
        self.answer_ids = [[encode(word, add_special_tokens=False)[0] for word in words] for words in ANSWERS]
        if set(self.answer_ids[0]) & set(self.answer_ids[1]):
            raise ValueError(
                f"{name} cannot rate images: its tokenizer gives the words yes and no the same first token"
            )

    def transform(self, image: Tensor) -> Image.Image:
        """Convert a uint8 image of shape (3, H, W) to a Pillow image of at most MAX_SIDE pixels per side."""
        pil_image: Image.Image = to_pil_image(image)
        pil_image.thumbnail((MAX_SIDE, MAX_SIDE))
        return pil_image

    def rate(self, items: Sequence[tuple[Image.Image, str]]) -> np.ndarray:
        """Return the probability of yes for each image and question, relative to yes and no, as float32 (N,).

        It is NaN for images that the model's processor rejects, for example because they are too narrow.
        """
        ratings = []
        for image, question in items:
            try:
                ratings.append(self._rate_image(image, question))
            except ValueError:
                ratings.append(math.nan)
        return np.array(ratings, np.float32)

    @torch.inference_mode()
    @onednn_matmul()
    def _rate_image(self, image: Image.Image, question: str) -> float:
        for token in self.special_tokens:  # such as the placeholder of an image
            question = question.replace(token, " ")
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        logits = self.model(**inputs.to(self.device, self.model.dtype)).logits[0, -1].float()
        yes, no = (logits[ids].logsumexp(0) for ids in self.answer_ids)
        return float(torch.sigmoid(yes - no))


RerankModel = DualEncoder | VisionLanguageModel


def open_rerank_model(name: str, precision: str = "auto") -> RerankModel:
    """Load a re-ranking model: a vision-language model if the name starts with VLM_PREFIX, or a dual encoder."""
    if name.startswith(VLM_PREFIX):
        return VisionLanguageModel(name.removeprefix(VLM_PREFIX), precision)
    return open_dual_encoder(name, precision=precision, stage="serve")


def make_question(query: SearchQuery) -> str:
    """Return the question that asks whether an image matches a query.

    Raises:
        BadRequest: The query contains anything but texts.
    """
    others = [*query.images, *query.like, *query.negative_texts, *query.negative_images, *query.negative_like]
    if others or not query.texts:
        raise BadRequest(
            "a vision-language model can only re-rank results of queries that consist of texts, without images, "
            "earlier results and negative parts"
        )
    return QUESTION.format(", ".join(query.texts))
