"""Conversion of GGUF files (llama.cpp's format, usually quantized) to ordinary safetensors folders.

transformers dequantizes a GGUF file every time it loads the file (17 s for SmolLM2-135M, compared with 1 s for
safetensors), and does not allow the loaded model to be saved. Converting the file once avoids both problems.

The weights are written in float32, with 4 bytes per parameter. A quantized weight is a 4-bit integer times a float16
scale plus an offset. Neither half-precision format can represent all such values: of SmolLM2's 134.5 M dequantized
values (Q4_1), 106.6 M change when cast to bfloat16, and 55.9 M when cast to float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_dir


def convert_gguf(gguf: str | Path, out: str | Path) -> Path:
    """Convert a GGUF file to a safetensors folder `out`, atomically. See `write_gguf_as_safetensors`.

    If another process creates `out` at the same time, that process's folder is used.

    Raises:
        FileNotFoundError: the GGUF file does not exist.
        FileExistsError: `out` exists.
        ValueError: the file does not contain all weights of the model.
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
    """Write the decoder (without the LM head) and the tokenizer of a GGUF file to an existing folder.

    All architectures whose GGUF files transformers can read are supported (llama, qwen2, qwen3, gemma3, ...). The
    tokenizer keeps its chat template.

    Raises:
        ValueError: the file does not contain all weights of the model.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    source = str(gguf.absolute().parent)
    model, report = AutoModel.from_pretrained(
        source, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    missing = sorted(report["missing_keys"])
    if missing:  # transformers only warns, and initialises missing weights randomly
        raise ValueError(
            f"{gguf} does not contain {len(missing):,} of the model's weights, such as {missing[0]}. The file is "
            "incomplete, or the installed gguf package is too old"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name)
    _clear_quantization_metadata(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _clear_quantization_metadata(model: Any) -> None:
    """Remove the attributes that make `save_pretrained` fail, now that the layers are dequantized."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
