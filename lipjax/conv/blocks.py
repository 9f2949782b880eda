"""Blocks of pixels as channels, and back."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def space_to_depth(x: Float[Array, "b h w c"], block: int) -> Float[Array, "b hh ww cc"]:
    """Collects blocks of block x block pixels into channels: index (c, k1, k2), c major, (k1, k2) the place inside.

    Args:
      x: images, NHWC (b, h, w, c), any unit.
      block: >= 1, divides h and w.
    Returns: (b, h / block, w / block, c block^2), the same numbers in another order.
    Raises: ValueError unless block >= 1 divides h and w.
    Example:
      >>> lipjax.conv.space_to_depth(jnp.zeros((1, 32, 32, 3)), 2).shape
      (1, 16, 16, 12)
    """
    b, h, w, c = x.shape
    if block < 1 or h % block or w % block:
        raise ValueError(f"Expected a block size >= 1 that divides the size {(h, w)}, got {block}.")
    x = x.reshape(b, h // block, block, w // block, block, c)
    # One place at a time: XLA's loop over a transpose that ends in a reshape of the last axis is several times slower.
    places = [
        place.reshape(b, h // block, w // block, c)
        for row in lax.split(x, (1,) * block, axis=2)
        for place in lax.split(row, (1,) * block, axis=4)
    ]
    return jnp.stack(places, -1).reshape(b, h // block, w // block, c * block**2)


def depth_to_space(x: Float[Array, "b h w c"], block: int) -> Float[Array, "b hh ww cc"]:
    """The inverse of `space_to_depth`: (b, h, w, c) -> (b, h block, w block, c / block^2).

    Raises: ValueError unless block >= 1 and c is divisible by block^2.
    """
    b, h, w, c = x.shape
    if block < 1 or c % block**2:
        raise ValueError(f"Expected a block size >= 1 whose square divides the {c} channels, got {block}.")
    x = x.reshape(b, h, w, c // block**2, block, block)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * block, w * block, c // block**2)
