"""Convolution of NHWC images with HWIO kernels as a linear map: padding, adjoint, skew part, series, responses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from lipjax import _dft, _spread

Padding = str | tuple[tuple[int, int], tuple[int, int]]
_DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def stride_pair(strides: int | tuple[int, int]) -> tuple[int, int]:
    """Strides of both axes as a pair. Raises: ValueError if one is below 1."""
    pair = (strides, strides) if isinstance(strides, int) else tuple(strides)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"Expected a stride >= 1 or a pair of them, got {strides!r}.")
    return pair[0], pair[1]


def explicit_padding(kernel_size: tuple[int, ...], padding: Padding) -> tuple[tuple[int, int], tuple[int, int]]:
    """Rows and columns added on each side of the image.

    Args:
      kernel_size: (kh, kw).
      padding: "ZERO" ((k - 1) // 2 on both sides, as the papers' code), "VALID" (none), "CIRCULAR" ((k - 1) // 2 low
        and the rest of k - 1 high, filled by wrapping) or explicit ((lo, hi), (lo, hi)) zeros.
    Returns: ((lo, hi), (lo, hi)). Raises: ValueError for any other padding.
    """
    low = [(k - 1) // 2 for k in kernel_size]
    if padding == "ZERO":
        return (low[0], low[0]), (low[1], low[1])
    if padding == "VALID":
        return (0, 0), (0, 0)
    if padding == "CIRCULAR":
        return (low[0], kernel_size[0] - 1 - low[0]), (low[1], kernel_size[1] - 1 - low[1])
    try:
        (a, b), (c, d) = padding
        pads = ((int(a), int(b)), (int(c), int(d)))
    except (TypeError, ValueError):
        pads = None
    if pads is None or min(*pads[0], *pads[1]) < 0:
        raise ValueError(f"Expected padding 'ZERO', 'VALID', 'CIRCULAR' or ((lo, hi), (lo, hi)) >= 0, got {padding!r}.")
    return pads


def output_size(
    size: tuple[int, ...], kernel_size: tuple[int, ...], strides: int | tuple[int, int], padding: Padding
) -> tuple[int, ...]:
    """Height and width after a convolution: (n + lo + hi - k) // s + 1 per axis.

    Raises: ValueError if the kernel does not fit, or a circular convolution's size is no multiple of its stride.
    """
    steps, pads = stride_pair(strides), explicit_padding(kernel_size, padding)
    if padding == "CIRCULAR" and any(n % s for n, s in zip(size, steps, strict=True)):
        raise ValueError(f"A circular convolution needs sizes divisible by its strides, got {size} and {steps}.")
    out = tuple((n + lo + hi - k) // s + 1 for n, k, s, (lo, hi) in zip(size, kernel_size, steps, pads, strict=True))
    if min(out) < 1:
        raise ValueError(f"A kernel of {kernel_size} does not fit images of {size} with padding {padding!r}.")
    return out


def _pad_input(x: Float[Array, "b h w c"], kernel_size: tuple[int, ...], padding: Padding):
    """Returns the image with its circular padding filled in, and the zero padding that is left to do."""
    pads = explicit_padding(kernel_size, padding)
    if padding == "CIRCULAR":
        return jnp.pad(x, ((0, 0), *pads, (0, 0)), mode="wrap"), ((0, 0), (0, 0))
    return x, pads


def conv2d(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    strides: int | tuple[int, int] = 1,
    padding: Padding = "ZERO",
    precision: lax.Precision | None = None,
) -> Float[Array, "b hh ww o"]:
    """Cross-correlation y[p] = sum_t K[t] x[s p + t - lo].

    Args:
      x: images, NHWC, any unit.
      kernel: HWIO.
      strides: one number or one for each axis.
      padding: see `explicit_padding`. "ZERO" differs from XLA's SAME when strided; "CIRCULAR" sums taps beyond the map.
      precision: of the products; None takes JAX's default.
    Returns: (b, (h + lo + hi - kh) // s + 1, ..., o), in the unit of x.
    Raises: ValueError if channels or sizes do not fit.
    Example: three taps of 1 add each pixel to its neighbours.
      >>> lipjax.conv.conv2d(jnp.arange(4.0).reshape(1, 1, 4, 1), jnp.ones((1, 3, 1, 1))).ravel().tolist()
      [1.0, 3.0, 6.0, 5.0]
    """
    if x.shape[-1] != kernel.shape[2]:
        raise ValueError(
            f"Expected images with {kernel.shape[2]} channels (kernel HWIO {kernel.shape}), got {x.shape}."
        )
    output_size(x.shape[1:3], kernel.shape[:2], strides, padding)
    x, pads = _pad_input(x, kernel.shape[:2], padding)
    return lax.conv_general_dilated(
        x, kernel, stride_pair(strides), pads, dimension_numbers=_DIMENSIONS, precision=precision
    )


def conv2d_adjoint(
    y: Float[Array, "b hh ww c"],
    kernel: Float[Array, "kh kw i o"],
    *,
    in_size: tuple[int, ...],
    strides: int | tuple[int, int] = 1,
    padding: Padding = "ZERO",
    precision: lax.Precision | None = None,
) -> Float[Array, "b h w i"]:
    """The adjoint of `conv2d` on images of height and width `in_size`: <conv2d(x), y> = <x, conv2d_adjoint(y)>.

    Args, errors: as `conv2d`. Returns: (b, *in_size, i).
    """
    steps, pads = stride_pair(strides), explicit_padding(kernel.shape[:2], padding)
    out = output_size(in_size, kernel.shape[:2], strides, padding)
    if y.shape[1:] != (*out, kernel.shape[3]):
        raise ValueError(f"Expected outputs of shape (b, {out[0]}, {out[1]}, {kernel.shape[3]}), got {y.shape}.")
    if padding == "CIRCULAR":
        kwargs = {"strides": strides, "padding": "VALID", "precision": precision}
        padded = tuple(n + lo + hi for n, (lo, hi) in zip(in_size, pads, strict=True))
        return _fold(conv2d_adjoint(y, kernel, in_size=padded, **kwargs), in_size, pads)
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    # The correlation with the flipped kernel reaches every input that an output has read; the others stay zero.
    grown = tuple(
        (k - 1 - lo, n + lo - s * (m - 1) - 1)
        for n, k, s, m, (lo, _) in zip(in_size, kernel.shape[:2], steps, out, pads, strict=True)
    )
    return lax.conv_general_dilated(
        y, flipped, (1, 1), grown, lhs_dilation=steps, dimension_numbers=_DIMENSIONS, precision=precision
    )


def _fold(x: Float[Array, "b h w c"], size: tuple[int, ...], pads) -> Float[Array, "b hh ww c"]:
    """The adjoint of circular padding: every padded pixel is added to the one that it copies."""
    for axis, (n, (lo, _)) in enumerate(zip(size, pads, strict=True), start=1):
        target = (jnp.arange(x.shape[axis]) - lo) % n
        moved = jnp.moveaxis(x, axis, 0)
        x = jnp.moveaxis(jnp.zeros((n, *moved.shape[1:]), x.dtype).at[target].add(moved), 0, axis)
    return x


def adjoint_kernel(kernel: Float[Array, "kh kw i o"]) -> Float[Array, "kh kw o i"]:
    """Taps in reverse order, channels swapped: with odd sides, "ZERO" or "CIRCULAR", the kernel of the adjoint."""
    return jnp.flip(kernel, (0, 1)).swapaxes(2, 3)


def _check_square(kernel: Float[Array, "kh kw i o"]) -> None:
    kh, kw, c_in, c_out = kernel.shape
    if not (kh % 2 and kw % 2) or c_in != c_out:
        raise ValueError(f"Expected an HWIO kernel with odd sides and equal channels, got shape {kernel.shape}.")


def skew_kernel(kernel: Float[Array, "kh kw c c"]) -> Float[Array, "kh kw c c"]:
    """(K - K*) / 2, K* the kernel of the adjoint: its stride-1 convolution A, "ZERO" or "CIRCULAR", has A^T = -A.

    Args:
      kernel: HWIO (kh, kw, c, c), odd sides, any numbers.
    Returns: the same shape, bit for bit the negative of its own adjoint, also under jit.
    Raises: ValueError for an even side or unequal channels. Source: Singla & Feizi 2021, arXiv:2105.11417.
    Example:
      >>> lipjax.conv.skew_kernel(jnp.array([0.0, 5.0, 1.0]).reshape(1, 3, 1, 1)).ravel().tolist()
      [-0.5, 0.0, 0.5]
    """
    _check_square(kernel)
    return (kernel - adjoint_kernel(kernel)) / 2


def space_to_depth(x: Float[Array, "b h w c"], block: int) -> Float[Array, "b hh ww cc"]:
    """Collects blocks of block x block pixels into channels: index (c, k1, k2), c major, (k1, k2) the place inside.

    Args:
      x: images, NHWC (b, h, w, c), any unit.
      block: >= 1, divides h and w.
    Returns: (b, h / block, w / block, c block^2), the same numbers in another order.
    Raises: ValueError unless block >= 1 divides h and w.
    Example:
      >>> lipjax.conv.space_to_depth(jnp.zeros((1, 32, 32, 3)), 2).shape
      (1, 16, 16, 12)
    """
    b, h, w, c = x.shape
    if block < 1 or h % block or w % block:
        raise ValueError(f"Expected a block size >= 1 that divides the size {(h, w)}, got {block}.")
    x = x.reshape(b, h // block, block, w // block, block, c)
    # One place at a time: XLA's loop over a transpose that ends in a reshape of the last axis is several times slower.
    places = [
        place.reshape(b, h // block, w // block, c)
        for row in lax.split(x, (1,) * block, axis=2)
        for place in lax.split(row, (1,) * block, axis=4)
    ]
    return jnp.stack(places, -1).reshape(b, h // block, w // block, c * block**2)


def depth_to_space(x: Float[Array, "b h w c"], block: int) -> Float[Array, "b hh ww cc"]:
    """The inverse of `space_to_depth`: (b, h, w, c) -> (b, h block, w block, c / block^2).

    Raises: ValueError unless block >= 1 and c is divisible by block^2.
    """
    b, h, w, c = x.shape
    if block < 1 or c % block**2:
        raise ValueError(f"Expected a block size >= 1 whose square divides the {c} channels, got {block}.")
    x = x.reshape(b, h, w, c // block**2, block, block)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h * block, w * block, c // block**2)


def _check_series(x, kernel, num_terms: int, padding: str) -> None:
    _check_square(kernel)
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


def packed_response(
    kernel: Float[Array, "kh kw i o"], size: tuple[int, int]
) -> tuple[Float[Array, "r o i"], Float[Array, "q 2 o i"]]:
    """`frequency_response` without redundancy: one block for each pair of frequencies +-f, in real numbers.

    Returns: (fixed, paired): the blocks of the r real frequencies, and (real, imaginary) for the q = (h w - r) / 2
      others, in the order of `_dft.grid(size)`; what `operators.CircularConv.from_blocks` takes.
    """
    phases = _dft.packed_tap_phases((kernel.shape[0], kernel.shape[1]), size)
    return tap_blocks(phases, kernel.swapaxes(2, 3), len(_dft.grid(size).fixed))


def tap_blocks(
    phases: np.ndarray, taps: Float[Array, "kh kw o i"], num_fixed: int
) -> tuple[Float[Array, "r o i"], Float[Array, "q 2 o i"]]:
    """sum_t phases[n, t] taps[t], the first num_fixed rows n and pairs of the others, divided over the devices."""
    if _spread.num_devices() == 1:
        blocks = _tap_product(phases, taps)
        return blocks[:num_fixed], blocks[num_fixed:].reshape(-1, 2, *blocks.shape[1:])
    pairs = phases[num_fixed:].reshape(-1, 2, phases.shape[1])
    taps = taps.reshape(phases.shape[1], *taps.shape[2:])

    def product(table):
        return jnp.tensordot(jnp.asarray(table, taps.dtype), taps, 1, precision=lax.Precision.HIGHEST)

    # Each apart: rows of one divided array would have to travel.
    return _spread.matrices(product(phases[:num_fixed])), _spread.matrices(product(pairs))


def _tap_product(phases: np.ndarray, taps: Float[Array, "kh kw o i"]) -> Float[Array, "n o i"]:
    """sum_t phases[n, t] taps[t]."""
    table = jnp.asarray(phases, taps.dtype)
    product = jnp.matmul(table, taps.reshape(table.shape[1], -1), precision=lax.Precision.HIGHEST)
    return product.reshape(-1, *taps.shape[2:])


def frequency_response(kernel: Float[Array, "kh kw i o"], size: tuple[int, int]) -> Complex[Array, "h f o i"]:
    """R(f) = sum_t K[t]^T exp(2 pi i f (t - lo) / n): what `conv2d(padding="CIRCULAR")` multiplies coefficients by.

    Args:
      kernel: HWIO, lo = (k - 1) // 2; taps beyond the map wrap and are summed.
      size: (h, w) of the images.
    Returns: (h, w // 2 + 1, o, i) on the half grid of `jnp.fft.rfft2`, whose transform has exp(-2 pi i f p / n).
    Example:
      >>> lipjax.conv.frequency_response(jnp.full((1, 1, 1, 1), 2.0), (1, 4)).real.ravel().tolist()
      [2.0, 2.0, 2.0]
    """
    h, w = size
    frequencies = np.stack(np.meshgrid(np.arange(h), np.arange(w // 2 + 1), indexing="ij"), -1).reshape(-1, 2)
    phases = _dft.tap_phases((kernel.shape[0], kernel.shape[1]), size, frequencies)
    blocks = [_tap_product(part, kernel.swapaxes(2, 3)) for part in (np.real(phases), np.imag(phases))]
    return lax.complex(*blocks).reshape(h, w // 2 + 1, kernel.shape[3], kernel.shape[2])


def apply_response(
    response: Complex[Array, "h f o i"], x: Float[Array, "b h w i"], *, precision: lax.Precision | None = None
) -> Float[Array, "b h w o"]:
    """The circular convolution with a frequency response, as products of real matrices.

    Args:
      response: on the half grid (h, w // 2 + 1). Columns that are their own mirror image (0, and w / 2 if w is even)
        enter by their Hermitian part (R[j] + conj R[-j]) / 2, as in the exact inverse transform to real images.
      x: images, NHWC, any unit, of the response's precision.
      precision: of the products; None takes JAX's default.
    Returns: (b, h, w, o), in the unit of x times that of the response.
    Raises: ValueError if the response does not fit the images.
    Example:
      >>> f"{lipjax.conv.apply_response(jnp.full((4, 3, 1, 1), 2.0 + 0j), jnp.ones((1, 4, 4, 1))).max():.3f}"
      '2.000'
    """
    h, w, c = x.shape[1:]
    if response.shape[:2] != (h, w // 2 + 1) or response.shape[3] != c:
        raise ValueError(f"Expected a response (h, w // 2 + 1, o, i) for images {x.shape}, got {response.shape}.")
    blocks = _dft.pack(response, (h, w))
    return _dft.image(_dft.apply_blocks(_dft.spectrum(x, precision), *blocks, precision), (h, w), precision)


__all__ = [
    "Padding",
    "adjoint_kernel",
    "apply_response",
    "conv2d",
    "conv2d_adjoint",
    "depth_to_space",
    "explicit_padding",
    "frequency_response",
    "output_size",
    "packed_response",
    "series_exponential",
    "series_exponential_fast_gradient",
    "skew_kernel",
    "space_to_depth",
    "stride_pair",
    "tap_blocks",
]


def __dir__() -> list[str]:
    return __all__
