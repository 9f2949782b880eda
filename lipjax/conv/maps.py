"""Convolution of NHWC images with HWIO kernels as a linear map: padding, the adjoint, the skew part of a kernel."""

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


def check_square(kernel: Float[Array, "kh kw i o"]) -> None:
    """Raises: ValueError for an even side or unequal channels."""
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
    check_square(kernel)
    return (kernel - adjoint_kernel(kernel)) / 2
