"""Sandwich layers: A beside B with orthonormal rows, by the Cayley transform, dense or for each frequency.

Source: Wang & Manchester 2023, arXiv:2301.11526; one trained scale, alpha X / |X|, as in its public code.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from lipjax.parametrize import cayley
from lipjax.parametrize.sll import BELOW_ONE


def dense(
    matrix: Float[Array, "o n"], alpha: Float[Array, ""], *, outputs: int, gain: float = 1.0, room: float = BELOW_ONE
) -> Float[Array, "o n"]:
    """The matrix room sqrt(g) [A B], [A B] = cayley(alpha X / |X|_F) with orthonormal rows.

    sqrt(2) A^T e^psi f(sqrt(2) e^-psi g B x + b), the paper's layer, is the sandwich of it with the bias of `bias`,
    where f(c z) = c f(z) for c > 0.

    Args:
      matrix: X, (o, n), more columns than rows.
      alpha: the Frobenius norm of what is transformed; |X|_F leaves X as it is.
      outputs: how many columns are A's, the first ones.
      gain: g > 0, the layer's Lipschitz constant.
      room: as of `sll.dense`.
    Returns: (o, n), what `operators.Sandwich` stores, as a Dense.
    Raises: ValueError if there are not more columns than rows and than `outputs`.
    Source: Wang & Manchester 2023, arXiv:2301.11526, section 3.
    Example: the rows of [A B] are orthonormal.
      >>> stacked = lipjax.parametrize.sandwich.dense(jnp.ones((1, 2)), jnp.array(2**0.5), outputs=1, room=1.0)
      >>> f"{jnp.sum(stacked**2):.4f}"
      '1.0000'
    """
    rows, columns = matrix.shape
    if not max(rows, outputs) < columns:
        raise ValueError(
            f"Expected a matrix with more columns than rows and than outputs = {outputs}, got shape {matrix.shape}."
        )
    return room * gain**0.5 * cayley.dense(matrix, alpha)


def blocks(
    kernel: Float[Array, "kh kw n o"],
    alpha: Float[Array, ""],
    size: tuple[int, int],
    *,
    outputs: int,
    gain: float = 1.0,
    room: float = BELOW_ONE,
    layer_size: tuple[int, int] | None = None,
) -> tuple[Float[Array, "r o n"], Float[Array, "q 2 o n"]]:
    """`dense` for circular convolutions: for each frequency the Cayley transform of the kernel's response.

    Args:
      kernel: HWIO, centred; A's input channels first, then B's.
      alpha: as of `cayley.response`, whose norm is over the half grid.
      size: (h, w) of the images, even or odd.
      outputs, gain, room: as of `dense`. layer_size: as of `cayley.packed_response`.
    Returns: (fixed, paired), what `operators.CircularConv.from_blocks` takes.
    Raises: ValueError if the kernel has not more input than output channels, or than `outputs`.
    Source: as `dense`.
    """
    columns, rows = kernel.shape[2:]
    if not max(rows, outputs) < columns:
        raise ValueError(
            f"Expected a kernel HWIO with more input than output channels, and than outputs = {outputs}, got shape "
            f"{kernel.shape}."
        )
    fixed, paired = cayley.packed_response(kernel, alpha, size, layer_size)
    return room * gain**0.5 * fixed, room * gain**0.5 * paired


def bias(
    bias: Float[Array, " o"], psi: Float[Array, " o"], *, gain: float = 1.0, room: float = BELOW_ONE
) -> Float[Array, " o"]:
    """room e^psi b / sqrt(2 g): what the scales psi of the paper's layer leave behind, in the bias.

    Args:
      bias: b, one for each hidden channel.
      psi: likewise.
      gain, room: those of the stacked maps.
    Returns: (o,), the bias of `operators.Sandwich`.
    """
    return room * (2 * gain) ** -0.5 * jnp.exp(psi) * bias
