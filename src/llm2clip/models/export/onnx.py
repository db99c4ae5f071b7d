"""ONNX export of a model's image and text encoders, with a check against PyTorch's embeddings."""

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm2clip.io_utils import require_extra
from llm2clip.models.export.transformers import (
    MIN_COSINE,
    SAMPLE_TEXTS,
    build_tokenizer,
    check_exportable_pooling,
    check_text_embeddings,
)
from llm2clip.models.llm2clip import LLM2CLIP
from llm2clip.models.modeling_llm2clip import pool_tokens
from llm2clip.models.text.caption_encoder import CaptionEncoder

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
# Weights above this size are stored in a separate file, because ONNX files are limited to 2 GB.
EXTERNAL_DATA_BYTES = 1 << 30
MIN_QUANTIZED_VALUES = 1024  # weights with fewer elements stay in float32
# Short queries and captions of different lengths for measuring the error caused by 8-bit weights.
CALIBRATION_TEXTS = (
    *("dog", "red car", "sunset at the beach", "children playing football", "an old bicycle", "people at a market"),
    "A black dog runs through shallow water with a stick in its mouth.",
    "Two women in colourful dresses sit on a bench and look at a phone.",
    "A man in a yellow jacket climbs a steep wall of ice.",
    "A plate of pasta with tomatoes and basil next to a glass of red wine.",
    "An empty street at night, lit by a single lamp, with wet cobblestones and parked cars on both sides.",
    "A little girl with a blue hat is feeding ducks at the edge of a pond while her grandfather takes a picture.",
    "A white bathroom has a large mirror above two sinks. A towel hangs on the wall, and a plant stands on the window "
    "sill. The floor is covered with grey tiles.",
    "In the foreground, a brown horse grazes in a green meadow. Behind it, there is a wooden fence, and in the "
    "distance, snow-covered mountains rise above a forest. The sky is clear.",
)


@dataclass
class _OnnxExportGraph:
    name: str  # file name without suffix: vision or text
    module: nn.Module
    inputs: dict[str, Tensor]  # batch of at least two sample inputs
    dynamic_shapes: tuple[Any, ...]  # argument of torch.onnx.export
    calibration: dict[str, Tensor]  # batch of inputs for measuring the error caused by 8-bit weights


class VisionModule(nn.Module):
    """Module that encodes uint8 images of shape (N, 3, S, S) as L2-normalised float32 embeddings."""

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        self.tower = copy.deepcopy(model.tower).cpu().float()
        self.tower._channels_last = False  # ONNX does not support memory formats
        self.projection = copy.deepcopy(model.projection).cpu().float()

    def forward(self, pixels: Tensor) -> Tensor:
        return F.normalize(self.projection(self.tower(pixels)).float(), dim=-1)


class TextModule(nn.Module):
    """Module that encodes token ids and attention masks as L2-normalised float32 embeddings.

    The inputs have shape (N, T), int64. The encoder is a `StaticEmbedding`, or a transformer with mean, last-token or
    CLS pooling. Modules after the pooling layer, such as Dense, are included.
    """

    def __init__(self, model: LLM2CLIP) -> None:
        super().__init__()
        encoder = model.encoder
        st = copy.deepcopy(encoder.st).cpu().float()
        self.pooling, self.prompt_tokens = "mean", 0
        self.is_static = encoder.is_static
        if self.is_static:
            self.llm: Any = nn.Embedding.from_pretrained(st[0].embedding.weight.detach())
            self.head = nn.ModuleList(list(st)[1:])
        else:
            check_exportable_pooling(encoder)
            self.llm = CaptionEncoder(st).llm
            self.llm.set_attn_implementation("sdpa")
            self.pooling = st[1].get_config_dict()["pooling_mode"]
            self.prompt_tokens = 0 if st[1].include_prompt else encoder.count_prompt_tokens(encoder.prefix)
            self.head = nn.ModuleList(list(st)[2:])
        self.adapter = copy.deepcopy(model.adapter).cpu().float()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        if self.is_static:
            hidden = self.llm(input_ids)
        else:
            hidden = self.llm(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        embeddings = pool_tokens(hidden, attention_mask, self.pooling, self.prompt_tokens)
        for module in self.head:
            embeddings = module({"sentence_embedding": embeddings})["sentence_embedding"]
        return F.normalize(self.adapter(embeddings).float(), dim=-1)


@torch.no_grad()
def export_onnx(model: LLM2CLIP, folder: Path, int8: bool = False) -> list[str]:
    """Write vision.onnx, text.onnx, the tokenizer, the preprocessing config, and USE.md with example code.

    If `int8` is True, also write vision-int8.onnx and text-int8.onnx with 8-bit weights (see `quantize_onnx_weights`).
    Return a message for each graph, with the cosine similarity of its embeddings to PyTorch's embeddings. Raise
    ValueError if the minimum cosine similarity of a float32 graph is less than 0.9999.
    """
    require_extra("onnx", "exporting to ONNX")
    messages = [*_export_graph(_build_vision_graph(model), folder, int8), *export_text_encoder(model, folder, int8)]
    (folder / "preprocessor_config.json").write_text(json.dumps(model.tower.preprocess.to_dict(), indent=1))
    tokenizer = build_tokenizer(model.encoder)
    usage = USAGE.format(pad_id=tokenizer.pad_token_id, max_length=tokenizer.model_max_length)
    (folder / "USE.md").write_text(usage)
    return messages


@torch.no_grad()
def export_text_encoder(model: LLM2CLIP, folder: Path, int8: bool = False) -> list[str]:
    """Write text.onnx and the tokenizer. Return a message for each graph, as in `export_onnx`."""
    tokenizer = build_tokenizer(model.encoder)
    tokenizer.save_pretrained(folder)  # saved first, because calls with padding change the tokenizer's settings
    graph = _build_text_graph(model, tokenizer)
    check_text_embeddings(graph.module(*graph.inputs.values()), model)
    return _export_graph(graph, folder, int8)


@torch.no_grad()
def export_quantized_text_encoder(model: LLM2CLIP, folder: Path) -> str:
    """Write the tokenizer and text.onnx with 8-bit weights. Return a message with the cosine similarity."""
    export_text_encoder(model, folder)
    file, full = folder / "text.onnx", folder / "text-float32.onnx"
    file.replace(full)
    quantize_onnx_weights(full, file)
    graph = _build_text_graph(model, build_tokenizer(model.encoder))
    message = _format_quantization_message(graph, file, full)
    full.unlink()
    return message


def count_final_tokens(tokenizer: Any) -> int:
    """Count the special tokens that the tokenizer appends to each text and keeps during truncation."""
    mask = tokenizer.backend_tokenizer.encode("a").special_tokens_mask
    return len(list(takewhile(bool, reversed(mask))))


def _build_vision_graph(model: LLM2CLIP) -> _OnnxExportGraph:
    size = model.tower.preprocess.size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (3, 3, size, size), generator=generator, dtype=torch.uint8)
    count = {0: torch.export.Dim("count")}
    return _OnnxExportGraph("vision", VisionModule(model).eval(), {"pixels": pixels}, (count,), {"pixels": pixels})


def _build_text_graph(model: LLM2CLIP, tokenizer: Any) -> _OnnxExportGraph:
    count_and_length = {0: torch.export.Dim("count"), 1: torch.export.Dim("length")}
    module = TextModule(model).eval()
    samples, calibration = (_tokenize(tokenizer, texts) for texts in (SAMPLE_TEXTS, CALIBRATION_TEXTS))
    return _OnnxExportGraph("text", module, samples, (count_and_length, count_and_length), calibration)


def _tokenize(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def _export_graph(graph: _OnnxExportGraph, folder: Path, int8: bool) -> list[str]:
    messages = [_write_verified_graph(graph, folder)]
    if int8:
        file, quantized = folder / f"{graph.name}.onnx", folder / f"{graph.name}-int8.onnx"
        quantize_onnx_weights(file, quantized)
        messages.append(_format_quantization_message(graph, quantized, file))
    return messages


def _write_verified_graph(graph: _OnnxExportGraph, folder: Path) -> str:
    """Write a graph. Raise ValueError if the graph's embeddings differ from PyTorch's embeddings."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    file = folder / f"{graph.name}.onnx"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)  # the batch axes have the same name
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
    ClearMetadataAndDocStringPass()(program.model)  # remove stack traces, which contain local paths
    program.save(str(file))
    single_input = {name: tensor[:1] for name, tensor in graph.inputs.items()}
    cosines = [_compute_cosines(file, graph.module, inputs).min() for inputs in (graph.inputs, single_input)]
    cosine = float(torch.stack(cosines).min())
    if not cosine >= MIN_COSINE:  # `not >=` also catches NaN
        raise ValueError(f"{file.name}: embeddings differ from PyTorch's embeddings (cosine similarity {cosine:.5f})")
    return f"{file.name}: the minimum cosine similarity to PyTorch's embeddings is {cosine:.6f}"


def _format_quantization_message(graph: _OnnxExportGraph, quantized: Path, original: Path) -> str:
    cosines = _compute_cosines(quantized, graph.module, graph.calibration)
    sizes = [sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) for file in (quantized, original)]
    return (
        f"{quantized.name}: mean cosine similarity {cosines.mean():.4f} (minimum {cosines.min():.4f}), "
        f"{sizes[0] / sizes[1]:.0%} of the original size"
    )


def _compute_cosines(file: Path, module: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the N cosine similarities between the embeddings of an ONNX graph and of a PyTorch module."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    embeddings = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])
    return torch.cosine_similarity(embeddings, module(*inputs.values()))


def quantize_onnx_weights(source: Path, target: Path) -> None:
    """Write a copy of an ONNX graph with weight matrices, convolutions and embedding tables stored as int8.

    Each output of a weight matrix or convolution, and each row of an embedding table, has its own float32 scale. The
    graph computes in float32, because onnxruntime's dynamic quantisation would change embeddings far more. onnxruntime
    dequantises weight matrices and convolutions when it loads the graph. Each forward pass dequantises only the
    embedding table rows that are needed.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    restored, replaced = [], {}
    for tensor in list(graph.initializer):
        users = [node for node in graph.node if tensor.name in node.input]
        axes = _find_scale_axes(tensor, users)
        if axes is None:
            continue
        name = tensor.name
        weights = numpy_helper.to_array(tensor)  # (K, N), (N, K) or (N, K, height, width)
        scales = np.maximum(np.abs(weights).max(axes, keepdims=True) / 127, 1e-12).astype(np.float32)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(np.round(weights / scales).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
        if users[0].op_type != "Gather":
            restored += _build_dequantization_nodes(f"{name}_int8", f"{name}_scales", name)
            continue
        for node in users:
            rows, row_scales = f"{node.output[0]}_int8", f"{node.output[0]}_scales"
            replaced[node.output[0]] = [
                helper.make_node("Gather", [f"{name}_int8", node.input[1]], [rows]),
                helper.make_node("Gather", [f"{name}_scales", node.input[1]], [row_scales]),
                *_build_dequantization_nodes(rows, row_scales, node.output[0]),
            ]
    nodes = list(restored)
    for node in graph.node:
        nodes += replaced.get(node.output[0], [node])
    del graph.node[:]
    graph.node.extend(nodes)
    is_large = sum(tensor.ByteSize() for tensor in graph.initializer) > EXTERNAL_DATA_BYTES
    onnx.save(model, target, save_as_external_data=is_large, location=f"{target.name}.data")


def _find_scale_axes(tensor: Any, users: list[Any]) -> tuple[int, ...] | None:
    """Return the axes along which the values of a weight share a scale, or None if the weight must stay in float32."""
    from onnx import TensorProto, helper

    is_large = len(tensor.dims) >= 2 and np.prod(tensor.dims) >= MIN_QUANTIZED_VALUES
    if tensor.data_type != TensorProto.FLOAT or not is_large or not users:
        return None
    choices = set()
    for node in users:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        is_matrix = len(tensor.dims) == 2
        if node.op_type == "Conv" and node.input[1] == tensor.name:
            choices.add(("convolution", tuple(range(1, len(tensor.dims)))))
        elif is_matrix and node.op_type == "Gather" and node.input[0] == tensor.name and attributes.get("axis", 0) == 0:
            choices.add(("table", (1,)))
        elif is_matrix and node.op_type in ("MatMul", "Gemm") and node.input[1] == tensor.name:
            choices.add(("matrix", (attributes.get("transB", 0),)))
        else:
            return None
    return choices.pop()[1] if len(choices) == 1 else None


def _build_dequantization_nodes(values: str, scales: str, output: str) -> list[Any]:
    from onnx import TensorProto, helper

    return [
        helper.make_node("Cast", [values], [f"{output}_unscaled"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{output}_unscaled", scales], [output]),
    ]
