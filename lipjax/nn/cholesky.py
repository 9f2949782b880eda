"""Layers whose linear map is nearly orthogonal by Cholesky orthogonalisation: contractive, not orthogonal.

A training step counts their norms as 1, which they do not exceed; evaluation estimates them and certification proves
them as those of any `operators.Dense` or `Conv`.
"""

from collections.abc import Callable

import flax.linen as nn

from lipjax import operators
from lipjax.nn.layers import NamedOperators, contraction, named, with_bias
from lipjax.parametrize import cholesky


class CholeskyConv(nn.Module):
    """Convolution of patches that do not overlap (strides = kernel_size, no padding), without bias or activation."""

    features: int
    kernel_size: int

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        side, channels = self.kernel_size, in_shape[-1]
        init = nn.initializers.normal((side**2 * channels) ** -0.5)
        kernel = self.param("kernel", init, (side, side, channels, self.features))
        op = operators.Conv(cholesky.patches(kernel), tuple(in_shape), side, "VALID")
        return named(self, [contraction(op, train)])


class CholeskyDense(nn.Module):
    """Dense layer, bias and activation."""

    features: int
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        init = nn.initializers.normal(in_shape[-1] ** -0.5)
        matrix = self.param("matrix", init, (self.features, in_shape[-1]))
        op = operators.Dense(cholesky.dense(matrix))
        return with_bias(self, [contraction(op, train)], True, self.activation)


class CholeskyStack(nn.Module):
    """num_layers times `cholesky.residual`, bias, activation, named <stack>_01/linear and so on.

    One array holds the weights of all layers, which are orthogonalised together.
    """

    num_layers: int
    activation: Callable = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        layers, width = self.num_layers, in_shape[-1]
        weight = self.param("weight", nn.initializers.normal(1 / width), (layers, width, width))
        gamma = self.param("gamma", nn.initializers.ones, (layers, width))
        bias = self.param("bias", nn.initializers.zeros, (layers, width))
        matrices = cholesky.residual(weight, gamma, num_layers=layers)
        ops: NamedOperators = []
        for i in range(layers):
            name, shape = f"{self.name}_{i + 1:02d}", (width,)
            ops.append((f"{name}/linear", contraction(operators.Dense(matrices[i]), train)))
            ops.append((f"{name}/bias", operators.Bias(bias[i], shape)))
            ops.append((f"{name}/activation", self.activation(shape)))
        return ops
