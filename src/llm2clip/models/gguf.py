"""Conversion of GGUF files (llama.cpp's format, usually quantised) to safetensors folders.

transformers dequantises a GGUF file on every load, and cannot save the loaded model. A one-time conversion solves both
problems: SmolLM2-135M loads in 17 s from a GGUF file, and in 1 s from safetensors.

The weights are written in float32 (4 bytes per parameter). In the Q4_1 format, a dequantised weight is the product of a
4-bit integer and a float16 scale, plus a float16 offset. Neither float16 nor bfloat16 can represent all such values. Of
SmolLM2-135M's 134.5 M dequantised weights, a cast to bfloat16 changes 106.6 M, and a cast to float16 55.9 M.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from llm2clip.models.loading import hide_loading_bars

# GGUF type codes of strings and arrays, and the size in bytes of all other types, keyed by type code.
_STRING, _ARRAY = 8, 9
_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@hide_loading_bars()
def write_gguf_as_safetensors(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's tokenizer and decoder, without the LM head, to an existing folder.

    All architectures that transformers can load from GGUF files are supported (llama, qwen2, qwen3, gemma3, ...). Raise
    ValueError if the file is corrupt or lacks weights.
    """
    import torch
    import transformers.modeling_gguf_pytorch_utils
    from transformers import AutoModel, AutoTokenizer

    check_gguf_header(gguf)
    source = str(gguf.absolute().parent)
    gguf_utils: Any = transformers.modeling_gguf_pytorch_utils
    tqdm = gguf_utils.tqdm
    try:
        # Hide the progress bars for conversion, loading and saving, which have no labels.
        gguf_utils.tqdm = partial(tqdm, disable=True)
        model, report = AutoModel.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    finally:
        gguf_utils.tqdm = tqdm
    missing = sorted(report["missing_keys"])
    if missing:  # transformers only warns, and initialises missing weights randomly
        raise ValueError(
            f"{gguf} is missing {len(missing):,} of the model's weights, including {missing[0]}. The file is "
            "incomplete, or the installed gguf package is too old"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, trust_remote_code=False)
    # The weights are dequantised, but `save_pretrained` fails while these attributes mark the model as quantised.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_gguf_header(gguf: Path) -> None:
    """Raise ValueError if the metadata in a GGUF file's header extends past the end of the file.

    The gguf package does not check array lengths, and would try to read an array of 2^40 values from a small file. File
    format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with gguf.open("rb") as file:
        reader = _GGUFReader(file)
        if file.read(4) != b"GGUF":
            raise ValueError(f"{gguf} is not a GGUF file")
        try:
            reader.skip(4 + 8)  # version and number of tensors
            for _ in range(reader.read_integer(8)):
                reader.skip(reader.read_integer(8))  # name
                reader.skip_value(reader.read_integer(4))
        except EOFError as error:
            raise ValueError(f"{gguf} is corrupt: its metadata extends past the end of the file") from error


class _GGUFReader:
    """Reader that skips GGUF metadata. Its methods raise EOFError instead of reading past the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def read_integer(self, num_bytes: int) -> int:
        data = self.file.read(num_bytes)
        if len(data) < num_bytes:
            raise EOFError
        return int.from_bytes(data, "little")

    def skip(self, num_bytes: int) -> None:
        if self.file.tell() + num_bytes > self.size:
            raise EOFError
        self.file.seek(num_bytes, os.SEEK_CUR)

    def skip_value(self, kind: int) -> None:
        length = 1
        if kind == _ARRAY:
            kind, length = self.read_integer(4), self.read_integer(8)
        if kind in _VALUE_SIZES:
            self.skip(length * _VALUE_SIZES[kind])
        elif kind == _STRING:
            for _ in range(length):
                self.skip(self.read_integer(8))
        else:
            raise ValueError(f"the GGUF metadata contains a value of unknown type {kind}")
