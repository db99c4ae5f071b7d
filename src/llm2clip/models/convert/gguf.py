"""Conversion of a GGUF file (llama.cpp's format, usually quantized) to an ordinary safetensors folder.

transformers dequantizes a GGUF file every time it opens one (17 s for SmolLM2-135M, against 1 s for safetensors) and
marks the model as one that cannot be saved. Converting once avoids both.

The weights are written in float32, 4 bytes per parameter. A quantized weight is a 4-bit integer times a float16 scale
plus an offset, which neither half-precision format can represent: of SmolLM2's 134.5 M dequantized values (Q4_1),
106.6 M change in bfloat16 and 55.9 M in float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_dir


def convert_gguf(gguf: str | Path, out: str | Path) -> Path:
    """Convert a GGUF file to the folder `out`, atomically; see `write_gguf_as_safetensors`.

    If another process creates `out` at the same time, its folder is used.

    Raises:
        FileNotFoundError: the GGUF file does not exist.
        FileExistsError: `out` exists.
        ValueError: the file lacks weights.
    """
    gguf, out = Path(gguf).expanduser(), Path(out)
    if not gguf.is_file():
        raise FileNotFoundError(f"{gguf} does not exist")
    if out.exists():
        raise FileExistsError(f"{out} exists: remove it or choose another folder")
    try:
        with atomic_dir(out) as folder:
            write_gguf_as_safetensors(gguf, folder)
    except OSError:
        if not out.is_dir():
            raise
    return out


def write_gguf_as_safetensors(gguf: Path, folder: Path) -> None:
    """Write the decoder (without the LM head) and the tokenizer of a GGUF file into an existing folder.

    Supported are the architectures whose GGUF files transformers can read (llama, qwen2, qwen3, gemma3, ...). The
    tokenizer keeps its chat template.

    Raises:
        ValueError: the file lacks weights.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = str(gguf.absolute().parent)
    model, report = AutoModel.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers initialises them randomly, with only a warning
        raise ValueError(
            f"{gguf} lacks {len(missing):,} weights, such as {missing[0]}, or the installed package gguf is too old"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    _clear_quantization_marks(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _clear_quantization_marks(model: Any) -> None:
    """Remove the attributes that make `save_pretrained` fail; the layers have been dequantized."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
