"""SOC in the frequency domain: matrix functions of a skew circular convolution, block by block."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from lipjax import _dft, linalg

Blocks = tuple[Array, Array]


def packed_response(kernel: Float[Array, "kh kw c c"], size: tuple[int, int]) -> Blocks:
    """`conv.packed_response` of a skew kernel, without transposing it: K[t]^T = -K[-t], hence R(f) = -R(f)^H.

    Args: kernel: HWIO, equal to its own `conv.skew_kernel` (unchecked). size: (h, w) of the images.
    Returns: (fixed, paired), skew-symmetric and skew-Hermitian blocks A(f).
    """
    kh, kw, c, _ = kernel.shape
    r, n = len(_dft.grid((size[0], size[1])).fixed), size[0] * size[1]
    # -conj: minus the rows of the fixed frequencies and of real parts, plus those of imaginary parts.
    signs = np.concatenate([-np.ones(r), np.tile([-1.0, 1.0], (n - r) // 2)])
    phases = jnp.asarray(signs[:, None] * _dft.packed_tap_phases((kh, kw), size), kernel.dtype)
    blocks = jnp.matmul(phases, kernel.reshape(kh * kw, c * c), precision=lax.Precision.HIGHEST)
    fixed, paired = lax.split(blocks, (r, n - r))
    return fixed.reshape(r, c, c), paired.reshape(-1, 2, c, c)


def exponential_blocks(
    kernel: Float[Array, "kh kw c c"],
    size: tuple[int, int],
    num_terms: int | None = None,
    *,
    out_channels: int | None = None,
) -> tuple[Float[Array, "r o c"], Float[Array, "q 2 o c"]]:
    """The blocks of exp(A), or of S_p(A) = sum_{j<=p} A^j / j!, A the circular convolution with a skew kernel.

    A is block diagonal per frequency, with skew-symmetric (real) or skew-Hermitian blocks; so is a function of it.

    Args:
      kernel: HWIO, equal to its own `conv.skew_kernel` (unchecked).
      size: (h, w) of the images.
      num_terms: p >= 1, or None for the exponential, whose blocks are orthogonal or unitary whatever the norm of A.
      out_channels: how many of the c channels to keep, the first ones; None keeps all. A series then costs less.
    Returns: (fixed, paired) as `operators.CircularConv.from_blocks` takes them.
    Raises: ValueError if num_terms < 1, the kernel has unequal channels or less than out_channels.
    Source: Singla & Feizi 2021, arXiv:2105.11417; per frequency as Trockman & Kolter 2021, arXiv:2104.07167.
    """
    if num_terms is not None and num_terms < 1:
        raise ValueError(f"Expected num_terms >= 1, the highest power of the series, or None, got {num_terms}.")
    c = kernel.shape[2]
    rows = c if out_channels is None else out_channels
    if kernel.shape[3] != c or not 1 <= rows <= c:
        raise ValueError(f"Expected an HWIO kernel of equal channels, at least {rows}, got shape {kernel.shape}.")
    fixed, paired = packed_response(kernel, size)
    if num_terms is not None:
        return _series((fixed, paired), num_terms, rows)
    real, imaginary = linalg.expm_skew_split(paired[:, 0], paired[:, 1])
    return linalg.expm_skew_split(fixed)[0][:, :rows], jnp.stack([real[:, :rows], imaginary[:, :rows]], 1)


def exponential_response(kernel: Float[Array, "kh kw c c"], size: tuple[int, int]) -> Complex[Array, "h f c c"]:
    """The frequency response of exp(A), A the circular convolution with a skew kernel: unitary at every frequency.

    Args, errors, source: as `exponential_blocks`.
    Returns: (h, w // 2 + 1, c, c) on the half grid of `jnp.fft.rfft2`, for `conv.apply_response`.
    """
    return _dft.unpack(*exponential_blocks(kernel, size), size)


def _product(x: Blocks, y: Blocks) -> Blocks:
    """x y, block by block."""

    def multiply(a, b):
        return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)

    xr, xi, yr, yi = x[1][:, 0], x[1][:, 1], y[1][:, 0], y[1][:, 1]
    # Three real products instead of four (Gauss).
    rr, ii = multiply(xr, yr), multiply(xi, yi)
    return multiply(x[0], y[0]), jnp.stack([rr - ii, multiply(xr + xi, yr + yi) - rr - ii], 1)


def _combination(coefficients: list[float], powers: list[Blocks], rows: int) -> Blocks:
    """The first rows of c_0 I + c_1 A + c_2 A^2 + ..., `powers` from A on."""
    eye = jnp.eye(rows, powers[0][0].shape[-1], dtype=powers[0][0].dtype)
    fixed, paired = coefficients[0] * eye, coefficients[0] * jnp.stack([eye, 0 * eye])
    for c, (of_fixed, of_paired) in zip(coefficients[1:], powers, strict=False):
        fixed, paired = fixed + c * of_fixed[:, :rows], paired + c * of_paired[:, :, :rows]
    return jnp.broadcast_to(fixed, (len(powers[0][0]), *eye.shape)), jnp.broadcast_to(
        paired, (len(powers[0][1]), 2, *eye.shape)
    )


def _num_products(num_terms: int, step: int) -> tuple[int, int]:
    """Products of whole matrices, and of their first rows with whole matrices, that `_series` makes."""
    return step - 1, (num_terms - 1) // step


def _best_step(num_terms: int, share: float) -> int:
    """The step with the least cost, `share` being the share of the rows that is kept."""

    def cost(step):
        whole, partial = _num_products(num_terms, step)
        return whole + share * partial, step

    return min(range(1, num_terms + 1), key=cost)


def _series(a: Blocks, num_terms: int, rows: int) -> Blocks:
    """The first rows of S_p(A), as a polynomial in A^s whose coefficients are polynomials in A (Paterson-Stockmeyer)."""
    step = _best_step(num_terms, rows / a[0].shape[-1])
    powers = [a]
    while len(powers) < step:
        powers.append(_product(powers[-1], a))
    c = [1 / math.factorial(j) for j in range(num_terms + 1)]
    # The highest coefficient has degree 1 to s, so that no product is spent on a constant.
    start = step * ((num_terms - 1) // step)
    total = _combination(c[start:], powers, rows)
    for low in range(start - step, -1, -step):
        lower, product = _combination(c[low : low + step], powers, rows), _product(total, powers[-1])
        total = product[0] + lower[0], product[1] + lower[1]
    return total
