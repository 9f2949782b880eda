"""Layers whose channels are rescaled to a norm of at most 1 (AOL): ordinary convolutions and dense maps.

A training step counts their norms as 1, which they do not exceed up to rounding; evaluation estimates them and
certification proves them as those of any `operators.Conv` or `Dense`, which are usually below 1.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from lipjax import conv, operators
from lipjax.nn.layers import NamedOperators, check_counts, contraction, dirac, with_bias
from lipjax.parametrize import aol


class AOLConv(nn.Module):
    """Convolution with rescaled channels, bias and activation: any kernel size, padding and map.

    kernel_size: a number, or one per axis. rows, iterations: as of `aol.rescale_kernel`. Strides leave outputs out of
    the rescaled convolution, which loses more of its norm; space-to-depth before stride 1 loses less. Starts from
    single taps: random kernels shrink to norms of 0.3 to 0.5.

    Source: Prach & Lampert 2022, arXiv:2208.03160.
    """

    features: int
    kernel_size: int | tuple[int, int] = 3
    strides: int = 1
    padding: conv.Padding = "CIRCULAR"
    rows: str = "inputs"
    iterations: int = 1
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        check_counts(self)
        if len(in_shape) != 3:
            raise ValueError(f"AOLConv takes images: expected an input shape (h, w, c), got {tuple(in_shape)}.")
        sides = (self.kernel_size,) * 2 if isinstance(self.kernel_size, int) else tuple(self.kernel_size)
        raw = self.param("kernel", dirac, (*sides, in_shape[-1], self.features))
        kernel = aol.rescale_kernel(raw, rows=self.rows, iterations=self.iterations)
        op = operators.Conv(kernel, tuple(in_shape), self.strides, self.padding)
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation, nn.initializers.zeros)


class AOLDense(nn.Module):
    """Dense layer with rescaled inputs or outputs, bias and activation. rows, iterations: as of `AOLConv`.

    Source: Prach & Lampert 2022, arXiv:2208.03160.
    """

    features: int
    rows: str = "inputs"
    iterations: int = 1
    use_bias: bool = True
    activation: Callable | None = operators.MaxMin

    @nn.compact
    def __call__(self, in_shape: tuple[int, ...], train: bool = False) -> NamedOperators:
        check_counts(self)
        if len(in_shape) != 1:
            raise ValueError(
                f"AOLDense takes vectors: expected an input shape (n,), got {tuple(in_shape)}. Put `flatten` first."
            )
        raw = self.param("matrix", lambda key, shape: jnp.eye(*shape), (self.features, in_shape[-1]))
        op = operators.Dense(aol.rescale_matrix(raw, rows=self.rows, iterations=self.iterations))
        return with_bias(self, [contraction(op, train)], self.use_bias, self.activation, nn.initializers.zeros)
