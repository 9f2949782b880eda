"""Orthogonal layers with an explicit kernel: ordinary convolutions and dense maps, whose norms are proved as such.

A training step counts their norms as 1, which they do not exceed (up to rounding), converged or not; evaluation
estimates them and certification proves them as those of any `operators.Conv` or `Dense`. The vectors of norm estimates
that scale raw arrays are state: they advance where a training step builds, and only there.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from lipjax import conv, operators
from lipjax.nn.layers import (
    COLLECTION,
    NamedOperators,
    contraction,
    symmetric_uniform,
    torch_bias,
    torch_linear,
    with_bias,
)
from lipjax.parametrize import aoc, bcop, bjorck

# Steps of power iteration before the first step of training; vectors are random until then.
_START_ITERS = 50


def gaussian_direction(key, shape, dtype=float):
    """A random array of norm 1: the start of AOC's projectors in its code."""
    array = jax.random.normal(key, shape, dtype)
    return array / jnp.linalg.norm(array)


def _batched(start: Callable) -> Callable:
    """An initialiser of matrices, for each matrix of an array (n, m, m)."""

    def init(key, shape, dtype=float):
        return jnp.stack([start(k, shape[1:], dtype) for k in jax.random.split(key, shape[0])])

    return init


def _vectors(module: nn.Module, matrices: dict[str, jax.Array], scaling: bjorck.Scaling, iters: int, train: bool):
    """The vectors for matrices by name, from the state; advanced by `iters` steps where a training step builds."""
    if not matrices:
        return {}

    def advanced(vectors, num_iters):
        return {name: bjorck.advance(matrix, vectors[name], num_iters, scaling) for name, matrix in matrices.items()}

    def start():
        key = module.make_rng("params")
        drawn = {
            name: bjorck.init_vectors(matrix.shape, jax.random.fold_in(key, i))
            for i, (name, matrix) in enumerate(matrices.items())
        }
        like = next(iter(matrices.values())).dtype
        return advanced(jax.tree.map(lambda v: v.astype(like), drawn), _START_ITERS)

    kept = module.variable(COLLECTION, "vectors", start)
    vectors = advanced(kept.value, iters if train else 0)
    if train and not module.is_initializing() and module.is_mutable_collection(COLLECTION):
        kept.value = vectors
    return vectors


def _aoc_kernel(module: "AOC", in_channels: int, out_channels: int, train: bool) -> jax.Array:
    """Declares the raw arrays of a module and returns the kernel that its fields say, from in to out channels."""
    sizes, groups = (in_channels, out_channels, module.kernel_size, module.strides), module.groups
    of_layer = {"order": module.order, "groups": groups, "dilation": module.dilation}
    shapes = aoc.raw_shapes(*sizes, rank=module.rank, **of_layer)
    starts = {
        "columns": gaussian_direction,
        "patch": nn.initializers.normal(1.0),
        "squares": _batched(nn.initializers.orthogonal()),
    }
    starts = starts if groups == 1 else {name: _batched(start) for name, start in starts.items()}
    raw = {name: module.param(name, starts[name], shape) for name, shape in shapes.items()}
    method = module.method
    scaled = {name: aoc.matrices(name, a) for name, a in raw.items() if aoc.needs_vectors(name, a.shape, method)}
    vectors = _vectors(module, scaled, bjorck.ORTHOGONIUM, module.power_iters, train)
    return aoc.kernel(raw, vectors, *sizes, method=method, num_iters=module.num_iters, **of_layer)


def _padding(kernel_size: int, strides: int, padding: conv.Padding) -> conv.Padding:
    """None for patches that do not overlap, to which it would add nothing, unless it is circular."""
    return "VALID" if kernel_size == strides and padding != "CIRCULAR" else padding


class AOC(nn.Module):
    """Adaptive orthogonal convolution, bias and activation: strides without a reordering of the map, any kernel size.

    Routed by sizes as orthogonium 0.0.4 (`aoc.raw_shapes`); kernel_size >= strides. kernel_size = strides: patches that
    do not overlap, without padding ("CIRCULAR" wraps instead). rank: of the projectors, None for half of the channels
    that they act on. order: "aoc", or "scfac" for SC-Fac's factors, which needs strides that divide kernel_size.
    method: of `bjorck.orthogonalize`, num_iters the steps of "bjorck". power_iters: of the norm estimates, each step.
    groups, dilation: as of `operators.Conv`; a dilation has no factor in common with strides.

    Source: Boissin et al. 2025, arXiv:2501.07930; Su, Byeon & Huang 2022, arXiv:2106.09121 (SC-Fac; here the matrices
    are orthogonalised by `method` and start at random).
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: conv.Padding = "CIRCULAR"
    rank: int | None = None
    order: str = "aoc"
    method: str = "bjorck"
    num_iters: int = bjorck.NUM_ITERS
    power_iters: int = 3
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin
    groups: int = 1
    dilation: int = 1

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        kernel = _aoc_kernel(self, in_shape[-1], self.features, train)
        place = self.strides, _padding(self.kernel_size, self.strides, self.padding), self.groups, self.dilation
        op = operators.Conv(kernel, tuple(in_shape), *place)
        bias = torch_bias(math.prod(kernel.shape[:3]))
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation, bias)


class AOCTranspose(AOC):
    """Transposed adaptive orthogonal convolution, bias and activation: the adjoint of an `AOC` from features channels.

    Maps grow by strides. output_padding: rows and columns more, from 0 to strides - 1, than the smallest map whose
    convolution has the input's size; 0 with circular padding, where the map grows by strides exactly. Other fields: as
    of `AOC`. The original has zero padding alone, which keeps norms only away from borders.

    Source: Boissin et al. 2025, arXiv:2501.07930.
    """

    output_padding: int = 0

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        kernel = _aoc_kernel(self, self.features, in_shape[-1], train)
        padding, more = _padding(self.kernel_size, self.strides, self.padding), self.output_padding
        if not 0 <= more < (1 if padding == "CIRCULAR" else self.strides):
            raise ValueError(
                f"Expected an output_padding from 0 to strides - 1, and 0 with circular padding, got {more} for "
                f"strides {self.strides} and padding {padding!r}."
            )
        window = conv.window(kernel.shape, self.dilation)
        sides = zip(in_shape[:2], window, conv.explicit_padding(window, padding), strict=True)
        grown = [self.strides * (n - 1) + k - sum(pads) + more for n, k, pads in sides]
        if padding == "CIRCULAR":
            grown = [self.strides * n for n in in_shape[:2]]
        down = operators.Conv(kernel, (*grown, self.features), self.strides, padding, self.groups, self.dilation)
        op = operators.ConvTranspose(down)
        bias = torch_bias(math.prod(kernel.shape[:3]))
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation, bias)


class BCOP(nn.Module):
    """Block convolution orthogonal parametrisation, bias and activation.

    strides by space-to-depth, then a kernel of kernel_size / strides taps a side, as in the original. padding:
    "CIRCULAR" as published, or "ZERO". rank, num_iters: as of `bcop.kernel`. power_iters: steps of the norm estimates
    where a training step builds; the original makes 10 from random vectors every time.

    Source: Li et al. 2019, arXiv:1911.00937.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: conv.Padding = "CIRCULAR"
    rank: int | None = None
    num_iters: int = bcop.NUM_ITERS
    power_iters: int = 3
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        k, s = self.kernel_size, self.strides
        if s < 1 or k < s or k % s:
            raise ValueError(
                f"BCOP reorders strides x strides pixels and takes kernel_size / strides taps of them: expected a "
                f"kernel_size that strides divide, got kernel_size {k} and strides {s}. For k taps of reordered pixels "
                f"take kernel_size = k * strides; AOC takes any kernel_size >= strides."
            )
        ops: list = []
        shape = tuple(in_shape)
        if s > 1:
            ops.append(operators.SpaceToDepth(shape, s))
            shape = ops[0].out_shape
        size = bcop.raw_shape(shape[-1], self.features, k // s)
        start = nn.initializers.orthogonal(size[-1] ** -0.5)
        raw = self.param("matrices", _batched(start), size)
        vectors = _vectors(self, {"matrices": raw}, bjorck.LCONVNET, self.power_iters, train)["matrices"]
        options = {"rank": self.rank, "num_iters": self.num_iters}
        kernel = bcop.kernel(raw, vectors, shape[-1], self.features, **options)
        ops.append(contraction(operators.Conv(kernel, shape, 1, self.padding), train))
        return with_bias(self, ops, self.use_bias, self.activation, symmetric_uniform(self.features**-0.5))


class RKO(nn.Module):
    """Reshaped kernel orthogonalisation, bias and activation: norm at most 1, orthogonal where kernel_size = strides.

    padding: "ZERO", "CIRCULAR", or as `operators.Conv`; none where kernel_size = strides, unless circular. method,
    num_iters, power_iters: as of `AOC`.

    Source: Li et al. 2019, arXiv:1911.00937; Serrurier et al. 2021, arXiv:2006.06520.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    padding: conv.Padding = "CIRCULAR"
    method: str = "bjorck"
    num_iters: int = bjorck.NUM_ITERS
    power_iters: int = 3
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        k, channels = self.kernel_size, in_shape[-1]
        raw = self.param("kernel", nn.initializers.normal(1.0), (k, k, channels, self.features))
        scaled = {"kernel": bjorck.as_matrix(raw)} if bjorck.needs_vectors(self.method) else {}
        vectors = _vectors(self, scaled, bjorck.ORTHOGONIUM, self.power_iters, train).get("kernel", {})
        options = {"method": self.method, "num_iters": self.num_iters}
        kernel = bjorck.rko(raw, vectors, strides=self.strides, **options)
        padding = _padding(self.kernel_size, self.strides, self.padding)
        op = operators.Conv(kernel, tuple(in_shape), self.strides, padding)
        bias = torch_bias(math.prod(raw.shape[:3]))
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation, bias)


class OrthoLinear(nn.Module):
    """Dense layer with orthonormal rows or columns, bias and activation. method, num_iters, power_iters: as of `AOC`.

    Source: Anil, Lucas & Grosse 2019, arXiv:1811.05381 (Björck); orthogonium 0.0.4.
    """

    features: int
    method: str = "bjorck"
    num_iters: int = bjorck.NUM_ITERS
    power_iters: int = 3
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        if len(in_shape) != 1:
            raise ValueError(
                f"OrthoLinear takes vectors: expected an input shape (n,), got {tuple(in_shape)}. Put `flatten` first."
            )
        raw = self.param("matrix", nn.initializers.orthogonal(), (self.features, in_shape[-1]))
        scaled = {"matrix": raw} if bjorck.needs_vectors(self.method) else {}
        vectors = _vectors(self, scaled, bjorck.ORTHOGONIUM, self.power_iters, train).get("matrix", {})
        op = operators.Dense(bjorck.orthogonalize(raw, vectors, self.method, self.num_iters))
        bias = torch_bias(in_shape[-1])
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation, bias)


class OrthoHead(nn.Module):
    """Logits by orthonormal rows (or columns, with more classes than features), by Björck's steps, and a bias.

    num_iters, power_iters: as of `AOC`.
    """

    num_classes: int
    num_iters: int = bjorck.NUM_ITERS
    power_iters: int = 3

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.LinearHead:
        raw = self.param("matrix", torch_linear, (self.num_classes, in_shape[-1]))
        vectors = _vectors(self, {"matrix": raw}, bjorck.ORTHOGONIUM, self.power_iters, train)["matrix"]
        bias = self.param("bias", torch_bias(in_shape[-1]), (self.num_classes,))
        return operators.LinearHead(bjorck.orthogonalize(raw, vectors, "bjorck", self.num_iters), bias)
