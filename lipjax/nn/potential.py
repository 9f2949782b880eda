"""Layers of two paths through one linear map: SLL and CPL, which are potential steps, and sandwiches.

A training step counts their constants as 1; evaluation estimates them and certification proves them from the arrays
that are stored. For activations with f(c x) = c f(x), c > 0, such as ReLU: scales of channels pass through them.
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
    check_counts,
    dirac,
    symmetric_uniform,
    torch_conv,
    torch_linear,
)
from lipjax.operators.grid import on_grid
from lipjax.parametrize import cayley, cpl, sandwich, sll

# Steps of power iteration before the first step of training.
_START_ITERS = 50
# The part of torch's default start by which sandwiches vary around their identity start.
_NOISE = 0.1
# The Cayley transform of [0, _HALVES I] is [I, I] / sqrt(2).
_HALVES = 1 - 2**0.5
_xavier_normal = nn.initializers.variance_scaling(1.0, "fan_avg", "normal")


def _named(module: nn.Module, kind: str, op) -> NamedOperators:
    return [(f"{module.name or type(module).__name__}/{kind}", op)]


def _activation(module: nn.Module, make: Callable, shape: tuple[int, ...]):
    """The activation. Raises: ValueError for one that scales cannot pass through."""
    activation = make(tuple(shape))
    if not isinstance(activation, operators.Elementwise) or not activation.homogeneous:
        raise ValueError(
            f"{type(module).__name__} takes an activation with f(c x) = c f(x) for c > 0 and slopes in [0, 1], ReLU or "
            f"LeakyReLU with a slope >= 0, got {activation!r}."
        )
    return activation


def _check_vectors(module: nn.Module, in_shape: tuple[int, ...]) -> None:
    if len(in_shape) != 1:
        raise ValueError(
            f"{type(module).__name__} takes vectors: expected an input shape (n,), got {tuple(in_shape)}. "
            "Put `flatten` first."
        )
    check_counts(module)


def _check_images(module: nn.Module, in_shape: tuple[int, ...]) -> None:
    if len(in_shape) != 3:
        raise ValueError(
            f"{type(module).__name__} takes images: expected an input shape (h, w, c), got {tuple(in_shape)}."
        )
    check_counts(module)


def _sigma(module: nn.Module, op, iters: int, train: bool) -> jax.Array:
    """An estimate of a norm, on the grid of its proof; its vector is state, and advances where a training step builds.

    Elsewhere it has converged, and has a margin.
    """
    op = on_grid(op)

    def start():
        v = jax.random.normal(module.make_rng("params"), op.in_shape, jax.tree.leaves(op)[0].dtype)
        return op.estimate(v, _START_ITERS)[1]

    vector = module.variable(COLLECTION, "vector", start)
    if not train:
        return cpl.converged(op, vector.value)
    sigma, advanced = op.estimate(vector.value, iters)
    if not module.is_initializing() and module.is_mutable_collection(COLLECTION):
        vector.value = jax.lax.stop_gradient(advanced)
    return sigma


class SLLDense(nn.Module):
    """x - 2 W^T diag(t) f(W x + b) on vectors, t by row sums (`sll.dense`): an SDP-based Lipschitz layer.

    hidden: rows of W; None for as many as the layer has inputs. epsilon: as of `sll.dense`.

    Source: Araujo et al. 2023, arXiv:2303.03169.
    """

    hidden: int | None = None
    epsilon: float = 0.0
    activation: Callable = operators.ReLU

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_vectors(self, in_shape)
        hidden = in_shape[-1] if self.hidden is None else self.hidden
        raw = self.param("matrix", _xavier_normal, (hidden, in_shape[-1]))
        theta = self.param("theta", nn.initializers.normal(1.0), (hidden,))
        bias = self.param("bias", symmetric_uniform(in_shape[-1] ** -0.5), (hidden,))
        matrix, scale = sll.dense(raw, theta, epsilon=self.epsilon)
        activation = _activation(self, self.activation, (hidden,))
        step = operators.PotentialStep(operators.Dense(matrix), scale * bias, activation, nonexpansive=train)
        return _named(self, "step", step)


class SLLConv(nn.Module):
    """`SLLDense` for images: a convolution, its outputs scaled by `sll.conv`, and its adjoint.

    hidden: channels between the two; None for as many as the images have. strides: of the first convolution; the
    layer's output has the size of its input all the same.

    Source: Araujo et al. 2023, arXiv:2303.03169; with the weights theta that its convolutions are meant to have.
    """

    hidden: int | None = None
    kernel_size: int = 3
    strides: int = 1
    padding: conv.Padding = "ZERO"
    epsilon: float = 0.0
    activation: Callable = operators.ReLU

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_images(self, in_shape)
        hidden, side = in_shape[-1] if self.hidden is None else self.hidden, self.kernel_size
        raw = self.param("kernel", _xavier_normal, (side, side, in_shape[-1], hidden))
        theta = self.param("theta", nn.initializers.normal(1.0), (hidden,))
        bias = self.param("bias", symmetric_uniform(math.prod(raw.shape[:3]) ** -0.5), (hidden,))
        kernel, scale = sll.conv(raw, theta, epsilon=self.epsilon)
        linear = operators.Conv(kernel, tuple(in_shape), self.strides, self.padding)
        activation = _activation(self, self.activation, linear.out_shape)
        return _named(self, "step", operators.PotentialStep(linear, scale * bias, activation, nonexpansive=train))


class CPLDense(nn.Module):
    """x - 2 W^T f(W x + b) / (sigma^2 + epsilon) on vectors, sigma an estimate of the norm: a convex potential layer.

    hidden: as of `SLLDense`. power_iters: steps of the estimate where a training step builds. Elsewhere, and so where a
    network is frozen, it has converged and has a margin (`cpl.converged`), for the constant to be proved as 1.

    Source: Meunier et al. 2022, arXiv:2110.12690.
    """

    hidden: int | None = None
    epsilon: float = cpl.EPSILON
    power_iters: int = 1
    activation: Callable = operators.ReLU

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_vectors(self, in_shape)
        hidden = in_shape[-1] if self.hidden is None else self.hidden
        raw = self.param("matrix", torch_linear, (hidden, in_shape[-1]))
        bias = self.param("bias", symmetric_uniform(in_shape[-1] ** -0.5), (hidden,))
        sigma = _sigma(self, operators.Dense(raw), self.power_iters, train)
        matrix, factor = cpl.contracted(raw, sigma, epsilon=self.epsilon)
        activation = _activation(self, self.activation, (hidden,))
        step = operators.PotentialStep(operators.Dense(matrix), factor * bias, activation, nonexpansive=train)
        return _named(self, "step", step)


class CPLConv(nn.Module):
    """`CPLDense` for images: a convolution and its adjoint. strides: as of `SLLConv`.

    The norm is estimated on the grid where it is proved.

    Source: Meunier et al. 2022, arXiv:2110.12690.
    """

    hidden: int | None = None
    kernel_size: int = 3
    strides: int = 1
    padding: conv.Padding = "ZERO"
    epsilon: float = cpl.EPSILON
    power_iters: int = 1
    activation: Callable = operators.ReLU

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_images(self, in_shape)
        hidden, side, shape = in_shape[-1] if self.hidden is None else self.hidden, self.kernel_size, tuple(in_shape)
        raw = self.param("kernel", torch_conv, (side, side, in_shape[-1], hidden))
        bias = self.param("bias", symmetric_uniform(math.prod(raw.shape[:3]) ** -0.5), (hidden,))
        sigma = _sigma(self, operators.Conv(raw, shape, self.strides, self.padding), self.power_iters, train)
        kernel, factor = cpl.contracted(raw, sigma, epsilon=self.epsilon)
        linear = operators.Conv(kernel, shape, self.strides, self.padding)
        activation = _activation(self, self.activation, linear.out_shape)
        return _named(self, "step", operators.PotentialStep(linear, factor * bias, activation, nonexpansive=train))


def _near_identity(noise: Callable, outputs: int, a: float, b: float) -> Callable:
    """Where [A B], dense (o, columns) or a kernel (kh, kw, columns, o), starts: [a I, b I] and a part of the noise."""

    def start(key, shape, dtype=float):
        *sides, columns, rows = shape if len(shape) == 4 else (1, 1, *shape[::-1])
        taps = [scale * dirac(key, (*sides, n, rows), dtype) for scale, n in ((a, outputs), (b, columns - outputs))]
        stacked = jnp.concatenate(taps, 2)
        return _NOISE * noise(key, shape, dtype) + (stacked if len(shape) == 4 else stacked[0, 0].T)

    return start


class SandwichDense(nn.Module):
    """sqrt(2) A^T e^psi f(sqrt(2) e^-psi B x + b) with orthonormal rows of [A B], by the Cayley transform.

    identity_start: starts near f(x), ours. As published, a layer starts with 2 A^T B at random, which shrinks, so that
    what tells images apart is lost in a network of more than a few of them: no path leads around a sandwich.

    Source: Wang & Manchester 2023, arXiv:2301.11526.
    """

    features: int
    activation: Callable = operators.ReLU
    identity_start: bool = False

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_vectors(self, in_shape)
        features, columns = self.features, self.features + in_shape[-1]
        start = _near_identity(torch_linear, features, 0.0, _HALVES) if self.identity_start else torch_linear
        raw = self.param("matrix", start, (features, columns))
        alpha = self.param("alpha", lambda key: jnp.linalg.norm(raw))
        bias, psi = _bias(self, columns, features)
        linear = operators.Dense(sandwich.dense(raw, alpha, outputs=features))
        activation = _activation(self, self.activation, (features,))
        op = operators.Sandwich(linear, sandwich.bias(bias, psi), activation, features, nonexpansive=train)
        return _named(self, "sandwich", op)


def _bias(module: nn.Module, fan_in: int, features: int) -> tuple[jax.Array, jax.Array]:
    bias = module.param("bias", symmetric_uniform(fan_in**-0.5), (features,))
    return bias, module.param("psi", nn.initializers.zeros, (features,))


class SandwichConv(nn.Module):
    """`SandwichDense` for images, circular: the Cayley transform for each frequency of the response of a kernel.

    strides by space-to-depth; a strided kernel has half the size (at least 1), as `Cayley`'s. identity_start: as of
    `SandwichDense`.

    Source: Wang & Manchester 2023, arXiv:2301.11526.
    """

    features: int
    kernel_size: int = 3
    strides: int = 1
    activation: Callable = operators.ReLU
    identity_start: bool = False

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_images(self, in_shape)
        ops: NamedOperators = []
        shape, side, features = tuple(in_shape), self.kernel_size, self.features
        if self.strides > 1:
            reordered = operators.SpaceToDepth(shape, self.strides)
            ops += _named(self, "spacetodepth", reordered)
            shape, side = reordered.out_shape, max(1, side // self.strides)
        size, columns = (shape[0], shape[1]), features + shape[2]
        start = _near_identity(torch_conv, features, 0.0, _HALVES) if self.identity_start else torch_conv
        raw = self.param("kernel", start, (side, side, columns, features))
        alpha = self.param("alpha", lambda key: cayley.initial_alpha(raw, size))
        bias, psi = _bias(self, side**2 * columns, features)

        def blocks(on):
            return sandwich.blocks(raw, alpha, on, outputs=features, layer_size=size)

        linear = operators.conv_of_blocks(blocks, side, (*size, columns))
        activation = _activation(self, self.activation, linear.out_shape)
        op = operators.Sandwich(linear, sandwich.bias(bias, psi), activation, features, nonexpansive=train)
        return ops + _named(self, "sandwich", op)


class SandwichConvSpatial(nn.Module):
    """A sandwich of convolutions with zero padding: A and B side by side in one kernel, scaled by `sll.conv`.

    Without a Fourier transform, for maps of any size; any numbers of channels in, between (`hidden`, None for
    `features`) and out. strides: of B, so of the map between; the output has the size of the input. identity_start:
    as of `SandwichDense`.

    Source: Wang & Manchester 2023, arXiv:2301.11526, with the scaling of Araujo et al. 2023, arXiv:2303.03169, in the
    place of the Cayley transform.
    """

    features: int
    hidden: int | None = None
    kernel_size: int = 3
    strides: int = 1
    padding: conv.Padding = "ZERO"
    activation: Callable = operators.ReLU
    identity_start: bool = False

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        _check_images(self, in_shape)
        hidden, side, columns = (
            self.features if self.hidden is None else self.hidden,
            self.kernel_size,
            self.features + in_shape[-1],
        )
        start = _near_identity(torch_conv, self.features, 1.0, 1.0) if self.identity_start else torch_conv
        raw = self.param("kernel", start, (side, side, columns, hidden))
        theta = self.param("theta", nn.initializers.zeros, (hidden,))
        bias = self.param("bias", symmetric_uniform((side**2 * columns) ** -0.5), (hidden,))
        kernel, scale = sll.conv(raw, theta)
        linear = operators.Conv(kernel, (*in_shape[:2], columns), self.strides, self.padding)
        activation = _activation(self, self.activation, linear.out_shape)
        op = operators.Sandwich(linear, scale * bias, activation, self.features, nonexpansive=train)
        return _named(self, "sandwich", op)


class SandwichHead(nn.Module):
    """Logits B x + b, B the second part of [A B] with orthonormal rows: the head of sandwich networks.

    Source: Wang & Manchester 2023, arXiv:2301.11526.
    """

    num_classes: int

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.LinearHead:
        _check_vectors(self, in_shape)
        rows, columns = self.num_classes, self.num_classes + in_shape[-1]
        raw = self.param("matrix", torch_linear, (rows, columns))
        alpha = self.param("alpha", lambda key: jnp.linalg.norm(raw))
        bias = self.param("bias", symmetric_uniform(columns**-0.5), (rows,))
        return operators.LinearHead(sandwich.dense(raw, alpha, outputs=rows, room=1.0)[:, rows:], bias)
