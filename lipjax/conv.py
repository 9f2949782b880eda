"""Convolution as a linear map on arrays: padding rules, the map and its adjoint. NHWC images, HWIO kernels."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

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
    Returns: ((lo, hi), (lo, hi)).
    Raises: ValueError for any other padding.
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
      padding: see `explicit_padding`. "ZERO" differs from XLA's SAME when strided; "CIRCULAR" aligns tap (k - 1) // 2
        with the output, and taps beyond the map are wrapped and summed, never cropped.
      precision: of the products; None takes JAX's default.
    Returns: (b, (h + lo + hi - kh) // s + 1, ..., o), in the unit of x.
    Raises: ValueError if channels or sizes do not fit.
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
    # The correlation with the flipped kernel reaches every input that an output has read; what it never read stays
    # zero.
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
