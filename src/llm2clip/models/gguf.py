"""Conversion of GGUF files (llama.cpp's format, usually quantised) to safetensors folders.

transformers dequantises a GGUF file on every load, and cannot save the loaded model. After a one-time conversion to
safetensors, SmolLM2-135M loads in 1 s instead of 17 s.

The weights are written in float32, because neither float16 nor bfloat16 can represent all dequantised weights. For
example, casting the dequantised Q4_1 weights of SmolLM2-135M changes 42% of them in float16 and 79% in bfloat16.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from llm2clip.models.loading import hide_loading_progress_bars

# GGUF type codes of strings and arrays.
_STRING, _ARRAY = 8, 9
# Size in bytes of each fixed-size GGUF type, keyed by type code.
_VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


@hide_loading_progress_bars()
def write_gguf_as_safetensors(gguf: Path, folder: Path) -> None:
    """Convert a GGUF file to a safetensors folder that contains the tokenizer and the decoder without the LM head.

    All architectures that transformers can load from GGUF files are supported, such as llama, qwen2, qwen3 and gemma3.
    Raise ValueError if the file is corrupt or some of the model's weights are missing.
    """
    import torch
    import transformers.modeling_gguf_pytorch_utils as gguf_module
    from transformers import AutoModel, AutoTokenizer

    check_gguf_header(gguf)
    source = str(gguf.absolute().parent)
    gguf_utils: Any = gguf_module
    tqdm = gguf_utils.tqdm
    try:
        # transformers' progress bars for the conversion are hidden because they have no labels.
        gguf_utils.tqdm = partial(tqdm, disable=True)
        model, report = AutoModel.from_pretrained(
            source, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    finally:
        gguf_utils.tqdm = tqdm
    missing = sorted(report["missing_keys"])
    if missing:  # transformers would only log a warning and initialise the missing weights randomly
        raise ValueError(
            f"{gguf} lacks the model weight {missing[0]} ({len(missing):,} missing in total). Download the file again "
            "or update the gguf package"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf.name, trust_remote_code=False)
    # Although the weights are dequantised, `save_pretrained` fails if an attribute marks the model as quantised.
    for owner, name in ((model.config, "quantization_config"), (model, "hf_quantizer"), (model, "quantization_method")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.is_quantized = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_gguf_header(gguf: Path) -> None:
    """Raise ValueError if the metadata in a GGUF file's header extends past the end of the file.

    The gguf package does not check array lengths, so a small corrupt file could make it read an array of 2^40 values.
    File format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
    """
    with gguf.open("rb") as file:
        reader = _GGUFMetadataReader(file)
        if file.read(4) != b"GGUF":
            raise ValueError(f"{gguf} is not a GGUF file")
        try:
            reader.skip_bytes(4 + 8)  # version and number of tensors
            for _ in range(reader.read_integer(8)):
                reader.skip_bytes(reader.read_integer(8))  # name
                reader.skip_value(reader.read_integer(4))
        except EOFError as error:
            raise ValueError(f"{gguf} is corrupt: its metadata extends past the end of the file") from error


class _GGUFMetadataReader:
    """Reader for GGUF metadata. All methods raise EOFError instead of reading past the end of the file."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def read_integer(self, num_bytes: int) -> int:
        data = self.file.read(num_bytes)
        if len(data) < num_bytes:
            raise EOFError
        return int.from_bytes(data, "little")

    def skip_bytes(self, num_bytes: int) -> None:
        if self.file.tell() + num_bytes > self.size:
            raise EOFError
        self.file.seek(num_bytes, os.SEEK_CUR)

    def skip_value(self, kind: int) -> None:
        length = 1
        if kind == _ARRAY:
            kind, length = self.read_integer(4), self.read_integer(8)
        if kind in _VALUE_SIZES:
            self.skip_bytes(length * _VALUE_SIZES[kind])
        elif kind == _STRING:
            for _ in range(length):
                self.skip_bytes(self.read_integer(8))
        else:
            raise ValueError(f"the GGUF metadata contains a value of unknown type {kind}")
