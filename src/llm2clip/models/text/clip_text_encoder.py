"""Text towers of CLIP models, used as baselines for a caption encoder.

Supported models are transformers models of the types in `_TEXT_PREPROCESSING`, models that come with their own code
(such as Jina-CLIP) and, if open_clip is installed, open_clip models. Texts longer than the context length are
truncated, as is usual for these models.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.io_utils import install_command
from llm2clip.models.hub.loading import check_model_source, hide_loading_bars, load_config, requires_remote_code
from llm2clip.progress import ProgressBar

OPEN_CLIP_PREFIX = "open_clip:"


@dataclass(frozen=True)
class _TextPreprocessing:
    """Text preprocessing that a model type requires.

    Attributes:
        context_length: maximum text length in training, in tokens. If None, the number of position embeddings.
        fully_padded: True if training texts were padded to the context length and no attention mask was used.
        lower_case: True if training texts were lower-cased.
    """

    context_length: int | None = None
    fully_padded: bool = False
    lower_case: bool = False


_TEXT_PREPROCESSING = {
    "clip": _TextPreprocessing(),
    # On padding, see the transformers documentation for SigLIP and SigLIP 2 ("make sure to set padding='max_length'").
    # Both models were trained on lower-case texts (arXiv 2502.14786 for SigLIP 2). SigLIP's tokenizer lower-cases texts
    # (https://github.com/huggingface/transformers/pull/43101), but the Gemma tokenizer in SigLIP 2 checkpoints does
    # not.
    "siglip": _TextPreprocessing(fully_padded=True, lower_case=True),
    "siglip2": _TextPreprocessing(fully_padded=True, lower_case=True),
    # Default of `cn_clip.clip.tokenize` (https://github.com/OFA-Sys/Chinese-CLIP). The BERT tower has 512 positions.
    "chinese_clip": _TextPreprocessing(context_length=52),
    # `max_length` in transformers' AlignProcessor. The BERT tower has 512 positions.
    "align": _TextPreprocessing(context_length=64),
    # Value in the authors' code (https://github.com/FlagAI-Open/FlagAI). The XLM-R tower has 512 positions.
    "altclip": _TextPreprocessing(context_length=77),
    "metaclip_2": _TextPreprocessing(),
}
# Maps each unsupported model type that has text features to the reason why it is not supported.
_UNSUPPORTED_TYPES = {
    # As of version 5.24, transformers applies the causal mask only if the batch contains padding.
    "aimv2": "in transformers, its text embeddings depend on padding",
    "blip": "its checkpoints compare images and texts with cross-attention; use another model",
    "blip_2": "it embeds each image as 32 vectors instead of one",
    "flava": "it returns image features for each patch, not for the whole image",
    **dict.fromkeys(("clap", "clvp"), "it encodes audio, not images"),
    **dict.fromkeys(("pe_video", "videoprism", "x_clip"), "it encodes videos, not images"),
    **dict.fromkeys(("owlv2", "owlvit"), "it is a detection model; use the CLIP model it is based on"),
    **dict.fromkeys(("sam3", "sam3_lite_text"), "it is a segmentation model"),
    "clipseg": "it is a segmentation model; use the CLIP model it is based on",
}


@dataclass
class ClipTextEncoder:
    """Text tower of a CLIP model.

    Attributes:
        model: complete CLIP model, with both towers.
        context_length: maximum text length in tokens, or None if it is defined only in the model's own code.
        tokenize: function that converts N texts to a dict of model inputs, truncated to the context length.
        forward: function that takes the output of `tokenize` as keyword arguments and returns embeddings of shape
            (N, embed_dim).
        count_tokens: function that counts a text's tokens before truncation, or None if this is not possible.
    """

    model: Any
    context_length: int | None
    tokenize: Callable[[list[str]], dict[str, Any]]
    forward: Callable[..., Tensor]
    count_tokens: Callable[[str], int] | None
    embed_dim: int = field(init=False)

    def __post_init__(self) -> None:
        """Determine the embedding dimension by encoding a text."""
        with torch.inference_mode():
            self.embed_dim = self._encode_batch(["a"]).shape[-1]

    @torch.inference_mode()
    @onednn_matmul()
    def encode(self, captions: Sequence[str], *, progress: bool = False, batch_size: int = 64) -> Tensor:
        """Encode N texts. Return a float32 CPU tensor of shape (N, embed_dim), with one unnormalised row per text."""
        order = sorted(range(len(captions)), key=lambda i: -len(captions[i]))
        embeddings = torch.empty(len(captions), self.embed_dim)
        for start in ProgressBar(range(0, len(order), batch_size), desc="encode", unit="batch", disable=not progress):
            rows = order[start : start + batch_size]
            embeddings[rows] = self._encode_batch([captions[i] for i in rows]).float().cpu()
        return embeddings

    def _encode_batch(self, texts: list[str]) -> Tensor:
        """Encode a batch of texts on the model's current device, since `model` may have been moved after loading."""
        batch = self.tokenize(texts)
        device = next(self.model.parameters()).device
        return self.forward(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})

    def count_truncated(self, captions: Sequence[str]) -> int | None:
        """Return the number of texts that exceed the context length, or None if it cannot be determined."""
        if self.count_tokens is None or self.context_length is None:
            return None
        return sum(self.count_tokens(caption) > self.context_length for caption in captions)


def has_text_tower(path: str, trust_remote_code: bool = False) -> bool:
    """Return True if `path` names an open_clip model or a transformers model with image and text towers.

    For the arguments, see `load_clip_text_encoder`.

    Raises:
        ValueError: the model comes with its own code, and `trust_remote_code` is False.
    """
    from transformers import MODEL_MAPPING, PreTrainedConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    if path.startswith(OPEN_CLIP_PREFIX):
        return True
    check_model_source(path)
    if requires_remote_code(path, trust_remote_code):
        raw_config, _ = PreTrainedConfig.get_config_dict(path)
        model_class = get_class_from_dynamic_module(raw_config["auto_map"]["AutoModel"], path)
        return hasattr(model_class, "get_text_features") or hasattr(model_class, "encode_text")
    try:
        config = load_config(path)
    except (OSError, ValueError):  # not a transformers model; the loading function will report the error
        return False
    return type(config) in MODEL_MAPPING and hasattr(MODEL_MAPPING[type(config)], "get_text_features")


def load_clip_text_encoder(
    path: str, device: torch.device | None = None, trust_remote_code: bool = False
) -> ClipTextEncoder:
    """Load the text tower of a CLIP model.

    Args:
        path: for transformers, a folder or hub id. For open_clip, `open_clip:NAME/PRETRAINED`, `open_clip:FOLDER`
            (folder saved by open_clip) or `open_clip:hf-hub:ID`.
        device: device to load the model on. Default: a GPU if available.
        trust_remote_code: if True, allow Python code that comes with the model to run.

    Raises:
        ValueError: the model's type is not supported, the model comes with its own code and `trust_remote_code` is
            False, or `path` names an open_clip architecture without weights.
        ImportError: open_clip is required but not installed.
        OSError: the model does not exist.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.startswith(OPEN_CLIP_PREFIX):
        return _load_open_clip(path.removeprefix(OPEN_CLIP_PREFIX), device)
    check_model_source(path)
    return _load_transformers(path, device, requires_remote_code(path, trust_remote_code))


@hide_loading_bars()
def _load_transformers(path: str, device: torch.device, remote_code: bool) -> ClipTextEncoder:
    """Load a model with transformers' classes or, if `remote_code` is True, with the model's own code.

    If the model has an `encode_text` method, as Jina-CLIP does, that method tokenizes and truncates the texts.
    Otherwise, the model must have a `get_text_features` method, and its tokenizer must specify the context length.
    """
    from transformers import AutoModel, AutoTokenizer

    config = None if remote_code else load_config(path)
    preprocessing = _TextPreprocessing() if config is None else _get_text_preprocessing(path, config.model_type)
    model: Any = AutoModel.from_pretrained(path, config=config, trust_remote_code=remote_code, dtype=torch.float32)
    model = model.to(device).eval()
    if remote_code and hasattr(model, "encode_text"):
        return ClipTextEncoder(
            model=model,
            context_length=None,
            tokenize=lambda texts: {"texts": texts},
            forward=lambda texts: torch.as_tensor(model.encode_text(texts)),
            count_tokens=None,
        )
    if not hasattr(model, "get_text_features"):
        raise ValueError(f"{path} has neither encode_text nor get_text_features, so it is not an image-text model")
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code)
    context_length = tokenizer.model_max_length
    if not remote_code:
        positions = model.config.text_config.max_position_embeddings
        context_length = min(preprocessing.context_length or positions, positions, context_length)
    # SigLIP's own tokenizer already lower-cases texts, except for special tokens.
    lower_case = preprocessing.lower_case and type(tokenizer).__name__ != "SiglipTokenizer"

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        if lower_case:
            texts = [text.lower() for text in texts]
        padding = "max_length" if preprocessing.fully_padded else True
        batch = tokenizer(texts, padding=padding, truncation=True, max_length=context_length, return_tensors="pt")
        names = ("input_ids",) if preprocessing.fully_padded else ("input_ids", "attention_mask")
        return {name: batch[name] for name in names}

    return ClipTextEncoder(
        model=model,
        context_length=context_length,
        tokenize=tokenize,
        forward=lambda **batch: get_pooled_output(model.get_text_features(**batch)),
        count_tokens=lambda text: len(tokenizer(text, verbose=False)["input_ids"]),
    )


def _get_text_preprocessing(path: str, model_type: str) -> _TextPreprocessing:
    """Return the text preprocessing for a transformers model type. Raise ValueError if the type is not supported."""
    if model_type in _TEXT_PREPROCESSING:
        return _TEXT_PREPROCESSING[model_type]
    reason = _UNSUPPORTED_TYPES.get(model_type, "its prompt, context length and padding are unknown to llm2clip")
    raise ValueError(
        f"{path} is a {model_type!r} model, which is not supported: {reason}. Supported types: "
        f"{', '.join(_TEXT_PREPROCESSING)}. To compare with any other model, save its embeddings in an .npz file"
    )


def get_pooled_output(features: Any) -> Tensor:
    """Extract the embeddings from the output of `get_text_features` or `get_image_features`."""
    embeddings: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return embeddings


def _load_open_clip(name: str, device: torch.device) -> ClipTextEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{OPEN_CLIP_PREFIX}{name} requires open_clip: {install_command('open-clip')}") from error

    if Path(name).is_dir():
        architecture, pretrained = f"local-dir:{name}", ""
    elif name.startswith("hf-hub:"):
        architecture, pretrained = name, ""
    else:
        architecture, _, pretrained = name.partition("/")
        if not pretrained:
            raise ValueError(
                f"{OPEN_CLIP_PREFIX}{name} does not specify weights: use {OPEN_CLIP_PREFIX}{name}/PRETRAINED"
            )
    model: Any = open_clip.create_model(architecture, pretrained=pretrained or None, device=device).eval()
    tokenizer: Any = open_clip.get_tokenizer(architecture)
    hf_tokenizer = getattr(tokenizer, "tokenizer", None)  # some models use a Hugging Face tokenizer

    def count_tokens(text: str) -> int:
        if hf_tokenizer is not None:
            return len(hf_tokenizer(text)["input_ids"])
        return len(tokenizer.encode(text)) + 2  # including the start and end tokens

    return ClipTextEncoder(
        model=model,
        context_length=tokenizer.context_length,
        tokenize=lambda texts: {"text": tokenizer(texts)},
        forward=model.encode_text,
        count_tokens=count_tokens,
    )
