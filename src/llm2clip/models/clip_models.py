"""Text towers, logit scales and embedding spaces of CLIP models from transformers and open_clip.

CLIP text towers serve as baselines for caption encoders. Texts longer than the context length are truncated.

An LLM2CLIP model can inherit the logit scale, the logit bias and the embedding space of the CLIP model that its vision
tower comes from. The LLM2CLIP authors' code also starts training with the pretrained logit scale.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from llm2clip.cpu_tuning import use_onednn_matmul
from llm2clip.io_utils import require_extra
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.loading import (
    check_model_source,
    find_model_file,
    hide_loading_progress_bars,
    load_transformers_config,
    requires_remote_code,
)
from llm2clip.models.model_folder import LLM2CLIPConfig
from llm2clip.models.official_layout import read_weight_map
from llm2clip.models.pretrained import resolve_pretrained_name
from llm2clip.models.vision.vision_tower import VisionTower
from llm2clip.progress import ProgressBar

OPEN_CLIP_PREFIX = "open_clip:"


@dataclass(frozen=True)
class _TextPreprocessing:
    context_length: int | None = None  # in tokens; None means the number of position embeddings
    fully_padded: bool = False  # trained on texts padded to the context length, without an attention mask
    lower_case: bool = False


_TEXT_PREPROCESSING = {
    "clip": _TextPreprocessing(),
    # The transformers documentation for SigLIP and SigLIP 2 requires padding='max_length'.
    # SigLIP and SigLIP 2 were trained on lower-case texts (arXiv 2502.14786). SigLIP 2 checkpoints use the Gemma
    # tokenizer, which preserves case (https://github.com/huggingface/transformers/pull/43101).
    "siglip": _TextPreprocessing(fully_padded=True, lower_case=True),
    "siglip2": _TextPreprocessing(fully_padded=True, lower_case=True),
    # Default of `cn_clip.clip.tokenize` (https://github.com/OFA-Sys/Chinese-CLIP). The BERT tower allows 512 tokens.
    "chinese_clip": _TextPreprocessing(context_length=52),
    # Default `max_length` of transformers' AlignProcessor. The BERT tower allows 512 tokens.
    "align": _TextPreprocessing(context_length=64),
    # Context length in the AltCLIP code (https://github.com/FlagAI-Open/FlagAI). The XLM-R tower allows 512 tokens.
    "altclip": _TextPreprocessing(context_length=77),
    "metaclip_2": _TextPreprocessing(),
}


@dataclass
class ClipTextEncoder:
    """Text tower of a CLIP model.

    Attributes:
        model: CLIP model with image and text towers.
        context_length: Maximum text length in tokens, or None if it is defined only in the model's own code.
        tokenize: Function that tokenizes and truncates N texts, and returns keyword arguments for `forward`.
        forward: Function that returns embeddings of shape (N, embed_dim).
        count_tokens: Function that counts the tokens in a text before truncation, or None if unavailable.
    """

    model: Any
    context_length: int | None
    tokenize: Callable[[list[str]], dict[str, Any]]
    forward: Callable[..., Tensor]
    count_tokens: Callable[[str], int] | None
    embed_dim: int = field(init=False)

    def __post_init__(self) -> None:
        with torch.inference_mode():
            self.embed_dim = self._encode_batch(["a"]).shape[-1]

    @torch.inference_mode()
    @use_onednn_matmul()
    def encode(self, captions: Sequence[str], *, progress: bool = False, batch_size: int = 64) -> Tensor:
        """Encode N texts. Return unnormalised embeddings of shape (N, embed_dim), float32, on the CPU."""
        order = sorted(range(len(captions)), key=lambda i: -len(captions[i]))
        embeddings = torch.empty(len(captions), self.embed_dim)
        for start in ProgressBar(range(0, len(order), batch_size), desc="encode", unit="batch", disable=not progress):
            rows = order[start : start + batch_size]
            embeddings[rows] = self._encode_batch([captions[i] for i in rows]).float().cpu()
        return embeddings

    def _encode_batch(self, texts: list[str]) -> Tensor:
        batch = self.tokenize(texts)
        device = next(self.model.parameters()).device  # the caller may have moved the model to another device
        return self.forward(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})

    def count_truncated_texts(self, captions: Sequence[str]) -> int | None:
        if self.count_tokens is None or self.context_length is None:
            return None
        return sum(self.count_tokens(caption) > self.context_length for caption in captions)


def has_text_tower(path: str, trust_remote_code: bool = False) -> bool:
    """Return True if `path` names an open_clip model or a transformers model with image and text towers."""
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
        config = load_transformers_config(path)
    except (OSError, ValueError):  # loading the model will raise a more specific error
        return False
    return type(config) in MODEL_MAPPING and hasattr(MODEL_MAPPING[type(config)], "get_text_features")


def load_clip_text_encoder(
    path: str, device: torch.device | None = None, trust_remote_code: bool = False
) -> ClipTextEncoder:
    """Load the text tower of a CLIP model.

    Args:
        path: Folder or hub id of a transformers model, or `open_clip:NAME/PRETRAINED`, `open_clip:hf-hub:ID` or
            `open_clip:FOLDER` for an open_clip model.
        device: Device to load the model on. Default: a GPU if available.

    Raises:
        ValueError: The model type is not supported, or the model requires its own code and `trust_remote_code` is
            False.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.startswith(OPEN_CLIP_PREFIX):
        return _load_open_clip_text_encoder(path.removeprefix(OPEN_CLIP_PREFIX), device)
    check_model_source(path)
    return _load_transformers_text_encoder(path, device, requires_remote_code(path, trust_remote_code))


@hide_loading_progress_bars()
def _load_transformers_text_encoder(path: str, device: torch.device, remote_code: bool) -> ClipTextEncoder:
    from transformers import AutoModel, AutoTokenizer

    config, preprocessing = None, _TextPreprocessing()
    if not remote_code:
        config = load_transformers_config(path)
        if config.model_type not in _TEXT_PREPROCESSING:
            raise ValueError(
                f"{path} has the unsupported model type {config.model_type!r}. Supported model types: "
                f"{', '.join(_TEXT_PREPROCESSING)}. To evaluate any other model, save its embeddings in an .npz file"
            )
        preprocessing = _TEXT_PREPROCESSING[config.model_type]
    model: Any = AutoModel.from_pretrained(path, config=config, trust_remote_code=remote_code, dtype=torch.float32)
    model = model.to(device).eval()
    if remote_code and hasattr(model, "encode_text"):  # Jina-CLIP's `encode_text` also tokenizes texts
        return ClipTextEncoder(
            model=model,
            context_length=None,
            tokenize=lambda texts: {"texts": texts},
            forward=lambda texts: torch.as_tensor(model.encode_text(texts)),
            count_tokens=None,
        )
    if not hasattr(model, "get_text_features"):
        raise ValueError(f"{path} is not an image-text model: it has neither encode_text nor get_text_features")
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=remote_code)
    context_length = tokenizer.model_max_length
    if not remote_code:
        positions = model.config.text_config.max_position_embeddings
        context_length = min(preprocessing.context_length or positions, positions, context_length)
    # SigLIP's tokenizer already lower-cases texts, except for special tokens.
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


def get_pooled_output(features: Any) -> Tensor:
    embeddings: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return embeddings


def _load_open_clip_text_encoder(name: str, device: torch.device) -> ClipTextEncoder:
    require_extra("open-clip", f"{OPEN_CLIP_PREFIX}{name}")
    import open_clip

    if Path(name).is_dir():
        architecture, pretrained = f"local-dir:{name}", ""
    elif name.startswith("hf-hub:"):
        architecture, pretrained = name, ""
    else:
        architecture, _, pretrained = name.partition("/")
        if not pretrained:
            path = f"{OPEN_CLIP_PREFIX}{name}"
            raise ValueError(f"{path} does not specify pretrained weights. Use the form {path}/PRETRAINED")
    model: Any = open_clip.create_model(architecture, pretrained=pretrained or None, device=device).eval()
    tokenizer: Any = open_clip.get_tokenizer(architecture)
    hf_tokenizer = getattr(tokenizer, "tokenizer", None)  # only some open_clip models use a Hugging Face tokenizer

    def count_tokens(text: str) -> int:
        if hf_tokenizer is not None:
            return len(hf_tokenizer(text)["input_ids"])
        return len(tokenizer.encode(text)) + 2  # includes the start and end tokens

    return ClipTextEncoder(
        model=model,
        context_length=tokenizer.context_length,
        tokenize=lambda texts: {"text": tokenizer(texts)},
        forward=model.encode_text,
        count_tokens=count_tokens,
    )


# Weight files that may contain the logit scale. In timm's hub repositories, only the open_clip weights contain it.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
MIN_SIMILARITY = 0.99  # minimum cosine similarity between two implementations of the same image tower


def read_pretrained_logit_scale_and_bias(tower: str) -> tuple[float, float | None]:
    """Read the logit scale and the logit bias of the CLIP model that a vision tower comes from.

    `tower` is a name that `VisionTower.from_pretrained` accepts. Return (logit scale, logit bias). The logit scale is a
    factor, not a logarithm. The logit bias can be None. Raise ValueError if the checkpoint contains no logit scale.
    """
    source = find_hub_id_or_folder(resolve_pretrained_name(tower))
    for name in _WEIGHT_FILES:
        file = find_model_file(source, name)
        tensors = _read_named_tensors(file, ("logit_scale", "logit_bias")) if file is not None else {}
        if "logit_scale" in tensors:
            bias = tensors.get("logit_bias")
            return tensors["logit_scale"].double().exp().item(), None if bias is None else bias.item()
    raise ValueError(
        f"--align.logit_scale inherit: the checkpoint of {tower} contains no logit scale. Set --align.logit_scale to a "
        "number, such as 100, which is the final logit scale of most CLIP models"
    )


def _read_named_tensors(file: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    if file.name.endswith(".index.json"):
        shard_of = read_weight_map(file)
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in shard_of:
                shard = find_model_file(str(file.parent), Path(shard_of[name]).name)
                if shard is not None:
                    tensors |= _read_named_tensors(shard, (name,))
        return tensors
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as weights:
            return {name: weights.get_tensor(name) for name in names if name in weights.keys()}  # noqa: SIM118
    state_dict = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return {name: state_dict[name] for name in names if name in state_dict}


def load_clip_to_inherit(tower: str, inherit: bool | str, device: torch.device) -> ClipTextEncoder:
    """Load the CLIP model whose embedding space an LLM2CLIP model inherits.

    `inherit` is the name of a CLIP model, as in `load_clip_text_encoder`, or True for the CLIP model that the vision
    tower comes from. Raise ValueError if the CLIP model's checkpoint has no text tower.
    """
    if isinstance(inherit, str):
        return load_clip_text_encoder(inherit, device)
    source = find_hub_id_or_folder(resolve_pretrained_name(tower))
    if has_text_tower(source):
        return load_clip_text_encoder(source, device)
    # The hub repositories of timm towers also contain the open_clip model, which includes a text tower.
    if (config := find_model_file(source, "open_clip_config.json")) is not None:
        is_folder = str(config.parent) == source
        return load_clip_text_encoder(f"{OPEN_CLIP_PREFIX}{'' if is_folder else 'hf-hub:'}{source}", device)
    raise ValueError(
        f"--align.inherit true: the checkpoint of {tower} has no text tower. Pass the CLIP model that the tower comes "
        "from (--align.inherit NAME or --align.inherit open_clip:NAME/PRETRAINED), or omit --align.inherit"
    )


def get_image_projection(clip: Any) -> nn.Linear | None:
    """Return the image projection of a transformers or open_clip model, or None if it has none, as in SigLIP.

    Raise ValueError if the projection is not a linear layer.
    """
    if hasattr(clip, "get_image_features"):  # transformers
        return getattr(clip, "visual_projection", None)
    visual = clip.visual
    if isinstance(weight := getattr(visual, "proj", None), Tensor):  # open_clip's ViT; shape (feature_dim, embed_dim)
        feature_dim, embed_dim = weight.shape
        projection = nn.Linear(feature_dim, embed_dim, bias=False)
        projection.weight = nn.Parameter(weight.detach().T.contiguous())
        return projection
    if (trunk := getattr(visual, "trunk", None)) is not None:  # timm tower: the projection is in the trunk or head
        head = [module for module in visual.head if not isinstance(module, nn.Dropout)]
        layers = [layer for layer in (trunk.get_classifier(), *head) if not isinstance(layer, nn.Identity)]
        if not layers:
            return None
        if len(layers) == 1 and isinstance(layers[0], nn.Linear):
            return layers[0]
    raise ValueError(
        "--align.inherit: the image projection of this CLIP model is not a linear layer. Omit --align.inherit"
    )


def build_model_in_clip_space(config: LLM2CLIPConfig, tower: VisionTower, clip: ClipTextEncoder) -> LLM2CLIP:
    """Build a model that returns a CLIP model's image embeddings and has a randomly initialised text adapter.

    The CLIP model determines the device and the config's `embed_dim`, `projection` and `projection_bias`. Raise
    ValueError if `tower` is not the vision tower of the CLIP model.
    """
    projection = get_image_projection(clip.model)
    feature_dim = clip.embed_dim if projection is None else projection.in_features
    if feature_dim != tower.feature_dim:
        raise ValueError(
            f"--align.inherit: the vision tower's feature dimension ({tower.feature_dim}) must equal the CLIP model's "
            f"feature dimension ({feature_dim}). Pass the CLIP model that --align.tower comes from"
        )
    config = dataclasses.replace(
        config,
        embed_dim=clip.embed_dim,
        projection=projection is not None,
        projection_bias=projection is not None and projection.bias is not None,
    )
    model = LLM2CLIP(config, tower).to(next(clip.model.parameters()).device)
    if projection is not None:
        model.projection.load_state_dict(projection.state_dict())
    _check_image_embeddings(model, clip.model)
    return model


@torch.no_grad()
def _check_image_embeddings(model: LLM2CLIP, clip: Any) -> None:
    """Raise ValueError if both models have the same image size but encode a random image differently."""
    tower, is_transformers = model.tower, hasattr(clip, "get_image_features")
    size = tower.preprocess.size
    clip_size = getattr(clip.config.vision_config, "image_size", None) if is_transformers else clip.visual.image_size
    if clip_size not in (size, (size, size)):
        return
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(model.device)
    normalized = (pixels - tower.mean) / tower.std
    if is_transformers:
        expected = get_pooled_output(clip.get_image_features(pixel_values=normalized))
    else:
        expected = clip.encode_image(normalized)
    image = model(pixels=pixels)[0]
    similarity = F.cosine_similarity(image, expected.float()).item()
    if similarity < MIN_SIMILARITY:
        raise ValueError(
            "--align.inherit: the vision tower is not the image tower of this CLIP model (cosine similarity between "
            f"their image embeddings: {similarity:.2f}). Pass the CLIP model that --align.tower comes from"
        )


def find_hub_id_or_folder(tower: str) -> str:
    """Return the folder or hub id of a vision tower's weights. For the name of a timm model, look up the hub id."""
    prefix, colon, rest = tower.partition(":")
    name = rest if colon and prefix in ("timm", "hf") else tower
    if "/" in name or Path(name).is_dir():
        return name
    from timm.models import get_pretrained_cfg

    try:
        config = get_pretrained_cfg(name, allow_unregistered=True)
    except RuntimeError:
        return name
    return config.hf_hub_id if config is not None and config.hf_hub_id else name
