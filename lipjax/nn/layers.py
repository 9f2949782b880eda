"""Layers: called with the shape of their input, they declare parameters and return named operators.

`train` says whether a training step builds: what the layer keeps in its state then advances, and a truncated series may
have fewer terms. Heads return one operator without a name.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lipjax import conv, operators
from lipjax.parametrize import lln, residual

Initializer = Callable[..., jax.Array]
NamedOperators = list[tuple[str, Any]]

COLLECTION = "lip"
"""Name of the state collection: warm-started vectors of norm estimates and normalisations, running means."""

orthogonal = nn.initializers.orthogonal


def torch_linear(key, shape, dtype=float):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for (out, in) matrices: torch's default of a linear layer."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * shape[1] ** -0.5


def torch_conv(key, shape, dtype=float):
    """As `torch_linear`, for HWIO kernels: torch's default of a convolution."""
    return jax.random.uniform(key, shape, dtype, -1, 1) * math.prod(shape[:3]) ** -0.5


def dirac(key, shape, dtype=float):
    """The kernel (kh, kw, in, out) of the identity on the first channels of both: one tap of 1 in the middle."""
    del key
    kh, kw, channels, features = shape
    return jnp.zeros(shape, dtype).at[(kh - 1) // 2, (kw - 1) // 2].set(jnp.eye(channels, features, dtype=dtype))


def symmetric_uniform(bound: float) -> Initializer:
    """U(-bound, bound)."""
    return lambda key, shape, dtype=float: jax.random.uniform(key, shape, dtype, -bound, bound)


def zero_bias(fan_in: int) -> Initializer:
    """Biases that start at 0."""
    del fan_in
    return nn.initializers.zeros


def torch_bias(fan_in: int) -> Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): torch's default of the bias of any layer."""
    return symmetric_uniform(fan_in**-0.5)


ELEMENTWISE: dict[str, Callable] = {
    "relu": operators.ReLU,
    "leaky_relu": operators.LeakyReLU,
    "tanh": operators.Tanh,
    "sigmoid": operators.Sigmoid,
    "softplus": operators.Softplus,
}
"""Activations that act on each entry, by name: in_shape -> operator. LipLT takes them; `ACTIVATIONS` keep norms."""


def flatten(in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
    """The layer without parameters that makes vectors of images."""
    return [("flatten", operators.Flatten(tuple(in_shape)))]


def named(module: nn.Module, ops: list) -> NamedOperators:
    """Names operators of a layer: <layer>/linear, or <layer>/<type> for those that move or centre numbers."""
    name = module.name or type(module).__name__
    by_type = operators.Reordering | operators.Centering
    return [(f"{name}/{type(op).__name__.lower() if isinstance(op, by_type) else 'linear'}", op) for op in ops]


_MEAN_RATE = 0.1  # as torch's batch normalisation


def advance_means(state: dict, means: dict[str, jax.Array]) -> dict:
    """The state with the running means of centred layers moved a tenth of the way to those of a batch.

    Args: state: the collection "lip". means: as of `Network.features_and_means`.
    """
    for name, mean in means.items():
        layer = name.split("/")[0]
        running = state[layer]["mean"]
        moved = running + _MEAN_RATE * (jax.lax.stop_gradient(mean).astype(running.dtype) - running)
        state = {**state, layer: {**state[layer], "mean": moved}}
    return state


def contraction(op, train: bool):
    """An operator whose norm is at most 1 by construction: a training step takes that on trust, nothing else does."""
    return operators.Contraction(op) if train else op


def check_counts(module: nn.Module) -> None:
    """Raises: ValueError unless those fields of a module that are numbers of something are whole ones, at least 1."""
    for name in ("features", "hidden", "kernel_size", "strides", "num_classes", "num_layers", "power_iters"):
        value = getattr(module, name, None)
        for n in value if isinstance(value, tuple) else (value,):
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
                raise ValueError(f"{type(module).__name__} expects {name} to be a whole number >= 1, got {value!r}.")


def with_bias(
    module: nn.Module,
    ops: list,
    use_bias: bool,
    activation,
    bias_init: Initializer = nn.initializers.zeros,
    shift: jax.Array | float = 0.0,
) -> NamedOperators:
    """Linear operators, a bias (minus `shift`) and an activation (shape -> operator), named after their layer."""
    name = module.name or type(module).__name__
    ops = named(module, ops)
    shape = ops[-1][1].out_shape
    if use_bias:
        bias = module.param("bias", bias_init, (shape[-1],))
        ops.append((f"{name}/bias", operators.Bias(bias - shift, shape)))
    if activation is not None:
        ops.append((f"{name}/activation", activation(shape)))
    return ops


class Conv(nn.Module):
    """An unconstrained convolution, bias and activation; its norm is estimated and bounded as that of any operator.

    bias_init: fan_in -> initializer; fan_in is the number of entries of the input that an output depends on.
    """

    features: int
    kernel_size: int
    strides: int = 1
    padding: conv.Padding = "ZERO"
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin
    kernel_init: Initializer = orthogonal()
    bias_init: Callable[[int], Initializer] = zero_bias

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        shape = (self.kernel_size, self.kernel_size, in_shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape)
        op = operators.Conv(kernel, tuple(in_shape), self.strides, self.padding)
        return with_bias(self, [op], self.use_bias, self.activation, self.bias_init(math.prod(shape[:3])))


class LinearResidual(nn.Module):
    """One block of LiResNet: `residual.linear_residual`, bias, activation.

    num_layers: the depth of its stack. centering: a training step subtracts the mean over the batch of what the block
    adds to its input, of which the state keeps a running mean; evaluation subtracts that, as part of the bias.
    small_init: weights start at N(0, 1 / fan_in^2) instead of N(0, 1 / fan_in).
    """

    num_layers: int
    kernel_size: int = 3
    centering: bool = False
    small_init: bool = False
    activation: Callable = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        channels = in_shape[-1]
        fan_in = self.kernel_size**2 * channels
        init = nn.initializers.normal(1 / fan_in if self.small_init else fan_in**-0.5)
        weight = self.param("weight", init, (self.kernel_size,) * 2 + (channels,) * 2)
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        kernel = residual.linear_residual(weight, gamma, num_layers=self.num_layers)
        op: Any = operators.Conv(kernel, tuple(in_shape))
        shift: Any = 0.0
        if self.centering:
            mean = self.variable(COLLECTION, "mean", jnp.zeros, (channels,), weight.dtype)
            op, shift = (operators.Centered(op), 0.0) if train else (op, mean.value)
        return with_bias(self, [op], True, self.activation, shift=shift)


class ConventionalResidual(nn.Module):
    """The block that `LinearResidual` is compared with: x + activation(convolution of x + bias).

    Parameters, their scale and their start are those of `LinearResidual`. Its Lipschitz constant is bounded by 1 + the
    norm of the convolution: the sum of the two paths, where `LinearResidual` has the norm of their sum.
    """

    num_layers: int
    kernel_size: int = 3
    small_init: bool = False
    activation: Callable = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        shape, channels = tuple(in_shape), in_shape[-1]
        fan_in = self.kernel_size**2 * channels
        init = nn.initializers.normal(1 / fan_in if self.small_init else fan_in**-0.5)
        weight = self.param("weight", init, (self.kernel_size,) * 2 + (channels,) * 2)
        gamma = self.param("gamma", nn.initializers.ones, (channels,))
        kernel = residual.scaled_kernel(weight, gamma, num_layers=self.num_layers)
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        branch = operators.Conv(kernel, shape), operators.Bias(bias, shape), self.activation(shape)
        return [(f"{self.name or type(self).__name__}/residual", operators.Residual(branch))]


class Dense(nn.Module):
    """An unconstrained dense layer, bias and activation. bias_init: as `Conv`'s."""

    features: int
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin
    kernel_init: Initializer = orthogonal()
    bias_init: Callable[[int], Initializer] = zero_bias

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        matrix = self.param("matrix", self.kernel_init, (self.features, in_shape[-1]))
        bias_init = self.bias_init(in_shape[-1])
        return with_bias(self, [operators.Dense(matrix)], self.use_bias, self.activation, bias_init)


class LinearHead(nn.Module):
    """Logits by rows of length 1 (normalize=True, LLN) or free rows (False), plus a bias. bias_init: as `Conv`'s."""

    num_classes: int
    normalize: bool = True
    bias_init: Callable[[int], Initializer] = zero_bias

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.LinearHead:
        matrix = self.param("matrix", torch_linear, (self.num_classes, in_shape[-1]))
        bias = self.param("bias", self.bias_init(in_shape[-1]), (self.num_classes,))
        return operators.LinearHead(lln.normalize_rows(matrix) if self.normalize else matrix, bias)


class FirstFeatures(nn.Module):
    """Logits that are the first features themselves, without parameters: as many as there are classes."""

    num_classes: int

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> operators.LinearHead:
        if in_shape[-1] < self.num_classes:
            raise ValueError(f"expected at least {self.num_classes} features, one per class, got {in_shape[-1]}.")
        return operators.LinearHead(jnp.eye(self.num_classes, in_shape[-1]), jnp.zeros(self.num_classes))
