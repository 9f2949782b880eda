"""Vectors scaled to norm 1."""

import jax.numpy as jnp
from jaxtyping import Array


def unit(v: Array, fallback: Array | float, *, batched: bool = False) -> Array:
    """v / |v|, or the fallback where v is zero; scaled first, so that squares neither underflow nor overflow.

    Args: v: real or complex, any shape: one vector; if batched, one for each index of the first axis.
    Returns: as v.
    """
    axes = tuple(range(1, v.ndim)) if batched else None
    largest = jnp.max(jnp.abs(v), axis=axes, keepdims=True)
    positive = largest > 0
    scaled = v / jnp.where(positive, largest, 1)
    squares = jnp.sum(jnp.abs(scaled) ** 2, axis=axes, keepdims=True)
    return jnp.where(positive, scaled / jnp.sqrt(jnp.where(positive, squares, 1)), fallback)
