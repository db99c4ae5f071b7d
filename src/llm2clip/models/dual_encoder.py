"""Common interface to image-text models from llm2clip and other libraries.

A model name has one of these forms:

MODEL                        folder or hub id of an llm2clip model
NAME                         folder or hub id of a transformers model (CLIP, SigLIP, Chinese-CLIP, Jina-CLIP, ...)
OWNER/NAME@REVISION          hub id with a branch, tag or full commit hash
open_clip:NAME/PRETRAINED    open_clip model
st:NAME                      sentence-transformers model that encodes images and texts
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.v2 import Compose
from torchvision.transforms.v2.functional import to_pil_image

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.data.transforms import EvalTransform, PreprocessConfig
from llm2clip.models.clip_models import (
    OPEN_CLIP_PREFIX,
    ClipTextEncoder,
    get_pooled_output,
    has_text_tower,
    load_clip_text_encoder,
)
from llm2clip.models.llm2clip import LLM2CLIP, MAX_LOGIT_SCALE, check_truncate_dim
from llm2clip.models.loading import (
    DEFAULT_FILES,
    DEFAULT_MODEL,
    DEFAULT_REVISION,
    WITHOUT_HUB_CODE,
    check_model_source,
    download_hub_snapshot,
    explain_remote_code_error,
    fingerprint,
    hash_weights,
    hide_loading_progress_bars,
    split_revision,
)
from llm2clip.models.model_folder import find_model_folder, is_model_folder
from llm2clip.models.precision import FP32, Precision, Stage, resolve_precision
from llm2clip.models.prompts import NO_TEMPLATES, QueryTemplates
from llm2clip.models.vision.dense import DenseEncoder, build_dense_encoder
from llm2clip.models.vision.vision_tower import VisionTower

SENTENCE_TRANSFORMERS_PREFIX = "st:"


@dataclass
class DualEncoder:
    """Image encoder and text encoder with a shared embedding space.

    Use `encode_images` and `encode_texts`, which return L2-normalised embeddings. The functions `encode_images_raw` and
    `encode_texts_raw` may return unnormalised embeddings of shape (N, embed_dim), of any dtype and on any device.

    Attributes:
        identity: Function that returns a dict of everything that affects the embeddings, except the precision.
        transform: Picklable function that preprocesses a uint8 image of shape (3, H, W) for the image encoder.
        encode_images_raw: Function that encodes a list of N images preprocessed by `transform`.
        encode_texts_raw: Function that encodes N texts. If its second argument is True, a progress bar is shown.
        count_truncated_texts: Function that counts the truncated texts in a list, or returns None if unknown.
        dense: Encoder for dense image features, or None if the model does not support dense features.
        logit_scale: Function that returns the learned factor applied to cosine similarities, or None if unavailable.
        query_templates: Prompt templates for short search queries. Not used by `encode_texts`.
        part_identities: Function like `identity` that returns separate dicts for the image and text encoders,
            or None if unsupported. Models with equal image dicts can search the same index.
        llm2clip: Untruncated llm2clip model, or None for other types of models.
    """

    name: str
    embed_dim: int
    identity: Callable[[], dict[str, Any]]
    transform: Callable[[Tensor], Any]
    encode_images_raw: Callable[[list[Any]], Tensor]
    encode_texts_raw: Callable[[Sequence[str], bool], Tensor]
    count_truncated_texts: Callable[[Sequence[str]], int | None] = lambda texts: None
    precision: Precision = FP32
    dense: DenseEncoder | None = None
    logit_scale: Callable[[], float | None] = lambda: None
    query_templates: QueryTemplates = NO_TEMPLATES
    part_identities: Callable[[], tuple[dict[str, Any], dict[str, Any]] | None] = lambda: None
    llm2clip: LLM2CLIP | None = None

    @torch.inference_mode()
    @use_onednn_matmul()
    def encode_images(self, images: list[Any]) -> Tensor:
        """Encode N preprocessed images. Return L2-normalised float32 embeddings of shape (N, embed_dim) on the CPU."""
        return F.normalize(self.encode_images_raw(images).float(), dim=-1).cpu()

    @torch.inference_mode()
    def encode_texts(self, texts: Sequence[str], progress: bool = False) -> Tensor:
        """Encode N texts. Return L2-normalised float32 embeddings of shape (N, embed_dim) on the CPU."""
        return F.normalize(self.encode_texts_raw(texts, progress).float(), dim=-1).cpu()

    @cached_property
    def part_fingerprints(self) -> tuple[str, str] | None:
        """Fingerprints of the image encoder and the text encoder, or None if `part_identities` returns None."""
        # The property is cached because hashing the weights of an LLM takes seconds.
        parts = self.part_identities()
        return None if parts is None else (fingerprint(parts[0]), fingerprint(parts[1]))

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.identity() if self.part_fingerprints is None else {"parts": self.part_fingerprints})

    def truncate(self, dim: int) -> DualEncoder:
        """Return a model that truncates embeddings to the first `dim` dimensions and then normalises the embeddings."""
        check_truncate_dim(dim, self.embed_dim, self.name)
        if dim == self.embed_dim:
            return self

        def get_truncated_part_identities() -> tuple[dict[str, Any], dict[str, Any]] | None:
            parts = self.part_identities()
            return None if parts is None else ({**parts[0], "dim": dim}, {**parts[1], "dim": dim})

        dense = self.dense
        if dense is not None:
            encode_cells = dense.features
            dense = dataclasses.replace(
                dense, features=lambda pixels, variant: encode_cells(pixels, variant)[..., :dim]
            )
        return dataclasses.replace(
            self,
            embed_dim=dim,
            identity=lambda: {**self.identity(), "dim": dim},
            part_identities=get_truncated_part_identities,
            encode_images_raw=lambda images: self.encode_images_raw(images)[:, :dim],
            encode_texts_raw=lambda texts, progress: self.encode_texts_raw(texts, progress)[:, :dim],
            dense=dense,
        )


def open_dual_encoder(
    name: str,
    device: torch.device | str | None = None,
    precision: str = "auto",
    trust_remote_code: bool = False,
    stage: Stage = "evaluate",
) -> DualEncoder:
    """Load an image-text model. The forms of `name` are listed at the top of `models/dual_encoder.py`.

    Args:
        device: Device to load the model on. Default: a GPU if available.
        precision: Precision of an llm2clip model (see `wrap_llm2clip`). Models of other types always run in fp32.
        trust_remote_code: Allow the model's own Python code to run. Required for Jina-CLIP.
        stage: Stage for which `auto` selects the precision. For `serve`, the caption encoder is loaded immediately.
            For other stages, the caption encoder is loaded on first use.

    Raises:
        ValueError: The model has no image encoder or no text encoder, the model type is not supported, or the model
            requires its own code and `trust_remote_code` is False.
        OSError: The model does not exist.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name.startswith(SENTENCE_TRANSFORMERS_PREFIX):
        return _load_sentence_transformer(name, device, trust_remote_code)
    if name.startswith(OPEN_CLIP_PREFIX):
        return _load_open_clip_dual_encoder(name, device)
    source = name
    if name == DEFAULT_MODEL and not Path(name).exists():
        source = str(download_hub_snapshot(name, DEFAULT_FILES, revision=DEFAULT_REVISION))
    elif split_revision(name)[1] is not None:  # transformers does not support OWNER/NAME@REVISION
        source = str(find_model_folder(name))
        if not is_model_folder(source):
            weights = () if any(Path(source).glob("*.safetensors")) else ("pytorch_model*.bin",)
            download_hub_snapshot(name, ("*.py", *weights))
    if is_model_folder(source) or not has_text_tower(source, trust_remote_code):
        model = LLM2CLIP.from_pretrained(source, device)
        if model.has_encoder and stage == "serve":
            precision = model.load_encoder(precision, stage)
        return wrap_llm2clip(model, name, precision, stage)
    return _load_transformers_dual_encoder(name, source, device, trust_remote_code)


def wrap_llm2clip(model: LLM2CLIP, name: str, precision: str = "auto", stage: Stage = "evaluate") -> DualEncoder:
    """Wrap an LLM2CLIP model, and switch the model to eval mode. The caption encoder is loaded on first use.

    `precision` is the precision of the caption encoder, as in `CaptionEncoder.encode`, or `auto` to select the
    precision for the stage. On GPUs with bf16 support, the vision tower runs in bf16 unless the precision is fp32.
    """
    model.eval()
    resolved = resolve_precision(stage, precision, model.device)
    image_precision = resolved if model.device.type == "cuda" else FP32

    def encode_images(images: list[Tensor]) -> Tensor:
        with image_precision.autocast(model.device):
            image_embeddings, *_ = model(pixels=torch.stack(images).to(model.device))
        return image_embeddings

    @cache
    def load_encoder_once() -> Precision:
        return model.load_encoder(precision, stage)

    def count_truncated_texts(texts: Sequence[str]) -> int | None:
        if not model.has_encoder:
            return None
        load_encoder_once()
        return model.encoder.count_truncated_texts(texts)

    return DualEncoder(
        name=name,
        embed_dim=model.config.embed_dim,
        identity=lambda: {"llm2clip": model.config.identity(), "weights": hash_weights(model)},
        transform=EvalTransform(model.tower.preprocess),
        encode_images_raw=encode_images,
        encode_texts_raw=lambda texts, progress: model.encode_text(texts, progress, load_encoder_once()),
        count_truncated_texts=count_truncated_texts,
        precision=resolved,
        dense=_try_build_dense_encoder(model.tower, model.projection, image_precision),
        logit_scale=lambda: min(float(model.logit_scale.detach().exp()), MAX_LOGIT_SCALE),
        query_templates=model.config.query_templates,
        part_identities=lambda: _get_part_identities(model),
        llm2clip=model,
    )


def _get_part_identities(model: LLM2CLIP) -> tuple[dict[str, Any], dict[str, Any]]:
    image = {
        "tower": model.config.tower,
        "embed_dim": model.config.embed_dim,
        "weights": [hash_weights(model.tower), hash_weights(model.projection)],
    }
    return image, {"llm2clip": model.config.identity(), "weights": hash_weights(model.adapter)}


def _try_build_dense_encoder(
    tower: VisionTower, project: Callable[[Tensor], Tensor], precision: Precision = FP32
) -> DenseEncoder | None:
    try:
        return build_dense_encoder(tower, project, precision)
    except ValueError:
        return None


@hide_loading_progress_bars()
def _load_transformers_dual_encoder(
    name: str, source: str, device: torch.device, trust_remote_code: bool
) -> DualEncoder:
    from transformers import AutoImageProcessor

    text_encoder = load_clip_text_encoder(source, device, trust_remote_code)
    model = text_encoder.model
    if hasattr(model, "encode_text") and hasattr(model, "encode_image"):  # Jina-CLIP's own code preprocesses images
        return _build_clip_dual_encoder(
            name, text_encoder, to_pil_image, lambda images: torch.as_tensor(model.encode_image(images))
        )
    processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)

    def encode_images(images: list[dict[str, Tensor]]) -> Tensor:
        batch = {key: torch.stack([image[key] for image in images]).to(device) for key in images[0]}
        return get_pooled_output(model.get_image_features(**batch))

    return _build_clip_dual_encoder(
        name,
        text_encoder,
        transform=partial(_preprocess_image, processor),
        encode_images=encode_images,
        dense=_build_transformers_dense_encoder(model, processor),
    )


def _preprocess_image(processor: Any, image: Tensor) -> dict[str, Tensor]:
    # This function is at module level because worker processes cannot unpickle local functions.
    batch = processor(images=to_pil_image(image), return_tensors="pt")
    return {key: tensor[0] for key, tensor in batch.items()}


def _build_transformers_dense_encoder(model: Any, processor: Any) -> DenseEncoder | None:
    if model.config.model_type not in ("clip", "siglip"):
        return None
    try:
        preprocess = PreprocessConfig.from_dict(processor.to_dict())
    except ValueError:  # `PreprocessConfig` supports only square images
        return None
    architecture = model.config.vision_config.to_dict()
    config = {"library": "transformers", "architecture": architecture, "preprocess": preprocess.to_dict()}
    backbone = getattr(model.vision_model, "vision_model", model.vision_model)
    tower = VisionTower(backbone, config).to(model.device).eval()
    return _try_build_dense_encoder(tower, getattr(model, "visual_projection", nn.Identity()))


def _load_open_clip_dual_encoder(name: str, device: torch.device) -> DualEncoder:
    text_encoder = load_clip_text_encoder(name, device)  # raises ImportError if open_clip is not installed
    from open_clip import get_model_preprocess_cfg
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = text_encoder.model
    transform = image_transform_v2(PreprocessCfg(**get_model_preprocess_cfg(model)), is_train=False)
    return _build_clip_dual_encoder(
        name,
        text_encoder,
        transform=Compose([to_pil_image, transform]),
        encode_images=lambda images: model.encode_image(torch.stack(images).to(device)),
        dense=_build_open_clip_dense_encoder(model.visual, get_model_preprocess_cfg(model), device),
    )


def _build_open_clip_dense_encoder(visual: Any, cfg: dict[str, Any], device: torch.device) -> DenseEncoder | None:
    trunk = getattr(visual, "trunk", None)
    if trunk is None or hasattr(visual.head, "pool"):  # the tower or its pooling layer is not from timm
        return None
    size = max(cfg["size"]) if isinstance(cfg["size"], tuple | list) else cfg["size"]
    preprocess = PreprocessConfig(
        size=size,
        resize="squash" if cfg["resize_mode"] == "squash" else "shortest",
        crop_pct=1.0,
        interpolation="bilinear" if cfg["interpolation"] == "bilinear" else "bicubic",
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
    )
    # `VisionTower.from_config` cannot rebuild this tower, because the architecture is a class name.
    config = {"library": "timm", "architecture": type(trunk).__name__, "args": {"img_size": size}}
    tower = VisionTower(trunk, config | {"preprocess": preprocess.to_dict()}).to(device).eval()
    return _try_build_dense_encoder(tower, visual.head)


def _build_clip_dual_encoder(
    name: str,
    text_encoder: ClipTextEncoder,
    transform: Callable[[Tensor], Any],
    encode_images: Callable[[list[Any]], Tensor],
    dense: DenseEncoder | None = None,
) -> DualEncoder:
    def get_logit_scale() -> float | None:
        logarithm = getattr(text_encoder.model, "logit_scale", None)
        return float(logarithm.detach().exp()) if isinstance(logarithm, Tensor) else None

    return DualEncoder(
        name=name,
        embed_dim=text_encoder.embed_dim,
        identity=lambda: {"name": name, "weights": hash_weights(text_encoder.model)},
        transform=transform,
        encode_images_raw=encode_images,
        encode_texts_raw=lambda texts, progress: text_encoder.encode(texts, progress=progress),
        count_truncated_texts=text_encoder.count_truncated_texts,
        dense=dense,
        logit_scale=get_logit_scale,
    )


@hide_loading_progress_bars()
def _load_sentence_transformer(name: str, device: torch.device, trust_remote_code: bool) -> DualEncoder:
    from sentence_transformers import SentenceTransformer

    path = name.removeprefix(SENTENCE_TRANSFORMERS_PREFIX)
    # sentence-transformers looks for models without an owner in its own hub organisation.
    check_model_source(path if "/" in path or Path(path).exists() else f"sentence-transformers/{path}")
    with explain_remote_code_error(name):
        model: Any = SentenceTransformer(
            path,
            device=str(device),
            trust_remote_code=trust_remote_code,
            model_kwargs={} if trust_remote_code else dict(WITHOUT_HUB_CODE),
        )
    if not {"image", "text"} <= set(model.modalities):
        raise ValueError(
            f"{name}: the sentence-transformers model must encode images and texts (supported modalities: "
            f"{', '.join(map(str, model.modalities))}). If transformers can load the model, omit the prefix "
            f"{SENTENCE_TRANSFORMERS_PREFIX}"
        )

    def encode(inputs: Sequence[Any], progress: bool = False) -> Tensor:
        embeddings: Tensor = model.encode(list(inputs), convert_to_tensor=True, show_progress_bar=progress)
        return embeddings

    return DualEncoder(
        name=name,
        embed_dim=encode(["a"]).shape[-1],
        identity=lambda: {"name": name, "weights": hash_weights(model)},
        transform=to_pil_image,
        encode_images_raw=encode,
        encode_texts_raw=encode,
    )
