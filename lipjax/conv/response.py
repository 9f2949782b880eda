"""Frequency responses: what a circular convolution multiplies Fourier coefficients by."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Complex, Float

from lipjax import _dft, _precision, _spread


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
        blocks = _dft.whole(_tap_product(phases, taps))
        return blocks[:num_fixed], blocks[num_fixed:].reshape(-1, 2, *blocks.shape[1:])
    pairs = phases[num_fixed:].reshape(-1, 2, phases.shape[1])
    taps = taps.reshape(phases.shape[1], *taps.shape[2:])

    def product(table):
        return jnp.tensordot(jnp.asarray(table, taps.dtype), taps, 1, precision=_precision.precise(taps.dtype))

    # Each apart: rows of one divided array would have to travel.
    return _spread.matrices(product(phases[:num_fixed])), _spread.matrices(product(pairs))


def _tap_product(phases: np.ndarray, taps: Float[Array, "kh kw o i"]) -> Float[Array, "n o i"]:
    """sum_t phases[n, t] taps[t]."""
    table = jnp.asarray(phases, taps.dtype)
    product = _precision.product(table, taps.reshape(table.shape[1], -1))
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
