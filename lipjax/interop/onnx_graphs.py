"""Networks from ONNX files whose graph is a chain of layers."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from lipjax.errors import UserError, require_extra
from lipjax.interop.assembly import Assembly
from lipjax.interop.comparison import compare_logits
from lipjax.interop.onnx_nodes import DOMAINS, Node, Reader, Tensor
from lipjax.network import Network

# Carried out on labels; the last ones of their inputs are parameters.
_MOVES = {"DepthToSpace", "Flatten", "Gather", "Identity", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze"}
_MOVES |= {"Transpose", "Unsqueeze"}
_FLOATS = (1, 11)  # float32 and float64 as ONNX numbers them
_OPSET = 13  # nodes of earlier ones mean other things


def _constant(value, what: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    raise UserError(f"expected {what} that is constant, got a tensor that the network computes.")


def _optional(inputs: list, place: int) -> np.ndarray | None:
    value = inputs[place] if len(inputs) > place else None
    return None if value is None else _constant(value, "a bias")


def _padding(node: Node) -> tuple[tuple[int, int], tuple[int, int]]:
    auto = node.get("auto_pad", "NOTSET")
    if auto not in ("NOTSET", "VALID"):
        raise UserError(f"auto_pad {auto} is not supported: export it with explicit pads.")
    top, left, bottom, right = node.get("pads", [0, 0, 0, 0]) if auto == "NOTSET" else [0, 0, 0, 0]
    return (top, bottom), (left, right)


def _conv(reader: Reader, node: Node, inputs: list) -> list:
    reader.enter(inputs[0], 4)
    options = {"strides": tuple(node.get("strides", (1, 1))), "padding": _padding(node)}
    options |= {"groups": int(node.get("group", 1)), "dilation": tuple(node.get("dilations", (1, 1)))}
    weight, bias = _constant(inputs[1], "a weight"), _optional(inputs, 2)
    reader.assembly.convolve(node.name, weight, bias, **options)
    return reader.left()


def _gemm(reader: Reader, node: Node, inputs: list) -> list:
    node.expect(transA=0)
    reader.enter(inputs[0], 2)
    weight, bias = _constant(inputs[1], "a weight").astype(np.float64), _optional(inputs, 2)
    weight = node.get("alpha", 1.0) * (weight if node.get("transB", 0) else weight.T)
    if bias is not None:
        bias = np.broadcast_to(node.get("beta", 1.0) * bias.astype(np.float64), (1, len(weight)))[0]
    reader.assembly.dense(node.name, weight, bias)
    return reader.left()


def _matmul(reader: Reader, node: Node, inputs: list) -> list:
    reader.enter(inputs[0] if isinstance(inputs[0], Tensor) else _swapped(), 2)
    reader.assembly.dense(node.name, _constant(inputs[1], "a weight").T, None)
    return reader.left()


def _swapped():
    raise UserError("expected numbers of the network times a constant matrix, in this order.")


def _arithmetic(reader: Reader, node: Node, inputs: list) -> list:
    """Sums, differences, products and quotients with a constant: before all layers they normalise pixels."""
    tensor = next(value for value in inputs if isinstance(value, Tensor))
    constant = _constant(inputs[1] if inputs[0] is tensor else inputs[0], "one operand").astype(np.float64)
    reader.enter(tensor)
    shape = reader.assembly.places.shape
    value = np.broadcast_to(constant, np.broadcast_shapes(constant.shape, (1, *shape)))
    if value.shape != (1, *shape):
        raise UserError(f"expected a constant that broadcasts to {(1, *shape)}, got shape {constant.shape}.")
    value, backwards = value[0], inputs[0] is not tensor
    zero, one = np.zeros(shape), np.ones(shape)
    if node.op_type in ("Add", "Sub") and not backwards or node.op_type == "Add":
        reader.assembly.normalize(node.name, value if node.op_type == "Sub" else -value, one)
    elif node.op_type == "Sub":
        reader.assembly.affine(node.name, -one, value)
    elif node.op_type == "Div" and backwards:
        raise UserError("divides a constant by numbers of the network.")
    elif (value > 0).all():
        reader.assembly.normalize(node.name, zero, value if node.op_type == "Div" else 1 / value)
    else:
        reader.assembly.affine(node.name, 1 / value if node.op_type == "Div" else value, zero)
    return reader.left()


def _batch_norm(reader: Reader, node: Node, inputs: list) -> list:
    node.expect(training_mode=0)
    reader.enter(inputs[0])
    shape = (-1, *[1] * (reader.assembly.places.ndim - 1))
    scale, shift, mean, variance = (_constant(v, "statistics").astype(np.float64).reshape(shape) for v in inputs[1:5])
    factor = scale / np.sqrt(variance + node.get("epsilon", 1e-5))
    reader.assembly.affine(node.name, factor, shift - factor * mean)
    return reader.left()


def _average(reader: Reader, node: Node, inputs: list) -> list:
    node.expect(ceil_mode=0, dilations=[1, 1])
    pads = _padding(node)
    if pads != ((0, 0), (0, 0)) and not node.get("count_include_pad", 0):
        raise UserError("count_include_pad=0 with pads is not supported: windows at the border would weigh more.")
    reader.enter(inputs[0], 4)
    reader.assembly.average(node.name, tuple(node.get("kernel_shape")), tuple(node.get("strides", (1, 1))), pads)
    return reader.left()


def _mean(reader: Reader, node: Node, inputs: list) -> list:
    """The mean over all pixels."""
    axes = node.get("axes") if len(inputs) < 2 or inputs[1] is None else _constant(inputs[1], "axes").tolist()
    reader.enter(inputs[0], 4)
    if node.op_type == "ReduceMean" and sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise UserError(f"expected the mean over the axes 2 and 3 of images, got {axes}.")
    _, height, width = reader.assembly.places.shape
    reader.assembly.average(node.name, (height, width), 1, "VALID")
    if node.op_type == "ReduceMean" and not node.get("keepdims", 1):
        reader.assembly.places = reader.assembly.places[:, 0, 0]
    return reader.left()


def _extreme(reader: Reader, node: Node, inputs: list) -> list:
    """Max and Min of two tensors."""
    if len(inputs) != 2 or not all(isinstance(value, Tensor) for value in inputs):
        raise UserError("expected two tensors to compare, not constants.")
    first, second = reader.plain(*inputs)
    return [reader.compared(node.name, first.labels, second.labels, node.op_type == "Max")]


def _extreme_of_axis(reader: Reader, node: Node, inputs: list) -> list:
    """ReduceMax, ReduceMin and TopK over an axis of two."""
    labels, top = reader.plain(inputs[0])[0].labels, node.op_type == "TopK"
    axes = [node.get("axis", -1)] if top else node.get("axes")
    if not top and len(inputs) > 1 and inputs[1] is not None:
        axes = _constant(inputs[1], "axes").tolist()
    wanted = int(_constant(inputs[1], "k").reshape(-1)[0]) if top else 2
    if axes is None or len(axes) != 1 or labels.shape[axes[0]] != 2 or wanted != 2:
        raise UserError(f"expected an axis of two numbers, got the axes {axes} of shape {labels.shape}.")
    axis = axes[0] % labels.ndim
    pair = np.take(labels, 0, axis), np.take(labels, 1, axis)
    if top:
        node.expect(sorted=1)
        descending = bool(node.get("largest", 1))
        both = [reader.compared(node.name, *pair, larger).labels for larger in (descending, not descending)]
        return [Tensor(np.stack(both, axis), reader.assembly.generation)]
    found = reader.compared(node.name, *pair, node.op_type == "ReduceMax")
    kept = np.expand_dims(found.labels, axis) if node.get("keepdims", 1) else found.labels
    return [Tensor(kept, found.generation)]


def _activation(kind: str, **attributes) -> Callable[..., list]:
    def add(reader: Reader, node: Node, inputs: list) -> list:
        reader.enter(inputs[0])
        reader.assembly.activation(node.name, kind, **{key: node.get(*value) for key, value in attributes.items()})
        return reader.left()

    return add


def _cast(reader: Reader, node: Node, inputs: list) -> list:
    if node.get("to") not in _FLOATS:
        raise UserError("rounds, or leaves floating-point numbers: expected float32 or float64.")
    return [inputs[0]]


def _dropout(reader: Reader, node: Node, inputs: list) -> list:
    if len(inputs) > 2 and inputs[2] is not None and _constant(inputs[2], "a training mode").any():
        raise UserError("is in training mode: export the network for inference.")
    return [inputs[0]]


def _shape(reader: Reader, node: Node, inputs: list) -> list:
    shape = inputs[0].labels.shape
    return [np.array(shape[node.get("start", 0) : node.get("end", len(shape))], np.int64)]


_NODES: dict[str, Callable[[Reader, Node, list], list]] = {
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), _arithmetic),
    **dict.fromkeys((*_MOVES, "Concat"), Reader.move),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _mean),
    **dict.fromkeys(("Max", "Min"), _extreme),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "TopK"), _extreme_of_axis),
    "AveragePool": _average,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Conv": _conv,
    "Dropout": _dropout,
    "Gemm": _gemm,
    "LeakyRelu": _activation("leaky_relu", negative_slope=("alpha", 0.01)),
    "MatMul": _matmul,
    "Relu": _activation("relu"),
    "Shape": _shape,
    "Sigmoid": _activation("sigmoid"),
    "Tanh": _activation("tanh"),
}


def from_onnx(
    path: str | os.PathLike,
    input_shape: tuple[int, ...] | None = None,
    *,
    input_mean=0.0,
    input_std=1.0,
    compare: bool = True,
) -> Network:
    """The network that an ONNX file holds, if it is a chain of the layers that `from_sequential` knows.

    Convolutions, dense layers, activations, averages, normalisations, and whatever moves numbers and sorts them in
    pairs; what is computed from constants alone is computed first. Takes the package onnx: pip install 'lipjax[onnx]'.

    Args:
      path: of the file, opset 13 or later, inference mode, float32 or float64; weights in other files beside it are
        read, too.
      input_shape: of one image, (channels, height, width) or (features,), where the file leaves it open.
      input_mean, input_std: what is done to pixels in [0, 1] before the graph: numbers, or one for each channel.
      compare: run the graph on some random images by ONNX's reference implementation, and raise where logits differ.
    Returns: a Network as of `from_sequential`: images (b, height, width, channels), pixels in [0, 1].
    Raises: UserError naming the node that is not supported; MissingExtra without the package.
    Example:
      >>> from lipjax import interop
      >>> interop.from_onnx("nowhere.onnx")
      Traceback (most recent call last):
      ...
      lipjax.errors.UserError: nowhere.onnx holds no ONNX network: [Errno 2] No such file or directory: 'nowhere.onnx'
    """
    require_extra("onnx", "onnx")
    import onnx
    import onnx.inliner
    import onnx.reference

    try:
        model = onnx.load(os.fspath(path))
        onnx.checker.check_model(model)
    except Exception as error:  # of protobuf's own classes, too
        raise UserError(f"{os.fspath(path)} holds no ONNX network: {error}") from error
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    opsets = [item.version for item in model.opset_import if item.domain in DOMAINS]
    if not opsets or min(opsets) < _OPSET:
        raise UserError(f"Expected opset {_OPSET} or later, got {opsets}: export it anew.")
    graph = model.graph
    constants = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise UserError(f"Expected a graph of one input and one output, got {len(inputs)} and {len(graph.output)}.")
    kind = inputs[0].type.tensor_type
    sizes = [dim.dim_value for dim in kind.shape.dim]
    if kind.elem_type not in _FLOATS or not sizes or sizes[0] not in (0, 1):
        raise UserError("Expected an input of float32 or float64 whose first axis, the batch, is open or 1.")
    shape = tuple(sizes[1:] if input_shape is None else input_shape)
    if 0 in shape:
        raise UserError(f"The file leaves sizes of its input open, {shape}: give an input_shape.")
    assembly = Assembly(shape, input_mean, input_std)
    start = Tensor(assembly.places[None], assembly.generation)
    reader = Reader(model, assembly, {**constants, inputs[0].name: start}, _NODES)
    for node in graph.node:
        reader.read(node)
    with _named(f"Output {graph.output[0].name!r}"):
        reader.enter(reader.value(graph.output[0].name))
    network = assembly.finish()
    if compare:
        evaluator = onnx.reference.ReferenceEvaluator(model)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)

        def run(x: np.ndarray) -> np.ndarray:
            found: list[Any] = [evaluator.run(None, {inputs[0].name: image[None].astype(dtype)}) for image in x]
            return np.concatenate([outputs[0] for outputs in found])

        compare_logits(network, shape, (input_mean, input_std), run, "ONNX's reference implementation")
    return network


@contextlib.contextmanager
def _named(label: str):
    try:
        yield
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
