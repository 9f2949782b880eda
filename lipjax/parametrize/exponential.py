"""Square orthogonal matrices as exponentials of skew ones: exactly orthogonal but for rounding, of determinant 1."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax import linalg


def dense(weight: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The exponential of (W - W^T) / 2.

    Args: weight: W, any square matrices. Returns: orthogonal matrices, the identity for W = 0.
    """
    return linalg.expm_skew((weight - jnp.swapaxes(weight, -1, -2)) / 2)


def random_weight(key: jax.Array, shape: tuple[int, ...], dtype=float) -> Array:
    """Skew matrices whose exponentials are random rotations: random planes (Haar), angles uniform in [-pi, pi].

    Of an odd side one direction is left as it is.

    Args: key: typed PRNG key. shape: (..., n, n). dtype: of the result.
    """
    of_planes, of_angles = jax.random.split(key)
    n = shape[-1]
    basis, _ = jnp.linalg.qr(jax.random.normal(of_planes, shape, dtype))
    angles = jax.random.uniform(of_angles, (*shape[:-2], n // 2), dtype, -jnp.pi, jnp.pi)
    first, second = basis[..., : n // 2], basis[..., n // 2 : 2 * (n // 2)]
    half = jnp.matmul(second * angles[..., None, :], jnp.swapaxes(first, -1, -2), precision="highest")
    return half - jnp.swapaxes(half, -1, -2)
