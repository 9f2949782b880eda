"""ONNX nodes of linear maps and translations."""

import numpy as np

from lipjax import _dft, conv, operators
from lipjax.shipping.onnx_graph import Graph
from lipjax.shipping.onnx_registry import rank, translation_of


@translation_of(operators.Normalize)
def _normalize(op, graph: Graph, x: str) -> str:
    mean, std = (graph.per_channel(array, rank(op), name) for array, name in ((op.mean, "mean"), (op.std, "std")))
    return graph.add("Div", graph.add("Sub", x, mean), std)


@translation_of(operators.Bias)
def _bias(op, graph: Graph, x: str) -> str:
    return graph.add("Add", x, graph.per_channel(op.bias, rank(op), "bias"))


@translation_of(operators.PositionalBias)
def _positional_bias(op, graph: Graph, x: str) -> str:
    return graph.add("Add", x, graph.constant(op.bias.transpose(2, 0, 1)[None], "bias"))


@translation_of(operators.Dense)
def _dense(op, graph: Graph, x: str) -> str:
    return graph.add("MatMul", x, graph.constant(op.matrix.T, "matrix"))


def _wrapped(graph: Graph, x: str, size: tuple[int, ...], pads) -> str:
    """Images of a size with a margin from the other side."""
    for axis, (n, (low, high)) in enumerate(zip(size, pads, strict=True), 2):
        if low or high:
            x = graph.add("Gather", x, graph.constant(np.arange(-low, n + high) % n, "places"), axis=axis)
    return x


def _convolve(graph: Graph, x: str, kernel, size, *, strides=1, padding="ZERO", groups=1, dilation=1) -> str:
    """`conv.conv2d` of images of a size (h, w)."""
    pads = conv.explicit_padding(conv.window(kernel.shape, dilation), padding)
    if padding == "CIRCULAR":
        x, pads = _wrapped(graph, x, size, pads), ((0, 0), (0, 0))
    weight = graph.constant(kernel.transpose(3, 2, 0, 1), "kernel")
    return graph.add("Conv", x, weight, **_conv_attributes(kernel, pads, strides, groups, dilation))


def _conv_attributes(kernel, pads, strides, groups: int, dilation) -> dict:
    (top, bottom), (left, right) = pads
    return {
        "kernel_shape": list(kernel.shape[:2]),
        "pads": [top, left, bottom, right],
        "strides": list(conv.stride_pair(strides)),
        "dilations": list(conv.dilation_pair(dilation)),
        "group": groups,
    }


@translation_of(operators.Conv)
def _conv(op, graph: Graph, x: str) -> str:
    options = {"strides": op.strides, "padding": op.padding, "groups": op.groups, "dilation": op.dilation}
    return _convolve(graph, x, op.kernel, op.in_shape[:2], **options)


@translation_of(operators.ConvTranspose)
def _conv_transpose(op, graph: Graph, y: str) -> str:
    down, circular = op.conv, op.conv.padding == "CIRCULAR"
    reads, steps = conv.window(down.kernel.shape, down.dilation), conv.stride_pair(down.strides)
    pads = conv.explicit_padding(reads, down.padding)
    wrapped, pads = (pads, ((0, 0), (0, 0))) if circular else (((0, 0), (0, 0)), pads)
    sizes = [n + sum(wrap) for n, wrap in zip(down.in_shape[:2], wrapped, strict=True)]
    sides = zip(sizes, op.in_shape[:2], steps, reads, pads, strict=True)
    left_over = [n - ((m - 1) * step + read - sum(pad)) for n, m, step, read, pad in sides]
    attributes = _conv_attributes(down.kernel, pads, down.strides, down.groups, down.dilation)
    weight = graph.constant(down.kernel.transpose(3, 2, 0, 1), "kernel")
    y = graph.add("ConvTranspose", y, weight, output_padding=left_over, **attributes)
    for axis, (n, (low, high)) in enumerate(zip(down.in_shape[:2], wrapped, strict=True), 2):
        if low or high:  # what reaches beyond a side comes in on the other: sums of a few numbers
            fold = np.zeros((n + low + high, n))
            fold[np.arange(n + low + high), np.arange(-low, n + high) % n] = 1
            last = [0, 1, 5 - axis, axis]
            y = graph.transpose(graph.add("MatMul", graph.transpose(y, last), graph.constant(fold, "fold")), last)
    return y


@translation_of(operators.ConvExponential)
def _conv_exponential(op, graph: Graph, x: str) -> str:
    def skew(z: str) -> str:
        return _convolve(graph, z, op.kernel, op.in_shape[:2], padding=op.padding, groups=op.groups)

    z = x
    for k in range(op.num_terms, 1, -1):
        z = graph.add("Add", x, graph.add("Div", skew(z), graph.constant(np.float64(k), "k")))
    return graph.add("Add", x, skew(z))


@translation_of(operators.CircularConv)
def _circular_conv(op, graph: Graph, x: str) -> str:
    size, out, (r, q) = op.in_shape[:2], op.out_shape[2], (len(op.fixed), len(op.paired))
    z = graph.reshape(_spectrum(graph, x, size), (r + 2 * q, -1, op.in_shape[2]))
    real = graph.add("MatMul", graph.slice(z, 0, 0, r), graph.constant(op.fixed.swapaxes(1, 2), "fixed"))
    rows = [graph.reshape(real, (r, -1))]
    if q:
        both = graph.reshape(graph.slice(z, 0, r, r + 2 * q), (q, 2, -1, op.in_shape[2]))
        parts = [graph.add("Squeeze", graph.slice(both, 1, i, i + 1), graph.constant(np.array([1]))) for i in (0, 1)]
        blocks = [graph.constant(op.paired[:, i].swapaxes(1, 2), "paired") for i in (0, 1)]
        (rr, ri), (ir, ii) = ([graph.add("MatMul", part, block) for block in blocks] for part in parts)
        pair = graph.add("Sub", rr, ii), graph.add("Add", ri, ir)
        stacked = graph.add("Concat", *(graph.reshape(half, (q, 1, -1)) for half in pair), axis=1)
        rows.append(graph.reshape(stacked, (2 * q, -1)))
    return _image(graph, graph.add("Concat", *rows, axis=0), size, out)


def _spectrum(graph: Graph, x: str, size: tuple[int, int]) -> str:
    """`_dft.spectrum` of images (b, c, h, w): (h w, b c)."""
    (h, w), (rows, *columns) = size, _dft.factors(size)
    if not columns:
        return _product(graph, rows, graph.reshape(graph.transpose(x, (2, 3, 0, 1)), (h * w, -1)))
    z = _product(graph, rows, graph.reshape(graph.transpose(x, (3, 2, 0, 1)), (w, -1)))
    return graph.reshape(_down_columns(graph, z, size, columns), (h * w, -1))


def _image(graph: Graph, z: str, size: tuple[int, int], channels: int) -> str:
    """`_dft.image`: of (h w, b c), images (b, c, h, w)."""
    (h, w), (rows, *columns) = size, (table.swapaxes(-1, -2) for table in _dft.factors(size))
    if not columns:
        return graph.transpose(graph.reshape(_product(graph, rows, z), (h, w, -1, channels)), (2, 3, 0, 1))
    z = _down_columns(graph, graph.reshape(z, (w, -1)), size, columns)
    return graph.transpose(graph.reshape(_product(graph, rows, z), (w, h, -1, channels)), (2, 3, 1, 0))


def _product(graph: Graph, table: np.ndarray, z: str) -> str:
    return graph.add("MatMul", graph.constant(table, "transform"), z)


def _down_columns(graph: Graph, z: str, size: tuple[int, int], tables: list[np.ndarray]) -> str:
    """The transform down the columns of (w, h b c), of the same shape: see `_dft`."""
    h, w = size
    if len(tables) == 1:
        return graph.reshape(_product(graph, tables[0], graph.reshape(z, (w // 2, 2 * h, -1))), (w, -1))
    s = len(tables[0]) // h
    rows = [graph.reshape(_product(graph, tables[0], graph.reshape(graph.slice(z, 0, 0, s), (s * h, -1))), (s, -1))]
    if w > s:
        others = graph.reshape(graph.slice(z, 0, s, w), ((w - s) // 2, 2 * h, -1))
        rows.append(graph.reshape(_product(graph, tables[1], others), (w - s, -1)))
    return graph.add("Concat", *rows, axis=0)
