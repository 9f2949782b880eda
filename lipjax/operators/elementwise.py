"""Activations that act on every component alone, with slopes in an interval: what LipLT composes bounds of.

`slope` is the least interval [alpha, beta] with alpha (s - t) <= f(s) - f(t) <= beta (s - t) for all real s >= t.
"""

import math
import numbers

import jax
import jax.numpy as jnp

from lipjax.numerics import ENLARGEMENT, UNIT_ROUNDOFF
from lipjax.operators.base import Elementwise, check_input, norm_per_image, operator
from lipjax.operators.softplus import SIGMOID_ERROR, TANH_ERROR, sigmoid, softplus, softplus_error, tanh


def _error_of_components(x, error: float):
    """The l2 error (b,) of images each of whose components errs by at most `error`."""
    return jnp.full(x.shape[0], ENLARGEMENT * error * math.sqrt(math.prod(x.shape[1:])), x.dtype)


@operator(static=("in_shape",))
class ReLU(Elementwise):
    """max(x, 0), with derivative 0 at 0."""

    in_shape: tuple[int, ...]
    homogeneous = True

    @property
    def slope(self):
        return 0.0, 1.0

    def __call__(self, x):
        check_input(self, x)
        return jax.nn.relu(x)

    def rounding_error(self, x):
        return jnp.zeros(x.shape[0], x.dtype)


@operator(static=("in_shape", "negative_slope"))
class LeakyReLU(Elementwise):
    """x where it is positive, negative_slope x elsewhere, with derivative negative_slope at 0.

    negative_slope: a number in [-1, 1]; 0 makes it ReLU, -1 the absolute value.
    """

    in_shape: tuple[int, ...]
    negative_slope: float = 0.01
    homogeneous = True

    def __post_init__(self):
        number = isinstance(self.negative_slope, numbers.Real) and not isinstance(self.negative_slope, bool)
        if not number or not -1 <= self.negative_slope <= 1:
            raise ValueError(
                f"LeakyReLU expects a negative_slope between -1 and 1, got {self.negative_slope!r}: leave a larger "
                "factor to the layer after it."
            )

    @property
    def slope(self):
        return float(self.negative_slope), 1.0

    def __call__(self, x):
        check_input(self, x)
        return jnp.where(x > 0, x, self.negative_slope * x)

    def rounding_error(self, x):
        return ENLARGEMENT * UNIT_ROUNDOFF * abs(self.negative_slope) * norm_per_image(jnp.minimum(x, 0.0))


@operator(static=("in_shape",))
class Tanh(Elementwise):
    """The hyperbolic tangent."""

    in_shape: tuple[int, ...]

    @property
    def slope(self):
        return 0.0, 1.0

    def __call__(self, x):
        check_input(self, x)
        return tanh(x)

    def rounding_error(self, x):
        return _error_of_components(x, TANH_ERROR)


@operator(static=("in_shape",))
class Sigmoid(Elementwise):
    """The logistic function 1 / (1 + exp(-x))."""

    in_shape: tuple[int, ...]

    @property
    def slope(self):
        return 0.0, 0.25

    def __call__(self, x):
        check_input(self, x)
        return sigmoid(x)

    def rounding_error(self, x):
        return _error_of_components(x, SIGMOID_ERROR)


@operator(static=("in_shape",))
class Softplus(Elementwise):
    """log(1 + exp(x))."""

    in_shape: tuple[int, ...]

    @property
    def slope(self):
        return 0.0, 1.0

    def __call__(self, x):
        check_input(self, x)
        return softplus(x)

    def rounding_error(self, x):
        return ENLARGEMENT * norm_per_image(softplus_error(softplus(x)))
