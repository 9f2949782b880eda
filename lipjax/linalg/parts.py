"""Matrices as real and imaginary parts, in real arithmetic: XLA's complex products are slow."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lipjax import _spread

# A matrix as its real and its imaginary part; None is an imaginary part that is zero.
Parts = tuple[Array, Any]


def reciprocal(x: Parts) -> Parts:
    real, imag = x
    if imag is None:
        return 1 / real, None
    squared = real**2 + imag**2
    return real / squared, -imag / squared


def times(x: Parts, y: Parts) -> Parts:
    """Entry by entry, with broadcasting."""
    (xr, xi), (yr, yi) = x, y
    if xi is None or yi is None:
        return xr * yr, None
    return xr * yr - xi * yi, xr * yi + xi * yr


def product(x: Parts, y: Parts) -> Parts:
    (xr, xi), (yr, yi) = x, y
    if xi is None or yi is None:
        return _spread.product(xr, yr), None
    # Three real products instead of four (Gauss): faster, and as accurate relative to |x| |y|.
    rr, ii = _spread.product(xr, yr), _spread.product(xi, yi)
    return rr - ii, _spread.product(xr + xi, yr + yi) - rr - ii


def adjoint(x: Parts) -> Parts:
    real, imag = x
    return jnp.swapaxes(real, -1, -2), None if imag is None else -jnp.swapaxes(imag, -1, -2)


def scaled(c, x: Parts) -> Parts:
    return jax.tree.map(lambda part: c * part, x)


def add(*terms: Parts) -> Parts:
    return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *terms)


def subtract(x: Parts, y: Parts) -> Parts:
    return jax.tree.map(jnp.subtract, x, y)


def add_identity(c: float, x: Parts) -> Parts:
    return x[0] + c * jnp.eye(x[0].shape[-1], dtype=x[0].dtype), x[1]
