"""Vectors scaled to norm 1, or to a largest entry of 1, which takes half of the sums."""

import jax.numpy as jnp
from jaxtyping import Array


def _axes(v: Array, batched: bool):
    return tuple(range(1, v.ndim)) if batched else None


def of_peak_1(v: Array, fallback: Array | float, *, batched: bool = False) -> Array:
    """v / max |v|, or the fallback where v is zero: for iterations that need directions alone, until the last step.

    Args, returns: as `unit`.
    """
    largest = jnp.max(jnp.abs(v), axis=_axes(v, batched), keepdims=True)
    positive = largest > 0
    # XLA multiplies by the reciprocal of the peak, which is no normal number for the largest peaks: an eighth's is.
    shrink = jnp.where(largest > 1, 0.125, 1.0).astype(largest.dtype)
    return jnp.where(positive, (v * shrink) / jnp.where(positive, largest * shrink, 1), fallback)


def unit_of_peak_1(v: Array, fallback: Array | float, *, batched: bool = False) -> Array:
    """`unit` of what `of_peak_1` gave: its squares neither underflow nor overflow.

    Args, returns: as `unit`.
    """
    squares = jnp.sum(jnp.abs(v) ** 2, axis=_axes(v, batched), keepdims=True)
    zero = squares == 0  # not "> 0": what is not a number stays so
    return jnp.where(zero, fallback, v / jnp.sqrt(jnp.where(zero, 1, squares)))


def unit(v: Array, fallback: Array | float, *, batched: bool = False) -> Array:
    """v / |v|, or the fallback where v is zero; scaled first, so that squares neither underflow nor overflow.

    Args: v: real or complex, any shape: one vector; if batched, one for each index of the first axis.
    Returns: as v.
    """
    return unit_of_peak_1(of_peak_1(v, 0.0, batched=batched), fallback, batched=batched)
