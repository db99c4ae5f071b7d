"""ONNX export of the image encoder and the text encoder. The graphs are checked against PyTorch's embeddings."""

import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from llm2clip.io_utils import install_command
from llm2clip.models.export.transformers import MIN_COSINE, SAMPLE_TEXTS, build_export_model, build_tokenizer
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.modeling_llm2clip import LLM2CLIPExport

USAGE = """```python
import numpy as np
import onnxruntime
from tokenizers import Tokenizer

tokenizer = Tokenizer.from_file("tokenizer.json")      # adds the template automatically
tokenizer.enable_padding(pad_id={pad_id}, pad_token="")
tokenizer.enable_truncation({max_length})
encoded = tokenizer.encode_batch(["a long description ..."])
ids = np.array([e.ids for e in encoded]); mask = np.array([e.attention_mask for e in encoded])
texts = onnxruntime.InferenceSession("text.onnx").run(None, {{"input_ids": ids, "attention_mask": mask}})[0]

pixels = ...   # uint8 (N, 3, S, S), resized and cropped as specified in preprocessor_config.json, but not normalised
images = onnxruntime.InferenceSession("vision.onnx").run(None, {{"pixels": pixels}})[0]
scores = texts @ images.T
```
"""
# If a graph has more bytes than this, its weights are stored in a separate file. ONNX files are limited to 2 GB.
EXTERNAL_DATA_BYTES = 1 << 30


@dataclass
class _Graph:
    """ONNX graph to export.

    Attributes:
        name: file name without the suffix, either "vision" or "text".
        inputs: dict from input name to a batch of at least two sample inputs.
        dynamic_shapes: dynamic dimensions of each input, as in `torch.onnx.export`.
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic_shapes: tuple[Any, ...]


class VisionModule(nn.Module):
    """Module that encodes uint8 images of shape (N, 3, S, S) as L2-normalised float32 embeddings (N, embed_dim)."""

    def __init__(self, model: LLM2CLIPExport, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.model = model
        self.mean = nn.Buffer(mean.clone())
        self.std = nn.Buffer(std.clone())

    def forward(self, pixels: Tensor) -> Tensor:
        normalised = (pixels.float() / 255 - self.mean) / self.std
        return cast(Tensor, self.model.get_image_features(normalised).pooler_output)


class TextModule(nn.Module):
    """Module that encodes int64 token ids of shape (N, T) as L2-normalised float32 embeddings (N, embed_dim)."""

    def __init__(self, model: LLM2CLIPExport) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return cast(Tensor, self.model.get_text_features(input_ids, attention_mask).pooler_output)


@torch.no_grad()
def export_onnx(model: LLM2CLIP, folder: Path, int8: bool = False) -> list[str]:
    """Write vision.onnx, text.onnx, the tokenizer, the preprocessing config, and USE.md with example code.

    If `int8` is True, also write vision-int8.onnx and text-int8.onnx with weights quantized to 8 bits.

    Returns:
        One message per graph, with the minimum cosine similarity between its embeddings and PyTorch's embeddings.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        ValueError: a graph's minimum cosine similarity is below 0.9999. Graphs with 8-bit weights are exempt.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"exporting to ONNX requires `{install_command('onnx')}` ({error})") from error
    exported, tokenizer = build_export_model(model), build_tokenizer(model.encoder)
    tokenizer.save_pretrained(folder)  # save first, because a call with padding changes the tokenizer's settings
    messages = []
    for graph in _build_graphs(exported, model, tokenizer):
        messages.append(_export_graph(graph, folder))
        if int8:
            messages.append(_quantize_graph(graph, folder))
    (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))
    usage = USAGE.format(pad_id=tokenizer.pad_token_id, max_length=tokenizer.model_max_length)
    (folder / "USE.md").write_text(usage)
    return messages


def _build_graphs(exported: LLM2CLIPExport, model: LLM2CLIP, tokenizer: Any) -> list[_Graph]:
    size = model.tower.preprocess.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    vision = VisionModule(exported, model.tower.mean.cpu(), model.tower.std.cpu()).eval()
    count = {0: torch.export.Dim("count")}

    tokens = tokenizer(list(SAMPLE_TEXTS), padding=True, return_tensors="pt")
    inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    count_and_length = count | {1: torch.export.Dim("length")}
    text = TextModule(exported).eval()
    return [
        _Graph("vision", vision, {"pixels": pixels}, (count,)),
        _Graph("text", text, inputs, (count_and_length, count_and_length)),
    ]


def _export_graph(graph: _Graph, folder: Path) -> str:
    """Write a graph and compare its embeddings with PyTorch's embeddings. Return a message with the result."""
    file = folder / f"{graph.name}.onnx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # texts and images have the same batch axis
        program = torch.onnx.export(
            graph.module,
            tuple(graph.inputs.values()),
            dynamo=True,
            input_names=list(graph.inputs),
            output_names=["embeddings"],
            dynamic_shapes=graph.dynamic_shapes,
            verbose=False,
        )
    assert program is not None
    program.save(str(file))
    single_input = {name: tensor[:1] for name, tensor in graph.inputs.items()}
    cosines = [_compute_min_cosine(file, graph.module, inputs) for inputs in (graph.inputs, single_input)]
    cosine = float(torch.tensor(cosines).min())
    if not cosine >= MIN_COSINE:  # this form also catches NaN
        raise ValueError(f"the embeddings from {file.name} differ from PyTorch's: cosine similarity {cosine:.5f}")
    return f"{file.name}: minimum cosine similarity to PyTorch's embeddings {cosine:.6f}"


def _quantize_graph(graph: _Graph, folder: Path) -> str:
    """Write a copy of a graph with weights quantized to 8 bits. Return a message about its accuracy and size."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file, quantized = folder / f"{graph.name}.onnx", folder / f"{graph.name}-int8.onnx"
    full_size = _compute_total_size(folder, file.name)
    root = logging.getLogger()
    root.addFilter(_is_not_preprocessing_hint)
    try:
        quantize_dynamic(
            file,
            quantized,
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=full_size > EXTERNAL_DATA_BYTES,
        )
    finally:
        root.removeFilter(_is_not_preprocessing_hint)
    cosine = _compute_min_cosine(quantized, graph.module, graph.inputs)
    ratio = _compute_total_size(folder, quantized.name) / full_size
    return f"{quantized.name}: minimum cosine similarity {cosine:.4f}, {ratio:.0%} of the original size"


def _is_not_preprocessing_hint(record: logging.LogRecord) -> bool:
    """Return False for onnxruntime's advice to preprocess graphs, which helps only if activations are quantized."""
    return "run pre-processing before quantization" not in record.getMessage()


def _compute_total_size(folder: Path, name: str) -> int:
    """Return a graph's size in bytes, including any separate weight file."""
    return sum(file.stat().st_size for file in folder.glob(f"{name}*"))


def _compute_min_cosine(file: Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    """Compute the minimum cosine similarity between a graph's embeddings and a PyTorch module's embeddings."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    embeddings = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    return float(torch.cosine_similarity(embeddings, module(*inputs.values())).min())
