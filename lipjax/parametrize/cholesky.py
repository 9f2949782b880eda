"""Cholesky parametrisation: nearly orthogonal dense matrices and convolutions of patches, from unconstrained arrays.

Contractive, not orthogonal: their norms are below 1 up to rounding, and what certifies is the proved norm.
Source: Hu et al. 2024, arXiv:2310.02513.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax import linalg


def dense(matrix: Float[Array, "*batch o i"]) -> Float[Array, "*batch o i"]:
    """`linalg.cholesky_orthogonalize` of (out, in) matrices."""
    return linalg.cholesky_orthogonalize(matrix)


def patches(kernel: Float[Array, "kh kw i o"]) -> Float[Array, "kh kw i o"]:
    """The kernel as a matrix (o, kh kw i), orthogonalised.

    With strides (kh, kw) and without padding windows do not overlap, and the norm of the convolution is the matrix's.

    Args: kernel: HWIO. Returns: HWIO.
    """
    features = kernel.shape[3]
    return linalg.cholesky_orthogonalize(kernel.reshape(-1, features).T).T.reshape(kernel.shape)


def residual(
    weight: Float[Array, "*batch n n"], gamma: Float[Array, "*batch n"], *, num_layers: int
) -> Float[Array, "*batch n n"]:
    """`linalg.cholesky_orthogonalize` of I + L^(-1/2) gamma * W, gamma per row (output).

    The identity keeps singular values away from 0, where the orthogonalisation would leave them small.

    Args: weight: W, (out, in), one matrix for each layer. gamma: likewise. num_layers: L, the depth of the stack.
    Raises: ValueError if num_layers < 1.
    """
    if num_layers < 1:
        raise ValueError(f"Expected num_layers >= 1, got {num_layers}.")
    eye = jnp.eye(weight.shape[-1], dtype=weight.dtype)
    return linalg.cholesky_orthogonalize(eye + num_layers**-0.5 * gamma[..., None] * weight)
