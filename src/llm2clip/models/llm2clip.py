"""LLM2CLIP model: vision tower and caption encoder with a shared embedding space."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.data.image_facts import load_training_image_hashes, save_training_image_hashes
from llm2clip.data.images import load_image, to_image_list
from llm2clip.data.transforms import EvalTransform
from llm2clip.io_utils import atomic_dir, check_texts_not_empty, describe_error
from llm2clip.models.loading import fingerprint, read_safetensors
from llm2clip.models.model_folder import (
    FORMAT_VERSION,
    LLM2CLIPConfig,
    find_model_folder,
    is_model_folder,
    read_model_config,
)
from llm2clip.models.modeling_llm2clip import Adapter
from llm2clip.models.precision import Precision, Stage, calibrate_precision, resolve_precision
from llm2clip.models.prompts import (
    average_prompt_embeddings,
    build_query_prompts,
    check_prompt_templates,
    fill_prompt_templates,
)
from llm2clip.models.text.caption_encoder import CaptionEncoder
from llm2clip.models.text.sentence_transformer import append_truncation_layer
from llm2clip.models.vision.segmentation import DenseFeaturesMixin
from llm2clip.models.vision.vision_tower import VisionTower

MAX_LOGIT_SCALE = 100.0  # maximum of exp(logit_scale) during training
# Initial standard deviation of the weights of an image projection with a bias, as in the LLM2CLIP authors' code.
# eva_vit_model.py multiplies a standard deviation of 0.02 by an init_scale of 0.001.
SMALL_PROJECTION_STD = 2e-5


class LLM2CLIP(DenseFeaturesMixin, nn.Module):
    """LLM2CLIP model, which encodes images and texts in a shared embedding space.

    The image encoder is a vision tower and a projection. The text encoder is a caption encoder and an adapter.
    The caption encoder is frozen, and its weights are not parameters of this module. `encode_text` runs the caption
    encoder, but training reads caption embeddings from an embedding store.

    Attributes:
        projection: Linear layer from feature_dim to embed_dim, or the identity if `config.projection` is False.
        logit_scale: Parameter of shape (1,), the logarithm of the factor applied to cosine similarities.
        logit_bias: Parameter of shape (1,), added to the logits, or None if the model has no logit bias.
        text_folder: Folder of the saved caption encoder, or None if the model folder contains no caption encoder.
        training_images: Sorted hashes of the training images, uint64 of shape (N,), or None if unknown. The hashes are
            saved with the model.
    """

    def __init__(self, config: LLM2CLIPConfig, tower: VisionTower, encoder: CaptionEncoder | None = None) -> None:
        super().__init__()
        self.config = config
        self.tower = tower
        self.projection: nn.Module = nn.Identity()
        if config.projection:
            self.projection = build_image_projection(tower.feature_dim, config.embed_dim, config.projection_bias)
        elif config.embed_dim != tower.feature_dim:
            raise ValueError(
                f"without an image projection, embed_dim ({config.embed_dim}) must equal the vision tower's feature "
                f"dimension ({tower.feature_dim})"
            )
        if any(not 0 < dim < config.embed_dim for dim in config.matryoshka_dims):
            raise ValueError(
                f"--align.matryoshka_dims must be at least 1 and less than {config.embed_dim}, the dimension of the "
                f"shared embedding space (got {config.matryoshka_dims})"
            )
        self.adapter = Adapter(config.text_dim, config.embed_dim, **dataclasses.asdict(config.adapter))
        # The logit scale and the logit bias are one-dimensional because FSDP cannot shard scalars.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(10 if config.logit_bias else 1 / 0.07)]))
        self.logit_bias = nn.Parameter(torch.tensor([-10.0])) if config.logit_bias else None
        # The encoder is wrapped in a list so that PyTorch does not register the encoder as a submodule.
        self._encoder = [encoder] if encoder is not None else []
        self.text_folder: Path | None = None
        self.training_images: np.ndarray | None = None

    def forward(
        self,
        pixels: Tensor | None = None,
        embeddings: Tensor | None = None,
        features: Tensor | None = None,
        return_features: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Embed images, texts, or both.

        Args:
            pixels: Images of shape (N, 3, S, S), uint8, where S is the tower's image size.
            embeddings: Unnormalised caption embeddings of shape (M, text_dim).
            features: Vision tower features of shape (N, feature_dim), used instead of `pixels`.
            return_features: Also return the vision tower features as a fifth item.

        Returns:
            (image embeddings, text embeddings, logit scale, logit bias). The L2-normalised float32 embeddings have
            shape (N, embed_dim) for images and (M, embed_dim) for texts, or are None if the input is missing.

            The logits are logit scale * cosine similarity + logit bias. The logit scale is clamped to 100 only in
            training mode, because some official checkpoints have a larger logit scale.
        """
        if pixels is not None:
            features = self.tower(pixels)
        image = F.normalize(self.projection(features).float(), dim=-1) if features is not None else None
        text = F.normalize(self.adapter(embeddings).float(), dim=-1) if embeddings is not None else None
        scale = self.logit_scale.float().exp()[0]
        if self.training:
            scale = scale.clamp(max=MAX_LOGIT_SCALE)
        bias = scale.new_zeros(()) if self.logit_bias is None else self.logit_bias.float()[0]
        return (image, text, scale, bias, features) if return_features else (image, text, scale, bias)

    @torch.no_grad()
    def set_logits(self, scale: float, bias: float | None = None) -> None:
        """Set the logit scale (clamped to 100) and, if the model has one, the logit bias."""
        self.logit_scale.fill_(math.log(scale))
        self.clamp_logit_scale()
        if bias is not None and self.logit_bias is not None:
            self.logit_bias.fill_(bias)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp the logit scale to at most 100 after an optimizer step, because its gradient is zero above 100."""
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE) - 1e-6)

    @property
    def device(self) -> torch.device:
        return self.logit_scale.device

    @property
    def has_encoder(self) -> bool:
        return bool(self._encoder) or self.text_folder is not None

    @property
    def encoder(self) -> CaptionEncoder:
        """Caption encoder. On first use, it is loaded with fp32 weights, unless `load_encoder` was called earlier.

        Raise ValueError if the model has no caption encoder, or if the encoder's embedding dimension is not `text_dim`.
        """
        if not self._encoder:
            self._encoder.append(self._load_saved_encoder(self.device))
        return self._encoder[0]

    def load_encoder(self, precision: str = "auto", stage: Stage = "serve") -> Precision:
        """Load the caption encoder, and cast its weights for encoding in `precision`. Return the resolved precision.

        The weights of a caption encoder that is already loaded do not change. `auto` selects a precision for the stage
        (see `models/precision.py`). It skips calibration if the model was trained on bf16 embeddings, and uses their
        precision.
        """
        encoder = self._encoder[0] if self._encoder else self._load_saved_encoder("cpu")
        resolved = resolve_precision(stage, precision, self.device, lambda: self._get_calibrated_precision(encoder))
        if not self._encoder:
            encoder.move_for_encoding(self.device, resolved)
            self._encoder.append(encoder)
        return resolved

    def _get_calibrated_precision(self, encoder: CaptionEncoder) -> str:
        trained_with = str(self.config.encoder.get("precision", ""))
        if not encoder.has_full_precision:
            return encoder.weights_precision
        return trained_with if trained_with.startswith("bf16") else calibrate_precision(encoder, self.device)

    def _load_saved_encoder(self, device: torch.device | str) -> CaptionEncoder:
        if self.text_folder is None:
            raise ValueError(
                "the model has no caption encoder: add the encoder that the model was trained with, using "
                "set_encoder(...) or `llm2clip convert MODEL --text ENCODER --out MODEL`"
            )
        encoder = CaptionEncoder.from_pretrained(self.text_folder, device=device)
        self._check_embedding_dimension(encoder, str(self.text_folder))
        return encoder

    def set_encoder(self, encoder: CaptionEncoder) -> None:
        """Set the caption encoder. Raise ValueError if the adapter was trained with a different encoder."""
        self._check_embedding_dimension(encoder, "the caption encoder")
        trained_with, identity = self.config.encoder, encoder.identity()
        # Users choose the precision for each call, and transformers releases can rename entries of the LLM config.
        # Therefore, neither the precision nor the LLM config is compared.
        names = [name for name in identity if name in trained_with and name not in ("precision", "config")]
        differences = [name for name in names if trained_with[name] != identity[name]]
        if differences:
            raise ValueError(
                f"the adapter was trained with a different caption encoder (mismatch in {', '.join(differences)}): "
                "load the encoder that the adapter was trained with, using the same settings"
            )
        self._encoder[:] = [encoder]
        self.config.encoder = {**identity, **trained_with}

    def _check_embedding_dimension(self, encoder: CaptionEncoder, name: str) -> None:
        if encoder.embed_dim != self.config.text_dim:
            raise ValueError(
                f"the embedding dimension of {name} ({encoder.embed_dim}) must equal the adapter's input dimension "
                f"({self.config.text_dim}): use the caption encoder that the adapter was trained with"
            )

    @torch.no_grad()  # not inference_mode, because users may train a linear probe on the embeddings
    @use_onednn_matmul()
    def encode_image(self, images: Any, batch_size: int = 64) -> Tensor:
        """Encode N images. Return L2-normalised float32 embeddings of shape (N, embed_dim) on the CPU.

        Args:
            images: One image, a list of N images, a tensor of shape (N, 3, H, W) or an array of shape (N, H, W, 3).
                An image is a path, the bytes of an image file, a PIL image, a uint8 NumPy array of shape (H, W, 3) or
                (H, W), or a tensor of shape (3, H, W), either uint8 or float with values from 0 to 1.

        Raises:
            ImageError: An image cannot be decoded.
        """
        items = to_image_list(images)
        transform = EvalTransform(self.tower.preprocess)
        self.eval()
        embeddings = [torch.empty(0, self.config.embed_dim)]
        for start in range(0, len(items), batch_size):
            pixels = torch.stack([transform(load_image(item)) for item in items[start : start + batch_size]])
            image, *_ = self(pixels=pixels.to(self.device))
            embeddings.append(image.cpu())
        return torch.cat(embeddings)

    @torch.no_grad()
    def encode_text(
        self,
        texts: str | Sequence[str],
        progress: bool = False,
        precision: str | None = None,
        templates: str | Sequence[str] | None = None,
    ) -> Tensor:
        """Encode N texts. Return L2-normalised float32 embeddings of shape (N, embed_dim) on the CPU.

        Args:
            precision: Precision of the caption encoder, as in `CaptionEncoder.encode`.
            templates: Prompt templates for class names and other short texts, such as "a photo of a {}". Each text is
                inserted into every template, and the embeddings of the resulting prompts are averaged and normalised.
                To include the text itself, add the template "{}".

        Raises:
            ValueError: A text is empty, a template has no {} placeholder, or the model has no caption encoder.
        """
        captions = [texts] if isinstance(texts, str) else list(texts)
        check_texts_not_empty(captions)
        if templates:
            template_list = [templates] if isinstance(templates, str) else templates
            check_prompt_templates(template_list)
            prompts = fill_prompt_templates(captions, template_list)
            embeddings = self.encode_text(prompts, progress, precision)
            return torch.from_numpy(average_prompt_embeddings(embeddings.numpy(), [len(template_list)] * len(captions)))
        return self.project_text_embeddings(self.encoder.encode(captions, progress=progress, precision=precision))

    def encode_query(
        self, queries: str | Sequence[str], progress: bool = False, precision: str | None = None
    ) -> Tensor:
        """Encode N search queries. Return embeddings in the same format as `encode_text`.

        Short queries are also inserted into `config.query_templates`. The embeddings of the query and the resulting
        prompts are averaged and normalised.
        """
        texts = [queries] if isinstance(queries, str) else list(queries)
        prompts, counts = build_query_prompts(texts, self.config.query_templates)
        return torch.from_numpy(
            average_prompt_embeddings(self.encode_text(prompts, progress, precision).numpy(), counts)
        )

    def encode_document(self, documents: Any, progress: bool = False, precision: str | None = None) -> Tensor:
        """Encode N documents for search. Return embeddings in the same format as `encode_text`.

        Args:
            documents: One document or a list of N documents. A document is a text, an image or a dict with a "text", an
                "image" or both. An image can have any form that `encode_image` accepts, but a string outside a dict is
                always a text. The embeddings of a text and an image are added. An empty "text" is ignored.
        """
        is_single = isinstance(documents, str | bytes | Mapping) or getattr(documents, "ndim", 1) in (2, 3)
        items = list(documents) if isinstance(documents, Iterable) and not is_single else [documents]
        encoders = {"image": self.encode_image, "text": lambda texts: self.encode_text(texts, progress, precision)}
        return encode_documents(items, self.config.embed_dim, encoders)

    @torch.no_grad()
    def project_text_embeddings(self, embeddings: Tensor) -> Tensor:
        """Convert caption embeddings of shape (N, text_dim) to the embeddings that `encode_text` returns."""
        self.adapter.eval()  # self.eval() would take milliseconds, because the vision tower has many modules
        _, text, *_ = self(embeddings=embeddings.to(self.device))
        assert text is not None
        return text.cpu()

    def similarity(self, texts: Tensor, images: Tensor) -> Tensor:
        """Return the cosine similarities of L2-normalised embeddings as a matrix of shape (texts, images)."""
        return texts @ images.T

    def save_pretrained(self, folder: str | Path, encoder: CaptionEncoder | str | Path | None = None) -> Path:
        """Save the model to a folder atomically, without a model card. An existing model folder is replaced.

        Args:
            encoder: Caption encoder to save, or folder of a saved caption encoder. Default: the model's caption
                encoder, if any.

        Raises:
            FileExistsError: `folder` exists and is not a model folder.
        """
        folder = Path(folder)
        if folder.exists() and not is_model_folder(folder):
            raise FileExistsError(f"{folder} exists and is not a model folder: choose another folder")
        if encoder is None:
            # An encoder with bf16 weights cannot be saved, but the folder of the original encoder can be copied.
            is_complete = self._encoder and self._encoder[0].has_full_precision
            encoder = self._encoder[0] if is_complete else self.text_folder
        replaced = folder.with_name(f".{folder.name}.{os.getpid()}.old")
        with atomic_dir(folder) as temporary:
            self._write_config_and_weights(temporary)
            if isinstance(encoder, CaptionEncoder):
                encoder.save_pretrained(temporary / "text")
            elif encoder is not None:
                shutil.copytree(encoder, temporary / "text")
            if folder.exists():
                folder.replace(replaced)
        shutil.rmtree(replaced, ignore_errors=True)
        return folder

    def _write_config_and_weights(self, folder: Path) -> None:
        config = {"model_type": "llm2clip", "format_version": FORMAT_VERSION, **dataclasses.asdict(self.config)}
        config["encoder_fingerprint"] = fingerprint(self.config.encoder)  # only for comparing model folders
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "preprocessor_config.json").write_text(json.dumps(self.tower.preprocess.to_dict(), indent=1))
        if self.training_images is not None:
            save_training_image_hashes(folder, self.training_images)

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device | None = None) -> LLM2CLIP:
        """Load a model and switch it to eval mode. Code in the model folder is never run.

        Args:
            path: Folder, hub id or OWNER/NAME@REVISION. A revision is a branch, a tag or a full commit hash.
            device: Device to load the model on. Default: a GPU if available.

        Raises:
            FileNotFoundError: The model does not exist, cannot be downloaded or is incomplete.
            ValueError: The folder is corrupt, does not contain an llm2clip model, or has a different format version.
        """
        folder = find_model_folder(path)
        file, values = folder / "config.json", read_model_config(folder, path)
        try:
            config = LLM2CLIPConfig.from_dict(values)
            model = cls(config, VisionTower.from_config(config.tower))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        except OSError:
            raise
        except Exception as error:  # timm and transformers can raise any exception for a malformed config
            raise ValueError(f"{file} is not a valid model config ({describe_error(error)})") from error
        # If one of the caption encoder's JSON files were missing, the encoder would load with different settings.
        tokenizer_file = "tokenizer_config.json" if (folder / "text/config.json").is_file() else "tokenizer.json"
        encoder_files = ("modules.json", "config_sentence_transformers.json", tokenizer_file, "*.safetensors")
        for name in ("model.safetensors", *(f"text/{name}" for name in encoder_files if (folder / "text").is_dir())):
            if not any(folder.glob(name)):
                raise FileNotFoundError(f"{path} is not a complete model folder: it has no {name}")
        try:
            model.load_state_dict(read_safetensors(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"{folder}: config.json and model.safetensors do not match ({error})") from error
        model.text_folder = folder / "text" if (folder / "text").is_dir() else None
        model.training_images = load_training_image_hashes(folder)
        return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def encode_documents(
    documents: Sequence[Any], embed_dim: int, encoders: Mapping[str, Callable[[list[Any]], Tensor]]
) -> Tensor:
    """Encode N documents with encoders for the keys "image" and "text" (see `LLM2CLIP.encode_document`)."""
    parts = []
    for row, item in enumerate(documents):
        part = item if isinstance(item, Mapping) else {"text" if isinstance(item, str) else "image": item}
        if isinstance(part.get("text"), str) and not part["text"].strip():
            part = {**part, "text": None}
        if all(part.get(kind) is None for kind in encoders):
            raise ValueError(f"document {row} has neither an image nor a non-empty text (keys: {list(part)})")
        parts.append(part)
    embeddings = torch.zeros(len(parts), embed_dim)
    for kind, encode in encoders.items():
        rows = [row for row, part in enumerate(parts) if part.get(kind) is not None]
        if rows:
            embeddings[rows] += encode([parts[row][kind] for row in rows])
    return F.normalize(embeddings, dim=-1)


def build_image_projection(feature_dim: int, embed_dim: int, bias: bool) -> nn.Linear:
    """Build an image projection with the random initialisation of the LLM2CLIP authors' code."""
    projection = nn.Linear(feature_dim, embed_dim, bias=bias)
    nn.init.normal_(projection.weight, std=SMALL_PROJECTION_STD if bias else feature_dim**-0.5)
    if bias:
        nn.init.zeros_(projection.bias)
    return projection


def needs_projection_bias(tower: dict[str, Any]) -> bool:
    """Return True for EVA towers, whose image projection has a bias in the LLM2CLIP authors' code."""
    architecture = tower["architecture"]  # a name for timm towers, a dict for transformers towers
    return isinstance(architecture, str) and architecture.startswith("eva")


# ---- truncated embeddings -------------------------------------------------------------------------------------------


def truncate_and_normalize(embeddings: Tensor, dim: int) -> Tensor:
    return F.normalize(embeddings[..., :dim], dim=-1)


def check_truncate_dim(dim: int, embed_dim: int, name: str) -> None:
    if not 1 <= dim <= embed_dim:
        raise ValueError(
            f"the embeddings of {name} have {embed_dim} dimensions, so they cannot be truncated to {dim} "
            f"dimensions. Choose a number from 1 to {embed_dim}"
        )


@torch.no_grad()
def rotate_to_principal_components(model: LLM2CLIP, captions: Tensor) -> None:
    """Rotate a model's embedding space in place so that the first dimensions have the largest variance across captions.

    Cosine similarities do not change, because the same rotation is applied to the last linear layers of both towers.
    The rows of the rotation are the uncentred principal components of the text embeddings, in descending order of
    eigenvalue. `captions` are unnormalised caption embeddings of shape (N, text_dim), float32.
    """
    if not isinstance(model.projection, nn.Linear) or model.config.adapter.depth == 0:
        raise ValueError("the embedding space can be rotated only if the model has an image projection and an adapter")
    texts = model.project_text_embeddings(captions).double()  # (N, D)
    eigenvectors = torch.linalg.eigh(texts.T @ texts).eigenvectors  # as columns, in ascending order of eigenvalue
    rotation = eigenvectors.flip(1).T  # (D, D)
    _rotate_layer_outputs(model.projection, rotation)
    _rotate_layer_outputs(model.adapter.out, rotation)


@torch.no_grad()
def truncate_model(model: LLM2CLIP, dim: int) -> LLM2CLIP:
    """Return a copy of a model that computes only the first `dim` dimensions of its embeddings.

    The weights of the last linear layer of each tower are truncated to the first `dim` rows. Without an image
    projection, a projection to the first `dim` features is added. Without an adapter, the caption encoder is truncated.
    """
    check_truncate_dim(dim, model.config.embed_dim, "the model")
    if dim == model.config.embed_dim:
        return model
    config = dataclasses.replace(model.config, embed_dim=dim, projection=True)
    config.matryoshka_dims = [size for size in config.matryoshka_dims if size < dim]
    if config.adapter.depth == 0:
        if not model.has_encoder:
            raise ValueError("truncating a model without an adapter requires the model's caption encoder: pass --text")
        encoder = copy.deepcopy(model.encoder)
        append_truncation_layer(encoder.st, dim)
        config.text_dim, config.encoder = dim, encoder.identity()
    truncated = copy.deepcopy(model)
    truncated.config = config
    if isinstance(truncated.projection, nn.Linear):
        _truncate_layer_outputs(truncated.projection, dim)
    else:
        features = model.tower.feature_dim
        truncated.projection = nn.Linear(features, dim, bias=False, device=model.device)
        truncated.projection.weight.copy_(torch.eye(dim, features))
    if config.adapter.depth == 0:
        truncated._encoder[:] = [encoder]
    else:
        _truncate_layer_outputs(truncated.adapter.out, dim)
    return truncated


def _rotate_layer_outputs(layer: nn.Linear, rotation: Tensor) -> None:
    layer.weight.copy_(rotation @ layer.weight.cpu().double())  # on the CPU, because Apple GPUs do not support float64
    if layer.bias is not None:
        layer.bias.copy_(rotation @ layer.bias.cpu().double())


def _truncate_layer_outputs(layer: nn.Linear, dim: int) -> None:
    layer.out_features = dim
    layer.weight = nn.Parameter(layer.weight[:dim].clone())
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias[:dim].clone())
