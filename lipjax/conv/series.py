"""The truncated exponential of a skew convolution, term by term."""

import functools

import jax
from jax import lax
from jaxtyping import Array, Float

from lipjax.conv.maps import adjoint_kernel, check_square, conv2d


def _check_series(x, kernel, num_terms: int, padding: str, groups: int) -> None:
    check_square(kernel, groups)
    if x.shape[-1] != kernel.shape[3]:
        raise ValueError(f"Expected images with {kernel.shape[3]} channels, got {x.shape}.")
    if num_terms < 1:
        raise ValueError(f"Expected num_terms >= 1, the highest power of the series, got {num_terms}.")
    if padding not in ("ZERO", "CIRCULAR"):
        raise ValueError(f"The series of a convolution needs padding 'ZERO' or 'CIRCULAR', got {padding!r}.")


def series_exponential(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i c"],
    *,
    num_terms: int,
    padding: str = "ZERO",
    groups: int = 1,
    precision: lax.Precision | None = None,
) -> Float[Array, "b h w c"]:
    """Applies S_n(A) = sum_{k<=n} A^k / k!, A the stride-1 convolution with a skew kernel.

    Args:
      x: images, NHWC, any unit.
      kernel: HWIO, odd sides, equal to its own `skew_kernel` (unchecked).
      num_terms: n >= 1, the highest power and the number of convolutions.
      groups: as of `conv2d`: A is block-diagonal, and so is the result.
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
    _check_series(x, kernel, num_terms, padding, groups)
    options = {"padding": padding, "groups": groups, "precision": precision}
    return x + conv2d(_phi(x, kernel, num_terms, options), kernel, **options)


def _phi(x, kernel, num_terms, options):
    """z = sum_{k<n} A^k x / (k+1)!, by Horner's scheme: then S_n(A) x = x + A z."""
    z = x
    for k in range(num_terms, 1, -1):
        z = x + conv2d(z, kernel, **options) / k
    return z


def series_exponential_fast_gradient(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i c"],
    *,
    num_terms: int,
    padding: str = "ZERO",
    groups: int = 1,
    precision: lax.Precision | None = None,
) -> Float[Array, "b h w c"]:
    """`series_exponential` with a cheaper reverse-mode gradient, approximate for the kernel and exact for x.

    With z = sum_{k<n} A^k x / (k+1)!, which is kept, and h = sum_{k<n} (A^T)^k g / (k+1)! for the cotangent g, the
    gradient of x is g + A^T h, and one weight-gradient convolution, of z with h, replaces n (docs/orthogonal.md).

    Args, returns, errors: as `series_exponential`. Has no forward-mode derivative.
    Source: Singla & Feizi 2022, arXiv:2211.08453 (their faster SOC).
    """
    _check_series(x, kernel, num_terms, padding, groups)
    return _fast_series(x, kernel, num_terms, padding, groups, precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _fast_series(x, kernel, num_terms, padding, groups, precision):
    options = {"padding": padding, "groups": groups, "precision": precision}
    return series_exponential(x, kernel, num_terms=num_terms, **options)


def _fast_series_forward(x, kernel, num_terms, padding, groups, precision):
    options = {"padding": padding, "groups": groups, "precision": precision}
    z = _phi(x, kernel, num_terms, options)
    return x + conv2d(z, kernel, **options), (z, kernel)


def _fast_series_backward(num_terms, padding, groups, precision, kept, g):
    z, kernel = kept
    options = {"padding": padding, "groups": groups, "precision": precision}
    adjoint = adjoint_kernel(kernel, groups)
    h = _phi(g, adjoint, num_terms, options)
    grad_x = g + conv2d(h, adjoint, **options)
    weight_gradient = jax.linear_transpose(lambda k: conv2d(z, k, **options), kernel)
    return grad_x, *weight_gradient(h)


_fast_series.defvjp(_fast_series_forward, _fast_series_backward)
