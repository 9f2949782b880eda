"""The truncated exponential of a skew convolution, term by term."""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float

from lipjax.conv.maps import adjoint_kernel, check_square, conv2d


def _check_series(x, kernel, num_terms: int, padding: str) -> None:
    check_square(kernel)
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(f"Expected images with {kernel.shape[2]} channels, got {x.shape}.")
    if num_terms < 1:
        raise ValueError(f"Expected num_terms >= 1, the highest power of the series, got {num_terms}.")
    if padding not in ("ZERO", "CIRCULAR"):
        raise ValueError(f"The series of a convolution needs padding 'ZERO' or 'CIRCULAR', got {padding!r}.")


def series_exponential(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c c"],
    *,
    num_terms: int,
    padding: str = "ZERO",
    precision: lax.Precision | None = None,
) -> Float[Array, "b h w c"]:
    """Applies S_n(A) = sum_{k<=n} A^k / k!, A the stride-1 convolution with a skew kernel.

    Args:
      x: images, NHWC, any unit.
      kernel: HWIO, odd sides, equal to its own `skew_kernel` (unchecked).
      num_terms: n >= 1, the highest power and the number of convolutions.
      padding: "ZERO" or "CIRCULAR"; A is skew for either, also on maps smaller than the kernel.
      precision: of the products; None takes JAX's default.
    Returns: S_n(A) x, in the unit of x.
    Error: before rounding, |S_n(A) - exp(A)| <= |A|^(n+1) / (n+1)! in spectral norm. |S_n(A)| = max |S_n(i t)| over the
      eigenvalues i t of A, which is at most 1 while n is 0 or 3 modulo 4 and |A| below about 3 (n = 12: 3.379).
    Raises: ValueError if num_terms < 1, or for another kernel or padding.
    Source: Singla & Feizi 2021, arXiv:2105.11417.
    Example: exp(0) is the identity.
      >>> lipjax.parametrize.soc.exponential(jnp.ones((1, 1, 2, 1)), jnp.zeros((3, 3, 1, 1)), num_terms=5).max().item()
      1.0
    """
    _check_series(x, kernel, num_terms, padding)
    return x + conv2d(_phi(x, kernel, num_terms, padding, precision), kernel, padding=padding, precision=precision)


def _phi(x, kernel, num_terms, padding, precision):
    """z = sum_{k<n} A^k x / (k+1)!, by Horner's scheme: then S_n(A) x = x + A z."""
    z = x
    for k in range(num_terms, 1, -1):
        z = x + conv2d(z, kernel, padding=padding, precision=precision) / k
    return z


def series_exponential_fast_gradient(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw c c"],
    *,
    num_terms: int,
    padding: str = "ZERO",
    precision: lax.Precision | None = None,
) -> Float[Array, "b h w c"]:
    """`series_exponential` with a cheaper reverse-mode gradient, approximate for the kernel and exact for x.

    With z = sum_{k<n} A^k x / (k+1)!, which is kept, and h = sum_{k<n} (A^T)^k g / (k+1)! for the cotangent g, the
    gradient of x is g + A^T h, and one weight-gradient convolution, of z with h, replaces n (docs/orthogonal.md).

    Args, returns, errors: as `series_exponential`. Has no forward-mode derivative.
    Source: Singla & Feizi 2022, arXiv:2211.08453 (their faster SOC).
    """
    _check_series(x, kernel, num_terms, padding)
    return _fast_series(x, kernel, num_terms, padding, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _fast_series(x, kernel, num_terms, padding, precision):
    return series_exponential(x, kernel, num_terms=num_terms, padding=padding, precision=precision)


def _fast_series_forward(x, kernel, num_terms, padding, precision):
    z = _phi(x, kernel, num_terms, padding, precision)
    return x + conv2d(z, kernel, padding=padding, precision=precision), (z, kernel)


def _fast_series_backward(num_terms, padding, precision, kept, g):
    z, kernel = kept
    adjoint = adjoint_kernel(kernel)
    h = _phi(g, adjoint, num_terms, padding, precision)
    grad_x = g + conv2d(h, adjoint, padding=padding, precision=precision)
    weight_gradient = jax.linear_transpose(lambda k: conv2d(z, k, padding=padding, precision=precision), kernel)
    return grad_x, *weight_gradient(h)


_fast_series.defvjp(_fast_series_forward, _fast_series_backward)
