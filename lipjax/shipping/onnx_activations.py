"""ONNX nodes of activations, those of single components and those of pairs of channels."""

import numpy as np

from lipjax import operators
from lipjax.shipping.onnx_graph import Graph
from lipjax.shipping.onnx_registry import rank, translation_of


@translation_of(operators.ReLU)
def _relu(op, graph: Graph, x: str) -> str:
    return graph.add("Relu", x)


@translation_of(operators.LeakyReLU)
def _leaky_relu(op, graph: Graph, x: str) -> str:
    return graph.add("LeakyRelu", x, alpha=float(op.negative_slope))


@translation_of(operators.Tanh, operators.Sigmoid, operators.Softplus)
def _of_a_library(op, graph: Graph, x: str) -> str:
    return graph.add(type(op).__name__, x)


@translation_of(operators.PartialAbs)
def _partial_abs(op, graph: Graph, x: str) -> str:
    if op.channels in (0, op.in_shape[-1]):
        return graph.add("Abs", x) if op.channels else graph.add("Identity", x)
    first, rest = graph.slice(x, 1, 0, op.channels), graph.slice(x, 1, op.channels, op.in_shape[-1])
    return graph.add("Concat", graph.add("Abs", first), rest, axis=1)


@translation_of(operators.NActivation)
def _n_activation(op, graph: Graph, x: str) -> str:
    below, above = (
        graph.add("Sub", x, graph.per_channel(2 * array, rank(op), name))
        for array, name in ((op.lower, "lower"), (op.upper, "upper"))
    )
    return graph.add("Max", above, graph.add("Min", below, graph.add("Neg", x)))


@translation_of(operators.LinearSpline)
def _linear_spline(op, graph: Graph, x: str) -> str:
    (channels, knots), axes = op.values.shape, rank(op)
    # (-x)(-a) for ax, and -(y/(-a)) for y/a, bit for bit: onnxruntime would multiply the kernel of a convolution before
    # it by a, and join a division by one number to the matrix behind it, which the bounds of float32 do not cover.
    middle, minus = (knots - 1) // 2, graph.per_channel(-op.scale, axes, "minus_scale")
    scaled = graph.add("Mul", graph.add("Neg", x), minus)
    places = graph.add("Div", scaled, graph.constant(np.float64(op.spacing), "spacing"))
    ends = (graph.constant(np.float64(end)) for end in (-middle, middle - 1))
    first = graph.add("Clip", graph.add("Floor", places), *ends)
    rows = graph.per_channel(knots * np.arange(channels) + middle, axes, "rows")
    index = graph.add("Add", graph.add("Cast", first, to=7), rows)  # 7: int64
    flat = graph.constant(op.values.reshape(-1), "values")
    left, right = (
        graph.add("Gather", flat, place) for place in (index, graph.add("Add", index, graph.constant(np.array(1))))
    )
    slope = graph.add("Mul", graph.add("Sub", places, first), graph.add("Sub", right, left))
    return graph.add("Neg", graph.add("Div", graph.add("Add", left, slope), minus))


@translation_of(operators.MaxMin)
def _max_min(op, graph: Graph, x: str) -> str:
    pair = graph.halves(x, op.in_shape[-1])
    return graph.add("Concat", graph.add("Max", *pair), graph.add("Min", *pair), axis=1)


@translation_of(operators.MaxPoolPairs)
def _max_pool_pairs(op, graph: Graph, x: str) -> str:
    return graph.add("Max", *graph.halves(x, op.in_shape[-1]))


class _Plane:
    """Arithmetic on the pairs (a, b) of an input, with numbers for each pair in float32, as the operators do it."""

    def __init__(self, op, graph: Graph, x: str):
        self.graph, self.rank = graph, rank(op)
        self.a, self.b = graph.halves(x, op.in_shape[-1])

    def number(self, value) -> str:
        return value if isinstance(value, str) else self.graph.per_channel(np.float32(value), self.rank)

    def mul(self, left, right) -> str:
        return self.graph.add("Mul", self.number(left), self.number(right))

    def plus(self, left, right) -> str:
        return self.graph.add("Add", self.number(left), self.number(right))

    def minus(self, left, right) -> str:
        return self.graph.add("Sub", self.number(left), self.number(right))

    def compare(self, kind: str, left, right=0.0) -> str:
        return self.graph.add(kind, self.number(left), self.number(right))

    def where(self, condition: str, left, right) -> str:
        return self.graph.add("Where", condition, self.number(left), self.number(right))

    def join(self, first: str, second: str) -> str:
        return self.graph.add("Concat", first, second, axis=1)


def _squared(direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d^2 / |d|^2 of complex numbers, in float32, as `activations` computes it."""
    along, across = direction
    size = along * along + across * across
    return (along * along - across * across) / size, 2 * along * across / size


@translation_of(operators.Householder)
def _householder(op, graph: Graph, x: str) -> str:
    at, direction = _Plane(op, graph, x), op.direction.astype(np.float32)
    left = at.compare("GreaterOrEqual", at.minus(at.mul(direction[0], at.b), at.mul(direction[1], at.a)))
    real, imag = _squared(direction)
    first = at.where(left, at.a, at.plus(at.mul(real, at.a), at.mul(imag, at.b)))
    return at.join(first, at.where(left, at.b, at.minus(at.mul(imag, at.a), at.mul(real, at.b))))


@translation_of(operators.Householder2)
def _householder2(op, graph: Graph, x: str) -> str:
    at, (p, q, r) = _Plane(op, graph, x), op.directions.astype(np.float32)
    along = at.plus(at.mul(p[0], at.a), at.mul(p[1], at.b))
    across = at.minus(at.mul(p[0], at.b), at.mul(p[1], at.a))
    left = at.compare("GreaterOrEqual", across)
    edge = at.where(left, q[0], -r[0]), at.where(left, q[1], r[1])
    turn = at.minus(at.mul(edge[0], graph.add("Abs", across)), at.mul(edge[1], along))
    tie = graph.add("And", at.compare("Equal", turn), at.compare("Greater", along))
    cone = graph.add("Or", at.compare("Less", turn), tie)
    qr = q[0] * r[0] - q[1] * r[1], q[0] * r[1] + q[1] * r[0]
    beyond = at.compare("Greater", at.minus(at.mul(qr[0], across), at.mul(qr[1], along)))
    p, q, r = map(_squared, (p, q, r))
    pq = p[0] * q[0] - p[1] * q[1], p[0] * q[1] + p[1] * q[0]
    one, zero = np.ones_like(p[0]), np.zeros_like(p[0])
    real = at.where(cone, at.where(left, one, p[0]), at.where(beyond, r[0], pq[0]))
    imag = at.where(cone, at.where(left, zero, p[1]), at.where(beyond, -r[1], pq[1]))
    keep = graph.add("Or", graph.add("And", cone, left), graph.add("And", graph.add("Not", cone), beyond))
    b = at.where(keep, at.b, graph.add("Neg", at.b))
    first = at.minus(at.mul(real, at.a), at.mul(imag, b))
    return at.join(first, at.plus(at.mul(imag, at.a), at.mul(real, b)))


@translation_of(operators.ProjectionPool)
def _projection_pool(op, graph: Graph, x: str) -> str:
    at, direction = _Plane(op, graph, x), op.direction.astype(np.float32)
    cos, sin = direction / np.sqrt(direction[0] * direction[0] + direction[1] * direction[1])
    sizes = graph.add("Abs", at.a), graph.add("Abs", at.b)
    large, small = graph.add("Max", *sizes), graph.add("Min", *sizes)
    ratio = graph.add("Div", small, at.where(at.compare("Greater", large), large, 1.0))
    length = at.mul(large, graph.add("Sqrt", at.plus(1.0, at.mul(ratio, ratio))))
    behind = at.compare("Less", at.plus(at.mul(cos, at.a), at.mul(sin, sizes[1])))
    return at.where(behind, length, at.minus(at.mul(cos, sizes[1]), at.mul(sin, at.a)))
