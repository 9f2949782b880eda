"""SOC in the frequency domain: matrix functions of a skew circular convolution, block by block."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from lipjax import _dft, _precision, _spread, conv, linalg
from lipjax.linalg.parts import product as complex_product
from lipjax.spectral.series import terms_for

Blocks = tuple[Array, Array]


def packed_response(kernel: Float[Array, "kh kw c c"], size: tuple[int, int], *, divided: bool = True) -> Blocks:
    """`conv.packed_response` of a skew kernel, without transposing it: K[t]^T = -K[-t], hence R(f) = -R(f)^H.

    Args: kernel: HWIO, equal to its own `conv.skew_kernel` (unchecked). size: (h, w) of the images. divided: over the
      devices, for matrix functions; else every device makes all blocks, which is sooner done than sent.
    Returns: (fixed, paired), skew-symmetric and skew-Hermitian blocks A(f).
    """
    kh, kw, c, _ = kernel.shape
    r, n = len(_dft.grid(size).fixed), size[0] * size[1]
    # -conj: minus the rows of the fixed frequencies and of real parts, plus those of imaginary parts.
    signs = np.concatenate([-np.ones(r), np.tile([-1.0, 1.0], (n - r) // 2)])
    phases = signs[:, None] * _dft.packed_tap_phases((kh, kw), size)
    if divided and _spread.num_devices() > 1:
        return conv.tap_blocks(phases, kernel, r)
    product = _precision.product(jnp.asarray(phases, kernel.dtype), kernel.reshape(kh * kw, c * c))
    fixed, paired = lax.split(_dft.whole(product.reshape(n, c, c)), (r, n - r))
    return fixed, paired.reshape(-1, 2, c, c)


def exponential_blocks(
    kernel: Float[Array, "kh kw i c"],
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
        return _spread.gathered(_series((fixed, paired), num_terms, rows))
    real, imaginary = linalg.expm_skew_split(paired[:, 0], paired[:, 1])
    return linalg.expm_skew_split(fixed)[0][:, :rows], jnp.stack([real[:, :rows], imaginary[:, :rows]], 1)


def exponential_response(kernel: Float[Array, "kh kw i c"], size: tuple[int, int]) -> Complex[Array, "h f c c"]:
    """The frequency response of exp(A), A the circular convolution with a skew kernel: unitary at every frequency.

    Args:
      kernel: HWIO (kh, kw, c, c), odd sides, a `conv.skew_kernel` (unchecked).
      size: (h, w) of the images.
    Returns: (h, w // 2 + 1, c, c) on the half grid of `jnp.fft.rfft2`, for `conv.apply_response`.
    Raises, source: as `exponential_blocks`.
    Example: all entries of a 1 x 1 response lie on the unit circle.
      >>> kernel = lipjax.conv.skew_kernel(jnp.array([0.0, 0.0, 1.0]).reshape(1, 3, 1, 1))
      >>> abs(lipjax.parametrize.soc.exponential_response(kernel, (1, 4))).ravel().round(4).tolist()
      [1.0, 1.0, 1.0]
    """
    return _dft.unpack(*exponential_blocks(kernel, size), size)


_multiply = _spread.product


def _product(x: Blocks, y: Blocks) -> Blocks:
    """x y, block by block."""
    parts = complex_product((x[1][:, 0], x[1][:, 1]), (y[1][:, 0], y[1][:, 1]))
    return _multiply(x[0], y[0]), jnp.stack(parts, 1)


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
    """The first rows of S_p(A), a polynomial in A^s whose coefficients are polynomials in A (Paterson-Stockmeyer)."""
    share = rows / a[0].shape[-1]
    step = _best_step(num_terms, share)
    if rows == a[0].shape[-1] and _num_parity_products(num_terms) <= sum(_num_products(num_terms, step)):
        return _series_by_parity(a, num_terms)
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


_Parts = tuple[Array, Array, Array]  # real blocks, and the parts of complex ones


def _num_parity_products(num_terms: int) -> int:
    return num_terms // 2 + (num_terms > 2)


def _series_by_parity(a: Blocks, num_terms: int) -> Blocks:
    """S_p(A) = E + A O, E and O polynomials in A^2, hence Hermitian as all their powers: no product needs transposing.

    In the backward pass of other products one of two has a transposed first factor, which XLA for CPU leaves to a
    slower library. This one, of 5 terms, takes 0.6 to 0.8 of their time, forward and backward (benchmarks/soc.py).
    """
    parts: _Parts = (a[0], a[1][:, 0], a[1][:, 1])
    c = [1 / math.factorial(j) for j in range(num_terms + 1)]
    powers: list[Any] = [_normal_product(parts, parts, -1, -1)] if num_terms > 1 else []
    while len(powers) < num_terms // 2:
        powers.append(_normal_product(powers[-1], powers[0], 1, 1))
    odd = _of_powers(c[1::2], powers, parts)
    odd = _normal_product(parts, odd, -1, 1) if num_terms > 2 else parts
    fixed, real, imaginary = jax.tree.map(jnp.add, _of_powers(c[::2], powers, parts), odd)
    return fixed, jnp.stack([real, imaginary], 1)


def _of_powers(c: list[float], powers: list[_Parts], like: _Parts) -> _Parts:
    """c_0 I + c_1 P_1 + c_2 P_2 + ..."""
    eye = jnp.eye(like[0].shape[-1], dtype=like[0].dtype)
    total: Any = tuple(c[0] * eye if i < 2 else 0 * eye for i in range(3))
    for factor, power in zip(c[1:], powers, strict=False):
        total = tuple(t + factor * part for t, part in zip(total, power, strict=True))
    return jax.tree.map(lambda t, part: jnp.broadcast_to(t, part.shape), total, like)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normal_product(x: _Parts, y: _Parts, sign_x: int, sign_y: int) -> _Parts:
    """x y, block by block, where x^H = sign_x x and y^H = sign_y y (unchecked): reverse mode relies on it."""
    del sign_x, sign_y
    return _multiply(x[0], y[0]), *complex_product(x[1:], y[1:])


def _normal_product_forward(x: _Parts, y: _Parts, sign_x: int, sign_y: int):
    return _normal_product(x, y, sign_x, sign_y), (x, y)


def _normal_product_backward(sign_x: int, sign_y: int, factors: tuple[_Parts, _Parts], g: _Parts):
    x, y = factors

    def product(a: _Parts, b: _Parts, sign: int) -> _Parts:
        parts = _multiply(a[0], b[0]), *complex_product(a[1:], b[1:])
        return parts if sign > 0 else jax.tree.map(jnp.negative, parts)

    # g y^H and x^H g.
    return product(g, y, sign_y), product(x, g, sign_x)


_normal_product.defvjp(_normal_product_forward, _normal_product_backward)


# What share of a plain matrix product's speed each kind of work reaches, from benchmarks/soc.py on two cores of an
# AVX-512 Xeon, float32: transforms and convolutions about a third, products of c x c blocks c / (c + side).
_TRANSFORM, _CONVOLUTION = 0.35, 0.3
_APPLICATION_SIDE, _FUNCTION_SIDE = 150, 250
# Products of whole matrices that `linalg.expm_skew_split` and its gradient take at norms up to 2 (12 to 18).
_EXPM_PRODUCTS = 14


def form_costs(
    size: tuple[int, int],
    channels: int,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    batch: int,
    *,
    num_terms: int | None,
    promised_norm: float | None = None,
    num_devices: int = 1,
) -> dict[str, float]:
    """Estimated cost of a training step of one circular SOC layer in each form that can compute its function.

    Floating-point operations, forward and backward, of the parametrisation and its application, each divided by the
    share of the speed of large matrix products that its kind reaches. Forms that differ by less than a fifth may be
    ordered wrongly; what costs the same in all forms is left out.

    Args: as `choose_form`.
    Returns: "spatial", "response" and "series" -> cost in operations of a large matrix product, per device. For
      num_terms = None the first and the last are there only with a promised_norm.
    """
    (h, w), c = size, channels
    n, batch = h * w, -(-batch // num_devices)
    grid = _dft.grid((h, w))
    r, q = len(grid.fixed), len(grid.paired)
    # The matrix functions are spread over devices by frequency.
    matrices = (2 * r + 6 * q) * -(-(r + q) // num_devices) / (r + q)

    def application(width_in, width_out):
        return 3 * (2 * r + 8 * q) * batch * width_in * width_out * (1 + _APPLICATION_SIDE / max(width_in, width_out))

    multiply_adds = n if n <= _dft.DENSE else w + 2 * h
    transforms = 4 * n * multiply_adds * batch * (in_channels + out_channels) / _TRANSFORM
    product = matrices * c**3 * (1 + _FUNCTION_SIDE / c)
    applied = transforms + application(in_channels, out_channels)
    terms = num_terms
    if num_terms is None:
        costs = {"response": applied + _EXPM_PRODUCTS * product}
        terms = None if promised_norm is None else terms_for(promised_norm, 1e-6)
    else:
        share = out_channels / c
        whole, partial = _num_products(num_terms, _best_step(num_terms, share))
        costs = {"response": applied + 3 * (whole + share * partial) * product}
    if terms is not None:
        ends = application(in_channels, c) + application(c, out_channels)
        costs["series"] = transforms + (ends + (terms - 2) * application(c, c) if terms > 1 else ends / 2)
        costs["spatial"] = 3 * terms * 2 * n * batch * kernel_size[0] * kernel_size[1] * c**2 / _CONVOLUTION
    return costs


def choose_form(
    size: tuple[int, int],
    channels: int,
    in_channels: int,
    out_channels: int,
    kernel_size: tuple[int, int],
    batch: int,
    *,
    num_terms: int | None,
    padding: str = "CIRCULAR",
    promised_norm: float | None = None,
    num_devices: int = 1,
) -> str:
    """The form expected to be fastest in training: all compute the same function, to 1e-5 in float32.

    Args:
      size: (h, w) of the images.
      channels: of the skew kernel; the first in_channels of them come in and the first out_channels are kept.
      kernel_size: (kh, kw).
      batch: images per step on all devices.
      num_terms: the highest power of the series, or None for the exponential.
      padding: "ZERO" has the spatial form only.
      promised_norm: a promised bound on the norm of the convolution, or None; with one, forms without a matrix function
        may compute the exponential by a series, to 1e-6.
      num_devices: over which images and frequencies are spread.
    Returns: "spatial" (a convolution per term), "response" (a matrix function per frequency, then one product per
      image) or "series" (a product per term and image in the frequency domain).
    Raises: ValueError for zero padding without num_terms, and another padding.
    """
    if padding not in ("ZERO", "CIRCULAR"):
        raise ValueError(f"Expected padding 'ZERO' or 'CIRCULAR', got {padding!r}.")
    if padding == "ZERO":
        if num_terms is None:
            raise ValueError("Zero padding has only the form 'spatial' with a number of terms, got num_terms None.")
        return "spatial"
    costs = form_costs(
        size,
        channels,
        in_channels,
        out_channels,
        kernel_size,
        batch,
        num_terms=num_terms,
        promised_norm=promised_norm,
        num_devices=num_devices,
    )
    return min(costs, key=lambda form: costs[form])
