"""Last-layer normalisation: rows of the head scaled to length 1."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def normalize_rows(weight: Float[Array, "k d"]) -> Float[Array, "k d"]:
    """w_i / |w_i|_2, and 0 for a row shorter than 1e-12.

    Args: weight: (classes, features), one row per class. Returns: the same shape.
    Source: Singla, Singla & Feizi 2022, arXiv:2108.04062, section 5 (LLN).
    """
    squared = jnp.sum(weight**2, axis=1, keepdims=True)
    short = squared < 1e-24
    return jnp.where(short, 0.0, weight * jnp.where(short, 1.0, squared) ** -0.5)
