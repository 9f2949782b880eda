"""AOL: layers whose channels are rescaled by row sums of their Gram matrix, so that the norm is at most 1.

For a map P let G = P^T P. diag(r) - G is diagonally dominant for r_i = sum_j |G_ij|, so P diag(r)^(-1/2) has norm at
most 1, whatever P is. G of a convolution is the correlation of the kernel with itself, and the sum goes over all its
taps: then it holds for every padding and map. With P P^T in the place of G, outputs are rescaled. As 2^(n - 1)-th roots
are operator monotone, (sum_j |(G^(2^(n - 1)))_ij|)^(2^(-n)) does the same, and loses less of the norm.

Source: Prach & Lampert 2022, arXiv:2208.03160; outputs: the code of Wang & Manchester 2023, arXiv:2301.11526; powers
of G (spectral rescaling): Delattre, Barthelemy & Allauzen 2024, arXiv:2402.00240.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ROWS = ("inputs", "outputs")
EPSILON = 1e-6
"""Added to row sums, as in the original: it makes channels of zeros stay zeros."""


def modulus(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The modulus |x|, with derivative 0 at 0.

    `jnp.abs` has derivative 1 there. In a kernel with one tap per channel, such as AOL starts from, nearly all entries
    of the Gram matrix are 0: their sum would then push all taps one way.

    Args:
      x: of any shape.
    Returns: |x|, in the unit of x.
    Example:
      >>> jax.vmap(jax.grad(lipjax.parametrize.aol.modulus))(jnp.array([-2.0, 0.0, 3.0])).tolist()
      [-1.0, 0.0, 1.0]
    """
    return x * jax.lax.stop_gradient(jnp.sign(x))


def rescale_matrix(
    matrix: Float[Array, "m n"], *, rows: str = "inputs", iterations: int = 1, epsilon: float = EPSILON
) -> Float[Array, "m n"]:
    """The matrix with its columns (or rows) rescaled to a spectral norm of at most 1.

    Args:
      matrix: (out, in), raw.
      rows: "inputs" rescales columns, "outputs" rows.
      iterations: n >= 1, the Gram matrix is raised to the power 2^(n - 1): in float32 that overflows for norms of 100
        from 4 on. 1 is AOL.
      epsilon: added to row sums, >= 0. A channel of zeros stays one, without a NaN in the gradient.
    Returns: (out, in). Its norm exceeds 1 by rounding alone.
    Raises: ValueError for other rows or iterations.
    Source: Prach & Lampert 2022, arXiv:2208.03160, theorem 1.
    Example: the columns are orthogonal, and each gets norm 1.
      >>> matrix = lipjax.parametrize.aol.rescale_matrix(jnp.array([[30.0, 0.0], [40.0, 0.0], [0.0, 20.0]]))
      >>> [f"{entry:.4f}" for entry in matrix.ravel().tolist()]
      ['0.6000', '0.0000', '0.8000', '0.0000', '0.0000', '1.0000']
    """
    return rescale_kernel(matrix.T[None, None], rows=rows, iterations=iterations, epsilon=epsilon)[0, 0].T


def rescale_kernel(
    kernel: Float[Array, "kh kw i o"], *, rows: str = "inputs", iterations: int = 1, epsilon: float = EPSILON
) -> Float[Array, "kh kw i o"]:
    """The kernel with its input (or output) channels rescaled, so that the convolution has norm at most 1.

    Args:
      kernel: HWIO, raw, any sides.
      rows: the channels to rescale, "inputs" or "outputs". "outputs" of a strided convolution looks at all
        displacements, as if it were not strided.
      iterations: n >= 1, the Gram matrix is raised to the power 2^(n - 1), whose kernel has 2^n (k - 1) + 1 taps a
        side. 1 is AOL.
      epsilon: added to row sums, >= 0.
    Returns: HWIO; for every padding, stride and map the norm exceeds 1 by rounding alone.
    Raises: ValueError for other rows or iterations.
    Source: Prach & Lampert 2022, arXiv:2208.03160, theorem 2.
    Example: a kernel with one tap is a multiple of the identity.
      >>> kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(5.0)
      >>> f"{lipjax.parametrize.aol.rescale_kernel(kernel)[1, 1].item():.4f}"
      '1.0000'
    """
    if rows not in ROWS:
        raise ValueError(f"Expected rows to be one of {ROWS}, the channels that are rescaled, got {rows!r}.")
    if iterations < 1:
        raise ValueError(f"Expected iterations >= 1 (1 is AOL), got {iterations}.")
    gram = correlation(kernel if rows == "inputs" else kernel.swapaxes(2, 3))
    for _ in range(iterations - 1):
        gram = correlation(gram)  # of a symmetric map: its square
    sums = jnp.sum(modulus(gram), axis=(0, 1, 2)) + epsilon
    scale = jnp.where(sums > 0, sums, 1.0) ** (-(0.5**iterations))
    return kernel * (scale[:, None] if rows == "inputs" else scale)


def correlation(kernel: Float[Array, "kh kw n m"]) -> Float[Array, "k2h k2w n n"]:
    """sum_t K[t] K[t + d]^T for all displacements d, 2 k - 1 a side."""
    taps = [(side - 1, side - 1) for side in kernel.shape[:2]]
    layout = ("HWNC", "HWOI", "HWNC")
    precision = jax.lax.Precision.HIGHEST
    return jax.lax.conv_general_dilated(kernel, kernel, (1, 1), taps, dimension_numbers=layout, precision=precision)
