"""8-bit weights for ONNX graphs that still compute in float32.

onnxruntime's dynamic quantisation also rounds activations, which changes embeddings far more than rounding the weights
does. A graph from `quantize_weights` is as small, and its embeddings are almost the same. When onnxruntime loads the
graph, it restores all float32 weights except embedding tables, of which each forward pass restores the rows it reads.
"""

from pathlib import Path
from typing import Any

import numpy as np

MIN_VALUES = 1024  # smaller weights stay in float32


def quantize_weights(source: Path, target: Path) -> None:
    """Write a copy of an ONNX graph in which weight matrices and embedding tables are stored as int8.

    Each output of a weight matrix and each row of an embedding table has its own float32 scale. The graph must be
    smaller than 2 GB.
    """
    import onnx
    from onnx import helper, numpy_helper

    model = onnx.load(source)
    graph = model.graph
    restored, replaced = [], {}
    for tensor in list(graph.initializer):
        users = [node for node in graph.node if tensor.name in node.input]
        axis = _find_input_axis(tensor, users)
        if axis is None:
            continue
        name = tensor.name
        weights = numpy_helper.to_array(tensor)  # (K, N) or (N, K)
        scales = np.maximum(np.abs(weights).max(axis, keepdims=True) / 127, 1e-12).astype(np.float32)
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(np.round(weights / scales).astype(np.int8), f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scales"))
        if users[0].op_type != "Gather":
            restored += _build_restoring_nodes(f"{name}_int8", f"{name}_scales", name)
            continue
        for node in users:
            rows, row_scales = f"{node.output[0]}_int8", f"{node.output[0]}_scales"
            replaced[node.output[0]] = [
                helper.make_node("Gather", [f"{name}_int8", node.input[1]], [rows]),
                helper.make_node("Gather", [f"{name}_scales", node.input[1]], [row_scales]),
                *_build_restoring_nodes(rows, row_scales, node.output[0]),
            ]
    nodes = list(restored)
    for node in graph.node:
        nodes += replaced.get(node.output[0], [node])
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(model)
    onnx.save(model, target)


def _find_input_axis(tensor: Any, users: list[Any]) -> int | None:
    """Return the axis of a weight over which its values share a scale, or None if it must stay in float32.

    That is the axis of the inputs of a weight matrix, or the axis of the dimensions of an embedding table.
    """
    from onnx import TensorProto, helper

    is_large_matrix = len(tensor.dims) == 2 and np.prod(tensor.dims) >= MIN_VALUES
    if tensor.data_type != TensorProto.FLOAT or not is_large_matrix or not users:
        return None
    axes = set()
    for node in users:
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Gather" and node.input[0] == tensor.name and attributes.get("axis", 0) == 0:
            axes.add(("table", 1))
        elif node.op_type in ("MatMul", "Gemm") and node.input[1] == tensor.name:
            axes.add(("matrix", attributes.get("transB", 0)))
        else:
            return None
    return axes.pop()[1] if len(axes) == 1 else None


def _build_restoring_nodes(values: str, scales: str, output: str) -> list[Any]:
    """Return the nodes that compute output = float32(values) * scales."""
    from onnx import TensorProto, helper

    return [
        helper.make_node("Cast", [values], [f"{output}_unscaled"], to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{output}_unscaled", scales], [output]),
    ]
