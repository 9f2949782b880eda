"""Softplus, the logistic function and tanh in float64 with stated errors: none is stated for a library's exp and log.

Made of additions, multiplications, divisions, comparisons and a table, so that docs/soundness.md can derive the errors.
The functions take NumPy arrays (then `xp` is numpy) or JAX arrays.
"""

import decimal
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lipjax.numerics import UNIT_ROUNDOFF

# exp(-t) counts as 0 from here on: exp(-40) is below u / 26.
_FAR = 40
# exp(-t) = exp(-k / 8) exp(-r) with r in [0, 1/8): of the series of exp(-r) what is left out is below r^11 / 11!.
_STEPS = 8
_EXP = tuple((-1) ** j / math.factorial(j) for j in range(11))
# log1p(y) = 2 atanh(v), v = y / (2 + y) <= 1/3: what is left out is below 2 v^35 / (35 (1 - v^2)).
_ATANH = tuple(1 / (2 * j + 1) for j in range(17))

SIGMOID_ERROR = 8 * UNIT_ROUNDOFF
"""Bound of |sigmoid(x) - 1 / (1 + exp(-x))| in float64."""

TANH_ERROR = 12 * UNIT_ROUNDOFF
"""Bound of |tanh(x) - (1 - exp(-2 x)) / (1 + exp(-2 x))| in float64."""


def softplus_error(value):
    """Bound of |softplus(x) - log(1 + exp(x))| in float64, from the computed value."""
    return (16 + 2 * value) * UNIT_ROUNDOFF


@functools.cache
def _powers() -> np.ndarray:
    """exp(-k / 8), correctly rounded: `Decimal.exp` is, and so is the conversion of a Decimal to a float."""
    with decimal.localcontext(decimal.Context(prec=50)):  # whatever the caller's limits and traps
        return np.array([float((-decimal.Decimal(k) / _STEPS).exp()) for k in range(_STEPS * _FAR)])


def _horner(coefficients: tuple[float, ...], x):
    value = coefficients[-1] + 0 * x
    for coefficient in coefficients[-2::-1]:
        value = coefficient + x * value
    return value


def _exp_of_minus(t, xp: Any):
    """exp(-t) for t >= 0, NaN for NaN."""
    far = t >= _FAR
    t = xp.where(far, 0.0, t)
    k = xp.floor(_STEPS * xp.where(t >= 0, t, 0.0))
    power = xp.asarray(_powers(), t.dtype)[k.astype(xp.int32)]
    # k / 8 is exact, and so is the difference: it is a multiple of the last bit of t, and no larger than t.
    return xp.where(far, 0.0, power * _horner(_EXP, t - k / _STEPS))


def softplus_of(x, xp: Any):
    """`softplus` for float64 arrays of the module xp: numpy or jax.numpy."""
    y = _exp_of_minus(abs(x), xp)
    v = y / (2 + y)
    return xp.maximum(x, 0.0) + 2 * v * _horner(_ATANH, v * v)


def sigmoid_of(x, xp: Any):
    """`sigmoid` for float64 arrays of the module xp: numpy or jax.numpy."""
    y = _exp_of_minus(abs(x), xp)
    return xp.where(x >= 0, 1.0, y) / (1 + y)


def tanh_of(x, xp: Any):
    """`tanh` for float64 arrays of the module xp: numpy or jax.numpy."""
    y = _exp_of_minus(2 * abs(x), xp)
    size = (1 - y) / (1 + y)
    return xp.where(x >= 0, size, -size)


@jax.custom_jvp
def sigmoid(x):
    """1 / (1 + exp(-x)); in float64 within SIGMOID_ERROR. NaN for NaN."""
    return sigmoid_of(x, jnp) if x.dtype == jnp.float64 else jax.nn.sigmoid(x)


@sigmoid.defjvp
def _sigmoid_jvp(primals, tangents):
    value = sigmoid(primals[0])
    return value, value * (1 - value) * tangents[0]


@jax.custom_jvp
def tanh(x):
    """2 sigmoid(2 x) - 1; in float64 within TANH_ERROR. NaN for NaN."""
    return tanh_of(x, jnp) if x.dtype == jnp.float64 else jnp.tanh(x)


@tanh.defjvp
def _tanh_jvp(primals, tangents):
    value = tanh(primals[0])
    return value, (1 - value) * (1 + value) * tangents[0]


@jax.custom_jvp
def softplus(x):
    """log(1 + exp(x)); in float64 within `softplus_error`. NaN for NaN."""
    return softplus_of(x, jnp) if x.dtype == jnp.float64 else jax.nn.softplus(x)


@softplus.defjvp
def _softplus_jvp(primals, tangents):
    return softplus(primals[0]), sigmoid(primals[0]) * tangents[0]
