"""The text towers of other CLIPs, to be measured by the same rule as a caption encoder.

Any transformers model with `get_text_features` (CLIP, SigLIP, AltCLIP, ...), and open_clip's where it is installed.
Text beyond the tower's window is cut, as these towers do, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from llm2clip.cpu_tuning import onednn_matmul

OPEN_CLIP = "open_clip:"
PADDED = ("siglip", "siglip2")  # trained on text padded to the window, pad tokens attended to


class ClipTextEncoder:
    """A CLIP's text tower: `encode` gives the vectors that its images are compared with, not normalised."""

    def __init__(
        self,
        model: Any,
        window: int,
        width: int,
        tokenize: Callable[[list[str]], dict[str, Tensor]],
        forward: Callable[..., Tensor],
        length: Callable[[str], int],
    ) -> None:
        """
        Args:
            model: that the tower is a part of, both sides of it.
            window: longest text in tokens.
            width: of the vectors.
            tokenize: texts to the tensors of a batch, cut to the window.
            forward: that batch to vectors, (N, width).
            length: of a text in tokens.
        """
        self.model, self.window, self.embed_dim = model, window, width
        self._tokenize, self._forward, self._length = tokenize, forward, length

    @torch.inference_mode()
    @onednn_matmul()
    def encode(self, captions: Sequence[str], *, progress: bool = False, batch: int = 64) -> Tensor:
        """Texts to vectors, (N, width) float32 on the CPU, in the order given."""
        order = sorted(range(len(captions)), key=lambda i: -len(captions[i]))
        out = torch.empty(len(captions), self.embed_dim)
        for lo in tqdm(range(0, len(order), batch), desc="encode", unit="batch", disable=not progress):
            rows = order[lo : lo + batch]
            out[rows] = self._forward(**self._tokenize([captions[i] for i in rows])).float().cpu()
        return out

    def count_truncated(self, captions: Sequence[str]) -> int:
        """How many of these texts are longer than the window, and lose their end."""
        return sum(self._length(caption) > self.window for caption in captions)


def has_text_tower(path: str) -> bool:
    """Whether `path` names a CLIP: an open_clip model, or a transformers model of images and texts in one space."""
    from transformers import MODEL_MAPPING, AutoConfig

    if path.startswith(OPEN_CLIP):
        return True
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):  # no transformers model: what opens it next says what is wrong
        return False
    return type(config) in MODEL_MAPPING and hasattr(MODEL_MAPPING[type(config)], "get_text_features")


def load_clip_text_encoder(path: str, device: torch.device | None = None) -> ClipTextEncoder:
    """The text tower of a transformers folder or hub id, or of `open_clip:NAME/PRETRAINED`; a folder that open_clip
    saved or `hf-hub:ID` may stand for the latter.

    Raises:
        ValueError: an architecture without weights is asked for.
        ImportError: open_clip is asked for and not installed.
        OSError: there is no such model.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if path.startswith(OPEN_CLIP):
        return _from_open_clip(path.removeprefix(OPEN_CLIP), device)
    return _from_transformers(path, device)


def _from_transformers(path: str, device: torch.device) -> ClipTextEncoder:
    from transformers import AutoModel, AutoTokenizer

    model: Any = AutoModel.from_pretrained(path, trust_remote_code=False, dtype=torch.float32).to(device).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    text = model.config.text_config
    window = min(text.max_position_embeddings, tokenizer.model_max_length)  # AltCLIP's has fewer than it has positions
    padding = "max_length" if model.config.model_type in PADDED else True

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        batch = tokenizer(texts, padding=padding, truncation=True, max_length=window, return_tensors="pt").to(device)
        keys = ("input_ids",) if padding == "max_length" else ("input_ids", "attention_mask")
        return {k: batch[k] for k in keys}

    def forward(**batch: Tensor) -> Tensor:
        found = model.get_text_features(**batch)
        vectors: Tensor = found if isinstance(found, Tensor) else found.pooler_output
        return vectors

    width = getattr(model.config, "projection_dim", None) or getattr(text, "projection_size", None) or text.hidden_size
    return ClipTextEncoder(
        model, window, width, tokenize, forward, lambda text: len(tokenizer(text, verbose=False)["input_ids"])
    )


def _from_open_clip(name: str, device: torch.device) -> ClipTextEncoder:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"{OPEN_CLIP}{name} needs open_clip: pip install open-clip-torch") from error

    if Path(name).is_dir():
        architecture, pretrained = f"local-dir:{name}", ""
    elif name.startswith("hf-hub:"):
        architecture, pretrained = name, ""
    else:
        architecture, _, pretrained = name.partition("/")
        if not pretrained:
            raise ValueError(f"{OPEN_CLIP}{name} names no weights: {OPEN_CLIP}{name}/PRETRAINED")
    model: Any = open_clip.create_model(architecture, pretrained=pretrained or None, device=device).eval()
    tokenizer: Any = open_clip.get_tokenizer(architecture)
    window = tokenizer.context_length

    inner = getattr(tokenizer, "tokenizer", None)  # a Hugging Face tokenizer, where the model has one

    def length(text: str) -> int:
        return len(inner(text)["input_ids"]) if inner is not None else len(tokenizer.encode(text)) + 2

    def tokenize(texts: list[str]) -> dict[str, Tensor]:
        return {"text": tokenizer(texts).to(device)}

    width = model.encode_text(tokenizer(["a"]).to(device)).shape[-1]
    return ClipTextEncoder(model, window, width, tokenize, model.encode_text, length)
