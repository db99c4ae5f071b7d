"""Any model that puts pictures and texts into one space, opened by its name: ours and those it is compared with.

MODEL                        a folder that llm2clip wrote, or a hub id of one
NAME                         a transformers model of images and texts (CLIP, SigLIP, ...): folder or hub id
open_clip:NAME/PRETRAINED    an open_clip model
st:NAME                      a sentence-transformers model that takes pictures
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.data.images import EvalTransform
from llm2clip.models.clip_text_encoder import OPEN_CLIP, ClipTextEncoder, has_text_tower, load_clip_text_encoder
from llm2clip.models.fingerprint import hash_weights
from llm2clip.models.llm2clip import LLM2CLIP, is_model_folder
from llm2clip.models.precision import fastest_precision

SENTENCES = "st:"


@dataclass
class DualEncoder:
    """An image side and a text side whose cosines mean something.

    Args:
        name: as it was asked for.
        embed_dim: of its vectors.
        identity: works out all that changes a vector, but for the precision that texts are read in.
        transform: a decoded picture, uint8 (3, H, W), to what the image side takes; it can be pickled.
        encode_images_raw: a batch of those to vectors (N, width).
        encode_texts_raw: texts to vectors (N, width).
        count_truncated: how many of some texts are longer than the window, and lose their end; None where nobody can say.
    """

    name: str
    embed_dim: int
    identity: Callable[[], dict[str, Any]]
    transform: Callable[[Tensor], Any]
    encode_images_raw: Callable[[list[Any]], Tensor]
    encode_texts_raw: Callable[[Sequence[str], bool], Tensor]
    count_truncated: Callable[[Sequence[str]], int | None] = lambda texts: None

    @torch.inference_mode()
    @onednn_matmul()
    def encode_images(self, pictures: list[Any]) -> Tensor:
        """What `transform` made of pictures, to vectors (N, width) float32, L2-normalised, on the CPU."""
        return F.normalize(self.encode_images_raw(pictures).float(), dim=-1).cpu()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Texts to vectors (N, width) float32, L2-normalised, on the CPU."""
        return F.normalize(self.encode_texts_raw(texts, progress).float(), dim=-1).cpu()


def open_dual_encoder(name: str, device: torch.device | str | None = None, precision: str = "fp32") -> DualEncoder:
    """Open a model by its name; see above. No code that comes with a model is run.

    Args:
        name: of the model.
        device: where to put it; by default a GPU when there is one.
        precision: in which our caption encoders read, as in `CaptionEncoder.encode`; auto is the fastest that keeps
            their vectors. Other models read in fp32.

    Raises:
        ValueError: it is no model of pictures and texts.
        OSError: there is none of that name.
        ImportError: the library that it takes is not installed.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name.startswith(SENTENCES):
        return _sentence_transformer(name, device)
    if name.startswith(OPEN_CLIP):
        return _open_clip(name, device)
    if is_model_folder(name) or not has_text_tower(name):
        return _ours(name, device, precision)
    return _transformers(name, device)


def from_llm2clip(model: LLM2CLIP, name: str, precision: str = "fp32") -> DualEncoder:
    """A model of ours as one among others, in eval mode; `name` is what it is called, `precision` its texts'."""
    model.eval()
    return DualEncoder(
        name,
        model.config.embed_dim,
        lambda: {"llm2clip": dataclasses.asdict(model.config), "weights": hash_weights(model)},
        EvalTransform(model.tower.preprocess),
        lambda pictures: _first(model(pixels=torch.stack(pictures).to(model.device))),
        lambda texts, progress: model.encode_text(texts, progress, precision),
        lambda texts: model.encoder.count_truncated(texts) if model.has_encoder else None,
    )


def _first(sides: Sequence[Tensor]) -> Tensor:
    return sides[0]


def _identity(name: str, model: torch.nn.Module) -> dict[str, Any]:
    return {"name": name, "weights": hash_weights(model)}


def _ours(name: str, device: torch.device, precision: str) -> DualEncoder:
    model = LLM2CLIP.from_pretrained(name, device)
    if precision == "auto":
        precision = fastest_precision(model.encoder) if model.has_encoder else "fp32"
    return from_llm2clip(model, name, precision)


def _transformers(name: str, device: torch.device) -> DualEncoder:
    from transformers import AutoImageProcessor

    text = load_clip_text_encoder(name, device)
    processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)

    def see(pictures: list[Tensor]) -> Tensor:
        found = text.model.get_image_features(pixel_values=torch.stack(pictures).to(device))
        vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return vectors

    return _beside(name, text, partial(_processed, processor), see)


def _processed(processor: Any, picture: Tensor) -> Tensor:
    pixels: Tensor = processor(images=to_pil_image(picture), return_tensors="pt")["pixel_values"][0]
    return pixels


def _open_clip(name: str, device: torch.device) -> DualEncoder:
    text = load_clip_text_encoder(name, device)
    from open_clip import get_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(text.model)), is_train=False)
    see = lambda pictures: text.model.encode_image(torch.stack(pictures).to(device))  # noqa: E731
    return _beside(name, text, partial(_as_picture, transform), see)


def _as_picture(transform: Callable[[Any], Tensor], picture: Tensor) -> Tensor:
    return transform(to_pil_image(picture))


def _beside(
    name: str, text: ClipTextEncoder, transform: Callable[[Tensor], Any], see: Callable[[list[Any]], Tensor]
) -> DualEncoder:
    def read(texts: Sequence[str], progress: bool) -> Tensor:
        return text.encode(texts, progress=progress)

    identity = partial(_identity, name, text.model)
    return DualEncoder(name, text.embed_dim, identity, transform, see, read, text.count_truncated)


def _sentence_transformer(name: str, device: torch.device) -> DualEncoder:
    from sentence_transformers import SentenceTransformer

    model: Any = SentenceTransformer(name.removeprefix(SENTENCES), device=str(device), trust_remote_code=False)

    def encode(things: Sequence[Any], progress: bool = False) -> Tensor:
        found: Tensor = model.encode(list(things), convert_to_tensor=True, show_progress_bar=progress)
        return found

    width = encode(["a"]).shape[-1]
    return DualEncoder(name, width, partial(_identity, name, model), to_pil_image, encode, encode)
