"""ONNX nodes of what moves numbers, pools and ends. (Other reorderings need no function: `onnx_registry`.)"""

import math

import numpy as np

from lipjax import operators
from lipjax.shipping.onnx_graph import Graph, channels_last
from lipjax.shipping.onnx_registry import rank, translation_of


@translation_of(operators.Flatten)
def _flatten(op, graph: Graph, x: str) -> str:
    return graph.reshape(graph.transpose(x, channels_last(rank(op))), (0, math.prod(op.in_shape)))


@translation_of(operators.SpaceToDepth)
def _space_to_depth(op, graph: Graph, x: str) -> str:
    (h, w, _), k, c = op.out_shape, op.block, op.in_shape[2]
    y = graph.transpose(graph.reshape(x, (0, c, h, k, w, k)), (0, 1, 3, 5, 2, 4))
    return graph.reshape(y, (0, c * k * k, h, w))


@translation_of(operators.PadChannels)
def _pad_channels(op, graph: Graph, x: str) -> str:
    return graph.pad(x, rank(op), {1: (0, op.channels - op.in_shape[-1])})


@translation_of(operators.ZeroPad)
def _zero_pad(op, graph: Graph, x: str) -> str:
    return graph.pad(x, 4, {2: op.pads[0], 3: op.pads[1]})


@translation_of(operators.CropChannels)
def _crop_channels(op, graph: Graph, x: str) -> str:
    return graph.slice(x, 1, 0, op.channels)


@translation_of(operators.Crop)
def _crop(op, graph: Graph, x: str) -> str:
    for axis, (n, (low, high)) in enumerate(zip(op.in_shape[:2], op.crops, strict=True), 2):
        x = graph.slice(x, axis, low, n - high)
    return x


@translation_of(operators.L2Pool)
def _l2_pool(op, graph: Graph, x: str) -> str:
    (h, w, c), (rows, columns) = op.in_shape, op.regions
    tokens = graph.reshape(graph.add("Mul", x, x), (0, c, rows, h // rows, columns, w // columns))
    total = graph.add("ReduceSum", tokens, graph.constant(np.array([3, 5])), keepdims=0)
    return graph.add("Sqrt", graph.add("Add", total, graph.constant(np.float64(op.delta), "delta")))


@translation_of(operators.LinearHead)
def _linear_head(op, graph: Graph, x: str) -> str:
    return _affine(graph, x, op.matrix, op.bias)


@translation_of(operators.MLPHead)
def _mlp_head(op, graph: Graph, x: str) -> str:
    return _affine(graph, graph.add("Softplus", _affine(graph, x, op.w1, op.b1)), op.w2, op.b2)


def _affine(graph: Graph, x: str, matrix: np.ndarray, bias: np.ndarray) -> str:
    y = graph.add("MatMul", x, graph.constant(matrix.T, "matrix"))
    return graph.add("Add", y, graph.constant(bias[None], "bias"))
