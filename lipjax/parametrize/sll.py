"""SLL: a linear map whose outputs are scaled so that its norm is at most 1, for potential steps and sandwiches.

Source: Araujo et al. 2023, arXiv:2303.03169, with the weights q = e^theta of its dense layers for convolutions, too.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from lipjax.parametrize.aol import correlation, modulus

BELOW_ONE = 1 - 2.0**-26
"""A factor of A that leaves room for the slack of a proof: with it |A| is proved to be at most 1."""

# Of theta minus its mean: beyond it weights differ by 10^26, and a product with them might leave the range of float32.
_MOST = 30.0


def dense(
    matrix: Float[Array, "o i"], theta: Float[Array, " n"], *, epsilon: float = 0.0, room: float = BELOW_ONE
) -> tuple[Float[Array, "o i"], Float[Array, " o"]]:
    """The matrix A = room diag(sqrt(t)) W with 1 / t_i = sum_j |W W^T|_ij e^(theta_j - theta_i), and its scales.

    diag(1 / t) - W W^T is diagonally dominant after a change of basis, so |A| <= room. In front of an activation with
    f(c z) = c f(z) the scales slip through: x - 2 W^T diag(t) f(W x + b) is the potential step of A with the bias
    scale * b.

    Args:
      matrix: W, (outputs, inputs), any numbers.
      theta: one for each output; only differences count, and the mean is subtracted.
      epsilon: added to every 1 / t, on the safe side.
      room: a factor of A. BELOW_ONE is below 1 so that the proved norm is not above it; 1 is the paper's.
    Returns: (A, scale): (outputs, inputs); (outputs,). Outputs of zero rows have the scale 0, with a gradient of 0.
    Raises: ValueError if theta does not have one number for each row.
    Source: Araujo et al. 2023, arXiv:2303.03169, section 4.
    Example: two equal rows share what one would have.
      >>> a, scale = lipjax.parametrize.sll.dense(jnp.array([[2.0], [2.0]]), jnp.zeros(2), room=1.0)
      >>> f"{jnp.sum(a**2):.4f}"
      '1.0000'
    """
    _check(matrix, theta)
    gram = jnp.matmul(matrix, matrix.T, precision=lax.Precision.HIGHEST)
    scale = _scale(modulus(gram), theta, epsilon, room)
    return scale[:, None] * matrix, scale


def conv(
    kernel: Float[Array, "kh kw i o"], theta: Float[Array, " n"], *, epsilon: float = 0.0, room: float = BELOW_ONE
) -> tuple[Float[Array, "kh kw i o"], Float[Array, " o"]]:
    """`dense` for convolutions with any strides and padding on maps of any size.

    |W W^T|_ij becomes the sum of the moduli of the correlation of the kernels of outputs i and j, over displacements.

    Args:
      kernel: HWIO, any sides.
      theta: one for each output channel.
      epsilon, room: as of `dense`.
    Returns: (the kernel of A, scale): HWIO; (outputs,).
    Raises: ValueError if theta does not have one number for each output channel.
    Source: as `dense`.
    Example:
      >>> kernel, scale = lipjax.parametrize.sll.conv(jnp.ones((3, 3, 1, 1)), jnp.zeros(1), room=1.0)
      >>> f"{scale[0]:.4f}"  # the norm of nine ones on a large map is 9
      '0.1111'
    """
    _check(kernel, theta)
    scale = _scale(jnp.sum(modulus(correlation(kernel.swapaxes(2, 3))), (0, 1)), theta, epsilon, room)
    return scale * kernel, scale


def _check(weight, theta) -> None:
    outputs = weight.shape[0] if weight.ndim == 2 else weight.shape[-1]
    if theta.shape != (outputs,):
        raise ValueError(f"Expected theta of shape ({outputs},), one number for each output, got {theta.shape}.")


def _scale(mass: jax.Array, theta: jax.Array, epsilon: float, room: float) -> jax.Array:
    """room sqrt(t) for 1 / t_i = sum_j mass_ij w_j / w_i + epsilon, w = e^theta; 0 where that sum is 0."""
    weights = jnp.exp(jnp.clip(theta - jnp.mean(theta), -_MOST, _MOST))
    sums = jnp.matmul(mass, weights, precision=lax.Precision.HIGHEST) / weights + epsilon
    positive = sums > 0
    # The guard comes before the division: a gradient through 1 / 0 is not a number, even where it is not used.
    return jnp.where(positive, room * _inverse_root(jnp.where(positive, sums, 1)), 0)


@jax.custom_jvp
def _inverse_root(x: jax.Array) -> jax.Array:
    return lax.rsqrt(x)


@_inverse_root.defjvp
def _inverse_root_jvp(primals, tangents):
    # Factor by factor: the derivative x^(-3/2) leaves the range of float32 for weights of 10^-18, the product does not.
    root = lax.rsqrt(primals[0])
    return root, -0.5 * tangents[0] * root * root * root
