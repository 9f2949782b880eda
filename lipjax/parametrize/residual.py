"""Residual convolutions of LiResNet: a scaled kernel, and the identity plus one, merged into one kernel."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def scaled_kernel(
    weight: Float[Array, "kh kw c c"], gamma: Float[Array, " c"], *, num_layers: int
) -> Float[Array, "kh kw c c"]:
    """L^(-1/2) gamma * W, gamma per output channel: what a block adds to its input.

    Args, raises: as `linear_residual`. Returns: HWIO.
    """
    kh, kw, c_in, c_out = weight.shape
    if not (kh % 2 and kw % 2) or c_in != c_out or num_layers < 1:
        raise ValueError(
            f"Expected an odd HWIO kernel with equal channels and num_layers >= 1, got {weight.shape} and {num_layers}."
        )
    return num_layers**-0.5 * gamma * weight


def linear_residual(
    weight: Float[Array, "kh kw c c"], gamma: Float[Array, " c"], *, num_layers: int
) -> Float[Array, "kh kw c c"]:
    """K = I + L^(-1/2) gamma * W, I the identity at the centre tap, gamma per output channel.

    Args:
      weight: HWIO, odd sides; gamma: (c,); num_layers: L, the depth of the stack that this block is part of.
    Returns: HWIO, the one kernel that is applied, estimated and certified.
    Raises: ValueError for an even side, unequal channels or num_layers < 1.
    Source: Hu et al. 2023, arXiv:2301.12549 (the L^(-1/2) scale and gamma: arXiv:2310.02513).
    """
    added = scaled_kernel(weight, gamma, num_layers=num_layers)
    kh, kw, channels, _ = weight.shape
    identity = jnp.zeros_like(weight).at[kh // 2, kw // 2].set(jnp.eye(channels, dtype=weight.dtype))
    return identity + added
