"""A GGUF file (llama.cpp's format, usually quantised) to an ordinary folder of safetensors, once.

transformers dequantises a GGUF every time it opens one (17 s for SmolLM2-135M, against 1 s for safetensors) and marks
the model so that it cannot be saved. Both go away by converting once.

The weights are written in float32. A quantised weight is a 4-bit step times a float16 scale plus an offset, which
neither half format holds: of SmolLM2's 134.5 M dequantised values (Q4_1) 106.6 M change in bfloat16 and 55.9 M in
float16. Cost: 4 bytes a parameter on the disk.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

__all__ = ["cache_folder", "convert_gguf", "cached_gguf"]


def cache_folder() -> Path:
    """$LLM2CLIP_CACHE, else $XDG_CACHE_HOME/llm2clip, else ~/.cache/llm2clip."""
    if own := os.environ.get("LLM2CLIP_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "llm2clip"


def cached_gguf(gguf: str | Path) -> Path:
    """The folder that `gguf` was converted to, in the user's cache; converted now if it has not been.

    A file is known by its path, size and time of change: hashing one of many gigabytes would cost more than it tells.
    """
    gguf = _existing(gguf)
    facts = gguf.stat()
    key = hashlib.sha256(f"{gguf.resolve()}\0{facts.st_size}\0{facts.st_mtime_ns}".encode()).hexdigest()[:12]
    out = cache_folder() / "gguf" / f"{gguf.stem}-{key}"
    return out if out.is_dir() else convert_gguf(gguf, out)


def convert_gguf(gguf: str | Path, out: str | Path) -> Path:
    """Write the decoder (no LM head) and tokenizer of `gguf` to the folder `out`, which appears whole or not at all.

    The architectures are those transformers reads (llama, qwen2, qwen3, gemma3, ...). The tokenizer keeps its chat
    template: the folder says what the file said. An `out` that is there already is an error; one that another process
    makes meanwhile is used.
    """
    gguf, out = _existing(gguf), Path(out)
    if out.exists():
        raise FileExistsError(f"{out}: exists already; remove it or name another folder")

    import torch
    from transformers import AutoModel, AutoTokenizer

    folder = str(gguf.absolute().parent)
    model, report = AutoModel.from_pretrained(
        folder, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers, and only warns
        raise ValueError(
            f"{gguf}: it lacks {len(missing):,} weights, {missing[0]} among them, or the package gguf is too old"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    _clear_quantisation_marks(model)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        whole = Path(temporary) / out.name  # a folder inside: the temporary one is for this user's eyes only
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        try:
            os.replace(whole, out)
        except OSError:
            if not out.is_dir():
                raise
    return out


def _existing(gguf: str | Path) -> Path:
    path = Path(gguf).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    return path


def _clear_quantisation_marks(model: Any) -> None:
    """The layers are ordinary ones by now; these attributes still say otherwise and make `save_pretrained` refuse."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
