"""Text towers of other CLIP models, for comparison with a caption encoder.

All transformers models with `get_text_features` (CLIP, SigLIP, AltCLIP, ...) are supported. If open_clip is installed,
open_clip models are supported, too. Texts that exceed the context length are truncated, as is usual for these models.
`ClipTextEncoder.count_truncated` counts the truncated texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm2clip.cpu_tuning import onednn_matmul
from llm2clip.models.loading import hide_loading_bars
from llm2clip.progress import ProgressBar

OPEN_CLIP_PREFIX = "open_clip:"
# Models of these types were trained on text padded to the context length, without an attention mask.
_FULLY_PADDED_TYPES = ("siglip", "siglip2")


class ClipTextEncoder:
    """Text tower of a CLIP model.

    Attributes:
        model: the complete CLIP model, with both towers.
        context_length: maximum text length in tokens.
        embed_dim: dimension of the embeddings.
    """

    def __init__(
        self,
        model: Any,
        context_length: int,
        embed_dim: int,
        tokenize: Callable[[list[str]], dict[str, Tensor]],
        forward: Callable[..., Tensor],
        token_count: Callable[[str], int],
    ) -> None:
        """Wrap a loaded CLIP model.

        Args:
            model: the complete CLIP model, with both towers.
            context_length: maximum text length in tokens.
            embed_dim: dimension of the embeddings.
            tokenize: function that truncates N texts to the context length and returns a dict of input tensors.
            forward: function that takes the tensors from `tokenize` as keyword arguments and returns embeddings of
                shape (N, embed_dim).
            token_count: function that returns the number of tokens in a text before truncation.
        """
        self.model, self.context_length, self.embed_dim = model, context_length, embed_dim
        self._tokenize, self._forward, self._token_count = tokenize, forward, token_count

    @torch.inference_mode()
    @onednn_matmul()
    def encode(self, captions: Sequence[str], *, progress: bool = False, batch_size: int = 64) -> Tensor:
        """Encode texts as unnormalised (N, embed_dim) float32 embeddings on the CPU, in input order."""
        order = sorted(range(len(captions)), key=lambda i: -len(captions[i]))
        embeddings = torch.empty(len(captions), self.embed_dim)
        for start in ProgressBar(range(0, len(order), batch_size), desc="encode", unit="batch", disable=not progress):
            rows = order[start : start + batch_size]
            batch = self._tokenize([captions[i] for i in rows])
            embeddings[rows] = self._forward(**batch).float().cpu()
        return embeddings

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Return the number of texts that are truncated because they are longer than the context length."""
        return sum(self._token_count(caption) > self.context_length for caption in captions)


def has_text_tower(path: str) -> bool:
    """Return True if `path` names an open_clip model or a transformers model with image and text towers."""
    from transformers import MODEL_MAPPING, AutoConfig

    if path.startswith(OPEN_CLIP_PREFIX):
        return True
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):  # not a transformers model; the function that loads it later reports the error
        return False
    return type(config) in MODEL_MAPPING and hasattr(MODEL_MAPPING[type(config)], "get_text_features")


def load_clip_text_encoder(path: str, device: torch.device | None = None) -> ClipTextEncoder:
    """Load the text tower of a CLIP model.

    Args:
        path: for transformers, a folder or hub id. For open_clip, one of `open_clip:NAME/PRETRAINED`,
            `open_clip:FOLDER` (a folder saved by open_clip) and `open_clip:hf-hub:ID`.
        device: device to load the model on. Default: a GPU if there is one.

    Raises:
        ValueError: `path` names an open_clip architecture but not its weights.
        ImportError: open_clip is required but not installed.
        OSError: the model does not exist.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.startswith(OPEN_CLIP_PREFIX):
        return _load_open_clip(path.removeprefix(OPEN_CLIP_PREFIX), device)
    return _load_transformers(path, device)


@hide_loading_bars()
def _load_transformers(path: str, device: torch.device) -> ClipTextEncoder:
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(path, trust_remote_code=False, dtype=torch.float32).to(device).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    text_config = model.config.text_config
    # AltCLIP's tokenizer allows fewer tokens than the model has positions.
    context_length = min(text_config.max_position_embeddings, tokenizer.model_max_length)
    is_fully_padded = model.config.model_type in _FULLY_PADDED_TYPES

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        padding = "max_length" if is_fully_padded else True
        batch = tokenizer(texts, padding=padding, truncation=True, max_length=context_length, return_tensors="pt")
        names = ("input_ids",) if is_fully_padded else ("input_ids", "attention_mask")
        return {name: batch[name].to(device) for name in names}

    def forward(**batch: Tensor) -> Tensor:
        output = model.get_text_features(**batch)
        embeddings: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return embeddings

    embed_dim = (
        getattr(model.config, "projection_dim", None)
        or getattr(text_config, "projection_size", None)
        or text_config.hidden_size
    )
    return ClipTextEncoder(
        model=model,
        context_length=context_length,
        embed_dim=embed_dim,
        tokenize=tokenize,
        forward=forward,
        token_count=lambda text: len(tokenizer(text, verbose=False)["input_ids"]),
    )


def _load_open_clip(name: str, device: torch.device) -> ClipTextEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{OPEN_CLIP_PREFIX}{name} requires open_clip: pip install open-clip-torch") from error

    if Path(name).is_dir():
        architecture, pretrained = f"local-dir:{name}", ""
    elif name.startswith("hf-hub:"):
        architecture, pretrained = name, ""
    else:
        architecture, _, pretrained = name.partition("/")
        if not pretrained:
            raise ValueError(
                f"{OPEN_CLIP_PREFIX}{name} does not name its weights: write {OPEN_CLIP_PREFIX}{name}/PRETRAINED"
            )
    model: Any = open_clip.create_model(architecture, pretrained=pretrained or None, device=device).eval()
    tokenizer: Any = open_clip.get_tokenizer(architecture)
    hf_tokenizer = getattr(tokenizer, "tokenizer", None)  # some models have a Hugging Face tokenizer

    def token_count(text: str) -> int:
        if hf_tokenizer is not None:
            return len(hf_tokenizer(text)["input_ids"])
        return len(tokenizer.encode(text)) + 2  # including the start and end tokens

    return ClipTextEncoder(
        model=model,
        context_length=tokenizer.context_length,
        embed_dim=model.encode_text(tokenizer(["a"]).to(device)).shape[-1],
        tokenize=lambda texts: {"text": tokenizer(texts).to(device)},
        forward=model.encode_text,
        token_count=token_count,
    )
