"""Cayley parametrisation: orthogonal circular convolutions and dense matrices from unconstrained arrays.

Source: Trockman & Kolter 2021, arXiv:2104.07167; one trained scale, alpha W / |W|, as in its public code.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from lipjax import _dft, conv, linalg


def response(
    kernel: Float[Array, "kh kw i o"], alpha: Float[Array, ""], size: tuple[int, int]
) -> Complex[Array, "h f o i"]:
    """The frequency response cayley(alpha W / |W|_F), W = `conv.frequency_response(kernel, size)`, on the half grid.

    The convolution with it is orthogonal: it preserves norms if o >= i, and its adjoint does if o <= i. The norm is
    taken over the half grid (h, w // 2 + 1) jointly, as in the original, so it depends on the size.

    Args:
      kernel: HWIO, any sides, centred: tap (k - 1) // 2 lies on the output. Taps beyond the map are wrapped and summed.
      alpha: scale, the Frobenius norm of what is transformed; `initial_alpha` leaves the kernel as it is.
      size: (h, w) of the images, even or odd.
    Returns: (h, w // 2 + 1, o, i), complex; what `conv.apply_response` takes. 0 is transformed for a zero kernel.
    Error: of every block, that of `linalg.cayley`, |A| <= 2 |alpha| + alpha^2.
    """
    return _dft.unpack(*packed_response(kernel, alpha, size), (size[0], size[1]))


def packed_response(
    kernel: Float[Array, "kh kw i o"],
    alpha: Float[Array, ""],
    size: tuple[int, int],
    layer_size: tuple[int, int] | None = None,
) -> tuple[Float[Array, "r o i"], Float[Array, "q 2 o i"]]:
    """`response` without redundancy, as `conv.packed_response`: one transform for each pair of frequencies +-f.

    Args:
      kernel, alpha, size: as `response`.
      layer_size: for kernels of one tap, which have the same block at each frequency: the map over whose half grid the
        norm is taken, where that is not `size`.
    Returns: (fixed, paired), what `operators.CircularConv.from_blocks` takes.
    Raises: ValueError for a larger kernel with another layer_size than size.
    """
    blocks = conv.packed_response(kernel, size)
    squared = _squared_norm(blocks, size)
    if layer_size is not None and tuple(layer_size) != tuple(size):
        if kernel.shape[:2] != (1, 1):
            raise ValueError(
                f"A kernel of shape {kernel.shape} has another norm on maps of {layer_size} than of {size}: expected "
                "one tap, or one size."
            )
        squared = squared * (_half_grid(layer_size) / _half_grid(size))
    fixed, paired = (_scale(alpha, squared) * part for part in blocks)
    return linalg.cayley(fixed), jnp.stack(linalg.cayley_split(paired[:, 0], paired[:, 1]), 1)


def initial_alpha(kernel: Float[Array, "kh kw i o"], size: tuple[int, int]) -> Float[Array, ""]:
    """|W|_F over the half grid at the layer's own size: with it `response` transforms the kernel's own response."""
    return jnp.sqrt(_squared_norm(conv.packed_response(kernel, size), size))


def dense(matrix: Float[Array, "o i"], alpha: Float[Array, ""]) -> Float[Array, "o i"]:
    """cayley(alpha W / |W|_F): orthonormal columns (o >= i) or rows (o <= i).

    Args: matrix: W, (out, in). alpha: scale; |W|_F leaves W as it is.
    Returns: (out, in). 0 is transformed for W = 0.
    Error: that of `linalg.cayley`, |A| <= 2 |alpha| + alpha^2.
    """
    return linalg.cayley(_scale(alpha, jnp.sum(matrix**2)) * matrix)


def _squared_norm(blocks: tuple[Array, Array], size: tuple[int, int]) -> Array:
    """Over the half grid, which holds both frequencies of a pair in the columns that are their own mirror image."""
    fixed, paired = blocks
    times = 1.0 + (np.arange(len(paired)) < _dft.grid((size[0], size[1])).num_mirrored)
    return jnp.sum(fixed**2) + jnp.sum(jnp.asarray(times, paired.dtype) * jnp.sum(paired**2, (1, 2, 3)))


def _half_grid(size: tuple[int, int]) -> int:
    return size[0] * (size[1] // 2 + 1)


def _scale(alpha: Array, squared: Array) -> Array:
    """alpha / norm, and alpha for a norm of zero, where the gradient stays finite."""
    return alpha / jnp.sqrt(jnp.where(squared == 0, 1.0, squared))
