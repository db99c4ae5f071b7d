"""Convert GGUF files (llama.cpp's format, usually quantized) to safetensors folders.

transformers dequantizes a GGUF file every time it loads the file, and does not allow the loaded model to be saved.
SmolLM2-135M loads in 17 s from a GGUF file and in 1 s from safetensors. Converting the file once avoids both problems.

The weights are written in float32, with 4 bytes per parameter. In the Q4_1 format, a dequantized weight is the product
of a 4-bit integer and a float16 scale, plus a float16 offset. Neither float16 nor bfloat16 can represent all such
values. Of SmolLM2-135M's 134.5 M dequantized weights, 106.6 M change when cast to bfloat16, and 55.9 M change when cast
to float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llm2clip.io_utils import atomic_dir


def convert_gguf(gguf: str | Path, out: str | Path) -> Path:
    """Convert a GGUF file to a safetensors folder `out`, atomically, and return the folder's path.

    See `write_gguf_as_safetensors` for the folder's content. If another process creates `out` at the same time, that
    process's folder is used.

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
    """Write a GGUF file's tokenizer and decoder, without the LM head, to an existing folder.

    The supported architectures are those that transformers can load from GGUF files (llama, qwen2, qwen3, gemma3, ...).
    The tokenizer's chat template is kept.

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
    """Remove the attributes that mark a dequantized model as quantized, because they make `save_pretrained` fail."""
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
