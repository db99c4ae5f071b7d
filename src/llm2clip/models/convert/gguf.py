"""A GGUF file (llama.cpp's format, usually quantised) to an ordinary folder of safetensors, once.

transformers dequantises a GGUF every time it opens one (17 s for SmolLM2-135M, against 1 s for safetensors) and marks
the model so that it cannot be saved. Both go away by converting once.

The weights are written in float32. A quantised weight is a 4-bit step times a float16 scale plus an offset, which
neither half format holds: of SmolLM2's 134.5 M dequantised values (Q4_1) 106.6 M change in bfloat16 and 55.9 M in
float16. Cost: 4 bytes a parameter on the disk.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any


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
