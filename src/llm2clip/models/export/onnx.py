"""A model for onnxruntime: one graph for pictures, one for texts, each checked against PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from llm2clip.models.export.modeling_llm2clip import LLM2CLIPExport
from llm2clip.models.export.transformers import TEXTS, build_export_model, build_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP

USE = """import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")      # the template is in it
tokenizer.enable_padding(pad_id=PAD, pad_token="")
tokenizer.enable_truncation(MOST)
encoded = tokenizer.encode_batch(["a long description ..."])
ids = np.array([e.ids for e in encoded]); mask = np.array([e.attention_mask for e in encoded])
texts = onnxruntime.InferenceSession("text.onnx").run(None, {"input_ids": ids, "attention_mask": mask})[0]

pixels = ...   # uint8 (N, 3, S, S), resized and cropped as preprocessor_config.json says; not normalised
images = onnxruntime.InferenceSession("vision.onnx").run(None, {"pixels": pixels})[0]
scores = texts @ images.T
"""


class VisionModule(nn.Module):
    """uint8 (N, 3, S, S) to (N, width), L2-normalised."""

    mean: Tensor
    std: Tensor

    def __init__(self, whole: LLM2CLIPExport, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.whole = whole
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.clone())

    def forward(self, pixels: Tensor) -> Tensor:
        normal = (pixels.float() / 255 - self.mean) / self.std
        return cast(Tensor, self.whole.get_image_features(normal).pooler_output)


class TextModule(nn.Module):
    """Token ids and mask, int64 (N, T), to (N, width), L2-normalised."""

    def __init__(self, whole: LLM2CLIPExport) -> None:
        super().__init__()
        self.whole = whole

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return cast(Tensor, self.whole.get_text_features(input_ids, attention_mask).pooler_output)


@torch.no_grad()
def export_onnx(model: LLM2CLIP, folder: Path, int8: bool = False) -> list[str]:
    """Write `vision.onnx` and `text.onnx`, with the tokenizer and the preparation of pictures; with `int8` also
    `vision-int8.onnx` and `text-int8.onnx`, whose weights are rounded to bytes.

    Returns:
        Lines that say how far each graph is from PyTorch: the smallest cosine over a few inputs.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: a graph does not give PyTorch's vectors (to a cosine of 0.9999; of int8 it is only told).
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs `pip install llm2clip[onnx]` ({error})") from error
    whole = build_export_model(model)
    size = model.tower.preprocess.size
    tokenizer = build_tokenizer(model.encoder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))
    vision, texts = VisionModule(whole, model.tower.mean.cpu(), model.tower.std.cpu()).eval(), TextModule(whole).eval()
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    padded = dict(tokenizer(list(TEXTS), padding=True, return_tensors="pt"))
    tokens = (padded["input_ids"], padded["attention_mask"])
    count, length = torch.export.Dim("count"), torch.export.Dim("length")
    parts: list[tuple[str, nn.Module, tuple[Tensor, ...], list[str], tuple[Any, ...]]] = [
        ("vision", vision, (pixels,), ["pixels"], ({0: count},)),
        ("text", texts, tokens, ["input_ids", "attention_mask"], ({0: count, 1: length}, {0: count, 1: length})),
    ]
    lines = []
    for name, module, inputs, names, shapes in parts:
        file = folder / f"{name}.onnx"
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            input_names=names,
            output_names=["vectors"],
            dynamic_shapes=shapes,
            verbose=False,
        )
        assert program is not None
        program.save(str(file))
        fewer = tuple(x[:1] for x in inputs)
        cosine = float(np.min([_agreement(onnxruntime, file, module, names, some) for some in (inputs, fewer)]))
        if not cosine >= 0.9999:  # nor if it is no number
            raise ValueError(f"{file.name} gives other vectors than PyTorch: cosine {cosine:.5f}")
        lines.append(f"{file.name}: smallest cosine to PyTorch's vectors {cosine:.6f}")
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            small = folder / f"{name}-int8.onnx"
            large = _size(folder, f"{name}.onnx") > 1 << 30  # one file holds up to 2 GB
            quantize_dynamic(file, small, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=large)
            cosine = _agreement(onnxruntime, small, module, names, inputs)
            share = _size(folder, f"{name}-int8.onnx") / _size(folder, f"{name}.onnx")
            lines.append(f"{small.name}: smallest cosine {cosine:.4f}, {share:.0%} of the size")
    use = USE.replace("PAD", str(tokenizer.pad_token_id)).replace("MOST", str(tokenizer.model_max_length))
    (folder / "USE.md").write_text(f"```python\n{use}```\n")
    return lines


def _size(folder: Path, name: str) -> int:
    """Bytes of a graph and of the weights beside it."""
    return sum(file.stat().st_size for file in folder.glob(f"{name}*"))


def _agreement(runtime: Any, file: Path, module: nn.Module, names: Sequence[str], inputs: tuple[Tensor, ...]) -> float:
    """The smallest cosine of a graph's vectors and a module's."""
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})[0]
    expected = module(*inputs).numpy()
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return float(np.min((found * expected).sum(1) / norms))
