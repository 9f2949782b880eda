"""1-Lipschitz activations as pure functions. Channels pair by halves: i with i + C/2."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def maxmin(x: Float[Array, "*batch c"]) -> Float[Array, "*batch c"]:
    """Sorts each pair of channels: concat(max(a, b), min(a, b)) of the halves a, b.

    An orthogonal map on each side of the tie a = b, and continuous there: exactly 1-Lipschitz and
    gradient-norm preserving.

    Args: x: channels last, an even number of them, any unit.
    Returns: the shape and unit of x.
    Raises: ValueError if the number of channels is odd.
    Source: Anil, Lucas & Grosse 2019, arXiv:1811.05381 (called MinMax in the LiResNet code).
    """
    if x.shape[-1] % 2:
        raise ValueError(f"MaxMin pairs channels: expected an even number of them, got shape {x.shape}.")
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(a, b), jnp.minimum(a, b)], axis=-1)
